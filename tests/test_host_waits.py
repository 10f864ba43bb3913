"""The faked device counts what a GPU's host waits for, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.host_waits import host_waits

T = torch.Tensor
WAITS: dict[str, Callable[[T], object]] = {
    "item": lambda x: x.sum().item(),
    "int": lambda x: int(x[0] > 0),
    "truth": lambda x: bool((x > 0).all()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "mask as index": lambda x: x[x > 0],
    "mask as index of a write": lambda x: x.clone().__setitem__(x > 1, x[:2]),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "tensor made of a list": lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
    "tensor of the host": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "blocking copy": lambda x: torch.tensor([1.0]).to(x.device),
    "index of the host": lambda x: x[torch.tensor([0, 1])],
    "backward of prod": lambda x: x.clone().requires_grad_().prod(-1).backward(),
    "backward of masked_scatter": lambda x: x.masked_scatter(x > 0, x.clone().requires_grad_()).sum().backward(),
}  # fmt: skip
NONE: dict[str, Callable[[T], object]] = {
    "arithmetic": lambda x: (x * 2 + torch.arange(3, device=x.device)).softmax(-1),
    "a number": lambda x: x + torch.tensor(1.0),
    "one value written through a mask": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "index of the device": lambda x: x[x.argsort()],
    "copy that does not block": lambda x: x + torch.tensor([1.0, 2.0, 3.0]).to(x.device, non_blocking=True),
    "a read of the host": lambda x: torch.tensor([1, 2]).sum().item(),
    "zeros that are filled": lambda x: torch.zeros(3).index_add(0, torch.arange(3), x),
    "backward": lambda x: (x.clone().requires_grad_() ** 2).sum().backward(),
    "size given": lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64) * x.long(), output_size=6),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITS)
def test_it_counts(name: str):
    x = torch.tensor([1.0, 2.0, 3.0])
    waits = host_waits(lambda: WAITS[name](x), x)
    assert len(waits) == 1 and "test_host_waits.py" in waits[0]


@pytest.mark.parametrize("name", NONE)
def test_it_does_not_count(name: str):
    x = torch.tensor([1.0, 2.0, 3.0])
    assert host_waits(lambda: NONE[name](x), x) == []


def test_a_copy_on_the_host_is_read_without_waiting():
    x = torch.tensor([1.0, 2.0])
    assert len(host_waits(lambda: x.cpu().sum().item(), x)) == 1


def test_parameters_of_a_module_lie_on_the_device():
    layer, x = torch.nn.Linear(2, 2), torch.ones(1, 2)
    waits = host_waits(lambda: layer(x).sum().backward(), layer, x)
    assert waits == [] and host_waits(lambda: layer.weight.grad.sum().item(), layer, layer.weight.grad)
