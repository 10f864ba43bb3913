"""From a request to the jobs that fulfil it: which commands, in which order, with which resources."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bbu.config.domains import keys_used_for
from bbu.config.flat import DirectConfig
from bbu.errors import ConfigError
from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.request import Command, Request
from bbu.jobs.spec import JobSpec, Resources
from bbu.jobs.sweep import point_name
from bbu.run.folder import RunFolder

JOBS_PER_POINT = ("train", "eval")
"""Jobs of a sweep that have one element for each of its points; the others serve all points together."""
_TABLE = "table.md"


@dataclass(frozen=True)
class MissingInputs:
    """What a request needs and the disk does not have yet."""

    demo_commands: tuple[Command, ...]
    """Commands that make the synthetic photos and the tiny model, each only if it is missing."""
    shards: tuple[int, ...]
    """Numbers of the conversion's shards that are still to be made."""


def load_request_config(request: Request) -> DirectConfig:
    """The run config of a request. Configs of a sweep's points are checked here, not later in the queue.

    Raises ConfigError, also for a pipeline that sweeps a key of the conversion, which it runs once.
    """
    config = request.load_config()
    swept = {text.partition("=")[0] for text in (request.points or ((),))[0]}
    if request.job == "pipeline" and (bound := sorted(swept & set(keys_used_for("conversion")))):
        raise ConfigError(f"--sweep {bound[0]}: a pipeline converts once; convert for each value, then sweep data_root")
    for each in point_requests(request, config):
        each.load_config()
    return config


def missing_inputs(request: Request, profile: ClusterProfile, config: DirectConfig) -> MissingInputs:
    """What the request needs and the disk does not have yet."""
    demo = _demo_commands(config) if request.demo else ()
    if request.job not in ("convert", "pipeline") or profile.convert_tasks == 1:
        return MissingInputs(demo, ())
    from bbu.conversion.shards import missing_shards  # numpy and Pillow: not needed for `--help`

    return MissingInputs(demo, tuple(missing_shards(config.data, profile.convert_tasks)))


def config_run_folder(config: DirectConfig) -> RunFolder:
    """The run folder that a config names."""
    return RunFolder.of(config.infrastructure.output_root, config.infrastructure.run_name)


def plan_jobs(
    request: Request, profile: ClusterProfile, config: DirectConfig, missing: MissingInputs
) -> tuple[JobSpec, ...]:
    """The jobs of one request, each waiting for the one before it.

    Raises:
        JobError: a job that could never run, such as one of 0 nodes.
        ConfigError: two points of a sweep that would share a run folder.
    """
    jobs: list[JobSpec] = []
    if missing.demo_commands:
        jobs.append(_single_task_job("demo", missing.demo_commands, profile.convert))
    if request.job in ("convert", "pipeline"):
        jobs += _conversion_jobs(request.run_arguments, profile, missing.shards)
    if request.job in ("train", "pipeline"):
        jobs.append(_training_job(request, profile, config))
    if request.job in ("eval", "pipeline") or request.points:
        jobs.append(_eval_job(request, profile, config))
    if request.points:
        jobs.append(_comparison_job(request, profile, config))
    requeues = config.infrastructure.max_requeues
    return tuple(dataclasses.replace(job, max_requeues=requeues) for job in _chained(jobs))


def point_requests(request: Request, config: DirectConfig) -> list[Request]:
    """One request for each point of a sweep; empty without a sweep.

    Raises ConfigError where two points would share a run folder.
    """
    base = config.infrastructure.run_name
    names = Counter(point_name(base, point) for point in request.points)
    if twice := sorted(name for name, times in names.items() if times > 1):
        raise ConfigError(
            f"--sweep: two runs would be called {twice[0]}; choose values that differ in letters or digits"
        )
    return [request.at_point(point, base) for point in request.points]


def point_run_folders(request: Request, config: DirectConfig) -> list[RunFolder]:
    """The run folder of each point of a sweep."""
    base, root = config.infrastructure.run_name, Path(config.infrastructure.output_root).resolve()
    return [RunFolder.of(root, point_name(base, point)) for point in request.points]


def comparison_folder(config: DirectConfig) -> Path:
    """Where the table of a sweep is written."""
    infrastructure = config.infrastructure
    return Path(infrastructure.output_root).resolve() / f"sweep-{infrastructure.run_name}"


