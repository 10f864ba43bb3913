"""The doctor's judgement of a login node: of real Slurms' own texts, of what this machine has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bbu.doctor.findings import (
    FAILURE,
    OK,
    WARNING,
    Call,
    Finding,
    HostFacts,
    container_findings,
    machine_findings,
    mounts_by_kernel,
    namespaces_off,
)
from bbu.doctor.slurm import (
    Kind,
    account_findings,
    duration_s,
    gpus_of,
    node_findings,
    partition_findings,
    preemption_finding,
    records,
    setting_findings,
    slurm_findings,
    version_finding,
)
from bbu.jobs.clusters import ClusterProfile
from bbu.jobs.queue import config_of
from bbu.jobs.spec import Resources
from tests.doctor.findings import bad, named

TEXTS = Path(__file__).parent / "slurm"
VERSIONS = ("22.05", "24.11")
HOME = Path(__file__).resolve().parents[3]


def text(name: str, version: str) -> str:
    return (TEXTS / f"{name}-{version}.txt").read_text()


def site(version: str, **config: str) -> Call:
    """A `call` that answers with a real site's texts, some settings of its configuration changed."""
    shown = text("config", version)
    for key, value in config.items():
        shown = "\n".join(f"{key} = {value}" if line.split()[:1] == [key] else line for line in shown.splitlines())
    answers = {
        ("sbatch", "--version"): f"slurm-wlm {version}.5\n",
        ("scontrol", "show", "config"): shown,
        ("scontrol", "show", "partition"): text("partition", version),
        ("scontrol", "show", "node"): text("node", version),
        ("sacctmgr", "-nP", "show"): "chem|long,normal\nphys|normal\n",
    }

    def call(argv: Sequence[str]) -> tuple[int, str, str]:
        if "--test-only" in argv:
            return 0, "", "sbatch: Job 245 to start at 2026-11-24T12:23:52 using 2 processors on nodes n[1-2] in cpu\n"
        return next((0, told, "") for start, told in answers.items() if tuple(argv[: len(start)]) == start)

    return call


def have_all(name: str) -> str | None:
    return f"/usr/bin/{name}"


# Slurm


@pytest.mark.parametrize("version", VERSIONS)
def test_a_real_site_is_ready(profile: ClusterProfile, version: str):
    found = list(slurm_findings(profile, 2, "me", site(version), have_all))
    assert bad(found) == []
    assert [what.split(" (")[0] for what in bad(found, WARNING)] == [
        "a job that is cancelled, or preempted without grace, has only 5 s to save",
        "processes that leave their parent may outlive a job",
    ]
    assert named(found, "train: Slurm takes the job").what.endswith("(start 2026-11-24T12:23:52 on n[1-2])")
    assert named(found, "starts again after 10 s").status == OK


def test_without_slurms_commands_nothing_more_is_asked(profile: ClusterProfile):
    [finding] = slurm_findings(profile, 2, "me", site("22.05"), lambda name: None if name == "srun" else name)
    assert finding.status == FAILURE and "srun" in finding.what and "--cluster local" in finding.remedy


def test_a_controller_that_is_down_is_told(profile: ClusterProfile):
    def call(argv: Sequence[str]) -> tuple[int, str, str]:
        down = "slurm_load_ctl_conf error: Unable to contact slurm controller (connect failure)\n"
        return (0, "slurm 23.02.7", "") if argv[0] == "sbatch" else (1, "", down)

    found = list(slurm_findings(profile, 2, "me", call, have_all))
    assert bad(found) == ["Slurm's controller does not answer: slurm_load_ctl_conf error: Unable to contact slurm "
                          "controller (connect failure)"]  # fmt: skip


@pytest.mark.parametrize("told, status", [("slurm 19.05.8", FAILURE), ("slurm 20.11.9", OK), ("slurm-wlm 25.05", OK)])
def test_the_version_has_a_floor(told: str, status: str):
    assert version_finding(told).status == status


def settings(profile: ClusterProfile, version: str = "22.05", which=have_all, **config: str) -> list[Finding]:
    return list(setting_findings(profile, config_of(site(version, **config)(["scontrol", "show", "config"])[1]), which))


def test_the_two_sites_differ_in_what_they_have(profile: ClusterProfile):
    assert named(settings(profile, "22.05"), "accounting is on").status == OK
    assert named(settings(profile, "24.11"), "no accounting: Slurm forgets how a job ended after 600 s").status == OK


def test_an_array_larger_than_the_sites_goes_in_chunks(profile: ClusterProfile):
    wide = dataclasses.replace(profile, convert_tasks=50)
    assert named(settings(wide, "24.11"), "conversion tasks").what.startswith("the 50 conversion tasks go into 3 job")
    assert bad(settings(wide, "24.11", MaxArraySize="0")) == ["this site allows no job arrays (MaxArraySize=0)"]


