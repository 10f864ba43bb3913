"""`python -m bbu.train --config NAME`: train a run, or resume it, on as many ranks as the environment names.

Exit codes: 0 done; 75 stopped by USR1, USR2, TERM or Ctrl-C with the state saved, the same command resumes; 130 left at
once by a second Ctrl-C; others: an error, reported in one line.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence

import yaml

from bbu.config.arguments import add_config_arguments, add_log_arguments, config_from_arguments
from bbu.config.flat import DirectConfig
from bbu.config.paths import missing_paths
from bbu.data.records import check_records
from bbu.errors import exit_without_teardown, run_entry
from bbu.jobs.task import state_max_requeues
from bbu.logs import print_notice, rank_of, set_up_logging
from bbu.run.folder import RunFolder
from bbu.training.memory import preview_memory

logger = logging.getLogger("bbu.train")
_SHAPE_CHECKED = ("bbu.models.detection_head", "bbu.models.caption_decoder", "bbu.models.denoising", "bbu.losses")
"""Modules whose annotations state the shapes of tensors; shape_checks compares the tensors with them."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bbu.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    add_log_arguments(parser)
    parser.add_argument(
        "--validate-only",
        action="store_true",
        help="check the config, its records, what is missing here, and its memory",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    config = config_from_arguments(arguments, os.environ)
    if arguments.print_config:
        values = config.as_sections() if arguments.use_new_config else config.as_flat()
        print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
        return 0
    if arguments.validate_only:
        print(f"{config.source}: valid, {len(config.as_flat())} keys")
        for line in missing_paths(config):  # no errors: the run may be meant for another machine
            print_notice("bbu.train", f"not on this machine ({os.uname().nodename}, in {os.getcwd()}): {line}")
        check_records(config.data, validates=config.training.eval_strategy != "no")
        _print_memory(config)
        return 0
    return _train(config)


def _print_memory(config: DirectConfig) -> None:
    """Print the memory of each card: for the ranks that the environment names, else for one and for eight."""
    ranks = [int(os.environ["WORLD_SIZE"])] if os.environ.get("WORLD_SIZE", "").isdigit() else [1, 8]
    if table := preview_memory(config, ranks):
        print(table)
    else:
        print_notice("bbu.train", f"no memory is estimated: there is no config.json in {config.model.model_path}")


def _train(config: DirectConfig) -> int:
    """Train the run on this rank and return the exit code."""
    # Handlers first: a stop signal may come during the heavy imports.
    from bbu.training.preemption import install_stop_handlers, leave_on_second_interrupt

    stop = install_stop_handlers()
    leave_on_second_interrupt(rank_of(os.environ) == 0)
    infra = config.infrastructure
    state_max_requeues(infra.max_requeues)
    run = RunFolder.of(infra.output_root, infra.run_name)
    set_up_logging(infra.log_level, infra.log_verbose, rank_of(os.environ), run.logs)

    if infra.shape_checks:
        _check_shapes()
    from bbu.training.coordinator import TrainingCoordinator

    code = TrainingCoordinator(config, stop, os.environ).run()
    logger.info("run folder: %s", run.root)
    return code


def _check_shapes() -> None:
    """Check the tensors that cross module boundaries against their annotations, in modules imported from now on.

    Without this call the annotations are never evaluated and cost nothing.
    """
    from jaxtyping import install_import_hook

    install_import_hook(list(_SHAPE_CHECKED), "beartype.beartype")


if __name__ == "__main__":
    run_entry(main, exit_without_teardown)
