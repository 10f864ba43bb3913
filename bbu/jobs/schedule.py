"""Scheduled evals: by scrontab, or by a job that submits the next one.

A schedule is a folder beside the job logs: `schedule.sh` (a batch script with the settings, which calls
slurm/eval.scron), `runs` (one run folder a line, read at each start), `jobs` (ids, where each job submits the next)
and `ended` (why no further eval comes). bbu.eval --pending does no work twice, however often a schedule calls it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bbu.errors import JobError
from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.launch import new_folder, task_environment
from bbu.jobs.queue import one_line, read_slurm_config, run_slurm_command, slurm_output
from bbu.jobs.slurm import sbatch_options
from bbu.jobs.spec import job_name
from bbu.run.files import write_atomic

SCHEDULE_NAME = "eval-schedule"
"""The name of schedules in the records of runs, and of the folders that hold their files."""
FAILED = "failed"
"""How the file `ended` begins where the schedule should not have ended (slurm/eval.scron)."""
_SCRIPT, _RUNS, _JOBS, _ENDED = "schedule.sh", "runs", "jobs", "ended"
"""The files of a schedule's folder."""
_UNIT_MINUTES = {"m": 1, "h": 60, "d": 24 * 60}
_ENABLED = re.compile(r"(^|,)enable(,|$)")
_FIND_SECONDS = 10
"""How long slurmctld may take to turn a new entry of a scrontab into a job."""


@dataclass(frozen=True)
class Schedule:
    """One schedule of evals."""

    mode: str
    """`scrontab`, or `resubmit`: each job submits the next one."""
    minutes: int
    """From one start to the next."""
    folder: Path
    """Where its files lie."""

    @property
    def name(self) -> str:
        """The name of its jobs, which also marks its lines in a scrontab."""
        return job_name(f"eval-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}")

    def runs(self) -> list[str]:
        """The run folders that it serves; empty where its folder was deleted."""
        path = self.folder / _RUNS
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def job_ids(self) -> list[str]:
        """The ids of jobs that submitted the next one, oldest first."""
        path = self.folder / _JOBS
        return path.read_text(encoding="utf-8").split() if path.exists() else []

    def job_keys(self) -> list[str]:
        """What `find_jobs` finds its jobs by: their ids, or their name, as a scrontab's jobs change their ids."""
        return [self.name] if self.mode == "scrontab" else self.job_ids()

    def end_reason(self) -> str:
        """Why no further job comes; empty until the schedule has ended."""
        path = self.folder / _ENDED
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def interval_minutes(text: str) -> int:
    """The minutes of `30m`, `2h` or `1d`. Raises JobError for an interval that a crontab cannot keep evenly."""
    match = re.fullmatch(r"([1-9]\d{0,3})([mhd])", text)
    minutes = int(match[1]) * _UNIT_MINUTES[match[2]] if match else 0
    if not minutes or not (60 % minutes == 0 or (minutes % 60 == 0 and 24 * 60 % minutes == 0)):
        raise JobError(f"--every {text}: write minutes that divide an hour, hours that divide a day, or 1d; as 30m, 2h")
    return minutes


def _cron_times(minutes: int) -> str:
    """The five time fields of a crontab's line, for an interval that `interval_minutes` accepts."""
    if minutes < 60:
        return f"*/{minutes} * * * *" if minutes > 1 else "* * * * *"
    hours = minutes // 60
    return "0 0 * * *" if hours == 24 else f"0 */{hours} * * *" if hours > 1 else "0 * * * *"


def scrontab_enabled(config: Mapping[str, str]) -> bool:
    """Whether the controller accepts scrontabs. The program may still be missing, as on Debian 12."""
    return _ENABLED.search(config.get("ScronParameters", "")) is not None


