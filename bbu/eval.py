"""`python -m bbu.eval --checkpoint DIR` or `--pending RUN`: score checkpoints on the validation photos.

Safe to call at any time and by several workers at once: what is scored is not scored again, and what an
interrupted worker has predicted is kept.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bbu import provenance
from bbu.config.flat import DirectConfig
from bbu.config.load import load_config
from bbu.errors import CheckpointError, DataError, run_entry
from bbu.evaluation.job import Evaluation, run_evaluation
from bbu.evaluation.ledger import evaluation_key
from bbu.evaluation.pending import METRICS, open_ledger, result_folder
from bbu.evaluation.predictions import Prediction
from bbu.evaluation.report import scalars, table
from bbu.logs import set_up_logging
from bbu.rundir import CHECKPOINT_NAME, RUN_CONFIG, RunFolder
from bbu.schema import View, read_records
from bbu.training.checkpointing import MANIFEST, verify

DECISIVE = (
    "attn_implementation", "vision_attn_implementation", "torch_dtype", "generation_max_new_tokens",
    "generation_repetition_penalty", "eval_iou_threshold", "eval_bootstrap_samples", "eval_bootstrap_confidence",
    "min_pixels", "max_pixels", "language", "eval_prompt", "max_eval_examples",
)  # fmt: skip
"""The config keys that a score depends on; they are part of its key."""


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="python -m bbu.eval", description=__doc__)
    what = described.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint-{step} folder of a run")
    what.add_argument("--pending", type=Path, metavar="RUN", help="every checkpoint of a run folder without a score")
    add = described.add_argument
    add("--config", metavar="NAME", help="score under this run config (the one the checkpoint was trained with)")
    add("--use-new-config", action="store_true", help="that config is in five sections")
    add("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a config key")
    return described


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    folders = [arguments.checkpoint] if arguments.checkpoint else published(arguments.pending)
    for folder in folders:
        score(folder, arguments)
    return 0


def published(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first. Raises CheckpointError for a folder that is none."""
    folder = RunFolder(run)
    if not folder.config.is_file():
        raise CheckpointError(f"{run}: not a run folder (no config.yaml); name an output-{{run_name}} folder")
    if not folder.steps():
        print(f"{run}: no checkpoint yet, nothing to score")
    return [folder.checkpoint(step) for step in folder.steps()]


def load(folder: Path, arguments: argparse.Namespace) -> DirectConfig:
    """The config asked for, or the one the checkpoint was trained with."""
    name = arguments.config or str(folder / RUN_CONFIG)
    return load_config(name, overrides=arguments.overrides, use_new=arguments.use_new_config)


def score(folder: Path, arguments: argparse.Namespace) -> None:
    """Score one checkpoint and print the report, unless another worker is at it."""
    folder = folder.absolute()
    if not CHECKPOINT_NAME.fullmatch(folder.name):
        raise CheckpointError(f"{folder}: not a checkpoint-{{step}} folder of a run")
    manifest = verify(folder)
    config = load(folder, arguments)
    infra, run = config.infrastructure, RunFolder(folder.parent)
    set_up_logging(infra.log_level, infra.log_verbose)
    ledger = open_ledger(run, infra.eval_claim_timeout_s)
    work = plan(run, folder, manifest.step, config)
    fresh = not (work.folder / METRICS).exists()
    owner = {**provenance.job_facts(os.environ), "pid": os.getpid()}
    result = run_evaluation(work, ledger, owner, config.training, lambda views: predictions(folder, config, views))
    if result is None:
        print(f"{folder.name}: another worker is scoring it")
        return
    if fresh and infra.tensorboard:
        write_scalars(run, result)
    print(f"\n{folder.name} on {config.data.val_file}\n\n{table(result)}\n")
    print(f"{work.folder / METRICS}\nrun folder: {run.root}")


def plan(run: RunFolder, folder: Path, step: int, config: DirectConfig) -> Evaluation:
    """What there is to score, under a key that names everything the result depends on."""
    truth = Path(config.data.data_root) / config.data.val_file
    limit = config.data.max_eval_examples
    views = [record.student for record in read_records(truth)]
    facts = {
        "checkpoint_manifest_sha256": provenance.file_hash(folder / MANIFEST),
        "dataset_sha256": provenance.file_hash(truth),
        "code_sha256": provenance.code_hash(),
        "image_sha256": provenance.image_digest(os.environ),
        "config": {key: getattr(config, key) for key in DECISIVE},
    }
    key = evaluation_key(
        manifest_sha=facts["checkpoint_manifest_sha256"],
        eval_config=facts["config"],
        dataset_hash=facts["dataset_sha256"],
        code=f"{facts['code_sha256']} {facts['image_sha256']}",
    )
    return Evaluation(key, step, result_folder(run, step, key), views[:limit] if limit >= 0 else views, facts)


def predictions(folder: Path, config: DirectConfig, views: Sequence[View]) -> Iterator[list[Prediction]]:
    """Greedy answers batch by batch; a photo that cannot be read is a failed prediction, not the end."""
    from bbu.inference.predictor import AnswerPredictor, best_device

    predictor = AnswerPredictor(folder, config.model, config.data, best_device())
    size = config.model.generation_batch_size
    for start in range(0, len(views), size):
        yield predict_batch(predictor, Path(config.data.data_root), views[start : start + size])


def predict_batch(predictor: Any, root: Path, views: Sequence[View]) -> list[Prediction]:
    from bbu.data.images import load_image

    readable, images, failed = [], [], []
    for view in views:
        try:
            images.append(load_image(root / view.images[0], view.images[0]))
            readable.append(view)
        except DataError as error:
            failed.append(Prediction(view.images[0], (), status="failed", rejected={str(error): 1}))
    answers = predictor.predict(images) if images else []
    return failed + [
        Prediction(
            image=view.images[0],
            objects=answer.objects,
            status=answer.status,
            width=image.width,
            height=image.height,
            rejected=answer.rejected,
        )
        for view, image, answer in zip(readable, images, answers, strict=True)
    ]


def write_scalars(run: RunFolder, result: Mapping[str, Any]) -> None:
    """The headline into TensorBoard, at the checkpoint's step, beside the training curves."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.tensorboard / "eval")) as writer:
        for name, value in scalars(result).items():
            writer.add_scalar(name, value, result["step"])


if __name__ == "__main__":
    run_entry(main)
