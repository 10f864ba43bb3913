"""`python -m bbu.train --config NAME`: train a run, or go on with it; as many ranks as the environment names.

Exit codes: 0 done; 75 stopped by USR1, USR2 or TERM with the state saved, the same command goes on; others: an
error, told in one line.
"""

from __future__ import annotations

import argparse
import logging
import os

import yaml

from bbu.config.arguments import add_config_arguments, config_from_arguments
from bbu.config.flat import DirectConfig
from bbu.errors import leave_at_once, run_entry
from bbu.jobs.task import state_max_requeues
from bbu.logs import rank_of, set_up_logging
from bbu.run.folder import RunFolder

logger = logging.getLogger("bbu.train")
CHECKED = ("bbu.models.detection_head", "bbu.models.caption_decoder", "bbu.models.denoising", "bbu.losses")
"""Modules whose annotations tell the shapes of tensors, and which shape_checks holds to them."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bbu.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    parser.add_argument("--validate-only", action="store_true", help="check the config and stop")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    config = config_from_arguments(args, os.environ)
    if args.print_config:
        values = config.as_sections() if args.use_new_config else config.as_flat()
        print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
        return 0
    if args.validate_only:
        print(f"{config.source}: valid, {len(config.as_flat())} keys")
        return 0
    return train(config)


def train(config: DirectConfig) -> int:
    """Signal handlers first: a stop may come while the heavy imports are still going on."""
    from bbu.training import preemption

    stop = preemption.install_stop_handlers()
    infra = config.infrastructure
    state_max_requeues(infra.max_requeues)
    run = RunFolder.of(infra.output_root, infra.run_name)
    set_up_logging(infra.log_level, infra.log_verbose, rank_of(os.environ), run.logs)

    if infra.shape_checks:
        check_shapes()
    from bbu.training.coordinator import TrainingCoordinator

    code = TrainingCoordinator(config, stop, os.environ).run()
    logger.info("run folder: %s", run.root)
    return code


def check_shapes() -> None:
    """Check the tensors that cross module boundaries against their annotations, in modules imported from now on.

    Without it the annotations are never looked at, and cost nothing.
    """
    from jaxtyping import install_import_hook

    install_import_hook(list(CHECKED), "beartype.beartype")


if __name__ == "__main__":
    run_entry(main, leave_at_once)
