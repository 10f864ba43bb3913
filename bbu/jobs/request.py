"""The command line of `python -m bbu.submit` as data: its arguments, the request that they make, and the way back."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bbu.config.arguments import DEFAULT_CLUSTER, add_cluster_argument, add_config_arguments
from bbu.config.flat import DirectConfig
from bbu.config.read import load_config
from bbu.errors import JobError, nearest_valid
from bbu.jobs.schedule import interval_minutes
from bbu.jobs.sweep import point_name, sweep_points
from bbu.run.folder import RunFolder

Command = tuple[str, ...]
"""The words of a command line."""
_DEFAULT_CONFIG = "base_flat"
JOBS = {
    "train": "Train a run on Slurm or on this machine, or resume it.",
    "convert": "Convert the vendor's photos, as an array and a merge where the profile says so.",
    "eval": "Score the checkpoints of runs that have no score yet.",
    "pipeline": "Convert, train and score, each when the one before is done.",
}
"""Job → what it does."""
TOOLS = ("logs", "cancel", "resume")
"""What `python -m bbu.submit` does with submitted runs."""
_OPTIONS = {
    "runs": ("eval",),
    "nodes": ("train", "pipeline"),
    "gpus_per_node": ("train", "eval", "pipeline"),
    "sweep": ("train", "pipeline"),
    "every": ("eval",),
    "demo": ("train", "convert", "pipeline"),
}
"""Argument → the jobs that it is for; those that are not named are for all."""
_WITH_VALUE = ("--nodes", "--gpus-per-node", "--cluster", "--config", "--set", "--sweep", "--every")
"""Options that the next word belongs to."""


@dataclass(frozen=True)
class Request:
    """One command line of `python -m bbu.submit`, as data."""

    job: str
    """`train`, `convert`, `eval`, or `pipeline`: all three in this order."""
    nodes: int
    """Nodes of the training job."""
    gpus_per_node: int | None
    """GPUs, and so tasks, per node; None: as the cluster profile says."""
    cluster: str
    """Name or path of the cluster profile."""
    config: str | None
    """Name or path of the run config; None: the command line names none."""
    use_new_config: bool
    """Whether the run config is in five sections."""
    overrides: tuple[str, ...]
    """Config keys set on the command line, each `key=value`."""
    demo: bool = False
    """Whether to make synthetic photos and the tiny model first, where they are missing."""
    points: tuple[tuple[str, ...], ...] = ()
    """Overrides of each point of a sweep; empty without a sweep."""
    runs: tuple[str, ...] = ()
    """Run folders that an eval is for; empty: the config's own run."""
    every_minutes: int | None = None
    """Minutes between scheduled evals; None: submit once."""

    @property
    def config_name(self) -> str:
        return self.config or _DEFAULT_CONFIG

    @property
    def settings(self) -> Command:
        """The words that follow the name of the config."""
        form = ("--use-new-config",) if self.use_new_config else ()
        return (*form, *(word for override in self.overrides for word in ("--set", override)))

    @property
    def run_arguments(self) -> Command:
        """The arguments that train, convert and eval share."""
        return ("--config", self.config_name, *self.settings)

    def load_config(self) -> DirectConfig:
        """Read the run config with its overrides. Raises ConfigError with every finding."""
        return load_config(self.config_name, overrides=self.overrides, use_new=self.use_new_config)

    def at_point(self, point: Sequence[str], base: str) -> Request:
        """The same request for one point of a sweep, as a run with a name of its own that begins with `base`."""
        overrides = (*self.overrides, *point, f"run_name={point_name(base, point)}")
        return dataclasses.replace(self, overrides=overrides, points=())

    def training_alone(self) -> Request:
        """The request that trains the same run and does nothing else."""
        return dataclasses.replace(self, job="train", demo=False, points=(), runs=(), every_minutes=None)

    def resume_command(self) -> Command:
        """The arguments of `python -m bbu.submit` that train the same run."""
        gpus = () if self.gpus_per_node is None else ("--gpus-per-node", str(self.gpus_per_node))
        return ("train", "--nodes", str(self.nodes), *gpus, "--cluster", self.cluster, *self.run_arguments)


