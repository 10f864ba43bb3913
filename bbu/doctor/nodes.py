"""What the reports of the compute nodes mean: each node by itself, and what lies between them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bbu.doctor.findings import GB, LEAST_FREE_GB, Finding, Group, failure, ok, warning
from bbu.doctor.launch import Outcome, Report
from bbu.doctor.network import between
from bbu.doctor.probe import ALL_REDUCE, DONE, FILES, SIGNAL, Plan
from bbu.doctor.slurm import Kind
from bbu.errors import JobError
from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.queue import expand_nodes, one_line

SHM_PER_TASK_GB = 1
SLOW_FSYNC_S = 5
CLOCK_WARNING_S, CLOCK_FAILURE_S = 1, 30
DRIVERS = {13: 580, 12: 525, 11: 450}
"""The oldest driver for each major version of CUDA, by NVIDIA's table of minor version compatibility."""

HINTS = (
    (r"Node failure|NODE FAIL", "a node failed while the job ran: sinfo -R tells why it is out; try again without it"),
    (r"apptainer is not on PATH", "name the site's Apptainer module under modules, or have it installed on the nodes"),
    (r"no image at BBU_IMAGE", "put the image on a filesystem that all nodes see, and correct image in the profile"),
    (r"has SHA-256|BBU_IMAGE_SHA256", "pin the image that is there, or put the pinned one there (image_sha256)"),
    (r"BBU_SCRATCH", "correct scratch: a folder on each node's own disk that you may write to, or null"),
    (r"holds no code in /opt/bbu/src", "state code: checkout, or use an image that carries the code"),
    (r"mount source|while mounting .*(no such file|doesn't exist)", "correct binds: each must be on every node"),
    (r"user namespace|create (user|mount) namespace|max_user_namespaces",
     "ask the administrators to allow user namespaces on the nodes, or for a setuid install of Apptainer"),
    (r"/dev/fuse|fuse: |fusermount|squashfuse",
     "ask the administrators to allow /dev/fuse on the nodes and to install squashfuse and fuse3 there"),
    (r"module: command not found|Lmod|[Uu]nable to locate a module|ModuleCmd",
     "correct modules; the nodes must know the command module (jobs inherit it from the shell that submits)"),
    (r"container\.sh: No such file", "put the checkout on a filesystem that all nodes see"),
    (r"plan\.json", "work_folder is not the same folder on the nodes: choose one on the shared filesystem"),
    (r"RANK is not set", "the container hides Slurm's variables: remove cleanenv from Apptainer's settings"),
    (r"No module named '?bbu", "the image or the nodes do not see the code: put the checkout on the shared filesystem"),
    (r"No module named", "build the image anew (containers/build.sh): it lacks a package"),
    (r"invalid partition|[Ii]nvalid account|[Ii]nvalid qos|node configuration is not available|allocation failure",
     "correct what stands under train in the profile; the group Slurm above says more"),
    (r"[Oo]ut [Oo]f [Mm]emory|oom.kill|OOM", "raise train.memory"),
    (r"[Uu]nable to create step|Communication connection failure|Socket timed out",
     "try again; if it stays, show this line to the administrators"),
)  # fmt: skip
"""What the usual messages of srun, container.sh and Apptainer mean, first match first."""


@dataclass(frozen=True)
class Here:
    """What the reports are compared with: this checkout and folder, and how far the login node's clock is ahead."""

    home: Path
    folder: Path
    clock_ahead_s: float


def judge(profile: ClusterProfile, kind: Kind, plan: Plan, outcome: Outcome, here: Here) -> list[Group]:
    """The groups of the report that need the compute nodes: the job, each node, between the nodes."""
    groups = [Group("The job", tuple(job_findings(kind, outcome)))]
    for node, reports in by_node(outcome).items():
        groups.append(Group(f"Node {node}", tuple(node_findings(profile, kind, plan, reports, here))))
    if outcome.reports:
        title = "Between the nodes" if kind.nodes > 1 else "Between the tasks"
        groups.append(Group(title, tuple(between(outcome))))
    return groups


def by_node(outcome: Outcome) -> dict[str, list[Report]]:
    nodes: dict[str, list[Report]] = {}
    for _, report in sorted(outcome.reports.items()):
        nodes.setdefault(report["node"], []).append(report)
    return nodes


