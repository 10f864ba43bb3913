"""Is Slurm ready for this project? The doctor's checks of Slurm's settings, partitions, nodes and accounts.

Every check takes Slurm's answers as text, so that a test can bring any site's.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bbu.doctor.findings import FAILURE, Call, Finding, failure, ok, warning
from bbu.jobs.clusters import ClusterProfile, GpuRequest
from bbu.jobs.queue import DEFAULT_MAX_ARRAY, one_line, parse_slurm_config
from bbu.jobs.schedule import scrontab_enabled
from bbu.jobs.slurm import sbatch_options
from bbu.jobs.spec import Resources

_COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")
_OLDEST_SLURM = (20, 11)
_TIME_TO_SAVE_S = 30
"""In less time a checkpoint of several gigabytes is hardly written."""
_FORGETS_SOON_S = 60
"""A MinJobAge below this is gone before a person has looked; Slurm's default is 300 s."""
_CRED_EXPIRE_S = 120
"""Slurm's default for cred_expire in AuthInfo: a requeued job waits until the credential of its last run expires."""
_OUT_OF_SERVICE = re.compile(r"DOWN|DRAIN|FAIL|MAINT|ERROR|UNKNOWN|FUTURE|NOT_RESPONDING|REBOOT|BLOCKED|\*$")
"""States of a node that takes no job; a trailing * says that it does not respond."""

Which = Callable[[str], str | None]
"""Finds a program, as shutil.which does."""
Records = list[dict[str, str]]
"""Partitions or nodes: the fields of each by Slurm's name."""


@dataclass(frozen=True)
class JobKind:
    """One kind of job of the profile, at the size in which it runs."""

    name: str
    """train, convert or eval: the profile's key."""
    resources: Resources
    """What the profile requests for it."""
    nodes: int
    """Number of nodes."""


def job_kinds(profile: ClusterProfile, nodes: int) -> list[JobKind]:
    """Return the profile's kinds of job; only training takes more than one node."""
    return [
        JobKind("train", profile.train, nodes),
        JobKind("convert", profile.convert, 1),
        JobKind("eval", profile.eval, 1),
    ]


def slurm_findings(
    profile: ClusterProfile, nodes: int, user: str, call: Call, which: Which = shutil.which
) -> Iterator[Finding]:
    """Check everything about Slurm that a query can answer, without a job.

    Args:
        profile: the cluster profile.
        nodes: nodes that a training job takes.
        user: the name under which accounting knows the caller.
        call: runs a command.
        which: finds a program.
    """
    missing = [name for name in _COMMANDS if which(name) is None]
    if missing:
        remedy = "load Slurm (such as module load slurm), go to a login node of the cluster, or use --cluster local"
        yield failure(f"Slurm's commands are not on PATH: {', '.join(missing)}", remedy)
        return
    yield _version_finding(call(["sbatch", "--version"])[1])
    code, text, error = call(["scontrol", "show", "config"])
    if code:
        remedy = "ask whether Slurm is down for maintenance; until it answers, nothing can be submitted"
        yield failure(f"Slurm's controller does not answer: {one_line(error or text)}", remedy)
        return
    config = parse_slurm_config(text)
    yield ok(f"the controller of cluster {config.get('ClusterName', '?')} answers")
    partitions = _read_records(call(["scontrol", "show", "partition", "-o"])[1])
    members = _read_records(call(["scontrol", "show", "node", "-o"])[1])
    yield from _setting_findings(profile, config, which)
    yield _preemption_finding(config, _chosen_partitions(profile.train.partition, partitions))
    for kind in job_kinds(profile, nodes):
        findings = [*_partition_findings(kind, partitions), *_capacity_findings(kind, partitions, members)]
        if kind.resources.account or kind.resources.qos:
            findings += _account_findings(kind.resources, config, user, call)
        yield from (Finding(each.status, f"{kind.name}: {each.what}", each.remedy) for each in findings)
        if not any(each.status == FAILURE for each in findings):
            yield _submission_finding(kind, profile.gpu_request, call)


