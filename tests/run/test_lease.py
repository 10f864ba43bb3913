"""A lease that one process at a time can hold; the run folder's, which one trainer holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bbu.errors import CheckpointError
from bbu.run.folder import RunFolder
from bbu.run.lease import Lease, LeaseFiles, Owner, held_lease, take_run_lease
from tests.commands import ROOT


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.of(tmp_path, "demo").create()


def owner(job_id: str = "7", restarts: int = 0) -> Owner:
    """An owner on some other machine, where no one can see whether it lives."""
    mine = Owner.of_this_process({"SLURM_JOB_ID": job_id, "SLURM_RESTART_COUNT": str(restarts)})
    return replace(mine, place="elsewhere boot pids")


def make_old(lease: Lease, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(lease.path, (then, then))


def test_a_second_trainer_is_refused_and_told_who_holds(run: RunFolder):
    take_run_lease(run, owner("7"), timeout_s=60)
    with pytest.raises(CheckpointError, match=r"in use by job 7 .* on elsewhere"):
        take_run_lease(run, owner("8"), timeout_s=60)


def test_a_restart_of_the_same_job_takes_over_at_once_but_not_the_same_start(run: RunFolder):
    old = take_run_lease(run, owner("7", 0), timeout_s=60)
    with pytest.raises(CheckpointError):
        take_run_lease(run, owner("7", 0), timeout_s=60)
    new = take_run_lease(run, owner("7", 1), timeout_s=60)
    new.check()
    with pytest.raises(CheckpointError, match="took over"):
        old.heartbeat()


def test_a_lease_without_heartbeat_expires_and_one_with_it_does_not(run: RunFolder):
    lease = take_run_lease(run, owner("7"), timeout_s=60)
    make_old(lease, 61)
    lease.heartbeat()
    with pytest.raises(CheckpointError):
        take_run_lease(run, owner("8"), timeout_s=60)
    make_old(lease, 61)
    take_run_lease(run, owner("8"), timeout_s=60)


def test_a_released_lease_is_free_and_its_late_holder_cannot_release_the_next(run: RunFolder):
    first = take_run_lease(run, owner("7"), timeout_s=60)
    first.release()
    second = take_run_lease(run, owner("8"), timeout_s=60)
    first.release()
    second.check()
    with pytest.raises(CheckpointError):
        take_run_lease(run, owner("9"), timeout_s=60)


def holder_process(run: RunFolder, *job_id: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "tests.run.lease_holder", str(run.root), *job_id]
    return subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def send_line(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_killed_process_of_this_host_holds_nothing(run: RunFolder):
    with holder_process(run) as holder:
        send_line(holder)
        assert next_line(holder) == "held"
        with pytest.raises(CheckpointError):
            take_run_lease(run, Owner.of_this_process({}), timeout_s=60)
        holder.kill()
    take_run_lease(run, Owner.of_this_process({}), timeout_s=60)


def test_of_many_contenders_for_a_stale_lease_exactly_one_wins(run: RunFolder):
    make_old(take_run_lease(run, owner("1"), timeout_s=60), 100)
    crowd = [holder_process(run, str(n)) for n in range(2, 8)]
    for process in crowd:
        send_line(process)
    outcomes = [next_line(process) for process in crowd]
    for process in crowd:
        process.communicate("end\n", timeout=30)
    assert sorted(outcomes) == ["held"] + ["refused"] * 5


def test_a_contender_with_an_outdated_view_cannot_slip_in_below_the_holder(run: RunFolder, monkeypatch):
    take_run_lease(run, owner("7"), timeout_s=60).release()
    holder = take_run_lease(run, owner("8"), timeout_s=60)
    real = LeaseFiles.last_generation
    views = iter([lambda files: 0])  # what it saw before both others came
    monkeypatch.setattr(LeaseFiles, "last_generation", lambda files: next(views, real)(files))
    with pytest.raises(CheckpointError, match="another trainer has just taken"):
        take_run_lease(run, owner("9"), timeout_s=60)
    holder.check()
    assert [path.name for path in run.leases.iterdir()] == [holder.path.name]


def test_a_held_lease_beats_by_itself_and_is_given_back(run: RunFolder):
    with held_lease(run, owner("7"), timeout_s=60, interval_s=0.02) as lease:
        make_old(lease, 1000)
        deadline = time.monotonic() + 10
        while time.time() - lease.path.stat().st_mtime > 100 and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(CheckpointError):
            take_run_lease(run, owner("8"), timeout_s=60)
    take_run_lease(run, owner("8"), timeout_s=60)


def test_a_lost_reply_of_link_is_still_a_win(run: RunFolder, lost_link_replies: None):
    lease = take_run_lease(run, owner("7"), timeout_s=60)
    lease.check()
    assert [path.name for path in run.leases.iterdir()] == ["1"]


def test_a_heartbeat_that_a_cached_stat_hides_is_seen(run: RunFolder, cached_stats: None):
    take_run_lease(run, owner("7"), timeout_s=60)
    with pytest.raises(CheckpointError, match="in use by job 7"):
        take_run_lease(run, owner("8"), timeout_s=60)


def test_a_lease_that_an_older_version_gave_back_is_free_and_one_that_it_holds_is_not(run: RunFolder):
    run.leases.mkdir()
    held = {"released": False, **vars(owner("7"))}
    (run.leases / "4").write_text(json.dumps(held))
    with pytest.raises(CheckpointError, match="in use by job 7"):
        take_run_lease(run, owner("8"), timeout_s=60)
    (run.leases / "4").write_text('{"released": true}')
    assert take_run_lease(run, owner("8"), timeout_s=60).generation == 5


def test_an_older_version_can_take_a_lease_that_was_given_back(run: RunFolder):
    lease = take_run_lease(run, owner("7"), timeout_s=60)
    lease.release()
    assert json.loads(lease.path.read_text())["released"] is False
    assert time.time() - lease.path.stat().st_mtime > 1e9, "it takes what had no heartbeat for so long"
