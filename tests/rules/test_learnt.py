"""Rules that give a gradient to parameters of their own, compared with what autograd computes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.ops import decoupled, stop_gradient
from freegrad_fx.vocabulary import clip_quantize, jump, step_quantize

X = torch.linspace(-3, 3, 97, dtype=torch.double).repeat(2, 1)
GRAD = torch.linspace(-1, 2, X.numel(), dtype=torch.double).view_as(X)


def learnt(**values: float | Tensor) -> dict[str, Tensor]:
    return {n: torch.as_tensor(v, dtype=torch.double).requires_grad_() for n, v in values.items()}


def of_rule(rule: Any, forward: Callable[..., Tensor], x: Tensor, values: dict[str, Tensor]) -> Any:
    """The gradients that a rule gives to its input and to its parameters."""
    x = x.detach().requires_grad_()
    detached = {n: stop_gradient(v) for n, v in values.items()}
    out = decoupled(forward(stop_gradient(x), **detached), x, rule=rule(**values))
    return torch.autograd.grad(out, (x, *values.values()), GRAD[: len(x)])


def by_autograd(function: Callable[..., Tensor], x: Tensor, values: dict[str, Tensor]) -> Any:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x, **values), (x, *values.values()), GRAD[: len(x)])


def same(found: Any, expected: Any) -> bool:
    return all(
        torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, expected, strict=True)
    )


# --- surrogates: the parameter of the primitive function, as SpikingJelly writes it ---


def step(x: Tensor) -> Tensor:
    return (x >= 0).to(x.dtype)


def sign(x: Tensor) -> Tensor:
    return 2 * step(x) - 1


PRIMITIVES: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
    "fast_sigmoid": (lambda x, slope: x / (1 + slope * x.abs()), {"slope": 3.0}),
    "arctan": (lambda x, alpha: (math.pi / 2 * alpha * x).atan() / math.pi + 0.5, {"alpha": 2.0}),
    "softsign": (lambda x, alpha: (F.softsign(alpha * x) + 1) / 2, {"alpha": 2.0}),
    "superspike": (lambda x, alpha: alpha * x / (1 + x.abs()), {"alpha": 1.5}),
    "sigmoid_derivative": (lambda x, slope: (x * slope).sigmoid(), {"slope": 4.0}),
    "piecewise_quadratic": (
        lambda x, alpha: torch.where(
            x.abs() <= 1 / alpha, -(alpha**2) / 2 * x.square() * x.sign() + alpha * x + 0.5, step(x)
        ),
        {"alpha": 0.7},
    ),
    "piecewise_exponential": (
        lambda x, alpha: step(x) - sign(x) * (-alpha * sign(x) * x).exp() / 2,
        {"alpha": 1.3},
    ),
    "gaussian": (lambda x, alpha: torch.erfc(-alpha * x) / 2, {"alpha": 1.1}),
    "log_abs": (lambda x, alpha: sign(x) * (alpha * sign(x) * x + 1).log(), {"alpha": 0.8}),
    "q_pseudo_spike": (
        lambda x, alpha: step(x) - sign(x) * (1 + 2 / (alpha - 1) * x * sign(x)) ** (1 - alpha) / 2,
        {"alpha": 2.5},
    ),
    "piecewise_leaky": (
        lambda x, width, leak: torch.where(
            x.abs() < width, x / (2 * width) + 0.5, leak * (x - sign(x) * width) + step(x)
        ),
        {"width": 0.7, "leak": 0.1},
    ),
    "leaky_relu_derivative": (
        lambda x, leak, slope: torch.where(x >= 0, slope * x, leak * x),
        {"leak": 0.2, "slope": 1.5},
    ),
    "s2nn": (
        lambda x, alpha, beta: torch.where(
            x < 0, (alpha * x).sigmoid(), beta * (x.clamp(min=0) + 1).log() + 0.5
        ),
        {"alpha": 3.0, "beta": 0.8},
    ),
    "log_tailed_relu": (
        lambda x, alpha: torch.where(
            x > 1, x.clamp(min=1).log() + 1, F.relu(x) - alpha * F.relu(-x)
        ),
        {"alpha": 0.3},
    ),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_surrogate_gives_its_parameters_the_gradient_of_its_primitive(name: str) -> None:
    primitive, values = PRIMITIVES[name]
    x = X + 0.0123  # not at the edges, where autograd takes one side

    def spike(x: Tensor, **_: Tensor) -> Tensor:
        return step(x)

    found = of_rule(fg.get(name), spike, x, learnt(**values))
    assert same(found, by_autograd(primitive, x, learnt(**values)))


def test_every_surrogate_that_learns_is_compared() -> None:
    families = ("surrogate", "surrogate_asymmetric")
    rules = [fg.get(name) for name in fg.rules.available()]
    learning = [r.name for r in rules if r.info.family in families and r.declaration.learns]
    assert sorted(learning) == sorted(PRIMITIVES)


# --- quantizers: the detach spelling of their papers ---


def passed(value: Tensor, as_gradient: Tensor) -> Tensor:
    return as_gradient + (value - as_gradient).detach()


def lsq_net(x: Tensor, step: Tensor, bits: int = 3, signed: bool = True, count: int = 0) -> Tensor:
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    scaled = passed(step, step / ((count or x.numel()) * high) ** 0.5)
    level = (x / scaled).clamp(low, high)
    return passed(level.round(), level) * scaled


def lsq_plus(x: Tensor, step: Tensor, offset: Tensor, bits: int = 3) -> Tensor:
    return lsq_net(x - offset, step, bits, signed=False) + offset


AWAY = (
    X + 0.0123
)  # from the ends of the range, where versions of PyTorch differ in the gradient of clamp

STEPS = [0.3, torch.tensor([[0.3], [0.5]]), torch.linspace(0.2, 0.9, 97)]


@pytest.mark.parametrize("step", STEPS, ids=["one", "per row", "per column"])
@pytest.mark.parametrize("signed", [True, False])
def test_lsq_equals_the_detach_spelling(step: Any, signed: bool) -> None:
    how = {"bits": 3, "signed": signed}
    forward = functools.partial(step_quantize, **how)
    spelled = functools.partial(lsq_net, **how)
    values = learnt(step=step)
    assert torch.allclose(forward(AWAY, **values), spelled(AWAY, **values))
    assert same(
        of_rule(fg.rules.lsq(**how), forward, AWAY, values), by_autograd(spelled, AWAY, values)
    )
    rule = fg.rules.lsq(**how, per_sample=True)
    spelled = functools.partial(lsq_net, **how, count=97)
    assert same(of_rule(rule, forward, AWAY, values), by_autograd(spelled, AWAY, values))


def test_lsq_plus_equals_the_detach_spelling() -> None:
    values = learnt(step=0.3, offset=torch.tensor([[-0.4], [0.2]]))
    forward = functools.partial(step_quantize, bits=3, signed=False)
    assert torch.allclose(forward(AWAY, **values), lsq_plus(AWAY, **values))
    found = of_rule(fg.rules.lsq_plus(bits=3), forward, AWAY, values)
    assert same(found, by_autograd(lsq_plus, AWAY, values))


def soft_quantized(x: Tensor, alpha: Tensor) -> Tensor:
    """The curves of DSQ for two bits from −1 to 2."""
    width = 3 / 3
    inside = x.clamp(-1, 2 - 1e-12)
    number = ((inside + 1) / width).floor()
    middle = -1 + width * (number + 0.5)
    curve = torch.tanh((2 / alpha - 1).log() / width * (inside - middle)) / (1 - alpha)
    return torch.where((x < -1) | (x > 2), 0, -1 + width * (number + (curve + 1) / 2))


def test_dsq_learns_alpha_as_the_parameter_of_its_curves() -> None:
    rule, values = fg.rules.dsq(bits=2, low=-1.0, high=2.0), learnt(alpha=0.3)
    found = of_rule(rule, lambda x, **_: x.round(), AWAY, values)
    assert same(found, by_autograd(soft_quantized, AWAY, values))


def test_pact_equals_the_formula_of_its_paper() -> None:
    def pact(x: Tensor, bound: Tensor) -> Tensor:
        return (x.abs() - (x - bound).abs() + bound) / 2

    values = learnt(bound=1.31)
    found = of_rule(fg.rules.pact, clip_quantize, AWAY, values)
    assert same(found, by_autograd(pact, AWAY, values))
    levels = clip_quantize(X, torch.tensor(1.5), bits=2).unique()
    assert torch.allclose(levels, torch.tensor([0, 0.5, 1, 1.5], dtype=torch.double))


class _JumpReLU(torch.autograd.Function):
    """As in the appendix of the paper, and in SAELens, with a threshold for each feature."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return x * (x > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, threshold = ctx.saved_tensors
        distance = (x - threshold) / ctx.bandwidth
        rectangle = ((distance > -0.5) & (distance < 0.5)).to(x.dtype)
        of_threshold = -(threshold / ctx.bandwidth) * rectangle * grads[0]
        return grads[0] * (x > threshold), of_threshold.sum(0), None


