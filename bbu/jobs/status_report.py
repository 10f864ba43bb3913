"""Tables and JSON about runs, for `python -m bbu.status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bbu.config.yaml_files import read_yaml
from bbu.errors import CheckpointError
from bbu.evaluation.scores import Score, best_f1, best_scores, latest_scores, other_scores
from bbu.jobs.queue import QueuedJob
from bbu.jobs.run_status import RunView
from bbu.logs import format_duration
from bbu.run.checkpoints import verify_sizes
from bbu.run.folder import RunFolder

_NAME_KEYS = ("run_name",)
"""Config keys that differ between all runs and say nothing about them."""

Row = dict[str, str]
"""One line of a table: its cells by the names of their columns."""


def status_row(view: RunView) -> Row:
    """One run's line in the table of `bbu.status`."""
    status, checkpoint = view.status, _sound_checkpoint(view.run)
    heartbeat = "-" if view.age is None else f"{format_duration(view.age)} ago" + (" STALE" if view.is_stale else "")
    return {
        "run": view.run.name,
        "state": view.state,
        "step": "-" if status.step is None else f"{status.step}/{status.max_steps}",
        "loss": _number(status.loss),
        "samples/s": _number(status.samples_per_second),
        "left": format_duration(status.seconds_left) if status.phase == "training" else "-",
        "heartbeat": heartbeat,
        "checkpoint": "-" if checkpoint is None else str(checkpoint),
        "F1": ", ".join(score.brief for score in latest_scores(view.run)) or "-",
        "requeues": str(view.restarts),
        "evals": view.evals or "-",
    }


def status_details(view: RunView) -> str:
    """One run's jobs, schedules and newest scores, a line each; scores that are not comparable come last."""
    lines = [str(view.run.root), *(f"  {job.name} {', '.join(job.ids) or '-'}: {job.text}" for job in view.jobs)]
    lines += [f"  evals {schedule.text} ({schedule.state})" for schedule in view.schedules]
    scores = latest_scores(view.run)
    lines += [f"  {score}" for score in [*scores, *(other for other in other_scores(view.run) if other not in scores)]]
    return "\n".join(lines)


def status_dict(view: RunView) -> dict[str, Any]:
    """Everything about one run, for JSON."""
    return {
        "run": str(view.run.root),
        "state": view.state,
        "status": view.status.to_dict() if view.status.phase else {},
        "heartbeat_age_s": view.age,
        "stale": view.is_stale,
        "checkpoint": _sound_checkpoint(view.run),
        "scores": [score.to_dict() for score in latest_scores(view.run) if not score.differs],
        "other_scores": [score.to_dict() for score in other_scores(view.run)],
        "requeues": view.restarts,
        "jobs": [
            {
                "name": job.name,
                "ids": list(job.ids),
                "state": job.text,
                "elements": [_job_dict(element) for element in job.jobs],
            }
            for job in view.jobs
        ],
        "schedules": [vars(schedule) for schedule in view.schedules],
    }


def comparison_rows(views: Sequence[RunView]) -> list[Row]:
    """Runs side by side, the best first: the settings in which they differ, their states and their best scores.

    Runs without a score of their own come last. A column tells validation files apart where they are not the same.
    """
    configs = [read_yaml(view.run.config) if view.run.config.is_file() else {} for view in views]
    keys = [key for key in _differing_keys(configs) if key not in _NAME_KEYS]
    best = [best_scores(view.run) for view in views]
    order = sorted(range(len(views)), key=lambda i: -best_f1(best[i]))
    datasets = {_dataset_of(scores) for scores in best} - {None}
    return [_comparison_row(views[i], configs[i], keys, best[i], len(datasets) > 1) for i in order]


def _dataset_of(scores: Mapping[str, Score]) -> str | None:
    """The beginning of the hash of the ground truth of some scores."""
    return next((score.dataset_sha256[:8] for score in scores.values() if score.dataset_sha256), None)


def _job_dict(job: QueuedJob) -> dict[str, Any]:
    return asdict(job) | {"id": job.id}


def _comparison_row(
    view: RunView, config: Mapping[str, Any], keys: Sequence[str], best: Mapping[str, Score], show_dataset: bool
) -> Row:
    settings = {key: str(config.get(key, "-")) for key in keys}
    scores = ", ".join(f"{score.brief} (step {score.step})" for score in best.values())
    return {
        "run": view.run.name,
        **settings,
        "state": view.state,
        "step": "-" if view.status.step is None else str(view.status.step),
        "loss": _number(view.status.loss),
        **({"val data": _dataset_of(best) or "-"} if show_dataset else {}),
        "best F1": scores or "-",
    }


def _differing_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all configs, in the order of the first; empty configs do not count."""
    present = [config for config in configs if config]
    if not present:
        return []
    first = present[0]
    return [key for key in first if any(other.get(key) != first[key] for other in present)]


def _sound_checkpoint(run: RunFolder) -> int | None:
    """The last step whose checkpoint has all files in their full size; their bytes are verified at resume only."""
    for step in reversed(run.steps()):
        try:
            return verify_sizes(run.checkpoint(step)).step
        except CheckpointError:
            continue
    return None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
