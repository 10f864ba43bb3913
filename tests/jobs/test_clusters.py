"""Cluster profiles: nothing is assumed, and everything wrong is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bbu.errors import ConfigError
from bbu.jobs.clusters import PROFILES, load_profile

LOCAL = yaml.safe_load((PROFILES / "local.yaml").read_text())


def written(folder: Path, **changes: object) -> str:
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(LOCAL | changes, allow_unicode=True))
    return str(path)


def findings(name: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_profile(name, {})
    return list(error.value.findings)


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_every_profile_of_the_project_loads(name: str):
    assert load_profile(name, {"BBU_IMAGE": "/images/bbu.sif"}).executor in ("slurm", "local")


def test_a_missing_key_is_an_error(tmp_path: Path):
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in LOCAL.items() if key != "binds"}))
    assert findings(str(path)) == [f"{path}: missing key binds"]


def test_an_unknown_key_is_told_with_its_nearest_neighbour(tmp_path: Path):
    path = written(tmp_path, train=LOCAL["train"] | {"partitoin": "gpu"})
    assert findings(path) == [f"{path}: unknown key train.partitoin; did you mean partition?"]


def test_all_findings_are_told_at_once(tmp_path: Path):
    train = LOCAL["train"] | {"cpus_per_task": 0, "gpus_per_node": True, "memory": "8 GB"}
    path = written(tmp_path, nodes=2, executor="slrum", binds="/data", train=train, image_sha256="abc", eval=3)
    told = "\n".join(findings(path))
    assert "unknown key nodes" in told and "did you mean slurm?" in told
    assert "train.cpus_per_task: 0 is not between 1 and 4096" in told
    assert "train.memory: '8 GB' is none of 512G" in told and "image_sha256: 'abc' is not a SHA-256" in told
    assert "eval: 3 is not a mapping" in told
    assert "train.gpus_per_node: True is not a whole number" in told and "binds: '/data' is not a list of texts" in told


@pytest.mark.parametrize(
    "changes",
    [
        {"train": LOCAL["train"] | {"account": "a\n#SBATCH --uid=0"}},
        {"binds": ["/a\t"]},
        {"environment": {"A\0": ""}},
        {"modules": ["a\nrm"]},
    ],
)
def test_control_characters_are_refused(tmp_path: Path, changes: dict):
    assert "control character" in findings(written(tmp_path, **changes))[0]


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"modules": ["apptainer"]}, "modules: the local executor loads none"),
        ({"code": "image"}, "code: is image, but image is null"),
        ({"image_sha256": "a" * 64}, "image_sha256: pins no image"),
        ({"eval": LOCAL["eval"] | {"gpu_type": "a100"}}, "eval.gpu_type: is a100, but gpus_per_node is 0"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict, finding: str):
    path = written(tmp_path, **changes)
    assert findings(path)[0].startswith(f"{path}: {finding}")


def test_environment_variables_are_put_in(tmp_path: Path):
    path = written(tmp_path, image="${IMAGES}/bbu.sif", binds=["${DATA}"])
    profile = load_profile(path, {"IMAGES": "/images", "DATA": "/data"})
    assert (profile.image, profile.binds) == ("/images/bbu.sif", ["/data"])
    assert f"{path}: image: the environment variable IMAGES is not set" in findings(path)


def test_an_unknown_profile_is_told_with_the_known_ones():
    assert "there are: example, local, test; did you mean local?" in findings("locla")[0]
