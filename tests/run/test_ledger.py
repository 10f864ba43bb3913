"""The eval ledger under races: executed at least once, published exactly once."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from bbu.errors import CheckpointError
from bbu.run.lease import LeaseFiles
from bbu.run.ledger import Ledger

KEYS = [f"{n:064x}" for n in range(8)]
SPAWN = multiprocessing.get_context("spawn")


def test_a_held_job_is_not_given_twice_and_a_published_one_never_again(tmp_path):
    ledger = Ledger(tmp_path)
    claim = ledger.claim(KEYS[0], {"checkpoint": "checkpoint-5"})
    assert claim is not None
    assert ledger.claim(KEYS[0], {}) is None
    assert ledger.publish(claim, {"f1": 0.5})
    assert ledger.claim(KEYS[0], {}) is None
    assert ledger.result(KEYS[0]) == {"f1": 0.5}


def test_a_released_job_goes_to_the_next_worker_at_once(tmp_path):
    ledger = Ledger(tmp_path)
    first = ledger.claim(KEYS[0], {})
    assert first is not None
    first.lease.release()
    second = ledger.claim(KEYS[0], {})
    assert second is not None and second.lease.generation == 2


def test_held_names_living_claims_only(tmp_path):
    ledger = Ledger(tmp_path)
    claims = [ledger.claim(key, {"checkpoint": key[-1]}) for key in KEYS[:3]]
    assert claims[0] and claims[1]
    ledger.publish(claims[0], {})
    claims[1].lease.release()
    assert [h["checkpoint"] for h in ledger.held()] == ["2"]


def test_a_worker_taken_for_dead_cannot_renew_and_cannot_publish_over_its_successor(tmp_path):
    ledger = Ledger(tmp_path, lease_seconds=60)
    slow = ledger.claim(KEYS[0], {})
    assert slow is not None
    slow.lease.heartbeat()
    os.utime(slow.lease.path, (time.time() - 61, time.time() - 61))
    quick = ledger.claim(KEYS[0], {})
    assert quick is not None
    with pytest.raises(CheckpointError, match="another worker took the evaluation"):
        slow.lease.heartbeat()
    assert ledger.publish(quick, {"by": "quick"})
    assert not ledger.publish(slow, {"by": "slow"})
    assert ledger.result(KEYS[0]) == {"by": "quick"}


def test_a_result_published_while_claiming_leaves_nothing_to_do(tmp_path):
    class Overtaken(Ledger):
        """Between the first look at the results and the link, the owner publishes."""

        def _claim_files(self, key: str) -> LeaseFiles:
            assert owner.publish(held, {"f1": 1.0})
            return super()._claim_files(key)

    owner = Ledger(tmp_path)
    held = owner.claim(KEYS[0], {})
    assert held is not None
    assert Overtaken(tmp_path).claim(KEYS[0], {}) is None
    assert owner.result(KEYS[0]) == {"f1": 1.0}


def test_a_lost_reply_of_link_is_still_a_win(tmp_path, lost_link_replies):
    assert Ledger(tmp_path).claim(KEYS[0], {}) is not None


def test_a_heartbeat_that_a_cached_stat_hides_is_seen(tmp_path, cached_stats):
    ledger = Ledger(tmp_path)
    assert ledger.claim(KEYS[0], {"step": 5}) is not None
    assert ledger.claim(KEYS[0], {}) is None
    assert [owner["step"] for owner in ledger.held()] == [5]


def test_nothing_temporary_stays(tmp_path):
    ledger = Ledger(tmp_path)
    claim = ledger.claim(KEYS[0], {})
    assert claim and ledger.publish(claim, {}) and not list((tmp_path / "tmp").iterdir())


def work(folder: Path, worker: int, start: Any, log: Path) -> None:
    """One worker: try every job until all are published; worker 0 dies holding its first claim."""
    ledger = Ledger(folder, lease_seconds=1.0)
    start.wait()
    while any(ledger.result(key) is None for key in KEYS):
        for key in KEYS:
            claim = ledger.claim(key, {"worker": worker})
            if claim is None:
                continue
            note(log, f"claim {key}.{claim.lease.generation}")
            if worker == 0:
                os._exit(0)
            if ledger.publish(claim, {"worker": worker, "number": claim.lease.generation}):
                note(log, f"publish {key}")
        time.sleep(0.02)


def note(log: Path, line: str) -> None:
    with log.open("a") as file:  # one short O_APPEND write is atomic
        file.write(line + "\n")


def test_many_processes_racing_publish_every_job_exactly_once_though_one_dies(tmp_path):
    start, log = SPAWN.Barrier(8), tmp_path / "log"
    workers = [SPAWN.Process(target=work, args=(tmp_path / "ledger", n, start, log)) for n in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0] * 8
    lines = log.read_text().splitlines()
    assert sorted(line for line in lines if line.startswith("publish")) == [f"publish {key}" for key in KEYS]
    claims = [line for line in lines if line.startswith("claim")]
    assert len(claims) == len(set(claims)) >= len(KEYS)


def claim_once(folder: Path, start: Any, wins: Any) -> None:
    start.wait()
    won = [Ledger(folder).claim(key, {}) is not None for key in KEYS]
    wins.put(won)


def test_of_many_processes_claiming_at_once_exactly_one_wins_each_job(tmp_path):
    start, wins = SPAWN.Barrier(8), SPAWN.Queue()
    workers = [SPAWN.Process(target=claim_once, args=(tmp_path, start, wins)) for _ in range(8)]
    for worker in workers:
        worker.start()
    won = [wins.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert [sum(column) for column in zip(*won, strict=True)] == [1] * len(KEYS)
