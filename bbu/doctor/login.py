"""Is this machine ready? The doctor's checks of the login node and of the container, without a job.

Every check takes facts instead of looking at the machine itself, so that a test can bring another site's.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bbu.doctor.findings import GB, LEAST_FREE_GB, Call, Finding, Judgement, failure, ok, warning
from bbu.jobs.clusters import ClusterProfile
from bbu.run.provenance import file_hash

_PACKAGES = {"yaml": "pyyaml", "submitit": "submitit", "numpy": "numpy", "PIL": "pillow", "tabulate": "tabulate"}
"""What submitting, converting and watching need: name of the import → name of the package."""
_OLDEST_APPTAINER = (1, 1)
"""The first version that enters an image without root."""


def machine_findings(profile: ClusterProfile, checkout: Path) -> Iterator[Finding]:
    """Check the login node itself: Python, its packages, and the folders that jobs write to."""
    yield ok(f"Python {platform.python_version()}, code from {checkout}")
    missing = [package for name, package in _PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        yield failure(f"Python packages are missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    yield _folder_finding("work_folder, for job scripts and logs,", Path(profile.work_folder).absolute())
    yield _folder_finding("the current folder, where runs are written,", Path.cwd())


def _folder_finding(role: str, folder: Path) -> Finding:
    """Check that files can be written there. A folder that does not exist yet is made below its nearest parent."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        remedy = "choose one you may write to that all nodes see: state it under work_folder, or work in another folder"
        return failure(f"{role} cannot be written: {existing}", remedy)
    free = shutil.disk_usage(existing).free / GB
    if free < LEAST_FREE_GB:
        return warning(f"{role} has {free:.1f} GB left: {folder}", "remove old runs, or choose another filesystem")
    return ok(f"{role} can be written, {free:.0f} GB free: {folder}")


@dataclass(frozen=True)
class HostFacts:
    """What entering a container needs, as this machine has it."""

    apptainer: str | None
    """Path of the program."""
    version: str
    """What `apptainer --version` prints."""
    namespaces_off: str | None
    """The kernel's setting that forbids user namespaces; None if no setting does."""
    namespaces_work: bool
    """Whether a user namespace could be made."""
    fuse: bool
    """Whether /dev/fuse can be opened."""
    kernel_mount: bool
    """Whether Apptainer is a setuid install that mounts images through the kernel."""
    squashfuse: str | None
    """Path of squashfuse_ll, which serves an image where the kernel does not mount it."""


def host_facts(call: Call) -> HostFacts:
    """Look at this machine."""
    build = _build_settings(call(["apptainer", "buildcfg"])[1])
    bundled = Path(build.get("LIBEXECDIR", "/nonexistent")) / "apptainer/bin/squashfuse_ll"
    return HostFacts(
        apptainer=shutil.which("apptainer"),
        version=call(["apptainer", "--version"])[1].strip(),
        namespaces_off=_namespaces_off(Path("/proc/sys")),
        namespaces_work=call(["unshare", "-Ur", "true"])[0] == 0,
        fuse=os.access("/dev/fuse", os.R_OK | os.W_OK),
        kernel_mount=_mounts_by_kernel(build),
        squashfuse=shutil.which("squashfuse_ll") or (str(bundled) if bundled.is_file() else None),
    )


