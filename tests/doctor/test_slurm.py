"""The doctor's judgement of Slurm, from the answers of real sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bbu.doctor.findings import FAILURE, OK, WARNING, Call, Finding
from bbu.doctor.slurm import (
    JobKind,
    _account_findings,
    _capacity_findings,
    _duration_s,
    _gpu_count,
    _partition_findings,
    _preemption_finding,
    _read_records,
    _setting_findings,
    _version_finding,
    slurm_findings,
)
from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.queue import parse_slurm_config
from bbu.jobs.spec import Resources
from tests.doctor.findings import lines_of, the_finding

TEXTS = Path(__file__).parent / "slurm"
VERSIONS = ("22.05", "24.11")


def recorded_text(name: str, version: str) -> str:
    return (TEXTS / f"{name}-{version}.txt").read_text()


def site(version: str, **config: str) -> Call:
    """A `call` that answers with a real site's texts, some settings of its configuration changed."""
    shown = recorded_text("config", version)
    for key, value in config.items():
        shown = "\n".join(f"{key} = {value}" if line.split()[:1] == [key] else line for line in shown.splitlines())
    answers = {
        ("sbatch", "--version"): f"slurm-wlm {version}.5\n",
        ("scontrol", "show", "config"): shown,
        ("scontrol", "show", "partition"): recorded_text("partition", version),
        ("scontrol", "show", "node"): recorded_text("node", version),
        ("sacctmgr", "-nP", "show"): "chem|long,normal\nphys|normal\n",
    }

    def call(argv: Sequence[str]) -> tuple[int, str, str]:
        if "--test-only" in argv:
            return 0, "", "sbatch: Job 245 to start at 2026-11-24T12:23:52 using 2 processors on nodes n[1-2] in cpu\n"
        return next((0, answer, "") for start, answer in answers.items() if tuple(argv[: len(start)]) == start)

    return call


def find_any(name: str) -> str | None:
    return f"/usr/bin/{name}"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_real_site_is_ready(profile: ClusterProfile, version: str):
    findings = list(slurm_findings(profile, 2, "me", site(version), find_any))
    assert lines_of(findings) == []
    assert [what.split(" (")[0] for what in lines_of(findings, WARNING)] == [
        "a job that is cancelled, or preempted without grace, has only 5 s to save",
        "processes that leave their parent may outlive a job",
    ]
    assert the_finding(findings, "train: Slurm takes the job").what.endswith("(start 2026-11-24T12:23:52 on n[1-2])")
    assert the_finding(findings, "starts again after 10 s").status == OK


def test_without_slurms_commands_nothing_more_is_queried(profile: ClusterProfile):
    [finding] = slurm_findings(profile, 2, "me", site("22.05"), lambda name: None if name == "srun" else name)
    assert finding.status == FAILURE and "srun" in finding.what and "--cluster local" in finding.remedy


def test_a_controller_that_is_down_is_reported(profile: ClusterProfile):
    def call(argv: Sequence[str]) -> tuple[int, str, str]:
        down = "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)\n"
        return (0, "slurm 23.02.7", "") if argv[0] == "sbatch" else (1, "", down)

    findings = list(slurm_findings(profile, 2, "me", call, find_any))
    refusal = "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)"
    assert lines_of(findings) == [f"Slurm's controller does not answer: {refusal}"]


@pytest.mark.parametrize("answer, status", [("slurm 19.05.8", FAILURE), ("slurm 20.11.9", OK), ("slurm-wlm 25.05", OK)])
def test_the_version_has_a_floor(answer: str, status: str):
    assert _version_finding(answer).status == status


def setting_findings(profile: ClusterProfile, version: str = "22.05", which=find_any, **config: str) -> list[Finding]:
    return list(
        _setting_findings(
            profile, parse_slurm_config(site(version, **config)(["scontrol", "show", "config"])[1]), which
        )
    )


