"""Feedback alignment: hand-written networks, and what each matrix has to be."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.errors import RuleError


class Net(nn.Module):
    """Three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv1d(2, 3, 3), nn.Linear(4, 5), nn.Linear(5, 2)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layers[0](x))
        x = torch.tanh(self.layers[1](x))
        return self.layers[2](x)


class Swapped(torch.autograd.Function):
    """A linear layer that sends back the gradient through another matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(x, feedback)
        return x @ weight.t() + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, feedback = ctx.saved_tensors
        (grad,) = grads
        rows = grad.flatten(0, -2)
        return grad @ feedback, rows.t() @ x.flatten(0, -2), rows.sum(0), None


def by_hand(model: Net, feedback: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The model with a matrix for the gradient of each linear layer."""

    def run(x: Tensor) -> Tensor:
        conv, *layers = model.layers
        x = torch.tanh(conv(x))
        x = torch.tanh(Swapped.apply(x, layers[0].weight, layers[0].bias, feedback[0]))
        return Swapped.apply(x, layers[1].weight, layers[1].bias, feedback[1])  # type: ignore[no-any-return]

    return run


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(run(leaf).square().sum(), [leaf, *model.parameters()])


def with_rules(model: Net, rule: str, values: list[dict[str, Any]]) -> nn.Module:
    """The model with a rule at its linear layers."""
    entries = [
        fg.on("linear", module=f"layers.{i + 1}").backward(rule, **given)
        for i, given in enumerate(values)
    ]
    return fg.transform(model, fg.RuleTable(entries))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_with_the_weight_as_feedback_the_gradients_are_native_to_the_bit(
    model: Net, x: Tensor
) -> None:
    entries = [
        fg.on(["linear", "conv"], module=f"layers.{i}").backward(
            "feedback_alignment", feedback=layer.weight.detach().clone()
        )
        for i, layer in enumerate(model.layers)
    ]
    gm = fg.transform(model, fg.RuleTable(entries))
    assert all(map(torch.equal, gradients(gm, model, x), gradients(model, model, x)))


def test_a_given_matrix_replaces_the_weight(model: Net, x: Tensor) -> None:
    matrices = [torch.randn_like(layer.weight) for layer in model.layers[1:]]
    gm = with_rules(model, "feedback_alignment", [{"feedback": m} for m in matrices])
    expected = gradients(by_hand(model, matrices), model, x)
    assert all(map(torch.allclose, gradients(gm, model, x), expected))


EYE = torch.eye(40, dtype=torch.float64)


def twins() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)).double()


def matrix_of(model: nn.Module, rule: Any) -> Tensor:
    """The product of the matrices that the layers of a linear model send their gradients back through."""
    leaf = torch.zeros_like(EYE, requires_grad=True)
    with fg.use({"linear": rule}, model=model):
        out = model(leaf)
    return torch.autograd.grad(out, leaf, EYE)[0]


def test_every_site_has_a_matrix_of_its_own_that_does_not_change() -> None:
    model = twins()
    plan = fg.explain(model, {"linear": "feedback_alignment"})
    seeds = [decision.rules[0].bound["seed"] for decision in plan.decisions]
    state = torch.random.get_rng_state()
    matrices = [matrix_of(model[:1], fg.rules.feedback_alignment(seed=seed)) for seed in seeds]
    whole = matrix_of(model, "feedback_alignment")
    assert torch.allclose(whole, matrices[1] @ matrices[0])
    assert torch.equal(whole, matrix_of(model, "feedback_alignment"))
    assert torch.equal(torch.random.get_rng_state(), state)
    bound = (6 / 80) ** 0.5
    for matrix in matrices:
        assert matrix.abs().max() <= bound
        assert abs(matrix.mean()) < 4 * bound / 3**0.5 / 40
        assert abs(matrix.std() / (bound / 3**0.5) - 1) < 0.1
    correlation = torch.corrcoef(torch.stack([matrix.flatten() for matrix in matrices]))[0, 1]
    assert abs(correlation) < 4 / 40


def test_sign_symmetric_takes_the_signs_of_the_weight() -> None:
    model = twins()[:1]
    sign, bound = model[0].weight.detach().sign(), (6 / 80) ** 0.5
    uniform = matrix_of(model, "sign_symmetric")
    assert torch.allclose(uniform, sign * (2 / 80) ** 0.5)
    fixed = [matrix_of(model, fg.rules.sign_symmetric(magnitude="fixed")) for _ in range(2)]
    drawn = [matrix_of(model, fg.rules.sign_symmetric(magnitude="drawn")) for _ in range(2)]
    assert torch.equal(*fixed)
    assert not torch.equal(*drawn)
    for matrix in (*fixed, *drawn):
        size = matrix * sign
        assert 0 <= size.min() <= size.max() <= bound
        assert abs(size.mean() / (bound / 2) - 1) < 0.1
    with pytest.raises(RuleError, match="must be 'uniform', 'fixed' or 'drawn'"):
        matrix_of(model, fg.rules.sign_symmetric(magnitude="random"))


def test_the_matrix_of_kolen_and_pollack_approaches_the_weight(model: Net, x: Tensor) -> None:
    layer = model.layers[1]
    feedback = nn.Parameter(torch.randn_like(layer.weight))
    table = fg.RuleTable(
        [fg.on("linear", module="layers.1").backward("kolen_pollack", feedback=feedback)]
    )
    optimizer = torch.optim.SGD([*model.parameters(), feedback], lr=0.1, weight_decay=0.5)
    distances = []
    for _ in range(5):
        distances.append(torch.linalg.vector_norm(feedback - layer.weight).item())
        expected = gradients(by_hand(model, [feedback, model.layers[2].weight]), model, x)
        with fg.use(table, model=model):
            leaf = x.clone().requires_grad_()
            out = model(leaf)
        optimizer.zero_grad()
        out.square().sum().backward()
        assert torch.allclose(leaf.grad, expected[0])
        assert torch.equal(feedback.grad, layer.weight.grad)
        optimizer.step()
    ratios = [after / before for before, after in itertools.pairwise(distances)]
    assert ratios == pytest.approx([0.95] * 4)


def test_the_matrix_is_finite_in_half_precision() -> None:
    layer = nn.Sequential(nn.Linear(4, 3)).half()
    leaf = torch.ones(2, 4, dtype=torch.half, requires_grad=True)
    out = fg.transform(layer, {"linear": "feedback_alignment"})(leaf)
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    assert grad.isfinite().all()
    assert grad.abs().max() <= 3 * (6 / 7) ** 0.5