def _chained(jobs: Sequence[JobSpec]) -> list[JobSpec]:
    """Let every job wait for the one before it."""
    names = [job.name for job in jobs]
    return [dataclasses.replace(job, after=tuple(names[max(0, i - 1) : i])) for i, job in enumerate(jobs)]


def _single_task_job(name: str, commands: tuple[Command, ...], resources: Resources) -> JobSpec:
    """A job with one task for each of its elements."""
    return JobSpec(name=name, commands=commands, nodes=1, tasks_per_node=1, resources=resources)


def _conversion_jobs(run_arguments: Command, profile: ClusterProfile, missing_shards: Sequence[int]) -> list[JobSpec]:
    """One job for the whole conversion, or an array of the missing shards and a merge."""
    convert, shards = ("-m", "bbu.convert", *run_arguments), profile.convert_tasks
    if shards == 1:
        return [_single_task_job("convert", (convert,), profile.convert)]
    array = tuple((*convert, "--shard", f"{index}/{shards}") for index in missing_shards)
    merge = _single_task_job("merge", ((*convert, "--merge", str(shards)),), profile.convert)
    return [_single_task_job("convert", array, profile.convert), merge] if array else [merge]


def _training_job(request: Request, profile: ClusterProfile, config: DirectConfig) -> JobSpec:
    """One task per GPU; one per node where there is no GPU. Of a sweep, one element for each point."""
    resources = _with_gpus(profile.train, request.gpus_per_node)
    requests = point_requests(request, config) if request.points else [request]
    return JobSpec(
        name="train",
        commands=tuple(("-m", "bbu.train", *each.run_arguments) for each in requests),
        nodes=request.nodes,
        tasks_per_node=resources.tasks_per_node,
        resources=resources,
    )


def _with_gpus(resources: Resources, gpus: int | None) -> Resources:
    """The same resources with another number of GPUs per node; None leaves them as they are."""
    if gpus is None:
        return resources
    if gpus:
        return dataclasses.replace(resources, gpus_per_node=gpus)
    memory = None if "per gpu" in (resources.memory or "") else resources.memory
    return dataclasses.replace(resources, gpus_per_node=0, gpu_type=None, memory=memory)


def _eval_job(request: Request, profile: ClusterProfile, config: DirectConfig) -> JobSpec:
    """Score the unscored checkpoints, on one GPU if there is one. Of a sweep, one element for each run.

    The job starts however the training ended: every saved checkpoint can be scored. (Slurm 24.11 also gives the
    state PREEMPTED to a job that was preempted in PreemptMode=CANCEL, ran again after a requeue and succeeded.)
    """
    score = ("-m", "bbu.eval")
    if request.points:
        commands = tuple((*score, "--pending", str(run.root)) for run in point_run_folders(request, config))
    elif request.runs:
        # without a --config, each checkpoint is scored with the config that is saved in it
        config_arguments = ("--config", request.config) if request.config else ()
        commands = ((*score, *config_arguments, *request.settings, "--pending", *request.runs),)
    else:
        commands = ((*score, *request.run_arguments, "--pending", str(config_run_folder(config).root)),)
    gpus = profile.eval.gpus_per_node if request.gpus_per_node is None else request.gpus_per_node
    job = _single_task_job("eval", commands, _with_gpus(profile.eval, min(1, gpus)))
    return dataclasses.replace(job, after_any=request.job in ("train", "pipeline"))


def _comparison_job(request: Request, profile: ClusterProfile, config: DirectConfig) -> JobSpec:
    """Write the table of a sweep when all its runs have ended."""
    runs = [str(run.root) for run in point_run_folders(request, config)]
    command = ("-m", "bbu.status", *runs, "--compare", "--out", str(comparison_folder(config) / _TABLE))
    return dataclasses.replace(_single_task_job("compare", (command,), profile.convert), after_any=True)


def _demo_commands(config: DirectConfig) -> tuple[Command, ...]:
    """The commands that make the synthetic rooms and the tiny model where the config expects them, if missing."""
    model, rooms = config.model.model_path, config.data.vendor_dir
    seed = str(config.training.seed)
    commands = {
        rooms: ("-m", "bbu.demo", "--out", rooms),
        model: ("-m", "bbu.models.tiny", "--out", model, "--seed", seed),
    }
    return tuple(command for folder, command in commands.items() if not Path(folder).exists())