def _version_finding(text: str) -> Finding:
    number = re.search(r"(\d+)\.(\d+)", text)
    if number and (int(number[1]), int(number[2])) < _OLDEST_SLURM:
        oldest = f"{_OLDEST_SLURM[0]}.{_OLDEST_SLURM[1]}"
        return failure(f"{one_line(text)} is older than {oldest}", f"ask for Slurm {oldest} or newer")
    return ok(one_line(text))


def _read_records(text: str) -> Records:
    """Read `scontrol show partition -o` or `scontrol show node -o`: one record a line.

    Of a value with blanks the first word counts, except for a reason, which is read to its end.
    """
    records = []
    for line in text.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        if reason := re.search(r" Reason=(.*?)(?: \[|$)", line):
            fields["Reason"] = reason[1]
        if fields:
            records.append(fields)
    return records


def _setting(config: Mapping[str, str], name: str) -> str:
    """Return a setting; empty where Slurm says that there is none: `(null)`, `none`, `preempt/none`."""
    text = config.get(name, "")
    return "" if text in ("(null)", "none", "N/A") or text.endswith("/none") else text


def _setting_s(config: Mapping[str, str], name: str) -> int:
    """Return a setting such as `30 sec` in seconds."""
    number = re.match(r"\d+", config.get(name, ""))
    return int(number[0]) if number else 0


def _setting_findings(profile: ClusterProfile, config: Mapping[str, str], which: Which) -> Iterator[Finding]:
    yield _requeue_finding(config)
    yield _kill_wait_finding(config, profile.signal_seconds)
    yield _array_finding(profile, config)
    yield _schedule_finding(profile, config, which)
    yield _accounting_finding(config, which)
    yield _tracking_finding(config)


def _requeue_finding(config: Mapping[str, str]) -> Finding:
    """Jobs are submitted with --requeue, which overrides the site's JobRequeue."""
    default = "also by default" if config.get("JobRequeue") == "1" else "because bbu requests it (JobRequeue=0)"
    expiry = re.search(r"cred_expire=(\d+)", config.get("AuthInfo", ""))
    wait = int(expiry[1]) if expiry else _CRED_EXPIRE_S
    return ok(f"a stopped job can be requeued, {default}; it starts again after {wait} s at the earliest")


def _kill_wait_finding(config: Mapping[str, str], signal_seconds: int) -> Finding:
    left, over = _setting_s(config, "KillWait"), config.get("OverTimeLimit", "0 min")
    if left >= _TIME_TO_SAVE_S:
        return ok(f"a job that is cancelled has {left} s to save (KillWait); time over its limit: {over}")
    return warning(
        f"a job that is cancelled, or preempted without grace, has only {left} s to save (KillWait)",
        f"save often (save_steps); the administrators can set KillWait={_TIME_TO_SAVE_S} or more. A time limit is no "
        f"danger: jobs get the signal to save {signal_seconds} s before it (signal_seconds)",
    )


def _array_finding(profile: ClusterProfile, config: Mapping[str, str]) -> Finding:
    most, tasks = int(config.get("MaxArraySize") or DEFAULT_MAX_ARRAY), profile.convert_tasks
    if most == 0 and tasks > 1:
        return failure("this site allows no job arrays (MaxArraySize=0)", "state convert_tasks: 1")
    if tasks <= most:
        return ok(f"the {tasks} conversion tasks fit into one job array (at most {most})")
    return ok(f"the {tasks} conversion tasks go into {-(-tasks // most)} job arrays (at most {most} in one)")


def _schedule_finding(profile: ClusterProfile, config: Mapping[str, str], which: Which) -> Finding:
    enabled = scrontab_enabled(config)
    if enabled and which("scrontab"):
        return ok("evals can be scheduled by scrontab")
    why = "ScronParameters lacks enable" if not enabled else "there is no scrontab program here"
    if profile.eval_schedule == "scrontab":
        return failure(f"eval_schedule is scrontab, but {why}", "state eval_schedule: auto")
    return ok(f"no scrontab ({why}): scheduled evals are kept by a job that submits itself again")


