"""Is Slurm ready for this project? Checks of its answers, each given as text, so that a test can bring any site's."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from bbu.doctor.findings import Call, Finding, failure, ok, warning
from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.queue import DEFAULT_MAX_ARRAY, config_of, one_line
from bbu.jobs.schedule import scrontab_enabled
from bbu.jobs.slurm import sbatch_options
from bbu.jobs.spec import Resources

REQUIRED = ("sbatch", "srun", "squeue", "scontrol", "scancel")
OLDEST = (20, 11)
TIME_TO_SAVE_S = 30
"""Below this, a checkpoint of some gigabytes is hardly written."""
OUT_OF_SERVICE = re.compile(r"DOWN|DRAIN|FAIL|MAINT|ERROR|UNKNOWN|FUTURE|NOT_RESPONDING|REBOOT|BLOCKED|\*$")
Which = Callable[[str], str | None]
Records = list[dict[str, str]]


@dataclass(frozen=True)
class Kind:
    """One kind of job of the profile (train, convert, eval), and how many nodes and tasks per node it takes."""

    name: str
    asked: Resources
    nodes: int

    @property
    def tasks_per_node(self) -> int:
        return self.asked.tasks_per_node

    @property
    def memory_mb(self) -> float:
        """What it wants of one node; 0 where the profile leaves that to the site."""
        match = re.fullmatch(r"(\d+)([MGT])(?: per (cpu|gpu))?", self.asked.memory or "")
        if not match:
            return 0
        units = {"cpu": self.tasks_per_node * self.asked.cpus_per_task, "gpu": self.asked.gpus_per_node}
        return int(match[1]) * {"M": 1, "G": 1024, "T": 1024**2}[match[2]] * units.get(match[3], 1)


def kinds_of(profile: ClusterProfile, nodes: int) -> list[Kind]:
    return [Kind("train", profile.train, nodes), Kind("convert", profile.convert, 1), Kind("eval", profile.eval, 1)]


def slurm_findings(
    profile: ClusterProfile, nodes: int, user: str, call: Call, which: Which = shutil.which
) -> Iterator[Finding]:
    """Everything about Slurm that can be asked without running a job."""
    missing = [name for name in REQUIRED if which(name) is None]
    if missing:
        remedy = "load Slurm (such as module load slurm), go to a login node of the cluster, or use --cluster local"
        yield failure(f"Slurm's commands are not on PATH: {', '.join(missing)}", remedy)
        return
    yield version_finding(call(["sbatch", "--version"])[1])
    code, text, error = call(["scontrol", "show", "config"])
    if code:
        remedy = "ask whether Slurm is down for maintenance; until it answers, nothing can be submitted"
        yield failure(f"Slurm's controller does not answer: {one_line(error or text)}", remedy)
        return
    config = config_of(text)
    yield ok(f"the controller of cluster {config.get('ClusterName', '?')} answers")
    partitions = records(call(["scontrol", "show", "partition", "-o"])[1])
    members = records(call(["scontrol", "show", "node", "-o"])[1])
    yield from setting_findings(profile, config, which)
    yield preemption_finding(config, chosen(profile.train.partition, partitions))
    for kind in kinds_of(profile, nodes):
        found = [*partition_findings(kind, partitions), *node_findings(kind, partitions, members)]
        found += account_findings(kind.asked, config, user, call) if kind.asked.account or kind.asked.qos else []
        yield from (Finding(each.status, f"{kind.name}: {each.what}", each.remedy) for each in found)
        if not any(each.status == "failure" for each in found):
            yield test_finding(kind, profile.gpu_request, call)


def version_finding(text: str) -> Finding:
    number = re.search(r"(\d+)\.(\d+)", text)
    if number and (int(number[1]), int(number[2])) < OLDEST:
        oldest = f"{OLDEST[0]}.{OLDEST[1]}"
        return failure(f"{one_line(text)} is older than {oldest}", f"ask for Slurm {oldest} or newer")
    return ok(one_line(text))


def records(text: str) -> Records:
    """Lines of `scontrol show partition|node -o`; of a value with blanks the first word is kept, a reason whole."""
    found = []
    for line in text.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        if reason := re.search(r" Reason=(.*?)(?: \[|$)", line):
            fields["Reason"] = reason[1]
        if fields:
            found.append(fields)
    return found


def value(config: Mapping[str, str], name: str) -> str:
    """A setting; empty where Slurm says that there is none: `(null)`, `none`, `preempt/none`."""
    text = config.get(name, "")
    return "" if text in ("(null)", "none", "N/A") or text.endswith("/none") else text


def seconds(config: Mapping[str, str], name: str) -> int:
    number = re.match(r"\d+", config.get(name, ""))
    return int(number[0]) if number else 0


def setting_findings(profile: ClusterProfile, config: Mapping[str, str], which: Which) -> Iterator[Finding]:
    yield requeue_finding(config)
    yield kill_wait_finding(config, profile.signal_seconds)
    yield array_finding(profile, config)
    yield schedule_finding(profile, config, which)
    yield accounting_finding(config, which)
    yield tracking_finding(config)


def requeue_finding(config: Mapping[str, str]) -> Finding:
    """bbu asks with --requeue, which goes before the site's JobRequeue."""
    default = "also by default" if config.get("JobRequeue") == "1" else "because bbu asks for it (JobRequeue=0)"
    expiry = re.search(r"cred_expire=(\d+)", config.get("AuthInfo", ""))
    wait = int(expiry[1]) if expiry else 120
    return ok(f"a stopped job can go back into the queue, {default}; it starts again after {wait} s at the earliest")