def add_request_arguments(parser: argparse.ArgumentParser, job: str = "train") -> None:
    """Add the arguments that make a Request; `parse_intermixed_args` reads them.

    Args:
        parser: the parser.
        job: the job whose options the help shows. The others are read too, so that `check_options` can refuse them
            by name.
    """

    def add(flag: str, text: str, **details: Any) -> None:
        applies = job in _OPTIONS[flag.lstrip("-").replace("-", "_")]
        parser.add_argument(flag, help=text if applies else argparse.SUPPRESS, **details)

    parser.set_defaults(job=job)
    add("runs", "run folders to score, or names of runs (the config's own)", nargs="*", metavar="RUN")
    add("--nodes", "nodes of the training job (1)", type=int, metavar="N")
    add("--gpus-per-node", "GPUs, and so tasks, per node (the profile's)", type=int, metavar="N")
    add_cluster_argument(parser)
    recorded = "; of a RUN: each checkpoint's own" if job == "eval" else ""
    text = f"a run config under configs, or a path ({_DEFAULT_CONFIG}{recorded})"
    add_config_arguments(parser, required=False, description=text)
    text = "train a run for each value, and compare them"
    add("--sweep", text, action="append", default=[], metavar="KEY=A,B")
    add("--every", "repeat the eval every 30m, 2h, 1d", metavar="TIME")
    text = "first make synthetic rooms and the tiny model, where they are missing"
    add("--demo", text, action="store_true")


def split_job(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Take the job out of the arguments of `python -m bbu.submit`.

    Returns:
        The job, `train` where none is named, and the other arguments.

    Raises:
        JobError: the first word is no job.
    """
    for place, word in enumerate(argv):
        if word in JOBS and (place == 0 or argv[place - 1] not in _WITH_VALUE):
            return word, [*argv[:place], *argv[place + 1 :]]
    if argv and not argv[0].startswith("-"):
        near = nearest_valid(argv[0], [*JOBS, *TOOLS])
        raise JobError(f"no job {argv[0]!r}: write one of {', '.join([*JOBS, *TOOLS])} first{near}")
    return "train", list(argv)


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that the job would ignore. Raises JobError."""
    for name, jobs in _OPTIONS.items():
        if getattr(arguments, name) in (None, [], False) or arguments.job in jobs:
            continue
        if name == "runs":
            raise JobError(f"{arguments.runs[0]}: run folders are for eval; to {arguments.job}, name a --config")
        raise JobError(f"--{name.replace('_', '-')} is for {', '.join(jobs)}; leave it out for {arguments.job}")
    if arguments.use_new_config and arguments.runs and not arguments.config:
        raise JobError("--use-new-config says how a --config is written; name one, or leave it out")


def request_from_arguments(arguments: argparse.Namespace) -> Request:
    """Check the command line as far as that is possible without its config.

    Raises:
        JobError: arguments that do not go together.
        ConfigError: an axis of a sweep that cannot be read.
        CheckpointError: a RUN that is no run folder.
    """
    if arguments.every and arguments.runs and (arguments.config or arguments.overrides):
        raise JobError("scheduled evals of a RUN use the config of each checkpoint; leave out --config and --set")
    return Request(
        job=arguments.job,
        nodes=1 if arguments.nodes is None else arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        cluster=arguments.cluster or DEFAULT_CLUSTER,
        config=arguments.config,
        use_new_config=arguments.use_new_config,
        overrides=tuple(arguments.overrides),
        demo=arguments.demo,
        points=tuple(sweep_points(arguments.sweep)) if arguments.sweep else (),
        runs=tuple(str(RunFolder.existing(run).root) for run in arguments.runs),
        every_minutes=interval_minutes(arguments.every) if arguments.every else None,
    )


def parse_request(argv: Sequence[str]) -> Request:
    """The request of the arguments of `python -m bbu.submit`. Raises ValueError where they are none."""
    try:
        job, words = split_job(argv)
        parser = argparse.ArgumentParser(prog="python -m bbu.submit")
        add_request_arguments(parser, job)
        return request_from_arguments(parser.parse_intermixed_args(words))
    except SystemExit as error:  # argparse's way to refuse a command line
        raise ValueError(f"{' '.join(argv)!r} is no command line of bbu.submit") from error