def test_scrontab_must_be_enabled_and_there(profile: ClusterProfile):
    without = settings(profile, which=lambda name: None if name == "scrontab" else name)
    assert named(without, "no scrontab (there is no scrontab program here)").status == OK
    wanted = dataclasses.replace(profile, eval_schedule="scrontab")
    assert bad(settings(wanted, ScronParameters="(null)")) == [
        "eval_schedule is scrontab, but ScronParameters lacks enable"
    ]
    assert named(settings(wanted), "by scrontab").status == OK


def test_a_well_kept_site_gets_no_warning(profile: ClusterProfile):
    assert bad(settings(profile, KillWait="60 sec", ProctrackType="proctrack/cgroup"), WARNING) == []


def test_forgetting_soon_without_accounting_is_a_warning(profile: ClusterProfile):
    found = settings(profile, AccountingStorageType="accounting_storage/none", MinJobAge="2 sec")
    assert "no accounting: Slurm forgets how a job ended after 2 s (MinJobAge)" in bad(found, WARNING)


@pytest.mark.parametrize(
    "version, name, signal, status",
    [("22.05", "requeue", "TERM (REQUEUE), saves", OK), ("24.11", "cancel", "USR2 (CANCEL), saves", OK)],
)
def test_how_preemption_is_told(version: str, name: str, signal: str, status: str):
    config = config_of(text("config", version))
    found = preemption_finding(config, [r for r in records(text("partition", version)) if r["PartitionName"] == name])
    assert found.status == status and signal in found.what and "30 s" in found.what


def test_preemption_without_grace_is_a_warning():
    config = {"PreemptType": "preempt/partition_prio", "KillWait": "5 sec"}
    found = preemption_finding(config, [{"PartitionName": "p", "PreemptMode": "REQUEUE", "GraceTime": "0"}])
    assert found.status == WARNING and "has 5 s to save" in found.what
    assert preemption_finding({"PreemptType": "preempt/none"}, []).status == OK


@pytest.mark.parametrize(
    "told, seconds",
    [
        ("UNLIMITED", None),
        ("1-12:00:00", 129_600),
        ("00:30:00", 1800),
        ("30:00", 1800),
        ("2-00:00:00", 172_800),
        ("30", 30),
    ],
)
def test_durations(told: str, seconds: int | None):
    assert duration_s(told) == seconds


PARTITIONS = records(
    "PartitionName=gpu AllowAccounts=chem AllowQos=ALL Default=YES MaxNodes=4 MaxTime=1-00:00:00 State=UP\n"
    "PartitionName=old AllowAccounts=ALL AllowQos=ALL Default=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED State=DOWN\n"
)
NODES = records(
    "NodeName=g1 CPUTot=64 ActiveFeatures=nvlink,ib Gres=gpu:a100:8(S:0-1),nvme:1 RealMemory=512000 "
    "State=MIXED Partitions=gpu,old \n"
    "NodeName=g2 CPUTot=64 ActiveFeatures=ib Gres=gpu:v100:4 RealMemory=256000 State=IDLE+DRAIN Partitions=gpu "
    "Reason=bad disk [root@2026-01-02]\n"
)


def wanting(nodes: int = 1, **changes: Any) -> Kind:
    asked = Resources(None, None, None, None, False, 0, None, 1, None, 60, 0)
    return Kind("train", dataclasses.replace(asked, **changes), nodes)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"partition": "gpuu"}, "there is no partition gpuu"),
        ({"partition": "old"}, "partition old is DOWN"),
        ({"time_minutes": 1441}, "1441 minutes are more than partition gpu allows"),
        ({"nodes": 5}, "partition gpu allows 4 nodes, 5 are asked for"),
        ({"account": "phys"}, "partition gpu does not take the account phys"),
    ],
)
def test_what_a_partition_does_not_take(changes: dict, told: str):
    assert bad(partition_findings(wanting(**changes), PARTITIONS)) == [told]


def test_a_site_without_a_default_partition_wants_a_name():
    assert bad(partition_findings(wanting(), PARTITIONS[1:])) == ["no partition is named and the site has no default"]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"nodes": 2}, "1 of 2 nodes are in service, 2 asked for: g2 IDLE+DRAIN (bad disk)"),
        ({"gpus_per_node": 8, "gpu_type": "h100"}, "fewer than 1 nodes have 8 GPUs of type h100; "),
        ({"gpus_per_node": 8, "cpus_per_task": 16}, "fewer than 1 nodes have 128 CPUs; "),
        ({"gpus_per_node": 8, "memory": "64G per gpu"}, "fewer than 1 nodes have 524288 MB of memory; "),
        ({"constraint": "h200"}, "fewer than 1 nodes have the feature h200; "),
    ],
)
def test_what_the_nodes_do_not_have(changes: dict, told: str):
    [what] = bad(node_findings(wanting(**changes), PARTITIONS, NODES))
    assert what.startswith(told)


def test_nodes_that_fit():
    fits = wanting(gpus_per_node=8, gpu_type="a100", cpus_per_task=8, memory="60G per gpu", constraint="nvlink")
    [finding] = node_findings(fits, PARTITIONS, NODES)
    assert finding == Finding(OK, "1 nodes in service have what is asked for, 1 needed")


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
    assert gpus_of(gres, kind) == count


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
    config = config_of(text("config", "22.05")) | {"AccountingStorageEnforce": enforce}
    asked = wanting(account=account, qos=qos).asked
    [finding] = account_findings(asked, config, "me", site("22.05"))
    assert finding.status == status


