"""How an entry ends: one line for a person and an exit code, whatever went wrong."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bbu.errors import ConfigError, DataError, run_entry
from tests.commands import ROOT

HIDE = "import sys; sys.modules[{package!r}] = None; sys.argv = ['-m']; import bbu; import {module}"
"""A program in which a package is missing; `-m` stands in argv while Python looks for an entry's module."""


class OutOfMemoryError(RuntimeError):
    """Stands for torch's error of this name."""


class SafetensorError(Exception):
    """Stands for safetensors' error of this name."""


def end_of(main: Callable[[], int | None]) -> int:
    codes: list[int] = []
    run_entry(main, codes.append)
    (code,) = codes
    return code


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


def shell(command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `python …` by a shell, with the project on the path, wherever that is called."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)} | env
    text = command.replace("python", sys.executable, 1)
    return subprocess.run(["bash", "-o", "pipefail", "-c", text], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (DataError("no photo"), 3, "no photo"),
        (OSError(errno.ENOSPC, "No space left on device", "/d/x"), 1, "/d/x: no space left on device; remove old runs"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, ": disk quota exceeded; remove old runs"),
        (OSError(errno.EACCES, "Permission denied", b"/d/\xd6"), 1, ": permission denied; check its owner"),
        (OSError(errno.EROFS, "Read-only file system", "/d"), 1, "choose a folder that can be written"),
        (OSError(errno.EMFILE, "Too many open files"), 1, ": too many open files; raise the limit (ulimit -n)"),
        (OSError(errno.ESTALE, "Stale file handle", "/d"), 1, "the file server has replaced it"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), 1, "the current folder is gone; go to another"),
        (OSError("weights are\n  missing"), 1, "OSError: weights are missing"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), 1, "a file or connection: connection"),
        (ModuleNotFoundError("No module named 'scipy'", name="scipy"), 1, "scipy is not installed in "),
        (ModuleNotFoundError("No module named 'scipy'", name="scipy"), 1, "pip install -e '.[train]'"),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), 1, "pip install -e '.'"),
        (ModuleNotFoundError("No module named 'bbu.x'", name="bbu.x"), 1, "this checkout is incomplete"),
        (ImportError("libcudnn.so.9: cannot open\nshared object file"), 1, "libcudnn.so.9: cannot open shared"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "out of memory; request more"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1, "CUDA out of memory; lower max_total_length"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), 1,
         ": no space left on device; remove old runs"),
        (RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/1"), 1,
         ": no space left on device; remove old runs"),
        (UnicodeEncodeError("ascii", "数据", 0, 2, "no"), 1, "ascii, the encoding of this terminal"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)  # fmt: skip
def test_an_error_of_the_machine_is_one_line_that_says_what_to_do(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
):
    assert end_of(raising(error)) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and line in err and err.count("\n") == 1


def test_each_finding_of_a_config_is_a_line(capsys: pytest.CaptureFixture[str]):
    assert end_of(raising(ConfigError("a", "b"))) == 2
    assert capsys.readouterr().err == "error: a\nerror: b\n"


def test_a_defect_of_ours_keeps_its_stack_trace():
    with pytest.raises(ZeroDivisionError):
        end_of(raising(ZeroDivisionError()))


def test_the_exit_code_of_argparse_passes_through(capsys: pytest.CaptureFixture[str]):
    assert [end_of(raising(SystemExit(code))) for code in (None, 0, 2, "no such run")] == [0, 0, 2, 1]
    assert capsys.readouterr().err == "error: no such run\n"


def test_an_error_without_a_file_name_names_the_path_and_the_function_that_met_it(tmp_path: Path):
    from bbu.run.files import sync_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: raising(OSError(errno.ENOSPC, "No space left on device"))())
        patch.setattr(sys, "stderr", io.StringIO())
        assert end_of(lambda: sync_folder(tmp_path)) == 1
        place = f"{tmp_path} (sync_folder in bbu/run/files.py)"
        assert f"error: {place}: no space left on device" in sys.stderr.getvalue()


def test_a_function_outside_of_the_package_is_not_named_though_its_checkout_is_called_bbu(
    capsys: pytest.CaptureFixture[str],
):
    source = "def fail(): raise ConnectionRefusedError(111, 'Connection refused')"
    names: dict[str, Any] = {}
    exec(compile(source, "/home/me/bbu/other.py", "exec"), names)
    assert end_of(names["fail"]) == 1
    assert capsys.readouterr().err == "error: a file or connection: connection refused\n"


@pytest.mark.parametrize("arguments", ["status --help", "submit --help", "train --config smoke --print-config"])
def test_a_reader_that_leaves_early_ends_the_entry_quietly(arguments: str):
    done = shell(f"python -m bbu.{arguments} | true")
    assert done.stderr == "" and done.returncode in (0, 141)  # 0: all of it had gone into the pipe before


def test_an_output_on_a_full_disk_is_an_error_in_one_line():
    done = shell("python -m bbu.train --config smoke --print-config >/dev/full")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no space left on device" in done.stderr


@pytest.mark.parametrize("redirection, code", [(">&-", 0), ("2>&-", 0), (">&- 2>/dev/full", 0)])
def test_a_closed_output_is_no_error(redirection: str, code: int):
    assert shell(f"python -m bbu.train --config smoke --print-config {redirection}").returncode == code


def test_what_an_encoding_lacks_is_written_as_json_escapes():
    program = "import bbu.errors as e; e.run_entry(lambda: print('\\u6570\\U0001f600\\udcd6\\xe9'))"
    done = shell(f'python -c "{program}"', PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u6570\\ud83d\\ude00\\udcd6\\u00e9\n", "")


@pytest.mark.parametrize(
    "package, module, advice", [("yaml", "bbu.convert", "'.'"), ("torch", "bbu.models.tiny", "'.[train]'")]
)
def test_a_package_that_is_missing_when_an_entry_is_imported_is_one_line(package: str, module: str, advice: str):
    done = shell(f'python -c "{HIDE.format(package=package, module=module)}"')
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: the Python package {package} is not installed in ")
    assert done.stderr.endswith(f"pip install -e {advice}\n") and done.stderr.count("\n") == 1


def test_importing_the_package_leaves_the_hooks_of_other_programs_alone():
    done = shell('python -c "import sys; import bbu; assert sys.excepthook is sys.__excepthook__"')
    assert done.returncode == 0
