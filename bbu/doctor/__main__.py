"""Is this site ready? `python -m bbu.doctor --cluster NAME --nodes 2` says so in plain words, with remedies."""

from __future__ import annotations

import argparse
import getpass
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from bbu.doctor.findings import Group, container_findings, failed, host_facts, machine_findings, warning
from bbu.doctor.launch import LOG, local_tasks, prepare, run, slurm_step
from bbu.doctor.nodes import Here, judge
from bbu.doctor.probe import Facts, Plan, Stops, clock_ahead, run_probe
from bbu.doctor.slurm import Kind, kinds_of, slurm_findings
from bbu.errors import JobError, leave_at_once, run_entry
from bbu.jobs.clusters import ClusterProfile, load_profile
from bbu.jobs.queue import call
from bbu.training import preemption

HOME = Path(__file__).resolve().parents[2]


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="python -m bbu.doctor",
        description=__doc__,
        epilog="Exit code: 0, nothing failed (warnings may stand); 7, something failed; 2, the profile is refused.",
    )
    add = described.add_argument
    add("--cluster", default=os.environ.get("BBU_CLUSTER", "local"), metavar="NAME",
        help="a profile under configs/clusters, or a path (BBU_CLUSTER, else local: this machine)")  # fmt: skip
    add("--nodes", type=int, default=1, metavar="N", help="nodes to try, as a training job would take them (1)")
    add("--no-job", action="store_true", help="look at this machine and Slurm only; run nothing on the nodes")
    add("--json", action="store_true", help="print a list of findings for a program to read")
    add("--wait", type=float, default=10, metavar="MINUTES", help="how long the job may wait in the queue (10)")
    add("--probe", type=Path, help=argparse.SUPPRESS)  # what a task of that job runs
    return described


def examine(profile: ClusterProfile, arguments: argparse.Namespace) -> Iterator[Group]:
    """The groups of the report, each as soon as it is known."""
    groups = [Group(f"This machine ({os.uname().nodename})", tuple(machine_findings(profile, HOME)))]
    yield groups[-1]
    if profile.executor == "slurm":
        findings = slurm_findings(profile, arguments.nodes, getpass.getuser(), call)
        groups.append(Group("Slurm", tuple(findings)))
        yield groups[-1]
    groups.append(Group("Container", tuple(container_findings(profile, host_facts(call)))))
    yield groups[-1]
    if arguments.no_job:
        return
    if failed(groups):
        what = "not tried: what failed above comes first"
        yield Group("The job", (warning(what, "put it right and run this again; --no-job leaves the job out"),))
        return
    yield from examine_nodes(profile, arguments)


def examine_nodes(profile: ClusterProfile, arguments: argparse.Namespace) -> Iterator[Group]:
    """Run the probe, as a job or here, and judge what it found. Its folder stays if something failed."""
    folder, plan = prepare(profile)
    keep = False
    try:
        here = Here(HOME, Path.cwd().resolve(), clock_ahead(folder))
        if profile.executor == "slurm":
            kind = kinds_of(profile, arguments.nodes)[0]
            launch, tasks = slurm_step(profile, HOME, arguments.nodes, folder), kind.nodes * kind.tasks_per_node
        else:
            launch = local_tasks(profile, HOME, folder)
            kind, tasks = Kind("train", profile.train, 1), launch.tasks
        outcome = run(launch, folder, tasks, arguments.wait, tell)
        groups = judge(profile, kind, plan, outcome, here)
        keep = failed(groups)
        yield from groups
    finally:
        if keep:
            tell(f"what the tasks wrote is in {folder} ({LOG}, rank-*.json)")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def probe(folder: Path) -> int:
    """One task of the job: the trainer's own stop flag, then a look at the node."""
    flag = preemption.install_stop_handlers()
    return run_probe(folder, Stops(lambda: flag.received.name if flag.received else None), reduce)


def reduce(plan: Plan, folder: Path) -> Facts:
    """Sum over all tasks, with NCCL's own account of the ways it took."""
    if importlib.util.find_spec("torch") is None:
        return {"torch": None}
    log = folder / f"nccl-{os.environ['RANK']}.log"
    os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET,GRAPH", NCCL_DEBUG_FILE=str(log))
    from bbu.doctor.collective import all_reduce_facts, gpu_facts

    gpus = gpu_facts()
    result = all_reduce_facts(plan.megabytes, bool(plan.gpus and gpus["gpus"]), plan.patience_s)
    told = log.read_text(errors="replace") if log.exists() else ""
    kept = "\n".join(line for line in told.splitlines() if " via " in line or "NET/" in line or "network" in line)
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    return {**gpus, **result, "megabytes": plan.megabytes, "interface": interface, "log": kept}


def show(group: Group) -> None:
    print(f"\n{group.title}")
    for finding in group.findings:
        print(f"  {finding.status:<8} {finding.what}")
        if finding.remedy:
            print(f"           -> {finding.remedy}")
    sys.stdout.flush()


def verdict(groups: Sequence[Group]) -> str:
    counts = {status: sum(f.status == status for g in groups for f in g.findings) for status in ("failure", "warning")}
    told = ", ".join(f"{count} {status}{'s' * (count > 1)}" for status, count in counts.items() if count)
    return f"\n{'Not ready' if counts['failure'] else 'Ready'}{f': {told}' if told else ''}."


def as_json(groups: Sequence[Group]) -> str:
    found = [{"group": group.title, **asdict(finding)} for group in groups for finding in group.findings]
    return json.dumps(found, ensure_ascii=False, indent=1)


def tell(text: str) -> None:
    print(f"bbu.doctor: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.probe:
        return probe(arguments.probe)
    profile = load_profile(arguments.cluster)
    if arguments.nodes < 1:
        raise JobError(f"--nodes is {arguments.nodes}; it must be at least 1")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` cancels the job as Ctrl-C does
    groups: list[Group] = []
    try:
        for group in examine(profile, arguments):
            groups.append(group)
            if not arguments.json:
                show(group)
    except KeyboardInterrupt:
        tell("stopped; the job is cancelled")
        return 130
    print(as_json(groups) if arguments.json else verdict(groups))
    return JobError.exit_code if failed(groups) else 0


if __name__ == "__main__":
    run_entry(main, leave_at_once)
