"""The state of jobs, read from what real Slurm prints: 22.05 and 24.11 print an exit code differently."""

from __future__ import annotations

import pytest

from bbu.errors import JobError
from bbu.jobs.queue import (
    QueuedJob,
    _shell_exit_code,
    clear_job_environment,
    expand_nodes,
    find_jobs,
    most_restarts,
    summarise_states,
)
from tests.conftest import SlurmSays


def queued(state: str, reason: str = "", element: str = "", restarts: int | None = 0) -> QueuedJob:
    return QueuedJob("7", element, state, reason, restarts, None, "bbu-train", "7")


@pytest.mark.parametrize(("text", "code"), [("768", 3), ("3:0", 3), ("15", 143), ("0:15", 143), ("0", 0), ("0:0", 0)])
def test_an_exit_code_is_a_shells_whatever_the_version(text: str, code: int):
    assert _shell_exit_code(text) == code


def test_a_job_is_summarised_in_a_word_and_an_array_by_counts():
    assert summarise_states([queued("RUNNING")]) == "RUNNING"
    assert summarise_states([queued("PENDING", "Priority")]) == "PENDING (Priority)"
    assert (
        summarise_states([queued("PENDING", "(Nodes required for job are DOWN, DRAINED)")])
        == "PENDING (Nodes required for job are DOWN)"
    )
    array = [queued("COMPLETED", element="0"), queued("COMPLETED", element="1"), queued("FAILED", element="2")]
    assert summarise_states(array) == "2 COMPLETED, 1 FAILED"


def test_the_most_restarts_of_an_array_count_and_accounting_knows_none():
    assert most_restarts([queued("RUNNING", restarts=1), queued("RUNNING", restarts=3)]) == 3
    assert most_restarts([queued("COMPLETED", restarts=None)]) is None


def test_a_node_list_is_expanded_by_scontrol(slurm_says: SlurmSays):
    slurm_says("scontrol", "n1\nn2\nm3\n")
    assert expand_nodes("n[1-2],m3") == ["n1", "n2", "m3"]


def test_a_node_list_that_scontrol_cannot_read_is_refused(slurm_says: SlurmSays):
    slurm_says("scontrol", "scontrol: error: Invalid hostlist\n", 1)
    for node_list in ("", "n[1-2"):
        with pytest.raises(JobError):
            expand_nodes(node_list)


SQUEUE_24_11 = """\
3|18|COMPLETED|None|0|0:0|bbu-convert|22|
3|20|RUNNING|None|1|0:0|bbu-convert|3|
28|N/A|FAILED|NonZeroExitCode|0|3:0|bbu-train|28|
24|N/A|PENDING|BeginTime|1|0:0|bbu-eval-ab12|24|
"""


def test_one_squeue_answers_for_all_jobs(slurm_says: SlurmSays):
    slurm_says("squeue", SQUEUE_24_11)
    jobs = find_jobs({"3", "28"})
    assert [(job.id, job.state, job.restarts) for job in jobs["3"]] == [
        ("3_18", "COMPLETED", 0),
        ("3_20", "RUNNING", 1),
    ]
    assert (jobs["28"][0].exit_code, jobs["28"][0].is_live) == (3, False)


def test_the_job_of_a_scrontab_is_found_by_its_name(slurm_says: SlurmSays):
    slurm_says("squeue", SQUEUE_24_11)
    assert [job.id for job in find_jobs({"bbu-eval-ab12"})["bbu-eval-ab12"]] == ["24"]


def test_accounting_knows_what_slurm_has_forgotten_by_the_last_of_its_lines(slurm_says: SlurmSays):
    slurm_says("squeue", "")
    slurm_says("sacct", "7|NODE_FAIL|0:0|bbu-train\n7|CANCELLED by 1001|0:0|bbu-train\n")
    [job] = find_jobs({"7"})["7"]
    assert (job.state, job.restarts, job.exit_code) == ("CANCELLED", None, 0)


def test_without_accounting_an_old_job_is_unknown_and_nothing_fails(slurm_says: SlurmSays):
    slurm_says("squeue", "")
    assert find_jobs({"7"}) == {}


def test_without_slurm_nothing_is_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert find_jobs({"7"}) == {}


def test_a_slurm_that_does_not_answer_is_no_empty_queue(slurm_says: SlurmSays):
    slurm_says("squeue", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", 1)
    with pytest.raises(JobError, match="squeue does not answer"):
        find_jobs({"7"})


def test_what_is_submitted_knows_nothing_of_the_job_around_it():
    environ = {
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_RESTART_COUNT": "9",
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_CONF": "c",
        "A": "b",
    }
    clear_job_environment(environ)
    assert environ == {"SLURM_CONF": "c", "A": "b"}
