"""Reports of tasks for the doctor's tests: two ready nodes without GPUs, with changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bbu.doctor.findings import Finding
from bbu.doctor.launch import Outcome
from bbu.doctor.nodes import LoginNode, node_groups
from bbu.doctor.report import DONE, FileFacts, NodeFacts, Plan, ReduceFacts, Stage, StopFacts, TaskReport
from bbu.doctor.slurm import job_kinds
from bbu.jobs.clusters import ClusterProfile
from tests.doctor.findings import CHECKOUT

LOGIN = LoginNode(CHECKOUT, Path("/work"), 0.0)
Changes = Mapping[str, Any]
"""A change of a report: `stage`, or the changed fields of `node`, `files`, `reduced` or `stop`."""


def task_report(rank: int, node: str, changes: Changes) -> TaskReport:
    """What a task on a ready node without GPUs reports."""
    return TaskReport(
        rank=rank,
        stage=changes.get("stage", DONE),
        node=dataclasses.replace(node_facts(node), **changes.get("node", {})),
        files=dataclasses.replace(file_facts(rank), **changes.get("files", {})),
        reduced=dataclasses.replace(reduce_facts(), **changes.get("reduced", {})),
        stop=dataclasses.replace(StopFacts("SIGUSR2"), **changes.get("stop", {})),
    )


def node_facts(name: str) -> NodeFacts:
    return NodeFacts(
        name=name,
        job_id="7",
        step_id="0",
        in_container=True,
        user_site=False,
        code=str(CHECKOUT),
        current_folder="/work",
        cpus=4,
        memory_mb=24_000,
        memory_limit_mb=None,
        shm_free=8_000_000_000,
        temporary_folder="/tmp",
        temporary_free=50_000_000_000,
        binds=[],
        driver=None,
        interfaces={"lo": "127.0.0.1", "eth0": "10.0.0.1"},
        host_address="127.0.1.1",
    )


def file_facts(rank: int) -> FileFacts:
    return FileFacts(
        token="t",
        clock_ahead_s=0.001,
        fsync_s=0.02,
        has_locks=True,
        free=90_000_000_000,
        met=True,
        won=rank == 0,
        visible_s=0.01 if rank == 0 else 0.0,
    )


def reduce_facts() -> ReduceFacts:
    return ReduceFacts(torch="2.13.0", backend="gloo", correct=True, seconds=0.05, megabytes=64, interface="lo")


def unfinished_report(rank: int, node: str, stage: Stage) -> TaskReport:
    """What a task has reported that is in this stage."""
    return TaskReport(rank, stage, node_facts(node))


def two_tasks(first: Changes | None = None, second: Changes | None = None, **changes: Any) -> Outcome:
    """The outcome of a job of one task on each of two nodes, n1 and n2."""
    reports = {0: task_report(0, "n1", first or {}), 1: task_report(1, "n2", second or {})}
    outcome = Outcome(tasks=2, reports=reports, code=75, log="", nodes=("n1", "n2"), waited_s=1.0, problem=None)
    return dataclasses.replace(outcome, **changes)


def findings_of(profile: ClusterProfile, outcome: Outcome) -> list[Finding]:
    """Everything that the doctor says of a job on two nodes."""
    plan = Plan("t", profile.train.gpus_per_node, profile.network_interface, profile.binds, 64, 60)
    groups = node_groups(profile, job_kinds(profile, 2)[0], plan, outcome, LOGIN)
    return [finding for group in groups for finding in group.findings]
