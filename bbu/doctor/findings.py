"""Is this machine ready? What `bbu.doctor` says, in one form, and its checks of the login node and the container.

Every check takes facts, not the machine itself, so that a test can give it another site's.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bbu.jobs.clusters import ClusterProfile
from bbu.run.provenance import file_hash

OK, WARNING, FAILURE = "ok", "warning", "failure"
PACKAGES = {"yaml": "pyyaml", "submitit": "submitit", "numpy": "numpy", "PIL": "pillow", "tabulate": "tabulate"}
"""What submitting, converting and watching need, by the name they are imported by."""
LEAST_FREE_GB = 5
GB = 1e9

Call = Callable[[Sequence[str]], tuple[int, str, str]]
"""Runs a command: exit code, output, error; 127 where it is not there. See bbu.jobs.queue.call."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was checked and found, and for anything but `ok` what to do about it."""

    status: str
    what: str
    remedy: str = ""


@dataclass(frozen=True)
class Group:
    """Findings about one thing: this machine, Slurm, a node."""

    title: str
    findings: tuple[Finding, ...]


def ok(what: str) -> Finding:
    return Finding(OK, what)


def warning(what: str, remedy: str) -> Finding:
    return Finding(WARNING, what, remedy)


def failure(what: str, remedy: str) -> Finding:
    return Finding(FAILURE, what, remedy)


def failed(groups: Sequence[Group]) -> bool:
    return any(finding.status == FAILURE for group in groups for finding in group.findings)


