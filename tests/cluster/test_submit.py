"""bbu.jobs and the sbatch templates on real Slurm, in the real image, as an ordinary user."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.testbed import Cluster
from tests.cluster.user import User, eventually

pytestmark = pytest.mark.cluster

SUBMIT = """
import json, sys
from pathlib import Path
from bbu.jobs.clusters import load_profile
from bbu.jobs.submission import submit_jobs
from bbu.jobs.spec import JobSpec
profile = load_profile("test")
specs = tuple(JobSpec(tasks_per_node=1, resources=profile.train, max_requeues=3, name=s["name"],
    nodes=s["nodes"], commands=tuple(tuple(c) for c in s["commands"]),
    after=tuple(s["after"]))
    for s in json.loads(sys.argv[1]))
done = submit_jobs(specs, profile, Path.cwd(), lambda text: None)
print(json.dumps([[each.job_ids[0], str(each.folders[0])] for each in done]))
"""

# Waits for a stop signal on the first start, as a trainer that saves does, and ends well on the second.
TRAINER = """
import os, signal, sys, time
caught = []
for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM): signal.signal(name, lambda *a: caught.append(a[0]))
place = " ".join(os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))
print("start", os.environ.get("SLURM_RESTART_COUNT", "0"), place, flush=True)
if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    deadline = time.monotonic() + 60
    while not caught and time.monotonic() < deadline: time.sleep(0.05)
    time.sleep(0.5)
    import decimal, sqlite3  # from the image, which must still be there
    print("saved", flush=True)
    sys.exit(75 if caught else 1)
"""


@pytest.fixture(scope="module")
def home(cluster: Cluster) -> Path:
    return cluster.checkout()


@pytest.fixture
def env(cluster: Cluster, home: Path) -> dict[str, str]:
    return {"BBU_IMAGE": str(cluster.image), "BBU_HOME": str(home)}


def job(name: str, *programs: str, nodes: int = 1, after: tuple[str, ...] = ()) -> dict:
    return {"name": name, "nodes": nodes, "commands": [["-c", p] for p in programs], "after": after}


def submitted(cluster: Cluster, home: Path, env: dict, *jobs: dict) -> list[tuple[str, Path]]:
    """Submit from the login node; each job's id and log folder."""
    done = cluster.run([cluster.python, "-c", SUBMIT, json.dumps(jobs)], cwd=home, env=env)
    return [(job_id, Path(logs)) for job_id, logs in json.loads(done.stdout)]


def output(logs: Path) -> str:
    return "".join(file.read_text() for file in sorted(logs.glob("*.out")))


def wait_for(read: Callable[[], str], text: str, times: int) -> None:
    eventually(lambda: read().count(text) >= times, 60, read)


@pytest.mark.parametrize("signal", ["USR1", "USR2", "TERM"])
def test_a_signalled_job_saves_on_every_rank_is_requeued_and_goes_on(
    cluster: Cluster, home: Path, env: dict, signal: str
) -> None:
    [(job_id, logs)] = submitted(cluster, home, env, job("train", TRAINER, nodes=2))
    wait_for(lambda: output(logs), "start 0", times=2)
    cluster.run(["scancel", f"--signal={signal}", job_id])
    assert cluster.wait(job_id, timeout=120) == "COMPLETED", output(logs)
    told = output(logs)
    assert told.count("saved\n") == 2 and "requeued (restart 1 of 3)" in told, told
    assert {"start 1 0 2 0 n1", "start 1 1 2 0 n1"} <= set(told.splitlines()), told


def test_an_exit_code_reaches_slurm_unchanged(cluster: Cluster, home: Path, env: dict) -> None:
    [(job_id, logs)] = submitted(cluster, home, env, job("fails", "raise SystemExit(7)"))
    assert cluster.wait(job_id) == "FAILED", output(logs)
    assert "ExitCode=7:0" in cluster.run(["scontrol", "show", "job", job_id]).stdout


def test_jobs_run_in_the_order_of_their_dependencies(cluster: Cluster, home: Path, env: dict) -> None:
    write = "open('shard-{}', 'w')"
    merge = "import glob; print(sorted(glob.glob('shard-*')))"
    array = job("convert", *(write.format(n) for n in range(3)))
    jobs = submitted(cluster, home, env, array, job("merge", merge, after=("convert",)))
    assert cluster.wait(jobs[1][0]) == "COMPLETED", output(jobs[1][1])
    assert "['shard-0', 'shard-1', 'shard-2']" in output(jobs[1][1])


