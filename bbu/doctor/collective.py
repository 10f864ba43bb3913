"""A sum over all ranks, timed: the doctor's trial of network and GPUs, as the trainer will use them.

The only module of the doctor that needs torch; it runs inside the image alone.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from bbu.doctor.report import ReduceFacts

_REPEATS = 3
_FLOATS_PER_MB = 250_000
"""float32 values in 1 MB (10^6 bytes)."""


def reduce_facts(megabytes: int, on_gpus: bool, timeout_s: float) -> ReduceFacts:
    """Look at torch and its GPUs, then sum a tensor over the ranks that `env://` describes.

    Args:
        megabytes: size of the tensor.
        on_gpus: sum over nccl if torch sees a GPU; else over gloo.
        timeout_s: longest wait for the other ranks, in seconds.
    """
    names, gpu_error = _gpu_names()
    backend = "nccl" if on_gpus and names else "gloo"
    error, correct, seconds = None, False, 0.0
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        correct, seconds = _time_sum(megabytes, "cuda" if backend == "nccl" else "cpu")
        dist.destroy_process_group()
    except RuntimeError as failure:  # torch's errors about peers, sockets and NCCL are all of this type
        error = _first_line(failure)
    return ReduceFacts(
        torch=torch.__version__,
        cuda=torch.version.cuda,
        gpus=names,
        gpu_bytes=_least_gpu_bytes(len(names)),
        gpu_error=gpu_error,
        backend=backend,
        error=error,
        correct=correct,
        seconds=seconds,
        megabytes=megabytes,
        interface=os.environ.get("GLOO_SOCKET_IFNAME"),
    )


def _gpu_names() -> tuple[list[str], str | None]:
    """Return the names of the GPUs that torch sees, and why it cannot use them, in its own words."""
    if torch.version.cuda is None:
        return [], None
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, or one that is too old: torch says which
        return [], _first_line(error)
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())], None


def _least_gpu_bytes(count: int) -> int | None:
    """Return the memory of the GPU that has least; None without any."""
    return min((torch.cuda.get_device_properties(index).total_memory for index in range(count)), default=None)


def _time_sum(megabytes: int, device_type: str) -> tuple[bool, float]:
    """Return whether all sums were right, and the median of their times in seconds."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = torch.device(device_type, int(os.environ["LOCAL_RANK"]) if device_type == "cuda" else 0)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    times, correct = [], True
    for _ in range(1 + _REPEATS):
        tensor = torch.full((megabytes * _FLOATS_PER_MB,), float(rank + 1), device=device)
        _synchronize(device_type)
        dist.barrier()
        start = time.monotonic()
        dist.all_reduce(tensor)
        _synchronize(device_type)
        times.append(time.monotonic() - start)
        # 1 + 2 + ... + world_size
        correct = correct and bool((tensor == world_size * (world_size + 1) / 2).all().item())
    return correct, sorted(times[1:])[_REPEATS // 2]  # the first sum makes the connections


def _synchronize(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
