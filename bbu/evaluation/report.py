"""What people and programs read of an evaluation: metrics.json, TensorBoard scalars, a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bbu.evaluation.detection import above, evaluate_detection, matched_pairs, pair_up
from bbu.evaluation.labels import score_labels
from bbu.evaluation.predictions import Prediction
from bbu.labels import LabelScheme
from bbu.run.files import write_atomic
from bbu.schema import View


def evaluate(
    views: Sequence[View],
    predictions: Sequence[Prediction],
    scheme: LabelScheme,
    *,
    iou: float = 0.5,
    least: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """All metrics of one dataset, as metrics.json holds them; options and errors are `evaluate_detection`'s."""
    metrics = evaluate_detection(views, predictions, scheme, iou=iou, least=least, **options)
    certain = [above(pair, least) for pair in pair_up(views, predictions)]
    return metrics | {"labels": score_labels(matched_pairs(certain, iou), scheme)}


def write_metrics(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write metrics.json whole or not at all."""
    write_atomic(path, json.dumps(metrics, ensure_ascii=False, allow_nan=False, indent=2, sort_keys=True) + "\n")


def scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The headline as flat scalars, such as `detection/class_aware/f1@0.50`, `labels/status/accuracy`."""
    flat = {f"detection/{m}/{k}": v for m, values in metrics["detection"].items() for k, v in values.items()}
    scored = metrics["average_precision"] or {}
    source = scored.get("score_source")
    for mode in (m for m in scored if m != "score_source"):
        flat |= {f"{source}/{mode}/{k}": v for k, v in scored[mode].items() if v >= 0}
    accuracies = {level: row["accuracy"] for level, row in metrics["labels"].items()}
    return flat | {f"labels/{level}/accuracy": v for level, v in accuracies.items() if v is not None}


def table(metrics: Mapping[str, Any]) -> str:
    """The whole report as plain text; Chinese names stand last in a row, where their width breaks no column."""
    parts = [_images(metrics["images"]), _detection(metrics), _average_precision(metrics), _labels(metrics)]
    return "\n\n".join(part for part in parts if part)


def _images(images: Mapping[str, Any]) -> str:
    states = ", ".join(f"{count} {status}" for status, count in images["status"].items())
    rejected = ", ".join(f"{count} {reason}" for reason, count in images["rejected"].items())
    line = f"{images['total']} images ({states or 'none predicted'}; {images['not_predicted']} not predicted), "
    line += f"{images['objects_true']} objects true, {images['objects_predicted']} predicted"
    return line + (f"; rejected: {rejected}" if rejected else "")


def _detection(metrics: Mapping[str, Any]) -> str:
    names = ("precision@0.50", "recall@0.50", "f1@0.50", "f1@0.75", "f1@0.50:0.95")
    rows = [
        [mode, *(_with_interval(values[n], metrics["intervals"][mode].get(n)) for n in names)]
        for mode, values in metrics["detection"].items()
    ]
    first = f"boxes ({metrics['interval_level']:.0%} interval)" if metrics["intervals"]["class_aware"] else "boxes"
    return f"{_headline(metrics['headline'])}\n\n" + tabulate(rows, headers=[first, *names], disable_numparse=True)


def _headline(values: Mapping[str, float]) -> str:
    told = ", ".join(f"{name} {values[name]:.3f}" for name in ("precision", "recall", "f1"))
    return f"found with the right label at IoU {values['iou']:.2f}: {told}"


def _with_interval(value: float, interval: Sequence[float] | None) -> str:
    return f"{value:.3f}" + (f" ({interval[0]:.2f}-{interval[1]:.2f})" if interval else "")


def _average_precision(metrics: Mapping[str, Any]) -> str:
    scored = metrics["average_precision"]
    if not scored:
        return ""
    names = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")
    rows = [[mode, *(v[n] for n in names)] for mode, v in scored.items() if mode != "score_source"]
    return tabulate(rows, headers=[f"by {scored['score_source']}", *names], floatfmt=".3f")


def _labels(metrics: Mapping[str, Any]) -> str:
    headers = ("level", "support", "predicted", "correct", "precision", "recall", "f1", "label")
    rows = []
    for level, scored in metrics["labels"].items():
        for name, row in sorted(scored["per_class"].items(), key=lambda item: -item[1]["support"]):
            rows.append([level, *(row[h] for h in headers[1:-1]), name])
    return tabulate(rows, headers=headers, floatfmt=".3f") if rows else ""
