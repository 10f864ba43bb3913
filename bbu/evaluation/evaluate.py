"""Computes all metrics of a set of predictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bbu.errors import DataError
from bbu.evaluation.average_precision import average_precision
from bbu.evaluation.detection import (
    AGREEING_LEVELS,
    bootstrap,
    class_by_levels,
    count_absent_classes,
    count_matches,
    headline_scores,
    matched_descriptions,
    most_boxes,
    pair_up,
    score_source,
    summarise,
)
from bbu.evaluation.labels import score_labels
from bbu.evaluation.matching import ClassOf, Overlaps, find_overlaps
from bbu.evaluation.metrics import ImageCounts, Metrics
from bbu.evaluation.predictions import Prediction
from bbu.labels import LabelScheme
from bbu.schema import View

_AP_MODES = ("class_agnostic", "class_aware")
"""The ways to compare labels that get an average precision."""


def evaluate_predictions(
    views: Sequence[View],
    predictions: Sequence[Prediction],
    scheme: LabelScheme,
    *,
    iou: float = 0.5,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    min_score: float = 0.0,
) -> Metrics:
    """Compute every metric of one dataset; an image of the ground truth without a prediction counts as missed.

    Args:
        views, predictions: the ground truth, and a prediction for each of its images, or none.
        scheme: how descriptions are read.
        iou: overlap from which a box counts as found in the headline and in the scores of labels.
        resamples, seed: of the bootstrap; 0 resamples give no intervals.
        level: confidence of the intervals, 0 to 1.
        min_score: predictions with a lower score count for average precision alone.

    Raises:
        DataError: there is no image to score, or the predictions belong to another ground truth.
    """
    if not views:
        raise DataError("nothing to evaluate: the ground truth has no image; check val_file")
    source = score_source(predictions)
    pairs = pair_up(views, predictions if source else [replace(item, scores=()) for item in predictions])
    overlaps = find_overlaps(pairs)
    class_of = {name: class_by_levels(scheme, levels) for name, levels in AGREEING_LEVELS.items()}
    counts = {name: count_matches(overlaps, classes, min_score) for name, classes in class_of.items()}
    return Metrics(
        headline=headline_scores(counts["class_aware"], iou),
        detection={name: summarise(c) for name, c in counts.items()},
        intervals=bootstrap(counts, resamples=resamples, seed=seed, level=level),
        interval_level=level,
        average_precision=_average_precisions(source, overlaps, most_boxes(pairs), class_of) if source else None,
        images=_count_images(views, predictions, int(counts["class_aware"].predicted.sum())),
        labels=score_labels(matched_descriptions(overlaps, iou, min_score), scheme),
        absent_classes=_absent_classes(overlaps, class_of["class_aware"], min_score),
    )


def _average_precisions(source: str, overlaps: Overlaps, most: int, class_of: Mapping[str, ClassOf]) -> dict[str, Any]:
    """COCO's numbers in each of _AP_MODES; None where COCO has -1, because there is no ground truth."""
    modes = {mode: average_precision(overlaps, class_of[mode]) for mode in _AP_MODES}
    scores = {mode: {k: v if v >= 0 else None for k, v in values.items()} for mode, values in modes.items()}
    return {"score_source": source, "max_detections": most, **scores}


def _absent_classes(overlaps: Overlaps, class_of: ClassOf, min_score: float) -> dict[str, dict[str, int]]:
    scored, predicted = (count_absent_classes(overlaps, class_of, least) for least in (-np.inf, min_score))
    return {
        "/".join(filter(None, texts)): {"predicted": predicted[texts], "scored": count}
        for texts, count in scored.most_common()
    }


def _count_images(views: Sequence[View], predictions: Sequence[Prediction], objects_predicted: int) -> ImageCounts:
    rejected: Counter[str] = Counter()
    for prediction in predictions:
        rejected.update(prediction.rejected)
    return ImageCounts(
        total=len(views),
        not_predicted=len(views) - len(predictions),
        status=dict(sorted(Counter(p.status for p in predictions).items())),
        rejected=dict(sorted(rejected.items())),
        objects_true=sum(len(v.objects) for v in views),
        objects_predicted=objects_predicted,
    )