def test_the_two_sites_differ_in_what_they_have(profile: ClusterProfile):
    assert the_finding(setting_findings(profile, "22.05"), "accounting is on").status == OK
    assert (
        the_finding(
            setting_findings(profile, "24.11"), "no accounting: Slurm forgets how a job ended after 600 s"
        ).status
        == OK
    )


def test_an_array_larger_than_the_sites_goes_in_chunks(profile: ClusterProfile):
    wide = dataclasses.replace(profile, convert_tasks=50)
    assert the_finding(setting_findings(wide, "24.11"), "conversion tasks").what.startswith(
        "the 50 conversion tasks go into 3 job"
    )
    assert lines_of(setting_findings(wide, "24.11", MaxArraySize="0")) == [
        "this site allows no job arrays (MaxArraySize=0)"
    ]


def test_scrontab_must_be_enabled_and_there(profile: ClusterProfile):
    without = setting_findings(profile, which=lambda name: None if name == "scrontab" else name)
    assert the_finding(without, "no scrontab (there is no scrontab program here)").status == OK
    scrontab = dataclasses.replace(profile, eval_schedule="scrontab")
    assert lines_of(setting_findings(scrontab, ScronParameters="(null)")) == [
        "eval_schedule is scrontab, but ScronParameters lacks enable"
    ]
    assert the_finding(setting_findings(scrontab), "by scrontab").status == OK


def test_a_well_configured_site_gets_no_warning(profile: ClusterProfile):
    assert lines_of(setting_findings(profile, KillWait="60 sec", ProctrackType="proctrack/cgroup"), WARNING) == []


def test_forgetting_soon_without_accounting_is_a_warning(profile: ClusterProfile):
    findings = setting_findings(profile, AccountingStorageType="accounting_storage/none", MinJobAge="2 sec")
    assert "no accounting: Slurm forgets how a job ended after 2 s (MinJobAge)" in lines_of(findings, WARNING)


@pytest.mark.parametrize(
    "version, name, signal, status",
    [("22.05", "requeue", "TERM (REQUEUE), saves", OK), ("24.11", "cancel", "USR2 (CANCEL), saves", OK)],
)
def test_how_preemption_is_reported(version: str, name: str, signal: str, status: str):
    config = parse_slurm_config(recorded_text("config", version))
    findings = _preemption_finding(
        config, [r for r in _read_records(recorded_text("partition", version)) if r["PartitionName"] == name]
    )
    assert findings.status == status and signal in findings.what and "30 s" in findings.what


def test_preemption_without_grace_is_a_warning():
    config = {"PreemptType": "preempt/partition_prio", "KillWait": "5 sec"}
    findings = _preemption_finding(config, [{"PartitionName": "p", "PreemptMode": "REQUEUE", "GraceTime": "0"}])
    assert findings.status == WARNING and "has 5 s to save" in findings.what
    assert _preemption_finding({"PreemptType": "preempt/none"}, []).status == OK


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("UNLIMITED", None),
        ("1-12:00:00", 129_600),
        ("00:30:00", 1800),
        ("30:00", 1800),
        ("2-00:00:00", 172_800),
        ("30", 30),
    ],
)
def test_durations(text: str, seconds: int | None):
    assert _duration_s(text) == seconds


PARTITIONS = _read_records(
    "PartitionName=gpu AllowAccounts=chem AllowQos=ALL Default=YES MaxNodes=4 MaxTime=1-00:00:00 State=UP\n"
    "PartitionName=old AllowAccounts=ALL AllowQos=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=DOWN\n"
)
NODES = _read_records(
    "NodeName=g1 CPUTot=64 ActiveFeatures=nvlink,ib Gres=gpu:a100:8(S:0-1),nvme:1 RealMemory=512000 "
    "State=MIXED Partitions=gpu,old \n"
    "NodeName=g2 CPUTot=64 ActiveFeatures=ib Gres=gpu:v100:4 RealMemory=256000 State=IDLE+DRAIN Partitions=gpu "
    "Reason=bad disk [root@2026-01-02]\n"
)


