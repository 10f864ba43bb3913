"""Two nodes, one rank each, inside the image: torch.distributed and DeepSpeed find each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.testbed import Cluster

pytestmark = pytest.mark.cluster

BATCH = """#!/bin/bash
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) GLOO_SOCKET_IFNAME=lo OMP_NUM_THREADS=1 PYTHONFAULTHANDLER=1
srun -N2 --ntasks-per-node=1 "$BBU_HOME/slurm/container.sh" python "$BBU_HOME/tests/cluster/programs/$1"
"""


@pytest.fixture(scope="module")
def checkout(cluster: Cluster) -> Path:
    return cluster.checkout()


def output_of(cluster: Cluster, checkout: Path, program: str) -> str:
    script = checkout / f"{program}.sbatch"
    script.write_text(BATCH)
    env = {"BBU_IMAGE": str(cluster.image), "BBU_HOME": str(checkout)}
    job = cluster.sbatch("-N2", script, program, cwd=checkout, env=env)
    assert cluster.wait(job) == "COMPLETED", cluster.describe(job)
    return cluster.job_output(job)


def test_gloo_sums_across_the_nodes(cluster: Cluster, checkout: Path) -> None:
    text = output_of(cluster, checkout, "all_reduce.py")
    assert sorted(line for line in text.splitlines() if line.startswith("rank")) == [
        "rank 0 on n1: sum 3",
        "rank 1 on n2: sum 3",
    ]


def test_zero2_trains_across_the_nodes_and_compiles_nothing(cluster: Cluster, checkout: Path) -> None:
    text = output_of(cluster, checkout, "zero2.py")
    weights = re.findall(r"stage 2 weights (\S+)", text)
    assert len(weights) == 2 and len(set(weights)) == 1, text
    assert "ninja" not in text and "Building extension" not in text, text
