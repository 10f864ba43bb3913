"""Is this site ready? `python -m bbu.doctor --cluster NAME --nodes 2` says so in plain words, with remedies."""

from __future__ import annotations

import argparse
import getpass
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from bbu.config.arguments import (
    DEFAULT_CLUSTER,
    add_cluster_argument,
    add_config_arguments,
    add_json_argument,
    config_from_arguments,
)
from bbu.config.flat import DirectConfig
from bbu.doctor.findings import Group, any_failed, findings_json, print_group, summary_line, warning
from bbu.doctor.launch import LOG, local_tasks, prepare_folder, run_tasks, slurm_step
from bbu.doctor.login import container_findings, host_facts, machine_findings
from bbu.doctor.memory import least_card_bytes, memory_findings
from bbu.doctor.nodes import LoginNode, node_groups
from bbu.doctor.probe import clock_ahead_s, run_probe
from bbu.doctor.report import TaskReport
from bbu.doctor.slurm import job_kinds, slurm_findings
from bbu.errors import INTERRUPTED_EXIT_CODE, JobError, exit_without_teardown, run_entry
from bbu.jobs.clusters import ClusterProfile, load_profile
from bbu.jobs.launch import CHECKOUT
from bbu.jobs.queue import run_slurm_command
from bbu.logs import print_notice

_notify = partial(print_notice, "bbu.doctor")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bbu.doctor",
        description=__doc__,
        epilog="Exit code: 0, nothing failed (warnings may stand); 7, something failed; 2, the profile is refused.",
    )
    add = parser.add_argument
    add_cluster_argument(parser)
    text = "estimate the memory of this run config too: a name under configs, or a path"
    add_config_arguments(parser, required=False, description=text)
    add("--nodes", type=int, default=1, metavar="N", help="nodes to try, as a training job would take them (1)")
    add("--no-job", action="store_true", help="look at this machine and Slurm only; run nothing on the nodes")
    add_json_argument(parser)
    add("--wait", type=float, default=10, metavar="MINUTES", help="how long the job may wait in the queue (10)")
    add("--probe", type=Path, help=argparse.SUPPRESS)  # what a task of that job runs
    return parser


def _examine(profile: ClusterProfile, config: DirectConfig | None, arguments: argparse.Namespace) -> Iterator[Group]:
    """The groups of the report, each as soon as it is ready."""
    groups = [Group(f"This machine ({os.uname().nodename})", tuple(machine_findings(profile, CHECKOUT)))]
    yield groups[-1]
    if profile.executor == "slurm":
        findings = slurm_findings(profile, arguments.nodes, getpass.getuser(), run_slurm_command)
        groups.append(Group("Slurm", tuple(findings)))
        yield groups[-1]
    groups.append(Group("Container", tuple(container_findings(profile, host_facts(run_slurm_command)))))
    yield groups[-1]
    if arguments.no_job:
        yield from _memory_groups(profile, config, arguments.nodes, {})
        return
    if any_failed(groups):
        what = "not tried: what failed above comes first"
        yield Group("The job", (warning(what, "put it right and run this again; --no-job leaves the job out"),))
        return
    yield from _examine_nodes(profile, config, arguments)


def _memory_groups(
    profile: ClusterProfile, config: DirectConfig | None, nodes: int, reports: Mapping[int, TaskReport]
) -> Iterator[Group]:
    """The memory of a run config on the cards that the tasks saw; nothing without a config."""
    if config is not None:
        ranks = nodes * max(1, job_kinds(profile, nodes)[0].resources.gpus_per_node)
        yield Group("Memory", tuple(memory_findings(config, ranks, least_card_bytes(reports))))


def _examine_nodes(
    profile: ClusterProfile, config: DirectConfig | None, arguments: argparse.Namespace
) -> Iterator[Group]:
    """Run the probe, as a job or here, and judge its reports. Its folder stays if something failed."""
    folder, plan = prepare_folder(profile)
    keep = False
    try:
        login = LoginNode(CHECKOUT, Path.cwd().resolve(), clock_ahead_s(folder))
        if profile.executor == "slurm":
            kind = job_kinds(profile, arguments.nodes)[0]
            launch = slurm_step(profile, CHECKOUT, arguments.nodes, folder)
            tasks = kind.nodes * kind.resources.tasks_per_node
        else:
            launch, kind = local_tasks(profile, CHECKOUT, folder), job_kinds(profile, 1)[0]
            tasks = launch.tasks
        outcome = run_tasks(launch, folder, tasks, arguments.wait, _notify)
        groups = node_groups(profile, kind, plan, outcome, login)
        groups += _memory_groups(profile, config, kind.nodes, outcome.reports)
        keep = any_failed(groups)
        yield from groups
    finally:
        if keep:
            _notify(f"what the tasks wrote is in {folder} ({LOG}, rank-*.json)")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print them; returns 7 where something failed."""
    arguments = _parser().parse_args(argv)
    if arguments.probe:
        return run_probe(arguments.probe)
    profile = load_profile(arguments.cluster or DEFAULT_CLUSTER)
    if arguments.cluster is None and shutil.which("sbatch"):
        _notify("this looks at this machine alone; --cluster NAME looks at Slurm and its nodes")
    if arguments.nodes < 1:
        raise JobError(f"--nodes is {arguments.nodes}; it must be at least 1")
    config = config_from_arguments(arguments, os.environ) if arguments.config else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` cancels the job as Ctrl-C does
    groups: list[Group] = []
    try:
        for group in _examine(profile, config, arguments):
            groups.append(group)
            if not arguments.json:
                print_group(group)
    except KeyboardInterrupt:
        _notify("stopped; the job is cancelled")
        return INTERRUPTED_EXIT_CODE
    print(findings_json(groups) if arguments.json else summary_line(groups))
    return JobError.exit_code if any_failed(groups) else 0


if __name__ == "__main__":
    run_entry(main, exit_without_teardown)