def job_findings(kind: Kind, outcome: Outcome) -> Iterator[Finding]:
    if outcome.problem:
        yield outcome.problem
    missing = [rank for rank in range(outcome.tasks) if rank not in outcome.reports]
    if not missing:
        where, waited = ", ".join(by_node(outcome)), f"{outcome.waited_s:.0f} s in the queue"
        yield ok(f"{outcome.tasks} tasks started on {where} after {waited}")
    elif not outcome.problem or outcome.nodes:  # of a job that never began, the queue has said enough
        yield start_failure(kind, missing, outcome)


def start_failure(kind: Kind, missing: Sequence[int], outcome: Outcome) -> Finding:
    """Tasks that never reported: what Slurm or the container said, and what that means."""
    line, remedy = explain(outcome.log)
    where = places(kind, missing, outcome.nodes) or "the nodes"
    return failure(
        f"{len(missing)} of {kind.nodes * kind.tasks_per_node} tasks did not start on {where}: {line}", remedy
    )


def places(kind: Kind, ranks: Sequence[int], node_list: str) -> str:
    """The nodes of these ranks, which Slurm fills one after the other."""
    try:
        names = expand_nodes(node_list)
    except JobError:  # it has none yet
        return ""
    return ", ".join(dict.fromkeys(names[rank // kind.tasks_per_node] for rank in ranks))


def explain(log: str) -> tuple[str, str]:
    """The telling line of what the tasks printed, and the remedy."""
    lines = [one_line(line) for line in log.splitlines() if line.strip()]
    for pattern, remedy in HINTS:
        if found := next((line for line in lines if re.search(pattern, line)), None):
            return found, remedy
    telling = [line for line in lines if re.search(r"FATAL|[Ee]rror|container\.sh:", line)]
    return (telling or lines or ["nothing was printed"])[-1], "show this line to the administrators"


def node_findings(
    profile: ClusterProfile, kind: Kind, plan: Plan, reports: Sequence[Report], here: Here
) -> Iterator[Finding]:
    """One node, by the report of its first task; the GPUs by the task that sees fewest, the signal by all."""
    first = reports[0]
    yield from container_findings(profile, first, here)
    yield from bind_findings(first)
    yield from size_findings(profile, kind, first)
    yield from unfinished(reports, kind, plan)
    if "clock_ahead_s" in first:
        yield from storage_findings(plan, first)
        yield clock_finding(first["clock_ahead_s"], here.clock_ahead_s)
    if all("reduce" in report for report in reports):
        fewest = min(reports, key=lambda report: len(report["reduce"].get("gpus", [])))
        yield from gpu_findings(profile, kind, fewest)
    yield from interface_findings(plan, first)
    if all("image_error" in report for report in reports):
        yield signal_finding(reports)


def container_findings(profile: ClusterProfile, report: Report, here: Here) -> Iterator[Finding]:
    if profile.image and not report["in_container"]:
        yield failure("Python does not run in the container", "see slurm/container.sh: is BBU_IMAGE overridden?")
    elif profile.image:
        yield ok("the container starts, and sees the variables of its job")
    if profile.image and report["user_site"]:
        remedy = "unset PYTHONNOUSERSITE and APPTAINERENV_PYTHONNOUSERSITE in your environment"
        yield warning("packages in your home folder hide those of the image (user site)", remedy)
    wanted = str(here.home) if profile.code == "checkout" else "/opt/bbu/src"
    if report["code"] == wanted:
        yield ok(f"the code runs from {wanted}")
    else:
        remedy = "put the checkout on a filesystem that all nodes see, and remove bbu from the image or PYTHONPATH"
        yield failure(f"the code runs from {report['code']}, not from {wanted}", remedy)
    if report["cwd"] != str(here.folder):
        remedy = "start jobs in a folder that all nodes see; what runs write would be lost there"
        yield failure(f"jobs start in {report['cwd']}: the node has no {here.folder}", remedy)


def bind_findings(report: Report) -> Iterator[Finding]:
    for bind in report["binds"]:
        if not bind["readable"]:
            yield failure(f"the bind {bind['bind']} cannot be read inside", "ask for access, or correct binds")
        else:
            yield ok(f"the bind {bind['bind']} can be read{' and written' if bind['writable'] else ', not written'}")


def size_findings(profile: ClusterProfile, kind: Kind, report: Report) -> Iterator[Finding]:
    """What the job was given, against what the profile asks for."""
    asked, cpus = kind.asked.cpus_per_task, report["cpus"]
    if cpus < asked:
        remedy = "check the site's defaults for CPU binding (srun --cpu-bind), or lower train.cpus_per_task"
        yield warning(f"a task may use {cpus} CPUs, {asked} are asked for", remedy)
    else:
        yield ok(f"a task may use {cpus} CPUs ({asked} asked for)")
    yield memory_finding(kind, report)
    least, free = SHM_PER_TASK_GB * kind.tasks_per_node, report["shm_free"] / GB
    if free < least:
        remedy = "ask for a larger /dev/shm; until then state dataloader_num_workers: 0 in the run config"
        yield warning(
            f"/dev/shm has {free:.1f} GB free for {kind.tasks_per_node} tasks: DataLoader and NCCL need it", remedy
        )
    else:
        yield ok(f"/dev/shm has {free:.1f} GB free")
    folder, left = report["temporary"]["folder"], report["temporary"]["free"] / GB
    if left < 1:
        remedy = "state a folder on the node's own disk under scratch"
        yield warning(f"the folder for temporary files has {left:.1f} GB free: {folder}", remedy)
    else:
        yield ok(f"temporary files go to {folder}, {left:.0f} GB free")


def memory_finding(kind: Kind, report: Report) -> Finding:
    limit = report["limit_mb"] or report["memory_mb"]
    told = f"{limit / 1024:.1f} GB of memory for the job" if report["limit_mb"] else f"{limit / 1024:.1f} GB of memory"
    if limit < kind.memory_mb * 0.98:
        asked = f"{kind.memory_mb / 1024:.1f} GB asked for"
        return warning(f"{told}, {asked}", "raise train.memory, or ask why the site gives less")
    return ok(told)


def unfinished(reports: Sequence[Report], kind: Kind, plan: Plan) -> Iterator[Finding]:
    """Tasks that were stopped on the way, by what they were at."""
    stages = Counter(report["stage"] for report in reports if report["stage"] != DONE)
    remedies = {
        FILES: "the shared filesystem may hang: try ls in work_folder on this node; the administrators can see more",
        ALL_REDUCE: "the nodes cannot reach each other, or the GPUs hang: state network_interface (ip addr on a node "
        "lists them), and master_suffix if the fast network has names of its own",
        SIGNAL: "if another task failed, see there first; else state shield: auto in the profile, and have squashfuse "
        "installed on the nodes, so that the image outlives Slurm's signal",
    }
    words = {FILES: "trying the shared filesystem", ALL_REDUCE: "summing over all tasks",
             SIGNAL: "waiting for the stop signal USR2, or taking it"}  # fmt: skip
    for stage, count in stages.items():
        yield failure(f"{count} of {len(reports)} tasks ended while {words[stage]}", remedies[stage])


def storage_findings(plan: Plan, report: Report) -> Iterator[Finding]:
    if report["token"] != plan.token:
        yield failure("the work folder is another one than on the login node", "choose one on the shared filesystem")
    else:
        yield ok("the shared filesystem is the login node's: each reads what the other wrote")
    free, took = report["free"] / GB, report["fsync_s"]
    if free < LEAST_FREE_GB:
        yield warning(f"the work folder has {free:.1f} GB left", "remove old runs, or choose another filesystem")
    if took > SLOW_FSYNC_S:
        remedy = "checkpoints will take long: choose a faster filesystem for output_root"
        yield warning(f"writing 4 MB durably took {took:.1f} s", remedy)
    else:
        locks = "has file locks" if report["flock"] else "has no file locks (not needed)"
        yield ok(f"4 MB were written durably in {took * 1000:.0f} ms; the filesystem {locks}")


def clock_finding(ahead_s: float, login_ahead_s: float) -> Finding:
    """Both clocks against the filesystem's, which is one for all."""
    skew = max(abs(ahead_s), abs(ahead_s - login_ahead_s), abs(login_ahead_s))
    told = (
        f"clock {ahead_s:+z.2f} s against the filesystem's, {ahead_s - login_ahead_s:+z.2f} s against the login node's"
    )
    remedy = "ask the administrators to synchronise the clocks (chrony, NTP): times in logs mislead until then"
    if skew > CLOCK_FAILURE_S:
        return failure(told, remedy)
    return warning(told, remedy) if skew > CLOCK_WARNING_S else ok(told)


def gpu_findings(profile: ClusterProfile, kind: Kind, report: Report) -> Iterator[Finding]:
    facts, asked = report["reduce"], kind.asked.gpus_per_node
    if facts["torch"] is None:
        remedy = "train in an image (containers/build.sh), or pip install -e '.[train]'"
        local = profile.executor == "local"
        yield (warning if local else failure)("torch is not installed: nothing can be trained here", remedy)
        return
    if not asked:
        yield ok(f"torch {facts['torch']}, on CPUs: the profile asks for no GPUs")
        return
    if facts["cuda"] is None:
        remedy = "use the CUDA image (containers/build.sh cuda)"
        yield failure(f"torch {facts['torch']} is built without CUDA, {asked} GPUs are asked for", remedy)
        return
    yield driver_finding(report["driver"], facts)
    seen, names = len(facts["gpus"]), ", ".join(f"{n} x {name}" for name, n in Counter(facts["gpus"]).items())
    if seen == asked:
        yield ok(f"a task sees the node's {seen} GPUs: {names}")
    else:
        remedy = "correct train.gpus_per_node or gpu_request; all GPUs of the job's node must be seen by each task"
        yield failure(f"a task sees {seen} GPUs ({names or 'none'}), {asked} are asked for", remedy)


def driver_finding(driver: str | None, facts: Report) -> Finding:
    oldest = DRIVERS.get(int(facts["cuda"].split(".")[0]), 0)
    if driver is None:
        remedy = "the node has no NVIDIA driver, or it is not visible: correct partition; the container needs --nv"
        return failure(f"no NVIDIA driver is seen{error_text(facts)}", remedy)
    told = f"NVIDIA driver {driver}, torch {facts['torch']} for CUDA {facts['cuda']}"
    if int(driver.split(".")[0]) < oldest:
        remedy = f"use an image for an older CUDA, or ask for driver {oldest} or newer"
        return failure(f"{told} needs driver {oldest} or newer", remedy)
    if facts["gpu_error"]:
        return failure(f"{told}: {facts['gpu_error']}", "show this line to the administrators; nvidia-smi may say more")
    return ok(told)


def error_text(facts: Report) -> str:
    return f" ({facts['gpu_error']})" if facts["gpu_error"] else ""


def interface_findings(plan: Plan, report: Report) -> Iterator[Finding]:
    wanted, there = plan.network_interface, report["interfaces"]
    if wanted is None:
        return
    if not has_interface(wanted, list(there)):
        remedy = f"state one that is there under network_interface: {', '.join(there)}; or null"
        yield warning(f"there is no network interface {wanted}", remedy)
    else:
        yield ok(f"the network interface {wanted} is there{address(there.get(wanted))}")


def has_interface(wanted: str, there: Sequence[str]) -> bool:
    """As NCCL reads it: prefixes, exact names after `=`, and after `^` those to leave out."""
    if wanted.startswith("^"):
        return any(not name.startswith(tuple(wanted[1:].lstrip("=").split(","))) for name in there)
    if wanted.startswith("="):
        return any(name in there for name in wanted[1:].split(","))
    return any(name.startswith(tuple(wanted.split(","))) for name in there)


def address(ip: str | None) -> str:
    return f" ({ip})" if ip else ""


def signal_finding(reports: Sequence[Report]) -> Finding:
    """Whether a job that Slurm stops can save: the signal came to Python, and its image stayed."""
    bad = [report for report in reports if not report["signal"] or report["image_error"]]
    if not bad:
        return ok(f"the stop signal USR2 reached {len(reports)} of {len(reports)} tasks, and the image stayed readable")
    why = bad[0]["image_error"] or "no signal came"
    remedy = "state shield: auto, and have squashfuse installed on the nodes; see slurm/container.sh"
    return failure(f"after the stop signal USR2 {len(bad)} of {len(reports)} tasks could not go on: {why}", remedy)