def machine_findings(profile: ClusterProfile, home: Path) -> Iterator[Finding]:
    """The login node itself: Python, and the folders that jobs write to."""
    yield ok(f"Python {platform.python_version()}, code from {home}")
    missing = [package for name, package in PACKAGES.items() if importlib.util.find_spec(name) is None]
    if missing:
        yield failure(f"Python packages are missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    yield folder_finding("work_folder, for job scripts and logs,", Path(profile.work_folder).absolute())
    yield folder_finding("the current folder, where runs are written,", Path.cwd())


def folder_finding(role: str, folder: Path) -> Finding:
    """Can files be written there; it may still have to be made."""
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
    """What entering a container needs, as found on this machine.

    namespaces_off: the kernel's setting that forbids user namespaces, None if none does; namespaces_work: making
    one was tried; kernel_mount: a setuid install that mounts images through the kernel; squashfuse: the program
    that serves an image without that.
    """

    apptainer: str | None
    version: str
    namespaces_off: str | None
    namespaces_work: bool
    fuse: bool
    kernel_mount: bool
    squashfuse: str | None


def host_facts(call: Call) -> HostFacts:
    """Look at this machine."""
    build = build_facts(call(["apptainer", "buildcfg"])[1])
    own = Path(build.get("LIBEXECDIR", "/nonexistent")) / "apptainer/bin/squashfuse_ll"
    return HostFacts(
        apptainer=shutil.which("apptainer"),
        version=call(["apptainer", "--version"])[1].strip(),
        namespaces_off=namespaces_off(Path("/proc/sys")),
        namespaces_work=call(["unshare", "-Ur", "true"])[0] == 0,
        fuse=os.access("/dev/fuse", os.R_OK | os.W_OK),
        kernel_mount=mounts_by_kernel(build),
        squashfuse=shutil.which("squashfuse_ll") or (str(own) if own.is_file() else None),
    )


def build_facts(text: str) -> dict[str, str]:
    """What `apptainer buildcfg` prints."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def namespaces_off(proc_sys: Path) -> str | None:
    """The setting that forbids an ordinary user to make user namespaces; a setting may not exist on this kernel."""
    forbidding = {"user/max_user_namespaces": "0", "kernel/unprivileged_userns_clone": "0"}
    for name, value in forbidding.items():
        path = proc_sys / name
        if path.exists() and path.read_text().strip() == value:
            return f"{name.replace('/', '.')}={value}"
    return None


def mounts_by_kernel(build: dict[str, str]) -> bool:
    """The same question as slurm/container.sh asks: then a signal cannot take the image away."""
    if build.get("APPTAINER_SUID_INSTALL") != "1":
        return False
    starter = Path(build.get("LIBEXECDIR", "")) / "apptainer/bin/starter-suid"
    configuration = Path(build.get("APPTAINER_CONF_FILE", ""))
    if not starter.is_file() or not starter.stat().st_mode & stat.S_ISUID or not configuration.is_file():
        return False
    forbidden = r"(?m)^allow (setuid|setuid-mount squashfs) *= *(no|iflimited)"
    return not re.search(forbidden, configuration.read_text())


def container_findings(profile: ClusterProfile, facts: HostFacts) -> Iterator[Finding]:
    """Whether the profile's image can be entered here. On a cluster, what is amiss with this machine alone is a
    warning: jobs enter the image on the compute nodes, and those are asked themselves.
    """
    if not profile.image:
        yield ok("no image in this profile: jobs run in this Python, without a container")
        return
    amiss = failure if profile.executor == "local" else warning
    yield apptainer_finding(profile, facts, amiss)
    if facts.apptainer:
        yield from mount_findings(profile, facts, amiss)
    yield from image_findings(profile)
    yield from bind_findings(profile, amiss)


Amiss = Callable[[str, str], Finding]


def apptainer_finding(profile: ClusterProfile, facts: HostFacts, amiss: Amiss) -> Finding:
    modules = ", ".join(profile.modules)
    if not facts.apptainer and modules:
        return warning(
            f"no apptainer on PATH here; jobs load the modules {modules} first",
            f"nothing, if the compute nodes have it with these modules; to use it here: module load {modules}",
        )
    if not facts.apptainer:
        return amiss(
            "no apptainer on PATH here",
            "if the site has a module for it (module avail apptainer), name it under modules; else ask the "
            "administrators to install Apptainer",
        )
    number = re.search(r"(\d+)\.(\d+)", facts.version)
    if number and (int(number[1]), int(number[2])) < (1, 1):
        return amiss(f"{facts.version} is too old to enter an image without root", "use Apptainer 1.1 or newer")
    return ok(f"{facts.version}: {facts.apptainer}")


def mount_findings(profile: ClusterProfile, facts: HostFacts, amiss: Amiss) -> Iterator[Finding]:
    if facts.kernel_mount:
        yield ok("Apptainer mounts images through the kernel (setuid): no user namespaces, FUSE or shield needed")
        return
    if facts.namespaces_off:
        setting, admin = facts.namespaces_off, "ask the administrators to allow user namespaces"
        yield amiss(f"user namespaces are forbidden ({setting})", f"{admin}, or for a setuid install of Apptainer")
    elif not facts.namespaces_work:
        yield amiss(
            "user namespaces cannot be made here (unshare -Ur true fails)",
            "ask the administrators: AppArmor (apparmor_restrict_unprivileged_userns) or SELinux may forbid them",
        )
    else:
        yield ok("user namespaces can be made")
    if facts.fuse:
        yield ok("/dev/fuse can be used")
    else:
        yield amiss("/dev/fuse cannot be opened", "ask the administrators to load the fuse module and allow /dev/fuse")
    yield shield_finding(profile, facts)


def shield_finding(profile: ClusterProfile, facts: HostFacts) -> Finding:
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


def image_findings(profile: ClusterProfile) -> Iterator[Finding]:
    image = Path(profile.image or "").absolute()
    if not image.exists():
        yield failure(f"no image at {image}", "build it with containers/build.sh, or correct image in the profile")
    elif not os.access(image, os.R_OK):
        yield failure(f"the image cannot be read: {image}", f"chmod a+r {image}, or take a copy of your own")
    elif image.is_dir():
        yield warning(f"the image is an unpacked folder: {image}", "nothing while developing; for runs, a .sif file")
    else:
        yield digest_finding(image, profile.image_sha256)


def digest_finding(image: Path, pinned: str | None) -> Finding:
    """The file itself is hashed: a note beside it could be older than the image."""
    found, size = file_hash(image), image.stat().st_size / GB
    if pinned is None:
        return warning(
            f"the image is there ({size:.1f} GB), but the profile takes any: {image}",
            f"pin it, so that runs cannot change under you; in the profile: image_sha256: {found}",
        )
    if found != pinned:
        return failure(
            f"{image} is not the image that the profile pins: its SHA-256 is {found}",
            "put the pinned image there, or, if this one is meant, state its SHA-256 under image_sha256",
        )
    return ok(f"the image is the pinned one ({size:.1f} GB): {image}")


def bind_findings(profile: ClusterProfile, amiss: Amiss) -> Iterator[Finding]:
    for bind in profile.binds:
        source = bind.split(":")[0]
        if Path(source).exists():
            yield ok(f"the bind {bind} is there")
        else:
            yield amiss(
                f"the bind {bind}: there is no {source} here",
                "correct or remove it under binds; it must be there on every compute node",
            )
