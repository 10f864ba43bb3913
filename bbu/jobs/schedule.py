"""Evals that come again every so often: by scrontab, by a job that submits itself again, or after each training job.

A schedule is a folder beside the job logs: `schedule.sh` (a batch script that holds the settings and calls
slurm/eval.scron), `runs` (one run folder a line, read at each start), `jobs` (ids, where jobs submit each other) and
`ended` (why no further one comes). Whatever calls it, and however often: bbu.eval --pending does no work twice.
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

SCRIPT, RUNS, JOBS, ENDED = "schedule.sh", "runs", "jobs", "ended"
FAILED = "failed"
"""How `ended` begins where it should not have ended (slurm/eval.scron)."""
UNITS = {"m": 1, "h": 60, "d": 24 * 60}
ENABLED = re.compile(r"(^|,)enable(,|$)")
FIND_SECONDS = 10


@dataclass(frozen=True)
class Schedule:
    """One schedule: how it is kept (scrontab or resubmit), every how many minutes, and its folder."""

    mode: str
    minutes: int
    folder: Path

    @property
    def name(self) -> str:
        """The job's name, by which its lines in a scrontab are found again."""
        return job_name(f"eval-{hashlib.sha256(str(self.folder).encode()).hexdigest()[:8]}")

    def runs(self) -> list[str]:
        """The run folders it serves; none where its folder was cleaned away."""
        path = self.folder / RUNS
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def job_ids(self) -> list[str]:
        """Of jobs that submitted each other, oldest first."""
        path = self.folder / JOBS
        return path.read_text(encoding="utf-8").split() if path.exists() else []

    def job_keys(self) -> list[str]:
        """By which its jobs are found in the queue: their ids, or their name in a scrontab."""
        return [self.name] if self.mode == "scrontab" else self.job_ids()

    def ended(self) -> str:
        """Why no further job comes; empty while they do."""
        path = self.folder / ENDED
        return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def interval_minutes(text: str) -> int:
    """`30m`, `2h`, `1d` in minutes. Raises JobError for what a crontab cannot keep evenly."""
    match = re.fullmatch(r"([1-9]\d{0,3})([mhd])", text)
    minutes = int(match[1]) * UNITS[match[2]] if match else 0
    if not minutes or not (60 % minutes == 0 or (minutes % 60 == 0 and 24 * 60 % minutes == 0)):
        raise JobError(f"--every {text}: write minutes that divide an hour, hours that divide a day, or 1d; as 30m, 2h")
    return minutes


def cron_times(minutes: int) -> str:
    """The five fields of a crontab."""
    if minutes < 60:
        return f"*/{minutes} * * * *" if minutes > 1 else "* * * * *"
    hours = minutes // 60
    return "0 0 * * *" if hours == 24 else f"0 */{hours} * * *" if hours > 1 else "0 * * * *"


def scrontab_enabled(config: Mapping[str, str]) -> bool:
    """Whether the controller takes scrontabs; the program is another question, Debian 12 has none."""
    return ENABLED.search(config.get("ScronParameters", "")) is not None


def way_here(wanted: str) -> str:
    """The way that `eval_schedule` of a profile names; for `auto` the first that the site allows."""
    allowed = shutil.which("scrontab") is not None and scrontab_enabled(read_slurm_config())
    if wanted == "scrontab" and not allowed:
        raise JobError("eval_schedule is scrontab, but this site has none (ScronParameters=enable); state auto")
    return wanted if wanted != "auto" else "scrontab" if allowed else "resubmit"


def described(schedule: Schedule, profile: ClusterProfile, home: Path) -> str:
    """For a dry run: what would be installed or submitted, and the script behind it."""
    path = schedule.folder / SCRIPT
    how = "\n".join(entry(schedule, profile)) if schedule.mode == "scrontab" else f"sbatch {path}"
    return f"### eval-schedule: {how}\n\n### {path}\n{script(schedule, profile, home)}"


def create(mode: str, minutes: int, runs: Sequence[Path], profile: ClusterProfile, home: Path) -> Schedule:
    """Write the folder of a schedule; nothing is submitted yet."""
    schedule = Schedule(mode, minutes, new_folder("eval-schedule", profile))
    write_atomic(schedule.folder / RUNS, "".join(f"{run}\n" for run in runs))
    path = schedule.folder / SCRIPT
    write_atomic(path, script(schedule, profile, home))
    path.chmod(0o755)
    return schedule