def test_a_refusal_of_slurm_names_the_key_to_correct(profile: ClusterProfile):
    answers = site("22.05")

    def call(argv: Sequence[str]) -> tuple[int, str, str]:
        refused = "allocation failure: Invalid qos specification\n"
        return (1, "", refused) if "--test-only" in argv else answers(argv)

    found = named(slurm_findings(profile, 1, "me", call, have_all), "train: Slurm would refuse")
    assert found.status == FAILURE and found.remedy == "correct train.qos in the profile"


# This machine and the container

READY = HostFacts("/usr/bin/apptainer", "apptainer version 1.4.5", None, True, True, False, "/usr/bin/squashfuse_ll")


def container(profile: ClusterProfile, **changes: Any) -> list[Finding]:
    return list(container_findings(profile, dataclasses.replace(READY, **changes)))


def test_a_folder_that_cannot_be_written_fails(profile: ClusterProfile):
    blocked = dataclasses.replace(profile, work_folder=f"{HOME}/README.md/jobs")
    assert [what.split(" cannot")[0] for what in bad(machine_findings(blocked, HOME))] == [
        "work_folder, for job scripts and logs,"
    ]


def test_an_image_that_is_not_pinned_gets_the_line_to_pin_it(profile: ClusterProfile):
    finding = named(container(profile), "the profile takes any")
    assert finding.status == WARNING and "image_sha256: " in finding.remedy
    digest = finding.remedy.split("image_sha256: ")[1]
    assert bad(container(dataclasses.replace(profile, image_sha256=digest)), WARNING) == []
    assert (
        "not the image that the profile pins" in bad(container(dataclasses.replace(profile, image_sha256="0" * 64)))[0]
    )


def test_an_image_that_is_absent_fails(profile: ClusterProfile):
    [what] = bad(container(dataclasses.replace(profile, image="/no/such.sif")))
    assert what == "no image at /no/such.sif"


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"apptainer": None}, "no apptainer on PATH here"),
        ({"version": "apptainer version 1.0.3"}, "apptainer version 1.0.3 is too old"),
        (
            {"namespaces_off": "user.max_user_namespaces=0"},
            "user namespaces are forbidden (user.max_user_namespaces=0)",
        ),
        ({"namespaces_work": False}, "user namespaces cannot be made here"),
        ({"fuse": False}, "/dev/fuse cannot be opened"),
    ],
)
def test_what_is_amiss_here_fails_only_where_jobs_run_here(profile: ClusterProfile, changes: dict, told: str):
    assert any(what.startswith(told) for what in bad(container(profile, **changes), WARNING))
    local = dataclasses.replace(profile, executor="local")
    assert any(what.startswith(told) for what in bad(container(local, **changes)))


def test_modules_are_loaded_in_jobs(profile: ClusterProfile):
    found = container(dataclasses.replace(profile, modules=["apptainer/1.4"]), apptainer=None)
    assert "jobs load the modules apptainer/1.4" in named(found, "no apptainer").what


def test_a_setuid_install_needs_nothing_else(profile: ClusterProfile):
    found = container(profile, kernel_mount=True, fuse=False, squashfuse=None, namespaces_work=False)
    assert len(bad(found, WARNING)) == 1  # the image is not pinned


def test_whether_apptainer_mounts_by_the_kernel(tmp_path: Path):
    starter, configuration = tmp_path / "apptainer/bin/starter-suid", tmp_path / "apptainer.conf"
    starter.parent.mkdir(parents=True)
    starter.touch()
    configuration.write_text("allow setuid = yes\nallow setuid-mount squashfs = iflimited\n")
    build = {
        "APPTAINER_SUID_INSTALL": "1", "LIBEXECDIR": str(tmp_path), "APPTAINER_CONF_FILE": str(configuration)
    }  # fmt: skip
    assert not mounts_by_kernel(build)  # no setuid bit
    starter.chmod(0o4755)
    assert not mounts_by_kernel(build)  # forbidden by the configuration
    configuration.write_text("allow setuid = yes\nallow setuid-mount squashfs = yes\n")
    assert mounts_by_kernel(build) and not mounts_by_kernel(build | {"APPTAINER_SUID_INSTALL": "0"})


def test_which_setting_forbids_user_namespaces(tmp_path: Path):
    (tmp_path / "user").mkdir()
    (tmp_path / "user/max_user_namespaces").write_text("96365\n")
    assert namespaces_off(tmp_path) is None
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel/unprivileged_userns_clone").write_text("0\n")
    assert namespaces_off(tmp_path) == "kernel.unprivileged_userns_clone=0"


def test_a_missing_bind_is_for_the_nodes_to_judge(profile: ClusterProfile):
    found = container(dataclasses.replace(profile, binds=["/no/such:/data:ro", "/usr"]))
    assert "the bind /no/such:/data:ro: there is no /no/such here" in bad(found, WARNING)
    assert named(found, "the bind /usr").status == OK
