"""The doctor's judgement of a login node and of the container there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bbu.doctor.findings import OK, WARNING, Finding
from bbu.doctor.login import HostFacts, _mounts_by_kernel, _namespaces_off, container_findings, machine_findings
from bbu.jobs.clusters import ClusterProfile
from tests.doctor.findings import CHECKOUT, lines_of, the_finding

READY = HostFacts("/usr/bin/apptainer", "apptainer version 1.4.5", None, True, True, False, "/usr/bin/squashfuse_ll")


def container(profile: ClusterProfile, **changes: Any) -> list[Finding]:
    return list(container_findings(profile, dataclasses.replace(READY, **changes)))


def test_a_folder_that_cannot_be_written_fails(profile: ClusterProfile):
    blocked = dataclasses.replace(profile, work_folder=f"{CHECKOUT}/README.md/jobs")
    assert [what.split(" cannot")[0] for what in lines_of(machine_findings(blocked, CHECKOUT))] == [
        "work_folder, for job scripts and logs,"
    ]


def test_an_image_that_is_not_pinned_gets_the_line_to_pin_it(profile: ClusterProfile):
    finding = the_finding(container(profile), "the profile takes any")
    assert finding.status == WARNING and "image_sha256: " in finding.remedy
    digest = finding.remedy.split("image_sha256: ")[1]
    assert lines_of(container(dataclasses.replace(profile, image_sha256=digest)), WARNING) == []
    assert (
        "not the image that the profile pins"
        in lines_of(container(dataclasses.replace(profile, image_sha256="0" * 64)))[0]
    )


def test_an_image_that_is_absent_fails(profile: ClusterProfile):
    [what] = lines_of(container(dataclasses.replace(profile, image="/no/such.sif")))
    assert what == "no image at /no/such.sif"


@pytest.mark.parametrize(
    "changes, line",
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
def test_a_problem_of_this_machine_fails_only_where_jobs_run_here(profile: ClusterProfile, changes: dict, line: str):
    assert any(what.startswith(line) for what in lines_of(container(profile, **changes), WARNING))
    local = dataclasses.replace(profile, executor="local")
    assert any(what.startswith(line) for what in lines_of(container(local, **changes)))


def test_modules_are_loaded_in_jobs(profile: ClusterProfile):
    findings = container(dataclasses.replace(profile, modules=["apptainer/1.4"]), apptainer=None)
    assert "jobs load the modules apptainer/1.4" in the_finding(findings, "no apptainer").what


def test_a_setuid_install_needs_nothing_else(profile: ClusterProfile):
    findings = container(profile, kernel_mount=True, fuse=False, squashfuse=None, namespaces_work=False)
    assert len(lines_of(findings, WARNING)) == 1  # the image is not pinned


def test_whether_apptainer_mounts_by_the_kernel(tmp_path: Path):
    starter, configuration = tmp_path / "apptainer/bin/starter-suid", tmp_path / "apptainer.conf"
    starter.parent.mkdir(parents=True)
    starter.touch()
    configuration.write_text("allow setuid = yes\nallow setuid-mount squashfs = iflimited\n")
    build = {
        "APPTAINER_SUID_INSTALL": "1", "LIBEXECDIR": str(tmp_path), "APPTAINER_CONF_FILE": str(configuration)
    }  # fmt: skip
    assert not _mounts_by_kernel(build)  # no setuid bit
    starter.chmod(0o4755)
    assert not _mounts_by_kernel(build)  # forbidden by the configuration
    configuration.write_text("allow setuid = yes\nallow setuid-mount squashfs = yes\n")
    assert _mounts_by_kernel(build) and not _mounts_by_kernel(build | {"APPTAINER_SUID_INSTALL": "0"})


def test_which_setting_forbids_user_namespaces(tmp_path: Path):
    (tmp_path / "user").mkdir()
    (tmp_path / "user/max_user_namespaces").write_text("96365\n")
    assert _namespaces_off(tmp_path) is None
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel/unprivileged_userns_clone").write_text("0\n")
    assert _namespaces_off(tmp_path) == "kernel.unprivileged_userns_clone=0"


def test_a_missing_bind_is_for_the_nodes_to_judge(profile: ClusterProfile):
    findings = container(dataclasses.replace(profile, binds=["/no/such:/data:ro", "/usr"]))
    assert "the bind /no/such:/data:ro: there is no /no/such here" in lines_of(findings, WARNING)
    assert the_finding(findings, "the bind /usr").status == OK
