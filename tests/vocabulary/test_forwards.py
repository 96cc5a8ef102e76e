"""Forwards with parameters: their values, and that a rule and a table take them in every way in."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.vocabulary import binarize, jump_relu, quantize

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# --- values ---


def levels(bits: int, low: float, high: float, symmetric: bool) -> list[float]:
    """The values of a quantizer, in double precision."""
    if symmetric:
        most = 2 ** (bits - 1) - 1
        step = max(abs(low), abs(high)) / most
        return [i * step for i in range(-most, most + 1)]
    step = (max(high, 0.0) - min(low, 0.0)) / (2**bits - 1)
    zero = round(-min(low, 0.0) / step)
    return [(i - zero) * step for i in range(2**bits)]


def nearest(x: Tensor, values: list[float]) -> Tensor:
    grid = torch.tensor(values, dtype=torch.float64)
    return grid[(x.double().unsqueeze(-1) - grid).abs().argmin(-1)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ends", [(None, None), (-0.7, 1.3), (0.0, 1.0), (None, 0.5), (0.25, 2.0)])
def test_quantize_gives_the_nearest_of_its_values(
    ends: tuple[float | None, float | None], symmetric: bool, bits: int, dtype: torch.dtype
) -> None:
    x = torch.randn(40).to(dtype)
    low, high = ends
    least = x.min().item() if low is None else low
    most = x.max().item() if high is None else high
    y = quantize(x, bits, low, high, symmetric)
    assert y.dtype == dtype
    expected = nearest(x, levels(bits, least, most, symmetric))
    torch.testing.assert_close(y.double(), expected.to(dtype).double())
    assert quantize(torch.zeros(3, dtype=dtype), bits, low, high, symmetric).tolist() == [0, 0, 0]


def test_quantize_by_channel_is_each_channel_s_quantizer() -> None:
    x = torch.randn(4, 3, 2, 2) * torch.tensor([0.1, 1.0, 10.0, 0.0]).reshape(4, 1, 1, 1)
    for symmetric in (True, False):
        y = quantize(x, bits=4, symmetric=symmetric, per_channel=True)
        assert torch.equal(y, torch.stack([quantize(c, 4, symmetric=symmetric) for c in x]))
        assert not torch.equal(y, quantize(x, bits=4, symmetric=symmetric))


def test_quantize_is_fake_quantize_of_torch() -> None:
    x = torch.randn(6, 50)
    most = 2**3 - 1
    step = x.abs().max().item() / most
    torch.testing.assert_close(
        quantize(x, bits=4), torch.fake_quantize_per_tensor_affine(x, step, 0, -most, most)
    )
    steps = x.abs().amax(1) / most
    zeros = torch.zeros(6, dtype=torch.int32)
    torch.testing.assert_close(
        quantize(x, bits=4, per_channel=True),
        torch.fake_quantize_per_channel_affine(x, steps, zeros, 0, -most, most),
    )


def test_quantize_takes_extreme_tensors() -> None:
    assert quantize(torch.empty(0, 3)).shape == (0, 3)
    assert quantize(torch.empty(2, 0), per_channel=True).shape == (2, 0)
    assert quantize(torch.tensor(0.3)).item() == pytest.approx(0.3)
    wide = torch.tensor([6e4, -6e4, 1.0], dtype=torch.float16)
    assert quantize(wide, bits=2).tolist() == [60000, -60000, 0]
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.3])
    y = quantize(x, bits=2, low=-1.0, high=1.0)
    assert y[1:].tolist() == [1, -1, 0]
    assert y[0].isnan()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"bits": 1}, "2 to 16 bits with symmetric=True"),
        ({"bits": 17}, "2 to 16 bits"),
        ({"bits": 0, "symmetric": False}, "1 to 16 bits with symmetric=False"),
        ({"low": 1.0, "high": 1.0}, "low < high, got low=1.0 and high=1.0"),
        ({"high": math.inf}, "finite ends of its range, got low=None and high=inf"),
    ],
)
def test_quantize_refuses_what_has_no_values(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantize(torch.randn(3), **given)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_sign_of_zero_and_the_jump_are_chosen(dtype: torch.dtype) -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 0.5, 1.0, math.inf, math.nan], dtype=dtype)
    for value in (1.0, -1.0, 0.0):
        y = binarize(x, value_at_zero=value)
        assert y[:-1].tolist() == [-1, value, value, 1, 1, 1]
        assert (y.dtype, y[-1].isnan().item()) == (dtype, True)
    y = jump_relu(x, threshold=0.5)
    assert y[:-1].tolist() == [0, 0, 0, 0, 1, math.inf]
    assert (y.dtype, y[-1].isnan().item()) == (dtype, True)


def test_own_derivatives() -> None:
    x = torch.tensor([-1.0, 0.25, 0.5, 2.0], requires_grad=True)
    for function, expected in (
        (quantize, [0, 0, 0, 0]),
        (functools.partial(binarize, value_at_zero=-1.0), [0, 0, 0, 0]),
        (functools.partial(jump_relu, threshold=0.5), [0, 0, 0, 1]),
    ):
        assert torch.autograd.grad(function(x).sum(), x)[0].tolist() == expected
        rows = torch.randn(3, 4)
        batched = torch.vmap(function)(rows)
        assert torch.equal(batched, torch.stack([function(row) for row in rows]))


# --- as values ---


def test_a_bound_forward_is_a_value() -> None:
    first = fg.forward("quantize", bits=4, low=-1.0)
    assert first == fg.forward("quantize", low=-1.0, bits=4)
    assert len({first, fg.forward("quantize", bits=4, low=-1.0)}) == 1
    others = [fg.forward("quantize", bits=4), fg.forward("clamp", min=-1.0), "quantize", quantize]
    assert all(first != other for other in others)
    for same in (copy.copy(first), copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert same == first
    assert eval(repr(first), {"forward": fg.forward}) == first
    rule = fg.rules.arctan(forward=fg.forward("heaviside", value_at_zero=1.0))
    assert rule == fg.rules.arctan(forward=fg.forward("heaviside", value_at_zero=1.0))
    assert eval(repr(rule), {"arctan": fg.rules.arctan, "forward": fg.forward}) == rule
    assert pickle.loads(pickle.dumps(rule)) == rule


def test_a_partial_of_a_function_of_the_vocabulary_is_the_same_forward() -> None:
    for partial, bound in (
        (functools.partial(quantize, bits=4), fg.forward("quantize", bits=4)),
        (functools.partial(torch.clamp, min=0.0), fg.forward("clamp", min=0.0)),
    ):
        entry = fg.on("relu", forward=partial).backward("scale")
        assert entry == fg.on("relu", forward=bound).backward("scale")
        table = fg.RuleTable([entry])
        assert fg.RuleTable.from_toml(table.to_toml()) == table


def test_the_names_in_an_error_are_those_of_forwards() -> None:
    for make, words in (
        (lambda: fg.forward("heavyside"), "unknown forward 'heavyside'. Did you mean 'heaviside'"),
        (lambda: fg.forward("glu"), "unknown forward 'glu'"),
        (lambda: fg.forward("clamp"), "forward 'clamp' cannot be computed with no parameters"),
        (lambda: fg.forward("quantize", bits=1), "cannot be computed with bits=1: quantize has 2"),
        (
            lambda: fg.RuleTable.from_dict(
                {"rule": [{"forward": {"op": "ternarize", "limit": 3.0}, "backward": "scale"}]}
            ),
            "forward 'ternarize' cannot be computed with limit=3.0",
        ),
        (
            lambda: fg.RuleTable.from_dict(
                {"rule": [{"forward": {"threshold": 3.0}, "backward": "scale"}]}
            ),
            "an op with parameters, such as",
        ),
    ):
        with pytest.raises(fg.TableError) as error:
            make()
        assert words in str(error.value)


# --- at a site ---

BOUND = [
    fg.forward("heaviside", value_at_zero=1.0),
    fg.forward("binarize", value_at_zero=-1.0),
    fg.forward("ternarize", threshold=0.25),
    fg.forward("quantize", bits=3, low=-1.0, high=1.0, symmetric=False),
    fg.forward("quantize", bits=4, per_channel=True),
    fg.forward("jump_relu", threshold=0.5),
    fg.forward("round", decimals=1),
    fg.forward("clamp", min=-0.5, max=0.5),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def straight(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return x + (function(x) - x).detach()


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(run(x).square().sum(), list(model.parameters())))


@pytest.mark.parametrize("bound", BOUND, ids=repr)
def test_a_bound_forward_replaces_an_activation_and_a_weight_in_every_way_in(bound: Any) -> None:
    model, x = Net(), torch.randn(6, 4)
    table = fg.RuleTable.of({"relu": fg.rules.straight_through(forward=bound)})
    table += fg.RuleTable([fg.on(parameter="second.weight", forward=bound).backward("scale")])
    weight = model.second.weight

    def by_hand(x: Tensor) -> Tensor:
        hidden = straight(bound, model.first(x))
        return nn.functional.linear(hidden, straight(bound, weight), model.second.bias)

    expected = by_hand(x), gradients(by_hand, model, x)

    def in_a_block(x: Tensor) -> Tensor:
        with fg.use(table, model=model):
            return model(x)

    loaded = fg.RuleTable.from_toml(table.to_toml())
    for run in (
        fg.transform(model, loaded),
        fg.transform(model, table, example_inputs=(x,)),
        fg.compile(model, table, backend="eager"),
        in_a_block,
    ):
        torch.testing.assert_close(run(x), expected[0])
        for actual, gradient in zip(gradients(run, model, x), expected[1], strict=True):
            torch.testing.assert_close(actual, gradient)
