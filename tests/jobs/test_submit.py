"""`python -m bbu.submit`: which jobs a command line becomes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bbu.errors import JobError
from bbu.jobs.clusters import load_profile
from bbu.jobs.launch import Submission
from bbu.jobs.plan import load_request_config, missing_inputs, plan_jobs
from bbu.jobs.records import append_records, job_record
from bbu.jobs.request import parse_request, split_job
from bbu.jobs.spec import JobSpec
from bbu.run.folder import RunFolder
from bbu.submit import main
from tests.conftest import SlurmSays

ROOT = Path(__file__).resolve().parents[2]


def planned(*argv: str, cluster: str = "test", config: tuple[str, ...] = ("--config", "smoke")) -> dict[str, JobSpec]:
    request = parse_request([*argv, *config])
    profile, run = load_profile(cluster, {"BBU_IMAGE": "/image.sif"}), load_request_config(request)
    return {job.name: job for job in plan_jobs(request, profile, run, missing_inputs(request, profile, run))}


def test_help_loads_neither_torch_nor_submitit():
    code = (
        "import runpy, sys\nsys.argv = ['submit', '--help']\n"
        "try: runpy.run_module('bbu.submit', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'submitit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n") and "--cluster" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("argv", "present", "absent"),
    [
        (["--help"], ["logs RUN", "--nodes", "COMMAND --help"], ["--every"]),
        (["train", "--help"], ["--nodes", "--sweep", "--demo"], ["--every", "RUN"]),
        (["convert", "--help"], ["--demo", "--cluster"], ["--nodes", "--gpus-per-node", "--every", "--sweep"]),
        (["eval", "--help"], ["RUN", "--every", "--gpus-per-node"], ["--nodes", "--sweep", "--demo"]),
        (["pipeline", "--help"], ["--nodes", "--sweep", "--demo"], ["--every"]),
        (["cancel", "--help"], ["RUN"], ["--nodes", "--config"]),
    ],
)
def test_the_help_of_a_command_shows_what_applies_to_it(
    capsys: pytest.CaptureFixture[str], argv: list[str], present: list[str], absent: list[str]
):
    with pytest.raises(SystemExit):
        main(argv)
    text = capsys.readouterr().out
    assert all(word in text for word in present) and not any(word in text for word in absent)


@pytest.mark.parametrize(
    "argv", [["eval", "output-a"], ["output-a", "eval"], ["--config", "train", "eval", "output-a"]]
)
def test_the_job_may_stand_anywhere_among_the_arguments(argv: list[str]):
    job, words = split_job(argv) if argv[0] != "output-a" else split_job(["--config", "smoke", *argv])
    assert job == "eval" and words[-1] == "output-a"


@pytest.fixture
def with_slurm(tmp_path: Path, slurm_says: SlurmSays, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has Slurm, and a person who names no cluster."""
    slurm_says("sbatch", "")
    monkeypatch.delenv("BBU_CLUSTER", raising=False)


@pytest.mark.parametrize("job", ["train", "convert", "eval", "pipeline"])
def test_where_slurm_is_and_no_cluster_is_named_the_person_is_told_what_runs_here(
    with_slurm: None, capsys: pytest.CaptureFixture[str], job: str
):
    main([job, "--config", "smoke", "--dry-run"])
    assert capsys.readouterr().err == "bbu.submit: running on this machine; --cluster NAME submits to Slurm\n"
    main([job, "--config", "smoke", "--dry-run", "--cluster", "local"])
    assert capsys.readouterr().err == ""


def test_several_nodes_without_a_cluster_are_refused_where_slurm_is(with_slurm: None):
    with pytest.raises(JobError, match="--nodes 2 without --cluster would run on this machine alone"):
        main(["--nodes", "2", "--config", "smoke", "--dry-run"])
    main(["--nodes", "2", "--config", "smoke", "--dry-run", "--cluster", "local"])


def test_train_is_the_default():
    jobs = planned("--nodes", "2")
    assert list(jobs) == ["train"]
    assert jobs["train"].commands == (("-m", "bbu.train", "--config", "smoke"),)
    assert (jobs["train"].nodes, jobs["train"].tasks_per_node) == (2, 1)


def test_there_is_one_task_per_gpu():
    job = planned("--gpus-per-node", "4")["train"]
    assert (job.tasks_per_node, job.resources.gpus_per_node) == (4, 4)


def test_overrides_reach_every_stage():
    jobs = planned("pipeline", "--set", "seed=7")
    commands = [command for job in jobs.values() for command in job.commands]
    assert all(command[4:6] == ("--set", "seed=7") for command in commands)


def test_the_run_config_says_how_often_a_job_is_requeued():
    assert planned("--set", "max_requeues=3")["train"].max_requeues == 3


def test_the_sectioned_form_reaches_every_stage():
    jobs = planned("pipeline", config=("--config", "base_flat_v2", "--use-new-config"), cluster="local")
    assert all("--use-new-config" in command for job in jobs.values() for command in job.commands)


