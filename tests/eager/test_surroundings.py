"""Norms that run by their graphs in a block: what their code reads is that of the call, not of an earlier one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg

TABLE = fg.RuleTable([fg.on("rms_norm").backward("frozen_norm")])


EPS = [1e-5, 2.0]
eps_now = EPS[0]


class Base(nn.Module):
    eps_of_class = EPS[0]

    def __init__(self, eps: float = EPS[0], size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))
        self._eps = eps


class Private(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self._eps))


class OfClass(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps_of_class))


class Global(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps_now))


class Size(Base):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * 2 if self.weight.shape[0] == 4 else self.weight
        return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


def of_closure() -> type[Base]:
    class Closure(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

        def change(self) -> None:
            nonlocal eps
            eps = EPS[1]

    eps = EPS[0]
    return Closure


def change_global() -> None:
    globals()["eps_now"] = EPS[1]


closure = of_closure()
CASES: dict[str, tuple[Base, Callable[[], Any], Base]] = {
    "private": (Private(EPS[0]), lambda: None, Private(EPS[1])),
    "class": (OfClass(), lambda: setattr(OfClass, "eps_of_class", EPS[1]), OfClass()),
    "global": (Global(), change_global, Global()),
    "closure": (closure(), lambda: closure.change(None), closure()),  # type: ignore[attr-defined]
    "size": (Size(size=3), lambda: None, Size(size=4)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_value_that_the_code_reads_can_change(case: str) -> None:
    before, change, after = CASES[case]
    for module in (before, after):
        x = torch.randn(2, len(module.weight), requires_grad=True)
        with fg.use(TABLE, model=module) as block:
            y = module(x)
        assert [d.site.op for d in fg.report(block).with_action("rewrite")] == ["rms_norm"]
        assert torch.equal(y, module(x))
        change()


def test_a_module_that_reads_an_object_of_its_file_is_named() -> None:
    class Reads(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS[0]))

    model, x = Reads(), torch.randn(2, 4, requires_grad=True)
    with pytest.warns(fg.FreegradWarning, match="matched nothing"), fg.use(TABLE, model=model) as b:
        model(x)
    (note,) = fg.report(b).opaque
    assert "its code reads 'EPS', a list" in str(note)
