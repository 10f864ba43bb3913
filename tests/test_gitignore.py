"""What the commands write where nobody names a place is ignored by git, and nothing of the project is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from bbu.config.read import CONFIG_DIR, load_config
from bbu.jobs.plan import comparison_folder, config_run_folder

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("base_flat", "smoke")


def ignored(paths: list[str]) -> set[str]:
    argv = ["git", "check-ignore", "--no-index", "--stdin"]
    done = subprocess.run(argv, input="\n".join(paths), cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        pytest.skip(f"no git checkout: {done.stderr.strip()}")
    return set(done.stdout.splitlines())


def places_of_configs() -> list[str]:
    """What the shipped run configs read and write."""
    configs = [load_config(name) for name in CONFIGS]
    folders = [f"{config_run_folder(config).root}/config.yaml" for config in configs]
    folders += [f"{comparison_folder(config)}/table.md" for config in configs]
    return folders + [
        f"{getattr(config, key)}/file" for config in configs for key in ("model_path", "vendor_dir", "data_root")
    ]


def places_of_profiles() -> list[str]:
    """Job folders and images of the shipped cluster profiles."""
    profiles = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (CONFIG_DIR / "clusters").glob("*.yaml")]
    images = [str(profile["image"]) for profile in profiles if profile["image"] and "$" not in profile["image"]]
    return [f"{profile['work_folder']}/1/log.out" for profile in profiles] + images + [f"{i}.sha256" for i in images]


def logs_of_templates() -> list[str]:
    """The files to which the sbatch templates write."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "slurm").glob("*.sbatch")]
    patterns = [pattern for text in texts for pattern in re.findall(r"#SBATCH --output=(\S+)", text)]
    return [pattern.replace("%x", "bbu-train").replace("%j", "17") for pattern in patterns]


def folders_of_entries() -> list[str]:
    """The folders that are defaults of arguments."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "bbu").glob("*.py")]
    return [f"{name}/file" for text in texts for name in re.findall(r'default=Path\("(\w+)"\)', text)]


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_what_is_written_by_default_is_ignored(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    paths = [*places_of_configs(), *places_of_profiles(), *logs_of_templates(), *folders_of_entries(), "core.17"]
    paths = [path.removeprefix("./") for path in paths]
    assert len(paths) > 15 and set(paths) - ignored(paths) == set()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_no_file_of_the_project_is_ignored():
    folders = ("bbu", "configs", "containers", "slurm", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = [path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts]
    assert not {name for name in ignored(names) if not name.endswith(".sif")}
