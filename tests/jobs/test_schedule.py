"""Scheduled evals: when they come, what stands in a scrontab, and how a schedule ends."""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bbu.errors import JobError
from bbu.jobs.clusters import load_profile
from bbu.jobs.launch import CHECKOUT
from bbu.jobs.schedule import (
    Schedule,
    _cron_times,
    _scrontab_entry,
    _without_entry,
    create_schedule,
    interval_minutes,
    remove_run,
)
from tests.conftest import SlurmSays


@pytest.mark.parametrize(
    ("every", "times"),
    [
        ("1m", "* * * * *"),
        ("30m", "*/30 * * * *"),
        ("60m", "0 * * * *"),
        ("1h", "0 * * * *"),
        ("2h", "0 */2 * * *"),
        ("1d", "0 0 * * *"),
    ],
)
def test_an_interval_becomes_the_times_of_a_crontab(every: str, times: str):
    assert _cron_times(interval_minutes(every)) == times


@pytest.mark.parametrize("every", ["7m", "90m", "5h", "2d", "0m", "30", "half an hour", "-5m", "30s"])
def test_what_a_crontab_cannot_keep_evenly_is_refused(every: str):
    with pytest.raises(JobError, match="write minutes that divide an hour"):
        interval_minutes(every)


@pytest.fixture
def schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Schedule:
    monkeypatch.chdir(tmp_path)
    return create_schedule(
        "scrontab", 30, [tmp_path / "output-a", tmp_path / "output-b"], load_profile("example"), CHECKOUT
    )


def test_the_script_is_bash_that_names_the_runs_when_it_starts(schedule: Schedule):
    text = (schedule.folder / "schedule.sh").read_text()
    subprocess.run(["bash", "-n", schedule.folder / "schedule.sh"], check=True)
    assert "#SBATCH --partition=gpu" in text and "#SBATCH --nice=1000" in text and "BBU_NV=1" in text
    assert text.endswith(f'exec bash {CHECKOUT}/slurm/eval.scron "${{runs[@]}}"\n')


def test_an_entry_can_be_taken_out_of_a_scrontab_without_a_trace(schedule: Schedule):
    others = ["MAILTO=me", "# bbu-eval-00000000 begins: another", "0 1 * * * backup", "# bbu-eval-00000000 ends"]
    ours = _scrontab_entry(schedule, load_profile("example"))
    assert f"*/30 * * * * {schedule.folder}/schedule.sh" in ours and "#SCRON --nice=1000" in ours
    disabled = [f"#DISABLED: {line}" if not line.startswith("# ") else line for line in ours]  # what scancel leaves
    for lines in (ours, disabled):
        assert _without_entry([*others[:1], *lines, *others[1:]], schedule.name) == others


def test_a_schedule_ends_with_its_last_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    runs = [tmp_path / "output-a", tmp_path / "output-b"]
    made = create_schedule("resubmit", 60, runs, load_profile("example"), CHECKOUT)
    assert remove_run(made, runs[0])
    assert made.runs() == [str(runs[1])] and not made.end_reason()
    assert not remove_run(made, runs[0])
    assert remove_run(made, runs[1])
    assert made.end_reason() == "cancelled" and not made.runs()


def test_a_scrontab_that_cannot_be_written_leaves_all_as_it_was(schedule: Schedule, slurm_says: SlurmSays):
    runs = [Path(run) for run in schedule.runs()]
    remove_run(schedule, runs[0])
    slurm_says("scrontab", "scrontab: error: the controller is down\n", 1)
    with pytest.raises(JobError, match="scrontab -l failed"):
        remove_run(schedule, runs[1])
    assert schedule.runs() == [str(runs[1])] and not schedule.end_reason()


def test_an_entry_can_be_taken_out_though_the_schedules_folder_is_gone(schedule: Schedule, slurm_says: SlurmSays):
    slurm_says("scrontab", "\n".join(_scrontab_entry(schedule, load_profile("example"))) + "\n")
    run = Path(schedule.runs()[0])
    shutil.rmtree(schedule.folder)
    assert remove_run(schedule, run)


def test_odd_folders_are_quoted_in_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    odd = tmp_path / "my 100% 'dir'"
    odd.mkdir()
    monkeypatch.chdir(odd)
    made = create_schedule("resubmit", 30, [odd / "output-a"], load_profile("example"), CHECKOUT)
    text = (made.folder / "schedule.sh").read_text()
    subprocess.run(["bash", "-n", made.folder / "schedule.sh"], check=True)
    options = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.splitlines() if line.startswith("#SBATCH")]
    assert [f"--chdir={odd}"] in options and [f"--output={str(made.folder).replace('%', '%%')}/%j.out"] in options


def test_jobs_that_submit_each_other_do_not_lengthen_the_path(schedule: Schedule):
    text = (schedule.folder / "schedule.sh").read_text()
    assert "export PATH=" in text and ":$PATH" not in text


def test_without_an_image_it_is_this_python_that_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    bare = dataclasses.replace(load_profile("example"), image=None)
    text = (create_schedule("resubmit", 30, [tmp_path], bare, CHECKOUT).folder / "schedule.sh").read_text()
    assert f"export BBU_PYTHON={sys.executable}\n" in text
