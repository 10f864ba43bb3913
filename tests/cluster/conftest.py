"""The session's clusters: brought up once, taken down at the end (BBU_KEEP_CLUSTER=1 leaves them running)."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster import testbed
from tests.cluster.testbed import Cluster


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    try:
        testbed.require_machine()
    except testbed.ClusterUnavailable as reason:
        pytest.skip(f"Slurm and Apptainer tests cannot run: {reason}")
    print_line = terminal_printer(request.config)
    report = testbed.script("up.sh")
    print_line(report.strip().splitlines()[-1])
    shared = session_folder(testbed.prefix(), user="bbu")
    print_line("finding or building the image (ten minutes when its packages have changed, one when the code has)")
    start = time.monotonic()
    image = testbed.build_image(testbed.prefix(), "bbu", testbed.copy_tree(shared, "bbu"))
    print_line(f"image {image.name} after {time.monotonic() - start:.0f} s")
    yield Cluster(prefix=testbed.prefix(), user="bbu", shared=shared, image=image)
    if not keep_clusters():
        if "cluster: started" in report:
            testbed.script("down.sh")
        shutil.rmtree(shared, ignore_errors=True)


@pytest.fixture(scope="session")
def newer(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Cluster]:
    """A second cluster beside the first, with its image and shared folder: Slurm 24.11, without accounting."""
    report = testbed.script("up.sh", "newer")
    terminal_printer(request.config)(report.strip().splitlines()[-1])
    yield replace(cluster, env_file="env-newer.sh")
    if "cluster: started" in report and not keep_clusters():
        testbed.script("down.sh", "newer")


def keep_clusters() -> bool:
    return os.environ.get("BBU_KEEP_CLUSTER") == "1"


def session_folder(prefix: Path, user: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="session-", dir=prefix / "shared"))
    folder.chmod(0o755)
    shutil.chown(folder, user, user)
    return folder


def terminal_printer(config: pytest.Config) -> Callable[[str], None]:
    """Return a function that writes a line to the terminal during a test run."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return reporter.write_line if reporter else lambda line: None
