"""`status.json`: what the trainer reports about a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bbu.errors import CheckpointError
from bbu.run.files import write_atomic
from bbu.run.folder import RunFolder


def write_status(run: RunFolder, status: Mapping[str, Any]) -> None:
    """Replace `status.json`, atomically. Raises ValueError for NaN, which is not JSON."""
    write_atomic(run.status, json.dumps(dict(status), ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def read_status(run: RunFolder) -> dict[str, Any] | None:
    """The content of `status.json`, None where there is none yet. Raises CheckpointError if it is not JSON."""
    try:
        return json.loads(run.status.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{run.status}: not JSON; remove it, the next heartbeat writes it anew") from error
