"""`python -m bbu.eval --checkpoint DIR` or `--pending RUN`: score checkpoints on the validation photos.

Safe to call at any time and by several workers at once: what is scored is not scored again, and what an
interrupted worker has predicted is kept.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import Any

from bbu.config.arguments import add_checkpoint_argument, add_config_arguments, add_prediction_arguments
from bbu.config.domains import keys_used_for
from bbu.config.flat import DirectConfig
from bbu.config.label_files import load_label_scheme
from bbu.config.read import load_config
from bbu.errors import PREEMPTED_EXIT_CODE, STOP_SIGNALS, CheckpointError, DataError, run_entry
from bbu.evaluation.job import Evaluation, run_evaluation
from bbu.evaluation.pending import METRICS, open_ledger, result_folder, sources_of
from bbu.evaluation.predictions import Prediction
from bbu.evaluation.report import scalars, table
from bbu.jobs.task import state_max_requeues
from bbu.logs import set_up_logging
from bbu.run import provenance
from bbu.run.checkpoints import MANIFEST, verify, verify_sizes
from bbu.run.folder import CHECKPOINT_NAME, RUN_CONFIG, RunFolder
from bbu.run.ledger import evaluation_key
from bbu.schema import View, read_records


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="python -m bbu.eval", description=__doc__)
    what = described.add_mutually_exclusive_group(required=True)
    add_checkpoint_argument(what)
    what.add_argument(
        "--pending", type=Path, nargs="+", metavar="RUN", help="every checkpoint of run folders without a score"
    )
    add_prediction_arguments(described, source=None, source_text="each, where the checkpoint has a head")
    text = "score under this run config (the one that the checkpoint was trained with)"
    add_config_arguments(described, required=False, description=text)
    return described


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    catch_stops()
    try:
        return score_all(arguments)
    except Stopped as stop:
        print(f"stopped by {stop}: what is predicted is kept, the same command goes on", file=sys.stderr)
        return PREEMPTED_EXIT_CODE


class Stopped(BaseException):
    """USR1, USR2 or TERM came: the job is about to end. Not an Exception, so that nothing on the way keeps it."""


def catch_stops() -> None:
    """Let a stop signal end the work as an exception does: claims are given back."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    for number in STOP_SIGNALS:
        signal.signal(number, stop)


def score_all(arguments: argparse.Namespace) -> int:
    """Score what is asked for; with --pending a checkpoint that cannot be read does not keep the others waiting."""
    if arguments.checkpoint:
        score(arguments.checkpoint.absolute(), arguments)
        return 0
    codes = [score_pending(run.absolute(), arguments) for run in arguments.pending]
    return next(filter(None, codes), 0)


def score_pending(run: Path, arguments: argparse.Namespace) -> int:
    """Score what a run folder has unscored; the exit code of the last thing that could not be read, or 0."""
    code = 0
    try:
        folders = published(run)
    except CheckpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for folder in folders:
        try:
            score(folder, arguments)
        except CheckpointError as error:
            if folder.is_dir():  # else it was rotated away meanwhile
                print(f"error: {error}", file=sys.stderr)
                code = error.exit_code
    return code


