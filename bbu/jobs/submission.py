"""Submits the jobs of a request: to Slurm, to this machine, or into the text of a dry run."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bbu.config.arguments import DEFAULT_CLUSTER
from bbu.config.flat import DirectConfig
from bbu.errors import INTERRUPTED_EXIT_CODE, JobError
from bbu.jobs.clusters import ClusterProfile, load_profile
from bbu.jobs.control import live_training_jobs
from bbu.jobs.launch import CHECKOUT, Note, Submission, job_environment, task_command
from bbu.jobs.local import run_here
from bbu.jobs.plan import (
    JOBS_PER_POINT,
    MissingInputs,
    comparison_folder,
    config_run_folder,
    load_request_config,
    missing_inputs,
    plan_jobs,
    point_requests,
    point_run_folders,
)
from bbu.jobs.queue import max_array_size
from bbu.jobs.records import append_records, job_record, schedule_record
from bbu.jobs.request import Request
from bbu.jobs.schedule import SCHEDULE_NAME, Schedule, choose_mode, create_schedule, schedule_text, start_schedule
from bbu.jobs.slurm import awaited_ids, script_text, submit_to_slurm
from bbu.jobs.spec import JobSpec, check_order
from bbu.run.folder import RunFolder


def submit_request(
    request: Request, notify: Callable[[str], None], dry_run: bool = False, is_cluster_named: bool = True
) -> int:
    """Submit the jobs of one request, or run them on this machine, and write them into the records of their runs.

    Args:
        request: what to submit.
        notify: receives a line about each step.
        dry_run: print what would be submitted, and submit nothing.
        is_cluster_named: whether a person has chosen the request's cluster profile.

    Returns:
        The exit code: 0, the first bad code of a job on this machine, or 130 after Ctrl-C.

    Raises:
        ConfigError: a run config or a cluster profile that is refused.
        JobError: a job that could never run, or that Slurm refuses.
    """
    profile, config = load_profile(request.cluster), load_request_config(request)
    if request.every_minutes is not None:
        return _schedule_evals(request, request.every_minutes, profile, config, notify, dry_run)
    specs = plan_jobs(request, profile, config, missing_inputs(request, profile, config))
    if not is_cluster_named:
        _mention_slurm(request.nodes, notify)
    return _submit_or_print(specs, request, profile, config, notify, dry_run)


def submit_jobs(
    specs: tuple[JobSpec, ...],
    profile: ClusterProfile,
    checkout: Path,
    notify: Callable[[str], None],
    note: Note = lambda submission: None,
) -> list[Submission]:
    """Submit all jobs to Slurm, chained by dependency, or run them here one after the other.

    On this machine a job is skipped when one that it depends on failed, unless it has `after_any`.

    Args:
        specs: the jobs, in an order in which each waits only for earlier ones.
        profile: the site.
        checkout: the folder with the code.
        notify: receives a line about each step.
        note: receives each job as soon as it exists.

    Returns:
        One Submission for each job that was submitted or that ran.

    Raises:
        JobError: there is no Slurm here, or it refuses a job.
    """
    check_order(specs)
    if profile.executor == "slurm":
        return submit_to_slurm(specs, profile, checkout, notify, note)
    notify("no Slurm in this profile: running here, one job after the other (submitit's local executor)")
    finished: dict[str, Submission] = {}
    for spec in specs:
        if not spec.after_any and any(name not in finished or finished[name].exit_code for name in spec.after):
            continue
        finished[spec.name] = run_here(spec, profile, checkout, notify, note)
    return list(finished.values())


def dry_run_text(specs: tuple[JobSpec, ...], profile: ClusterProfile, checkout: Path) -> str:
    """Exactly what `submit_jobs` would do, for a person to read; touches nothing.

    Placeholders stand only for what does not exist before: job ids, and the folders of submitit's files.
    """
    check_order(specs)
    return "\n\n".join(part for spec in specs for part in _job_texts(spec, profile, checkout))


def _mention_slurm(nodes: int, notify: Callable[[str], None]) -> None:
    """Where Slurm is here and no profile is named: refuse what needs several nodes, and report what runs here."""
    if shutil.which("sbatch") is None:
        return
    if nodes > 1:
        raise JobError(
            f"--nodes {nodes} without --cluster would run on this machine alone, although it has Slurm; name a profile "
            f"(--cluster NAME), or --cluster {DEFAULT_CLUSTER} if you mean this machine"
        )
    notify("running on this machine; --cluster NAME submits to Slurm")


def _submit_or_print(
    specs: tuple[JobSpec, ...],
    request: Request,
    profile: ClusterProfile,
    config: DirectConfig,
    notify: Callable[[str], None],
    dry_run: bool,
) -> int:
    if not dry_run:
        return _submit_and_record(specs, request, profile, config, notify)
    print(dry_run_text(specs, profile, CHECKOUT))
    return 0


def _submit_and_record(
    specs: tuple[JobSpec, ...],
    request: Request,
    profile: ClusterProfile,
    config: DirectConfig,
    notify: Callable[[str], None],
) -> int:
    """Submit jobs, or run them here; each is written into its runs' records as soon as it exists."""
    runs = _request_runs(request, config)
    run_requests = point_requests(request, config) or [request] * len(runs)
    for run in runs:
        append_records(run, [])  # fails here, before anything is in the queue, if the records cannot be written
    if _image_is_missing(profile):
        notify(f"there is no image {profile.image} here; build it with containers/build.sh, or the jobs will fail")

    def record(submission: Submission) -> None:
        _record_submission(submission, request, runs, run_requests)

    try:
        submissions = submit_jobs(specs, profile, CHECKOUT, notify, record)
    except KeyboardInterrupt:
        notify("stopped; the same command resumes from what is saved")
        return INTERRUPTED_EXIT_CODE
    if request.points:
        notify(f"{len(request.points)} runs; when all have ended, the table is in {comparison_folder(config)}")
    return next((submission.exit_code for submission in submissions if submission.exit_code), 0)


