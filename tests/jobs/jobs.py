"""Jobs that the tests of bbu.jobs submit: each element runs one of the programs of this folder."""

from __future__ import annotations

from pathlib import Path

from bbu.jobs.spec import JobSpec, Resources

CHECKOUT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).parent / "programs"
NOTHING = Resources(
    partition=None, account=None, qos=None, constraint=None, exclusive=False, gpus_per_node=0, gpu_type=None,
    cpus_per_task=1, memory=None, time_minutes=1, nice=0,
)  # fmt: skip
DONE = ("leave.py", "0")


def job(*commands: tuple[str, ...], name: str = "work", nodes: int = 1, after: tuple[str, ...] = ()) -> JobSpec:
    """A job that requests nothing, with an element for each command: a program and its arguments."""
    elements = tuple((str(PROGRAMS / program), *arguments) for program, *arguments in commands)
    return JobSpec(name=name, commands=elements, nodes=nodes, tasks_per_node=1, resources=NOTHING, after=after)