def test_jump_relu_equals_saelens() -> None:
    values = learnt(threshold=torch.linspace(0, 1, 97))
    found = of_rule(fg.rules.jump_relu(bandwidth=0.5), jump, X, values)

    def function(x: Tensor, threshold: Tensor) -> Tensor:
        return _JumpReLU.apply(x, threshold, 0.5)  # type: ignore[no-any-return, no-untyped-call]

    assert same(found, by_autograd(function, X, values))
    assert torch.equal(jump(X, **values), function(X, **values))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_computed_in_single_precision(dtype: torch.dtype) -> None:
    x = torch.full((5000,), 3.0, dtype=dtype, requires_grad=True)
    step = torch.tensor(0.25, dtype=dtype, requires_grad=True)
    bound = torch.tensor(1.0, dtype=dtype, requires_grad=True)
    for rule, parameter, expected in (
        (fg.rules.lsq(step=step), step, 7 * 5000 / (5000 * 7) ** 0.5),
        (fg.rules.pact(bound=bound), bound, 5000.0),
    ):
        out = decoupled(stop_gradient(x) * 1, x, rule=rule)
        (found,) = torch.autograd.grad(out.sum(), parameter)
        assert found.dtype == dtype
        assert found.item() == pytest.approx(expected, rel=1e-2)


# --- in a model ---


def test_a_quantizer_is_trained_in_a_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    step = nn.Parameter(torch.tensor(0.5))
    forward = functools.partial(step_quantize, step=step, bits=4)
    rule = fg.rules.lsq(step=step, bits=4, forward=forward)
    gm = fg.transform(model, fg.RuleTable([fg.on(parameter="*.weight").backward(rule)]))
    x, target = torch.randn(64, 8), torch.randn(64, 4)
    optimizer = torch.optim.Adam(gm.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (gm(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert abs(step.item() - 0.5) > 0.05
    assert list(gm.rule_state_dict()) == ["0.weight/lsq.step"]
