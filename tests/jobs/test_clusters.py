"""Cluster profiles: there are no defaults, and all findings are reported at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bbu.errors import ConfigError
from bbu.jobs.clusters import PROFILES, load_profile

LOCAL = yaml.safe_load((PROFILES / "local.yaml").read_text())


def write_profile(folder: Path, **changes: object) -> str:
    """Write the local profile with changes and return its path."""
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(LOCAL | changes, allow_unicode=True))
    return str(path)


def findings_of(name: str) -> list[str]:
    """Load a profile that must be refused, without environment variables."""
    with pytest.raises(ConfigError) as error:
        load_profile(name, {})
    return list(error.value.findings)


@pytest.mark.parametrize("name", sorted(path.stem for path in PROFILES.glob("*.yaml")))
def test_every_profile_of_the_project_loads(name: str):
    assert load_profile(name, {"BBU_IMAGE": "/images/bbu.sif"}).executor in ("slurm", "local")


def test_a_missing_key_is_an_error(tmp_path: Path):
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in LOCAL.items() if key != "binds"}))
    assert findings_of(str(path)) == [f"{path}: missing key 'binds'; there are no defaults"]


def test_an_unknown_key_is_reported_with_the_nearest_valid_one(tmp_path: Path):
    path = write_profile(tmp_path, train=LOCAL["train"] | {"partitoin": "gpu"})
    assert findings_of(path) == [f"{path}: unknown key 'train.partitoin'; did you mean 'partition'?"]


def test_all_findings_are_reported_at_once(tmp_path: Path):
    train = LOCAL["train"] | {"cpus_per_task": 0, "gpus_per_node": True, "memory": "8 GB"}
    path = write_profile(tmp_path, nodes=2, executor="slrum", binds="/data", train=train, image_sha256="abc", eval=3)
    assert findings_of(path) == [
        f"{path}: {text}"
        for text in (
            "unknown key 'nodes'; did you mean 'modules'?",
            "key 'executor' must be one of slurm, local, not 'slrum'; did you mean 'slurm'?",
            "key 'image_sha256' must be a SHA-256 in hex, as containers/build.sh prints it, not 'abc'",
            "key 'binds' must be a list of texts, not '/data'",
            "key 'train.gpus_per_node' must be a whole number, not True",
            "key 'train.cpus_per_task' must be within 1..4096, not 0",
            "key 'train.memory' must be 512G, 8G per cpu, 64G per gpu or all, not '8 GB'",
            "key 'eval' must be a mapping of keys to values, not 3",
        )
    ]


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
    assert "control character" in findings_of(write_profile(tmp_path, **changes))[0]


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"modules": ["apptainer"]}, "modules: the local executor loads none"),
        ({"code": "image"}, "code: is image, but image is null"),
        ({"image_sha256": "a" * 64}, "image_sha256: is set, but image is null"),
        ({"eval": LOCAL["eval"] | {"gpu_type": "a100"}}, "eval.gpu_type: is a100, but gpus_per_node is 0"),
        (
            {"train": LOCAL["train"] | {"time_minutes": 1}},
            "train.time_minutes: is 1, so that each start gets the signal",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, changes: dict, finding: str):
    path = write_profile(tmp_path, **changes)
    assert findings_of(path)[0].startswith(f"{path}: {finding}")


def test_environment_variables_are_replaced_by_their_values(tmp_path: Path):
    path = write_profile(tmp_path, image="${IMAGES}/bbu.sif", binds=["${DATA}"])
    profile = load_profile(path, {"IMAGES": "/images", "DATA": "/data"})
    assert (profile.image, profile.binds) == ("/images/bbu.sif", ["/data"])
    problem = "must name only environment variables that are set"
    assert f"{path}: key 'image' {problem}, not '${{IMAGES}}/bbu.sif'" in findings_of(path)


def test_an_unknown_profile_is_reported_with_the_names_of_all():
    assert "one of example, local, test; did you mean 'local'?" in findings_of("locla")[0]
