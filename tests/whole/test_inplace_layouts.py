"""In-place activations on strided memory: an operation rounds by the strides of the memory that it runs on.

The model without rules is the oracle. The results, and the gradients of native rules, are the same bit for bit.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from runs import identical, run, tell_apart

Way = Callable[[nn.Module, Any, Any], nn.Module]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, inplace=True),
    "elu": F.elu_,
    "selu": F.selu_,
    "celu": F.celu_,
    "silu": lambda x: F.silu(x, inplace=True),
    "mish": lambda x: F.mish(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "hardsigmoid": lambda x: F.hardsigmoid(x, inplace=True),
    "hardtanh": F.hardtanh_,
    "threshold": lambda x: F.threshold(x, 0.1, 20.0, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
    "rrelu": lambda x: F.rrelu(x, training=True, inplace=True),
}

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda y: y,
    "every second column": lambda y: y[..., ::2],
    "some rows": lambda y: y[1:],
    "a column": lambda y: y[..., 1],
    "transposed": lambda y: y.transpose(0, -1)[1:],
    "overlapping": lambda y: y.as_strided((3, 5), (2, 1)),
    "an entry": lambda y: y[0, 1, 2, 3],
    "empty": lambda y: y[:, :0],
}


class InPlace(nn.Module):
    """Changes a view in place, and reads the base later."""

    def __init__(
        self, act: Callable[[Tensor], Tensor], view: Callable[[Tensor], Tensor], **like: Any
    ) -> None:
        super().__init__()
        self.act, self.view, self.like = act, view, like

    def forward(self, x: Tensor) -> Any:
        y = (x * 1).to(**self.like)
        view = self.view(y)
        self.act(view)
        return y * y, view.sin()


def numbers(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype) * 3


def check(model: nn.Module, gm: nn.Module, x: Tensor) -> None:
    """The same results under rules, and the same results and gradients where they are native."""
    expected = run(model, x, catch=RuntimeError, catch_backward=True)
    with fg.native():
        off = run(gm, x, catch=RuntimeError, catch_backward=True)
    assert not (found := tell_apart(off, expected, identical)), found
    under_rules = run(gm, x, backward=False, catch=RuntimeError)
    forward = run(model, x, backward=False, catch=RuntimeError)
    assert not (found := tell_apart(under_rules, forward, identical)), found


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_on_every_layout(name: str, dtype: torch.dtype) -> None:
    for view in VIEWS.values():
        model = InPlace(ACTIVATIONS[name], view)
        gm = fg.transform(model, {"activations": fg.rules.scale(s=2.0)})
        check(model, gm, numbers(3, 3, 5, 7, dtype=dtype))


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channels last": {"memory_format": torch.channels_last},
}
RULED: dict[str, Any] = {
    "reads nothing": fg.rules.scale(s=2.0),
    "reads x": fg.rules.fast_sigmoid(slope=2.0),
    "a chain": fg.compose(fg.rules.scale(s=2.0), fg.rules.rectangular(a=-1.0, b=1.0)),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULED)
def test_every_kind_of_rule_in_every_memory_format(rule: str, layout: str) -> None:
    for view in VIEWS.values():
        model = InPlace(ACTIVATIONS["silu"], view, **LAYOUTS[layout])
        gm = fg.transform(model, {"activations": RULED[rule]})
        check(model, gm, numbers(2, 3, 5, 7, dtype=torch.float64))


def test_memory_that_repeats_an_entry_is_refused_as_in_the_model() -> None:
    model = InPlace(torch.sigmoid_, lambda y: y[:, :1].expand(-1, 3, -1, -1))
    gm = fg.transform(model, {"activations": fg.rules.scale(s=2.0)})
    for called in (model, gm):
        with pytest.raises(RuntimeError, match="single memory location"):
            called(numbers(3, 3, 5, 7, dtype=torch.float64))


@fg.register("test: reads the output", overwrite=True)
def reads_output(grad: Tensor, y: Tensor) -> Tensor:
    """grad·y"""
    return grad * y


def test_a_rule_reads_the_output_of_a_strided_operation() -> None:
    model = InPlace(torch.tanh_, VIEWS["every second column"])
    gm = fg.transform(model, {"tanh": "test: reads the output"})
    x = numbers(2, 3, 5, 7, dtype=torch.float64).requires_grad_()
    base, view = gm(x)
    (got,) = torch.autograd.grad(base.sum() + view.sum(), x)
    leaf = x.detach()
    expected = 2 * leaf
    y = leaf[..., ::2].tanh()
    expected[..., ::2] = (2 * y + y.cos()) * y
    torch.testing.assert_close(got, expected)


WAYS: dict[str, Way] = {
    "transform": lambda model, rules, x: fg.transform(model, rules),
    "export": lambda model, rules, x: fg.transform(model, rules, example_inputs=(x,)),
    "backend": lambda model, rules, x: fg.compile(model, rules, backend="eager"),
    "saved": lambda model, rules, x: reloaded(fg.transform(model, rules)),
}


def reloaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


class Strided(nn.Module):
    """As `InPlace`, of what can be saved."""

    def forward(self, x: Tensor) -> Any:
        y = x * 1
        view = y[..., ::2]
        torch.sigmoid_(view)
        return y * y, view.sin()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", WAYS)
def test_in_every_way_in(way: str) -> None:
    model, x = Strided(), numbers(2, 3, 5, 7, dtype=torch.float64)
    gm = WAYS[way](model, {"sigmoid": RULED["reads x"]}, x)
    check(model, gm, x)


def test_an_ambient_site() -> None:
    model, x = Strided(), numbers(2, 3, 5, 7, dtype=torch.float64)
    gm = fg.transform(model)
    expected = run(model, x)
    assert not tell_apart(run(gm, x), expected, identical)
    with fg.use("fast_sigmoid"):
        assert not tell_apart(run(gm, x, backward=False), run(model, x, backward=False), identical)
    again = fg.transform(gm, {"sigmoid": RULED["reads x"]})
    check(model, again, x)


class MayReturnItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) if self.training else x


@pytest.mark.parametrize("stride", [2, 0])
def test_a_class_whose_result_is_written_into(stride: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = MayReturnItsInput()

        def forward(self, x: Tensor) -> Tensor:
            h = torch.mul(x, 1)
            h = h[..., ::2] if stride else h[..., :1].expand(-1, -1, -1, 4)
            return self.act(h).add_(1.0)

    model = Model()
    gm = fg.transform(model, {MayReturnItsInput: fg.rules.scale(s=2.0)})
    check(model, gm, numbers(2, 3, 5, 7, dtype=torch.float64))
