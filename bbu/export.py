"""`python -m bbu.export --checkpoint DIR --merge OUT`: write the model of a checkpoint as a folder of its own.

The folder holds whole weights (low-rank adapters are merged into their base model's), detection head, tokenizer, image
processor and model card, and no state of the training. Other programs load it as a Qwen2.5-VL, and so does bbu.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bbu.config.arguments import add_checkpoint_argument, add_override_argument
from bbu.errors import run_entry

_EXAMPLE = "example: python -m bbu.export --checkpoint output-NAME/checkpoint-1000 --merge models/bbu-1000"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bbu.export",
        description=__doc__,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_checkpoint_argument(parser, required=True)
    parser.add_argument(
        "--merge", type=Path, required=True, metavar="OUT", help="folder to write: a new or an empty one"
    )
    add_override_argument(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    from bbu.inference.export import export_model

    print(export_model(arguments.checkpoint, arguments.merge, arguments.overrides))
    return 0


if __name__ == "__main__":
    run_entry(main)