def _record_submission(
    submission: Submission, request: Request, runs: Sequence[RunFolder], run_requests: Sequence[Request]
) -> None:
    """Write a submission into the records of the runs that it serves.

    Args:
        submission: a job, or one array of it.
        request: the request that it was submitted for.
        runs: all runs of that request.
        run_requests: for each of the runs, the request for this run alone.
    """
    by_point = bool(request.points) and submission.name in JOBS_PER_POINT
    shared = [] if by_point or len(runs) == 1 else [str(run.root) for run in runs]
    for index, (run, run_request) in enumerate(zip(runs, run_requests, strict=True)):
        if not by_point or submission.has(index):
            element = submission.element(index) if by_point else None
            append_records(run, [job_record(submission, run_request, element, shared)])


def _request_runs(request: Request, config: DirectConfig) -> list[RunFolder]:
    """The runs that a request is for."""
    if request.points:
        return point_run_folders(request, config)
    return [RunFolder(Path(run)) for run in request.runs] or [RunFolder(config_run_folder(config).root.resolve())]


def _image_is_missing(profile: ClusterProfile) -> bool:
    return profile.executor == "slurm" and profile.image is not None and not Path(profile.image).exists()


def _schedule_evals(
    request: Request,
    minutes: int,
    profile: ClusterProfile,
    config: DirectConfig,
    notify: Callable[[str], None],
    dry_run: bool,
) -> int:
    """Start a schedule that repeats the evals of some runs."""
    if profile.executor != "slurm":
        raise JobError("--every needs a Slurm profile; here, let cron call `python -m bbu.eval --pending RUN`")
    runs = _request_runs(request, config)
    mode = choose_mode(profile.eval_schedule)
    if mode == "dependency":
        return _submit_after_training(runs, request, profile, config, notify, dry_run)
    if dry_run:
        placeholder = Path(profile.work_folder).absolute() / f"<time>-{SCHEDULE_NAME}-<random>"
        print(schedule_text(Schedule(mode, minutes, placeholder), profile, CHECKOUT))
        return 0
    schedule = create_schedule(mode, minutes, [run.root for run in runs], profile, CHECKOUT)
    for run in runs:
        append_records(run, [schedule_record(schedule, request.cluster)])
    job = start_schedule(schedule, profile)
    notify(f"evals every {minutes} minutes by {mode}: job {job}, logs {schedule.folder}")
    return 0


def _submit_after_training(
    runs: Sequence[RunFolder],
    request: Request,
    profile: ClusterProfile,
    config: DirectConfig,
    notify: Callable[[str], None],
    dry_run: bool,
) -> int:
    """Submit one eval that starts when the run's training jobs have ended, for each run.

    This is for sites that allow neither scrontab nor jobs that submit jobs.
    """
    notify("evals by dependency: one when training ends, not every so often")
    for run in runs:
        one_run = dataclasses.replace(request, runs=(str(run.root),), every_minutes=None)
        training_jobs = tuple(job.id for job in live_training_jobs(run))
        [spec] = plan_jobs(one_run, profile, config, MissingInputs((), ()))
        waiting = dataclasses.replace(spec, after_jobs=training_jobs, after_any=True)
        _submit_or_print((waiting,), one_run, profile, config, notify, dry_run)
    return 0


def _job_texts(spec: JobSpec, profile: ClusterProfile, checkout: Path) -> Iterator[str]:
    """The parts of a dry run about one job: its batch scripts, and what its tasks run."""
    if profile.executor == "local":
        waits = f", after {', '.join(spec.after)}" if spec.after else ""
        title = f"### {spec.name}: {spec.tasks} tasks on this machine{waits}"
        yield "\n".join([title, *_command_lines(spec, profile, checkout)])
        return
    before = awaited_ids(spec, {name: (f"<id of {name}>",) for name in spec.after})
    chunks = list(spec.chunks(max_array_size() if spec.is_array else 1))
    for number, chunk in enumerate(chunks, 1):
        of = f" (array {number} of {len(chunks)})" if len(chunks) > 1 else ""
        folder = f"{Path(profile.work_folder).absolute()}/<time>-{spec.name}-<random>"
        script = script_text(chunk, profile, checkout, folder, before)
        yield "\n".join([f"### {spec.name}{of}: sbatch {folder}/submission_file_<random>.sh", script])
        lines = _command_lines(chunk, profile, checkout)
        yield "\n".join([f"### {spec.name}{of}: what each of its tasks runs", *lines])


def _command_lines(spec: JobSpec, profile: ClusterProfile, checkout: Path) -> Iterator[str]:
    """The variables that all tasks share, then one command for each element."""
    variables = job_environment(spec, profile, checkout)
    yield from (f"export {name}={shlex.quote(value)}" for name, value in variables.items())
    for index, command in enumerate(spec.commands):
        element = f"  # element {index}" if spec.is_array else ""
        yield shlex.join(task_command(checkout, profile.image, command)) + element
