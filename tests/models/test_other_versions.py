"""What training saves, transformers 4.57 loads as 5.23 does: the same inputs, logits and generated tokens.

Version 4.57 needs an environment of its own. Its place is BBU_TRANSFORMERS_4 (`~/.cache/bbu/transformers-4.57`); where
there is none, `pytest -m slow` makes it, which takes a minute and pip, and every other call skips these tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from bbu.models.model_files import save_image_processor, save_tokenizer
from bbu.models.qwen import load_image_processor, load_tokenizer
from tests.models import stock_program
from tests.models.folders import build_untied_model, model_with_head

pytestmark = pytest.mark.slow

VERSION = "4.57.6"
PLACE = Path(os.environ.get("BBU_TRANSFORMERS_4") or Path.home() / ".cache/bbu/transformers-4.57")


def make_environment(place: Path) -> None:
    """Make an environment with the other transformers; torch and the like are this environment's own."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True, capture_output=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    parent = place / "lib" / version / "site-packages" / "parent.pth"
    parent.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    command = [place / "bin/python", "-m", "pip", "install", "-q", f"transformers=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"pip cannot install transformers {VERSION} into {place}: {done.stderr.strip().splitlines()[-1]}")
    (place / "complete").touch()


@pytest.fixture(scope="session")
def python_4(request: pytest.FixtureRequest) -> Path:
    """The interpreter of the environment with transformers 4.57."""
    if not (PLACE / "complete").is_file():
        if "slow" not in request.config.getoption("markexpr"):
            pytest.skip(
                f"no transformers {VERSION} in {PLACE} (BBU_TRANSFORMERS_4); `pytest -m slow` installs it there"
            )
        make_environment(PLACE)
    return PLACE / "bin/python"


@pytest.fixture(scope="module")
def answers(python_4: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, dict]]:
    """What the two versions compute, version 4 first, of a model with tied and of one with untied embeddings."""
    root = tmp_path_factory.mktemp("folders")
    folders = {"tied": model_with_head(root / "tied"), "untied": build_untied_model(root / "untied")}
    for folder in folders.values():
        save_tokenizer(load_tokenizer(folder), folder)
        save_image_processor(load_image_processor(folder), folder, 784, 28224)
        path = folder / "generation_config.json"
        settings = json.loads(path.read_text()) | {"do_sample": True, "temperature": 0.9, "repetition_penalty": 1.05}
        path.write_text(json.dumps(settings))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python_4, stock_program.__file__, *folders.values()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stock_program.main([str(folder) for folder in folders.values()])
    return {name: (read(folder, "4.57"), read(folder, "5.23")) for name, folder in folders.items()}


def read(folder: Path, version: str) -> dict[str, Any]:
    return json.loads((folder / f"stock-{version}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_both_versions_load_the_folder_without_a_remark_and_agree_in_everything(answers: dict, kind: str):
    old, new = answers[kind]
    assert old["loading"] == new["loading"] == {}
    assert old["tied"] is new["tied"] is (kind == "tied")
    differing = [key for key in new if key != "logits" and old[key] != new[key]]
    assert not differing, {key: (old[key], new[key]) for key in differing}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_both_versions_compute_the_same_logits(answers: dict, kind: str):
    old, new = answers[kind]
    pairs = zip(old["logits"], new["logits"], strict=True)
    assert max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True)) < 1e-5


def test_the_pixel_limits_hold_in_both_versions(answers: dict):
    for version in answers["tied"]:
        ((_, rows, columns),) = version["grid"]
        assert rows * columns * 14 * 14 <= 28224
