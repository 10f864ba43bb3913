"""Random photos with all that is awkward in matching, and pycocotools as the reference for them."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from bbu.evaluation.matching import ClassOf, Pairing
from bbu.schema import BBUObject


def random_photos(seed: int, photos: int = 12) -> list[Pairing]:
    """Photos with few, no and more than a hundred boxes.

    Boxes of all of COCO's sizes, some twice, mostly on a grid, so that IoUs are equal or lie at a threshold; equal
    scores; classes that only the truth has, or only the predictions.
    """
    rng = np.random.default_rng(seed)
    grid, scale = float(rng.choice([0, 0.1, 1, 8])), float(rng.choice([40, 120, 600]))
    pairings = []
    for photo in range(photos):
        count = 70 if photo == 3 and seed % 2 else int(rng.integers(0, 7))
        true = np.concatenate(
            [rng.uniform(0, 2 * scale, (count, 2)), rng.uniform(scale / 8, scale, (count, 2))], axis=1
        )
        true = np.concatenate([true, true[:1]])  # one box twice
        said = np.concatenate([true, true[:2], true[::2]])
        said = said + rng.normal(0, scale / 30, said.shape) * rng.integers(0, 2, (len(said), 1))
        scores = rng.uniform(0, 1, len(said)).round(int(rng.integers(1, 4)))
        pairings.append(
            Pairing(
                _draw_labels(rng, true, grid, "abcd"), _draw_labels(rng, said, grid, "abcx"), tuple(scores.tolist())
            )
        )
    return pairings


def _draw_labels(rng: np.random.Generator, boxes: np.ndarray, grid: float, labels: str) -> tuple[BBUObject, ...]:
    boxes = np.round(boxes / grid) * grid if grid else boxes
    sides = np.maximum(boxes[:, 2:], grid or 1)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + sides], axis=1)
    return tuple(BBUObject((x1, y1, x2, y2), labels[rng.integers(len(labels))]) for x1, y1, x2, y2 in corners.tolist())


def run_coco(pairings: list[Pairing], class_of: ClassOf, limits: list[int]) -> COCOeval:
    """pycocotools as its documentation uses it; ids are places in the data, counted from 1."""
    classes = sorted({class_of(o.desc) for p in pairings for o in (*p.truth, *p.predicted)})
    category = {name: i for i, name in enumerate(classes, 1)}
    truth, results = [], []
    for image, pairing in enumerate(pairings, 1):
        truth += [_annotation(o, image, category[class_of(o.desc)]) | {"id": len(truth) + i}
                  for i, o in enumerate(pairing.truth, 1)]  # fmt: skip
        results += [_annotation(o, image, category[class_of(o.desc)]) | {"score": score}
                    for o, score in zip(pairing.predicted, pairing.scores, strict=True)]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i} for i in range(1, len(pairings) + 1)],
            "categories": [{"id": i, "name": str(name)} for name, i in category.items()],
            "annotations": truth,
        }  # type: ignore[assignment]
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.params.maxDets = limits
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def _annotation(item: BBUObject, image: int, category: int) -> dict[str, Any]:
    x1, y1, x2, y2 = item.bbox_2d
    box = [x1, y1, x2 - x1, y2 - y1]
    return {"image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
