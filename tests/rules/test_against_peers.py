"""Rules give the gradients of the libraries that have them, on the same input.

A case is skipped if its library is not installed: none is a dependency of the tests. Where a library disagrees with a
rule on purpose, the docstring of the rule says how.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg

SNNTORCH = "snntorch.surrogate"
SPIKINGJELLY = "spikingjelly.activation_based.surrogate"
NORSE = "norse.torch.functional.threshold"
SINABS = "sinabs.activation"
BREVITAS = "brevitas.function.ops_ste"

Peer = Callable[[Any], Callable[[Tensor], Tensor]]
"""From the module of a library, its function with a gradient of its own."""

r = fg.rules

# Numbers besides the defaults, so that no parameter is ignored
CASES: list[tuple[str, str, Any, Peer]] = [
    ("fast_sigmoid", SNNTORCH, r.fast_sigmoid(slope=7.0), lambda m: m.fast_sigmoid(slope=7.0)),
    ("atan", SNNTORCH, r.arctan(alpha=3.0), lambda m: m.atan(alpha=3.0)),
    ("sigmoid", SNNTORCH, r.sigmoid_derivative(slope=25.0), lambda m: m.sigmoid(slope=25)),
    (
        "spike_rate_escape",
        SNNTORCH,
        r.spike_rate_escape(beta=2.0, slope=5.0),
        lambda m: m.spike_rate_escape(beta=2.0, slope=5.0),
    ),
    ("SFS", SNNTORCH, r.sparse_fast_sigmoid(slope=5.0, bound=0.5), lambda m: m.SFS(5.0, 0.5)),
    ("SSO", SNNTORCH, r.stochastic_spike(mean=0.5, variance=0.3), lambda m: m.SSO(0.5, 0.3)),
    (
        "straight_through_estimator",
        SNNTORCH,
        r.straight_through,
        lambda m: m.straight_through_estimator(),
    ),
    ("ATan", SPIKINGJELLY, r.arctan(alpha=3.0), lambda m: m.ATan(3.0)),
    ("SoftSign", SPIKINGJELLY, r.softsign(alpha=3.0), lambda m: m.SoftSign(3.0)),
    ("SuperSpike", SPIKINGJELLY, r.superspike(alpha=3.0), lambda m: m.SuperSpike(3.0)),
    ("Sigmoid", SPIKINGJELLY, r.sigmoid_derivative(slope=3.0), lambda m: m.Sigmoid(3.0)),
    (
        "PiecewiseQuadratic",
        SPIKINGJELLY,
        r.piecewise_quadratic(alpha=0.7),
        lambda m: m.PiecewiseQuadratic(0.7),
    ),
    (
        "PiecewiseExp",
        SPIKINGJELLY,
        r.piecewise_exponential(alpha=0.7),
        lambda m: m.PiecewiseExp(0.7),
    ),
    ("Erf", SPIKINGJELLY, r.gaussian(alpha=0.7), lambda m: m.Erf(0.7)),
    (
        "PiecewiseLeakyReLU",
        SPIKINGJELLY,
        r.piecewise_leaky(width=0.7, leak=0.2),
        lambda m: m.PiecewiseLeakyReLU(0.7, 0.2),
    ),
    (
        "LeakyKReLU",
        SPIKINGJELLY,
        r.leaky_relu_derivative(leak=0.2, slope=1.5),
        lambda m: m.LeakyKReLU(leak=0.2, k=1.5),
    ),
    ("NonzeroSignLogAbs", SPIKINGJELLY, r.log_abs(alpha=0.7), lambda m: m.NonzeroSignLogAbs(0.7)),
    ("QPseudoSpike", SPIKINGJELLY, r.q_pseudo_spike(alpha=1.7), lambda m: m.QPseudoSpike(1.7)),
    ("S2NN", SPIKINGJELLY, r.s2nn(alpha=3.0, beta=0.7), lambda m: m.S2NN(3.0, 0.7)),
    *(
        (
            "SquarewaveFourierSeries",
            SPIKINGJELLY,
            r.squarewave_fourier(n=n, period=6.0),
            lambda m, n=n: m.SquarewaveFourierSeries(n, 6.0),
        )
        for n in (2, 3, 5)
    ),
    ("LogTailedReLU", SPIKINGJELLY, r.log_tailed_relu(alpha=0.2), lambda m: m.LogTailedReLU(0.2)),
    ("Rect", SPIKINGJELLY, r.rectangular, lambda m: m.Rect(1.0)),
    ("DeterministicPass", SPIKINGJELLY, r.straight_through, lambda m: m.DeterministicPass()),
    ("superspike", NORSE, r.fast_sigmoid(slope=1.0), lambda m: lambda x: m.superspike_fn(x, 7.0)),
    (
        "heavi_tanh",
        NORSE,
        r.tanh_derivative(slope=3.0),
        lambda m: lambda x: m.heavi_tanh_fn(x, 3.0),
    ),
    (
        "heavi_erfc",
        NORSE,
        fg.compose(r.gaussian(alpha=3.0), r.scale(s=2 / 3.0)),
        lambda m: lambda x: m.heavi_erfc_fn(x, 3.0),
    ),
    ("heavi_circ", NORSE, r.circle(alpha=0.7), lambda m: lambda x: m.heavi_circ_fn(x, 0.7)),
    (
        "triangle",
        NORSE,
        fg.compose(r.triangular, r.scale(s=0.7)),
        lambda m: lambda x: m.triangle_fn(x, 0.7),
    ),
    ("MultiGaussian", SINABS, r.multi_gaussian(h=0.3), lambda m: given(m.MultiGaussian(h=0.3))),
    (
        "PeriodicExponential",
        SINABS,
        r.periodic_exponential(width=0.7),
        lambda m: given(m.PeriodicExponential(0.7)),
    ),
    (
        "SingleExponential",
        SINABS,
        fg.compose(r.piecewise_exponential(alpha=1 / 0.7), r.scale(s=2.0)),
        lambda m: given(m.SingleExponential(0.7)),
    ),
    (
        "Gaussian",
        SINABS,
        r.gaussian(alpha=1 / (0.7 * 2**0.5)),
        lambda m: given(m.Gaussian(sigma=0.7)),
    ),
    *(
        (name, BREVITAS, r.straight_through, lambda m, name=name: getattr(m, name))
        for name in ("round_ste", "ceil_ste", "floor_ste", "binary_sign_ste", "ternary_sign_ste")
    ),
    ("abs_binary_sign_grad", BREVITAS, r.abs_subgradient, lambda m: m.abs_binary_sign_grad),
]

# Their formulas have numbers of single precision: the gradient of a float32 spike, or π
IN_SINGLE_PRECISION = ("sigmoid", "spike_rate_escape", "heavi_erfc", "MultiGaussian", "Gaussian")


def given(slope: Callable[[Tensor, float], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function whose derivative is a slope of sinabs, which is given the potential and the threshold."""

    class Spike(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return (x >= 0).to(x.dtype)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * slope(x + 1.0, 1.0)

    return lambda x: Spike.apply(x)


def library(name: str) -> Any:
    """The module of a library; the test is skipped without it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name.partition('.')[0]} is not installed: {error}")


@pytest.mark.parametrize(
    ("name", "module", "rule", "peer"),
    [pytest.param(*case, id=f"{case[1].partition('.')[0]} {case[0]}") for case in CASES],
)
def test_the_gradient_is_that_of_the_library(name: str, module: str, rule: Any, peer: Peer) -> None:
    function = peer(library(module))
    # neither 0 nor another number at which a formula jumps
    x = torch.linspace(-3, 3, 601, dtype=torch.float64) + 0.0013
    grad = torch.randn(601).double()  # snnTorch's gradients are in single precision
    leaf = x.clone().requires_grad_()
    torch.manual_seed(3)
    (theirs,) = torch.autograd.grad(function(leaf), leaf, grad)
    torch.manual_seed(3)
    ours = grad
    for part in rule.parts:
        ours = part.backward(ours, x=x)
    rounding = 1e-7 if name in IN_SINGLE_PRECISION else 1e-13
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)


# --- attribution: a whole model ---


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).double()


def attributed(model: nn.Module, rule: Any, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(fg.transform(model, {"relu": rule})(x)[:, 1].sum(), x)[0]


@pytest.mark.parametrize(
    ("rule", "peer"), [("guided", "GuidedBackprop"), ("deconvnet", "Deconvolution")]
)
@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_an_attribution_is_captum_s(rule: str, peer: str) -> None:
    model, x = network(), torch.randn(6, 5, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    theirs = getattr(library("captum.attr"), peer)(model).attribute(leaf, target=1)
    assert torch.equal(attributed(model, rule, x), theirs)


@pytest.mark.parametrize(
    ("rule", "peer"),
    [
        ("guided", lambda m: m.GuidedBackprop()),
        ("deconvnet", lambda m: m.DeconvNet()),
        (r.smooth_relu(beta=3.0), lambda m: m.BetaSmooth(beta_smooth=3.0)),
    ],
    ids=["guided", "deconvnet", "smooth_relu"],
)
def test_an_attribution_is_zennit_s(rule: Any, peer: Callable[[Any], Any]) -> None:
    importlib.import_module("_torchvision")  # zennit imports torchvision
    model, x = network(), torch.randn(6, 5, dtype=torch.float64)
    ours = attributed(model, rule, x)
    leaf = x.clone().requires_grad_()
    with peer(library("zennit.composites")).context(model) as changed:
        (theirs,) = torch.autograd.grad(changed(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


# --- parameters: torch's own functions ---


@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_clippings_of_one_tensor_are_torch_s(limit: float) -> None:
    grad = torch.randn(4, 5, dtype=torch.float64)
    for clip, rule in (
        (nn.utils.clip_grad_value_, r.clip_value(max_value=limit)),
        (nn.utils.clip_grad_norm_, r.clip_norm(max_norm=limit)),
    ):
        weight = nn.Parameter(torch.zeros_like(grad))
        weight.grad = grad.clone()
        clip([weight], limit)
        torch.testing.assert_close(rule.backward(grad), weight.grad, rtol=1e-5, atol=0)


def test_decay_is_the_weight_decay_of_sgd() -> None:
    weight = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    grad, before = torch.randn(4, 5, dtype=torch.float64), weight.detach().clone()
    weight.grad = grad
    torch.optim.SGD([weight], lr=1.0, weight_decay=0.3).step()
    torch.testing.assert_close(before - weight, r.decay(rate=0.3).backward(grad, x=before))