def choose_mode(eval_schedule: str) -> str:
    """How this site keeps a schedule.

    Args:
        eval_schedule: the key of the cluster profile: `scrontab`, `resubmit`, `dependency`, or `auto`: scrontab where
            the site allows it, else resubmit.

    Returns:
        `scrontab`, `resubmit` or `dependency`.

    Raises:
        JobError: scrontab is named, but the site has none, or Slurm does not answer.
    """
    allowed = shutil.which("scrontab") is not None and scrontab_enabled(read_slurm_config())
    if eval_schedule == "scrontab" and not allowed:
        raise JobError("eval_schedule is scrontab, but this site has none (ScronParameters=enable); state auto")
    if eval_schedule == "auto":
        return "scrontab" if allowed else "resubmit"
    return eval_schedule


def schedule_text(schedule: Schedule, profile: ClusterProfile, checkout: Path) -> str:
    """What would be installed or submitted, and its script, for a dry run."""
    path = schedule.folder / _SCRIPT
    how = "\n".join(_scrontab_entry(schedule, profile)) if schedule.mode == "scrontab" else f"sbatch {path}"
    return f"### {SCHEDULE_NAME}: {how}\n\n### {path}\n{_script_text(schedule, profile, checkout)}"


def create_schedule(mode: str, minutes: int, runs: Sequence[Path], profile: ClusterProfile, checkout: Path) -> Schedule:
    """Write the folder of a schedule; nothing is submitted yet.

    Args:
        mode: `scrontab` or `resubmit`.
        minutes: from one start to the next.
        runs: the run folders that it serves.
        profile: the site.
        checkout: the folder with the code.
    """
    schedule = Schedule(mode, minutes, new_folder(SCHEDULE_NAME, profile))
    write_atomic(schedule.folder / _RUNS, "".join(f"{run}\n" for run in runs))
    path = schedule.folder / _SCRIPT
    write_atomic(path, _script_text(schedule, profile, checkout))
    path.chmod(0o755)
    return schedule


def _script_text(schedule: Schedule, profile: ClusterProfile, checkout: Path) -> str:
    """The batch script. It sets the caller's PATH, as a scrontab's jobs begin with hardly any environment."""
    environment = task_environment(profile, checkout, profile.eval.gpus_per_node)
    environment |= {"BBU_SCHEDULE": str(schedule.folder)} | ({} if profile.image else {"BBU_PYTHON": sys.executable})
    if schedule.mode == "resubmit":
        environment |= {"BBU_EVERY": str(schedule.minutes)}
    lines = [
        "#!/bin/bash -l" if profile.modules else "#!/bin/bash",  # `module` is a function of a login shell
        f"# Evals every {schedule.minutes} minutes, by {schedule.mode}; `bbu.submit cancel RUN` ends them.",
        *(f"#SBATCH {option}" for option in _sbatch_options(schedule, profile)),
        "",
        f"export PATH={shlex.quote(_caller_path())}",  # without $PATH: each job that submits the next would lengthen it
        *(f"module load {module}" for module in profile.modules),
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        f"mapfile -t runs <{shlex.quote(str(schedule.folder / _RUNS))}",
        f'exec bash {shlex.quote(str(checkout / "slurm" / "eval.scron"))} "${{runs[@]}}"',
    ]
    return "\n".join(lines) + "\n"


def _caller_path() -> str:
    """The PATH of the person who submits: where apptainer is, above all."""
    return os.environ.get("PATH", "/usr/bin:/bin")


def _sbatch_options(schedule: Schedule, profile: ClusterProfile) -> list[str]:
    """Options of sbatch, and of the `#SCRON` lines.

    A job that submits the next one is not requeued: it would submit a second next one.
    """
    return [
        f"--job-name={schedule.name}",
        "--nodes=1",
        "--ntasks-per-node=1",
        f"--chdir={shlex.quote(str(Path.cwd()))}",
        f"--output={shlex.quote(str(schedule.folder).replace('%', '%%') + '/%j.out')}",
        "--open-mode=append",
        f"--signal=USR2@{profile.signal_seconds}",
        *(["--no-requeue"] if schedule.mode == "resubmit" else []),
        *sbatch_options(profile.eval, profile.gpu_request),
    ]


