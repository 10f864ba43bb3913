"""`python -m tests.run.killed_save RUN STAGE`: saves checkpoint-20 and stops for good at a stage of it.

STAGE is `writing` or a function of bbu.run.publishing. Prints `here` once it has come to the stage.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bbu.run import publishing
from bbu.run.folder import RunFolder
from tests import checkpoints


def stop(*_: object) -> None:
    print("here", flush=True)
    sys.stdin.read()


def main(run: str, stage: str) -> None:
    if stage != "writing":
        setattr(publishing, stage, stop)
    with checkpoints.publishing(RunFolder(Path(run)), 20) as folder:
        (folder / "model.safetensors").write_bytes(bytes(5000))
        if stage == "writing":
            stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
