"""What models keep for their backward, and their gradients beside those of the original."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import freegrad_fx as fg

__all__ = ["Between", "Run", "check", "distance", "gradients", "images"]

Run = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """An operation whose input and output are tensors of the model, which nothing else keeps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.inner(1.5 * x)


def gradients(run: Run, model: nn.Module, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...], int]:
    """The output, all gradients, and the bytes of the storages that are kept besides the input and the parameters."""
    x = x.clone().requires_grad_()
    tensors = [x, *model.parameters(), *model.buffers()]
    own = {t.untyped_storage().data_ptr() for t in tensors}
    sizes = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(x)
    kept = sum(size for place, size in sizes.items() if place not in own)
    grad = torch.linspace(-1, 1.3, y.numel()).to(y.dtype).view(y.shape)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return y, torch.autograd.grad(y, wanted, grad), kept


def distance(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    parts = zip(found, expected, strict=True)
    return max(
        ((a.double() - b.double()).norm() / (b.double().norm() + 1e-30)).item() for a, b in parts
    )


def check(inner: nn.Module, table: Any, x: Tensor, error: float = 0.0) -> tuple[int, int]:
    """Compare a model with the original; return the bytes that both keep."""
    model = Between(inner)
    y, expected, before = gradients(model, model, x)
    found, grads, after = gradients(fg.transform(model, table), model, x)
    assert torch.equal(found, y)
    assert distance(grads, expected) <= error
    return before, after


def images(*shape: int, last: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=torch.channels_last) if last else x
