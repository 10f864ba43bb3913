"""Scores a checkpoint on the validation photos: what its score depends on, its predictions, its metrics."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from bbu.config.domains import DetectionConfig, keys_used_for
from bbu.config.flat import DirectConfig
from bbu.config.label_files import load_label_scheme
from bbu.errors import CheckpointError, DataError, NonFiniteError
from bbu.evaluation.job import Evaluation, run_evaluation
from bbu.evaluation.metrics import EvaluationResult, ScoreFacts
from bbu.evaluation.pending import METRICS, open_ledger, result_folder
from bbu.evaluation.predictions import Prediction
from bbu.evaluation.report import flat_scalars
from bbu.evaluation.run_settings import RunSettings
from bbu.labels import LabelScheme
from bbu.resize import smart_resize
from bbu.run.checkpoints import MANIFEST, verify_model
from bbu.run.folder import RunFolder, checkpoint_step
from bbu.run.provenance import (
    code_hash,
    computing_code_hash,
    file_hash,
    image_digest,
    job_facts,
    package_versions,
)
from bbu.schema import Source, View, read_distinct_records, read_photos_hash, read_records

if TYPE_CHECKING:  # they need torch, which loads only where something is to be predicted
    from PIL import Image

    from bbu.inference.predictor import Detections, Predictor

_SCORE_CODE = ("boxes.py", "data", "evaluation", "inference", "labels.py", "models", "resize.py", "schema.py")
"""The code that a score depends on. Not `config`: each value that matters is in the key by itself. Not `run`, `errors`
and `logs`: they store and report, and compute nothing."""
_SCORE_PACKAGES = ("torch", "transformers", "tokenizers", "flash-attn", "pillow", "numpy")
"""The packages that a score depends on. Their versions stand for the container image, whose digest changes with every
commit."""


@dataclass(frozen=True)
class CheckpointScore:
    """The score of a checkpoint by one source."""

    result: EvaluationResult
    """the metrics and what they depend on"""
    metrics_file: Path
    """where they are written"""
    is_new: bool
    """whether this call wrote them"""
    differs: tuple[str, ...] = ()
    """in what they differ from the run's own scores (`RunSettings.differences`)"""

    @property
    def mark(self) -> str:
        """What a reader must know of a score that is not the run's own; empty for one that is."""
        return f" (other {', '.join(self.differs)}: not in TensorBoard, marked in status)" if self.differs else ""