def _accounting_finding(config: Mapping[str, str], which: Which) -> Finding:
    """Everything works without accounting; only jobs that ended long ago are unknown then."""
    remembered_s = _setting_s(config, "MinJobAge")
    if _setting(config, "AccountingStorageType") and which("sacct"):
        return ok("accounting is on: sacct knows how jobs ended")
    text = f"no accounting: Slurm forgets how a job ended after {remembered_s} s (MinJobAge)"
    if remembered_s and remembered_s < _FORGETS_SOON_S:
        return warning(text, "rely on the run folder's status.json, or ask for MinJobAge=300")
    return ok(f"{text}; the run folder remembers")


def _tracking_finding(config: Mapping[str, str]) -> Finding:
    tracker = config.get("ProctrackType", "")
    if tracker == "proctrack/cgroup":
        return ok("Slurm ends all processes of a job (proctrack/cgroup)")
    return warning(
        f"processes that leave their parent may outlive a job ({tracker})",
        "after a job was killed, look on its nodes with ps -u $USER; the administrators can set proctrack/cgroup",
    )


def _preemption_finding(config: Mapping[str, str], partitions: Records) -> Finding:
    """How Slurm preempts a training job, and how long the job has to save."""
    modes = {each.get("PreemptMode", "OFF") for each in partitions} or {"OFF"}
    by_qos = _setting(config, "PreemptType") == "preempt/qos"
    if not _setting(config, "PreemptType") or (modes == {"OFF"} and not by_qos):
        return ok("training jobs are not preempted in this partition")
    signal = "USR2" if "send_user_signal" in config.get("PreemptParameters", "") else "TERM"
    graces = [_duration_s(each.get("GraceTime", "0")) or 0 for each in partitions]
    # A job has the partition's GraceTime where that is set, and never less than KillWait between TERM and KILL.
    left = max(min(graces, default=0), _setting_s(config, "KillWait"))
    manner = f"{'by its QOS, or ' if by_qos else ''}{', '.join(sorted(modes))}"
    text = f"a preempted training job is sent {signal} ({manner})"
    if by_qos or left >= _TIME_TO_SAVE_S:
        return ok(f"{text}, saves and resumes later; time to save: {'set by the QOS' if by_qos else f'{left} s'}")
    return warning(
        f"{text} and has {left} s to save",
        "save often (save_steps), or use a partition that is not preempted; the administrators can set GraceTime=120",
    )


