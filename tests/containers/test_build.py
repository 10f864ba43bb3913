"""containers/build.sh: one build per layer and set of sources, complete or absent.

Apptainer and pip are replaced by stubs; every cluster test runs in an image of the real build.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
APPTAINER = """#!/bin/bash
case $1 in
    key) cat "$COUNT.keys" 2>/dev/null; exit ;;
    --quiet) echo "signed by $4" >>"${@: -1}"; exit ;;
esac
echo "${@: -1}" >>"$COUNT"
sleep 0.3
target=${@: -2:1}
echo "image of $(md5sum <"${@: -1}") with $*" >"$target"
[ ! -e "$COUNT.fail" ]
"""
KEYS = """Private key listing (/home/x/.apptainer/keys/pgp-secret):

0)  User:              One () <one@example.org>
    Fingerprint:       454DF05577AF11401D5AE5C3FE74A29ECA3001DB

1)  User:              Other () <other@example.org>
    Fingerprint:       137DBD9901E99F4426B71222322585426B2298FC
"""
BOTH_LAYERS = ["base-cpu.def", "bbu.def"]


class Bench:
    """A copy of containers/ and a little code, with a stub for Apptainer, and the image cache that it fills."""

    def __init__(self, folder: Path) -> None:
        self.tree, self.cache, self.count = folder / "tree", folder / "cache", folder / "count"
        shutil.copytree(REPO / "containers", self.tree / "containers")
        for file in ("bbu/code.py", "configs/smoke.yaml"):
            (self.tree / file).parent.mkdir()
            (self.tree / file).touch()
        self.stub = folder / "bin"
        self.stub.mkdir()
        (self.stub / "apptainer").write_text(APPTAINER)
        (self.stub / "apptainer").chmod(0o755)
        self.count.touch()

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        env = {"PATH": f"{self.stub}:/usr/bin:/bin", "PYTHON": "true", "COUNT": str(self.count)}
        env |= {"BBU_IMAGE_CACHE": str(self.cache), "HOME": "/nonexistent"}
        command = [str(self.tree / "containers" / "build.sh"), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, cwd=self.tree, text=True, stdout=pipe, stderr=pipe)

    def build(self, *arguments: str) -> Path:
        process = self.start(*arguments)
        out, err = process.communicate()
        assert process.returncode == 0, err
        return Path(out.strip())

    def refusal(self, *arguments: str) -> str:
        process = self.start(*arguments)
        err = process.communicate()[1]
        assert process.returncode == 1 and err.count("\n") == 1, err
        return err

    def make_keys(self, number: int) -> None:
        Path(f"{self.count}.keys").write_text(KEYS if number == 2 else KEYS[: KEYS.index("\n1)")])

    @property
    def builds(self) -> list[str]:
        """The definition of every build so far."""
        return self.count.read_text().splitlines()

    def change(self, source: str) -> None:
        with (self.tree / source).open("a") as file:
            file.write("\n# changed\n")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_second_call_finds_the_image_of_the_first(bench: Bench) -> None:
    assert bench.build("cpu") == bench.build("cpu")
    assert bench.builds == BOTH_LAYERS


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("source", ["bbu/code.py", "configs/smoke.yaml", "containers/bbu.def", "containers/build.sh"])
def test_changed_code_makes_another_image_on_the_same_base(bench: Bench, kind: str, source: str) -> None:
    before = bench.build(kind)
    bench.change(source)
    assert bench.build(kind) != before
    assert bench.builds == [f"base-{kind}.def", "bbu.def", "bbu.def"]
    assert len(list(bench.cache.glob("bbu-base-*.sif"))) == 1


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("cpu", "base-cpu.def"),
        ("cpu", "requirements-cpu.txt"),
        ("cpu", "selftest.py"),
        ("cuda", "base-cuda.def"),
        ("cuda", "requirements.lock"),
        ("cuda", "requirements-source.txt"),
    ],
)
def test_a_changed_source_of_the_base_makes_another_base_and_image(bench: Bench, kind: str, source: str) -> None:
    before = bench.build(kind)
    bench.change(f"containers/{source}")
    assert bench.build(kind) != before
    assert bench.builds == [f"base-{kind}.def", "bbu.def"] * 2


def test_the_image_is_built_on_the_base_in_the_cache(bench: Bench) -> None:
    image = bench.build("cpu")
    [base] = bench.cache.glob("bbu-base-cpu-*.sif")
    assert f"BASE={base}" in image.read_text() and Path(f"{base}.sha256").is_file()


def test_two_builders_at_once_build_once(bench: Bench) -> None:
    both = [bench.start("cpu"), bench.start("cpu")]
    images = {process.communicate()[0] for process in both}
    assert len(images) == 1 and bench.builds == BOTH_LAYERS


def test_a_failed_build_leaves_no_image_and_says_where_the_log_is(bench: Bench) -> None:
    fail = Path(f"{bench.count}.fail")
    fail.touch()
    process = bench.start("cpu")
    err = process.communicate()[1]
    assert process.returncode == 1 and ".log" in err
    assert list(bench.cache.glob("bbu-*.sif")) == []
    fail.unlink()
    assert bench.build("cpu").is_file()


def test_an_image_is_complete_before_it_has_its_name(bench: Bench) -> None:
    process = bench.start("cpu")
    process.kill()
    process.communicate()
    assert list(bench.cache.glob("bbu-*.sif")) == []
    assert bench.build("cpu").is_file()


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_the_images_own_hash_lies_beside_it(bench: Bench, tmp_path: Path) -> None:
    image = bench.build("cpu", "--out", str(tmp_path / "mine.sif"))
    assert image == tmp_path / "mine.sif"
    assert Path(f"{image}.sha256").read_text().split() == [sha256(image), "mine.sif"]


def test_the_last_line_pins_the_image(bench: Bench) -> None:
    out, err = bench.start("cpu").communicate()
    assert err.splitlines()[-1].endswith(f"profile: image_sha256: {sha256(Path(out.strip()))}")


def test_a_copy_goes_where_the_caller_stands_also_right_after_a_build(bench: Bench) -> None:
    assert bench.build("cpu", "--out", "containers/mine.sif") == Path("containers/mine.sif")
    assert (bench.tree / "containers" / "mine.sif").is_file()


def test_a_damaged_image_is_not_handed_out(bench: Bench) -> None:
    image = bench.build("cpu")
    image.write_text("half")
    assert f"{image} is damaged" in bench.refusal("cpu", "--out", "mine.sif")
    assert list(bench.tree.glob("mine.sif*")) == []


def test_a_signed_copy_has_the_hash_of_what_was_signed(bench: Bench) -> None:
    bench.make_keys(1)
    image = bench.tree / bench.build("cpu", "--out", "mine.sif", "--sign")
    assert image.read_text().endswith("signed by 0\n")
    assert Path(f"{image}.sha256").read_text().split()[0] == sha256(image)
    assert "signed by" not in bench.build("cpu").read_text()


def test_the_key_to_sign_with_can_be_named(bench: Bench) -> None:
    bench.make_keys(2)
    image = bench.build("cpu", "--sign", "137dbd9901e99f4426b71222322585426b2298fc", "--out", "mine.sif")
    assert (bench.tree / image).read_text().endswith("signed by 1\n")


def test_signing_that_cannot_succeed_is_refused_before_the_build(bench: Bench) -> None:
    assert "--sign needs --out" in bench.refusal("cpu", "--sign")
    assert "apptainer key newpair" in bench.refusal("cpu", "--sign", "--out", "mine.sif")
    bench.make_keys(2)
    assert "several keys; name one" in bench.refusal("cpu", "--out", "mine.sif", "--sign")
    assert "you have no key ABC; those you have: 454D" in bench.refusal("cpu", "--out", "mine.sif", "--sign", "ABC")
    assert bench.builds == []


@pytest.mark.parametrize("arguments", [["tpu"], ["cpu", "--out"], ["cpu", "--out", ""], ["cpu", "mine.sif"]])
def test_an_unknown_image_or_argument_is_refused_with_the_usage(bench: Bench, arguments: list[str]) -> None:
    process = bench.start(*arguments)
    assert "build.sh cpu|cuda" in process.communicate()[1]
    assert process.returncode == 2
