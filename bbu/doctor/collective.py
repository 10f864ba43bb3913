"""A sum over all ranks, timed: what `bbu.doctor` tries the network and the GPUs with, as the trainer would use them."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

REPEATS = 3


def gpu_facts() -> dict[str, Any]:
    """torch, the CUDA it was built for, and the GPUs it sees; with its own words where it cannot use them."""
    facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": [], "gpu_error": None}
    if torch.version.cuda is None:
        return facts
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, or one that is too old: torch says which
        return facts | {"gpu_error": first_line(error)}
    return facts | {"gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]}


def all_reduce_facts(megabytes: int, gpus: bool, timeout_s: float) -> dict[str, Any]:
    """Sum a tensor over the ranks that `env://` describes, over nccl for GPUs, else gloo.

    Returns backend, whether every element was right, the seconds of one sum, or the error in one line.
    """
    backend = "nccl" if gpus else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        correct, seconds = timed_sum(megabytes, "cuda" if gpus else "cpu")
        dist.destroy_process_group()
    except RuntimeError as error:  # torch's own errors about peers, sockets and NCCL are all of this type
        return {"backend": backend, "error": first_line(error)}
    return {"backend": backend, "error": None, "correct": correct, "seconds": seconds}


def timed_sum(megabytes: int, kind: str) -> tuple[bool, float]:
    """Whether all sums were right, and the median of their times. The first is a warm-up: it makes connections."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else 0)
    if kind == "cuda":
        torch.cuda.set_device(device)
    times, correct = [], True
    for _ in range(1 + REPEATS):
        tensor = torch.full((megabytes * 250_000,), float(rank + 1), device=device)
        synchronize(kind)
        dist.barrier()
        start = time.monotonic()
        dist.all_reduce(tensor)
        synchronize(kind)
        times.append(time.monotonic() - start)
        correct = correct and bool((tensor == world * (world + 1) / 2).all().item())
    return correct, sorted(times[1:])[REPEATS // 2]


def synchronize(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
