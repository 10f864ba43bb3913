"""What a task of the doctor's job looks at on its node."""

from __future__ import annotations

from pathlib import Path

from bbu.doctor.probe import _image_error, _memory_limit_mb, _wait_until, clock_ahead_s


def test_a_memory_limit_is_the_narrowest_on_the_way_up(tmp_path: Path):
    step = tmp_path / "slurm/job_7/step_0"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    (step.parent / "memory.max").write_text(f"{512 << 20}\n")
    assert _memory_limit_mb("0::/slurm/job_7/step_0\n", tmp_path) == 512
    assert _memory_limit_mb("1:memory:/slurm\n", tmp_path) is None


def test_the_clock_of_the_filesystem_here_is_ours(tmp_path: Path):
    assert abs(clock_ahead_s(tmp_path)) < 0.1


def test_an_image_that_is_there_can_be_read():
    assert _image_error() is None


def test_waiting_ends_when_it_is_true_or_too_late():
    assert _wait_until(lambda: True, 0) and not _wait_until(lambda: False, 0.01)
