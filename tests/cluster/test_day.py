"""A user's day, from the first look at a cluster to the last job: one story, in order, on the real Slurm.

Doctor, the pipeline on two nodes, preempted twice, evals by schedule all the while, status, a sweep, cancel, resume.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bbu.run.checkpoints import verify
from tests.cluster.testbed import Cluster
from tests.cluster.user import User, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]

RUN = "output-day"
STEPS = 60


def digest(image: Path) -> str:
    """What containers/build.sh noted beside an image."""
    return image.with_name(f"{image.name}.sha256").read_text().split()[0]


class Day:
    """What the user remembers from one hour to the next."""

    def __init__(self, cluster: Cluster) -> None:
        self.user = User(cluster)
        self.user.env["BBU_CLUSTER"] = self.user.profile(
            "day", convert_tasks=2, train={"partition": "requeue"}, image_sha256=digest(cluster.image), scratch="/tmp"
        )
        self.jobs: dict[str, str] = {}

    @property
    def run(self) -> Path:
        return self.user.checkout / RUN

    def status(self, *runs: str) -> list[dict]:
        return json.loads(self.user.call("status", *runs, "--json").stdout)

    def wait_for_status(self, condition: Callable[[dict], bool], timeout: float = 150) -> dict:
        """Query the run's status until a condition holds for it; the status that it holds for."""
        seen: list[dict] = [{}]

        def look() -> bool:
            seen[0] = self.status(RUN)[0]
            return condition(seen[0])

        wait_until(look, timeout, lambda: json.dumps(seen[0], indent=1) + self.user.output(self.jobs["train"])[-3000:])
        return seen[0]

    def preempt(self) -> None:
        """Somebody urgent wants the second node."""
        urgent = self.user.cluster.sbatch("--partition=urgent", "-wn2", "--exclusive", "--wrap", "sleep 1")
        assert self.user.cluster.wait(urgent, timeout=60) == "COMPLETED", self.user.cluster.describe(urgent)


@pytest.fixture(scope="module")
def day(cluster: Cluster) -> Day:
    return Day(cluster)


def test_in_the_morning_the_doctor_says_that_the_site_is_ready(day: Day) -> None:
    text = day.user.call("doctor", "--nodes", "2").stdout
    assert "transport: gloo over TCP" in text and "  failure" not in text, text


def test_the_pipeline_is_submitted_and_evals_are_scheduled_beside_it(day: Day) -> None:
    settings = [f"max_steps={STEPS}", "save_steps=10", "run_name=day"]
    day.jobs = day.user.submit("pipeline", "--demo", "--nodes", "2", *(w for s in settings for w in ("--set", s)))
    assert list(day.jobs) == ["demo", "convert", "merge", "train", "eval"]
    text = day.user.call("submit", "eval", "--every", "1m", RUN).stderr
    assert "evals every 1 minutes by resubmit" in text, text
    [seen] = day.status(RUN)
    assert seen["state"] == "PENDING (Dependency)" and seen["schedules"][0]["state"] == "scheduled", seen


def test_it_is_preempted_twice_and_status_reports_where_it_is(day: Day) -> None:
    for times in (1, 2):
        begun = day.wait_for_status(
            lambda seen, before=times - 1: seen["requeues"] == before and seen["state"] == "training, RUNNING"
        )
        day.wait_for_status(lambda seen, begun=begun: seen["status"]["step"] > begun["status"]["step"])
        day.preempt()
        seen = day.wait_for_status(lambda seen, times=times: seen["requeues"] == times)
        assert seen["checkpoint"] and not seen["stale"], seen
    waits = day.user.cluster.run(["squeue", "-h", "-j", day.jobs["eval"], "-o", "%T %r"]).stdout
    assert waits == "PENDING Dependency\n", "an eval must not take a requeued parent for one that has ended"


