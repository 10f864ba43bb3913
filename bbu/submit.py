"""Submit jobs and mind them.

train | convert | eval | pipeline     submit a job; pipeline: all of them, in order (train)
logs RUN | cancel RUN… | resume RUN   see what a run prints, end its jobs, let it go on
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bbu.config.flat import DirectConfig
from bbu.config.read import load_config
from bbu.errors import ConfigError, JobError, run_entry
from bbu.jobs import schedule
from bbu.jobs.clusters import ClusterProfile, load_profile
from bbu.jobs.control import cancel_runs, known_run, live_jobs, live_training, log_files, resumption
from bbu.jobs.launch import Submission
from bbu.jobs.plan import (
    DEFAULT_CONFIG,
    PER_POINT,
    Facts,
    Request,
    plan,
    run_folder,
    sweep_folder,
    sweep_folders,
    sweep_requests,
)
from bbu.jobs.queue import leave_job
from bbu.jobs.records import SCHEDULE, record_of, remember
from bbu.jobs.spec import JobSpec
from bbu.jobs.submission import dry_run, submit
from bbu.jobs.sweep import grid
from bbu.run.folder import RunFolder

LOOK_S = 10.0
"""How often to look for the first output of a job that waits."""
HOME = Path(__file__).resolve().parents[1]
JOBS = ("train", "convert", "eval", "pipeline")
CONVERSION_KEYS = (
    "vendor_dir", "data_root", "train_file", "val_file", "teacher_file", "image_folder", "min_pixels", "max_pixels",
    "jpeg_quality", "response_types", "token_map_file", "label_hierarchy_file", "unknown_label_policy", "site_pattern",
    "val_ratio", "split_seed", "teacher_pool_size", "max_reject_share", "min_visible_ratio", "min_box_side",
    "remove_duplicates", "keep_negatives", "language",
)  # fmt: skip
"""Config keys that the conversion reads."""


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="python -m bbu.submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = described.add_argument
    add("job", nargs="?", choices=JOBS, default="train", help="what to run (train)")
    add("runs", nargs="*", metavar="RUN", help="eval: run folders to score (the config's own)")
    add("--nodes", type=int, default=1, metavar="N", help="nodes of the training job (1)")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs, and so tasks, per node (the profile's)")
    add("--cluster", default=os.environ.get("BBU_CLUSTER", "local"), metavar="NAME",
        help="a profile under configs/clusters, or a path (BBU_CLUSTER, else local: this machine)")  # fmt: skip
    add(
        "--config",
        metavar="NAME",
        help=f"a run config under configs, or a path ({DEFAULT_CONFIG}; eval RUN: each checkpoint's own)",
    )
    add("--use-new-config", action="store_true", help="the run config is in five sections")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a config key")
    add("--sweep", action="append", default=[], metavar="KEY=A,B", help="train a run for each value, and compare them")
    add("--every", metavar="TIME", help="eval: come again every 30m, 2h, 1d")
    add(
        "--demo", action="store_true", help="first draw synthetic rooms and build the tiny model, unless they are there"
    )
    add("--dry-run", action="store_true", help="show what would be submitted, and submit nothing")
    return described


def request_of(arguments: argparse.Namespace) -> Request:
    """The command line, checked as far as it can be without a config. Raises JobError."""
    if arguments.runs and arguments.job != "eval":
        raise JobError(f"{arguments.runs[0]}: run folders are for eval; to train, name a --config")
    if arguments.every and arguments.job != "eval":
        raise JobError("--every is for eval: `eval --every 30m RUN`")
    if arguments.every and arguments.runs and (arguments.config or arguments.overrides):
        raise JobError("scheduled evals of a RUN use the config of each checkpoint; leave out --config and --set")
    if arguments.sweep and arguments.job not in ("train", "pipeline"):
        raise JobError("--sweep is for train and pipeline")
    return Request(
        job=arguments.job,
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        cluster=arguments.cluster,
        config=arguments.config,
        use_new_config=arguments.use_new_config,
        overrides=tuple(arguments.overrides),
        demo=arguments.demo,
        points=tuple(grid(arguments.sweep)) if arguments.sweep else (),
        runs=tuple(str(known_run(run).root) for run in arguments.runs),
    )


def run_config(request: Request) -> DirectConfig:
    """The run config of the command line, and of each point of a sweep, checked here rather than in the queue."""
    config = load(request)
    swept = {text.partition("=")[0] for text in (request.points or ((),))[0]}
    if request.job == "pipeline" and (bound := sorted(swept & set(CONVERSION_KEYS))):
        raise ConfigError(f"--sweep {bound[0]}: a pipeline converts once; convert for each value, then sweep data_root")
    for one in sweep_requests(request, config):
        load(one)
    return config


def load(request: Request) -> DirectConfig:
    return load_config(request.config_name, overrides=request.overrides, use_new=request.use_new_config)


def facts_of(request: Request, profile: ClusterProfile, config: DirectConfig) -> Facts:
    """What is on the disk already, and need not be made again."""
    demo = demonstration(config) if request.demo else ()
    if request.job not in ("convert", "pipeline") or profile.convert_tasks == 1:
        return Facts(demo, ())
    from bbu.conversion.shards import missing_shards

    return Facts(demo, tuple(missing_shards(config.data, profile.convert_tasks)))


def demonstration(config: DirectConfig) -> tuple[tuple[str, ...], ...]:
    """What draws the rooms and what builds the tiny model, where the config points; not what is there already."""
    model, rooms = config.model.model_path, config.data.vendor_dir
    build = f"from bbu.models.tiny import build_tiny_model; build_tiny_model({model!r}, seed={config.training.seed})"
    wanted = {rooms: ("-m", "bbu.demo", "--out", rooms), model: ("-c", build)}
    return tuple(command for folder, command in wanted.items() if not Path(folder).exists())


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    leave_job(os.environ)
    if argv and argv[0] in TOOLS:
        return TOOLS[argv[0]](argv[1:])
    arguments = parser().parse_intermixed_args(argv)
    request, profile = request_of(arguments), load_profile(arguments.cluster)
    config = run_config(request)
    if arguments.every:
        return every(request, profile, config, schedule.minutes_of(arguments.every), arguments.dry_run)
    specs = plan(request, profile, config, facts_of(request, profile, config))
    if arguments.dry_run:
        print(dry_run(specs, profile, HOME))
        return 0
    return send(specs, request, profile, config)


def send(specs: tuple[JobSpec, ...], request: Request, profile: ClusterProfile, config: DirectConfig) -> int:
    """Submit, or run here; each job is written into its run's records as soon as it exists."""
    runs = folders_of(request, config)
    commands = [one.again() for one in sweep_requests(request, config) or [request] * len(runs)]
    for run in runs:
        remember(run, [])  # it must be possible before anything is in the queue
    if missing_image(profile):
        tell(f"there is no image {profile.image} here; build it with containers/build.sh, or the jobs will fail")
    try:
        done = submit(specs, profile, HOME, tell, lambda job: keep(job, request, runs, commands))
    except KeyboardInterrupt:
        tell("stopped; the same command goes on from what is saved")
        return 130
    if request.points:
        tell(f"{len(request.points)} runs; when all is done the table is in {sweep_folder(config)}")
    return next((job.exit_code for job in done if job.exit_code), 0)


