"""Who scores which checkpoint: executed at least once, published exactly once, for any number of workers.

A folder on a shared filesystem, with no server and no lock held:
- `claims/{key}.{n}` is the n-th lease on a job. `link(2)` makes it, so exactly one worker gets it. While its owner
  renews it (mtime) nobody may take n+1; once it is stale, whoever links n+1 first goes on with the job.
- `results/{key}.json` is linked from a finished, synced file if absent. A worker believed dead that comes back
  can finish too, but then finds the result published and changes nothing.
Ages are differences of mtimes that the filesystem itself gave, so clocks of the nodes need not agree.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbu.errors import CheckpointError
from bbu.run.files import sync_folder

_RELEASED = 0.0


@dataclass(frozen=True)
class Claim:
    """A lease on one job, won by this worker; `number` counts the leases the job has had, from 1."""

    key: str
    number: int
    path: Path


def evaluation_key(*, manifest_sha: str, eval_config: Mapping[str, Any], dataset_hash: str, code: str) -> str:
    """The name of one evaluation: SHA-256 over everything its result depends on, in hex.

    manifest_sha: of the checkpoint's MANIFEST.json; dataset_hash: of the ground-truth file; code: commit and
    image digest. Equal inputs give equal keys whatever the order of `eval_config`.
    """
    parts = [manifest_sha, dict(eval_config), dataset_hash, code]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Ledger:
    """Claims and results in `folder` (made where absent).

    lease_seconds: a claim not renewed for so long is taken to be dead; renew at a fraction of it.
    """

    def __init__(self, folder: Path, *, lease_seconds: float = 900.0) -> None:
        self.lease_seconds = lease_seconds
        self._claims, self._results, self._tmp = (folder / name for name in ("claims", "results", "tmp"))
        for path in (self._claims, self._results, self._tmp):
            path.mkdir(parents=True, exist_ok=True)

    def claim(self, key: str, owner: Mapping[str, Any]) -> Claim | None:
        """Try to win the job `key`; None where it is published or somebody alive holds it.

        owner: what people and `held` shall read in the claim, such as checkpoint, job id and host.
        """
        if self.result(key) is not None:
            return None
        number = self._last_number(key)
        if number and self._is_alive(self._claim_path(key, number)):
            return None
        path = self._claim_path(key, number + 1)
        if not self._link_if_absent(path, {"key": key, **owner}):
            return None
        if self.result(key) is not None:  # published between the first look and the link
            os.utime(path, (_RELEASED, _RELEASED))
            return None
        return Claim(key, number + 1, path)

    def renew(self, claim: Claim) -> None:
        """Say that the owner lives. Raises CheckpointError when the lease was lost to another worker."""
        if self._last_number(claim.key) != claim.number:
            raise CheckpointError(
                f"{claim.path}: the lease ran out and another worker took the job; leave it to that worker, "
                f"or give leases longer than {self.lease_seconds:g} s"
            )
        os.utime(claim.path)

    def release(self, claim: Claim) -> None:
        """Give an unfinished job back, so that the next worker need not wait for the lease to run out."""
        os.utime(claim.path, (_RELEASED, _RELEASED))

    def publish(self, claim: Claim, result: Mapping[str, Any]) -> bool:
        """Publish the result if none is; False where another worker's result stands (and stays)."""
        published = self._link_if_absent(self._result_path(claim.key), result)
        self.release(claim)
        return published

    def result(self, key: str) -> dict[str, Any] | None:
        """The published result, None where there is none yet."""
        try:
            return json.loads(self._result_path(key).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def held(self) -> list[dict[str, Any]]:
        """What the owners of all living claims said of themselves: what a checkpoint rotation must spare."""
        newest = {path.stem: path for path in sorted(self._claims.iterdir(), key=_number)}
        alive = [p for key, p in newest.items() if not self._result_path(key).exists() and self._is_alive(p)]
        return [json.loads(path.read_text(encoding="utf-8")) for path in alive]

    def _claim_path(self, key: str, number: int) -> Path:
        return self._claims / f"{key}.{number}"

    def _result_path(self, key: str) -> Path:
        return self._results / f"{key}.json"

    def _last_number(self, key: str) -> int:
        return max((_number(path) for path in self._claims.glob(f"{key}.*")), default=0)

    def _is_alive(self, claim: Path) -> bool:
        probe = self._write_tmp({})
        now = probe.stat().st_mtime
        probe.unlink()
        return now - claim.stat().st_mtime < self.lease_seconds

    def _link_if_absent(self, path: Path, data: Mapping[str, Any]) -> bool:
        source = self._write_tmp(data)
        try:
            os.link(source, path)
        except FileExistsError:
            # On NFS a reply may be lost and the retried call then says so though it was ours: two names tell.
            if source.stat().st_nlink != 2:
                return False
        finally:
            source.unlink()
        sync_folder(path.parent)
        return True

    def _write_tmp(self, data: Mapping[str, Any]) -> Path:
        path = self._tmp / uuid.uuid4().hex
        with path.open("x", encoding="utf-8") as file:
            json.dump(data, file, ensure_ascii=False, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.utime(path)  # the age of a claim counts from now, also when the sync took long
        return path


def _number(claim: Path) -> int:
    return int(claim.suffix[1:])
