"""Presents metrics: as scalars for TensorBoard and as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from bbu.evaluation.metrics import Headline, ImageCounts, Metrics


def flat_scalars(metrics: Metrics) -> dict[str, float]:
    """The main values as flat scalars, such as `detection/class_aware/f1@0.50`, `labels/status/accuracy`."""
    flat = {f"detection/{m}/{k}": v for m, values in metrics.detection.items() for k, v in values.items()}
    precisions = metrics.average_precision or {}
    source = precisions.get("score_source")
    for mode in (m for m in precisions if m != "score_source"):
        # COCO writes -1 where there is no ground truth
        flat |= {f"{source}/{mode}/{k}": v for k, v in precisions[mode].items() if v >= 0}
    accuracies = {level: row["accuracy"] for level, row in metrics.labels.items()}
    return flat | {f"labels/{level}/accuracy": v for level, v in accuracies.items() if v is not None}


def metrics_table(metrics: Metrics) -> str:
    """The whole report as plain text. Chinese names stand last in a row, where their width breaks no column."""
    parts = [_images(metrics.images), _detection(metrics), _average_precision(metrics), _labels(metrics)]
    return "\n\n".join(part for part in parts if part)


def _images(images: ImageCounts) -> str:
    states = ", ".join(f"{count} {status}" for status, count in images.status.items())
    rejected = ", ".join(f"{count} {reason}" for reason, count in images.rejected.items())
    line = f"{images.total} images ({states or 'none predicted'}; {images.not_predicted} not predicted), "
    line += f"{images.objects_true} objects true, {images.objects_predicted} predicted"
    return line + (f"; rejected: {rejected}" if rejected else "")


def _detection(metrics: Metrics) -> str:
    names = ("precision@0.50", "recall@0.50", "f1@0.50", "f1@0.75", "f1@0.50:0.95")
    rows = [
        [mode, *(_with_interval(values[n], metrics.intervals[mode].get(n)) for n in names)]
        for mode, values in metrics.detection.items()
    ]
    first = f"boxes ({metrics.interval_level:.0%} interval)" if metrics.intervals["class_aware"] else "boxes"
    return f"{_headline(metrics.headline)}\n\n" + tabulate(rows, headers=[first, *names], disable_numparse=True)


def _headline(headline: Headline) -> str:
    values = f"precision {headline.precision:.3f}, recall {headline.recall:.3f}, f1 {headline.f1:.3f}"
    return f"found with the right label at IoU {headline.iou:.2f}: {values}"


def _with_interval(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.3f}" + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else "")


def _average_precision(metrics: Metrics) -> str:
    precisions = metrics.average_precision
    if not precisions:
        return ""
    names = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")
    rows = [[mode, *(v[n] for n in names)] for mode, v in precisions.items() if mode != "score_source"]
    return tabulate(rows, headers=[f"by {precisions['score_source']}", *names], floatfmt=".3f")


def _labels(metrics: Metrics) -> str:
    headers = ("level", "support", "predicted", "correct", "precision", "recall", "f1", "label")
    rows = []
    for level, scores in metrics.labels.items():
        for name, row in sorted(scores["per_class"].items(), key=lambda item: -item[1]["support"]):
            rows.append([level, *(row[h] for h in headers[1:-1]), name])
    return tabulate(rows, headers=headers, floatfmt=".3f") if rows else ""
