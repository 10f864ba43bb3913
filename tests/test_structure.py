"""The rules of the structure: which package imports which, what stays torch-free, what importing may do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYER = {
    "errors": 0, "logs": 0, "schema": 0, "resize": 0, "labels": 0, "boxes": 0, "strict_json": 0,
    "config": 1, "run": 1,
    "data": 2, "models": 2, "losses": 2, "evaluation": 2,
    "conversion": 3, "reports": 3, "synthetic": 3,
    "training": 4, "inference": 4, "jobs": 4,
}  # fmt: skip
"""Layer of each package; the entries and the doctor are the top layer, which nothing imports."""
COMPOSERS = {"training/coordinator.py", "inference/predictor.py"}
TORCH_FREE = {
    "submit", "status", "convert", "export", "doctor", "config", "run", "jobs", "conversion", "evaluation", "reports",
    "synthetic", "errors", "logs", "schema", "resize", "labels", "boxes", "strict_json",
}  # fmt: skip
NEEDS_TORCH = {"doctor/collective.py"}
"""Files of torch-free packages that run inside the image alone, and that nothing torch-free imports at the top."""
ALSO_TORCH_FREE = {"inference/parse.py", "models/dimensions.py", "training/memory.py"}
"""Files of other packages that a login node uses."""
HEAVY = {"torch", "transformers", "accelerate", "deepspeed", "peft", "safetensors"}
FILES = sorted((ROOT / "bbu").rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, functions included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def relative(path: Path) -> str:
    return path.relative_to(ROOT / "bbu").as_posix()


def package_of(path: Path) -> str:
    """The package (or, beside the packages, the module) that a file belongs to."""
    return path.relative_to(ROOT / "bbu").parts[0].removesuffix(".py")


def packages_used(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported_names(path) if name.startswith("bbu.")} - {package_of(path)}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


TORCH_FREE_FILES = [
    path
    for path in FILES
    if (package_of(path) in TORCH_FREE and relative(path) not in NEEDS_TORCH) or relative(path) in ALSO_TORCH_FREE
]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_go_down_only(path: Path):
    layer = LAYER.get(package_of(path))
    if layer is None:  # the top layer may use every package, but no other entry
        assert packages_used(path) <= LAYER.keys() | {"__version__"}
        return
    for used in packages_used(path):
        assert used in LAYER, f"imports {used} of the top layer"
        assert LAYER[used] < layer or LAYER[used] == layer == 0, f"{package_of(path)} imports {used}"


def test_no_modules_import_each_other_in_a_circle():
    modules = {module_name(path): imported_names(path) for path in FILES}
    graph = {name: names & modules.keys() - {name} for name, names in modules.items()}
    while leaves := {name for name, names in graph.items() if not names}:
        graph = {name: names - leaves for name, names in graph.items() if name not in leaves}
    assert not graph, f"circle among {sorted(graph)}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_the_composers_bring_models_data_and_losses_together(path: Path):
    if len(packages_used(path) & {"models", "data", "losses"}) == 3:
        assert relative(path) in COMPOSERS


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_only_training_and_inference_use_models_beside_other_parts(path: Path):
    if "models" in packages_used(path) and packages_used(path) & {"data", "losses", "evaluation"}:
        assert package_of(path) in ("training", "inference")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_object_changes_its_class(path: Path):
    """A class is chosen when its object is built."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    stored = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    assert "__class__" not in stored


@pytest.mark.parametrize("path", TORCH_FREE_FILES, ids=relative)
def test_torch_free_files_name_no_heavy_package(path: Path):
    assert not {name.split(".")[0] for name in imported_names(path)} & HEAVY


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=relative)
def test_package_inits_are_empty(path: Path):
    if relative(path) not in ("__init__.py", "inference/__init__.py"):  # the version; Qwen25VLInference, lazily
        assert not path.read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("path", [p for p in FILES if package_of(p) not in LAYER], ids=relative)
def test_entries_parse_load_and_call(path: Path):
    if package_of(path) not in ("__init__", "doctor"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 110


@pytest.mark.parametrize("tool", [["ruff", "check"], ["ruff", "format", "--check"]], ids=" ".join)
def test_the_code_is_clean(tool: list[str]):
    completed = subprocess.run([sys.executable, "-m", *tool], cwd=ROOT, capture_output=True, text=True)
    assert completed.returncode == 0, completed.stdout + completed.stderr


def pyright_settings(folder: Path) -> dict[str, Any]:
    """The project's settings for a file in `folder`, without its `.venv`: packages are those of this interpreter."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pyright"]
    general = {key: value for key, value in settings.items() if key not in ("venv", "venvPath")}
    include = [os.path.relpath(ROOT / name, folder) for name in settings["include"]]
    return general | {"include": include, "extraPaths": [str(ROOT)]}


def test_the_types_are_clean_in_whatever_environment_this_runs(tmp_path: Path):
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(pyright_settings(tmp_path)), encoding="utf-8")
    argv = [sys.executable, "-m", "pyright", "-p", str(tmp_path), "--pythonpath", sys.executable]
    completed = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert completed.returncode == 0 and "No source files" not in completed.stdout, completed.stdout


def test_importing_every_torch_free_module_loads_no_torch_and_prints_nothing():
    modules = [module_name(path) for path in TORCH_FREE_FILES if path.name != "__main__.py"]
    load = f"for m in {modules!r}: importlib.import_module(m)"
    code = f"import importlib, sys\n{load}\nassert not {HEAVY!r} & set(sys.modules)"
    completed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")