def test_it_goes_on_where_it_stopped_and_is_done(day: Day) -> None:
    day.user.assert_completed(day.jobs["train"])
    day.user.assert_completed(day.jobs["eval"])
    text = (day.run / "logs/rank-0.log").read_text()
    saved = [int(step) for step in re.findall(r"stopping after step (\d+) of", text)]
    resumed = [int(step) for step in re.findall(r"resuming from .*/checkpoint-(\d+)", text)]
    assert len(saved) == 2 and resumed == saved, text
    assert verify(day.run / f"checkpoint-{STEPS}").world_size == 2
    starts = json.loads((day.run / "provenance.json").read_text())["starts"]
    assert [start["job"].get("SLURM_RESTART_COUNT", "0") for start in starts] == ["0", "1", "2"]


def test_the_scheduled_evals_score_come_again_and_end_with_the_run(day: Day) -> None:
    seen = day.wait_for_status(lambda seen: seen["schedules"][0]["state"] == "ended", timeout=90)
    assert "all runs are over" in seen["schedules"][0]["text"], seen
    [folder] = day.user.checkout.glob("jobs/*-eval-schedule-*")
    ids = (folder / "jobs").read_text().split()
    assert len(ids) >= 2
    for job in ids:
        assert day.user.cluster.wait(job) == "COMPLETED", (folder / f"{job}.out").read_text()


def test_no_score_was_made_twice(day: Day) -> None:
    claims = sorted(path.name for path in (day.run / "eval/ledger/claims").iterdir())
    results = sorted(path.stem for path in (day.run / "eval/ledger/results").iterdir())
    assert claims == [f"{key}.1" for key in results] and results, "each claimed once, and published"


def test_status_says_so_in_one_table(day: Day) -> None:
    text = day.user.call("status", RUN).stdout
    line = next(line for line in text.splitlines() if line.startswith("day "))
    assert re.search(rf"completed\s+{STEPS}/{STEPS}\s", line) and re.search(r"answer \d\.\d{3}\s+2\s+ended", line), text
    assert f"train {day.jobs['train']}: COMPLETED" in text


def test_logs_show_what_a_job_printed(day: Day) -> None:
    assert f"step {STEPS}/{STEPS}" in day.user.call("submit", "logs", RUN, "--job", "train").stdout
    both = day.user.call("submit", "logs", RUN, "--job", "train", "--rank", "all", "-n", "1000").stdout
    assert both.count("Starting with JobEnvironment") == 6  # two ranks, three starts


def test_a_sweep_has_a_run_for_each_value_and_a_table(day: Day) -> None:
    jobs = day.user.submit("--sweep", "llm_lr=1e-3,1e-4", "--set", "run_name=tune", "--set", "max_steps=2",
                           "--set", "save_steps=2")  # fmt: skip
    assert list(jobs) == ["train", "eval", "compare"]
    day.user.assert_completed(jobs["compare"])
    table = (day.user.checkout / "sweep-tune/table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert rows[0] == ["run", "llm_lr", "state", "step", "loss", "best F1"]
    assert {(row[1], row[2], row[3]) for row in rows[2:]} == {("0.001", "completed", "2"), ("0.0001", "completed", "2")}
    assert all("(step 2)" in row[5] for row in rows[2:]), table


def test_a_cancelled_run_keeps_what_it_saved_and_is_resumed_with_a_word(day: Day) -> None:
    first = day.user.submit("--set", "run_name=long", "--set", "max_steps=5000", "--set", "save_steps=1000")["train"]
    day.user.wait_for(first, "step 5/5000")
    text = day.user.call("submit", "cancel", "output-long").stderr
    assert f"bbu-train {first}: cancelled" in text, text
    assert day.user.cluster.wait(first) == "CANCELLED"
    wait_until(
        lambda: bool(list(day.user.checkout.glob("output-long/checkpoint-*"))), 30, lambda: day.user.output(first)
    )
    second = dict(re.findall(r"(train): job (\d+)", day.user.call("submit", "resume", "output-long").stderr))["train"]
    day.user.wait_for(second, "resuming from")
    refused = day.user.call("submit", "resume", "output-long", check=False)
    assert refused.returncode == 7 and f"job {second} is RUNNING" in refused.stderr, refused.stderr
    day.user.call("submit", "cancel", "output-long")
    assert day.user.cluster.wait(second) == "CANCELLED"
    assert not [job for seen in day.status("output-long", RUN) for job in seen["jobs"] if "ING" in job["state"]]
