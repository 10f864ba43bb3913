"""The images' sources agree with each other and with pyproject.toml, and pin everything they take.

The CUDA image cannot be built without an image registry: these tests are what can be checked without one.
tests/cluster/test_container.py checks that Apptainer can read its definition.
"""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
CONTAINERS = REPO / "containers"
BASE_DEFINITIONS = ["base-cpu.def", "base-cuda.def"]
DEFINITIONS = [*BASE_DEFINITIONS, "bbu.def"]
SCRIPTS = {"setup", "post", "environment", "runscript", "test"}
CUDA_IMAGES = [
    "nvidia/cuda:13.0.0-cudnn-devel-ubuntu24.04@sha256:c2621d98e7de80c2aec5eb8403b19c67454c8f5b0c929e8588fd3563c9b6558d",
    "nvidia/cuda:13.0.0-runtime-ubuntu24.04@sha256:95318efecfd68ab3d109da5277863257b06137c84f34a87f38de970d5cd035d3",
]

Stage = dict[str, str]


def stages(definition: str) -> list[Stage]:
    """Every stage of a definition file: its header (under the empty name) and its sections, in order."""
    text = (CONTAINERS / definition).read_text()
    return [sections(part) for part in re.split(r"^(?=Bootstrap:)", text, flags=re.MULTILINE) if part.strip()]


def sections(stage: str) -> Stage:
    parts = re.split(r"^%(\w+(?: from \w+)?)\n", stage, flags=re.MULTILINE)
    assert len(set(parts[1::2])) == len(parts[1::2]), f"a section twice in {stage}"
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def every_stage() -> list[tuple[str, Stage]]:
    return [(definition, stage) for definition in DEFINITIONS for stage in stages(definition)]


def stage_name(stage: Stage) -> str:
    header = re.search(r"^Stage: (\w+)$", stage[""], flags=re.MULTILINE)
    return header[1] if header else ""


def arguments(stage: Stage) -> dict[str, str]:
    return dict(re.findall(r"^\s+(\w+)=(.*)$", stage.get("arguments", ""), flags=re.MULTILINE))


def transfers(section: str) -> list[str]:
    """What a %files section takes, without where it goes."""
    return [line.split()[0] for line in section.splitlines() if line.strip()]


def pins(file: str) -> dict[str, str]:
    """Package name to version, of a requirements file whose lines all pin one."""
    lines = re.findall(r"^([\w.-]+)==([^\s;\\]+)", (CONTAINERS / file).read_text(), flags=re.MULTILINE)
    return {normal_name(name): version for name, version in lines}


def normal_name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def project_pins() -> dict[str, str]:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    dependencies = project["dependencies"] + project["optional-dependencies"]["train"]
    matches = (re.match(r"([A-Za-z0-9._-]+)(?:\[.*\])?==([^\s;]+)", line) for line in dependencies)
    return {normal_name(match[1]): match[2] for match in matches if match}


def test_every_script_section_is_valid_bash() -> None:
    for definition, stage in every_stage():
        for section in SCRIPTS & stage.keys():
            checked = subprocess.run(["bash", "-n"], input=stage[section], text=True, capture_output=True)
            assert checked.returncode == 0, (definition, stage_name(stage), section, checked.stderr)


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_every_image_says_what_it_is_and_tests_itself(definition: str) -> None:
    last = stages(definition)[-1]
    assert last.keys() >= {"files", "post", "test", "labels", "help"}
    assert f"bbu.{'base_key' if definition in BASE_DEFINITIONS else 'key'} {{{{ KEY }}}}" in last["labels"]
    assert "selftest.py" in last["test"]


@pytest.mark.parametrize("definition", BASE_DEFINITIONS)
def test_a_base_sets_the_environment_that_the_image_inherits(definition: str) -> None:
    last, image = stages(definition)[-1], stages("bbu.def")[-1]
    assert last.keys() >= {"environment", "runscript"} and not image.keys() & {"environment", "runscript"}
    assert "PYTHONPATH=/opt/bbu/src" in last["environment"] and "/opt/bbu/src" in image["files"]


def test_the_code_is_in_the_layer_on_top_of_the_base_alone() -> None:
    taken = {definition: transfers(stages(definition)[-1]["files"]) for definition in DEFINITIONS}
    assert taken.pop("bbu.def") == ["../bbu", "../configs"]
    assert all(files and not any(file.startswith("..") for file in files) for files in taken.values())
    assert stages("bbu.def")[-1][""].startswith("Bootstrap: localimage\nFrom: {{ BASE }}\n")


def test_the_key_of_a_base_covers_every_file_that_it_takes() -> None:
    """build.sh lists the sources by hand: one that is left out would let an old base pass for a new one."""
    for kind in ("cpu", "cuda"):
        program = f". /dev/stdin; base_sources {kind}"
        script = (CONTAINERS / "build.sh").read_text().replace('main "$@"', "")
        listed = subprocess.run(["bash", "-c", program], input=script, text=True, capture_output=True, check=True)
        taken = {file for stage in stages(f"base-{kind}.def") for file in transfers(stage.get("files", ""))}
        sources = {line.removeprefix("containers/") for line in listed.stdout.split()}
        assert sources == taken | {f"base-{kind}.def"}


