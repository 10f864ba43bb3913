"""The run folder: paths, atomic status, and a lease that one trainer at a time can hold."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bbu.errors import CheckpointError
from bbu.run import lease as lease_module
from bbu.run.files import write_atomic
from bbu.run.folder import RunFolder
from bbu.run.lease import Lease, Owner, held_lease


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


def test_the_folder_is_named_after_the_run(tmp_path: Path):
    run = RunFolder.of(tmp_path, "demo")
    assert run.root == tmp_path / "output-demo"
    assert run.checkpoint(30) == run.root / "checkpoint-30"
    assert not run.root.exists()


def test_steps_are_ordered_by_number_and_only_published_names_count(run: RunFolder):
    for name in ("checkpoint-100", "checkpoint-20", "checkpoint-007", ".saving-checkpoint-30", "checkpoint-x"):
        (run.root / name).mkdir()
    (run.root / "checkpoint-40").write_text("a file")
    assert run.steps() == [20, 100]


def test_a_failed_write_leaves_the_old_status_and_no_draft(run: RunFolder):
    run.status.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(run.status, "half \ud800")
    assert run.status.read_text() == "old"
    assert not list(run.root.glob(".status*"))


def test_a_second_trainer_is_refused_and_told_who_holds(run: RunFolder):
    Lease.take(run, owner("7"), timeout_s=60)
    with pytest.raises(CheckpointError, match=r"in use by job 7 .* on elsewhere"):
        Lease.take(run, owner("8"), timeout_s=60)


def test_a_restart_of_the_same_job_takes_over_at_once_but_not_the_same_start(run: RunFolder):
    old = Lease.take(run, owner("7", 0), timeout_s=60)
    with pytest.raises(CheckpointError):
        Lease.take(run, owner("7", 0), timeout_s=60)
    new = Lease.take(run, owner("7", 1), timeout_s=60)
    new.check()
    with pytest.raises(CheckpointError, match="took over"):
        old.heartbeat()


def test_a_lease_without_heartbeat_expires_and_one_with_it_does_not(run: RunFolder):
    lease = Lease.take(run, owner("7"), timeout_s=60)
    make_old(lease, 61)
    lease.heartbeat()
    with pytest.raises(CheckpointError):
        Lease.take(run, owner("8"), timeout_s=60)
    make_old(lease, 61)
    Lease.take(run, owner("8"), timeout_s=60)


def test_a_released_lease_is_free_and_its_late_holder_cannot_release_the_next(run: RunFolder):
    first = Lease.take(run, owner("7"), timeout_s=60)
    first.release()
    second = Lease.take(run, owner("8"), timeout_s=60)
    first.release()
    second.check()
    with pytest.raises(CheckpointError):
        Lease.take(run, owner("9"), timeout_s=60)


def test_a_killed_process_of_this_host_holds_nothing(run: RunFolder):
    code = (
        "import os, sys; from pathlib import Path; from bbu.run.lease import *; from bbu.run.folder import RunFolder\n"
        "Lease.take(RunFolder(Path(sys.argv[1])), Owner.of_this_process({}), 60)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", code, str(run.root)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError):
            Lease.take(run, Owner.of_this_process({}), timeout_s=60)
        holder.kill()
    Lease.take(run, Owner.of_this_process({}), timeout_s=60)


def test_of_many_contenders_for_a_stale_lease_exactly_one_wins(run: RunFolder):
    make_old(Lease.take(run, owner("1"), timeout_s=60), 100)
    code = (
        "import os, sys; from pathlib import Path; from bbu.run.lease import *\n"
        "from bbu.run.folder import RunFolder; from bbu.errors import CheckpointError\n"
        "sys.stdin.readline()\n"
        "try:\n Lease.take(RunFolder(Path(sys.argv[1])), Owner.of_this_process({'SLURM_JOB_ID': sys.argv[2]}), 60)\n"
        "except CheckpointError: print('lost', flush=True)\n"
        "else: print('won', flush=True)\n"
        "sys.stdin.readline()"
    )
    crowd = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(run.root), str(n)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for n in range(2, 8)
    ]  # fmt: skip
    for process in crowd:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = [process.stdout.readline().strip() for process in crowd if process.stdout]
    for process in crowd:
        process.communicate("end\n", timeout=30)
    assert sorted(outcomes) == ["lost"] * 5 + ["won"]


def test_a_contender_with_an_outdated_view_cannot_slip_in_below_the_holder(run: RunFolder, monkeypatch):
    Lease.take(run, owner("7"), timeout_s=60).release()
    holder = Lease.take(run, owner("8"), timeout_s=60)
    real = lease_module._last_generation
    views = iter([lambda folder: 0])  # what it saw before both others came
    monkeypatch.setattr(lease_module, "_last_generation", lambda folder: next(views, real)(folder))
    with pytest.raises(CheckpointError, match="another trainer has just taken"):
        Lease.take(run, owner("9"), timeout_s=60)
    holder.check()
    assert [path.name for path in run.leases.iterdir()] == [holder.path.name]


def test_a_held_lease_beats_by_itself_and_is_given_back(run: RunFolder):
    with held_lease(run, owner("7"), timeout_s=60, interval_s=0.02) as lease:
        make_old(lease, 1000)
        deadline = time.monotonic() + 10
        while time.time() - lease.path.stat().st_mtime > 100 and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(CheckpointError):
            Lease.take(run, owner("8"), timeout_s=60)
    Lease.take(run, owner("8"), timeout_s=60)
