"""Norms that run by their graphs in a block: what their code reads is that of the call, not of an earlier one."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from typing import Any, ClassVar

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


class Settings:
    eps = EPS[0]


settings = types.ModuleType("settings")
settings.eps = EPS[0]  # type: ignore[attr-defined]


class OfSettings(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + Settings().eps))


class OfModule(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + settings.eps))


def normalised(x: Tensor, eps: float = EPS[0]) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


class Default(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * normalised(x)


class Inherits(Global):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def change_both() -> None:
    globals()["eps_now"] = EPS[1] if eps_now == EPS[0] else EPS[0]


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
    "settings": (OfSettings(), lambda: setattr(Settings, "eps", EPS[1]), OfSettings()),
    "module": (OfModule(), lambda: setattr(settings, "eps", EPS[1]), OfModule()),
    "default": (Default(), lambda: setattr(normalised, "__defaults__", (EPS[1],)), Default()),
    "inherited": (Inherits(), change_both, Inherits()),
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


class OfFile(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS[0]))


class InClass(Base):
    eps: ClassVar = {"eps": EPS[0]}

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps["eps"]))


class OfProcess(Base):
    def forward(self, x: Tensor) -> Tensor:
        eps = float(os.environ.get("NO_SUCH", 1e-5))
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


class OfPyTorch(Base):
    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_default_dtype()
        return self.weight * normalised(x.to(dtype))


class OwnForward(Base):
    forward = Private.forward


REFUSED = {
    OfFile: "its code reads 'EPS', a list",
    InClass: "its code reads 'eps', a dict",
    OfProcess: "its code reads 'environ', a _Environ",
    OfPyTorch: "settings of PyTorch",
    OwnForward: "its forward is not that of its class",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_module_is_named_whose_code_reads_what_can_change_unseen(kind: type[Base]) -> None:
    model, x = kind(), torch.randn(2, 4, requires_grad=True)
    if kind is OwnForward:
        model.forward = lambda x: 2 * kind.forward(model, x)  # type: ignore[method-assign]
    with pytest.warns(fg.FreegradWarning, match="matched nothing"), fg.use(TABLE, model=model) as b:
        model(x)
    (note,) = fg.report(b).opaque
    assert REFUSED[kind] in str(note)


def test_a_class_that_calls_the_forward_of_another_is_found_after_a_block_without_a_model() -> None:
    class Twice(Private):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, x = Twice(), torch.randn(2, 4, requires_grad=True)
    with fg.use(TABLE):
        model(x)
    with fg.use(TABLE, model=model) as block:
        model(x)
    assert [d.site.op for d in fg.report(block).with_action("rewrite")] == ["rms_norm"]


def test_a_forward_that_the_program_replaces_in_a_block_stays() -> None:
    class Patched(Private):
        forward = Private.forward

    def twice(self: Any, x: Tensor) -> Tensor:
        return 2 * Private.forward(self, x)

    with fg.use(TABLE):
        Patched.forward = twice  # type: ignore[method-assign]
    assert Patched.forward is twice


class Masked(nn.Module):
    def forward(self, x: Tensor, slope: float = 1.702, mask: Tensor | None = None) -> Tensor:
        x = x if mask is None else x * mask
        return x * torch.sigmoid(slope * x)


def test_a_gelu_is_named_that_is_called_with_another_argument_than_the_default() -> None:
    model, x = Masked(), torch.randn(2, 4, requires_grad=True)
    with fg.use({"gelu": "half"}, model=model) as block:
        model(x, 1.702).sum().backward()
        model(x, mask=torch.ones(4))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, 0.5))
    (note,) = fg.report(block).opaque
    assert "gelu in separate operations" in str(note)
    assert "called with mask" in str(note)


@pytest.mark.parametrize("batched", [False, True])
def test_a_weight_from_outside_belongs_to_the_norm(batched: bool) -> None:
    """The gradient of a sample as `torch.func` computes it, beside a norm that gives its input half the gradient."""
    model, x, weight = Private(), torch.randn(3, 4), torch.rand(4)
    table = fg.RuleTable([fg.on("rms_norm").backward("half")])

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        given = {"weight": weight}
        return torch.func.functional_call(model, given, (x,)).square().sum()

    gradient = torch.func.grad(loss, (0, 1))
    with fg.use(table, model=model):
        found = (torch.vmap(gradient, (None, 0)) if batched else gradient)(weight, x)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS[0])
    of_weight = 2 * weight * (x * scale).square()
    torch.testing.assert_close(found[0], of_weight if batched else of_weight.sum(0))
    torch.testing.assert_close(found[1], weight * x * scale)
