"""Submit a job: `python -m bbu.submit [train|convert|eval|pipeline] --nodes 2 --cluster NAME --config NAME`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bbu.config.flat import DirectConfig
from bbu.config.load import load_config
from bbu.errors import JobError, run_entry
from bbu.jobs.clusters import ClusterProfile, load_profile
from bbu.jobs.executor import Submission, dry_run, submit
from bbu.jobs.spec import JobSpec
from bbu.rundir import RunFolder

HOME = Path(__file__).resolve().parents[1]
JOBS = ("train", "convert", "eval", "pipeline")


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="python -m bbu.submit", description=__doc__)
    add = described.add_argument
    add("job", nargs="?", choices=JOBS, default="train", help="what to run (train); pipeline: all, in order")
    add("--nodes", type=int, default=1, metavar="N", help="nodes of the training job (1)")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs, and so tasks, per node (the profile's)")
    add("--cluster", default=os.environ.get("BBU_CLUSTER", "local"), metavar="NAME",
        help="a profile under configs/clusters, or a path (BBU_CLUSTER, else local: this machine)")  # fmt: skip
    add("--config", default="base_flat", metavar="NAME", help="a run config under configs, or a path (base_flat)")
    add("--use-new-config", action="store_true", help="the run config is in five sections")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a config key")
    add(
        "--demo", action="store_true", help="first draw synthetic rooms and build the tiny model, unless they are there"
    )
    add("--dry-run", action="store_true", help="show what would be submitted, and submit nothing")
    return described


def run_config(arguments: argparse.Namespace) -> DirectConfig:
    """The run config of the command line, checked here rather than in the queue."""
    return load_config(arguments.config, overrides=arguments.overrides, use_new=arguments.use_new_config)


def run_arguments(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The part of the command line that every entry understands."""
    form = ("--use-new-config",) if arguments.use_new_config else ()
    overrides = (part for override in arguments.overrides for part in ("--set", override))
    return ("--config", arguments.config, *form, *overrides)


def plan(arguments: argparse.Namespace, profile: ClusterProfile, config: DirectConfig) -> tuple[JobSpec, ...]:
    """The jobs of one command line, in the order in which they must end."""
    run = run_arguments(arguments)
    jobs: list[JobSpec] = []
    if arguments.demo and (commands := demonstration(config)):
        jobs.append(host_job("demo", commands, profile))
    if arguments.job in ("convert", "pipeline"):
        jobs += conversion(run, profile)
    if arguments.job in ("train", "pipeline"):
        jobs.append(training(run, arguments, profile))
    if arguments.job in ("eval", "pipeline"):
        jobs.append(evaluation(run, arguments, profile, config))
    requeues = config.infrastructure.max_requeues
    return tuple(dataclasses.replace(job, max_requeues=requeues) for job in chain(jobs))


def demonstration(config: DirectConfig) -> tuple[tuple[str, ...], ...]:
    """What draws the rooms and what builds the tiny model, where the config points; not what is there already."""
    model, rooms = config.model.model_path, config.data.vendor_dir
    build = f"from bbu.models.tiny import build_tiny_model; build_tiny_model({model!r}, seed={config.training.seed})"
    wanted = {rooms: ("-m", "bbu.demo", "--out", rooms), model: ("-c", build)}
    return tuple(command for folder, command in wanted.items() if not Path(folder).exists())


def chain(jobs: Sequence[JobSpec]) -> list[JobSpec]:
    """Let every job wait for the one before it."""
    names = [job.name for job in jobs]
    return [dataclasses.replace(job, after=tuple(names[max(0, i - 1) : i])) for i, job in enumerate(jobs)]


def host_job(name: str, commands: tuple[tuple[str, ...], ...], profile: ClusterProfile, gpus: int = 0) -> JobSpec:
    """A job of one task per element."""
    return JobSpec(
        name=name,
        commands=commands,
        nodes=1,
        tasks_per_node=1,
        gpus_per_node=gpus,
        cpus_per_task=profile.cpus_per_task,
        memory_gb=profile.memory_gb,
        time_minutes=profile.time_minutes,
    )


def conversion(run: tuple[str, ...], profile: ClusterProfile) -> list[JobSpec]:
    """The conversion whole, or as an array and a merge."""
    convert, shards = ("-m", "bbu.convert", *run), profile.convert_tasks
    if shards == 1:
        return [host_job("convert", (convert,), profile)]
    array = tuple((*convert, "--shard", f"{index}/{shards}") for index in range(shards))
    return [
        host_job("convert", array, profile),
        host_job("merge", ((*convert, "--merge", str(shards)),), profile),
    ]


def training(run: tuple[str, ...], arguments: argparse.Namespace, profile: ClusterProfile) -> JobSpec:
    """One task per GPU; one per node where there is none."""
    gpus = gpus_of(arguments, profile)
    job = host_job("train", (("-m", "bbu.train", *run),), profile, gpus)
    return dataclasses.replace(job, nodes=arguments.nodes, tasks_per_node=max(1, gpus))


def evaluation(
    run: tuple[str, ...], arguments: argparse.Namespace, profile: ClusterProfile, config: DirectConfig
) -> JobSpec:
    """Score what the run has left unscored, on one GPU if there is one."""
    folder = RunFolder.of(config.infrastructure.output_root, config.infrastructure.run_name)
    command = ("-m", "bbu.eval", *run, "--pending", str(folder.root))
    return host_job("eval", (command,), profile, min(1, gpus_of(arguments, profile)))


def gpus_of(arguments: argparse.Namespace, profile: ClusterProfile) -> int:
    return profile.gpus_per_node if arguments.gpus_per_node is None else arguments.gpus_per_node


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    profile = load_profile(arguments.cluster)
    specs = plan(arguments, profile, run_config(arguments))
    if arguments.dry_run:
        print(dry_run(specs, profile, HOME))
        return 0
    try:
        return ending(submit(specs, profile, HOME, tell))
    except KeyboardInterrupt:
        tell("stopped; the same command goes on from what is saved")
        return 130


def tell(text: str) -> None:
    print(f"bbu.submit: {text}", file=sys.stderr, flush=True)


def ending(done: Sequence[Submission]) -> int:
    """The exit code of the last job that ran here; 0 for jobs in a queue."""
    if not done:
        raise JobError("nothing was submitted")
    return done[-1].exit_code or 0


if __name__ == "__main__":
    run_entry(main)
