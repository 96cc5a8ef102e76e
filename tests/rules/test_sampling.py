"""Rules for sampled and vector-quantised operations: their distributions, their peers, and their dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.vocabulary import sample_one_hot

LOGITS = torch.tensor([[0.5, -1.0, 1.5], [2.0, 0.0, -0.5]], dtype=torch.float64)
WEIGHTS = torch.tensor([[1.0, -2.0, 0.5], [0.3, 1.0, 2.0]], dtype=torch.float64)


class Sampled(nn.Module):
    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x, dim=self.dim)


def entry(name: str, **values: Any) -> dict[str, Any]:
    return {"softmax": fg.rules.get(name)(forward="sample_one_hot", **values)}


# --- the forward ---


def test_samples_are_one_hot_and_have_the_probabilities_of_the_softmax() -> None:
    torch.manual_seed(0)
    x = LOGITS.expand(20_000, 2, 3)
    y = sample_one_hot(x)
    assert torch.equal(y.sum(-1), torch.ones(20_000, 2, dtype=x.dtype))
    assert set(y.unique().tolist()) == {0.0, 1.0}
    error = (y.mean(0) - LOGITS.softmax(-1)).abs()
    assert (error < 4 * 0.5 / math.sqrt(20_000)).all()
    certain = torch.tensor([-math.inf, 0.0, -math.inf])
    assert sample_one_hot(certain.half()).tolist() == [0, 1, 0]
    assert sample_one_hot(torch.randn(3, 0)).shape == (3, 0)
    assert sample_one_hot(torch.randn(4, 5), dim=0).sum(0).tolist() == [1] * 5


# --- Gumbel noise, given the sample ---


def test_the_sample_and_the_noise_are_distributed_together_as_in_gumbel_softmax() -> None:
    """The gradients are compared with those of PyTorch's estimator, for each sample and in their two moments."""
    count, tau = 40_000, 0.7
    torch.manual_seed(0)
    theirs = LOGITS[0].expand(count, 3).clone().requires_grad_()
    hard = F.gumbel_softmax(theirs, tau=tau, hard=True)
    (expected,) = torch.autograd.grad(hard, theirs, WEIGHTS[0].expand(count, 3))
    ours = LOGITS[0].expand(count, 3).clone().requires_grad_()
    gm = fg.transform(Sampled(), entry("gumbel_straight_through", tau=tau))
    y = gm(ours)
    (found,) = torch.autograd.grad(y, ours, WEIGHTS[0].expand(count, 3))
    for place in range(3):
        a, b = expected[hard[:, place] == 1], found[y[:, place] == 1]
        for power in (1, 2):
            means = a.pow(power).mean(0) - b.pow(power).mean(0)
            spread = (a.pow(power).var(0) / len(a) + b.pow(power).var(0) / len(b)).sqrt()
            assert (means.abs() < 4.5 * spread).all()


def test_several_samples_keep_the_mean_and_reduce_the_variance() -> None:
    torch.manual_seed(0)
    x, g = LOGITS[0].expand(8000, 3), WEIGHTS[0].expand(8000, 3)
    y = F.one_hot(torch.tensor(2), 3).double().expand(8000, 3)
    one, many = (
        fg.rules.get("gumbel_straight_through")(samples=n, tau=0.5).backward(g, x=x, y=y)
        for n in (1, 8)
    )
    spread = (one.var(0) / 8000 + many.var(0) / 8000).sqrt()
    assert ((one.mean(0) - many.mean(0)).abs() < 4.5 * spread).all()
    torch.testing.assert_close(many.var(0), one.var(0) / 8, rtol=0.15, atol=0)


# --- ReinMax ---


def test_reinmax_is_exact_for_quadratic_functions_of_two_categories() -> None:
    """The mean over the samples is the derivative of the mean: exact for two categories and a quadratic function."""
    x = torch.tensor([0.3, -0.9], dtype=torch.float64, requires_grad=True)
    square = torch.randn(2, 2, dtype=torch.float64)

    def value(d: Tensor) -> Tensor:
        return d @ square @ d + d[0]

    p = x.softmax(-1)
    corners = torch.eye(2, dtype=torch.float64)
    (expected,) = torch.autograd.grad(p[0] * value(corners[0]) + p[1] * value(corners[1]), x)
    mean = torch.zeros(2, dtype=torch.float64)
    for i in range(2):
        d = corners[i].clone().requires_grad_()
        (g,) = torch.autograd.grad(value(d), d)
        mean += p[i].detach() * fg.rules.get("reinmax").backward(g, x=x.detach(), y=d.detach())
    torch.testing.assert_close(mean, expected)


# --- the rotation trick ---


