"""Running jobs on this machine, by submitit's real local executor."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from bbu.jobs.clusters import ClusterProfile, load_profile
from bbu.jobs.spec import JobSpec
from bbu.jobs.submission import submit_jobs
from tests.jobs.jobs import CHECKOUT, DONE, job


@pytest.fixture
def profile(tmp_path: Path) -> ClusterProfile:
    """This machine, with its logs in the test's folder and one second for a task to stop."""
    path = tmp_path / "site.yaml"
    text = (CHECKOUT / "configs/clusters/local.yaml").read_text()
    text = text.replace("work_folder: jobs", f"work_folder: {tmp_path}/jobs")
    path.write_text(text.replace("signal_seconds: 60", "signal_seconds: 1"))
    return load_profile(str(path))


def run(profile: ClusterProfile, *specs: JobSpec) -> tuple[list[tuple[str, int | None]], str]:
    """Run jobs; name and exit code of each that began, and the notices."""
    notices: list[str] = []
    submissions = submit_jobs(specs, profile, CHECKOUT, notices.append)
    return [(each.name, each.exit_code) for each in submissions], "\n".join(notices)


def test_a_job_runs_here_and_says_so(profile: ClusterProfile, capfd: pytest.CaptureFixture[str]):
    codes, notices = run(profile, job(("print_words.py", "hello", "世界")))
    assert codes == [("work", 0)] and "no Slurm" in notices
    assert capfd.readouterr().out == "hello 世界\n"


def test_requested_nodes_become_ranks_on_this_machine(profile: ClusterProfile, tmp_path: Path):
    codes, notices = run(profile, job(("print_rank.py",), nodes=2))
    assert codes == [("work", 0)] and "2 nodes requested" in notices
    lines = [line for file in tmp_path.glob("jobs/*/*.out") for line in file.read_text().splitlines()]
    assert {"0 2 0 127.0.0.1", "1 2 1 127.0.0.1"} <= {" ".join(line.split()[:4]) for line in lines}


@pytest.mark.parametrize("code", [3, 75])
def test_a_jobs_exit_code_comes_back(profile: ClusterProfile, code: int):
    assert run(profile, job(("leave.py", str(code))))[0] == [("work", code)]


def test_the_jobs_after_a_failed_one_do_not_begin(profile: ClusterProfile, tmp_path: Path):
    second = job(("touch.py", f"{tmp_path}/began"), name="second", after=("first",))
    codes, notices = run(profile, job(("leave.py", "4"), name="first"), second)
    assert codes == [("first", 4)] and "exit code 4" in notices and not (tmp_path / "began").exists()


def test_a_job_with_after_any_runs_after_a_failed_one(profile: ClusterProfile):
    second = dataclasses.replace(job(DONE, name="second", after=("first",)), after_any=True)
    assert run(profile, job(("leave.py", "4"), name="first"), second)[0] == [("first", 4), ("second", 0)]


def test_the_elements_of_an_array_run_in_turn(profile: ClusterProfile, capfd: pytest.CaptureFixture[str]):
    run(profile, job(*(("print_words.py", str(n)) for n in range(3))))
    assert capfd.readouterr().out == "0\n1\n2\n"


def test_all_elements_of_an_array_run_though_one_fails(profile: ClusterProfile, capfd: pytest.CaptureFixture[str]):
    assert run(profile, job(("leave.py", "4"), ("print_words.py", "1")))[0] == [("work", 4)]
    assert capfd.readouterr().out == "1\n"


def test_when_one_rank_fails_the_others_are_ended(profile: ClusterProfile):
    assert run(profile, job(("fail_on_rank_1.py",), nodes=2))[0] == [("work", 9)]


def test_ctrl_c_lets_the_job_save_before_it_is_raised(profile: ClusterProfile, tmp_path: Path):
    # as in a shell; a worker of xdist ignores Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = threading.Thread(target=interrupt_when_there, args=(tmp_path / "ready",))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        run(profile, job(("save_on_term.py", str(tmp_path))))
    interrupt.join()
    signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists()


def test_a_reader_that_leaves_lets_the_job_stop_as_ctrl_c_does(
    profile: ClusterProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class ClosedPipe(io.StringIO):
        def write(self, text: str) -> int:
            if text:
                raise BrokenPipeError
            return 0

    monkeypatch.setattr("sys.stdout", ClosedPipe())
    with pytest.raises(BrokenPipeError):
        run(profile, job(("wait_for_stop.py",)))
    [log] = tmp_path.glob("jobs/*/*.out")
    assert "caught SIGTERM" in log.read_text()


def interrupt_when_there(file: Path) -> None:
    while not file.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)
