"""Asks Slurm how jobs stand."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from bbu.errors import JobError

TIMEOUT_S = 60
DEFAULT_MAX_ARRAY = 1001
"""Slurm's own MaxArraySize, for a dry run where there is no Slurm to ask."""
LIVE = frozenset({"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD",
                  "REQUEUE_FED", "SPECIAL_EXIT", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"})  # fmt: skip
"""States of a job that has not ended."""
JOB_PREFIXES, NO_JOB = ("SLURM_", "SLURMD_", "SUBMITIT_"), ("SLURM_CONF", "SLURM_CLUSTERS")
"""Variables that a job sets, and those among them that are of the site."""
SQUEUE_FIELDS = ("ArrayJobID", "ArrayTaskID", "State", "Reason", "RestartCnt", "exit_code", "Name", "JobID")
SACCT_FIELDS = ("JobID", "State", "ExitCode", "JobName")


@dataclass(frozen=True)
class QueuedJob:
    """One job, or one element of an array, as Slurm has it. `array` is the id that submission printed.

    restarts is None where the source does not know it (accounting keeps none). `exit_code`: the batch script's, or
    128 + n for a signal; of a job that has ended. `number` is its own JobID: what SLURM_JOB_ID says inside.
    """

    array: str
    element: str
    state: str
    reason: str
    restarts: int | None
    exit_code: int | None
    name: str
    number: str

    @property
    def is_live(self) -> bool:
        return self.state in LIVE

    @property
    def id(self) -> str:
        """What scancel and scontrol take for this element alone."""
        return f"{self.array}_{self.element}" if self.element else self.array


def leave_job(environ: MutableMapping[str, str]) -> None:
    """Forget the job that this process runs in, if any: what it submits is not part of that.

    Slurm hands on the caller's environment, and the outer job's array index, restart count or memory would be taken
    for the new one's own.
    """
    for name in [name for name in environ if name.startswith(JOB_PREFIXES) and name not in NO_JOB]:
        del environ[name]


def call(argv: Sequence[str]) -> tuple[int, str, str]:
    """Run one of Slurm's commands: exit code, output, error; 127 where it is not there or does not answer."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, "", str(error)
    return done.returncode, done.stdout, done.stderr


def ask(argv: Sequence[str]) -> str:
    """What one of Slurm's commands prints. Raises JobError if it fails."""
    code, out, error = call(argv)
    if code:
        raise JobError(f"{' '.join(argv[:3])} failed: {one_line(error) or f'exit code {code}'}")
    return out


def one_line(text: str) -> str:
    """What a command said, as part of a message."""
    return " ".join(text.split())


def slurm_config() -> dict[str, str]:
    """The controller's configuration, as `scontrol show config` names it. Raises JobError if it does not answer."""
    return config_of(ask(["scontrol", "show", "config"]))


def config_of(text: str) -> dict[str, str]:
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def expand_nodes(node_list: str) -> list[str]:
    """Return the host names of a Slurm node list: `n1` and `n2` for `n[1-2]`. Raises JobError if it has none."""
    if not node_list:
        raise JobError("the node list is empty")
    return ask(["scontrol", "show", "hostnames", node_list]).split()


def max_array_size() -> int:
    """How many elements one array may have here; Slurm's default where no Slurm answers."""
    code, out, _ = call(["scontrol", "show", "config"])
    told = config_of(out).get("MaxArraySize") if code == 0 else None
    return max(1, int(told)) if told else DEFAULT_MAX_ARRAY


def jobs_of(ids: Collection[str]) -> dict[str, list[QueuedJob]]:
    """How jobs stand, by the id that submission printed, or by their name for an id that is none (the jobs of a
    scrontab get new ids whenever it is written); what nobody knows any more has no entry.

    Three questions at most, however many jobs: squeue for the caller's own, squeue again for what that leaves out
    (others' jobs), and accounting, where there is any, for what ended longer ago than MinJobAge. squeue knows as much
    as scontrol, which would have to be asked for each job. No Slurm at all is an empty answer; one that does not
    answer is a JobError.
    """
    found: dict[str, list[QueuedJob]] = {}
    if not ids or shutil.which("squeue") is None:
        return found
    collect(found, ids, from_squeue("--me"))
    numbers = {job for job in ids if job.isdigit()}
    if missing := sorted(numbers - found.keys()):
        collect(found, ids, from_squeue("-j", ",".join(missing)))
    if missing := sorted(numbers - found.keys()):
        collect(found, ids, from_sacct(missing))
    return found


def collect(found: dict[str, list[QueuedJob]], ids: Collection[str], jobs: Iterable[QueuedJob]) -> None:
    for job in jobs:
        for key in {job.array, job.name} & set(ids):
            found.setdefault(key, []).append(job)


def from_squeue(*which: str) -> list[QueuedJob]:
    """The jobs that Slurm still has, ended ones within MinJobAge included; none if it knows none of them.

    Raises JobError where it does not answer: that is not the same as having no jobs.
    """
    wanted = ",".join(f"{field}:|" for field in SQUEUE_FIELDS)
    code, out, error = call(["squeue", "-h", "-r", "-t", "all", "-O", wanted, *which])
    if code and "Invalid job id" not in error:
        raise JobError(f"squeue does not answer: {one_line(error) or f'exit code {code}'}")
    lines = [] if code else out.splitlines()
    return [read_job(dict(zip(SQUEUE_FIELDS, line.split("|"), strict=False))) for line in lines]


def from_sacct(jobs: Sequence[str]) -> list[QueuedJob]:
    """From accounting, whose last line for a job is its last run."""
    code, out, _ = call(["sacct", "-X", "-n", "-P", "-j", ",".join(jobs), "-o", ",".join(SACCT_FIELDS)])
    lines = [] if code else out.splitlines()  # an error may be told on either stream
    read = [read_accounted(dict(zip(SACCT_FIELDS, line.split("|"), strict=False))) for line in lines]
    return list({job.id: job for job in read}.values())


def read_job(fields: Mapping[str, str]) -> QueuedJob:
    """From squeue, where a job outside of an array is its own array, with no element."""
    element, reason = fields["ArrayTaskID"], fields["Reason"]
    return QueuedJob(
        array=fields["ArrayJobID"],
        element="" if element == "N/A" else element,
        state=fields["State"],
        reason="" if reason == "None" else reason,
        restarts=int(fields["RestartCnt"]),
        exit_code=shell_code(fields["exit_code"]) if fields["State"] not in LIVE else None,
        name=fields["Name"],
        number=fields["JobID"],
    )


def read_accounted(fields: Mapping[str, str]) -> QueuedJob:
    array, _, element = fields["JobID"].partition("_")
    state = fields["State"].split()[0] if fields["State"] else ""  # CANCELLED by 1000
    code = shell_code(fields["ExitCode"]) if state not in LIVE else None
    return QueuedJob(array, element, state, "", None, code, fields["JobName"], fields["JobID"])


def shell_code(told: str) -> int:
    """Slurm's `7:0` and `0:15`, or squeue's raw wait status, as a shell's exit code."""
    if ":" in told:
        code, number = (int(part) for part in told.split(":"))
        return 128 + number if number else code
    status = int(told)
    return 128 + (status & 127) if status & 127 else status >> 8


def live(jobs: Iterable[QueuedJob]) -> list[QueuedJob]:
    return [job for job in jobs if job.is_live]


def cancel(ids: Sequence[str]) -> None:
    """End jobs or elements. Raises JobError if Slurm refuses."""
    ask(["scancel", *ids])


def summary(jobs: Sequence[QueuedJob]) -> str:
    """`RUNNING`, or for an array `3 RUNNING, 5 PENDING`; pending ones with Slurm's reason."""
    counts: dict[str, int] = {}
    for job in jobs:
        waits = job.state == "PENDING" and job.reason
        text = f"{job.state} ({job.reason.strip('()').partition(',')[0]})" if waits else job.state
        counts[text] = counts.get(text, 0) + 1
    if len(jobs) == 1:
        return next(iter(counts))
    return ", ".join(f"{number} {text}" for text, number in counts.items())


def restarts_of(jobs: Sequence[QueuedJob]) -> int | None:
    """The most restarts among the elements; None where no source knew."""
    return max((job.restarts for job in jobs if job.restarts is not None), default=None)


def as_dict(job: QueuedJob) -> dict[str, Any]:
    """For a script to read."""
    return dataclasses.asdict(job) | {"id": job.id}