def _build_settings(text: str) -> dict[str, str]:
    """Read what `apptainer buildcfg` prints."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def _namespaces_off(proc_sys: Path) -> str | None:
    """Return the setting that forbids user namespaces to ordinary users. Not every kernel has each setting."""
    forbidding = {"user/max_user_namespaces": "0", "kernel/unprivileged_userns_clone": "0"}
    for name, value in forbidding.items():
        path = proc_sys / name
        if path.exists() and path.read_text().strip() == value:
            return f"{name.replace('/', '.')}={value}"
    return None


def _mounts_by_kernel(build: Mapping[str, str]) -> bool:
    """Return whether the kernel mounts images, so that no signal can take an image away.

    slurm/container.sh decides by the same rule (`mounts_by_kernel` there).
    """
    if build.get("APPTAINER_SUID_INSTALL") != "1":
        return False
    starter = Path(build.get("LIBEXECDIR", "")) / "apptainer/bin/starter-suid"
    configuration = Path(build.get("APPTAINER_CONF_FILE", ""))
    if not starter.is_file() or not starter.stat().st_mode & stat.S_ISUID or not configuration.is_file():
        return False
    forbidden = r"(?m)^allow (setuid|setuid-mount squashfs) *= *(no|iflimited)"
    return not re.search(forbidden, configuration.read_text())


def container_findings(profile: ClusterProfile, facts: HostFacts) -> Iterator[Finding]:
    """Check whether the profile's image can be entered here.

    On a cluster a problem of this machine alone is a warning: jobs enter the image on the compute nodes, which the
    doctor's job checks.
    """
    if not profile.image:
        yield ok("no image in this profile: jobs run in this Python, without a container")
        return
    problem = failure if profile.executor == "local" else warning
    yield _apptainer_finding(profile, facts, problem)
    if facts.apptainer:
        yield from _mount_findings(profile, facts, problem)
    yield from _image_findings(profile)
    yield from _bind_findings(profile, problem)


def _apptainer_finding(profile: ClusterProfile, facts: HostFacts, problem: Judgement) -> Finding:
    modules = ", ".join(profile.modules)
    if not facts.apptainer and modules:
        return warning(
            f"no apptainer on PATH here; jobs load the modules {modules} first",
            f"nothing, if the compute nodes have it with these modules; to use it here: module load {modules}",
        )
    if not facts.apptainer:
        return problem(
            "no apptainer on PATH here",
            "if the site has a module for it (module avail apptainer), name it under modules; else ask the "
            "administrators to install Apptainer",
        )
    number = re.search(r"(\d+)\.(\d+)", facts.version)
    if number and (int(number[1]), int(number[2])) < _OLDEST_APPTAINER:
        return problem(f"{facts.version} is too old to enter an image without root", "use Apptainer 1.1 or newer")
    return ok(f"{facts.version}: {facts.apptainer}")


def _mount_findings(profile: ClusterProfile, facts: HostFacts, problem: Judgement) -> Iterator[Finding]:
    if facts.kernel_mount:
        yield ok("Apptainer mounts images through the kernel (setuid): no user namespaces, FUSE or shield needed")
        return
    if facts.namespaces_off:
        setting, admin = facts.namespaces_off, "ask the administrators to allow user namespaces"
        yield problem(f"user namespaces are forbidden ({setting})", f"{admin}, or for a setuid install of Apptainer")
    elif not facts.namespaces_work:
        yield problem(
            "user namespaces cannot be made here (unshare -Ur true fails)",
            "ask the administrators: AppArmor (apparmor_restrict_unprivileged_userns) or SELinux may forbid them",
        )
    else:
        yield ok("user namespaces can be made")
    if facts.fuse:
        yield ok("/dev/fuse can be used")
    else:
        yield problem(
            "/dev/fuse cannot be opened", "ask the administrators to load the fuse module and allow /dev/fuse"
        )
    yield _shield_finding(profile, facts)


def _shield_finding(profile: ClusterProfile, facts: HostFacts) -> Finding:
    """Slurm signals every process of a step, also the one that serves the image: see slurm/container.sh."""
    if profile.shield == "off":
        return warning(
            "shield is off: Slurm's signal takes the image away before a job has saved",
            "state shield: auto, unless the nodes mount images through the kernel",
        )
    if not facts.squashfuse:
        return warning(
            "no squashfuse_ll here: a job may die of Slurm's signal before it has saved",
            "ask for the package squashfuse on all nodes, or a setuid install of Apptainer",
        )
    return ok(f"the image is kept mounted when Slurm signals a job: {facts.squashfuse}")


def _image_findings(profile: ClusterProfile) -> Iterator[Finding]:
    image = Path(profile.image or "").absolute()
    if not image.exists():
        yield failure(f"no image at {image}", "build it with containers/build.sh, or correct image in the profile")
    elif not os.access(image, os.R_OK):
        yield failure(f"the image cannot be read: {image}", f"chmod a+r {image}, or take a copy of your own")
    elif image.is_dir():
        yield warning(f"the image is an unpacked folder: {image}", "nothing while developing; for runs, a .sif file")
    else:
        yield _digest_finding(image, profile.image_sha256)


def _digest_finding(image: Path, pinned: str | None) -> Finding:
    """Hash the file itself: a note beside it could be older than the image."""
    digest, size = file_hash(image), image.stat().st_size / GB
    if pinned is None:
        return warning(
            f"the image is there ({size:.1f} GB), but the profile takes any: {image}",
            f"pin it, so that runs cannot change under you; in the profile: image_sha256: {digest}",
        )
    if digest != pinned:
        return failure(
            f"{image} is not the image that the profile pins: its SHA-256 is {digest}",
            "put the pinned image there, or, if this one is meant, state its SHA-256 under image_sha256",
        )
    return ok(f"the image is the pinned one ({size:.1f} GB): {image}")


def _bind_findings(profile: ClusterProfile, problem: Judgement) -> Iterator[Finding]:
    for bind in profile.binds:
        source = bind.split(":")[0]
        if Path(source).exists():
            yield ok(f"the bind {bind} is there")
        else:
            yield problem(
                f"the bind {bind}: there is no {source} here",
                "correct or remove it under binds; it must be there on every compute node",
            )
