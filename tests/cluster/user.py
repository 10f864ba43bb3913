"""Somebody on the login node: an ordinary user in a checkout on the shared filesystem."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.testbed import Cluster

SUBMITTED = re.compile(r"bbu\.submit: ([\w-]+): job (\d+)")


class User:
    """`env` is the user's environment: the image, and the profile `test` for every entry."""

    def __init__(self, cluster: Cluster, checkout: Path | None = None) -> None:
        self.cluster, self.checkout = cluster, checkout or cluster.checkout()
        self.env = {"BBU_IMAGE": str(cluster.image), "BBU_HOME": str(self.checkout), "BBU_CLUSTER": "test"}

    def call(self, entry: str, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`python -m bbu.ENTRY ARGUMENTS…` on the login node."""
        argv = [self.cluster.python, "-m", f"bbu.{entry}", *arguments]
        return self.cluster.run(argv, cwd=self.checkout, env=self.env, check=check)

    def submit(self, *arguments: str) -> dict[str, str]:
        """With the config `smoke`: job name -> id, the last one of an array that was cut."""
        return dict(SUBMITTED.findall(self.call("submit", *arguments, "--config", "smoke").stderr))

    def submit_specs(self, *jobs: dict[str, Any], profile: str = "test") -> list[tuple[str, Path]]:
        """Submit jobs with the fields of JobSpec (programs/submit_specs.py): id and log folder of each."""
        argv = [self.cluster.python, "tests/cluster/programs/submit_specs.py", profile, json.dumps(jobs)]
        done = self.cluster.run(argv, cwd=self.checkout, env=self.env | {"PYTHONPATH": str(self.checkout)})
        return [(job_id, Path(logs)) for job_id, logs in json.loads(done.stdout)]

    def sbatch(self, *arguments: str) -> str:
        return self.cluster.sbatch(*arguments, cwd=self.checkout, env=self.env)

    def profile(self, name: str, **changes: Any) -> str:
        """A profile like `test` but for `changes`; a mapping changes keys of one kind of job. Its name."""
        folder = self.checkout / "configs/clusters"
        values = yaml.safe_load((folder / "test.yaml").read_text())
        for key, value in changes.items():
            values[key] = values[key] | value if isinstance(value, dict) else value
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return name

    def assert_completed(self, job: str, timeout: float = 300) -> None:
        state = self.cluster.wait(job, timeout=timeout)
        assert state == "COMPLETED", self.cluster.describe(job) + self.output(job)

    def output(self, job: str) -> str:
        """What all tasks of a job have printed, wherever it was submitted from."""
        patterns = (f"jobs/*/{job}_*.out", f"slurm-*-{job}.out", f"slurm-*-{job}_*.out")
        files = [file for pattern in patterns for file in self.checkout.glob(pattern)]
        return "\n".join(file.read_text(errors="replace") for file in sorted(files))

    def wait_for(self, job: str, text: str, times: int = 1, timeout: float = 120) -> None:
        wait_until(lambda: self.output(job).count(text) >= times, timeout, lambda: self.output(job)[-4000:])

    def run_folder(self, name: str) -> Path:
        return self.checkout / f"output-{name}"


def wait_until(condition: Callable[[], object], timeout: float, describe: Callable[[], str]) -> None:
    """Wait until a condition holds, `timeout` seconds at most; `describe` gives the message of a failure."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.2)
