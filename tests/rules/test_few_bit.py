"""Rules that save a few bits of x: the derivative of the operation as a step function."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.rules.step_functions import nearest_steps

# fewbit's table of GELU, from its file of 3 bits
PUBLISHED = (
    (-2.41658, -0.71001, -0.32584, 0.00011, 0.32606, 0.71024, 2.41448),
    (-0.00019, -0.08828, 0.12568, 0.37231, 0.62785, 0.87445, 1.08835, 1.00019),
)


def derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def looked_up(x: Tensor, borders: Any, levels: Any) -> Tensor:
    """The level of each entry, one by one."""
    found = [levels[sum(not value <= b for b in borders)] for value in x.flatten().tolist()]
    return torch.tensor(found, dtype=x.dtype).reshape(x.shape)


def error(function: Callable[[Tensor], Tensor], steps: Any, far: float = 8.0) -> float:
    """The L2 distance of a step function from the derivative, by a sum over many points."""
    x = torch.linspace(-far, far, 160_001, dtype=torch.float64)
    borders, levels = (torch.tensor(numbers, dtype=torch.float64) for numbers in steps)
    step = levels[(x[:, None] > borders).sum(1)]
    return float(((derivative(function, x) - step).square().mean() * 2 * far).sqrt())


def backward(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x), x, torch.linspace(-1, 1, x.numel()).reshape(x.shape))
    return grad


def test_steps_are_the_published_ones() -> None:
    for found, published in zip(nearest_steps(F.gelu, 8), PUBLISHED, strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(published), atol=2e-3, rtol=0)
    assert error(F.gelu, nearest_steps(F.gelu, 8)) <= error(F.gelu, PUBLISHED)
    assert error(F.gelu, PUBLISHED) == pytest.approx(0.110, abs=1e-3)
    assert error(F.gelu, nearest_steps(F.gelu, 4)) == pytest.approx(0.211, abs=1e-3)


@pytest.mark.parametrize("function", [F.silu, torch.tanh, F.softplus])
def test_no_border_can_be_moved(function: Callable[[Tensor], Tensor]) -> None:
    borders, levels = nearest_steps(function, 8)
    assert len(levels) == len(borders) + 1 == 8
    ends = torch.tensor([-100.0, *borders, 100.0], dtype=torch.float64)

    def gain(ends: Tensor) -> Tensor:
        """What the error lacks to ∫f′², if the levels are the means."""
        return (function(ends).diff().square() / ends.diff()).sum()

    best = gain(ends)
    for place in range(1, 8):
        for step in (-0.01, 0.01):
            moved = ends.clone()
            moved[place] += step
            assert gain(moved) < best


def test_a_derivative_of_few_values_is_exact() -> None:
    assert nearest_steps(F.hardtanh, 16) == ((-1.0, 1.0), (0.0, 1.0, 0.0))
    assert nearest_steps(torch.abs, 8) == ((0.0,), (-1.0, 1.0))
    assert nearest_steps(lambda x: x, 4) == ((), (1.0,))
    model, x = nn.LeakyReLU(0.2), torch.randn(50)
    gm = fg.transform(model, {"leaky_relu": fg.rules.few_bit(bits=1)})
    assert torch.equal(backward(gm, x), backward(model, x))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_gradient_is_looked_up(bits: int) -> None:
    steps = nearest_steps(F.silu, 2**bits)
    gm = fg.transform(nn.SiLU(), {"silu": fg.rules.few_bit(bits=bits)})
    for x in (
        torch.randn(5, 7),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.empty(0, 3),
        torch.tensor(0.3),
        torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]),
        torch.randn(6, 10)[::2, 1::3],
    ):
        expected = torch.linspace(-1, 1, x.numel()).reshape(x.shape) * looked_up(x, *steps)
        assert torch.equal(backward(gm, x), expected)
        assert torch.equal(backward(fg.transform(gm, None), x), expected)


@pytest.mark.parametrize(("rule", "bits"), [("few_bit", 3), ("regelu2", 2), ("resilu2", 2)])
def test_a_few_bits_are_saved(rule: str, bits: int) -> None:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(1001, requires_grad=True) * 1
    gm = fg.transform(nn.GELU(), {"gelu": rule})
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gm(x)
    assert sum(kept.values()) == bits * 126
    assert fg.get(rule).info.saved_bytes() == bits / 8


@pytest.mark.parametrize(
    ("rule", "function", "far"), [("regelu2", F.gelu, 0.16), ("resilu2", F.silu, 0.26)]
)
def test_the_primitive_of_combined_relus_is_near_the_function(
    rule: str, function: Callable[[Tensor], Tensor], far: float
) -> None:
    x = torch.linspace(-9, 9, 9001, dtype=torch.float64)
    step = fg.get(rule).backward(torch.ones_like(x), x=x)
    primitive = torch.cumulative_trapezoid(step, x)
    assert float((primitive - function(x[1:])).abs().max()) < far
    assert float(primitive[-1]) == pytest.approx(9, abs=1e-2)
    assert step[[0, -1]].tolist() == pytest.approx([0, 1], abs=1e-12)
    if rule == "regelu2":
        difference = (derivative(function, x) - step)[x.abs() <= 8]
        assert float((difference.square().sum() * 0.002).sqrt()) == pytest.approx(0.396, abs=1e-3)


def test_a_site_has_the_steps_of_its_operation_and_arguments() -> None:
    model = nn.Sequential(nn.GELU(approximate="tanh"), nn.ELU(alpha=0.5), nn.Softplus(beta=2.0))
    table = {"activations": fg.rules.few_bit(bits=2)}
    expected = [
        nearest_steps(function, 4)
        for function in (
            lambda x: F.gelu(x, approximate="tanh"),
            lambda x: F.elu(x, 0.5),
            lambda x: F.softplus(x, 2.0),
        )
    ]
    found = [decision.rules[0].bound for decision in fg.explain(model, table).decisions]
    assert [(bound["borders"], bound["levels"]) for bound in found] == expected


def test_all_ways_in_give_the_same_gradient() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.gelu(x) + F.leaky_relu(x, 0.1) + F.leaky_relu(x, negative_slope=0.3)
            return y * F.elu_(x * 1)

    model, x, table = Model(), torch.randn(4, 9), {"activations": "few_bit"}
    gm = fg.transform(model, table)
    expected = backward(gm, x)
    assert not torch.equal(expected, backward(model, x))
    with fg.use(table, model=model):
        assert torch.equal(backward(model, x), expected)
    ways = [
        fg.transform(model, table, example_inputs=(x,)),
        fg.compile(model, table, backend="aot_eager"),
        lambda x: torch.vmap(gm)(x),
    ]
    for way in ways:
        torch.testing.assert_close(backward(way, x), expected)


@pytest.mark.slow
@pytest.mark.inductor
def test_steps_compiled_by_inductor() -> None:
    gm, x = fg.transform(nn.GELU(), {"gelu": "few_bit"}), torch.randn(7, 33)
    compiled = torch.compile(gm, fullgraph=True)
    torch.testing.assert_close(backward(compiled, x), backward(gm, x))


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.PReLU(), "takes other tensors"),
        (nn.Softmax(-1), "softmax is not elementwise"),
        (nn.Hardshrink(), r"not continuous.*few_bit\(borders=\.\.\., levels=\.\.\.\)"),
        (nn.RReLU(), "it is random|takes other tensors"),
    ],
)
def test_where_there_is_no_such_derivative_an_error_says_why(model: nn.Module, why: str) -> None:
    table = {"softmax": "few_bit", "activations": "few_bit"}
    with pytest.raises(fg.PlanError, match=f"'few_bit' depends on the operation.*{why}"):
        fg.explain(model, table)


def test_steps_of_ones_own() -> None:
    rule = fg.rules.few_bit(bits=2, borders=(-0.5, 0.5), levels=(1.0, 0.0, 1.0))
    x = torch.randn(99)
    gm = fg.transform(nn.Hardshrink(), {"hardshrink": rule})
    assert torch.equal(backward(gm, x), backward(nn.Hardshrink(), x))
    table = fg.RuleTable([fg.on("hardshrink").backward(rule), fg.on("gelu").backward("few_bit")])
    assert fg.RuleTable.from_toml(table.to_toml()) == table
    for wrong in ({"borders": (1.0, 0.0)}, {"levels": (1.0,)}, {"bits": 1}):
        with pytest.raises(fg.RuleError, match="needs borders in ascending order"):
            rule(**wrong).backward(x, x=x)
    with pytest.raises(fg.RuleError, match="1 <= bits <= 4"):
        fg.rules.few_bit(bits=5)


def test_a_block_for_all_operations_cannot_know_the_steps() -> None:
    for way in (fg.use, lambda rule: fg.Activation("GELU", rule=rule)):
        with pytest.raises(fg.RuleError, match=r"use\(\{'activations': 'few_bit'\}, model=model\)"):
            way("few_bit")


def test_what_is_declared_of_a_mask_is_checked() -> None:
    def formula(grad: Tensor, mask: Tensor, *, bits: int = 2) -> Tensor:
        return grad * mask

    def mask(x: Tensor) -> Tensor:
        return (x > 0).to(torch.uint8)

    for wrong in ({"mask_bits": 9}, {"mask_bits": 0}, {"mask_bits": "bit"}, {"save": "byte"}):
        with pytest.raises(fg.RuleError, match="rule 'declared'"):
            fg.register("declared", mask=mask, **wrong)(formula)
    with pytest.raises(fg.RuleError, match="mask= is not given"):
        fg.register("declared", save="bits")(lambda grad, x: grad)


def test_the_steps_are_computed_in_a_block_without_a_warning() -> None:
    x = torch.randn(4, requires_grad=True)
    with warnings.catch_warnings(), fg.use({"softplus": fg.rules.few_bit(bits=1)}):
        warnings.simplefilter("error")
        torch.nn.functional.softplus(x).sum().backward()
    assert x.grad is not None