def keep(done: Submission, request: Request, runs: Sequence[RunFolder], commands: Sequence[tuple[str, ...]]) -> None:
    """Write a submission into the records of the runs it is for; commands: what trains each of them on."""
    own = bool(request.points) and done.name in PER_POINT
    shared = [] if own or len(runs) == 1 else [str(run.root) for run in runs]
    for index, (run, command) in enumerate(zip(runs, commands, strict=True)):
        if not own or done.has(index):
            element = done.element(index) if own else None
            remember(run, [record_of(done, request.cluster, command, element, shared)])


def folders_of(request: Request, config: DirectConfig) -> list[RunFolder]:
    """The runs that a command line is for."""
    if request.points:
        return sweep_folders(request, config)
    return [RunFolder(Path(run)) for run in request.runs] or [RunFolder(run_folder(config).root.resolve())]


def missing_image(profile: ClusterProfile) -> bool:
    return profile.executor == "slurm" and profile.image is not None and not Path(profile.image).exists()


def every(request: Request, profile: ClusterProfile, config: DirectConfig, minutes: int, dry: bool) -> int:
    """Let evals of some runs come again and again."""
    if profile.executor != "slurm":
        raise JobError("--every needs a Slurm profile; here, let cron call `python -m bbu.eval --pending RUN`")
    runs = folders_of(request, config)
    mode = schedule.way_here(profile.eval_schedule)
    if mode == "dependency":
        return after_training(runs, request, profile, config, dry)
    if dry:
        shown = schedule.Schedule(mode, minutes, Path(profile.work_folder).absolute() / "<time>-eval-schedule-<random>")
        print(schedule.described(shown, profile, HOME))
        return 0
    made = schedule.create(mode, minutes, [run.root for run in runs], profile, HOME)
    for run in runs:
        remember(run, [record_of(Submission(SCHEDULE, (), (made.folder,), None), request.cluster, made.argv)])
    job = schedule.start(made, profile)
    tell(f"evals every {minutes} minutes by {mode}: job {job}, logs {made.folder}")
    return 0


