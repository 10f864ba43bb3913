"""The whole evaluation of 5,000 photos beside pycocotools, with equal AP, AR and matches."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from bbu.evaluation.detection import AGREEING_LEVELS, class_by_levels, pair_up
from bbu.evaluation.evaluate import evaluate_predictions
from bbu.evaluation.predictions import Prediction
from bbu.labels import RESPONSE_TYPES, LabelScheme
from bbu.schema import BBUObject, View
from bbu.synthetic.distribution import KINDS, draw_room
from tests.bench._results import Row
from tests.evaluation.coco import run_coco

PHOTOS = 5_000
LABELS = [kind.label_zh for kind in KINDS]
SCHEME = LabelScheme(
    {kind: tuple(label.split("/")[1] for label in LABELS if label.split("/")[0] == kind)
     for kind in {label.split("/")[0] for label in LABELS}},
    RESPONSE_TYPES,
)  # fmt: skip


def run() -> list[Row]:
    random = Random(0)
    views = [View((f"{i}.jpg",), draw_objects(random)) for i in range(PHOTOS)]
    predictions = [predict_roughly(random, view) for view in views]
    metrics, seconds = cpu_seconds(lambda: evaluate_predictions(views, predictions, SCHEME))
    pairings = pair_up(views, predictions)
    classes = {mode: class_by_levels(SCHEME, levels) for mode, levels in AGREEING_LEVELS.items()}
    peers, peer_seconds = cpu_seconds(
        lambda: {mode: run_coco(pairings, class_of, [1, 10, 100]) for mode, class_of in classes.items()}
    )
    for mode, peer in peers.items():
        matched = sum((e["dtMatches"][0] > 0).sum() for e in peer.evalImgs if e and e["aRng"] == peer.params.areaRng[0])
        assert metrics.detection[mode]["recall@0.50"] == matched / metrics.images.objects_true
    assert metrics.average_precision
    for mode in ("class_agnostic", "class_aware"):
        peers[mode].summarize()
        assert list(metrics.average_precision[mode].values()) == pytest.approx(list(peers[mode].stats), abs=1e-9)
    size = f"{metrics.images.objects_true:,} objects, {metrics.images.objects_predicted:,} predicted"
    what = f"whole evaluation of {PHOTOS:,} photos, {size}: labels to four depths, AP to two, 1,000 resamples"
    peer_text = f"pycocotools, once for each depth and no resamples {peer_seconds:.1f} s"
    return [Row(what, f"{seconds:.2f} s", peer_text, peer_seconds / seconds, "1.5 s")]


def draw_objects(random: Random) -> tuple[BBUObject, ...]:
    """The objects of one photo, with the published counts and sizes."""
    parts = draw_room(random, "full").parts
    status = {None: "", True: "/连接正确", False: "/连接错误"}
    return tuple(BBUObject(part.box, part.kind.label_zh + status[part.correct]) for part in parts)


def predict_roughly(random: Random, view: View) -> Prediction:
    """Most objects of a photo, a little beside, some with another label, some twice, and false ones."""
    objects = []
    for item in (*random.choices(view.objects, k=2), *view.objects):
        x1, y1, x2, y2 = item.bbox_2d
        dx, dy = random.gauss(0, 0.1) * (x2 - x1), random.gauss(0, 0.1) * (y2 - y1)
        desc = item.desc if random.random() < 0.85 else random.choice(LABELS)
        objects.append(BBUObject((x1 + dx, y1 + dy, x2 + dx, y2 + dy), desc))
    scores = tuple(round(random.random(), 3) for _ in objects)
    return Prediction(view.images[0], tuple(objects), scores, score_source="objectness")


def cpu_seconds(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a call, and the CPU seconds that it took."""
    start = time.process_time()
    return call(), time.process_time() - start
