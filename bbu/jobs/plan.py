"""From what was asked for to the jobs that do it: which commands, in which order, on what."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bbu.config.flat import DirectConfig
from bbu.errors import ConfigError
from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.spec import JobSpec, Resources
from bbu.jobs.sweep import point_name
from bbu.run.folder import RunFolder

Command = tuple[str, ...]
TABLE, DEFAULT_CONFIG = "table.md", "base_flat"
PER_POINT = ("train", "eval")
"""Jobs of a sweep that have an element for each of its points; the others serve all."""


@dataclass(frozen=True)
class Request:
    """One command line of bbu.submit. config (None where none was named) and overrides go on to every entry; `points`
    of a sweep, empty without one; runs: folders that an eval was asked for, empty for the config's own.
    """

    job: str
    nodes: int
    gpus_per_node: int | None
    cluster: str
    config: str | None
    use_new_config: bool
    overrides: tuple[str, ...]
    demo: bool = False
    points: tuple[tuple[str, ...], ...] = ()
    runs: tuple[str, ...] = ()

    @property
    def run_arguments(self) -> Command:
        """The part of the command line that every entry understands."""
        return ("--config", self.config_name, *self.settings)

    @property
    def config_name(self) -> str:
        return self.config or DEFAULT_CONFIG

    @property
    def settings(self) -> Command:
        """What comes after the name of the config."""
        form = ("--use-new-config",) if self.use_new_config else ()
        return (*form, *(part for each in self.overrides for part in ("--set", each)))

    def again(self) -> Command:
        """The command line that trains the same run on."""
        gpus = () if self.gpus_per_node is None else ("--gpus-per-node", str(self.gpus_per_node))
        return ("train", "--nodes", str(self.nodes), *gpus, "--cluster", self.cluster, *self.run_arguments)

    def at(self, point: Sequence[str], base: str) -> Request:
        """The same for one point of a sweep, as a run of its own."""
        overrides = (*self.overrides, *point, f"run_name={point_name(base, point)}")
        return dataclasses.replace(self, overrides=overrides, points=())


@dataclass(frozen=True)
class Facts:
    """What planning needs to know of the disk: what the demo lacks, and the shards a conversion has to make."""

    demonstration: tuple[Command, ...]
    shards: tuple[int, ...]


def run_folder(config: DirectConfig) -> RunFolder:
    return RunFolder.of(config.infrastructure.output_root, config.infrastructure.run_name)


def plan(request: Request, profile: ClusterProfile, config: DirectConfig, facts: Facts) -> tuple[JobSpec, ...]:
    """The jobs of one command line, in the order in which they must end."""
    jobs: list[JobSpec] = []
    if facts.demonstration:
        jobs.append(host_job("demo", facts.demonstration, profile.convert))
    if request.job in ("convert", "pipeline"):
        jobs += conversion(request.run_arguments, profile, facts.shards)
    if request.job in ("train", "pipeline"):
        jobs.append(training(request, profile, config))
    if request.job in ("eval", "pipeline") or request.points:
        jobs.append(evaluation(request, profile, config))
    if request.points:
        jobs.append(comparison(request, profile, config))
    requeues = config.infrastructure.max_requeues
    return tuple(dataclasses.replace(job, max_requeues=requeues) for job in chain(jobs))


def chain(jobs: Sequence[JobSpec]) -> list[JobSpec]:
    """Let every job wait for the one before it."""
    names = [job.name for job in jobs]
    return [dataclasses.replace(job, after=tuple(names[max(0, i - 1) : i])) for i, job in enumerate(jobs)]


def host_job(name: str, commands: tuple[Command, ...], resources: Resources) -> JobSpec:
    """A job of one task per element."""
    return JobSpec(name=name, commands=commands, nodes=1, tasks_per_node=1, resources=resources)


def conversion(run: Command, profile: ClusterProfile, shards: Sequence[int]) -> list[JobSpec]:
    """The conversion whole, or as an array of the shards that are not there yet and a merge."""
    convert, all_shards = ("-m", "bbu.convert", *run), profile.convert_tasks
    if all_shards == 1:
        return [host_job("convert", (convert,), profile.convert)]
    array = tuple((*convert, "--shard", f"{index}/{all_shards}") for index in shards)
    merge = host_job("merge", ((*convert, "--merge", str(all_shards)),), profile.convert)
    return [host_job("convert", array, profile.convert), merge] if array else [merge]


def training(request: Request, profile: ClusterProfile, config: DirectConfig) -> JobSpec:
    """One task per GPU; one per node where there is none. An element for each point of a sweep."""
    resources = with_gpus(profile.train, request.gpus_per_node)
    each = sweep_requests(request, config) if request.points else [request]
    return JobSpec(
        name="train",
        commands=tuple(("-m", "bbu.train", *one.run_arguments) for one in each),
        nodes=request.nodes,
        tasks_per_node=resources.tasks_per_node,
        resources=resources,
    )


def with_gpus(resources: Resources, gpus: int | None) -> Resources:
    if gpus is None:
        return resources
    if gpus:
        return dataclasses.replace(resources, gpus_per_node=gpus)
    memory = None if "per gpu" in (resources.memory or "") else resources.memory
    return dataclasses.replace(resources, gpus_per_node=0, gpu_type=None, memory=memory)


def sweep_requests(request: Request, config: DirectConfig) -> list[Request]:
    """One for each point. Raises ConfigError where two points would share a run folder."""
    base = config.infrastructure.run_name
    names = Counter(point_name(base, point) for point in request.points)
    if twice := sorted(name for name, times in names.items() if times > 1):
        raise ConfigError(
            f"--sweep: two runs would be called {twice[0]}; choose values that differ in letters or digits"
        )
    return [request.at(point, base) for point in request.points]


def sweep_folders(request: Request, config: DirectConfig) -> list[RunFolder]:
    base, root = config.infrastructure.run_name, Path(config.infrastructure.output_root).resolve()
    return [RunFolder.of(root, point_name(base, point)) for point in request.points]


def evaluation(request: Request, profile: ClusterProfile, config: DirectConfig) -> JobSpec:
    """Score what runs have left unscored, on one GPU if there is one; an element for each run of a sweep.

    For runs that are named the config is the one of each checkpoint, unless one is named too. The job does not
    mind how the training ended: what was saved can be scored. (Slurm 24.11 also calls a job PREEMPTED that was
    preempted in PreemptMode=CANCEL, went on after a requeue and ended well.)
    """
    score = ("-m", "bbu.eval")
    if request.points:
        commands = tuple((*score, "--pending", str(run.root)) for run in sweep_folders(request, config))
    elif request.runs:
        named = ("--config", request.config) if request.config else ()
        commands = ((*score, *named, *request.settings, "--pending", *request.runs),)
    else:
        commands = ((*score, *request.run_arguments, "--pending", str(run_folder(config).root)),)
    gpus = profile.eval.gpus_per_node if request.gpus_per_node is None else request.gpus_per_node
    job = host_job("eval", commands, with_gpus(profile.eval, min(1, gpus)))
    return dataclasses.replace(job, after_any=request.job in ("train", "pipeline"))


def comparison(request: Request, profile: ClusterProfile, config: DirectConfig) -> JobSpec:
    """The table of a sweep, when all is done, into a folder of its own."""
    folder = sweep_folder(config)
    runs = [str(run.root) for run in sweep_folders(request, config)]
    command = ("-m", "bbu.status", *runs, "--compare", "--out", str(folder / TABLE))
    return dataclasses.replace(host_job("compare", (command,), profile.convert), after_any=True)


def sweep_folder(config: DirectConfig) -> Path:
    infra = config.infrastructure
    return Path(infra.output_root).resolve() / f"sweep-{infra.run_name}"