def after_training(
    runs: Sequence[RunFolder], request: Request, profile: ClusterProfile, config: DirectConfig, dry: bool
) -> int:
    """Where neither scrontab nor jobs that submit jobs are allowed: one eval after each training job that is left."""
    tell("evals by dependency: one when training ends, not again and again")
    for run in runs:
        one = dataclasses.replace(request, runs=(str(run.root),))
        waits = tuple(job.id for job in live_training(run))
        [spec] = plan(one, profile, config, Facts((), ()))
        specs = (dataclasses.replace(spec, after_jobs=waits, after_any=True),)
        if dry:
            print(dry_run(specs, profile, HOME))
        else:
            send(specs, one, profile, config)
    return 0


def tool_parser(name: str, text: str, many: bool = False) -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog=f"python -m bbu.submit {name}", description=text)
    described.add_argument("runs", nargs="+" if many else 1, metavar="RUN", help="an output-{run_name} folder")
    return described


def logs(argv: Sequence[str]) -> int:
    described = tool_parser("logs", "Show what a run's newest job prints.")
    described.add_argument("-f", "--follow", action="store_true", help="go on showing what comes; Ctrl-C ends it")
    described.add_argument("--job", metavar="NAME", help="train, convert, merge, eval, eval-schedule … (the newest)")
    described.add_argument("--rank", default="0", help="of which task: a number, or all (0)")
    described.add_argument("-n", "--lines", type=int, default=50, metavar="N", help="how much to begin with (50)")
    arguments = described.parse_args(argv)
    run = known_run(arguments.runs[0])
    while not (files := log_files(run, arguments.job, arguments.rank)):
        jobs = live_jobs(run)
        waiting = ", ".join(f"{job.name} {job.id} is {job.state}" for job in jobs) or "no job is in the queue"
        if not (arguments.follow and jobs):
            raise JobError(f"{run.root}: no output yet; {waiting}")
        tell(f"no output yet; {waiting}")
        time.sleep(LOOK_S)
    sys.stdout.flush()
    follow = ["-F"] if arguments.follow else []
    os.execvp("tail", ["tail", "-n", str(arguments.lines), *follow, "--", *files])


def cancel(argv: Sequence[str]) -> int:
    arguments = tool_parser(
        "cancel", "End all jobs and scheduled evals of runs; what is saved stays.", True
    ).parse_args(argv)
    for run, told in cancel_runs([known_run(name) for name in arguments.runs]).items():
        for line in told or ["nothing to cancel"]:
            tell(f"{run.root.name}: {line}")
    return 0


def resume(argv: Sequence[str]) -> int:
    described = tool_parser("resume", "Submit a run's training again, as it was; it goes on from its last checkpoint.")
    described.add_argument("--dry-run", action="store_true", help="show what would be submitted")
    arguments = described.parse_args(argv)
    record = resumption(known_run(arguments.runs[0]))
    os.chdir(record.cwd)  # paths in configs are relative to it
    line = [*record.argv, *(["--dry-run"] if arguments.dry_run else [])]
    tell(f"in {record.cwd}: python -m bbu.submit {' '.join(line)}")
    return main(line)


TOOLS: dict[str, Callable[[Sequence[str]], int]] = {"logs": logs, "cancel": cancel, "resume": resume}


def tell(text: str) -> None:
    print(f"bbu.submit: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_entry(main)
