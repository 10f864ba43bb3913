"""Presents metrics: as scalars for TensorBoard and as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from bbu.evaluation.metrics import Headline, ImageCounts, Metrics

_NOT_MODES = ("score_source", "max_detections")
"""Entries of `Metrics.average_precision` that are no way to compare labels."""
_LISTED_CLASSES = 5
"""Classes without ground truth that the report names; metrics.json has all."""
_NO_SCORE = "-"


def flat_scalars(metrics: Metrics) -> dict[str, float]:
    """The main values as flat scalars, such as `detection/class_aware/f1@0.50`, `labels/status/accuracy`.

    A value without a score, such as one over no true object, is left out.
    """
    flat: dict[str, float | None] = {
        f"detection/{m}/{k}": v for m, values in metrics.detection.items() for k, v in values.items()
    }
    precisions = metrics.average_precision or {}
    source = precisions.get("score_source")
    for mode in (m for m in precisions if m not in _NOT_MODES):
        flat |= {f"{source}/{mode}/{name}": value for name, value in precisions[mode].items()}
    flat |= {f"labels/{level}/accuracy": row["accuracy"] for level, row in metrics.labels.items()}
    return {name: value for name, value in flat.items() if value is not None}


def metrics_table(metrics: Metrics) -> str:
    """The whole report as plain text. Chinese names stand last in a row, where their width breaks no column."""
    precisions = [_average_precision(metrics), _absent_classes(metrics)]
    parts = [_images(metrics.images), _over_limit(metrics), _detection(metrics), *precisions, _labels(metrics)]
    return "\n\n".join(part for part in parts if part)


def _images(images: ImageCounts) -> str:
    states = ", ".join(f"{count} {status}" for status, count in images.status.items())
    rejected = ", ".join(f"{count} {reason}" for reason, count in images.rejected.items())
    line = f"{images.total} images ({states or 'none predicted'}; {images.not_predicted} not predicted), "
    line += f"{images.objects_true} objects true, {images.objects_predicted} predicted"
    return line + (f"; rejected: {rejected}" if rejected else "")


def _over_limit(metrics: Metrics) -> str:
    """Photos of which the head cannot report all objects."""
    if not metrics.over_limit:
        return ""
    return (
        f"{metrics.over_limit} images have more objects than the {metrics.prediction_limit} that the head reports for "
        "an image: raise detection_max_predictions and detection_num_queries"
    )


def _detection(metrics: Metrics) -> str:
    names = ("precision@0.50", "recall@0.50", "f1@0.50", "f1@0.75", "f1@0.50:0.95")
    rows = [
        [mode, *(_with_interval(values.get(n), metrics.intervals.get(mode, {}).get(n)) for n in names)]
        for mode, values in metrics.detection.items()
    ]
    first = f"boxes ({metrics.interval_level:.0%} interval)" if any(metrics.intervals.values()) else "boxes"
    return f"{_headline(metrics.headline)}\n\n" + tabulate(rows, headers=[first, *names], disable_numparse=True)


def _headline(headline: Headline) -> str:
    named = (("precision", headline.precision), ("recall", headline.recall), ("f1", headline.f1))
    values = ", ".join(f"{name} {score_text(value)}" for name, value in named)
    return f"found with the right label at IoU {headline.iou:.2f}: {values}"


def score_text(value: float | None) -> str:
    """A score for people, `-` where there is none."""
    return _NO_SCORE if value is None else f"{value:.3f}"


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    return score_text(value) + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else "")


def _average_precision(metrics: Metrics) -> str:
    precisions = metrics.average_precision
    if not precisions:
        return ""
    names = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")
    rows = [[mode, *(v.get(n) for n in names)] for mode, v in precisions.items() if mode not in _NOT_MODES]
    table = tabulate(rows, headers=[f"by {precisions['score_source']}", *names], floatfmt=".3f", missingval=_NO_SCORE)
    return f"{table}\nAP counts all boxes, at most {precisions.get('max_detections')} in an image here"


def _absent_classes(metrics: Metrics) -> str:
    """The predictions that class-aware average precision leaves out."""
    absent = metrics.absent_classes
    if not absent:
        return ""
    scored, predicted = (sum(row[name] for row in absent.values()) for name in ("scored", "predicted"))
    listed = ", ".join(f"{row['scored']} {name}" for name, row in list(absent.items())[:_LISTED_CLASSES])
    more = f" and {len(absent) - _LISTED_CLASSES} more classes" if len(absent) > _LISTED_CLASSES else ""
    left_out = "class-aware AP leaves these false finds out, " if metrics.average_precision else ""
    return (
        f"{scored} predictions are of {len(absent)} classes that the ground truth lacks ({left_out}precision and F1 "
        f"count {predicted} of them): {listed}{more}"
    )


def _labels(metrics: Metrics) -> str:
    headers = ("level", "support", "predicted", "correct", "precision", "recall", "f1", "label")
    rows = []
    for level, scores in metrics.labels.items():
        for name, row in sorted(scores["per_class"].items(), key=lambda item: -item[1]["support"]):
            rows.append([level, *(row[h] for h in headers[1:-1]), name])
    return tabulate(rows, headers=headers, floatfmt=".3f", missingval=_NO_SCORE) if rows else ""
