"""Which worker scores which checkpoint: executed at least once, published exactly once, for any number of workers.

A folder on a shared filesystem, without a server and without locks:
- `claims/{key}.{n}` are the generations of the lease on an evaluation (`bbu.run.lease`): while its owner sends
  heartbeats nobody else may take it; once it is stale, whoever links the next generation first does the work.
- `results/{key}.json` is created once, from a finished and synced file. A worker that was taken for dead and comes
  back may finish too, but then finds the result published and changes nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.errors import CheckpointError
from bbu.run.files import age_of, create_once
from bbu.run.lease import Lease, LeaseFiles
from bbu.strict_json import read_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """The right to do one evaluation, won by this worker."""

    key: str
    """the evaluation's name in the ledger"""
    lease: Lease
    """keep it alive while the evaluation runs"""


class Ledger:
    """Claims and results of evaluations.

    Args:
        folder: where they lie; made where absent.
        lease_seconds: a claim without a heartbeat for so long is taken for abandoned.
    """

    def __init__(self, folder: Path, *, lease_seconds: float = 900.0) -> None:
        self.lease_seconds = lease_seconds
        self._claims, self._results, self._drafts = (folder / name for name in ("claims", "results", "tmp"))
        for path in (self._claims, self._results, self._drafts):
            path.mkdir(parents=True, exist_ok=True)

    def claim(self, key: str, owner: Mapping[str, Any]) -> Claim | None:
        """Try to win the evaluation `key`; None where it is published or a living worker holds it.

        owner: what people and `held` read in the claim, such as step, job id and host.
        """
        if self.result(key) is not None:
            return None
        files = self._claim_files(key)
        last = files.last_generation()
        if last and self._is_alive(files.path(last)):
            return None
        lease = files.take(last + 1, {"key": key, **owner})
        if lease is None:
            return None
        if self.result(key) is not None:  # published between the first look and the link
            lease.release()
            return None
        return Claim(key, lease)

    def publish(self, claim: Claim, result: Mapping[str, Any]) -> bool:
        """Publish the result if none is; False where another worker's result stands (and stays)."""
        text = json.dumps(result, ensure_ascii=False, allow_nan=False)
        published = create_once(self._result_path(claim.key), text, self._drafts)
        claim.lease.release()
        return published

    def result(self, key: str) -> dict[str, Any] | None:
        """The published result, None where there is none yet."""
        try:
            return read_json(self._result_path(key), CheckpointError, "remove it to score again")
        except FileNotFoundError:
            return None

    def held(self) -> list[dict[str, Any]]:
        """What the owners of all living claims wrote into them: what checkpoint rotation must spare.

        A claim that cannot be read is passed over: its checkpoint still lacks a score, and is spared for that.
        """
        claims = (path for path in self._claims.iterdir() if path.suffix[1:].isdecimal())
        newest = {path.stem: path for path in sorted(claims, key=lambda path: int(path.suffix[1:]))}
        unfinished = [path for key, path in newest.items() if not self._result_path(key).exists()]
        return [owner for path in unfinished if (owner := self._living_owner(path)) is not None]

    def _living_owner(self, claim: Path) -> dict[str, Any] | None:
        try:
            return read_json(claim, CheckpointError, "remove it if no eval runs") if self._is_alive(claim) else None
        except (OSError, CheckpointError) as error:
            logger.warning("a claim of an eval is passed over: %s", error)
            return None

    def _claim_files(self, key: str) -> LeaseFiles:
        lost = (
            f"{self._claims / key}: the claim ran out and another worker took the evaluation; leave it to that "
            f"worker, or raise eval_claim_timeout_s ({self.lease_seconds:g} s)"
        )
        return LeaseFiles(self._claims, f"{key}.", self._drafts, lost)

    def _result_path(self, key: str) -> Path:
        return self._results / f"{key}.json"

    def _is_alive(self, claim: Path) -> bool:
        return age_of(claim) < self.lease_seconds