def kill_wait_finding(config: Mapping[str, str], signal_seconds: int) -> Finding:
    left, over = seconds(config, "KillWait"), config.get("OverTimeLimit", "0 min")
    if left >= TIME_TO_SAVE_S:
        return ok(f"a job that is cancelled has {left} s to save (KillWait); time over its limit: {over}")
    return warning(
        f"a job that is cancelled, or preempted without grace, has only {left} s to save (KillWait)",
        f"save often (save_steps); the administrators can set KillWait={TIME_TO_SAVE_S} or more. A time limit is no "
        f"danger: jobs are told to save {signal_seconds} s before it (signal_seconds)",
    )


def array_finding(profile: ClusterProfile, config: Mapping[str, str]) -> Finding:
    most, wanted = int(config.get("MaxArraySize") or DEFAULT_MAX_ARRAY), profile.convert_tasks
    if most == 0 and wanted > 1:
        return failure("this site allows no job arrays (MaxArraySize=0)", "state convert_tasks: 1")
    if wanted <= most:
        return ok(f"the {wanted} conversion tasks fit into one job array (at most {most})")
    return ok(f"the {wanted} conversion tasks go into {-(-wanted // most)} job arrays (at most {most} in one)")


def schedule_finding(profile: ClusterProfile, config: Mapping[str, str], which: Which) -> Finding:
    enabled = scrontab_enabled(config)
    if enabled and which("scrontab"):
        return ok("evals can be scheduled by scrontab")
    why = "ScronParameters lacks enable" if not enabled else "there is no scrontab program here"
    if profile.eval_schedule == "scrontab":
        return failure(f"eval_schedule is scrontab, but {why}", "state eval_schedule: auto")
    return ok(f"no scrontab ({why}): scheduled evals are kept by a job that submits itself again")


def accounting_finding(config: Mapping[str, str], which: Which) -> Finding:
    """All of the project works without; one only knows less about what ended long ago."""
    kept = seconds(config, "MinJobAge")
    if value(config, "AccountingStorageType") and which("sacct"):
        return ok("accounting is on: sacct knows how jobs ended")
    told = f"no accounting: Slurm forgets how a job ended after {kept} s (MinJobAge)"
    if kept and kept < 60:
        return warning(told, "rely on the run folder's status.json, or ask for MinJobAge=300")
    return ok(f"{told}; the run folder remembers")


def tracking_finding(config: Mapping[str, str]) -> Finding:
    tracker = config.get("ProctrackType", "")
    if tracker == "proctrack/cgroup":
        return ok("Slurm ends all processes of a job (proctrack/cgroup)")
    return warning(
        f"processes that leave their parent may outlive a job ({tracker})",
        "after a job was killed, look on its nodes with ps -u $USER; the administrators can set proctrack/cgroup",
    )


def preemption_finding(config: Mapping[str, str], partitions: Records) -> Finding:
    """How a training job is told to make way, and how long it has."""
    modes = {each.get("PreemptMode", "OFF") for each in partitions} or {"OFF"}
    by_qos = value(config, "PreemptType") == "preempt/qos"
    if not value(config, "PreemptType") or (modes == {"OFF"} and not by_qos):
        return ok("training jobs are not preempted in this partition")
    signal = "USR2" if "send_user_signal" in config.get("PreemptParameters", "") else "TERM"
    graces = [duration_s(each.get("GraceTime", "0")) or 0 for each in partitions]
    left = max(min(graces, default=0), seconds(config, "KillWait"))
    told = (
        f"a preempted training job is sent {signal} ({'by its QOS, or ' if by_qos else ''}{', '.join(sorted(modes))})"
    )
    if by_qos or left >= TIME_TO_SAVE_S:
        return ok(f"{told}, saves and goes on later; time to save: {'set by the QOS' if by_qos else f'{left} s'}")
    return warning(
        f"{told} and has {left} s to save",
        "save often (save_steps), or use a partition that is not preempted; the administrators can set GraceTime=120",
    )


