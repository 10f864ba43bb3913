"""Running jobs here, by submitit's real local executor, and what Slurm would be told."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from bbu.errors import JobError
from bbu.jobs.clusters import ClusterProfile, load_profile
from bbu.jobs.launch import Submission
from bbu.jobs.slurm import sbatch_options, slurm_parameters
from bbu.jobs.spec import JobSpec, Resources
from bbu.jobs.submission import dry_run_text, submit_jobs

ROOT = Path(__file__).resolve().parents[2]
RANKS = "import os; print(*(os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR')), flush=True)"

NOTHING = Resources(
    partition=None, account=None, qos=None, constraint=None, exclusive=False, gpus_per_node=0, gpu_type=None,
    cpus_per_task=1, memory=None, time_minutes=1, nice=0,
)  # fmt: skip


@pytest.fixture
def profile(tmp_path: Path) -> ClusterProfile:
    path = tmp_path / "site.yaml"
    text = (ROOT / "configs/clusters/local.yaml").read_text()
    text = text.replace("work_folder: jobs", f"work_folder: {tmp_path}/jobs")
    path.write_text(text.replace("signal_seconds: 60", "signal_seconds: 1"))
    return load_profile(str(path))


def job(*programs: str, name: str = "work", nodes: int = 1, after: tuple[str, ...] = ()) -> JobSpec:
    commands = tuple(("-c", program) for program in programs)
    return JobSpec(name=name, commands=commands, nodes=nodes, tasks_per_node=1, resources=NOTHING, after=after)


def run(profile: ClusterProfile, *specs: JobSpec) -> tuple[list[tuple[str, int | None]], str]:
    told: list[str] = []
    done = submit_jobs(specs, profile, ROOT, told.append)
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
    text = dry_run_text((job("pass"), job("pass", name="next", after=("work",))), profile, ROOT)
    assert "### next: 1 tasks on this machine, after work" in text
    assert not (tmp_path / "jobs").exists()


def told_to_slurm(**changes: object) -> dict:
    """slurm_parameters of a job of two nodes that asks for `changes`, on the site of the example."""
    asked = dataclasses.replace(load_profile("example").train, **changes)
    return slurm_parameters(
        dataclasses.replace(job("pass", nodes=2), resources=asked), load_profile("example"), ("7", "8")
    )


def test_slurm_is_told_what_profile_and_job_say():
    told = told_to_slurm()
    assert (told["nodes"], told["partition"], told["account"]) == (2, "gpu", "my-project")
    assert told["dependency"] == "afterok:7:8" and told["signal_delay_s"] == 120 and told["exclusive"] is True
    assert "qos" not in told and "nice" not in told["additional_parameters"]
    assert {"--cpus-per-task=8", "--kill-on-bad-exit=1"} <= set(told["srun_args"])


@pytest.mark.parametrize(
    ("memory", "option"),
    [
        ("512G", ("mem", "512G")),
        ("all", ("mem", "0")),
        ("8G per cpu", ("mem-per-cpu", "8G")),
        ("64G per gpu", ("mem-per-gpu", "64G")),
    ],
)
def test_memory_is_asked_for_per_node_cpu_or_gpu(memory: str, option: tuple[str, str]):
    assert option in told_to_slurm(memory=memory)["additional_parameters"].items()


def test_gpus_are_asked_for_per_node_by_either_name_and_never_per_task():
    asked = dataclasses.replace(load_profile("example").train, gpu_type="a100")
    assert sbatch_options(asked, "gpus-per-node").count("--gpus-per-node=a100:8") == 1
    assert sbatch_options(asked, "gres").count("--gres=gpu:a100:8") == 1
    assert not [option for option in sbatch_options(asked, "gres") if "per-task=a100" in option]


def test_nobody_waits_for_a_job_to_end_well_who_does_not_mind():
    spec = dataclasses.replace(job("pass"), after_any=True)
    assert slurm_parameters(spec, load_profile("example"), ("7",))["dependency"] == "afterany:7"


def test_an_array_too_big_for_the_site_becomes_several():
    whole = job(*(f"print({n})" for n in range(45)))
    assert [len(part.commands) for part in whole.chunks(20)] == [20, 20, 5]
    assert [command for part in whole.chunks(20) for command in part.commands] == list(whole.commands)


def test_an_element_is_found_in_its_part_of_a_cut_array():
    first, second, last = (
        Submission("train", (str(n),), (), None, 20 * n, size) for n, size in ((0, 20), (1, 20), (2, 1))
    )
    assert [part.has(20) for part in (first, second, last)] == [False, True, False]
    assert (first.element(19), second.element(20), last.element(40)) == (19, 0, None)


def test_a_slurm_profile_without_slurm_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(JobError, match="--cluster local"):
        submit_jobs((job("pass"),), load_profile("example"), ROOT, print)


def test_a_job_cannot_wait_for_one_that_does_not_come_before_it(profile: ClusterProfile):
    with pytest.raises(JobError, match="does not come before it"):
        run(profile, job("pass", after=("later",)))


def test_all_elements_of_an_array_run_though_one_fails(profile: ClusterProfile, capfd: pytest.CaptureFixture[str]):
    assert run(profile, job("raise SystemExit(4)", "print(1)"))[0] == [("work", 4)]
    assert capfd.readouterr().out == "1\n"


def test_a_job_that_does_not_mind_runs_after_a_failed_one(profile: ClusterProfile):
    second = dataclasses.replace(job("pass", name="second", after=("first",)), after_any=True)
    assert run(profile, job("raise SystemExit(4)", name="first"), second)[0] == [("first", 4), ("second", 0)]


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
    # as in a shell; a worker of xdist ignores Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = threading.Thread(target=interrupt_when, args=(tmp_path / "ready",))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        run(profile, job(program))
    interrupt.join()
    signal.signal(signal.SIGINT, before)
    assert (tmp_path / "saved").exists()


def interrupt_when(ready: Path) -> None:
    while not ready.exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)