class Nearest(nn.Module):
    """The nearest of some vectors."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)

    def forward(self, e: Tensor) -> Tensor:
        codes: Tensor = self.get_buffer("codes")
        return codes[torch.cdist(e, codes).argmin(-1)]


@pytest.mark.parametrize(
    "way", ["transform", "use", pytest.param("compile", marks=pytest.mark.slow)]
)
def test_the_rotation_trick_at_a_module_that_quantises_vectors(way: str) -> None:
    torch.manual_seed(0)
    codes, g = torch.randn(7, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    model = nn.Sequential(Nearest(codes), nn.Identity())
    e = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    rules = {Nearest: "rotation_trick"}
    if way == "use":
        with fg.use(rules, model=model):
            y = model(e)
    elif way == "compile":
        torch.compiler.reset()
        y = fg.compile(model, rules, backend="eager")(e)
    else:
        y = fg.transform(model, rules)(e)
    assert torch.equal(y, model(e))
    (found,) = torch.autograd.grad(y, e, g)
    q = y.detach()
    size = q.norm(dim=-1, keepdim=True) / e.detach().norm(dim=-1, keepdim=True)
    torch.testing.assert_close(found.norm(dim=-1), (size * g).norm(dim=-1))
    angles = [F.cosine_similarity(a, b, dim=-1) for a, b in ((found, e.detach()), (g, q))]
    torch.testing.assert_close(*angles)


EDGES: dict[str, tuple[list[float], list[float], list[float]]] = {
    # e, q, and the gradient for g = (1, 2)
    "opposite": ([2.0, 0.0], [-1.0, 0.0], [-0.5, 1.0]),
    "equal": ([3.0, 4.0], [3.0, 4.0], [1.0, 2.0]),
    "e = 0": ([0.0, 0.0], [3.0, 4.0], [1.0, 2.0]),
    "q = 0": ([3.0, 4.0], [0.0, 0.0], [0.0, 0.0]),
    "both 0": ([0.0, 0.0], [0.0, 0.0], [1.0, 2.0]),
    "a quarter turn": ([1.0, 0.0], [0.0, 2.0], [4.0, -2.0]),
    "huge": ([3e30, 0.0], [0.0, 3e30], [2.0, -1.0]),
    "tiny": ([3e-30, 0.0], [0.0, 3e-30], [2.0, -1.0]),
}


@pytest.mark.parametrize("name", EDGES)
def test_edges_of_the_rotation_trick(name: str) -> None:
    e, q, expected = map(torch.tensor, EDGES[name])
    found = fg.rules.get("rotation_trick").backward(torch.tensor([1.0, 2.0]), x=e, y=q)
    torch.testing.assert_close(found, expected)


# --- the dimension ---


def transformed(model: nn.Module, rules: Any, x: Tensor) -> Any:
    return fg.transform(model, rules)


def exported(model: nn.Module, rules: Any, x: Tensor) -> Any:
    return fg.transform(model, rules, example_inputs=(x,))


def in_a_block(model: nn.Module, rules: Any, x: Tensor) -> Any:
    with fg.use(rules, model=model):
        model(x)
    return model


@pytest.mark.parametrize(
    "way", [transformed, in_a_block, pytest.param(exported, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ["function", "module"])
def test_a_rule_along_another_dimension_is_refused(way: Callable[..., Any], kind: str) -> None:
    model = Sampled(dim=0) if kind == "function" else nn.Sequential(nn.Softmax(dim=0))
    x = torch.randn(3, 4)
    with pytest.raises(fg.PlanError, match=r"rule 'reinmax' is along dim=-1.*reinmax\(dim=0\)"):
        way(model, {"softmax": "reinmax"}, x)
    sampled = fg.rules.get("reinmax")(dim=0, forward="sample_one_hot")
    with pytest.raises(fg.PlanError, match=r"fg.forward\('sample_one_hot', dim=0\)"):
        way(model, {"softmax": sampled}, x)
    rule = sampled(forward=fg.forward("sample_one_hot", dim=0))
    way(model, {"softmax": rule}, x)
    y = fg.transform(model, {"softmax": rule})(x)
    assert y.sum(0).tolist() == [1.0] * 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_a_compiled_model_draws_samples(backend: str) -> None:
    torch.compiler.reset()
    made = fg.compile(Sampled(), entry("gumbel_straight_through"), backend=backend)
    x = LOGITS.float().expand(4000, 2, 3).clone().requires_grad_()
    y = made(x)
    assert torch.equal(y.sum(-1), torch.ones(4000, 2))
    assert ((y.mean(0) - LOGITS.softmax(-1)).abs() < 0.04).all()
    (grad,) = torch.autograd.grad(y, x, WEIGHTS.float().expand(4000, 2, 3))
    assert grad.isfinite().all()
    torch.testing.assert_close(grad.sum(-1), torch.zeros(4000, 2), rtol=0, atol=1e-5)
