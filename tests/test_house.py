"""The rules of the house: who may import whom, what stays torch-free, what importing may do."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANK = {
    "errors": 0, "logs": 0, "rundir": 0, "schema": 0, "resize": 0, "provenance": 0,
    "config": 1,
    "data": 2, "models": 2, "losses": 2,
    "training": 3, "inference": 3, "jobs": 3, "conversion": 3, "evaluation": 3, "synthetic": 3,
}  # fmt: skip
COMPOSERS = {"training/coordinator.py", "inference/predictor.py"}
TORCH_FREE = ("config", "jobs", "conversion", "evaluation", "synthetic", "errors", "logs", "rundir", "schema", "resize",
              "provenance")  # fmt: skip
HEAVY = {"torch", "transformers", "accelerate", "deepspeed", "safetensors"}
FILES = sorted((ROOT / "bbu").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names a file imports anywhere, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT / "bbu").parts[0].removesuffix(".py")


def rooms_used(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("bbu.")} - {room(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "bbu")))
def test_imports_go_down_only(path: Path):
    if room(path) not in RANK:  # an entry: may use every room, but no other entry
        assert rooms_used(path) <= RANK.keys()
        return
    for used in rooms_used(path):
        assert used in RANK, f"imports the entry {used}"
        is_sibling_floor = RANK[used] == RANK[room(path)] == 0
        assert RANK[used] < RANK[room(path)] or is_sibling_floor, f"{room(path)} imports {used}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "bbu")))
def test_only_the_composers_bring_models_data_and_losses_together(path: Path):
    if len(rooms_used(path) & {"models", "data", "losses"}) == 3:
        assert str(path.relative_to(ROOT / "bbu")) in COMPOSERS


@pytest.mark.parametrize("path", [p for p in FILES if room(p) in TORCH_FREE], ids=lambda p: p.name)
def test_torch_free_rooms_name_no_heavy_package(path: Path):
    assert not {name.split(".")[0] for name in imported(path)} & HEAVY


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=lambda p: p.parent.name)
def test_package_inits_are_empty(path: Path):
    if path.parent.name != "inference":  # hands on Qwen25VLInference, lazily
        assert not path.read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("tool", [["ruff", "check"], ["ruff", "format", "--check"], ["pyright"]], ids=" ".join)
def test_the_code_is_clean(tool: list[str]):
    done = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_every_torch_free_module_loads_no_torch_and_prints_nothing():
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in FILES
        if room(p) in TORCH_FREE
    ]
    load = f"for m in {modules!r}: importlib.import_module(m)"
    code = f"import importlib, sys\n{load}\nassert not {HEAVY!r} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
