"""The doctor's judgement of compute nodes: of their reports, and of a job that does not come to an end."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pytest

from bbu.doctor import launch as probe_job
from bbu.doctor.findings import (
    FAILURE,
    OK,
    WARNING,
    Finding,
)
from bbu.doctor.launch import Outcome, Report, read_reports, run, slurm_step
from bbu.doctor.network import between, nccl_transport
from bbu.doctor.nodes import Here, clock_finding, explain, has_interface, judge
from bbu.doctor.probe import (
    ALL_REDUCE,
    DONE,
    SIGNAL,
    Plan,
    Stops,
    clock_ahead,
    image_error,
    memory_limit_mb,
    wait_until,
)
from bbu.doctor.slurm import (
    kinds_of,
)
from bbu.jobs.clusters import ClusterProfile
from tests.conftest import SlurmSays
from tests.doctor.findings import asking, bad, named

HOME = Path(__file__).resolve().parents[3]
HERE = Here(HOME, Path("/work"), 0.0)


# Reports from the nodes


def report(rank: int, node: str, **changes: Any) -> Report:
    """What a task on a ready node of CPUs brings back."""
    reduced = {"torch": "2.13.0", "cuda": None, "gpus": [], "gpu_error": None, "backend": "gloo", "error": None,
               "correct": True, "seconds": 0.05, "megabytes": 64, "interface": "lo", "log": ""}  # fmt: skip
    facts = {
        "rank": rank, "world": 2, "stage": DONE, "node": node, "job": "7", "step": "0", "in_container": True,
        "user_site": False, "code": str(HOME), "cwd": "/work", "cpus": 4, "memory_mb": 24_000, "limit_mb": None,
        "shm_free": 8e9, "temporary": {"folder": "/tmp", "free": 50e9}, "binds": [], "driver": None,
        "interfaces": {"lo": "127.0.0.1", "eth0": "10.0.0.1"}, "own_address": "127.0.1.1", "token": "t", "met": True,
        "won": rank == 0, "clock_ahead_s": 0.001, "fsync_s": 0.02, "flock": True, "free": 90e9, "reduce": reduced,
        "signal": "SIGUSR2", "image_error": None, **({"visible_s": 0.01} if rank == 0 else {"broken_reads": []}),
    }  # fmt: skip
    return facts | changes | {"reduce": reduced | changes.get("reduce", {})}


def outcome(first: dict | None = None, second: dict | None = None, **changes: Any) -> Outcome:
    reports = {0: report(0, "n1", **(first or {})), 1: report(1, "n2", **(second or {}))}
    return dataclasses.replace(Outcome(2, reports, 75, "", "n[1-2]", 1.0, None), **changes)


def told(profile: ClusterProfile, result: Outcome, here: Here = HERE, nodes: int = 2) -> list[Finding]:
    plan = Plan("t", profile.train.gpus_per_node, profile.network_interface, profile.binds, 64, 60)
    groups = judge(profile, kinds_of(profile, nodes)[0], plan, result, here)
    return [finding for group in groups for finding in group.findings]


def test_two_ready_nodes(profile: ClusterProfile):
    found = told(profile, outcome())
    assert {finding.status for finding in found} == {OK}
    for line in ("hard links are exclusive", "gloo over TCP by lo (127.0.0.1)", "exit code 75 came back"):
        assert named(found, line)


@pytest.mark.parametrize(
    "first, second, status, line",
    [
        ({"in_container": False}, {}, FAILURE, "Python does not run in the container"),
        ({"user_site": True}, {}, WARNING, "packages in your home folder hide those of the image"),
        ({}, {"code": "/opt/bbu/src"}, FAILURE, "the code runs from /opt/bbu/src"),
        ({}, {"cwd": "/tmp"}, FAILURE, "jobs start in /tmp: the node has no /work"),
        ({"cpus": 0}, {}, WARNING, "a task may use 0 CPUs, 1 are asked for"),
        ({"shm_free": 64e6}, {}, WARNING, "/dev/shm has 0.1 GB free"),
        ({"temporary": {"folder": "/tmp", "free": 1e8}}, {}, WARNING, "the folder for temporary files has 0.1 GB"),
        ({"token": "x"}, {}, FAILURE, "the work folder is another one than on the login node"),
        ({"free": 1e9}, {}, WARNING, "the work folder has 1.0 GB left"),
        ({}, {"fsync_s": 9.0}, WARNING, "writing 4 MB durably took 9.0 s"),
        ({}, {"clock_ahead_s": 2.0}, WARNING, "clock +2.00 s against the filesystem's"),
        ({}, {"clock_ahead_s": -31.0}, FAILURE, "clock -31.00 s against the filesystem's"),
        ({"interfaces": {"eth0": "10.0.0.1"}}, {}, WARNING, "there is no network interface lo"),
        ({"met": False}, {"met": False}, FAILURE, "the tasks did not see each other's files"),
        ({}, {"won": True}, FAILURE, "hard links: 2 tasks won a race that one must win"),
        ({"won": False, "link_error": "Operation not permitted"}, {}, FAILURE, "must win: Operation not permitted"),
        ({}, {"broken_reads": ["ping: Stale file handle"]}, FAILURE, "while it was replaced: ping: Stale file handle"),
        ({"visible_s": 30.0}, {}, WARNING, "answered only after 30.0 s"),
        ({"reduce": {"error": "Connection refused"}}, {}, FAILURE, "gloo: task 0 on n1: Connection refused"),
        ({"reduce": {"correct": False}}, {}, FAILURE, "a sum over gloo was wrong"),
        ({"reduce": {"torch": None}}, {}, FAILURE, "torch is not installed"),
        ({}, {"image_error": "OSError: Transport endpoint"}, FAILURE, "1 of 1 tasks could not go on: OSError: Tran"),
        ({"stage": ALL_REDUCE}, {}, FAILURE, "1 of 1 tasks ended while summing over all tasks"),
        ({}, {"stage": SIGNAL}, FAILURE, "1 of 1 tasks ended while waiting for the stop signal USR2"),
    ],
)
def test_what_a_report_shows(profile: ClusterProfile, first: dict, second: dict, status: str, line: str):
    found = named(told(profile, outcome(first, second)), line)
    assert found.status == status and found.remedy


def test_the_login_nodes_own_clock_counts():
    assert clock_finding(0.0, 0.0).status == OK
    assert clock_finding(0.0, 5.0).status == WARNING
    assert clock_finding(20.0, -20.0).status == FAILURE


def test_an_exit_code_that_is_lost(profile: ClusterProfile):
    assert "the job ended with 75, but 1 came back" in bad(told(profile, outcome(code=1)))


def test_memory_below_what_is_asked(profile: ClusterProfile):
    small = asking(profile, memory="30G")
    assert any("30.0 GB asked for" in what for what in bad(told(small, outcome()), WARNING))


def test_binds_inside(profile: ClusterProfile):
    binds = [
        {"bind": "/a", "readable": False, "writable": False},
        {"bind": "/b:/c:ro", "readable": True, "writable": False},
    ]
    found = told(profile, outcome({"binds": binds}))
    assert bad(found) == ["the bind /a cannot be read inside"]
    assert named(found, "/b:/c:ro can be read, not written").status == OK


@pytest.mark.parametrize(
    "driver, reduced, line",
    [
        ("580.65.06", {"cuda": "13.0", "gpus": ["H100"]}, "a task sees 1 GPUs (1 x H100), 2 are asked for"),
        ("570.10", {"cuda": "13.0", "gpus": ["H100"] * 2}, "CUDA 13.0 needs driver 580 or newer"),
        (None, {"cuda": "13.0", "gpu_error": "Found no NVIDIA driver"}, "no NVIDIA driver is seen (Found no NVIDIA"),
        ("580.65.06", {"cuda": "13.0", "gpu_error": "out of memory"}, "CUDA 13.0: out of memory"),
        ("580.65.06", {}, "torch 2.13.0 is built without CUDA, 2 GPUs are asked for"),
    ],
)
def test_gpus(profile: ClusterProfile, driver: str | None, reduced: dict, line: str):
    both = {"driver": driver, "reduce": {"gpus": [], **reduced}}
    assert any(line in what for what in bad(told(asking(profile, gpus_per_node=2), outcome(both, both))))


def test_tasks_that_never_came_are_named_with_their_nodes(profile: ClusterProfile, slurm_says: SlurmSays):
    slurm_says("scontrol", "n1\nn2\n")
    lost = outcome(log="1: FATAL:   container creation failed: mount source /data doesn't exist\n", code=255)
    del lost.reports[1]
    [what] = bad(told(profile, lost))
    assert what.startswith("1 of 2 tasks did not start on n2: 1: FATAL: container creation failed")


@pytest.mark.parametrize(
    "line, remedy",
    [
        ("0: container.sh: apptainer is not on PATH; install or load it, or unset BBU_IMAGE", "under modules"),
        ("0: container.sh: no image at BBU_IMAGE=/x.sif; build it with containers/build.sh", "put the image on a"),
        (
            "0: FATAL:   container creation failed: mount hook function failure: mount /no/such->/no/such error: while "
            "mounting /no/such: mount source /no/such doesn't exist",
            "correct binds",
        ),
        (
            "ERROR  : Failed to create user namespace: maximum number of user namespaces exceeded, check "
            "/proc/sys/user/max_user_namespaces",
            "allow user namespaces",
        ),
        ("ERROR  : Failed to create mount namespace: mount namespace requires privileges", "allow user namespaces"),
        (
            "FATAL:   container creation failed: mount /proc/self/fd/3->/var/apptainer/mnt/session/rootfs error: while "
            "mounting image /proc/self/fd/3: squashfuse_ll exited with status 1: fuse: failed to exec fusermount3: No "
            "such file or directory",
            "allow /dev/fuse",
        ),
        ("0: container.sh: squashfuse_ll could not mount /i.sif; is /dev/fuse open to you?", "allow /dev/fuse"),
        ("0: bash: line 1: module: command not found", "correct modules"),
        ("0: bash: /home/me/bbu/slurm/container.sh: No such file or directory", "put the checkout on a filesystem"),
        (
            "srun: error: Unable to allocate resources: Invalid account or account/partition combination specified",
            "under train in the profile",
        ),
        ("0: /usr/bin/python: No module named bbu", "do not see the code"),
        ("srun: error: Node failure on n2", "sinfo -R"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=9.0", "raise train.memory"),
    ],
)
def test_what_the_usual_messages_mean(line: str, remedy: str):
    noise = "srun: launch/slurm: _step_signal: Terminating StepId=284.0\n"
    found, meaning = explain(f"{noise}{line}\nsrun: error: n1: task 0: Exited with exit code 255\n")
    assert found == " ".join(line.split()) and remedy in meaning


@pytest.mark.parametrize(
    "wanted, there",
    [
        ("ib0", False),
        ("eth", True),
        ("=eth", False),
        ("=eth0", True),
        ("^lo,docker", True),
        ("^=lo,eth", False),
        ("ib0,eth0", True),
    ],
)
def test_interfaces_as_nccl_reads_them(wanted: str, there: bool):
    assert has_interface(wanted, ["lo", "eth0"]) is there


IB_LOG = """
n1:985:1010 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB ib0:10.1.0.1<0>
n1:985:1010 [0] NCCL INFO Using network IB
n1:985:1263 [0] NCCL INFO Channel 07/0 : 0[0] -> 2[0] [receive] via NET/IB/3/GDRDMA
n1:985:1263 [1] NCCL INFO Channel 01/0 : 3[1] -> 1[1] [send] via NET/IB/2/GDRDMA
n1:985:1263 [1] NCCL INFO Channel 00/0 : 3[1] -> 2[0] via P2P/CUMEM
n1:985:1263 [1] NCCL INFO Channel 01/0 : 3[1] -> 2[0] via P2P/CUMEM/read
"""
SOCKET_LOG = """
n1:985:1010 [0] NCCL INFO NET/IB : No device found.
n1:985:1010 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>
n1:985:1010 [0] NCCL INFO Using network Socket
n1:985:1263 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0
"""
OLD_LOG = "nodea:26799:27030 [4] NCCL INFO Channel 00 : 4[89000] -> 3[4d000] via P2P/direct pointer/read\n"


def test_the_log_of_nccl_is_read():
    ways = {"NET/IB/GDRDMA": 2, "P2P/CUMEM": 2}
    assert (nccl_transport(IB_LOG).network, nccl_transport(IB_LOG).ways) == ("IB", Counter(ways))
    assert nccl_transport(SOCKET_LOG).has_sockets and not nccl_transport(IB_LOG).has_sockets
    assert nccl_transport(OLD_LOG).ways == Counter({"P2P/direct": 1})
    assert nccl_transport("").network is None


@pytest.mark.parametrize(
    "log, status, line",
    [
        (IB_LOG, OK, "transport: NET/IB/GDRDMA (4), P2P/CUMEM (4); network IB"),
        (SOCKET_LOG, WARNING, "NCCL goes between the nodes by plain sockets"),
        (IB_LOG.replace("P2P/CUMEM", "SHM/direct"), WARNING, "GPUs of a node talk through host memory"),
    ],
)
def test_the_way_that_nccl_takes(log: str, status: str, line: str):
    reduced = {"reduce": {"backend": "nccl", "log": log}}
    found = named(between(outcome(reduced, reduced)), line)
    assert found.status == status


# What is looked at on a node


def test_a_memory_limit_is_the_narrowest_on_the_way_up(tmp_path: Path):
    step = tmp_path / "slurm/job_7/step_0"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    (step.parent / "memory.max").write_text(f"{512 << 20}\n")
    assert memory_limit_mb("0::/slurm/job_7/step_0\n", tmp_path) == 512
    assert memory_limit_mb("1:memory:/slurm\n", tmp_path) is None


def test_the_clock_of_the_filesystem_here_is_ours(tmp_path: Path):
    assert abs(clock_ahead(tmp_path)) < 0.1


def test_an_image_that_is_there_can_be_read():
    assert image_error() is None


# The job


class Played:
    """A launch that does what the test says; `steps` is what `state` tells, again and again at the end."""

    def __init__(self, folder: Path, steps: Sequence[tuple[str, str, str]], code: int | None = None) -> None:
        self.folder, self.steps, self.code = folder, list(steps), code
        self.signals, self.stopped = 0, False

    def start(self, log: IO[bytes]) -> None:
        log.write(b"srun: hello\n")

    def poll(self) -> int | None:
        return -15 if self.stopped else self.code

    def state(self) -> tuple[str, str, str]:
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        if step[0] == "interrupt":
            raise KeyboardInterrupt
        return step

    def send_signal(self, reports: Mapping[int, Report]) -> None:
        self.signals += 1
        self.code = 75

    def stop(self) -> None:
        self.stopped = True


def silent(text: str) -> None:
    pass


def test_a_job_that_waits_too_long_is_cancelled_and_says_why(tmp_path: Path, profile: ClusterProfile):
    launch = Played(tmp_path, [("PENDING", "Resources", "")])
    said: list[str] = []
    result = run(launch, tmp_path, 2, 0.005, said.append)
    assert launch.stopped and said == ["the job waits in the queue: PENDING (Resources)"]
    [what] = bad(told(profile, result))
    assert what == "the job did not start within 0.005 minutes and was cancelled (PENDING, reason Resources)"


def test_a_job_that_hangs_is_cancelled(tmp_path: Path):
    launch = Played(tmp_path, [("RUNNING", "None", "n[1-2]")])
    result = run(launch, tmp_path, 2, 1, silent, run_s=0.2)
    assert launch.stopped and result.problem and "without an end" in result.problem.what
    assert (result.nodes, result.log) == ("n[1-2]", "srun: hello\n")


def test_ctrl_c_cancels_the_job(tmp_path: Path):
    launch = Played(tmp_path, [("PENDING", "Resources", ""), ("interrupt", "", "")])
    with pytest.raises(KeyboardInterrupt):
        run(launch, tmp_path, 2, 1, silent)
    assert launch.stopped


def test_the_signal_is_sent_once_when_all_tasks_are_ready(tmp_path: Path):
    launch = Played(tmp_path, [("RUNNING", "None", "n1")])
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps({"stage": SIGNAL, "rank": rank}))
    result = run(launch, tmp_path, 2, 1, silent)
    assert (launch.signals, launch.stopped, result.code, len(result.reports)) == (1, False, 75, 2)


def test_the_step_asks_for_what_a_training_job_asks(profile: ClusterProfile, tmp_path: Path):
    wanted = asking(dataclasses.replace(profile, modules=["apptainer"]), gpus_per_node=4, account="chem", nice=100)
    step = slurm_step(wanted, HOME, 2, tmp_path)
    for option in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--account=chem", "--time=10"):
        assert option in step.argv
    assert "--nice=100" not in step.argv and 'module load apptainer && exec "$@"' in step.argv
    assert step.environment["BBU_BINDS"] == str(tmp_path)


def test_a_job_around_us_is_not_handed_on(profile: ClusterProfile, tmp_path: Path):
    environ = {"SLURM_JOB_ID": "1", "SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin"}
    made = probe_job.probe_environment(profile, HOME, tmp_path, environ)
    assert "SLURM_JOB_ID" not in made and made["SLURM_CONF"] == "/etc/slurm.conf"


# The entry


def doctor(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bbu.doctor", *arguments]
    environ = os.environ | {"PYTHONPATH": str(HOME)}
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120)


def test_this_machine_is_ready(tmp_path: Path):
    done = doctor("--cluster", "local", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = {finding["what"] for finding in json.loads(done.stdout)}
    assert any(what.startswith("2 tasks summed 64 MB over gloo") for what in told), told
    assert "the stop signal USR2 reached 2 of 2 tasks, and the image stayed readable" in told
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == [".gitignore"]


def test_help_is_quick_and_loads_nothing_heavy():
    code = "import sys, bbu.doctor; print({'torch', 'submitit', 'transformers'} & set(sys.modules))"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=HOME, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n" and time.monotonic() - start < 2


def test_fewer_than_one_node_is_refused(tmp_path: Path):
    assert doctor("--nodes", "0", folder=tmp_path).returncode == 7


def test_stops_and_waiting():
    assert Stops(lambda: signal.SIGUSR2.name).received() == "SIGUSR2"
    assert wait_until(lambda: True, 0) and not wait_until(lambda: False, 0.01)
    assert read_reports(Path("/nonexistent"), 2) == {}
