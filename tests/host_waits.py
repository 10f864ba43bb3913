"""Counts the operations for which the host waits for its GPU: on a real one, or on one that is faked on the CPU.

On a GPU the CUDA runtime reports them (`torch.cuda.set_sync_debug_mode`). Without one, tensors are marked as lying on
the device, results of marked tensors are marked, and what a GPU could not do without its host is counted: reads of
values, results whose size depends on values, and blocking copies in either direction.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = {"_local_scalar_dense", "is_nonzero", "equal", "item"}
_SIZED_BY_VALUES = {
    "nonzero", "masked_select", "masked_scatter_backward", "_unique2", "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip
_INDEXED = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_"}
_TO_HOST = {"cpu", "tolist", "numpy", "__array__"}
_TO_DEVICE = {"tensor", "as_tensor", "new_tensor"}
_TORCH = str(Path(torch.__file__).parent)


def host_waits(call: Callable[[], object], *on_device: Any) -> list[str]:
    """The waits of a call, each as what it is and where.

    Args:
        call: is called once.
        on_device: modules, and tensors in any nesting, that the call uses and that lie (or would lie) on the device.
    """
    tensors = list(_all_tensors(on_device))
    if any(tensor.is_cuda for tensor in tensors):
        with _reported_by_cuda() as waits:
            call()
        return waits
    device = _FakeDevice(tensors)
    with ExitStack() as stack:
        stack.enter_context(_Operations(device))
        stack.enter_context(_Calls(device))
        call()
    return device.waits


def _all_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a nested value; of a module, its parameters and buffers."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, nn.Module):
            yield from (*leaf.parameters(), *leaf.buffers())
        elif isinstance(leaf, torch.Tensor):
            yield leaf


@contextmanager
def _reported_by_cuda() -> Iterator[list[str]]:
    waits: list[str] = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *_, **__: waits.append(f"{_place()}: {str(message)[:60]}")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")


class _FakeDevice:
    """Knows which storages lie on the device, and records the waits.

    A storage that was filled without any input (`arange`, `zeros`) lies wherever it is used first: what device was
    asked for cannot be seen on a CPU.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.waits: list[str] = []
        self.busy = False
        """A wait is being recorded; what it calls inside is part of it."""
        self._anywhere: set[StorageWeakRef] = set()
        self._on_device: set[StorageWeakRef] = set()
        for tensor in tensors:
            self.take(tensor)

    def take(self, tensor: torch.Tensor) -> None:
        self._on_device.add(StorageWeakRef(tensor.untyped_storage()))

    def leave_open(self, tensor: torch.Tensor) -> None:
        self._anywhere.add(StorageWeakRef(tensor.untyped_storage()))

    def has(self, tensor: torch.Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()) in self._on_device

    def is_host(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor certainly lies in the host's memory. One number alone travels with the kernel."""
        key = StorageWeakRef(tensor.untyped_storage())
        return tensor.dim() > 0 and key not in self._on_device and key not in self._anywhere

    def record(self, what: str) -> None:
        self.waits.append(f"{_place()}: {what}")


class _Operations(TorchDispatchMode):
    """Sees every operation, those of autograd's backward pass included."""

    def __init__(self, device: _FakeDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, device = kwargs or {}, self._device
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        uses_device = any(device.has(tensor) for tensor in inputs)
        if uses_device and not device.busy and (reason := self._reason(func, args, kwargs, inputs)):
            device.record(reason)
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if uses_device:
            for tensor in (*outputs, *(t for t in inputs if t.dim() > 0 and not device.is_host(t))):
                device.take(tensor)
        elif not any(device.is_host(tensor) for tensor in inputs):
            for tensor in outputs:
                device.leave_open(tensor)
        return result

    def _reason(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: list[torch.Tensor]) -> str:
        """Why the host would wait; empty where it would not."""
        name = func.overloadpacket.__name__
        if name == "prod" and any(tensor.requires_grad for tensor in inputs):
            return "the backward pass of prod searches for zeros"  # on a GPU, and without a mode that watches it
        if name in _READS:
            return f"{name} reads a value"
        if name in _SIZED_BY_VALUES or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            return f"{name} has a size that depends on values"
        if name in _INDEXED and self._searches(args):
            return f"{name} searches a mask"
        if host := [list(tensor.shape) for tensor in inputs if self._device.is_host(tensor)]:
            is_async = name == "copy_" and (args[2:] == (True,) or kwargs.get("non_blocking"))
            return "" if is_async else f"{name} copies a tensor of the host of shape {host[0]}"
        return ""

    def _searches(self, args: tuple[Any, ...]) -> bool:
        """Whether an index is a mask, whose places must be counted; one value is written through a mask as it is."""
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return bool(masks) and not (len(args) > 2 and args[2].numel() == 1)


class _Calls(TorchFunctionMode):
    """Sees what does nothing on a CPU, and so is no operation there: moves between host and device."""

    def __init__(self, device: _FakeDevice) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, device = kwargs or {}, self._device
        name = getattr(func, "__name__", "")
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if source is not None and device.has(source):
            if name in _TO_HOST or (name == "to" and "cpu" in args[1:]):
                return self._to_host(name, func, args, kwargs)
            if name == "new_tensor":
                return self._to_device(name, func, args, kwargs)
        elif (name == "to" and _names_device(args[1:], kwargs)) or (
            name in _TO_DEVICE and kwargs.get("device") is not None
        ):
            return self._to_device(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _to_host(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._device.record(f"{name} copies to the host")
        self._device.busy = True
        try:
            result = func(*args, **kwargs)
            return torch.from_numpy(result.numpy(force=True).copy()) if isinstance(result, torch.Tensor) else result
        finally:
            self._device.busy = False

    def _to_device(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        if not kwargs.get("non_blocking") and not self._device.busy:
            self._device.record(f"{name} copies to the device and waits")
        result = func(*args, **kwargs).clone()
        self._device.take(result)
        return result


def _names_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") is not None or any(isinstance(a, (torch.device, str, torch.Tensor)) for a in args)


def _place() -> str:
    """File, line and function of the caller outside of torch and of this file."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{'/'.join(path.parts[-3:])}:{frame.f_lineno} {frame.f_code.co_name}"