class CheckpointScorer:
    """Scores one checkpoint; the model is loaded when the first photo needs a prediction.

    Args:
        folder: a `checkpoint-{step}` folder of a run.
        config: the config to score under.
        num_teachers: worked examples before each photo.
    """

    def __init__(self, folder: Path, config: DirectConfig, num_teachers: int) -> None:
        step = checkpoint_step(folder.name)
        assert step is not None, folder
        self._folder, self._step, self._config, self._num_teachers = folder, step, config, num_teachers
        self._run = RunFolder(folder.parent)
        self._photos = _PhotoPredictor(folder, config, num_teachers)

    def score(self, source: Source) -> CheckpointScore | None:
        """Score the checkpoint from one source, or look up the score it has.

        A new score also goes to TensorBoard, at the checkpoint's step, if it is on the run's own validation file and
        under its settings.

        Returns:
            The score; None while another worker holds the claim.

        Raises:
            CheckpointError: the checkpoint is damaged, or another worker took the claim meanwhile.
            DataError: the ground truth cannot be used.
        """
        infrastructure = self._config.infrastructure
        work = self._plan(source)
        is_new = not (work.folder / METRICS).exists()
        owner = {**job_facts(os.environ), "pid": os.getpid()}
        ledger = open_ledger(self._run, infrastructure.eval_claim_timeout_s)
        predict = partial(self._photos.predict_batches, source=source)
        result = run_evaluation(work, ledger, owner, self._config.training, predict)
        if result is None:
            return None
        differs = RunSettings.of_run(self._run).differences(result.to_dict())
        if is_new and infrastructure.tensorboard and not differs:
            _write_scalars(self._run, source, result)
        return CheckpointScore(result, work.folder / METRICS, is_new, differs)

    def _plan(self, source: Source) -> Evaluation:
        """What there is to score, under a key that names everything that the result depends on."""
        config = self._config
        scheme = load_label_scheme(config.data)
        facts = self._facts(source, scheme)
        return Evaluation(
            step=self._step,
            folder=result_folder(self._run, self._step, source, facts.key()),
            views=self._read_ground_truth(),
            facts=facts,
            scheme=scheme,
            # Only the head has a threshold: every object of a generated answer counts.
            min_score=config.detection.detection_score_threshold if source == "head" else 0.0,
            prediction_limit=_head_limit(config.detection) if source == "head" else None,
        )

    def _read_ground_truth(self) -> list[View]:
        """The views to score.

        Raises:
            DataError: a photo is listed twice or shown as an example, or there is no record or no photo at all.
        """
        data = self._config.data
        root, limit = Path(data.data_root), data.max_eval_examples
        records = read_distinct_records(root / data.val_file, root)
        views = [record.student for _, record in records[: limit if limit >= 0 else None]]
        if not views:
            raise DataError(f"{root / data.val_file}: no record to score; convert again or raise max_eval_examples")
        if not any(os.path.isfile(root / view.images[0]) for view in views):
            raise DataError(f"{root}: none of the {len(views)} photos of {data.val_file} is there; correct data_root")
        if self._num_teachers:
            _refuse_shown_answers(views, root / data.teacher_file, self._num_teachers)
        return views

    def _facts(self, source: Source, scheme: LabelScheme) -> ScoreFacts:
        data = self._config.data
        truth, pool = Path(data.data_root) / data.val_file, Path(data.data_root) / data.teacher_file
        return ScoreFacts(
            checkpoint_manifest_sha256=file_hash(self._folder / MANIFEST),
            dataset_sha256=file_hash(truth),
            photos_sha256=read_photos_hash(truth),
            config={key: getattr(self._config, key) for key in keys_used_for("score")},
            label_scheme_sha256=_scheme_hash(scheme),
            source=source,
            teachers=self._num_teachers,
            teachers_sha256=file_hash(pool) if self._num_teachers else None,
            teacher_photos_sha256=read_photos_hash(pool) if self._num_teachers else None,
            score_code_sha256=_score_code_hash(),
            packages=package_versions(_SCORE_PACKAGES),
            code_sha256=code_hash(),
            image_sha256=image_digest(os.environ),
            val_file=data.val_file,
        )


def checkpoints_to_score(run: RunFolder, notify: Callable[[str], None]) -> list[Path]:
    """List the published checkpoints of a run, oldest first, scored or not; say so where there are none yet.

    Raises CheckpointError for a folder that is no run folder.
    """
    if run.is_run and not run.config.is_file():
        notify(f"{run.root}: not begun yet, nothing to score")
        return []
    if not run.config.is_file():
        raise CheckpointError(f"{run.root}: not a run folder (no config.yaml); name an output-{{run_name}} folder")
    if not run.steps():
        notify(f"{run.root}: no checkpoint yet, nothing to score")
    return [run.checkpoint(step) for step in run.steps()]


