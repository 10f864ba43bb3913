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
def checkout(cluster: Cluster) -> Path:
    return cluster.checkout()


def doctor(
    cluster: Cluster, checkout: Path, *arguments: str, profile: str = "test"
) -> subprocess.CompletedProcess[str]:
    """Run it on the login node, for two nodes."""
    command = [cluster.python, "-m", "bbu.doctor", "--cluster", profile, "--nodes", "2", *arguments]
    return cluster.run(command, cwd=checkout, env={"BBU_IMAGE": str(cluster.image)}, check=False)


def broken(checkout: Path, **changes: object) -> str:
    """The test profile with mistakes; a change of `train` is one of its keys."""
    values = yaml.safe_load((checkout / "configs/clusters/test.yaml").read_text())
    train = values["train"] | changes.pop("train", {})  # pyright: ignore[reportOperatorIssue]
    path = checkout / "site.yaml"
    path.write_text(yaml.safe_dump(values | changes | {"train": train}))
    path.chmod(0o644)
    return str(path)


def findings(done: subprocess.CompletedProcess[str], status: str) -> dict[str, str]:
    """What it says, with the remedy."""
    listed = json.loads(done.stdout)
    return {each["what"]: each["remedy"] for each in listed if each["status"] == status}


def leftovers(checkout: Path) -> list[str]:
    return [path.name for path in (checkout / "jobs").iterdir() if path.name != ".gitignore"]


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


def test_a_ready_site(cluster: Cluster, checkout: Path) -> None:
    done = doctor(cluster, checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.removeprefix("  ok       ") for line in done.stdout.splitlines()]
    for expected in READY:
        on_each = expected.startswith(("the container", "the shared", "the stop"))
        matches = [line for line in lines if line.startswith(expected)]
        assert len(matches) == 2 if on_each else matches, (expected, done.stdout)
    assert {"Slurm", "Container", "Node n1", "Node n2", "Between the nodes"} <= set(lines)
    assert "accounting is on: sacct knows how jobs ended" in lines
    assert "  failure" not in done.stdout and leftovers(checkout) == []


def test_a_ready_site_of_the_newer_slurm_for_a_program(newer: Cluster, checkout: Path) -> None:
    done = doctor(newer, checkout, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    remedies = findings(done, "ok")
    assert any(what.startswith("slurm-wlm 24.11.") for what in remedies)
    assert any(what.startswith("no accounting: Slurm forgets") for what in remedies)
    for expected in READY:
        assert any(what.startswith(expected) for what in remedies), expected
    groups = {each["group"] for each in json.loads(done.stdout)}
    assert {"Node m1", "Node m2", "Between the nodes"} <= groups


def test_mistakes_that_need_no_job(cluster: Cluster, checkout: Path) -> None:
    profile = broken(checkout, image="/no/such.sif", work_folder="/proc/1/jobs", train={"partition": "cpus"})
    done = doctor(cluster, checkout, "--json", profile=profile)
    assert done.returncode == 7, done.stdout + done.stderr
    remedies = findings(done, "failure")
    partition = remedies["train: there is no partition cpus"]
    assert partition.startswith("state one of these under train.partition: cpu, ")
    assert "containers/build.sh" in remedies["no image at /no/such.sif"]
    [folder] = [
        what for what in remedies if what.startswith("work_folder, for job scripts and logs, cannot be written")
    ]
    assert "work_folder" in remedies[folder]
    assert "not tried: what failed above comes first" in findings(done, "warning")


@pytest.mark.parametrize(
    "changes, what, remedy",
    [
        ({"gpus_per_node": 3}, "train: fewer than 2 nodes have 3 GPUs; there are: gpu:2 ", "train.gpus_per_node"),
        ({"cpus_per_task": 5}, "train: fewer than 2 nodes have 5 CPUs", "lower train.cpus_per_task"),
        ({"constraint": "fast&big"}, "train: Slurm would refuse the job: ", "train.constraint"),
    ],
)
def test_what_the_nodes_do_not_have(cluster: Cluster, checkout: Path, changes: dict, what: str, remedy: str) -> None:
    done = doctor(cluster, checkout, "--json", "--no-job", profile=broken(checkout, train=changes))
    assert done.returncode == 7, done.stdout + done.stderr
    [(failure, advice)] = findings(done, "failure").items()
    assert failure.startswith(what) and remedy in advice


def test_a_bind_that_is_not_on_the_nodes(cluster: Cluster, checkout: Path) -> None:
    done = doctor(cluster, checkout, "--json", profile=broken(checkout, binds=["/no/such"]))
    assert done.returncode == 7, done.stdout + done.stderr
    [(what, remedy)] = findings(done, "failure").items()
    assert what.startswith("2 of 2 tasks did not start on ") and "mount source /no/such doesn't exist" in what
    assert remedy == "correct binds: each must be on every node"
    [log_folder] = [name for name in leftovers(checkout) if name in done.stderr]
    assert "FATAL" in (checkout / "jobs" / log_folder / "tasks.log").read_text()


def test_without_the_shield_the_signal_takes_the_image(cluster: Cluster, checkout: Path) -> None:
    done = doctor(cluster, checkout, "--json", profile=broken(checkout, shield="off", network_interface=None))
    assert done.returncode == 7, done.stdout + done.stderr
    remedies = findings(done, "failure")
    assert remedies and all("shield: auto" in remedy for remedy in remedies.values())


def test_an_image_that_is_not_the_pinned_one(cluster: Cluster, checkout: Path) -> None:
    done = doctor(cluster, checkout, "--json", "--no-job", profile=broken(checkout, image_sha256="0" * 64))
    assert done.returncode == 7, done.stdout + done.stderr
    [what] = findings(done, "failure")
    digest = cluster.image.with_name(f"{cluster.image.name}.sha256").read_text().split()[0]
    assert what.endswith(f"its SHA-256 is {digest}")


def test_a_machine_without_torch_and_slurm(cluster: Cluster, checkout: Path) -> None:
    done = doctor(cluster, checkout, "--json", profile="local")
    assert done.returncode == 0, done.stdout + done.stderr
    [(what, remedy)] = findings(done, "warning").items()
    assert what == "torch is not installed: nothing can be trained here" and "pip install" in remedy
    assert "the stop signal USR2 reached 2 of 2 tasks, and the image stayed readable" in findings(done, "ok")
