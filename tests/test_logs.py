"""Logging: which component is heard at which setting, on which rank, and where."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bbu.errors import ConfigError
from bbu.logs import print_notice, rank_of

SPEAK = """
import logging, sys
from pathlib import Path
from bbu.logs import set_up_logging
set_up_logging(sys.argv[1], sys.argv[2] == "true", int(sys.argv[3]), Path(sys.argv[4]))
set_up_logging(sys.argv[1], sys.argv[2] == "true", int(sys.argv[3]), Path(sys.argv[4]))
for name in ("bbu.training.trainer", "bbu.data.dataset", "other"):
    for level in ("debug", "info", "warning"):
        getattr(logging.getLogger(name), level)("%s speaks", level)
"""


def speak(folder: Path, level: str, verbose: str, rank: int) -> tuple[list[str], list[str]]:
    """Lines on stderr and in the rank's file, without the time."""
    argv = [sys.executable, "-c", SPEAK, level, verbose, str(rank), str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    written = (folder / f"rank-{rank}.log").read_text(encoding="utf-8")
    return [[line.split(" ", 2)[2] for line in text.splitlines()] for text in (done.stderr, written)]  # type: ignore


def heard(lines: list[str]) -> list[str]:
    return [f"{line.split()[2].rstrip(':')} {line.split()[0]}" for line in lines]


def test_the_summary_alone_speaks_at_the_level_unless_verbose(tmp_path: Path):
    stderr, _ = speak(tmp_path, "INFO", "false", 0)
    assert heard(stderr) == [
        "bbu.training.trainer INFO", "bbu.training.trainer WARNING", "bbu.data.dataset WARNING", "other WARNING",
    ]  # fmt: skip


def test_every_component_speaks_when_verbose(tmp_path: Path):
    stderr, _ = speak(tmp_path, "DEBUG", "true", 0)
    assert heard(stderr) == [
        *(f"bbu.training.trainer {level}" for level in ("DEBUG", "INFO", "WARNING")),
        *(f"bbu.data.dataset {level}" for level in ("DEBUG", "INFO", "WARNING")),
        "other WARNING",
    ]


def test_other_ranks_only_warn_on_stderr_and_keep_the_rest_in_their_file(tmp_path: Path):
    stderr, written = speak(tmp_path, "INFO", "true", 3)
    assert {line.split()[0] for line in stderr} == {"WARNING"}
    assert "INFO    rank3 bbu.data.dataset: info speaks" in written


def test_setting_up_twice_says_nothing_twice(tmp_path: Path):
    stderr, written = speak(tmp_path, "INFO", "true", 0)
    assert len(stderr) == len(set(stderr)) == len(written)


def test_a_restart_appends_to_the_log(tmp_path: Path):
    _, first = speak(tmp_path, "INFO", "true", 0)
    _, both = speak(tmp_path, "INFO", "true", 0)
    assert both == first * 2


def test_the_rank_comes_from_torch_then_slurm_then_zero():
    assert rank_of({"RANK": "2", "SLURM_PROCID": "5"}) == 2
    assert rank_of({"SLURM_PROCID": "5"}) == 5
    assert rank_of({}) == 0


def test_a_rank_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="the variable RANK is 'first'; it must be the number of a rank"):
        rank_of({"RANK": "first"})


def test_a_log_on_a_full_disk_is_reported_once_and_ends_nothing(tmp_path: Path):
    (tmp_path / "rank-0.log").symlink_to("/dev/full")
    argv = [sys.executable, "-c", SPEAK, "INFO", "true", "0", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True)
    notices = [line for line in done.stderr.splitlines() if "lacks lines from here on" in line]
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert notices and len(set(notices)) == 1 and notices[0].endswith(": no space left on device")
    assert len(notices) == 1


def test_a_notice_names_its_program_on_stderr(capsys: pytest.CaptureFixture[str]):
    print_notice("bbu.submit", "3 runs")
    assert tuple(capsys.readouterr()) == ("", "bbu.submit: 3 runs\n")
