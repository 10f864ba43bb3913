"""What the tasks' reports mean: the job, each node by itself, and what lies between the nodes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bbu.doctor.findings import GB, LEAST_FREE_GB, Finding, Group, failure, ok, warning
from bbu.doctor.launch import Outcome
from bbu.doctor.network import connection_findings
from bbu.doctor.report import (
    ALL_REDUCE,
    DONE,
    FILES,
    SIGNAL,
    FileFacts,
    NodeFacts,
    Plan,
    ReduceFacts,
    TaskReport,
    files_of,
    nodes_of,
    reduced_of,
)
from bbu.doctor.slurm import JobKind
from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.queue import one_line

_SHM_PER_TASK_GB = 1
_LEAST_TEMPORARY_GB = 1
_SLOW_FSYNC_S = 5
_CLOCK_WARNING_S, _CLOCK_FAILURE_S = 1, 30
_MEMORY_TOLERANCE = 0.98
"""A limit may be a little below the request: Slurm and the kernel round."""
_OLDEST_DRIVERS = {13: 580, 12: 525, 11: 450}
"""The oldest driver for each major version of CUDA, by NVIDIA's table of minor version compatibility."""

_HINTS = (
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
    (r"(task|container)\.sh: No such file", "put the checkout on a filesystem that all nodes see"),
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
class LoginNode:
    """What the reports are compared with."""

    checkout: Path
    """The folder with the code."""
    folder: Path
    """The current folder, in which jobs start."""
    clock_ahead_s: float
    """How far the login node's clock is ahead of the filesystem's, in seconds."""


def node_groups(profile: ClusterProfile, kind: JobKind, plan: Plan, outcome: Outcome, login: LoginNode) -> list[Group]:
    """Judge what the doctor's job brought back.

    Args:
        profile: the cluster profile.
        kind: the job's kind and size.
        plan: the plan that the tasks followed.
        outcome: what came of the job.
        login: the login node, for comparison.

    Returns:
        One group for the job, one for each node, and one for what lies between the nodes.
    """
    groups = [Group("The job", tuple(_job_findings(kind, outcome)))]
    for node, reports in nodes_of(outcome.reports).items():
        groups.append(Group(f"Node {node}", tuple(_node_findings(profile, kind, plan, reports, login))))
    if outcome.reports:
        title = "Between the nodes" if kind.nodes > 1 else "Between the tasks"
        groups.append(Group(title, tuple(connection_findings(outcome))))
    return groups


def _job_findings(kind: JobKind, outcome: Outcome) -> Iterator[Finding]:
    if outcome.problem:
        yield outcome.problem
    missing = [rank for rank in range(outcome.tasks) if rank not in outcome.reports]
    if not missing:
        names, waited = ", ".join(nodes_of(outcome.reports)), f"{outcome.waited_s:.0f} s in the queue"
        yield ok(f"{outcome.tasks} tasks started on {names} after {waited}")
    elif not outcome.problem or outcome.nodes:  # a job that never started needs no more than its reason to wait
        yield _start_failure(kind, missing, outcome)


def _start_failure(kind: JobKind, missing: Sequence[int], outcome: Outcome) -> Finding:
    """Tasks that never reported: what Slurm or the container printed, and what that means."""
    line, remedy = _explain_log(outcome.log)
    names = ", ".join(_node_names(kind, missing, outcome.nodes)) or "the nodes"
    tasks = kind.nodes * kind.resources.tasks_per_node
    return failure(f"{len(missing)} of {tasks} tasks did not start on {names}: {line}", remedy)


def _node_names(kind: JobKind, ranks: Sequence[int], nodes: Sequence[str]) -> list[str]:
    """The nodes of these ranks: Slurm fills one node after the other. Empty where the job never had any."""
    if not nodes:
        return []
    return list(dict.fromkeys(nodes[rank // kind.resources.tasks_per_node] for rank in ranks))


def _explain_log(log: str) -> tuple[str, str]:
    """The line that says most among what the tasks printed, and the remedy."""
    lines = [one_line(line) for line in log.splitlines() if line.strip()]
    for pattern, remedy in _HINTS:
        if match := next((line for line in lines if re.search(pattern, line)), None):
            return match, remedy
    errors = [line for line in lines if re.search(r"FATAL|[Ee]rror|container\.sh:", line)]
    return (errors or lines or ["nothing was printed"])[-1], "show this line to the administrators"


def _node_findings(
    profile: ClusterProfile, kind: JobKind, plan: Plan, reports: Sequence[TaskReport], login: LoginNode
) -> Iterator[Finding]:
    """Judge one node by the report of its first task, its GPUs by the task that sees fewest, the signal by all."""
    first = reports[0]
    yield from _inside_findings(profile, first.node, login)
    yield from _inner_bind_findings(first.node)
    yield from _size_findings(kind, first.node)
    yield from _unfinished_findings(reports)
    if files := files_of(reports[:1]):
        yield from _storage_findings(plan, files[0])
        yield _clock_finding(files[0].clock_ahead_s, login.clock_ahead_s)
    if len(reduced := reduced_of(reports)) == len(reports):
        fewest = min(reduced, key=lambda each: len(each.gpus))
        yield from _gpu_findings(profile, kind, first.node.driver, fewest)
    yield from _interface_findings(plan, first.node)
    if all(report.stop and report.stop.signal for report in reports):
        yield _signal_finding(reports)


def _inside_findings(profile: ClusterProfile, node: NodeFacts, login: LoginNode) -> Iterator[Finding]:
    """Judge what the task runs in: the container, the code, the current folder."""
    if profile.image and not node.in_container:
        yield failure("Python does not run in the container", "see slurm/container.sh: is BBU_IMAGE overridden?")
    elif profile.image:
        yield ok("the container starts, and sees the variables of its job")
    if profile.image and node.user_site:
        remedy = "unset PYTHONNOUSERSITE and APPTAINERENV_PYTHONNOUSERSITE in your environment"
        yield warning("packages in your home folder hide those of the image (user site)", remedy)
    expected = str(login.checkout) if profile.code == "checkout" else "/opt/bbu/src"
    if node.code == expected:
        yield ok(f"the code runs from {expected}")
    else:
        remedy = "put the checkout on a filesystem that all nodes see, and remove bbu from the image or PYTHONPATH"
        yield failure(f"the code runs from {node.code}, not from {expected}", remedy)
    if node.current_folder != str(login.folder):
        remedy = "start jobs in a folder that all nodes see; what runs write would be lost there"
        yield failure(f"jobs start in {node.current_folder}: the node has no {login.folder}", remedy)


def _inner_bind_findings(node: NodeFacts) -> Iterator[Finding]:
    for bind in node.binds:
        if not bind.readable:
            yield failure(f"the bind {bind.bind} cannot be read inside", "ask for access, or correct binds")
        else:
            yield ok(f"the bind {bind.bind} can be read{' and written' if bind.writable else ', not written'}")


def _size_findings(kind: JobKind, node: NodeFacts) -> Iterator[Finding]:
    """Compare what the job got with what the profile requests."""
    yield _cpu_finding(node.cpus, kind.resources.cpus_per_task)
    yield _memory_finding(kind.resources.memory_mb, node)
    yield _shm_finding(node.shm_free / GB, kind.resources.tasks_per_node)
    free = node.temporary_free / GB
    if free < _LEAST_TEMPORARY_GB:
        remedy = "state a folder on the node's own disk under scratch"
        yield warning(f"the folder for temporary files has {free:.1f} GB free: {node.temporary_folder}", remedy)
    else:
        yield ok(f"temporary files go to {node.temporary_folder}, {free:.0f} GB free")


def _cpu_finding(cpus: int, requested: int) -> Finding:
    if cpus >= requested:
        return ok(f"a task may use {cpus} CPUs ({requested} requested)")
    remedy = "check the site's defaults for CPU binding (srun --cpu-bind), or lower train.cpus_per_task"
    return warning(f"a task may use {cpus} CPUs, {requested} are requested", remedy)


def _memory_finding(requested_mb: int, node: NodeFacts) -> Finding:
    limit_mb = node.memory_limit_mb or node.memory_mb
    text = f"{limit_mb / 1024:.1f} GB of memory{' for the job' if node.memory_limit_mb else ''}"
    if limit_mb < requested_mb * _MEMORY_TOLERANCE:
        what = f"{text}, {requested_mb / 1024:.1f} GB requested"
        return warning(what, "raise train.memory, or ask why the site gives less")
    return ok(text)


def _shm_finding(free_gb: float, tasks: int) -> Finding:
    if free_gb >= _SHM_PER_TASK_GB * tasks:
        return ok(f"/dev/shm has {free_gb:.1f} GB free")
    remedy = "ask for a larger /dev/shm; until then state dataloader_num_workers: 0 in the run config"
    return warning(f"/dev/shm has {free_gb:.1f} GB free for {tasks} tasks: DataLoader and NCCL need it", remedy)


def _unfinished_findings(reports: Sequence[TaskReport]) -> Iterator[Finding]:
    """Name the tasks that ended on the way, by their stage."""
    stages = Counter(report.stage for report in reports if report.stage != DONE)
    words = {FILES: "trying the shared filesystem", ALL_REDUCE: "summing over all tasks",
             SIGNAL: "waiting for the stop signal USR2, or taking it"}  # fmt: skip
    remedies = {
        FILES: "the shared filesystem may hang: try ls in work_folder on this node; the administrators can see more",
        ALL_REDUCE: "the nodes cannot reach each other, or the GPUs hang: state network_interface (ip addr on a node "
        "lists them), and master_suffix if the fast network has names of its own",
        SIGNAL: "if another task failed, see there first; else state shield: auto in the profile, and have squashfuse "
        "installed on the nodes, so that the image outlives Slurm's signal",
    }
    for stage, count in stages.items():
        yield failure(f"{count} of {len(reports)} tasks ended while {words[stage]}", remedies[stage])


def _storage_findings(plan: Plan, files: FileFacts) -> Iterator[Finding]:
    if files.token != plan.token:
        yield failure("the work folder is another one than on the login node", "choose one on the shared filesystem")
    else:
        yield ok("the shared filesystem is the login node's: each reads what the other wrote")
    free = files.free / GB
    if free < LEAST_FREE_GB:
        yield warning(f"the work folder has {free:.1f} GB left", "remove old runs, or choose another filesystem")
    if files.fsync_s > _SLOW_FSYNC_S:
        remedy = "checkpoints will take long: choose a faster filesystem for output_root"
        yield warning(f"writing 4 MB durably took {files.fsync_s:.1f} s", remedy)
    else:
        locks = "has file locks" if files.has_locks else "has no file locks (not needed)"
        yield ok(f"4 MB were written durably in {files.fsync_s * 1000:.0f} ms; the filesystem {locks}")


def _clock_finding(ahead_s: float, login_ahead_s: float) -> Finding:
    """Compare both clocks with the filesystem's, which is the same for all."""
    skew = max(abs(ahead_s), abs(ahead_s - login_ahead_s), abs(login_ahead_s))
    text = (
        f"clock {ahead_s:+z.2f} s against the filesystem's, {ahead_s - login_ahead_s:+z.2f} s against the login node's"
    )
    remedy = "ask the administrators to synchronise the clocks (chrony, NTP): times in logs mislead until then"
    if skew > _CLOCK_FAILURE_S:
        return failure(text, remedy)
    return warning(text, remedy) if skew > _CLOCK_WARNING_S else ok(text)


def _gpu_findings(profile: ClusterProfile, kind: JobKind, driver: str | None, facts: ReduceFacts) -> Iterator[Finding]:
    requested = kind.resources.gpus_per_node
    if facts.torch is None:
        remedy = "train in an image (containers/build.sh), or pip install -e '.[train]'"
        problem = warning if profile.executor == "local" else failure
        yield problem("torch is not installed: nothing can be trained here", remedy)
    elif not requested:
        yield ok(f"torch {facts.torch}, on CPUs: the profile requests no GPUs")
    elif facts.cuda is None:
        remedy = "use the CUDA image (containers/build.sh cuda)"
        yield failure(f"torch {facts.torch} is built without CUDA, {requested} GPUs are requested", remedy)
    else:
        yield _driver_finding(driver, facts.cuda, facts)
        yield _gpu_count_finding(facts.gpus, requested)


def _gpu_count_finding(gpus: Sequence[str], requested: int) -> Finding:
    names = ", ".join(f"{count} x {name}" for name, count in Counter(gpus).items())
    if len(gpus) == requested:
        return ok(f"a task sees the node's {len(gpus)} GPUs: {names}")
    remedy = "correct train.gpus_per_node or gpu_request; all GPUs of the job's node must be seen by each task"
    return failure(f"a task sees {len(gpus)} GPUs ({names or 'none'}), {requested} are requested", remedy)


def _driver_finding(driver: str | None, cuda: str, facts: ReduceFacts) -> Finding:
    if driver is None:
        remedy = "the node has no NVIDIA driver, or it is not visible: correct partition; the container needs --nv"
        return failure(f"no NVIDIA driver is seen{f' ({facts.gpu_error})' if facts.gpu_error else ''}", remedy)
    oldest = _OLDEST_DRIVERS.get(int(cuda.split(".")[0]), 0)
    text = f"NVIDIA driver {driver}, torch {facts.torch} for CUDA {cuda}"
    if int(driver.split(".")[0]) < oldest:
        remedy = f"use an image for an older CUDA, or ask for driver {oldest} or newer"
        return failure(f"{text} needs driver {oldest} or newer", remedy)
    if facts.gpu_error:
        return failure(f"{text}: {facts.gpu_error}", "show this line to the administrators; nvidia-smi may say more")
    return ok(text)


def _interface_findings(plan: Plan, node: NodeFacts) -> Iterator[Finding]:
    stated = plan.network_interface
    if stated is None:
        return
    if not _has_interface(stated, list(node.interfaces)):
        remedy = f"state one that is there under network_interface: {', '.join(node.interfaces)}; or null"
        yield warning(f"there is no network interface {stated}", remedy)
    else:
        address = node.interfaces.get(stated)
        yield ok(f"the network interface {stated} is there{f' ({address})' if address else ''}")


def _has_interface(stated: str, names: Sequence[str]) -> bool:
    """Whether one of these interfaces matches, as NCCL reads NCCL_SOCKET_IFNAME.

    The text holds prefixes, exact names after `=`, and after `^` those to leave out.
    """
    if stated.startswith("^"):
        return any(not name.startswith(tuple(stated[1:].lstrip("=").split(","))) for name in names)
    if stated.startswith("="):
        return any(name in stated[1:].split(",") for name in names)
    return any(name.startswith(tuple(stated.split(","))) for name in names)


def _signal_finding(reports: Sequence[TaskReport]) -> Finding:
    """Judge whether a job that Slurm stops can save: Python got the signal, and its image stayed readable."""
    errors = [report.stop.image_error for report in reports if report.stop and report.stop.image_error]
    if not errors:
        return ok(f"the stop signal USR2 reached {len(reports)} of {len(reports)} tasks, and the image stayed readable")
    remedy = "state shield: auto, and have squashfuse installed on the nodes; see slurm/container.sh"
    what = f"after the stop signal USR2 {len(errors)} of {len(reports)} tasks could not go on: {errors[0]}"
    return failure(what, remedy)
