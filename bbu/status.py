"""`python -m bbu.status [RUN…]`: how runs stand; all of this folder where none is named."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bbu.config.read import read_yaml
from bbu.errors import CheckpointError, run_entry
from bbu.evaluation.scores import Score, best_scores, latest_scores
from bbu.jobs.control import known_run
from bbu.jobs.queue import as_dict
from bbu.jobs.run_status import RunView, views_of
from bbu.logs import duration
from bbu.run.checkpoints import verify_sizes
from bbu.run.files import write_atomic
from bbu.run.folder import RunFolder

CLEAR = "\x1b[H\x1b[2J"
NAMES = ("run_name",)
"""Keys that differ between all runs and say nothing."""


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="python -m bbu.status", description=__doc__)
    add = described.add_argument
    add("runs", nargs="*", metavar="RUN", help="output-{run_name} folders (all in this folder)")
    add("--watch", action="store_true", help="look again and again")
    add("--interval", type=seconds, default=5.0, metavar="SECONDS", help="how often to look (5)")
    add("--json", action="store_true", help="for a script to read")
    add("--compare", action="store_true", help="a table of the runs' differing settings and best scores instead")
    add("--out", type=Path, metavar="FILE", help="also write the table there, as Markdown")
    return described


def seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return float(text)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if not arguments.watch:
        print(shown(arguments))
        return 0
    try:
        while True:
            text = shown(arguments)
            print(f"{CLEAR if sys.stdout.isatty() else ''}{time.strftime('%X')}\n{text}", flush=True)
            time.sleep(arguments.interval)
    except KeyboardInterrupt:
        return 0


def shown(arguments: argparse.Namespace) -> str:
    """One look at the runs."""
    runs = runs_of(arguments.runs)
    views = views_of(runs)
    if arguments.json:
        return json.dumps([as_json(view) for view in views], ensure_ascii=False, indent=1)
    rows = compared(views) if arguments.compare else [as_row(view) for view in views]
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.out, tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True) + "\n")
    text = tabulate(rows, headers="keys", disable_numparse=True)
    return text if len(views) > 1 or arguments.compare else f"{text}\n\n{details(views[0])}"


def runs_of(names: Sequence[str]) -> list[RunFolder]:
    """The folders that are named, else all of this folder. Raises CheckpointError where there are none."""
    if names:
        return [known_run(name) for name in names]
    found = [RunFolder(path.resolve()) for path in sorted(Path().glob("output-*"))]
    runs = [run for run in found if run.jobs.is_file() or run.config.is_file()]
    if not runs:
        raise CheckpointError("no output-* run folder here; name one, or go to the folder you submitted from")
    return runs


def as_row(view: RunView) -> dict[str, str]:
    """One line of the table."""
    status, checkpoint = view.status, sound_checkpoint(view.run)
    heartbeat = "-" if view.age is None else f"{duration(view.age)} ago" + (" STALE" if view.is_stale else "")
    left = duration(status.seconds_left) if status.phase == "training" else "-"
    return {
        "run": view.run.root.name.removeprefix("output-"),
        "state": view.state,
        "step": "-" if status.step is None else f"{status.step}/{status.max_steps}",
        "loss": number(status.loss),
        "samples/s": number(status.samples_per_second),
        "left": left,
        "heartbeat": heartbeat,
        "checkpoint": "-" if checkpoint is None else str(checkpoint),
        "F1": ", ".join(f"{score.source} {score.f1:.3f}" for score in latest_scores(view.run)) or "-",
        "requeues": str(view.restarts),
        "evals": view.evals or "-",
    }  # fmt: skip


def number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def sound_checkpoint(run: RunFolder) -> int | None:
    """The last step whose checkpoint is whole: manifest, names and sizes; every byte is read at resume."""
    for step in reversed(run.steps()):
        try:
            return verify_sizes(run.checkpoint(step)).step
        except CheckpointError:
            continue
    return None


def details(view: RunView) -> str:
    """A single run's jobs, schedules and scores."""
    lines = [f"{view.run.root}"]
    lines += [f"  {job.name} {', '.join(job.ids) or '-'}: {job.text}" for job in view.jobs]
    lines += [f"  evals {schedule.text} ({schedule.state})" for schedule in view.schedules]
    lines += [f"  {score}" for score in latest_scores(view.run)]
    return "\n".join(lines)


def as_json(view: RunView) -> dict[str, Any]:
    """Everything, for a script."""
    return {
        "run": str(view.run.root),
        "state": view.state,
        "status": view.status.to_dict() if view.status.phase else {},
        "heartbeat_age_s": view.age,
        "stale": view.is_stale,
        "checkpoint": sound_checkpoint(view.run),
        "scores": [vars(score) for score in latest_scores(view.run)],
        "requeues": view.restarts,
        "jobs": [
            {"name": job.name, "ids": list(job.ids), "state": job.text, "elements": [as_dict(one) for one in job.jobs]}
            for job in view.jobs
        ],
        "schedules": [vars(schedule) for schedule in view.schedules],
    }


def compared(views: Sequence[RunView]) -> list[dict[str, str]]:
    """Runs side by side, the best first: the settings in which they differ, and what came of them."""
    configs = [read_yaml(view.run.config) if view.run.config.is_file() else {} for view in views]
    keys = [key for key in differing(configs) if key not in NAMES]
    best = [best_scores(view.run) for view in views]
    order = sorted(range(len(views)), key=lambda i: -max((score.f1 for score in best[i].values()), default=-1.0))
    return [compared_row(views[i], configs[i], keys, best[i]) for i in order]


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not the same in all configs that are there, in the order of the first."""
    known = [config for config in configs if config]
    return [key for key in (known[0] if known else ()) if any(other.get(key) != known[0][key] for other in known)]


def compared_row(
    view: RunView, config: Mapping[str, Any], keys: Sequence[str], best: Mapping[str, Score]
) -> dict[str, str]:
    settings = {key: str(config.get(key, "-")) for key in keys}
    scores = ", ".join(f"{score.source} {score.f1:.3f} (step {score.step})" for score in best.values())
    name = view.run.root.name.removeprefix("output-")
    step = "-" if view.status.step is None else str(view.status.step)
    return {"run": name, **settings, "state": view.state, "step": step, "loss": number(view.status.loss),
            "best F1": scores or "-"}  # fmt: skip


if __name__ == "__main__":
    run_entry(main)
