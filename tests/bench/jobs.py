"""Submitting, requeueing and looking, on the real test cluster (root, Debian 12); bare sbatch beside it."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate

from tests.cluster import testbed
from tests.cluster.conftest import session_folder
from tests.cluster.testbed import Cluster
from tests.cluster.user import User, wait_until

SHARDS, RUNS, REPEATS = 1000, 100, 5


def run() -> str:
    testbed.require_machine()
    started = "cluster: started" in testbed.script("up.sh")
    shared = session_folder(testbed.prefix(), "bbu")
    image = testbed.build_image(testbed.prefix(), "bbu", testbed.copy_tree(shared, "bbu"))
    try:
        user = User(Cluster(testbed.prefix(), "bbu", shared, image))
        rows = [*submission(user), shards(user), status(user), requeue(user)]
    finally:
        shutil.rmtree(shared, ignore_errors=True)
        if started:
            testbed.script("down.sh")
    return tabulate(rows, headers=["what", "seconds", "beside it", "seconds"], floatfmt=".2f")


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def submission(user: User) -> list[list]:
    """One job, held back by a dependency that waits; the median of some."""
    hold = user.sbatch("--hold", "--wrap", "true")
    bare = ["--job-name=bare", f"--dependency=afterok:{hold}", "--wrap", "true"]
    theirs = statistics.median(timed(lambda: user.sbatch(*bare)) for _ in range(REPEATS))
    ours = statistics.median(
        timed(lambda n=n: user.submit("--set", f"run_name=bench{n}", "--set", "max_steps=1")) for n in range(REPEATS)
    )
    user.cluster.run(["scancel", "--me"])
    return [["bbu.submit of one job", ours, "bare sbatch", theirs], ["overhead of submit", ours - theirs, "", None]]


def shards(user: User) -> list:
    """A conversion in as many shards as the first cluster's arrays may have; bare sbatch of the same array."""
    profile = user.profile("thousand", convert_tasks=SHARDS, convert={"time_minutes": 1})
    hold = user.sbatch("--hold", "--wrap", "true")
    array = ["--array", f"0-{SHARDS - 1}", f"--dependency=afterok:{hold}", "--wrap", "true"]
    theirs = timed(lambda: user.sbatch(*array))
    (user.checkout / "demo/vendor").mkdir(parents=True)
    (user.checkout / "demo/vendor/a.json").write_text("{}")
    ours = timed(lambda: user.submit("convert", "--cluster", profile))
    user.cluster.run(["scancel", "--me"])
    shutil.rmtree(user.checkout / "demo")
    return [f"{SHARDS} shards and a merge", ours, "bare sbatch of such an array", theirs]


def status(user: User) -> list:
    """Many runs, each with jobs, a sound checkpoint and scores; a bare squeue beside it."""
    for number in range(RUNS):
        make_run(user.checkout / f"output-many{number}", str(10_000 + number))
    ours = timed(lambda: user.call("status", *(f"output-many{number}" for number in range(RUNS))))
    theirs = timed(lambda: user.cluster.run(["squeue", "--me"]))
    for folder in user.checkout.glob("output-*"):
        shutil.rmtree(folder)
    return [f"bbu.status on {RUNS} runs", ours, "bare squeue", theirs]


def make_run(folder: Path, job: str) -> None:
    from bbu.jobs.launch import Submission
    from bbu.jobs.records import append_records, job_record
    from bbu.jobs.request import parse_request
    from bbu.run.folder import RunFolder
    from bbu.run.status import RunStatus, write_status
    from tests.checkpoints import publishing

    made = RunFolder(folder).create()
    made.config.write_text((Path(__file__).parents[2] / "configs/smoke.yaml").read_text())
    request = parse_request(["--config", "smoke", "--cluster", "test"])
    submissions = [Submission(name, (job,), (), None) for name in ("convert", "train", "eval")]
    append_records(made, [job_record(submission, request) for submission in submissions])
    write_status(made, RunStatus(phase="completed", step=60, max_steps=60, loss=1.0))
    for step in (20, 40, 60):
        with publishing(made, step) as staged:
            for name in ("model.safetensors", "optimizer.pt", "config.json", "rng_state.pth", "tokenizer.json"):
                (staged / name).write_bytes(b"0" * 1000)
        for source in ("answer", "head", "both"):
            metrics = made.eval / f"checkpoint-{step}/{source}-0/metrics.json"
            metrics.parent.mkdir(parents=True)
            headline = {"precision": 0.5, "recall": 0.5, "f1": 0.5}
            metrics.write_text(json.dumps({"step": step, "headline": headline, "labels": ["x" * 100] * 100}))


def requeue(user: User) -> list:
    """From the signal to a job in the queue again and its checkpoint published: the real trainer on two nodes."""
    user.assert_completed(
        user.submit("convert", "--demo", "--cluster", user.profile("whole", convert_tasks=1))["convert"]
    )
    job = user.submit("--nodes", "2", "--set", "run_name=signalled", "--set", "max_steps=5000")["train"]
    user.wait_for(job, "step 5/5000")
    start = time.perf_counter()
    user.cluster.run(["scancel", "--signal=USR2", job])
    folder = user.run_folder("signalled")

    def back() -> bool:
        shown = user.cluster.run(["scontrol", "show", "job", "-o", job]).stdout
        saved = list(folder.glob("checkpoint-*/MANIFEST.json"))
        return bool(saved) and bool(re.search(r"JobState=PENDING .*Restarts=1 ", shown))

    wait_until(back, 60, lambda: user.output(job)[-2000:])
    seconds = time.perf_counter() - start
    user.cluster.run(["scancel", "--me"])
    return ["signal to requeued, with a checkpoint", seconds, "", None]
