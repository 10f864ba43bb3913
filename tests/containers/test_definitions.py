"""The images' sources agree with each other and with pyproject.toml, and pin everything they take.

The CUDA image cannot be built without an image registry; this is what can be said about it without one.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
CONTAINERS = REPO / "containers"
DEFINITIONS = ["bbu.def", "bbu-cpu.def"]
BASE = (
    "nvidia/cuda:13.0.0-cudnn-devel-ubuntu24.04@sha256:c2621d98e7de80c2aec5eb8403b19c67454c8f5b0c929e8588fd3563c9b6558d"
)


def sections(definition: str) -> dict[str, str]:
    """The header (under the empty name) and every %section of a definition file."""
    parts = re.split(r"^%(\w+)\n", (CONTAINERS / definition).read_text(), flags=re.MULTILINE)
    assert len(set(parts[1::2])) == len(parts[1::2]), f"a section twice in {definition}"
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def pins(file: str) -> dict[str, str]:
    """Package name to version, of a requirements file whose lines all pin one."""
    found = re.findall(r"^([\w.-]+)==([^\s;\\]+)", (CONTAINERS / file).read_text(), flags=re.MULTILINE)
    return {normal(name): version for name, version in found}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def project_pins() -> dict[str, str]:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["train"]
    found = (re.match(r"([A-Za-z0-9._-]+)(?:\[.*\])?==([^\s;]+)", line) for line in wanted)
    return {normal(match[1]): match[2] for match in found if match}


@pytest.mark.parametrize("definition", DEFINITIONS)
@pytest.mark.parametrize("section", ["post", "environment", "runscript", "test"])
def test_every_script_section_is_valid_bash(definition: str, section: str) -> None:
    script = sections(definition)[section]
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_every_image_says_what_it_is_and_tests_itself(definition: str) -> None:
    found = sections(definition)
    assert found.keys() >= {"files", "post", "environment", "runscript", "test", "labels", "help"}
    assert "bbu.key {{ KEY }}" in found["labels"]
    assert "selftest.py" in found["test"]


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_every_build_argument_is_declared(definition: str) -> None:
    text = (CONTAINERS / definition).read_text()
    declared = re.findall(r"^\s+(\w+)=", sections(definition)["arguments"], flags=re.MULTILINE)
    assert set(re.findall(r"\{\{ (\w+) \}\}", text)) == set(declared)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_files_that_an_image_takes_exist(definition: str) -> None:
    taken = [line.split()[0] for line in sections(definition)["files"].splitlines() if line.strip()]
    assert [name for name in taken if not (CONTAINERS / name).exists()] == []


def test_the_gpu_image_starts_from_a_pinned_base() -> None:
    assert f"Bootstrap: docker\nFrom: {BASE}\n" in sections("bbu.def")[""]


def test_the_gpu_image_installs_by_hash_only() -> None:
    installs = re.findall(r"pip install (.*)", sections("bbu.def")["post"])
    assert installs and all("--require-hashes" in line and "--no-deps" in line for line in installs)


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-source.txt"])
def test_every_locked_package_has_a_version_and_hashes(file: str) -> None:
    text = re.sub(r"\\\n\s*", "", (CONTAINERS / file).read_text())
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines
    locked = re.compile(r"\S+==\S+( ;[^-]*)?( +--hash=sha256:[0-9a-f]{64})+$")
    assert [line for line in lines if not locked.match(line)] == []


def test_the_two_images_cover_everything_the_project_asks_for() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    asked = (CONTAINERS / "requirements.in").read_text().splitlines()
    asked = [line for line in asked if line and not line.startswith("#")]
    asked += project["dependencies"] + project["optional-dependencies"]["train"]
    names = {normal(re.split(r"[^\w.-]", line)[0]) for line in asked}
    assert names - pins("requirements-cpu.txt").keys() == set()
    assert names - pins("requirements.lock").keys() - pins("requirements-source.txt").keys() == set()


@pytest.mark.parametrize("files", [["requirements.lock", "requirements-source.txt"], ["requirements-cpu.txt"]])
def test_locked_versions_are_those_of_pyproject(files: list[str]) -> None:
    locked = {name: version.removesuffix("+cpu") for file in files for name, version in pins(file).items()}
    wanted = project_pins()
    assert wanted
    assert {name: locked.get(name) for name in wanted} == wanted


def test_no_address_of_a_package_index_is_written_down() -> None:
    # the one address: Debian's own, the default where a host has no apt sources
    allowed = "http://deb.debian.org/debian"
    for file in CONTAINERS.iterdir():
        assert "://" not in file.read_text().replace(allowed, ""), file
