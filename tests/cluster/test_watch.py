"""Submitting, watching and scheduling on Slurm 24.11, without accounting, with scrontab and small arrays."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.testbed import Cluster
from tests.cluster.user import User, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]

SHARDS = 25
"""More than an array may have here (MaxArraySize=21)."""


@pytest.fixture(scope="module")
def user(newer: Cluster) -> User:
    made = User(newer)
    made.env["BBU_CLUSTER"] = made.profile("small", convert_tasks=SHARDS)
    return made


@pytest.fixture(scope="module")
def converted(user: User) -> str:
    """The id of the merge after a conversion in more shards than one array holds."""
    jobs = user.call("submit", "convert", "--demo", "--config", "smoke").stderr
    ids = re.findall(r"(demo|convert|merge): job (\d+)(?: after (\d+(?:, \d+)*))?", jobs)
    assert [name for name, *_ in ids] == ["demo", "convert", "convert", "merge"], jobs
    (_, first, _), (_, second, _), (_, merge, waits) = ids[1:]
    assert waits == f"{first}, {second}", "the merge waits for both arrays"
    user.assert_completed(merge)
    return merge


@pytest.fixture(scope="module")
def trained(user: User, converted: str) -> Iterator[str]:
    """A run that is trained, and the evals of which come by scrontab from before it began."""
    job = user.submit("--set", "run_name=watched", "--set", "save_steps=3")["train"]
    text = user.call("submit", "eval", "--every", "1m", "output-watched").stderr
    assert "by scrontab" in text, text
    user.assert_completed(job)
    yield job
    user.call("submit", "cancel", "output-watched")


def status(user: User, run: str = "output-watched") -> dict:
    return json.loads(user.call("status", run, "--json").stdout)[0]


def test_an_array_bigger_than_the_site_allows_is_cut_and_makes_the_same_shards(user: User, converted: str) -> None:
    shards = list((user.checkout / f"demo/data/.shards/of-{SHARDS}").glob("*.jsonl"))
    assert len(shards) == SHARDS and (user.checkout / "demo/data/train.jsonl").stat().st_size


def test_a_rerun_submits_the_missing_shards_alone(user: User, converted: str) -> None:
    folder = user.checkout / f"demo/data/.shards/of-{SHARDS}"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("3.jsonl", "24.jsonl"):
        (folder / name).unlink()
    plan = user.call("submit", "convert", "--config", "smoke", "--dry-run").stdout
    assert re.findall(r"--shard (\d+)/25", plan) == ["3", "24"]
    user.assert_completed(user.submit("convert")["merge"])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(user.submit("convert")) == ["merge"], "with all shards there, only the merge is left"


def test_status_is_right_without_accounting(user: User, trained: str) -> None:
    seen = status(user)
    assert (seen["state"], seen["checkpoint"], seen["requeues"]) == ("completed", 6, 0)
    [train] = [job for job in seen["jobs"] if job["name"] == "train"]
    assert train["state"] == "COMPLETED" and train["elements"][0]["exit_code"] == 0


def test_a_failed_job_is_seen_with_its_exit_code(user: User, trained: str) -> None:
    settings = ("--set", "run_name=broken", "--set", "model_path=nowhere")
    job = user.submit(*settings)["train"]
    assert user.cluster.wait(job) == "FAILED"
    state = status(user, "output-broken")["state"]
    assert state.startswith("failed to start: nowhere: no such model folder") and state.endswith("FAILED, exit code 4")
    assert "nowhere" in user.call("submit", "logs", "output-broken").stdout


def test_status_can_be_watched_and_scripted(user: User, trained: str) -> None:
    line = f"timeout -s INT 3 {user.cluster.python} -m bbu.status output-watched --watch --interval 1"
    text = user.cluster.run(line, cwd=user.checkout, env=user.env, check=False).stdout
    assert text.count("watched  completed") >= 2, text


def test_logs_are_followed(user: User, trained: str) -> None:
    line = f"timeout 2 {user.cluster.python} -m bbu.submit logs -f output-watched --job train"
    assert "step 6/6" in user.cluster.run(line, cwd=user.checkout, env=user.env, check=False).stdout


def test_a_run_that_is_done_is_not_resumed(user: User, trained: str) -> None:
    done = user.call("submit", "resume", "output-watched", check=False)
    assert done.returncode == 7 and "completed; to train further" in done.stderr


def test_evals_come_by_scrontab_and_score_what_is_new(user: User, trained: str) -> None:
    metrics = user.checkout / "output-watched/eval"
    wait_until(lambda: len(list(metrics.glob("checkpoint-*/*/metrics.json"))) == 2, 100, lambda: str(status(user)))
    seen = status(user)
    assert seen["schedules"][0]["state"] in ("scheduled", "ended") and seen["scores"][0]["step"] == 6, seen


def test_eval_jobs_at_the_same_time_do_no_work_twice(user: User, trained: str) -> None:
    """Two more workers, on the same run and under settings that nobody scored yet."""
    line = ("eval", "--pending", "output-watched", "--set", "generation_max_new_tokens=16")
    jobs = [user.sbatch("slurm/eval.sbatch", *line[1:]) for _ in range(2)]
    for job in jobs:
        user.assert_completed(job)
    text = "".join(user.output(job) for job in jobs)
    assert text.count("found with the right label") == 2, text  # one report for each checkpoint, by whichever worker
    ledger = user.checkout / "output-watched/eval/ledger"
    results = sorted(path.stem for path in (ledger / "results").iterdir())
    assert sorted(path.name for path in (ledger / "claims").iterdir()) == [f"{key}.1" for key in results]


def test_evals_by_scrontab_end_when_all_is_scored(user: User, trained: str) -> None:
    wait_until(lambda: status(user)["schedules"][0]["state"] == "ended", 100, lambda: str(status(user)))
    assert "all runs are over and scored" in status(user)["schedules"][0]["text"]


def test_the_entry_is_taken_out_and_others_lines_stay(user: User, trained: str) -> None:
    waiting = not_begun(user, "output-waiting")
    user.call("submit", "eval", "--every", "30m", waiting)
    other_entry = "#SCRON --time=1\n0 0 1 1 * true\n"
    tab = user.cluster.run("scrontab -l").stdout
    (user.checkout / "tab").write_text(other_entry + tab)
    user.cluster.run(["scrontab", user.checkout / "tab"])
    assert status(user, waiting)["schedules"][0]["state"] == "scheduled", "its job has another id now"
    text = user.call("submit", "cancel", "output-watched", waiting).stderr
    assert "output-waiting: evals every 30 minutes: cancelled" in text, text
    assert user.cluster.run("scrontab -l").stdout == other_entry
    assert status(user, waiting)["schedules"][0]["state"] == "ended"
    user.cluster.run("scrontab -r")


def not_begun(user: User, name: str) -> str:
    """A run that was submitted and has not begun."""
    user.cluster.run(f"mkdir {name}; touch {name}/jobs.jsonl", cwd=user.checkout)
    return name


def test_a_schedule_that_broke_is_reported(user: User, trained: str) -> None:
    profile = user.profile("resubmitting", eval_schedule="resubmit", convert_tasks=1)
    text = user.call("submit", "eval", "--every", "30m", not_begun(user, "output-early"), "--cluster", profile).stderr
    first = re.findall(r"job (\d+)", text)[0]
    assert user.cluster.wait(first) == "COMPLETED"
    waiting = status(user, "output-early")["schedules"][0]
    assert waiting["state"] == "scheduled" and "PENDING" in waiting["text"], waiting
    [folder] = user.checkout.glob("jobs/*-eval-schedule-*/jobs")  # only a row of jobs has them
    user.cluster.run(["scancel", folder.read_text().split()[-1]])
    broken = status(user, "output-early")["schedules"][0]
    assert broken["state"] == "BROKEN" and "no job is waiting" in broken["text"]
    assert "BROKEN" in user.call("status", "output-early").stdout


def test_by_hand_the_same_script_is_a_line_of_a_scrontab(user: User, trained: str, tmp_path: Path) -> None:
    """slurm/eval.scron's own header, with this checkout's paths."""
    settings = " ".join(f"{name}={value}" for name, value in user.env.items() if name != "BBU_CLUSTER")
    path = user.cluster.run("echo $PATH").stdout.strip()
    lines = [
        f"#SCRON --time=5 --open-mode=append --output={user.checkout}/by-hand.out --chdir={user.checkout}",
        f"* * * * * PATH={path} {settings} {user.checkout}/slurm/eval.scron output-watched",
    ]
    (user.checkout / "tab").write_text("\n".join(lines) + "\n")
    user.cluster.run(["scrontab", user.checkout / "tab"])
    written = user.checkout / "by-hand.out"
    wait_until(lambda: written.exists() and written.read_text().count("scored already") == 2, 90, written.read_text)
    user.cluster.run("scrontab -r")
