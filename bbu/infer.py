"""`python -m bbu.infer IMAGES… --checkpoint DIR`: detect and describe the parts in photos.

Prints one JSON line for each photo and writes a copy of it with boxes and labels drawn in.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bbu.config.arguments import add_checkpoint_argument, add_override_argument, add_prediction_arguments
from bbu.errors import DataError, run_entry
from bbu.schema import Box


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bbu.infer", description=__doc__)
    add = parser.add_argument
    add("images", nargs="+", type=Path, metavar="IMAGE", help="photos")
    add_checkpoint_argument(parser, required=True)
    add("--prompt", help="instead of the instruction the run was trained with")
    add_prediction_arguments(parser, source="answer", source_text="answer")
    add("--out", type=Path, default=Path("predictions"), metavar="DIR", help="folder of the pictures (predictions)")
    add_override_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if missing := [str(path) for path in arguments.images if not path.is_file()]:
        raise DataError(f"no such photo: {', '.join(missing)}; check the names")
    names = _picture_names(arguments.images)
    from bbu.data.images import load_image
    from bbu.inference import Qwen25VLInference
    from bbu.inference.drawing import draw_detections

    images = [load_image(path, "bbu.infer") for path in arguments.images]
    predictor = Qwen25VLInference(
        arguments.checkpoint, overrides=arguments.overrides, num_teacher_samples=arguments.teachers
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = predictor.predict(images, arguments.prompt, source=arguments.source)
    for path, name, image, detections in zip(arguments.images, names, images, results, strict=True):
        boxes = predictor.boxes_in_image(image, detections)
        captions = [item.desc for item in detections.objects]
        draw_detections(image, boxes, captions).save(arguments.out / name)
        print(json.dumps(_json_line(path, image.size, boxes, captions, detections.scores), ensure_ascii=False))
    return 0


def _json_line(
    path: Path, size: tuple[int, int], boxes: Sequence[Box], captions: Sequence[str], scores: Sequence[float]
) -> dict[str, Any]:
    """Describe one photo as a view in its own pixels, with a score beside each object."""
    objects = [
        {"bbox_2d": [round(c, 1) for c in box], "desc": caption, "score": round(score, 4)}
        for box, caption, score in zip(boxes, captions, scores, strict=True)
    ]
    return {"images": [str(path)], "objects": objects, "width": size[0], "height": size[1]}


def _picture_names(images: list[Path]) -> list[str]:
    """Name the files of the drawn pictures; DataError where two photos would share one."""
    names = [f"{path.stem}.png" for path in images]
    if twice := {name for name in names if names.count(name) > 1}:
        raise DataError(f"several photos are called {Path(min(twice)).stem}; rename them, or run them one by one")
    return names


if __name__ == "__main__":
    run_entry(main)
