"""What the doctor's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from bbu.jobs.clusters import ClusterProfile, load_profile


@pytest.fixture
def profile(tmp_path: Path) -> ClusterProfile:
    (tmp_path / "bbu.sif").write_bytes(b"an image")
    return load_profile("test", {"BBU_IMAGE": str(tmp_path / "bbu.sif")})