def _duration_s(text: str) -> int | None:
    """Read Slurm's `1-12:00:00`, `30:00` or `30` in seconds; None for UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)", text)
    if not match:
        return None
    days, *rest = (int(part) if part else 0 for part in match.groups())
    hours, minutes = rest[:2] if match[3] else (0, rest[0])
    return days * 86_400 + hours * 3_600 + minutes * 60 + rest[2]


def _chosen_partitions(names: str | None, partitions: Records) -> Records:
    """Return the partitions that sbatch would take for these names; the default where none is named."""
    if names is None:
        return [each for each in partitions if each.get("Default") == "YES"]
    return [each for each in partitions if each["PartitionName"] in names.split(",")]


def _partition_findings(kind: JobKind, partitions: Records) -> Iterator[Finding]:
    existing = ", ".join(each["PartitionName"] for each in partitions)
    key, partition_names = f"{kind.name}.partition", kind.resources.partition
    missing = set((partition_names or "").split(",")) - {""} - {each["PartitionName"] for each in partitions}
    if missing:
        remedy = f"state one of these under {key}: {existing}"
        yield failure(f"there is no partition {', '.join(sorted(missing))}", remedy)
    chosen = _chosen_partitions(partition_names, partitions)
    if not chosen and not partition_names:
        yield failure("no partition is named and the site has no default", f"state one under {key}: {existing}")
    for partition in chosen:
        problems = list(_partition_problems(kind, partition))
        yield from problems or [ok(f"partition {partition['PartitionName']} takes {_size_text(kind)}")]


def _size_text(kind: JobKind) -> str:
    return f"{kind.nodes} node{'s' * (kind.nodes > 1)} for {kind.resources.time_minutes} minutes"


def _partition_problems(kind: JobKind, partition: Mapping[str, str]) -> Iterator[Finding]:
    resources, name = kind.resources, partition["PartitionName"]
    if partition.get("State", "UP") != "UP":
        remedy = "wait until it is UP (sinfo -s), or choose another partition"
        yield failure(f"partition {name} is {partition['State']}", remedy)
    most_s = _duration_s(partition.get("MaxTime", "UNLIMITED"))
    if most_s is not None and resources.time_minutes * 60 > most_s:
        remedy = f"state at most {most_s // 60} under {kind.name}.time_minutes: jobs save and resume in the next one"
        yield failure(f"{resources.time_minutes} minutes are more than partition {name} allows", remedy)
    if (most := partition.get("MaxNodes", "UNLIMITED")).isdigit() and int(most) < kind.nodes:
        yield failure(f"partition {name} allows {most} nodes, {kind.nodes} are requested", f"use --nodes {most}")
    for field, requested in (("account", resources.account), ("qos", resources.qos)):
        allowed = partition.get({"account": "AllowAccounts", "qos": "AllowQos"}[field], "ALL")
        if requested and allowed != "ALL" and requested not in allowed.split(","):
            remedy = f"state one of {allowed} under {kind.name}.{field}"
            yield failure(f"partition {name} does not take the {field} {requested}", remedy)


def _capacity_findings(kind: JobKind, partitions: Records, nodes: Records) -> Iterator[Finding]:
    """Check that enough nodes in service have what the job requests: sbatch would say only that none fits."""
    names = {each["PartitionName"] for each in _chosen_partitions(kind.resources.partition, partitions)}
    if not names:
        return
    members = [node for node in nodes if names & set(node.get("Partitions", "").split(","))]
    serving = [node for node in members if not _OUT_OF_SERVICE.search(node.get("State", ""))]
    if len(serving) < kind.nodes:
        out = "; ".join(_outage_text(node) for node in members if node not in serving)
        yield failure(
            f"{len(serving)} of {len(members)} nodes are in service, {kind.nodes} requested{': ' * bool(out)}{out}",
            "use fewer --nodes, or wait until they are back (sinfo -R shows why they are out)",
        )
        return
    for demand in _demands(kind):
        if sum(demand.fits(node) for node in serving) < kind.nodes:
            present = "; ".join(sorted({_equipment_text(node) for node in serving}))
            what = f"fewer than {kind.nodes} nodes have {demand.what}; there are: {present}"
            yield failure(what, demand.remedy)
            return
    fitting = [node for node in serving if all(demand.fits(node) for demand in _demands(kind))]
    yield ok(f"{len(fitting)} nodes in service have what is requested, {kind.nodes} needed")


def _equipment_text(node: Mapping[str, str]) -> str:
    return f"{node.get('Gres', '')} {node.get('CPUTot')} CPUs {node.get('RealMemory')} MB"


def _outage_text(node: Mapping[str, str]) -> str:
    reason = f" ({node['Reason']})" if node.get("Reason") else ""
    return f"{node['NodeName']} {node.get('State', '')}{reason}"


@dataclass(frozen=True)
class _Demand:
    """One thing that each node of a job must have."""

    what: str
    """In words."""
    fits: Callable[[Mapping[str, str]], bool]
    """Whether a node's record shows that it has it."""
    remedy: str
    """What to correct in the profile where too few nodes have it."""