def start_schedule(schedule: Schedule, profile: ClusterProfile) -> str:
    """Install the entry of a scrontab, or submit the first job.

    Returns:
        The id of the first job.

    Raises:
        JobError: Slurm refuses; then nothing is left behind.
    """
    if schedule.mode == "resubmit":
        job = slurm_output(["sbatch", "--parsable", str(schedule.folder / _SCRIPT)]).strip().partition(";")[0]
        with (schedule.folder / _JOBS).open("a") as file:
            file.write(f"{job}\n")
        return job
    _write_scrontab([*_without_entry(_scrontab_lines(), schedule.name), *_scrontab_entry(schedule, profile)])
    try:
        return _scrontab_job(schedule.name)
    except JobError:
        _remove_entry(schedule)
        raise


def remove_run(schedule: Schedule, run: Path) -> bool:
    """Take a run out of a schedule, and end the schedule with its last run.

    Returns:
        False if there was nothing to take out.

    Raises:
        JobError: the scrontab cannot be read or written. It comes first, so that the same call may be repeated.
    """
    left = [line for line in schedule.runs() if line != str(run)]
    removed = not left and _remove_entry(schedule)
    if not schedule.folder.is_dir() or str(run) not in schedule.runs():
        return removed
    if not left:
        write_atomic(schedule.folder / _ENDED, "cancelled\n")
    write_atomic(schedule.folder / _RUNS, "".join(f"{line}\n" for line in left))
    return True


def _scrontab_entry(schedule: Schedule, profile: ClusterProfile) -> list[str]:
    """A schedule's lines of a scrontab, between two marks."""
    return [
        f"# {schedule.name} begins: evals by bbu.submit; `python -m bbu.submit cancel RUN` takes it out",
        *(f"#SCRON {option}" for option in _sbatch_options(schedule, profile)),
        f"{_cron_times(schedule.minutes)} {shlex.quote(str(schedule.folder / _SCRIPT))}",
        f"# {schedule.name} ends",
    ]


def _scrontab_lines() -> list[str]:
    """The caller's scrontab, which will be written back.

    Raises JobError if it cannot be read, unless Slurm says that there is none.
    """
    code, output, error = run_slurm_command(["scrontab", "-l"])
    if code and "no crontab" not in (output + error).lower():
        raise JobError(f"scrontab -l failed: {one_line(error)}")
    return [] if code else output.splitlines()


def _write_scrontab(lines: Sequence[str]) -> None:
    """Replace the caller's scrontab; an empty one is removed."""
    if not any(line.strip() for line in lines):
        slurm_output(["scrontab", "-r"])
        return
    with tempfile.NamedTemporaryFile("w", prefix="bbu-scrontab-") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        slurm_output(["scrontab", file.name])


def _without_entry(lines: Sequence[str], name: str) -> list[str]:
    """The lines of a scrontab but for one schedule's entry."""
    others, inside = [], False
    for line in lines:
        inside = inside or line.startswith(f"# {name} begins")
        if not inside:
            others.append(line)
        inside = inside and not line.startswith(f"# {name} ends")
    return others


def _scrontab_job(name: str) -> str:
    """The id of the job that a new entry of the scrontab makes. Raises JobError if there is none in time."""
    deadline = time.monotonic() + _FIND_SECONDS
    while not (ids := slurm_output(["squeue", "--me", "-h", "-n", name, "-o", "%A"]).split()):
        if time.monotonic() > deadline:
            raise JobError(f"the scrontab's entry {name} made no job within {_FIND_SECONDS} s; see scrontab -l")
        time.sleep(0.2)
    return ids[-1]


def _remove_entry(schedule: Schedule) -> bool:
    """Take a schedule's entry out of the scrontab; False if there is none."""
    if schedule.mode != "scrontab":
        return False
    lines = _scrontab_lines()
    others = _without_entry(lines, schedule.name)
    if others != lines:
        _write_scrontab(others)
    return others != lines
