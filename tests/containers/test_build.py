"""containers/build.sh: one build per set of sources, whole or not at all. Apptainer and pip are stood in for;
the real build is what every cluster test runs in."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
APPTAINER = """#!/bin/bash
echo build >>"$COUNT"
sleep 0.3
target=${@: -2:1}
echo "image of $(md5sum <"${@: -1}")" >"$target"
[ ! -e "$COUNT.fail" ]
"""


class Bench:
    """A copy of containers/ with a stub for Apptainer, and the image cache it fills."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.cache, self.count = folder / "tree", folder / "cache", folder / "count"
        shutil.copytree(REPO / "containers", self.tree / "containers")
        self.stub = folder / "bin"
        self.stub.mkdir()
        (self.stub / "apptainer").write_text(APPTAINER)
        (self.stub / "apptainer").chmod(0o755)
        self.count.touch()

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        env = {"PATH": f"{self.stub}:/usr/bin:/bin", "PYTHON": "true", "COUNT": str(self.count)}
        env |= {"BBU_IMAGE_CACHE": str(self.cache), "HOME": "/nonexistent"}
        command = [str(self.tree / "containers" / "build.sh"), *arguments]
        return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def build(self, *arguments: str) -> Path:
        process = self.start(*arguments)
        out, err = process.communicate()
        assert process.returncode == 0, err
        return Path(out.strip())

    @property
    def builds(self) -> int:
        return len(self.count.read_text().splitlines())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_second_call_finds_the_image_of_the_first(bench: Bench) -> None:
    assert bench.build("cpu") == bench.build("cpu")
    assert bench.builds == 1


@pytest.mark.parametrize("source", ["bbu-cpu.def", "requirements-cpu.txt", "selftest.py", "build.sh"])
def test_a_changed_source_makes_another_image(bench: Bench, source: str) -> None:
    before = bench.build("cpu")
    with (bench.tree / "containers" / source).open("a") as file:
        file.write("\n# changed\n")
    assert bench.build("cpu") != before
    assert bench.builds == 2


def test_two_builders_at_once_build_once(bench: Bench) -> None:
    both = [bench.start("cpu"), bench.start("cpu")]
    told = {process.communicate()[0] for process in both}
    assert len(told) == 1 and bench.builds == 1


def test_a_failed_build_leaves_no_image_and_says_where_the_log_is(bench: Bench) -> None:
    fail = Path(f"{bench.count}.fail")
    fail.touch()
    process = bench.start("cpu")
    err = process.communicate()[1]
    assert process.returncode == 1 and ".log" in err
    assert list(bench.cache.glob("bbu-*.sif")) == []
    fail.unlink()
    assert bench.build("cpu").is_file()


def test_an_image_is_whole_before_it_has_its_name(bench: Bench) -> None:
    process = bench.start("cpu")
    process.kill()
    process.communicate()
    assert list(bench.cache.glob("bbu-*.sif")) == []
    assert bench.build("cpu").is_file()


def test_the_images_own_hash_lies_beside_it(bench: Bench, tmp_path: Path) -> None:
    image = bench.build("cpu", "--out", str(tmp_path / "mine.sif"))
    assert image == tmp_path / "mine.sif"
    digest, name = Path(f"{image}.sha256").read_text().split()
    assert (digest, name) == (hashlib.sha256(image.read_bytes()).hexdigest(), "mine.sif")


def test_an_unknown_image_is_refused_with_the_usage(bench: Bench) -> None:
    process = bench.start("tpu")
    assert "build.sh cpu|cuda" in process.communicate()[1]
    assert process.returncode == 2