def _demands(kind: JobKind) -> Iterator[_Demand]:
    resources = kind.resources
    cpus, memory_mb = resources.tasks_per_node * resources.cpus_per_task, resources.memory_mb
    if resources.gpus_per_node:
        yield _Demand(
            f"{resources.gpus_per_node} GPUs{f' of type {resources.gpu_type}' if resources.gpu_type else ''}",
            lambda node: _gpu_count(node.get("Gres", ""), resources.gpu_type) >= resources.gpus_per_node,
            f"correct {kind.name}.gpus_per_node, gpu_type or partition (Slurm counts the GPUs in Gres)",
        )
    yield _Demand(
        f"{cpus} CPUs",
        lambda node: int(node.get("CPUTot") or 0) >= cpus,
        f"lower {kind.name}.cpus_per_task: a node runs {resources.tasks_per_node} tasks",
    )
    yield _Demand(
        f"{memory_mb} MB of memory",
        lambda node: int(node.get("RealMemory") or 0) >= memory_mb,
        f"lower {kind.name}.memory, or state all",
    )
    feature = resources.constraint
    if feature and re.fullmatch(r"[\w.-]+", feature):  # only sbatch can evaluate an expression of several
        yield _Demand(
            f"the feature {feature}",
            lambda node: feature in node.get("ActiveFeatures", "").split(","),
            f"correct {kind.name}.constraint (sinfo -o '%N %f' lists the features)",
        )


def _gpu_count(gres: str, gpu_type: str | None) -> int:
    """Count the GPUs of a node's Gres, of this type or of any: `gpu:a100:8(S:0-1),nvme:1` has 8."""
    entries = re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)", gres)
    return sum(int(count) for name, count in entries if gpu_type in (None, name))


def _account_findings(resources: Resources, config: Mapping[str, str], user: str, call: Call) -> Iterator[Finding]:
    """Check account and QOS against accounting; nothing where accounting does not answer."""
    code, text, _ = call(["sacctmgr", "-nP", "show", "assoc", f"user={user}", "format=account,qos"])
    if code or not _setting(config, "AccountingStorageType"):
        return
    associations = [line.split("|") for line in text.splitlines() if line.strip()]
    accounts = sorted({account for account, *_ in associations})
    # Without enforcement Slurm takes a job of any account.
    problem = failure if "associations" in config.get("AccountingStorageEnforce", "") else warning
    if resources.account and resources.account not in accounts:
        remedy = f"state one of yours: {', '.join(accounts) or 'none'}"
        yield problem(f"{user} is not a member of the account {resources.account}", remedy)
        return
    lists = [names for account, names in associations if resources.account in (None, account)]
    qos = sorted({name for names in lists for name in names.split(",") if name})
    if resources.qos and resources.qos not in qos:
        remedy = f"state one of yours: {', '.join(qos) or 'none'}"
        yield problem(f"{user} may not use the QOS {resources.qos}", remedy)
        return
    yield ok(f"{user} may use {' and '.join(filter(None, (resources.account, resources.qos)))}")


def _submission_finding(kind: JobKind, gpu_request: GpuRequest, call: Call) -> Finding:
    """Ask Slurm whether it would take the job; nothing is submitted."""
    size = [f"--nodes={kind.nodes}", f"--ntasks-per-node={kind.resources.tasks_per_node}"]
    options = sbatch_options(kind.resources, gpu_request)
    code, _, answer = call(["sbatch", "--test-only", "--output=/dev/null", *size, *options, "--wrap=true"])
    if code:
        remedy = _refusal_remedy(kind.name, answer)
        return failure(f"{kind.name}: Slurm would refuse the job: {one_line(answer)}", remedy)
    start = re.search(r"to start at (\S+).*? on nodes? (\S+)", answer)
    return ok(f"{kind.name}: Slurm takes the job{f' (start {start[1]} on {start[2]})' if start else ''}")


def _refusal_remedy(kind: str, answer: str) -> str:
    """Name the keys of the profile that Slurm's words point to."""
    fields = {"account": "account", "qos": "qos", "partition": "partition", "feature": "constraint",
              "time limit": "time_minutes", "memory": "memory", "gres": "gpus_per_node or gpu_type"}  # fmt: skip
    named = [field for word, field in fields.items() if word in answer.lower()]
    return f"correct {', '.join(f'{kind}.{field}' for field in named) or f'what stands under {kind}'} in the profile"
