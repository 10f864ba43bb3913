"""Running jobs here, by submitit's real local executor, and what Slurm would be told."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from bbu.errors import JobError
from bbu.jobs.clusters import ClusterProfile, load_profile
from bbu.jobs.executor import dry_run, slurm_parameters, submit
from bbu.jobs.spec import JobSpec

ROOT = Path(__file__).resolve().parents[2]
RANKS = "import os; print(*(os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')), flush=True)"


@pytest.fixture
def profile(tmp_path: Path) -> ClusterProfile:
    path = tmp_path / "site.yaml"
    text = (ROOT / "configs/clusters/local.yaml").read_text()
    text = text.replace("work_folder: jobs", f"work_folder: {tmp_path}/jobs")
    path.write_text(text.replace("signal_seconds: 60", "signal_seconds: 1"))
    return load_profile(str(path))


def job(*programs: str, name: str = "work", nodes: int = 1, after: tuple[str, ...] = ()) -> JobSpec:
    return JobSpec(
        name=name, commands=tuple(("-c", program) for program in programs), nodes=nodes, tasks_per_node=1,
        gpus_per_node=0, cpus_per_task=1, memory_gb=None, time_minutes=1, after=after,
    )  # fmt: skip


def run(profile: ClusterProfile, *specs: JobSpec) -> tuple[list[tuple[str, int | None]], str]:
    told: list[str] = []
    done = submit(specs, profile, ROOT, told.append)
    return [(each.name, each.exit_code) for each in done], "\n".join(told)


def test_a_job_runs_here_and_says_so(profile: ClusterProfile, capfd: pytest.CaptureFixture[str]):
    done, told = run(profile, job("print('hello 世界')"))
    assert done == [("work", 0)] and "no Slurm" in told
    assert capfd.readouterr().out == "hello 世界\n"


def test_nodes_asked_for_become_ranks_on_this_machine(profile: ClusterProfile, tmp_path: Path):
    done, told = run(profile, job(RANKS, nodes=2))
    assert done == [("work", 0)] and "2 nodes asked for" in told
    output = [line for file in tmp_path.glob("jobs/*/*.out") for line in file.read_text().splitlines()]
    assert {"0 2 0 127.0.0.1", "1 2 1 127.0.0.1"} <= set(output)


@pytest.mark.parametrize("code", [3, 75])
def test_a_jobs_exit_code_comes_back(profile: ClusterProfile, code: int):
    assert run(profile, job(f"raise SystemExit({code})"))[0] == [("work", code)]


def test_the_jobs_after_a_failed_one_do_not_begin(profile: ClusterProfile, tmp_path: Path):
    second = job(f"open('{tmp_path}/began', 'w')", name="second", after=("first",))
    done, told = run(profile, job("raise SystemExit(4)", name="first"), second)
    assert done == [("first", 4)] and "exit code 4" in told and not (tmp_path / "began").exists()


def test_the_elements_of_an_array_run_in_turn(profile: ClusterProfile, capfd: pytest.CaptureFixture[str]):
    run(profile, job("print(0)", "print(1)", "print(2)"))
    assert capfd.readouterr().out == "0\n1\n2\n"


def test_when_one_rank_fails_the_others_are_ended(profile: ClusterProfile):
    program = "import os, time; os._exit(9) if os.environ['RANK'] == '1' else time.sleep(300)"
    assert run(profile, job(program, nodes=2))[0] == [("work", 9)]


def test_a_dry_run_touches_nothing(profile: ClusterProfile, tmp_path: Path):
    text = dry_run((job("pass"), job("pass", name="next", after=("work",))), profile, ROOT)
    assert "next: 1 x 1 nodes x 1 tasks on local after work" in text
    assert not (tmp_path / "jobs").exists()


def test_slurm_is_told_what_profile_and_job_say():
    profile = load_profile("example")
    told = slurm_parameters(job("pass", nodes=2), profile, ("7", "8"))
    assert (told["nodes"], told["partition"], told["account"]) == (2, "gpu", "my-project")
    assert told["dependency"] == "afterok:7:8" and told["signal_delay_s"] == 120
    assert "qos" not in told and "mem" not in told and "gpus_per_node" not in told
    assert {"--cpus-per-task=1", "--kill-on-bad-exit=1"} <= set(told["srun_args"])


def test_a_slurm_profile_without_slurm_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(JobError, match="--cluster local"):
        submit((job("pass"),), load_profile("example"), ROOT, print)


def test_a_job_cannot_wait_for_one_that_does_not_come_before_it(profile: ClusterProfile):
    with pytest.raises(JobError, match="does not come before it"):
        run(profile, job("pass", after=("later",)))


@pytest.mark.parametrize("change", [{"nodes": 0}, {"programs": ()}])
def test_a_job_that_could_never_run_is_refused(change: dict):
    with pytest.raises(JobError):
        job(*change.pop("programs", ("pass",)), **change)


def test_ctrl_c_lets_the_job_save_before_it_is_raised(profile: ClusterProfile, tmp_path: Path):
    program = (
        "import os, pathlib, signal, sys, time\n"
        f"def save(*args): pathlib.Path('{tmp_path}/saved').touch(); sys.exit(75)\n"
        f"signal.signal(signal.SIGTERM, save); pathlib.Path('{tmp_path}/ready').touch(); time.sleep(60)"
    )
    interrupt = threading.Thread(target=interrupt_when, args=(tmp_path / "ready",))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        run(profile, job(program))
    interrupt.join()
    assert (tmp_path / "saved").exists()


def interrupt_when(ready: Path) -> None:
    while not ready.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)
