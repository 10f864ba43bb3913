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
    path.write_text(yaml.safe_dump({key: value for key, value in LOCAL.items() if key != "qos"}))
    assert findings(str(path)) == [f"{path}: missing key qos"]


def test_an_unknown_key_is_told_with_its_nearest_neighbour(tmp_path: Path):
    path = written(tmp_path, partitoin="gpu")
    assert findings(path) == [f"{path}: unknown key partitoin; did you mean partition?"]


def test_all_findings_are_told_at_once(tmp_path: Path):
    path = written(tmp_path, nodes=2, executor="slrum", cpus_per_task=0, gpus_per_node=True, binds="/data")
    told = "\n".join(findings(path))
    assert "unknown key nodes" in told and "did you mean slurm?" in told and "0 is less than 1" in told
    assert "gpus_per_node: True is not a whole number" in told and "binds: '/data' is not a list of texts" in told


@pytest.mark.parametrize(
    "changes", [{"account": "a\n#SBATCH --uid=0"}, {"binds": ["/a\t"]}, {"environment": {"A\0": ""}}]
)
def test_control_characters_are_refused(tmp_path: Path, changes: dict):
    assert "control character" in findings(written(tmp_path, **changes))[0]


def test_environment_variables_are_put_in(tmp_path: Path):
    path = written(tmp_path, image="${IMAGES}/bbu.sif", binds=["${DATA}"])
    profile = load_profile(path, {"IMAGES": "/images", "DATA": "/data"})
    assert (profile.image, profile.binds) == ("/images/bbu.sif", ["/data"])
    assert f"{path}: image: the environment variable IMAGES is not set" in findings(path)


def test_an_unknown_profile_is_told_with_the_known_ones():
    assert "there are: example, local, test; did you mean local?" in findings("locla")[0]
