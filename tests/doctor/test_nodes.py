"""The doctor's judgement of compute nodes, from the reports of their tasks."""

from __future__ import annotations

import pytest

from bbu.doctor.findings import FAILURE, OK, WARNING
from bbu.doctor.nodes import _clock_finding, _explain_log, _has_interface
from bbu.doctor.report import ALL_REDUCE, SIGNAL, BindFacts
from bbu.jobs.clusters import ClusterProfile
from tests.doctor.findings import lines_of, the_finding, with_train
from tests.doctor.reports import findings_of, two_tasks


def test_two_ready_nodes(profile: ClusterProfile):
    findings = findings_of(profile, two_tasks())
    assert {finding.status for finding in findings} == {OK}
    for line in ("hard links are exclusive", "gloo over TCP by lo (127.0.0.1)", "exit code 75 came back"):
        assert the_finding(findings, line)


@pytest.mark.parametrize(
    "first, second, status, line",
    [
        ({"node": {"in_container": False}}, {}, FAILURE, "Python does not run in the container"),
        ({"node": {"user_site": True}}, {}, WARNING, "packages in your home folder hide those of the image"),
        ({}, {"node": {"code": "/opt/bbu/src"}}, FAILURE, "the code runs from /opt/bbu/src"),
        ({}, {"node": {"current_folder": "/tmp"}}, FAILURE, "jobs start in /tmp: the node has no /work"),
        ({"node": {"cpus": 0}}, {}, WARNING, "a task may use 0 CPUs, 1 are requested"),
        ({"node": {"shm_free": 64_000_000}}, {}, WARNING, "/dev/shm has 0.1 GB free"),
        ({"node": {"temporary_free": 100_000_000}}, {}, WARNING, "the folder for temporary files has 0.1 GB"),
        ({"files": {"token": "x"}}, {}, FAILURE, "the work folder is another one than on the login node"),
        ({"files": {"free": 1_000_000_000}}, {}, WARNING, "the work folder has 1.0 GB left"),
        ({}, {"files": {"fsync_s": 9.0}}, WARNING, "writing 4 MB durably took 9.0 s"),
        ({}, {"files": {"clock_ahead_s": 2.0}}, WARNING, "clock +2.00 s against the filesystem's"),
        ({}, {"files": {"clock_ahead_s": -31.0}}, FAILURE, "clock -31.00 s against the filesystem's"),
        ({"node": {"interfaces": {"eth0": "10.0.0.1"}}}, {}, WARNING, "there is no network interface lo"),
        ({"files": {"met": False}}, {"files": {"met": False}}, FAILURE, "the tasks did not see each other's files"),
        ({}, {"files": {"won": True}}, FAILURE, "hard links: 2 tasks won a race that one must win"),
        ({"files": {"won": False, "link_error": "Not permitted"}}, {}, FAILURE, "one must win: Not permitted"),
        ({}, {"files": {"broken_reads": ["ping: Stale file"]}}, FAILURE, "while it was replaced: ping: Stale file"),
        ({"files": {"visible_s": 30.0}}, {}, WARNING, "answered only after 30.0 s"),
        ({"reduced": {"error": "Connection refused"}}, {}, FAILURE, "gloo: task 0 on n1: Connection refused"),
        ({"reduced": {"correct": False}}, {}, FAILURE, "a sum over gloo was wrong"),
        ({"reduced": {"torch": None}}, {}, FAILURE, "torch is not installed"),
        ({}, {"stop": {"image_error": "OSError: Transport"}}, FAILURE, "1 of 1 tasks could not go on: OSError: Tran"),
        ({"stage": ALL_REDUCE}, {}, FAILURE, "1 of 1 tasks ended while summing over all tasks"),
        ({}, {"stage": SIGNAL}, FAILURE, "1 of 1 tasks ended while waiting for the stop signal USR2"),
    ],
)
def test_what_a_report_shows(profile: ClusterProfile, first: dict, second: dict, status: str, line: str):
    finding = the_finding(findings_of(profile, two_tasks(first, second)), line)
    assert finding.status == status and finding.remedy


def test_the_login_nodes_own_clock_counts():
    assert _clock_finding(0.0, 0.0).status == OK
    assert _clock_finding(0.0, 5.0).status == WARNING
    assert _clock_finding(20.0, -20.0).status == FAILURE


def test_an_exit_code_that_is_lost(profile: ClusterProfile):
    assert "the job ended with 75, but 1 came back" in lines_of(findings_of(profile, two_tasks(code=1)))


def test_memory_below_the_request(profile: ClusterProfile):
    small = with_train(profile, memory="30G")
    assert any("30.0 GB requested" in what for what in lines_of(findings_of(small, two_tasks()), WARNING))


def test_binds_inside(profile: ClusterProfile):
    binds = [BindFacts("/a", readable=False, writable=False), BindFacts("/b:/c:ro", readable=True, writable=False)]
    findings = findings_of(profile, two_tasks({"node": {"binds": binds}}))
    assert lines_of(findings) == ["the bind /a cannot be read inside"]
    assert the_finding(findings, "/b:/c:ro can be read, not written").status == OK


@pytest.mark.parametrize(
    "driver, reduced, line",
    [
        ("580.65.06", {"cuda": "13.0", "gpus": ["H100"]}, "a task sees 1 GPUs (1 x H100), 2 are requested"),
        ("570.10", {"cuda": "13.0", "gpus": ["H100"] * 2}, "CUDA 13.0 needs driver 580 or newer"),
        (None, {"cuda": "13.0", "gpu_error": "Found no NVIDIA driver"}, "no NVIDIA driver is seen (Found no NVIDIA"),
        ("580.65.06", {"cuda": "13.0", "gpu_error": "out of memory"}, "CUDA 13.0: out of memory"),
        ("580.65.06", {}, "torch 2.13.0 is built without CUDA, 2 GPUs are requested"),
    ],
)
def test_gpus(profile: ClusterProfile, driver: str | None, reduced: dict, line: str):
    both = {"node": {"driver": driver}, "reduced": reduced}
    findings = findings_of(with_train(profile, gpus_per_node=2), two_tasks(both, both))
    assert any(line in what for what in lines_of(findings))


def test_tasks_that_never_came_are_named_with_their_nodes(profile: ClusterProfile):
    lost = two_tasks(log="1: FATAL:   container creation failed: mount source /data doesn't exist\n", code=255)
    del lost.reports[1]
    [what] = lines_of(findings_of(profile, lost))
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
        ("0: bash: /home/me/bbu/slurm/task.sh: No such file or directory", "put the checkout on a filesystem"),
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
    said, meaning = _explain_log(f"{noise}{line}\nsrun: error: n1: task 0: Exited with exit code 255\n")
    assert said == " ".join(line.split()) and remedy in meaning


@pytest.mark.parametrize(
    "stated, there",
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
def test_interfaces_as_nccl_reads_them(stated: str, there: bool):
    assert _has_interface(stated, ["lo", "eth0"]) is there