def job_kind(nodes: int = 1, **changes: Any) -> JobKind:
    """A training job that requests next to nothing, with changes."""
    resources = Resources(None, None, None, None, False, 0, None, 1, None, 60, 0)
    return JobKind("train", dataclasses.replace(resources, **changes), nodes)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"partition": "gpuu"}, "there is no partition gpuu"),
        ({"partition": "old"}, "partition old is DOWN"),
        ({"time_minutes": 1441}, "1441 minutes are more than partition gpu allows"),
        ({"nodes": 5}, "partition gpu allows 4 nodes, 5 are requested"),
        ({"account": "phys"}, "partition gpu does not take the account phys"),
    ],
)
def test_what_a_partition_does_not_take(changes: dict, line: str):
    assert lines_of(_partition_findings(job_kind(**changes), PARTITIONS)) == [line]


def test_a_site_without_a_default_partition_needs_a_name():
    assert lines_of(_partition_findings(job_kind(), PARTITIONS[1:])) == [
        "no partition is named and the site has no default"
    ]


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"nodes": 2}, "1 of 2 nodes are in service, 2 requested: g2 IDLE+DRAIN (bad disk)"),
        ({"gpus_per_node": 8, "gpu_type": "h100"}, "fewer than 1 nodes have 8 GPUs of type h100; "),
        ({"gpus_per_node": 8, "cpus_per_task": 16}, "fewer than 1 nodes have 128 CPUs; "),
        ({"gpus_per_node": 8, "memory": "64G per gpu"}, "fewer than 1 nodes have 524288 MB of memory; "),
        ({"constraint": "h200"}, "fewer than 1 nodes have the feature h200; "),
    ],
)
def test_what_the_nodes_do_not_have(changes: dict, line: str):
    [what] = lines_of(_capacity_findings(job_kind(**changes), PARTITIONS, NODES))
    assert what.startswith(line)


def test_nodes_that_fit():
    fits = job_kind(gpus_per_node=8, gpu_type="a100", cpus_per_task=8, memory="60G per gpu", constraint="nvlink")
    [finding] = _capacity_findings(fits, PARTITIONS, NODES)
    assert finding == Finding(OK, "1 nodes in service have what is requested, 1 needed")


@pytest.mark.parametrize(
    "gres, kind, count",
    [
        ("gpu:2", None, 2),
        ("gpu:a100:8(S:0-1),nvme:1", None, 8),
        ("gpu:a100:4,gpu:h100:2", "h100", 2),
        ("(null)", None, 0),
    ],
)
def test_counting_gpus(gres: str, kind: str | None, count: int):
    assert _gpu_count(gres, kind) == count


@pytest.mark.parametrize(
    "enforce, account, qos, status",
    [
        ("none", "bio", None, WARNING),
        ("associations,limits", "bio", None, FAILURE),
        ("none", "chem", "long", OK),
        ("associations", "phys", "long", FAILURE),
        ("none", None, "normal", OK),
    ],
)
def test_accounts_and_qos(enforce: str, account: str | None, qos: str | None, status: str):
    config = parse_slurm_config(recorded_text("config", "22.05")) | {"AccountingStorageEnforce": enforce}
    resources = job_kind(account=account, qos=qos).resources
    [finding] = _account_findings(resources, config, "me", site("22.05"))
    assert finding.status == status


def test_a_refusal_of_slurm_names_the_key_to_correct(profile: ClusterProfile):
    answers = site("22.05")

    def call(argv: Sequence[str]) -> tuple[int, str, str]:
        refused = "allocation failure: Invalid qos specification\n"
        return (1, "", refused) if "--test-only" in argv else answers(argv)

    findings = the_finding(slurm_findings(profile, 1, "me", call, find_any), "train: Slurm would refuse")
    assert findings.status == FAILURE and findings.remedy == "correct train.qos in the profile"