def duration_s(text: str) -> int | None:
    """`1-12:00:00`, `30:00`, `30` (seconds); None for UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(?:(\d+):)?(\d+)", text)
    if not match:
        return None
    days, *rest = (int(part) if part else 0 for part in match.groups())
    hours, minutes = rest[:2] if match[3] else (0, rest[0])
    return days * 86_400 + hours * 3_600 + minutes * 60 + rest[2]


def chosen(names: str | None, partitions: Records) -> Records:
    """The partitions that sbatch would take for these names; none named: the default."""
    if names is None:
        return [each for each in partitions if each.get("Default") == "YES"]
    return [each for each in partitions if each["PartitionName"] in names.split(",")]


def partition_findings(kind: Kind, partitions: Records) -> Iterator[Finding]:
    known = ", ".join(each["PartitionName"] for each in partitions)
    where = f"{kind.name}.partition"
    named = kind.asked.partition.split(",") if kind.asked.partition else []
    missing = set(named) - {each["PartitionName"] for each in partitions}
    if missing:
        remedy = f"state one of these under {where}: {known}"
        yield failure(f"there is no partition {', '.join(sorted(missing))}", remedy)
    found = chosen(kind.asked.partition, partitions)
    if not found and not named:
        yield failure("no partition is named and the site has no default", f"state one under {where}: {known}")
    for partition in found:
        problems = list(partition_problems(kind, partition))
        yield from problems or [ok(f"partition {partition['PartitionName']} takes {limits(kind)}")]


def limits(kind: Kind) -> str:
    return f"{kind.nodes} node{'s' * (kind.nodes > 1)} for {kind.asked.time_minutes} minutes"


def partition_problems(kind: Kind, partition: Mapping[str, str]) -> Iterator[Finding]:
    name, most_s = partition["PartitionName"], duration_s(partition.get("MaxTime", "UNLIMITED"))
    if partition.get("State", "UP") != "UP":
        remedy = "wait until it is UP (sinfo -s), or choose another partition"
        yield failure(f"partition {name} is {partition['State']}", remedy)
    if most_s is not None and kind.asked.time_minutes * 60 > most_s:
        remedy = f"state at most {most_s // 60} under {kind.name}.time_minutes: jobs save and go on in the next one"
        yield failure(f"{kind.asked.time_minutes} minutes are more than partition {name} allows", remedy)
    if (most := partition.get("MaxNodes", "UNLIMITED")).isdigit() and int(most) < kind.nodes:
        yield failure(f"partition {name} allows {most} nodes, {kind.nodes} are asked for", f"use --nodes {most}")
    for key, asked, field in (("AllowAccounts", kind.asked.account, "account"), ("AllowQos", kind.asked.qos, "qos")):
        allowed = partition.get(key, "ALL")
        if asked and allowed != "ALL" and asked not in allowed.split(","):
            remedy = f"state one of {allowed} under {kind.name}.{field}"
            yield failure(f"partition {name} does not take the {field} {asked}", remedy)


def node_findings(kind: Kind, partitions: Records, nodes: Records) -> Iterator[Finding]:
    """Whether enough nodes are in service that have what is asked for: sbatch would only say that none fits."""
    names = {each["PartitionName"] for each in chosen(kind.asked.partition, partitions)}
    members = [node for node in nodes if names & set(node.get("Partitions", "").split(","))]
    if not names:
        return
    serving = [node for node in members if not OUT_OF_SERVICE.search(node.get("State", ""))]
    if len(serving) < kind.nodes:
        out = "; ".join(outage(node) for node in members if node not in serving)
        yield failure(
            f"{len(serving)} of {len(members)} nodes are in service, {kind.nodes} asked for{': ' * bool(out)}{out}",
            "use fewer --nodes, or wait until they are back (sinfo -R tells why they are out)",
        )
        return
    for what, fits, remedy in demands(kind):
        if sum(fits(node) for node in serving) < kind.nodes:
            have = sorted({f"{node.get('Gres', '')} {node.get('CPUTot')} CPUs {node.get('RealMemory')} MB"
                           for node in serving})  # fmt: skip
            yield failure(f"fewer than {kind.nodes} nodes have {what}; there are: {'; '.join(have)}", remedy)
            return
    fitting = [node for node in serving if all(fits(node) for _, fits, _ in demands(kind))]
    yield ok(f"{len(fitting)} nodes in service have what is asked for, {kind.nodes} needed")


def outage(node: Mapping[str, str]) -> str:
    return f"{node['NodeName']} {node.get('State', '')}{f' ({reason})' if (reason := node.get('Reason')) else ''}"


def demands(kind: Kind) -> Iterator[tuple[str, Callable[[Mapping[str, str]], bool], str]]:
    """What one node must have: in words, as a test, and what to correct."""
    asked, cpus = kind.asked, kind.tasks_per_node * kind.asked.cpus_per_task
    if asked.gpus_per_node:
        yield (
            f"{asked.gpus_per_node} GPUs{f' of type {asked.gpu_type}' if asked.gpu_type else ''}",
            lambda node: gpus_of(node.get("Gres", ""), asked.gpu_type) >= asked.gpus_per_node,
            f"correct {kind.name}.gpus_per_node, gpu_type or partition (Slurm counts the GPUs in Gres)",
        )
    yield (
        f"{cpus} CPUs",
        lambda node: int(node.get("CPUTot") or 0) >= cpus,
        f"lower {kind.name}.cpus_per_task: a node runs {kind.tasks_per_node} tasks",
    )
    yield (
        f"{kind.memory_mb:.0f} MB of memory",
        lambda node: int(node.get("RealMemory") or 0) >= kind.memory_mb,
        f"lower {kind.name}.memory, or state all",
    )
    if asked.constraint and re.fullmatch(r"[\w.-]+", asked.constraint):  # of an expression, sbatch judges
        wanted = asked.constraint
        yield (
            f"the feature {wanted}",
            lambda node: wanted in node.get("ActiveFeatures", "").split(","),
            f"correct {kind.name}.constraint (sinfo -o '%N %f' lists the features)",
        )


def gpus_of(gres: str, wanted: str | None) -> int:
    """`gpu:a100:8(S:0-1),nvme:1` has 8."""
    found = re.findall(r"(?:^|,)gpu(?::([^:,()]+))?:(\d+)", gres)
    return sum(int(count) for kind, count in found if wanted in (None, kind))


def account_findings(asked: Resources, config: Mapping[str, str], user: str, call: Call) -> Iterator[Finding]:
    """What accounting says of the account and QOS; nothing where it cannot be asked."""
    code, text, _ = call(["sacctmgr", "-nP", "show", "assoc", f"user={user}", "format=account,qos"])
    if code or not value(config, "AccountingStorageType"):
        return
    own = [line.split("|") for line in text.splitlines() if line.strip()]
    accounts = sorted({account for account, *_ in own})
    amiss = failure if "associations" in config.get("AccountingStorageEnforce", "") else warning
    if asked.account and asked.account not in accounts:
        known = ", ".join(accounts) or "none"
        yield amiss(f"{user} is not a member of the account {asked.account}", f"state one of yours: {known}")
        return
    qos = {name for account, names in own if asked.account in (None, account) for name in names.split(",") if name}
    if asked.qos and asked.qos not in qos:
        yield amiss(
            f"{user} may not use the QOS {asked.qos}", f"state one of yours: {', '.join(sorted(qos)) or 'none'}"
        )
        return
    yield ok(f"{user} may use {' and '.join(filter(None, (asked.account, asked.qos)))}")


def test_finding(kind: Kind, gpu_request: str, call: Call) -> Finding:
    """Ask Slurm whether it would take the job; nothing is submitted."""
    size = [f"--nodes={kind.nodes}", f"--ntasks-per-node={kind.tasks_per_node}"]
    options = sbatch_options(kind.asked, gpu_request)
    code, _, told = call(["sbatch", "--test-only", "--output=/dev/null", *size, *options, "--wrap=true"])
    if code:
        return failure(f"{kind.name}: Slurm would refuse the job: {one_line(told)}", refusal_remedy(kind.name, told))
    start = re.search(r"to start at (\S+).*? on nodes? (\S+)", told)
    return ok(f"{kind.name}: Slurm takes the job{f' (start {start[1]} on {start[2]})' if start else ''}")


def refusal_remedy(kind: str, told: str) -> str:
    fields = {"account": "account", "qos": "qos", "partition": "partition", "feature": "constraint",
              "time limit": "time_minutes", "memory": "memory", "gres": "gpus_per_node or gpu_type"}  # fmt: skip
    named = [field for word, field in fields.items() if word in told.lower()]
    return f"correct {', '.join(f'{kind}.{field}' for field in named) or f'what stands under {kind}'} in the profile"