def test_a_job_after_a_failed_one_never_begins(cluster: Cluster, home: Path, env: dict) -> None:
    jobs = submitted(cluster, home, env, job("first", "exit(3)"), job("second", "print(1)", after=("first",)))
    assert cluster.wait(jobs[1][0]) == "CANCELLED"
    assert output(jobs[1][1]) == ""


def test_the_training_template_enters_the_image_with_its_arguments(cluster: Cluster, home: Path, env: dict) -> None:
    job_id = cluster.sbatch("-N2", "slurm/train.sbatch", "--config", "smoke", "--print-config", cwd=home, env=env)
    assert cluster.wait(job_id) == "COMPLETED", cluster.describe(job_id)
    assert "run_name: smoke" in cluster.job_output(job_id)


def test_a_template_passes_an_error_code_through(cluster: Cluster, home: Path, env: dict) -> None:
    job_id = cluster.sbatch("slurm/train.sbatch", "--config", "no_such", cwd=home, env=env)
    assert cluster.wait(job_id) == "FAILED"
    assert "ExitCode=2:0" in cluster.run(["scontrol", "show", "job", job_id]).stdout
    assert "no_such" in cluster.job_output(job_id)


def test_a_template_requeues_what_saved_its_state_up_to_its_cap(cluster: Cluster, home: Path, env: dict) -> None:
    lines = ["#!/bin/bash", ". slurm/job.sh", f"run_tasks python -c '{TRAINER}'", ""]
    (home / "own.sbatch").write_text("\n".join(lines))
    job_id = cluster.sbatch("-N2", "--requeue", "--open-mode=append", "own.sbatch", cwd=home, env=env)
    wait_for(lambda: cluster.job_output(job_id), "start 0", times=2)
    cluster.run(["scancel", "--signal=USR2", job_id])
    assert cluster.wait(job_id, timeout=120) == "COMPLETED", cluster.describe(job_id)
    told = cluster.job_output(job_id)
    assert told.count("saved\n") == 2 and {"start 1 0 2 0 n1", "start 1 1 2 0 n1"} <= set(told.splitlines()), told


def test_a_template_over_its_cap_fails_with_75(cluster: Cluster, home: Path, env: dict) -> None:
    (home / "capped.sbatch").write_text("#!/bin/bash\n. slurm/job.sh\nrun_tasks python -c 'exit(75)'\n")
    job_id = cluster.sbatch("--requeue", "capped.sbatch", cwd=home, env=env | {"BBU_MAX_RESTARTS": "0"})
    assert cluster.wait(job_id) == "FAILED"
    assert "ExitCode=75:0" in cluster.run(["scontrol", "show", "job", job_id]).stdout


@pytest.mark.parametrize("request_by", ["gpus-per-node", "gres"])
def test_gpus_memory_and_whole_nodes_are_asked_for_as_the_profile_says(
    cluster: Cluster, home: Path, env: dict, request_by: str
) -> None:
    """These nodes have two GPUs each, in name only."""
    asked = {"gpus_per_node": 2, "exclusive": True, "memory": "1G per cpu", "nice": 50}
    profile = User(cluster, home).profile(f"gpus-{request_by}", gpu_request=request_by, train=asked)
    show = "import os; print('rank', os.environ['RANK'], 'of', os.environ['SLURM_GPUS_ON_NODE'], 'GPUs', flush=True)"
    line = SUBMIT.replace('load_profile("test")', f'load_profile("{profile}")').replace(
        "tasks_per_node=1", "tasks_per_node=2"
    )
    done = cluster.run([cluster.python, "-c", line, json.dumps([job("gpus", show, nodes=2)])], cwd=home, env=env)
    [[job_id, logs]] = json.loads(done.stdout)
    assert cluster.wait(job_id) == "COMPLETED", output(Path(logs))
    assert sorted(re.findall(r"rank \d of 2 GPUs", output(Path(logs)))) == [f"rank {n} of 2 GPUs" for n in range(4)]
    shown = cluster.run(["scontrol", "show", "job", job_id]).stdout
    assert "MinMemoryCPU=1G" in shown and "OverSubscribe=NO" in shown and "Nice=50" in shown and "gpu:2" in shown, shown
