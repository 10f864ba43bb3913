"""The command line of `python -m bbu.submit` as data: its arguments, the request that they make, and the way back."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from bbu.config.arguments import add_cluster_argument, add_config_arguments
from bbu.config.flat import DirectConfig
from bbu.config.read import load_config
from bbu.errors import JobError
from bbu.jobs.schedule import interval_minutes
from bbu.jobs.sweep import point_name, sweep_points
from bbu.run.folder import RunFolder

Command = tuple[str, ...]
"""The words of a command line."""
_DEFAULT_CONFIG = "base_flat"
_JOBS = ("train", "convert", "eval", "pipeline")


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


def add_request_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that make a Request; `parse_intermixed_args` reads them."""
    add = parser.add_argument
    add("job", nargs="?", choices=_JOBS, default="train", help="what to run (train)")
    add("runs", nargs="*", metavar="RUN", help="eval: run folders to score (the config's own)")
    add("--nodes", type=int, default=1, metavar="N", help="nodes of the training job (1)")
    add("--gpus-per-node", type=int, metavar="N", help="GPUs, and so tasks, per node (the profile's)")
    add_cluster_argument(parser)
    text = f"a run config under configs, or a path ({_DEFAULT_CONFIG}; eval RUN: each checkpoint's own)"
    add_config_arguments(parser, required=False, description=text)
    add("--sweep", action="append", default=[], metavar="KEY=A,B", help="train a run for each value, and compare them")
    add("--every", metavar="TIME", help="eval: repeat the eval every 30m, 2h, 1d")
    add("--demo", action="store_true",
        help="first make synthetic rooms and the tiny model, where they are missing")  # fmt: skip


def request_from_arguments(arguments: argparse.Namespace) -> Request:
    """Check the command line as far as that is possible without its config.

    Raises:
        JobError: arguments that do not go together.
        ConfigError: an axis of a sweep that cannot be read.
        CheckpointError: a RUN that is no run folder.
    """
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
        points=tuple(sweep_points(arguments.sweep)) if arguments.sweep else (),
        runs=tuple(str(RunFolder.existing(run).root) for run in arguments.runs),
        every_minutes=interval_minutes(arguments.every) if arguments.every else None,
    )


def parse_request(argv: Sequence[str]) -> Request:
    """The request of the arguments of `python -m bbu.submit`. Raises ValueError where they are none."""
    parser = argparse.ArgumentParser(prog="python -m bbu.submit")
    add_request_arguments(parser)
    try:
        return request_from_arguments(parser.parse_intermixed_args(argv))
    except SystemExit as error:  # argparse's way to refuse a command line
        raise ValueError(f"{' '.join(argv)!r} is no command line of bbu.submit") from error
