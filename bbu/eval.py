"""`python -m bbu.eval --checkpoint DIR` or `--pending RUN`: score checkpoints on the validation photos.

Safe to call at any time and by several workers at once: what is scored is not scored again, and what an
interrupted worker has predicted is used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bbu.config.arguments import add_checkpoint_argument, add_config_arguments, add_prediction_arguments
from bbu.config.flat import DirectConfig
from bbu.config.read import load_config, load_recorded_config
from bbu.errors import PREEMPTED_EXIT_CODE, CheckpointError, Stopped, raise_on_stop_signals, run_entry
from bbu.evaluation.pending import sources_of
from bbu.evaluation.report import metrics_table
from bbu.inference.scoring import CheckpointScorer, checkpoints_to_score
from bbu.jobs.task import state_max_requeues
from bbu.logs import print_notice, set_up_logging
from bbu.run.checkpoints import verify_sizes
from bbu.run.folder import RUN_CONFIG, RunFolder, checkpoint_step
from bbu.schema import Source


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bbu.eval", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    add_checkpoint_argument(what)
    what.add_argument(
        "--pending", type=Path, nargs="+", metavar="RUN", help="every checkpoint of run folders without a score"
    )
    add_prediction_arguments(parser, source=None, source_text="each, where the checkpoint has a head")
    text = "score under this run config (the one that the checkpoint was trained with)"
    add_config_arguments(parser, required=False, description=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    raise_on_stop_signals()
    try:
        if arguments.checkpoint:
            _score_checkpoint(arguments.checkpoint.absolute(), arguments)
            return 0
        codes = [_score_run(run, arguments) for run in arguments.pending]
        return next(filter(None, codes), 0)
    except Stopped as stop:
        print_notice("bbu.eval", f"stopped by {stop}; the predictions so far are saved, the same command resumes")
        return PREEMPTED_EXIT_CODE


def _score_run(run: Path, arguments: argparse.Namespace) -> int:
    """Score all checkpoints of a run; one that cannot be read does not keep the others waiting.

    Returns:
        The exit code of the last error, or 0.
    """
    code = 0
    try:
        folders = checkpoints_to_score(RunFolder.existing(run), print)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for folder in folders:
        try:
            _score_checkpoint(folder, arguments)
        except CheckpointError as error:
            if folder.is_dir():  # else it was rotated away meanwhile
                print(f"error: {error}", file=sys.stderr)
                code = error.exit_code
    return code


def _load_config(folder: Path, arguments: argparse.Namespace) -> DirectConfig:
    """Load the config of --config, or the one that the checkpoint was trained with."""
    if arguments.config:
        config = load_config(arguments.config, overrides=arguments.overrides, use_new=arguments.use_new_config)
    else:
        config = load_recorded_config(folder / RUN_CONFIG, arguments.overrides)
    state_max_requeues(config.infrastructure.max_requeues)
    set_up_logging(config.infrastructure.log_level, config.infrastructure.log_verbose)
    return config


def _score_checkpoint(folder: Path, arguments: argparse.Namespace) -> None:
    """Score a checkpoint from each source and print the reports; with --pending, an old score is one line."""
    if checkpoint_step(folder.name) is None:
        raise CheckpointError(f"{folder}: not a checkpoint-{{step}} folder of a run; --pending RUN scores all of a run")
    verify_sizes(folder)
    config = _load_config(folder, arguments)
    scorer = CheckpointScorer(folder, config, arguments.teachers)
    sources: Sequence[Source] = (arguments.source,) if arguments.source else sources_of(folder)
    for source in sources:
        score = scorer.score(source)
        if score is None:
            print(f"{folder.name}: another worker is scoring its {source}")
        elif arguments.pending and not score.is_new:
            print(f"{folder.name}: {source} is scored already, {score.metrics_file}")
        else:
            table = metrics_table(score.result.metrics)
            print(f"\n{folder.name} on {config.data.val_file}, {source}{score.mark}\n\n{table}\n")
            print(f"{score.metrics_file}\nrun folder: {folder.parent}")


if __name__ == "__main__":
    run_entry(main)
