"""The files in which the doctor's tasks get their plan and leave their reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbu.doctor.report import FILES, BindFacts, Plan, TaskReport, nodes_of, read_reports
from tests.doctor.reports import task_report, two_tasks, unfinished_report


def test_a_plan_is_read_as_it_was_written(tmp_path: Path):
    plan = Plan("t", 2, "ib0", ["/data"], 64, 60.0)
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan


@pytest.mark.parametrize(
    "report",
    [
        unfinished_report(1, "n1", FILES),
        task_report(1, "n1", {"node": {"binds": [BindFacts("/a:/b", readable=True, writable=False)]}}),
        task_report(1, "n1", {"reduced": {"torch": None}, "stop": {"signal": None}}),
    ],
    ids=["unfinished", "complete", "without torch"],
)
def test_a_report_is_read_as_it_was_written(tmp_path: Path, report: TaskReport):
    report.write(tmp_path)
    assert read_reports(tmp_path, 2) == {1: report}


def test_without_a_folder_there_are_no_reports():
    assert read_reports(Path("/nonexistent"), 2) == {}


def test_reports_are_grouped_by_node_in_the_order_of_their_ranks():
    reports = two_tasks().reports
    assert nodes_of({1: reports[1], 0: reports[0]}) == {"n1": [reports[0]], "n2": [reports[1]]}
