"""`python -m bbu.infer PHOTOS… --checkpoint DIR`: detect and describe the parts in photos.

Prints one JSON line for each photo as soon as its result is there, and writes a copy of it with boxes and labels drawn
in. How it went is said in one line on stderr. A photo that cannot be read has its error in its line, the others go on,
and the exit code is 3.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

from bbu.config.arguments import add_checkpoint_argument, add_override_argument, add_prediction_arguments
from bbu.errors import DataError, run_entry
from bbu.inference.photos import find_photos
from bbu.logs import print_notice

_PROGRAM = "bbu.infer"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bbu.infer", description=__doc__)
    add = parser.add_argument
    text = "photos, folders (all photos in them and in their subfolders) or patterns in quotes ('site-*/*.jpg')"
    add("photos", nargs="+", metavar="PHOTO", help=text)
    add_checkpoint_argument(parser, required=True)
    add("--prompt", help="instead of the instruction the run was trained with")
    add_prediction_arguments(parser, source=None, source_text="the head where the checkpoint has one, else the answer")
    add("--out", type=Path, default=Path("predictions"), metavar="DIR", help="folder of the pictures (predictions)")
    add_override_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    files = find_photos(arguments.photos, leave_out=arguments.out)
    if not any(os.path.exists(path) for path in files.paths):
        raise DataError(f"no such photo: {', '.join(map(str, files.paths[:5]))}; check the names")
    if files.skipped:
        print_notice(_PROGRAM, f"left out {files.describe_skipped()}")
    from bbu.inference.predictor import Qwen25VLInference, describe_source
    from bbu.inference.progress import photo_progress
    from bbu.inference.results import Tally

    predictor = Qwen25VLInference(
        arguments.checkpoint, overrides=arguments.overrides, num_teacher_samples=arguments.teachers
    )
    if arguments.source is None:
        print_notice(_PROGRAM, describe_source(predictor))
    names, tally = _picture_names(files.paths), Tally()
    results = predictor.stream_results(files.paths, arguments.prompt, source=arguments.source)
    with photo_progress(_PROGRAM, predictor.config.infrastructure.progress, len(names)) as progress:
        for name, result in zip(names, results, strict=True):
            print(json.dumps(result.to_dict(), ensure_ascii=False), flush=True)
            if result.error:
                print_notice(_PROGRAM, result.error)
            else:
                result.save(arguments.out / name)
            tally.add(result)
            progress.update()
    print_notice(_PROGRAM, f"{tally}; pictures in {arguments.out}")
    return DataError.exit_code if tally.failed else 0


def _picture_names(paths: Sequence[Path]) -> list[str]:
    """Name the files of the drawn pictures: as the photos, with more of the name where two would share one."""
    names: dict[str, None] = {}
    for path in paths:
        numbered = (f"{path.name}-{number}.png" for number in count(2))
        candidates = chain((f"{path.stem}.png", f"{path.name}.png"), numbered)
        names[next(name for name in candidates if name not in names)] = None
    return list(names)


if __name__ == "__main__":
    run_entry(main)
