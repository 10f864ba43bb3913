"""`bbu.doctor` on real Slurms with the real image: what it says of a site that is ready, and of one that is not."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.cluster.testbed import Cluster

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def home(cluster: Cluster) -> Path:
    return cluster.checkout()


def doctor(cluster: Cluster, home: Path, *arguments: str, profile: str = "test") -> subprocess.CompletedProcess[str]:
    """Run it on the login node, for two nodes."""
    command = [cluster.python, "-m", "bbu.doctor", "--cluster", profile, "--nodes", "2", *arguments]
    return cluster.run(command, cwd=home, env={"BBU_IMAGE": str(cluster.image)}, check=False)


def broken(home: Path, **changes: object) -> str:
    """The test profile with mistakes; a change of `train` is one of its keys."""
    values = yaml.safe_load((home / "configs/clusters/test.yaml").read_text())
    train = values["train"] | changes.pop("train", {})  # pyright: ignore[reportOperatorIssue]
    path = home / "site.yaml"
    path.write_text(yaml.safe_dump(values | changes | {"train": train}))
    path.chmod(0o644)
    return str(path)


def findings(done: subprocess.CompletedProcess[str], status: str) -> dict[str, str]:
    """What it says, with the remedy."""
    listed = json.loads(done.stdout)
    return {each["what"]: each["remedy"] for each in listed if each["status"] == status}


def leftovers(home: Path) -> list[str]:
    return [path.name for path in (home / "jobs").iterdir() if path.name != ".gitignore"]


READY = [
    "the container starts, and sees the variables of its job",
    "the shared filesystem is the login node's: each reads what the other wrote",
    "clock +0.0",
    "the stop signal USR2 reached 1 of 1 tasks, and the image stayed readable",
    "hard links are exclusive: 1 of 2 tasks won the race for a name",
    "a replaced file was seen by all tasks and answered within ",
    "2 tasks summed 64 MB over gloo in ",
    "transport: gloo over TCP by lo (127.0.0.1)",
    "the exit code 75 came back",
]


def test_a_ready_site(cluster: Cluster, home: Path) -> None:
    done = doctor(cluster, home)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.removeprefix("  ok       ") for line in done.stdout.splitlines()]
    for expected in READY:
        on_each = expected.startswith(("the container", "the shared", "the stop"))
        found = [line for line in lines if line.startswith(expected)]
        assert len(found) == 2 if on_each else found, (expected, done.stdout)
    assert {"Slurm", "Container", "Node n1", "Node n2", "Between the nodes"} <= set(lines)
    assert "accounting is on: sacct knows how jobs ended" in lines
    assert "  failure" not in done.stdout and leftovers(home) == []


def test_a_ready_site_of_the_newer_slurm_for_a_program(newer: Cluster, home: Path) -> None:
    done = doctor(newer, home, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = findings(done, "ok")
    assert any(what.startswith("slurm-wlm 24.11.") for what in told)
    assert any(what.startswith("no accounting: Slurm forgets") for what in told)
    for expected in READY:
        assert any(what.startswith(expected) for what in told), expected
    groups = {each["group"] for each in json.loads(done.stdout)}
    assert {"Node m1", "Node m2", "Between the nodes"} <= groups


def test_mistakes_that_need_no_job(cluster: Cluster, home: Path) -> None:
    profile = broken(home, image="/no/such.sif", work_folder="/proc/1/jobs", train={"partition": "cpus"})
    done = doctor(cluster, home, "--json", profile=profile)
    assert done.returncode == 7, done.stdout + done.stderr
    told = findings(done, "failure")
    assert told["train: there is no partition cpus"].startswith("state one of these under train.partition: cpu, ")
    assert "containers/build.sh" in told["no image at /no/such.sif"]
    [folder] = [what for what in told if what.startswith("work_folder, for job scripts and logs, cannot be written")]
    assert "work_folder" in told[folder]
    assert "not tried: what failed above comes first" in findings(done, "warning")


@pytest.mark.parametrize(
    "changes, what, remedy",
    [
        ({"gpus_per_node": 3}, "train: fewer than 2 nodes have 3 GPUs; there are: gpu:2 ", "train.gpus_per_node"),
        ({"cpus_per_task": 5}, "train: fewer than 2 nodes have 5 CPUs", "lower train.cpus_per_task"),
        ({"constraint": "fast&big"}, "train: Slurm would refuse the job: ", "train.constraint"),
    ],
)
def test_what_the_nodes_do_not_have(cluster: Cluster, home: Path, changes: dict, what: str, remedy: str) -> None:
    done = doctor(cluster, home, "--json", "--no-job", profile=broken(home, train=changes))
    assert done.returncode == 7, done.stdout + done.stderr
    [(found, told)] = findings(done, "failure").items()
    assert found.startswith(what) and remedy in told


def test_a_bind_that_is_not_on_the_nodes(cluster: Cluster, home: Path) -> None:
    done = doctor(cluster, home, "--json", profile=broken(home, binds=["/no/such"]))
    assert done.returncode == 7, done.stdout + done.stderr
    [(what, remedy)] = findings(done, "failure").items()
    assert what.startswith("2 of 2 tasks did not start on ") and "mount source /no/such doesn't exist" in what
    assert remedy == "correct binds: each must be on every node"
    [kept] = [name for name in leftovers(home) if name in done.stderr]
    assert "FATAL" in (home / "jobs" / kept / "tasks.log").read_text()


def test_without_the_shield_the_signal_takes_the_image(cluster: Cluster, home: Path) -> None:
    done = doctor(cluster, home, "--json", profile=broken(home, shield="off", network_interface=None))
    assert done.returncode == 7, done.stdout + done.stderr
    told = findings(done, "failure")
    assert told and all("shield: auto" in remedy for remedy in told.values())


def test_an_image_that_is_not_the_pinned_one(cluster: Cluster, home: Path) -> None:
    done = doctor(cluster, home, "--json", "--no-job", profile=broken(home, image_sha256="0" * 64))
    assert done.returncode == 7, done.stdout + done.stderr
    [what] = findings(done, "failure")
    digest = cluster.image.with_name(f"{cluster.image.name}.sha256").read_text().split()[0]
    assert what.endswith(f"its SHA-256 is {digest}")


def test_a_machine_without_torch_and_slurm(cluster: Cluster, home: Path) -> None:
    done = doctor(cluster, home, "--json", profile="local")
    assert done.returncode == 0, done.stdout + done.stderr
    [(what, remedy)] = findings(done, "warning").items()
    assert what == "torch is not installed: nothing can be trained here" and "pip install" in remedy
    assert "the stop signal USR2 reached 2 of 2 tasks, and the image stayed readable" in findings(done, "ok")