def test_the_pipeline_goes_from_photos_to_scores():
    jobs = planned("pipeline", "--nodes", "2")
    waits = {name: job.after for name, job in jobs.items()}
    assert waits == {"convert": (), "merge": ("convert",), "train": ("merge",), "eval": ("train",)}
    shards = [command[-1] for command in jobs["convert"].commands]
    assert shards == [f"{index}/8" for index in range(8)]
    assert jobs["eval"].commands[0][-2] == "--pending"
    assert Path(jobs["eval"].commands[0][-1]).name == "output-smoke"


def test_on_one_machine_the_conversion_is_whole():
    assert list(planned("pipeline", cluster="local")) == ["convert", "train", "eval"]


def test_the_demo_comes_first_and_makes_only_what_is_missing(tmp_path: Path):
    rooms = ["--set", f"vendor_dir={tmp_path}/rooms", "--set", f"model_path={tmp_path}"]
    jobs = planned("pipeline", "--demo", *rooms)
    assert jobs["demo"].commands == (("-m", "bbu.demo", "--out", f"{tmp_path}/rooms"),)
    assert next(iter(jobs)) == "demo" and jobs["convert"].after == ("demo",)


def test_the_demo_builds_the_tiny_model_with_the_configs_seed_unless_it_is_there(tmp_path: Path):
    rooms = ["--set", f"vendor_dir={tmp_path}", "--set", "seed=7"]
    model = ["--set", f"model_path={tmp_path}/model"]
    build = ("-m", "bbu.models.tiny", "--out", f"{tmp_path}/model", "--seed", "7")
    assert planned("pipeline", "--demo", *rooms, *model, cluster="local")["demo"].commands == (build,)
    (tmp_path / "model").mkdir()
    assert "demo" not in planned("pipeline", "--demo", *rooms, *model, cluster="local")


def test_a_dry_run_prints_and_submits_nothing(capsys: pytest.CaptureFixture[str]):
    assert main(["--config", "smoke", "--dry-run", "--cluster", "local"]) == 0
    assert "-m bbu.train --config smoke" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "no_such"], "no_such"),
        (["--config", "smoke", "--cluster", "no_such"], "no cluster profile"),
        (["--config", "smoke", "--set", "sed=1"], "sed"),
        (["--config", "smoke", "--nodes", "0"], "nodes is 0"),
        (["train", "output-a", "--config", "smoke"], "run folders are for eval"),
        (["train", "--every", "30m", "--config", "smoke"], "--every is for eval"),
        (["eval", "--sweep", "seed=1,2", "--config", "smoke"], "--sweep is for train, pipeline; leave it out for eval"),
        (["eval", "--nodes", "2"], "--nodes is for train, pipeline"),
        (["--config", "smoke", "convert", "--gpus-per-node", "2"], "--gpus-per-node is for train, eval, pipeline"),
        (["eval", "--demo"], "--demo is for train, convert, pipeline"),
        (["trian", "--nodes", "2"], "no job 'trian'"),
        (["resmue", "a"], "did you mean 'resume'?"),
        (["eval", "--every", "30m", "--config", "smoke", "--cluster", "local"], "--every needs a Slurm profile"),
        (["eval", "output-typo"], "not a run folder"),
        (["--config", "smoke", "--set", "response_types=[a"], "not a value in YAML"),
        (["eval", "--every", "7m", "--config", "smoke"], "write minutes that divide an hour"),
    ],
)
def test_what_cannot_be_submitted_is_refused_in_one_line(argv: list[str], message: str):
    line = [sys.executable, "-m", "bbu.submit", *argv, "--dry-run"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.fixture
def by_dependency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A profile of a site with neither scrontab nor jobs that submit jobs, in a folder with one run, of job 7."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs/clusters/example.yaml").read_text()
    (tmp_path / "site.yaml").write_text(text.replace("eval_schedule: auto", "eval_schedule: dependency"))
    done = Submission("train", ("7",), (tmp_path,), None)
    append_records(RunFolder(tmp_path / "output-a"), [job_record(done, parse_request(["--cluster", "site.yaml"]))])
    return "site.yaml"


@pytest.mark.parametrize(("state", "waits"), [("RUNNING", True), ("COMPLETED", False)])
def test_evals_by_dependency_follow_each_training_job_that_has_not_ended(
    by_dependency: str, slurm_says: SlurmSays, capsys: pytest.CaptureFixture[str], state: str, waits: bool
):
    slurm_says("squeue", f"7|N/A|{state}|None|0|0:0|bbu-train|7|\n")
    assert main(["eval", "output-a", "--every", "30m", "--cluster", by_dependency, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert ("#SBATCH --dependency=afterany:7" in printed) is waits
    assert f"bbu.eval --pending {Path.cwd()}/output-a" in printed