def published(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first. Raises CheckpointError for a folder that is none."""
    folder = RunFolder(run)
    if folder.jobs.is_file() and not folder.config.is_file():
        print(f"{run}: not begun yet, nothing to score")
        return []
    if not folder.config.is_file():
        raise CheckpointError(f"{run}: not a run folder (no config.yaml); name an output-{{run_name}} folder")
    if not folder.steps():
        print(f"{run}: no checkpoint yet, nothing to score")
    return [folder.checkpoint(step) for step in folder.steps()]


def load(folder: Path, arguments: argparse.Namespace) -> DirectConfig:
    """The config asked for, or the one the checkpoint was trained with."""
    name = arguments.config or str(folder / RUN_CONFIG)
    config = load_config(name, overrides=arguments.overrides, use_new=arguments.use_new_config)
    state_max_requeues(config.infrastructure.max_requeues)
    return config


def score(folder: Path, arguments: argparse.Namespace) -> None:
    """Score one checkpoint in each way that is asked for, and print the reports."""
    if not CHECKPOINT_NAME.fullmatch(folder.name):
        raise CheckpointError(f"{folder}: not a checkpoint-{{step}} folder of a run")
    verify_sizes(folder)
    config = load(folder, arguments)
    set_up_logging(config.infrastructure.log_level, config.infrastructure.log_verbose)
    photos = Photos(folder, config, arguments.teachers)
    for source in (arguments.source,) if arguments.source else sources_of(folder):
        score_source(photos, source, brief=arguments.checkpoint is None)


def score_source(photos: Photos, source: str, brief: bool) -> None:
    """Score one way of asking, unless another worker is at it, and print the report; a known one in a line if brief."""
    config, run = photos.config, RunFolder(photos.folder.parent)
    infra = config.infrastructure
    work = plan(run, photos, source)
    fresh = not (work.folder / METRICS).exists()
    owner = {**provenance.job_facts(os.environ), "pid": os.getpid()}
    ledger = open_ledger(run, infra.eval_claim_timeout_s)
    result = run_evaluation(work, ledger, owner, config.training, partial(photos.predictions, source=source))
    if result is None:
        print(f"{photos.folder.name}: another worker is scoring its {source}")
        return
    if brief and not fresh:
        print(f"{photos.folder.name}: {source} is scored already, {work.folder / METRICS}")
        return
    if fresh and infra.tensorboard:
        write_scalars(run, source, result)
    print(f"\n{photos.folder.name} on {config.data.val_file}, {source}\n\n{table(result)}\n")
    print(f"{work.folder / METRICS}\nrun folder: {run.root}")


def plan(run: RunFolder, photos: Photos, source: str) -> Evaluation:
    """What there is to score, under a key that names everything the result depends on."""
    config = photos.config
    truth = Path(config.data.data_root) / config.data.val_file
    limit = config.data.max_eval_examples
    views = [record.student for record in read_records(truth)]
    facts = {
        "checkpoint_manifest_sha256": provenance.file_hash(photos.folder / MANIFEST),
        "dataset_sha256": provenance.file_hash(truth),
        "code_sha256": provenance.code_hash(),
        "image_sha256": provenance.image_digest(os.environ),
        "config": {key: getattr(config, key) for key in keys_used_for("score")},
        "source": source,
        "teachers": photos.teachers,
        "teachers_sha256": photos.teachers_hash(),
    }
    key = evaluation_key(
        manifest_sha=facts["checkpoint_manifest_sha256"],
        eval_config=facts["config"] | {name: facts[name] for name in ("source", "teachers", "teachers_sha256")},
        dataset_hash=facts["dataset_sha256"],
        code=f"{facts['code_sha256']} {facts['image_sha256']}",
    )
    folder = result_folder(run, photos.manifest_step, source, key)
    return Evaluation(
        key=key,
        step=photos.manifest_step,
        folder=folder,
        views=views[:limit] if limit >= 0 else views,
        facts=facts,
        scheme=load_label_scheme(config.data),
        least=least_score(config, source),
    )


def least_score(config: DirectConfig, source: str) -> float:
    """The head's threshold for the head; an answer has no part that it did not mean."""
    return config.detection.detection_score_threshold if source == "head" else 0.0


class Photos:
    """One checkpoint looking at photos; the model is loaded when the first of them is to be predicted."""

    def __init__(self, folder: Path, config: DirectConfig, teachers: int) -> None:
        self.folder, self.config, self.teachers = folder, config, teachers
        self.manifest_step = int(folder.name.rpartition("-")[2])
        self._root = Path(config.data.data_root)
        self._found: dict[tuple[str, str], Any] = {}

    def predictions(self, views: Sequence[View], source: str) -> Iterator[list[Prediction]]:
        """Batch by batch; a photo that cannot be read is a failed prediction, not the end."""
        size = self.config.model.generation_batch_size
        for start in range(0, len(views), size):
            yield self._batch(views[start : start + size], source)

    def teachers_hash(self) -> str | None:
        """SHA-256 of the pool of worked examples, None where none are shown."""
        return provenance.file_hash(self._root / self.config.data.teacher_file) if self.teachers else None

    @cached_property
    def _predictor(self) -> Any:
        from bbu.inference.predictor import Predictor, best_device

        verify(self.folder)  # every byte, but only where something is to be predicted
        config = self.config
        return Predictor(
            self.folder,
            config.model,
            config.data,
            config.detection,
            device=best_device(),
            bf16=config.training.bf16,
            num_teachers=self.teachers,
        )

    def _batch(self, views: Sequence[View], source: str) -> list[Prediction]:
        """Failed ones first. What was found for one source is kept for `both`."""
        from bbu.data.images import load_image

        images, failed = {}, []
        for name in (view.images[0] for view in views):
            try:
                images[name] = load_image(self._root / name, name)
            except DataError as error:
                failed.append(Prediction(name, (), status="failed", rejected={str(error): 1}))
        return failed + [prediction_of(name, one) for name, one in self._find(images, source).items()]

    def _find(self, images: Mapping[str, Any], source: str) -> dict[str, Any]:
        """What is found in each photo, by name."""
        if source == "both":
            from bbu.inference.predictor import merge_detections

            answers, heads = self._find(images, "answer"), self._find(images, "head")
            least = self.config.detection.detection_score_threshold
            return {name: merge_detections(answers[name], heads[name].scoring_at_least(least)) for name in images}
        rest = [name for name in images if (source, name) not in self._found]
        # The head's uncertain finds as well: average precision needs them, the headline leaves them out.
        found = self._predictor.predict([images[name] for name in rest], source=source, min_score=0.0) if rest else []
        self._found |= {(source, name): one for name, one in zip(rest, found, strict=True)}
        return {name: self._found[source, name] for name in images}


def prediction_of(image: str, found: Any) -> Prediction:
    """What inference found, as the predictions file keeps it."""
    return Prediction(
        image=image,
        objects=found.objects,
        scores=found.scores,
        status=found.status,
        score_source=found.score_source,
        width=found.size[0],
        height=found.size[1],
        rejected=found.rejected,
    )


def write_scalars(run: RunFolder, source: str, result: Mapping[str, Any]) -> None:
    """The headline into TensorBoard, at the checkpoint's step, beside the training curves."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.tensorboard / "eval" / source)) as writer:
        for name, value in scalars(result).items():
            writer.add_scalar(name, value, result["step"])


if __name__ == "__main__":
    run_entry(main)
