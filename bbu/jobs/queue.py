"""Runs Slurm's commands and reads what they print: the state of jobs, the site's configuration."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from bbu.errors import JobError

DEFAULT_MAX_ARRAY = 1001
"""Slurm's default MaxArraySize, for a dry run where there is no Slurm to query."""
_TIMEOUT_SECONDS = 60
_LIVE_STATES = frozenset({"PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD",
                          "REQUEUE_FED", "SPECIAL_EXIT", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"})  # fmt: skip
"""States of a job that has not ended (squeue's manual, section JOB STATE CODES)."""
_JOB_PREFIXES = ("SLURM_", "SLURMD_", "SUBMITIT_")
"""How the variables of a job begin."""
_SITE_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS")
"""Variables with such a prefix that belong to the site, not to a job."""
_SQUEUE_FIELDS = ("ArrayJobID", "ArrayTaskID", "State", "Reason", "RestartCnt", "exit_code", "Name", "JobID")
_SACCT_FIELDS = ("JobID", "State", "ExitCode", "JobName")


@dataclass(frozen=True)
class QueuedJob:
    """One job, or one element of an array, as Slurm reports it."""

    array: str
    """The id that submission printed; all elements of an array share it."""
    element: str
    """The number of the element; empty for a job that is no array."""
    state: str
    """Slurm's word, such as `RUNNING`."""
    reason: str
    """Why a pending job waits, or why a job failed; empty if Slurm gives none."""
    restarts: int | None
    """How often Slurm has requeued it; None from accounting, which does not count them."""
    exit_code: int | None
    """Of a job that has ended: the batch script's, or 128 + n for signal n."""
    name: str
    """Its name in Slurm, such as `bbu-train`."""
    number: str
    """Its own JobID, which is SLURM_JOB_ID inside the job."""

    @property
    def is_live(self) -> bool:
        return self.state in _LIVE_STATES

    @property
    def id(self) -> str:
        """The id by which scancel and scontrol act on this element alone."""
        return f"{self.array}_{self.element}" if self.element else self.array


JobsByKey = dict[str, list[QueuedJob]]
"""Slurm's jobs, the elements of an array together, by the id that submission printed or by the job's name."""


def clear_job_environment(environ: MutableMapping[str, str]) -> None:
    """Remove the variables of the surrounding job (SLURM_*, SUBMITIT_*) from an environment.

    Slurm passes the caller's environment on; without this a job submitted from inside a job would inherit the outer
    one's array index, restart count or memory.
    """
    for name in [name for name in environ if name.startswith(_JOB_PREFIXES) and name not in _SITE_VARIABLES]:
        del environ[name]


def run_slurm_command(argv: Sequence[str]) -> tuple[int, str, str]:
    """Run one of Slurm's commands.

    Returns:
        Exit code, output and error output; 127 where the command is missing or does not answer in a minute.
    """
    try:
        completed = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return 127, "", str(error)
    return completed.returncode, completed.stdout, completed.stderr


def slurm_output(argv: Sequence[str]) -> str:
    """What one of Slurm's commands prints. Raises JobError if it fails."""
    code, output, error = run_slurm_command(argv)
    if code:
        raise JobError(f"{' '.join(argv[:3])} failed: {one_line(error) or f'exit code {code}'}")
    return output


def one_line(text: str) -> str:
    """A command's output without line breaks, to stand in a message."""
    return " ".join(text.split())


def read_slurm_config() -> dict[str, str]:
    """The controller's configuration, as `scontrol show config` names it. Raises JobError if it does not answer."""
    return parse_slurm_config(slurm_output(["scontrol", "show", "config"]))


def parse_slurm_config(text: str) -> dict[str, str]:
    """The pairs of key and value in the output of `scontrol show config`."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def expand_nodes(node_list: str) -> list[str]:
    """Return the host names of a Slurm node list: `n1` and `n2` for `n[1-2]`. Raises JobError if it has none."""
    if not node_list:
        raise JobError("the node list is empty")
    return slurm_output(["scontrol", "show", "hostnames", node_list]).split()


def max_array_size() -> int:
    """How many elements one array may have at this site; Slurm's default where no Slurm answers."""
    code, output, _ = run_slurm_command(["scontrol", "show", "config"])
    size = parse_slurm_config(output).get("MaxArraySize") if code == 0 else None
    return max(1, int(size)) if size else DEFAULT_MAX_ARRAY


def find_jobs(keys: Collection[str]) -> JobsByKey:
    """Query Slurm for jobs, with three commands at most, however many jobs there are.

    The first squeue lists the caller's jobs, a second one the jobs that this leaves out (those of others), and
    sacct, where there is accounting, jobs that ended longer than MinJobAge ago.

    Args:
        keys: ids that submission printed, and names of jobs whose id is not known: the jobs of a scrontab get new
            ids whenever it is written.

    Returns:
        The jobs by key; a key that Slurm does not know has no entry. Empty where there is no Slurm.

    Raises:
        JobError: Slurm does not answer, which does not mean that there are no jobs.
    """
    jobs: JobsByKey = {}
    if not keys or shutil.which("squeue") is None:
        return jobs
    _collect_jobs(jobs, keys, _squeue_jobs("--me"))
    ids = {key for key in keys if key.isdigit()}
    if missing := sorted(ids - jobs.keys()):
        _collect_jobs(jobs, keys, _squeue_jobs("-j", ",".join(missing)))
    if missing := sorted(ids - jobs.keys()):
        _collect_jobs(jobs, keys, _sacct_jobs(missing))
    return jobs


def live_jobs(jobs: Iterable[QueuedJob]) -> list[QueuedJob]:
    """The jobs that have not ended."""
    return [job for job in jobs if job.is_live]


def cancel_jobs(ids: Sequence[str]) -> None:
    """Cancel jobs, or elements of arrays. Raises JobError if Slurm refuses."""
    slurm_output(["scancel", *ids])


def summarise_states(jobs: Sequence[QueuedJob]) -> str:
    """`RUNNING`, or for an array `3 RUNNING, 5 PENDING (Priority)`: pending jobs with Slurm's reason."""
    counts = Counter(_state_text(job) for job in jobs)
    if len(jobs) == 1:
        return next(iter(counts))
    return ", ".join(f"{number} {text}" for text, number in counts.items())


def most_restarts(jobs: Sequence[QueuedJob]) -> int | None:
    """The highest number of restarts among some jobs; None where no source counts them."""
    return max((job.restarts for job in jobs if job.restarts is not None), default=None)


def _state_text(job: QueuedJob) -> str:
    if job.state != "PENDING" or not job.reason:
        return job.state
    # `(Nodes required for job are DOWN, DRAINED or reserved…)`: what stands before the comma is enough
    return f"{job.state} ({job.reason.strip('()').partition(',')[0]})"


def _collect_jobs(by_key: JobsByKey, keys: Collection[str], jobs: Iterable[QueuedJob]) -> None:
    """Add jobs to `by_key` under each of their keys that is among `keys`."""
    for job in jobs:
        for key in {job.array, job.name} & set(keys):
            by_key.setdefault(key, []).append(job)


def _squeue_jobs(*selection: str) -> list[QueuedJob]:
    """The jobs that Slurm still has, with those that ended within MinJobAge; none if it knows none of them.

    Raises JobError where it does not answer.
    """
    columns = ",".join(f"{field}:|" for field in _SQUEUE_FIELDS)
    code, output, error = run_slurm_command(["squeue", "-h", "-r", "-t", "all", "-O", columns, *selection])
    if code and "Invalid job id" not in error:
        raise JobError(f"squeue does not answer: {one_line(error) or f'exit code {code}'}")
    lines = [] if code else output.splitlines()
    return [_read_squeue_job(dict(zip(_SQUEUE_FIELDS, line.split("|"), strict=False))) for line in lines]


def _sacct_jobs(ids: Sequence[str]) -> list[QueuedJob]:
    """The jobs from accounting, whose last line for a job is its last run; none where there is no accounting."""
    code, output, _ = run_slurm_command(["sacct", "-X", "-n", "-P", "-j", ",".join(ids), "-o", ",".join(_SACCT_FIELDS)])
    lines = [] if code else output.splitlines()  # some versions print their error to the output
    jobs = [_read_sacct_job(dict(zip(_SACCT_FIELDS, line.split("|"), strict=False))) for line in lines]
    return list({job.id: job for job in jobs}.values())


def _read_squeue_job(fields: Mapping[str, str]) -> QueuedJob:
    """One line of squeue; a job that is no array has its own id as ArrayJobID, and no element."""
    element, reason = fields["ArrayTaskID"], fields["Reason"]
    return QueuedJob(
        array=fields["ArrayJobID"],
        element="" if element == "N/A" else element,
        state=fields["State"],
        reason="" if reason == "None" else reason,
        restarts=int(fields["RestartCnt"]),
        exit_code=_shell_exit_code(fields["exit_code"]) if fields["State"] not in _LIVE_STATES else None,
        name=fields["Name"],
        number=fields["JobID"],
    )


def _read_sacct_job(fields: Mapping[str, str]) -> QueuedJob:
    """One line of sacct, whose state may be followed by more words: `CANCELLED by 1000`."""
    array, _, element = fields["JobID"].partition("_")
    state = fields["State"].split()[0] if fields["State"] else ""
    return QueuedJob(
        array=array,
        element=element,
        state=state,
        reason="",
        restarts=None,
        exit_code=_shell_exit_code(fields["ExitCode"]) if state not in _LIVE_STATES else None,
        name=fields["JobName"],
        number=fields["JobID"],
    )


def _shell_exit_code(text: str) -> int:
    """Slurm's `7:0` and `0:15` (code:signal), or squeue's raw wait status up to 22.05, as a shell's exit code."""
    if ":" in text:
        code, signal = (int(part) for part in text.split(":"))
        return 128 + signal if signal else code
    status = int(text)
    return 128 + (status & 127) if status & 127 else status >> 8
