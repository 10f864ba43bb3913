"""The main job on real Slurm, in the real image, as an ordinary user: photos in, scored checkpoints out."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from bbu.run.checkpoints import verify
from tests.cluster.testbed import Cluster
from tests.cluster.user import User, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]

ZERO = ("--set", "deepspeed_enabled=true")


@pytest.fixture(scope="module")
def user(cluster: Cluster) -> User:
    return User(cluster)


@pytest.fixture(scope="module")
def pipeline(user: User) -> dict[str, str]:
    """The whole job, done: name of each job -> its id."""
    jobs = user.submit("pipeline", "--demo", "--nodes", "2", *ZERO)
    for job in jobs.values():
        user.assert_completed(job)
    return jobs


def test_the_pipeline_runs_its_jobs_in_order(user: User, pipeline: dict[str, str]) -> None:
    assert list(pipeline) == ["demo", "convert", "merge", "train", "eval"]
    text = user.cluster.run(["sacct", "-XnPo", "JobID,Start,End", "-j", ",".join(pipeline.values())]).stdout
    times = {}
    for job, start, end in (line.split("|") for line in text.splitlines()):
        times.setdefault(job.partition("_")[0], []).append((start, end))
    assert len(times[pipeline["convert"]]) == 8
    spans = [(min(s for s, _ in times[job]), max(e for _, e in times[job])) for job in pipeline.values()]
    assert all(before[1] <= after[0] for before, after in pairwise(spans)), spans


def test_zero2_trained_across_both_nodes_inside_the_image(user: User, pipeline: dict[str, str]) -> None:
    run = user.run_folder("smoke")
    start = json.loads((run / "provenance.json").read_text())["starts"][0]
    assert start["image_sha256"] == (user.cluster.image.with_suffix(".sif.sha256")).read_text().split()[0]
    assert start["job"]["SLURM_JOB_NODELIST"] == "n[1-2]" and start["job"]["SLURM_JOB_ID"] == pipeline["train"]
    for step in (3, 6):
        manifest = verify(run / f"checkpoint-{step}")
        assert (manifest.world_size, manifest.image_digest) == (2, start["image_sha256"])
        shards = [name for name in manifest.files if name.endswith("optim_states.pt")]
        assert len(shards) == 2, shards
    assert json.loads((run / "status.json").read_text())["phase"] == "completed"


def test_a_separate_eval_job_scored_each_checkpoint(user: User, pipeline: dict[str, str]) -> None:
    scored = sorted(user.run_folder("smoke").glob("eval/checkpoint-*/*/metrics.json"))
    assert [path.parts[-3] for path in scored] == ["checkpoint-3", "checkpoint-6"]
    metrics = json.loads(scored[1].read_text())
    assert metrics["step"] == 6 and metrics["images"]["not_predicted"] == 0 and metrics["images"]["total"] > 0
    assert "run folder:" in user.output(pipeline["eval"])


def test_the_array_and_its_merge_give_the_same_bytes_as_one_process(user: User, pipeline: dict[str, str]) -> None:
    argv = [user.cluster.python, "-m", "bbu.convert", "--config", "smoke", "--set", "data_root=demo/whole"]
    user.cluster.run(argv, cwd=user.checkout)
    assert contents(user.checkout / "demo/data") == contents(user.checkout / "demo/whole") != {}


def test_the_templates_convert_as_an_array_train_and_score(user: User, pipeline: dict[str, str]) -> None:
    arguments = ("--config", "smoke", "--set", "data_root=demo/templates", "--set", "run_name=templates")
    array = user.sbatch("--array=0-3", "slurm/convert.sbatch", *arguments)
    merge = user.sbatch(f"--dependency=afterok:{array}", "slurm/convert.sbatch", *arguments, "--merge", "4")
    train = user.sbatch("-N2", f"--dependency=afterok:{merge}", "slurm/train.sbatch", *arguments)
    score = user.sbatch(f"--dependency=afterok:{train}", "slurm/eval.sbatch", "--pending", "output-templates")
    for job in (array, merge, train, score):
        user.assert_completed(job)
    assert contents(user.checkout / "demo/data") == contents(user.checkout / "demo/templates")
    assert len(list(user.run_folder("templates").glob("eval/checkpoint-*/*/metrics.json"))) == 2


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and ".shards" not in path.parts)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


@pytest.mark.parametrize(("signal", "way"), [("USR1", "submit"), ("USR2", "sbatch")])
def test_a_signal_saves_on_every_rank_at_one_step_requeues_and_the_run_ends_as_planned(
    user: User, pipeline: dict[str, str], signal: str, way: str
) -> None:
    name = f"{way}-{signal}"
    settings = [*ZERO, "--set", f"run_name={name}", "--set", "max_steps=60", "--set", "save_steps=1000"]
    if way == "submit":
        job = user.submit("--nodes", "2", *settings)["train"]
    else:
        job = user.sbatch("-N2", "slurm/train.sbatch", "--config", "smoke", *settings)
    user.wait_for(job, "step 2/60")
    user.cluster.run(["scancel", f"--signal={signal}", job])
    user.assert_completed(job)
    run = user.run_folder(name)
    text = (run / "logs/rank-0.log").read_text() + (run / "logs/rank-1.log").read_text()
    saved = re.findall(r"stopping after step (\d+) of 60", text)
    assert len(saved) == 2 and len(set(saved)) == 1, text
    assert f"resuming from {run}/checkpoint-{saved[0]}" in text.replace("output-", f"{user.checkout}/output-"), text
    assert verify(run / "checkpoint-60").world_size == 2
    starts = json.loads((run / "provenance.json").read_text())["starts"]
    assert [start["job"].get("SLURM_RESTART_COUNT", "0") for start in starts] == ["0", "1"]
    text = user.output(job)
    assert not re.search(rf"step {int(saved[0])}/60.*step {int(saved[0])}/60", text, re.DOTALL), "a step was repeated"


def test_max_requeues_of_the_run_config_holds_for_a_template_too(user: User, pipeline: dict[str, str]) -> None:
    """Requeued once and not twice: the trainer states its cap from inside the container."""
    settings = ("run_name=capped", "max_steps=5000", "save_steps=1000", "max_requeues=1")
    words = [word for setting in settings for word in ("--set", setting)]
    job = user.sbatch("-N2", "slurm/train.sbatch", "--config", "smoke", *words)
    for restarts in (0, 1):
        wait_until(lambda n=restarts: trains_after_restart(user.output(job), n), 120, lambda: user.output(job)[-4000:])
        user.cluster.run(["scancel", "--signal=USR2", job])
    assert user.cluster.wait(job, timeout=120) == "FAILED", user.output(job)
    text, shown = user.output(job), user.cluster.show(job)
    assert "ExitCode=75:0" in shown and "Restarts=1 " in shown, shown
    assert text.count("is requeued") == 1 and "was restarted 1 times, the most allowed (max_requeues)" in text, text
    assert len(list(user.run_folder("capped").glob("checkpoint-*"))) == 2, "both stops saved"


def trains_after_restart(text: str, restarts: int) -> bool:
    """Whether a job reports steps after it was requeued so often."""
    parts = text.split(" and is requeued (restart ")
    return len(parts) == restarts + 1 and "/5000" in parts[-1]