class _PhotoPredictor:
    """One checkpoint predicting on photos. Its detections are kept in memory, so that `both` costs no second pass."""

    def __init__(self, folder: Path, config: DirectConfig, num_teachers: int) -> None:
        self._folder, self._config, self._num_teachers = folder, config, num_teachers
        self._root = Path(config.data.data_root)
        self._detections: dict[tuple[str, Source], Detections] = {}

    def predict_batches(self, views: Sequence[View], source: Source) -> Iterator[list[Prediction]]:
        """Predict `generation_batch_size` photos at a time. A photo that cannot be read is a failed prediction."""
        size = self._config.model.generation_batch_size
        for start in range(0, len(views), size):
            yield self._predict_batch(views[start : start + size], source)

    def _predict_batch(self, views: Sequence[View], source: Source) -> list[Prediction]:
        """The predictions of one batch, the failed ones first. Raises DataError for a photo of another size."""
        from bbu.data.images import load_image

        images, failed = {}, []
        for name in (view.images[0] for view in views):
            try:
                images[name] = load_image(self._root / name, name)
            except DataError as error:
                failed.append(Prediction(name, (), status="failed", rejected={str(error): 1}))
        for view in views:
            if view.images[0] in images:
                self._check_size(view, images[view.images[0]])
        return failed + [_prediction_of(name, item) for name, item in self._detect(images, source).items()]

    def _check_size(self, view: View, image: Image.Image) -> None:
        """Refuse a photo whose true boxes and predicted boxes would be in different pixels."""
        data = self._config.data
        plan = smart_resize(*image.size, data.min_pixels, data.max_pixels)
        sizes = {"record": (view.width or image.width, view.height or image.height), "photo": image.size}
        sizes["model"] = (plan.width, plan.height)
        if len(set(sizes.values())) > 1:
            texts = ", ".join(f"{name} {width}x{height}" for name, (width, height) in sizes.items())
            raise DataError(
                f"{self._root / view.images[0]}: sizes differ ({texts} pixels), so that boxes cannot be compared; "
                "convert again with the run's min_pixels and max_pixels"
            )

    def _detect(self, images: Mapping[str, Image.Image], source: Source) -> dict[str, Detections]:
        """The detections in each photo, by the photo's name."""
        if source == "both":
            from bbu.inference.predictor import confirm_detections

            answers, heads = self._detect(images, "answer"), self._detect(images, "head")
            least = self._config.detection.detection_score_threshold
            return {name: confirm_detections(heads[name], answers[name], least) for name in images}
        missing = [name for name in images if (name, source) not in self._detections]
        if missing:
            # Detections of the head with a low score too: average precision needs them, the headline leaves them out.
            photos = [images[name] for name in missing]
            detections = self._predictor.predict(photos, source=source, min_score=0.0)
            self._detections |= {(name, source): item for name, item in zip(missing, detections, strict=True)}
        return {name: self._detections[name, source] for name in images}

    @cached_property
    def _predictor(self) -> Predictor:
        from bbu.inference.predictor import Predictor, best_device
        from bbu.models.torch_settings import prepare_torch

        verify_model(self._folder)  # reads the weights, hence only where something is to be predicted
        config = self._config
        prepare_torch(config.model, config.infrastructure)
        return Predictor(
            self._folder,
            config.model,
            config.data,
            config.detection,
            device=best_device(),
            bf16=config.training.bf16,
            num_teachers=self._num_teachers,
        )


def _prediction_of(image: str, detections: Detections) -> Prediction:
    if not all(map(math.isfinite, detections.scores)):
        raise NonFiniteError(f"{image}: a score is not finite, so the weights are not either; use another checkpoint")
    width, height = detections.size
    return Prediction(
        image=image,
        objects=detections.objects,
        scores=detections.scores,
        status=detections.status,
        score_source=detections.score_source,
        width=width,
        height=height,
        rejected=detections.rejected,
    )


@cache
def _score_code_hash() -> str:
    """Once for each process: reading the code takes longer than reading a checkpoint's manifest."""
    return computing_code_hash(_SCORE_CODE)


def _scheme_hash(scheme: LabelScheme) -> str:
    text = json.dumps(asdict(scheme), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _head_limit(detection: DetectionConfig) -> int:
    """The most objects that the head reports for a photo."""
    return min(detection.detection_max_predictions, detection.detection_num_queries)


def _refuse_shown_answers(views: Sequence[View], pool: Path, num_teachers: int) -> None:
    """Refuse to score photos that the prompt shows with their answers."""
    scored = {os.path.normpath(view.images[0]) for view in views}
    for record in islice(read_records(pool), num_teachers):
        for image in record.student.images:
            if os.path.normpath(image) in scored:
                raise DataError(
                    f"{pool}: {image} is a worked example and is to be scored too; take it out of one of the files"
                )


def _write_scalars(run: RunFolder, source: Source, result: EvaluationResult) -> None:
    """Write the main values to TensorBoard, beside the training curves.

    They take the place of the step's earlier ones, such as those that an older version of the code computed.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder, suffix = run.tensorboard / "eval" / source, f".step-{result.step}"
    earlier = list(folder.glob(f"events.*{suffix}"))
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:
        for name, value in flat_scalars(result.metrics).items():
            writer.add_scalar(name, value, result.step)
    for path in earlier:
        path.unlink(missing_ok=True)