def script(schedule: Schedule, profile: ClusterProfile, home: Path) -> str:
    """The batch script. It states the caller's PATH: a scrontab's jobs begin with hardly any environment."""
    environment = task_environment(profile, home, profile.eval.gpus_per_node)
    environment |= {"BBU_SCHEDULE": str(schedule.folder)} | ({} if profile.image else {"BBU_PYTHON": sys.executable})
    if schedule.mode == "resubmit":
        environment |= {"BBU_EVERY": str(schedule.minutes)}
    lines = [
        "#!/bin/bash -l" if profile.modules else "#!/bin/bash",  # `module` is a function of a login shell
        f"# Evals every {schedule.minutes} minutes, by {schedule.mode}; `bbu.submit cancel RUN` ends them.",
        *(f"#SBATCH {option}" for option in options(schedule, profile)),
        "",
        f"export PATH={shlex.quote(caller_path())}",  # alone: jobs that submit each other would lengthen it for ever
        *(f"module load {module}" for module in profile.modules),
        *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
        f"mapfile -t runs <{shlex.quote(str(schedule.folder / RUNS))}",
        f'exec bash {shlex.quote(str(home / "slurm" / "eval.scron"))} "${{runs[@]}}"',
    ]
    return "\n".join(lines) + "\n"


def caller_path() -> str:
    """Where the programs of the one who submits are; apptainer's folder above all."""
    return os.environ.get("PATH", "/usr/bin:/bin")


def options(schedule: Schedule, profile: ClusterProfile) -> list[str]:
    """For sbatch, and for the `#SCRON` lines. Not requeued: the next job goes on, and two must not follow one."""
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


def start(schedule: Schedule, profile: ClusterProfile) -> str:
    """Begin: install the scrontab's entry, or submit the first job; its id.

    Raises JobError if Slurm refuses; then nothing is left behind.
    """
    if schedule.mode == "resubmit":
        job = slurm_output(["sbatch", "--parsable", str(schedule.folder / SCRIPT)]).strip().partition(";")[0]
        with (schedule.folder / JOBS).open("a") as file:
            file.write(f"{job}\n")
        return job
    write_scrontab([*without(scrontab_lines(), schedule.name), *entry(schedule, profile)])
    try:
        return find_job(schedule.name)
    except JobError:
        take_out(schedule)
        raise


def entry(schedule: Schedule, profile: ClusterProfile) -> list[str]:
    """The lines of a scrontab, between two marks."""
    return [
        f"# {schedule.name} begins: evals by bbu.submit; `python -m bbu.submit cancel RUN` takes it out",
        *(f"#SCRON {option}" for option in options(schedule, profile)),
        f"{cron_times(schedule.minutes)} {shlex.quote(str(schedule.folder / SCRIPT))}",
        f"# {schedule.name} ends",
    ]


def scrontab_lines() -> list[str]:
    """The caller's scrontab. Raises JobError unless it is there or known to be empty: it will be written back."""
    code, out, error = run_slurm_command(["scrontab", "-l"])
    if code and "no crontab" not in (out + error).lower():
        raise JobError(f"scrontab -l failed: {one_line(error)}")
    return [] if code else out.splitlines()


def write_scrontab(lines: Sequence[str]) -> None:
    """Replace the caller's scrontab; an empty one is removed."""
    if not any(line.strip() for line in lines):
        slurm_output(["scrontab", "-r"])
        return
    with tempfile.NamedTemporaryFile("w", prefix="bbu-scrontab-") as file:
        file.write("\n".join(lines) + "\n")
        file.flush()
        slurm_output(["scrontab", file.name])


def without(lines: Sequence[str], name: str) -> list[str]:
    """Everything but one schedule's entry."""
    kept, ours = [], False
    for line in lines:
        ours = ours or line.startswith(f"# {name} begins")
        if not ours:
            kept.append(line)
        ours = ours and not line.startswith(f"# {name} ends")
    return kept


def find_job(name: str) -> str:
    """The id of the job that a new entry of the scrontab made."""
    deadline = time.monotonic() + FIND_SECONDS
    while not (found := slurm_output(["squeue", "--me", "-h", "-n", name, "-o", "%A"]).split()):
        if time.monotonic() > deadline:
            raise JobError(f"the scrontab's entry {name} made no job within {FIND_SECONDS} s; see scrontab -l")
        time.sleep(0.2)
    return found[-1]


def drop(schedule: Schedule, run: Path) -> bool:
    """Take a run out of a schedule, and end that with its last run; False if there was nothing to take out.

    The scrontab comes first: if it cannot be written, the same call may be made again.
    """
    rest = [line for line in schedule.runs() if line != str(run)]
    entered = not rest and take_out(schedule)
    if not schedule.folder.is_dir() or str(run) not in schedule.runs():
        return entered
    if not rest:
        write_atomic(schedule.folder / ENDED, "cancelled\n")
    write_atomic(schedule.folder / RUNS, "".join(f"{line}\n" for line in rest))
    return True


def take_out(schedule: Schedule) -> bool:
    """Take a schedule's entry out of the scrontab; False if there is none."""
    if schedule.mode != "scrontab":
        return False
    lines = scrontab_lines()
    left = without(lines, schedule.name)
    if left != lines:
        write_scrontab(left)
    return left != lines