def test_every_stage_declares_the_arguments_it_uses_and_no_others() -> None:
    for definition, stage in every_stage():
        used = re.findall(r"\{\{ (\w+) \}\}", "".join(stage.values()))
        assert set(used) == set(arguments(stage)), (definition, stage_name(stage))


def test_apptainer_puts_no_argument_into_a_line_after_a_hash_sign() -> None:
    for definition in DEFINITIONS:
        assert not re.search(r"#.*\{\{", (CONTAINERS / definition).read_text()), definition


def test_an_argument_of_two_stages_has_one_value() -> None:
    build, final = map(arguments, stages("base-cuda.def"))
    shared = build.keys() & final.keys()
    assert shared and {key: build[key] for key in shared} == {key: final[key] for key in shared}


def test_the_script_passes_only_arguments_that_an_image_has() -> None:
    """Apptainer refuses others, after the download of what it starts from."""
    script = (CONTAINERS / "build.sh").read_text()
    calls = re.findall(r'apptainer_build "\$2" [\w-]+\.def(?:[^\n]*\\\n)*[^\n]*', script)
    assert len(calls) == len(DEFINITIONS)
    for call in calls:
        [definition] = re.findall(r"[\w-]+\.def", call)
        passed = set(re.findall(r"--build-arg (\w+)=", call))
        assert passed and passed <= {key for stage in stages(definition) for key in arguments(stage)}


def test_files_that_an_image_takes_exist() -> None:
    taken = [file for _, stage in every_stage() for file in transfers(stage.get("files", ""))]
    assert [file for file in taken if not (CONTAINERS / file).exists()] == []


def test_a_stage_takes_from_an_earlier_one_what_that_one_has_made() -> None:
    build, final = stages("base-cuda.def")
    assert [section for section in final if " from " in section] == [f"files from {stage_name(build)}"]
    made = build["post"] + build["files"]
    assert all(f" {folder}" in made for folder in transfers(final["files from build"]))
    assert "/opt/venv" in transfers(final["files from build"])


def test_the_gpu_image_starts_from_pinned_bases() -> None:
    headers = [stage[""].splitlines()[:3] for stage in stages("base-cuda.def")]
    assert headers == [
        ["Bootstrap: docker", f"From: {base}", f"Stage: {stage}"]
        for base, stage in zip(CUDA_IMAGES, ("build", "final"), strict=True)
    ]


def test_the_gpu_image_installs_by_hash_only() -> None:
    build, final = stages("base-cuda.def")
    installs = re.findall(r"pip install (.*)", build["post"])
    assert installs and all("--require-hashes" in line and "--no-deps" in line for line in installs)
    assert "pip install" not in final["post"]


def test_the_help_names_programs_that_exist() -> None:
    text = stages("bbu.def")[-1]["help"]
    modules = re.findall(r"python -m bbu\.(\w+)", text)
    assert modules and [module for module in modules if not (REPO / "bbu" / f"{module}.py").exists()] == []
    assert "slurm/container.sh" in text and "apptainer exec" in text


@pytest.mark.parametrize("file", ["requirements.lock", "requirements-source.txt"])
def test_every_locked_package_has_a_version_and_hashes(file: str) -> None:
    text = re.sub(r"\\\n\s*", "", (CONTAINERS / file).read_text())
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines
    locked = re.compile(r"\S+==\S+( ;[^-]*)?( +--hash=sha256:[0-9a-f]{64})+$")
    assert [line for line in lines if not locked.match(line)] == []


def test_the_two_images_cover_everything_the_project_asks_for() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = (CONTAINERS / "requirements.in").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    requirements += project["dependencies"] + project["optional-dependencies"]["train"]
    names = {normal_name(re.split(r"[^\w.-]", line)[0]) for line in requirements}
    assert names - pins("requirements-cpu.txt").keys() == set()
    assert names - pins("requirements.lock").keys() - pins("requirements-source.txt").keys() == set()


@pytest.mark.parametrize("files", [["requirements.lock", "requirements-source.txt"], ["requirements-cpu.txt"]])
def test_locked_versions_are_those_of_pyproject(files: list[str]) -> None:
    locked = {name: version.removesuffix("+cpu") for file in files for name, version in pins(file).items()}
    pinned = project_pins()
    assert pinned
    assert {name: locked.get(name) for name in pinned} == pinned


def test_no_address_of_a_package_index_is_written_down() -> None:
    # the one address: Debian's own, the default where a host has no apt sources
    allowed = "http://deb.debian.org/debian"
    for file in CONTAINERS.iterdir():
        assert "://" not in file.read_text().replace(allowed, ""), file
