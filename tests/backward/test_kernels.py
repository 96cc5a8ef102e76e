"""`compile=True`: the backward of a rule as one compiled kernel, in eager mode."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx._torch.releases import release
from freegrad_fx.backward import kernels

pytestmark = pytest.mark.inductor


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rules whose kernels ran."""
    ran: list[str] = []
    run = kernels.run_compiled

    def counting(rule: fg.Rule, *args: Any, **kwargs: Any) -> Tensor:
        ran.append(rule.name)
        return run(rule, *args, **kwargs)

    monkeypatch.setattr("freegrad_fx.backward.functions.run_compiled", counting)
    return ran


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, **how: Any) -> Tensor:
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(0)
    y = function(x)
    return torch.autograd.grad(
        y, x, torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype), **how
    )[0]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "rule",
    [
        fg.rules.arctan(alpha=3.0),
        fg.rules.rectangular(a=-0.25, b=0.5),
        fg.rules.clip_norm(max_norm=0.5),
        fg.rules.centralize(dim=(0, 1)),
        fg.rules.guided(save="mask"),
        fg.rules.fast_sigmoid(slope=torch.tensor(2.0)),
    ],
    ids=lambda rule: rule.name,
)
def test_a_kernel_computes_what_the_formula_does(rule: fg.Rule, counted: list[str]) -> None:
    x = torch.randn(5, 7)
    usual, fused = (fg.transform(nn.Tanh(), r) for r in (rule, rule(compile=True)))
    torch.testing.assert_close(gradient(fused, x), gradient(usual, x))
    assert counted == [rule.name]


@pytest.mark.skipif(
    release() < (2, 13), reason="torch 2.12 compiles anew for each value of a number"
)
def test_one_kernel_serves_every_shape_and_value(counted: list[str]) -> None:
    compilations = 0

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal compilations
        compilations += 1
        return torch._dynamo.lookup_backend("inductor")(*args, **kwargs)

    compile_ = torch.compile
    kernels._kernel.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=count, **options))
        for alpha in (2.0, 3.0, 4.0):
            fused = fg.transform(nn.Tanh(), fg.rules.arctan(alpha=alpha, compile=True))
            usual = fg.transform(nn.Tanh(), fg.rules.arctan(alpha=alpha))
            for shape in ((3, 4), (5, 6), (64, 7)):
                x = torch.randn(shape)
                torch.testing.assert_close(gradient(fused, x), gradient(usual, x))
    kernels._kernel.cache_clear()
    assert compilations == 1
    assert len(counted) == 9


def test_second_derivatives_and_transforms_run_the_formula(counted: list[str]) -> None:
    fused = fg.transform(nn.Tanh(), fg.rules.arctan(compile=True))
    usual = fg.transform(nn.Tanh(), fg.rules.arctan())
    x = torch.randn(6)
    assert torch.equal(gradient(fused, x, create_graph=True), gradient(usual, x, create_graph=True))
    by_func = torch.func.grad(lambda x: fused(x).sum())(x)
    assert torch.equal(by_func, torch.func.grad(lambda x: usual(x).sum())(x))
    assert not counted


def test_random_rules_keep_their_distribution_and_follow_the_seed() -> None:
    fused = fg.transform(
        nn.Sequential(nn.Identity()), {"identity": fg.rules.full_jam(compile=True)}
    )
    x = torch.zeros(20_000, requires_grad=True)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.autograd.grad(fused(x), x, torch.ones_like(x))[0]

    first = draw(1)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    assert first.min() >= 0
    assert first.max() < 1
    assert abs(first.mean() - 1 / 2) < 0.01
    assert abs(first.var() - 1 / 12) < 0.005


def test_in_compiled_models_it_makes_no_difference(counted: list[str]) -> None:
    fused = fg.transform(nn.Tanh(), fg.rules.arctan(compile=True))
    x = torch.randn(6)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    usual = gradient(fg.transform(nn.Tanh(), "arctan"), x)
    torch.testing.assert_close(gradient(compiled, x), usual)
    assert not counted


def test_kernels_in_blocks_and_threads(counted: list[str]) -> None:
    ambient = fg.transform(nn.Tanh())
    usual = fg.transform(nn.Tanh(), "triangular")
    x = torch.randn(4, 4)
    found: list[Tensor] = []

    def run() -> None:
        with fg.use(fg.rules.triangular(compile=True)):
            found.append(gradient(ambient, x))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counted  # a thread that runs while another one compiles may compute the formula
    assert len(found) == 3
    for actual in found:
        torch.testing.assert_close(actual, gradient(usual, x))


def test_what_cannot_be_compiled_is_named() -> None:
    @fg.register("asks for data")
    def rule(grad: Tensor, x: Tensor) -> Tensor:
        return grad * (2 if x.sum().item() > 0 else 1)

    x = torch.ones(3)
    assert gradient(fg.transform(nn.Tanh(), "asks for data"), x).tolist() == [-2, 0, 2]
    fused = fg.transform(nn.Tanh(), rule(compile=True))
    with pytest.raises(fg.RuleError, match=r"rule 'asks for data' at site '<root>:tanh\[0\]' can"):
        gradient(fused, x)
    with pytest.raises(TypeError, match="compile of rule 'scale' must be True or False, got 1"):
        fg.rules.scale(compile=1)


@pytest.mark.slow
def test_it_runs_for_every_dtype_and_layout() -> None:
    fused = fg.transform(nn.Tanh(), fg.rules.triangular(compile=True))
    usual = fg.transform(nn.Tanh(), "triangular")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in ((2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1)):
            x = torch.randn(shape).to(dtype)
            for given in (x, x.to(memory_format=torch.channels_last), x.transpose(1, 3)):
                actual, expected = gradient(fused, given), gradient(usual, given)
                torch.testing.assert_close(actual, expected)


def test_errors_of_the_formula_stay_what_they_are() -> None:
    class MyError(Exception):
        pass

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MyError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_kernel", lambda *args: fail)
        with pytest.raises(MyError):
            gradient(fg.transform(nn.Tanh(), fg.rules.triangular(compile=True)), torch.ones(2))
