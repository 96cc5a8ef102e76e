"""The rules of other libraries, each with the rule of this package that gives the same gradient.

Where a library disagrees with a rule on purpose, the docstring of the rule says how.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import freegrad_fx as fg

SNNTORCH = "snntorch.surrogate"
SPIKINGJELLY = "spikingjelly.activation_based.surrogate"
NORSE = "norse.torch.functional.threshold"
SINABS = "sinabs.activation"
BREVITAS = "brevitas.function.ops_ste"
BITORCH = "bitorch.quantizations"

Peer = Callable[[Any], Callable[[Tensor], Tensor]]
"""From the module of a library, its function with a gradient of its own."""

r = fg.rules


@dataclass(frozen=True)
class Case:
    """A rule of a library, and ours.

    Attributes:
        name: What the library calls it.
        module: The module that has it.
        rule: Ours: a rule or a composition.
        compare: From the module, our gradient and the library's on the same input and seed.
        rounding: The largest difference that is rounding, relative and absolute.
        note: Why they differ at all.
    """

    name: str
    module: str
    rule: Any
    compare: Callable[[Any], tuple[Tensor, Tensor]]
    rounding: float = 1e-13
    note: str = ""

    @property
    def library(self) -> str:
        """The name of the package."""
        return self.module.partition(".")[0]

    def load(self) -> Any:
        """The module. Raises `ImportError` if the library is not installed."""
        if self.library in ("bitorch", "zennit"):  # which import torchvision
            importlib.import_module("_torchvision")
        return importlib.import_module(self.module)


def on_a_line(function: Any, rule: Any) -> tuple[Tensor, Tensor]:
    """The gradients of a spike or a quantizer, at points at which no formula jumps."""
    x = torch.linspace(-3, 3, 601, dtype=torch.float64) + 0.0013
    # snnTorch's gradients are in single precision
    grad = torch.randn(601, generator=torch.Generator().manual_seed(2)).double()
    leaf = x.clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        (theirs,) = torch.autograd.grad(function(leaf), leaf, grad)
        torch.manual_seed(3)
        ours = grad
        for part in rule.parts:
            ours = part.backward(ours, x=x)
    return ours, theirs


# Numbers besides the defaults, so that no parameter is ignored
_SPIKES: list[tuple[str, str, Any, Peer]] = [
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
    ("Sign", BITORCH, r.straight_through, lambda m: m.Sign()),
    ("SteHeaviside", BITORCH, r.clipped_straight_through, lambda m: m.SteHeaviside()),
    ("ApproxSign", BITORCH, r.approx_sign, lambda m: m.ApproxSign()),
    ("SwishSign", BITORCH, r.swish_sign(beta=3.0), lambda m: m.SwishSign(beta=3.0)),
    ("InputDoReFa", BITORCH, r.straight_through, lambda m: m.InputDoReFa(bits=2)),
]

# Their formulas have numbers of single precision: the gradient of a float32 spike, or π
_IN_SINGLE_PRECISION = ("sigmoid", "spike_rate_escape", "heavi_erfc", "MultiGaussian", "Gaussian")


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


def _of_a_spike(name: str, module: str, rule: Any, peer: Peer) -> Case:
    single = name in _IN_SINGLE_PRECISION
    return Case(
        name,
        module,
        rule,
        lambda m: on_a_line(peer(m), rule),
        rounding=1e-7 if single else 1e-13,
        note="the library computes in single precision" if single else "",
    )


# --- FreeGrad: functions of the gradient and the input ---


def _of_freegrad(name: str, **values: float) -> Case:
    rule = fg.get(name)(**values)

    def compare(module: Any) -> tuple[Tensor, Tensor]:
        grad, x = torch.randn(2, 6, 20, 5, generator=torch.Generator().manual_seed(2))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            theirs = module.get(name)(None, grad, x, **values)
            torch.manual_seed(5)
            return rule.backward(grad, x=x), theirs

    return Case(name, "freegrad", rule, compare)


_FREEGRAD = (
    _of_freegrad("d(ReLU)"),
    _of_freegrad("d(Linear)"),
    _of_freegrad("rectangular", a=-0.7, b=0.3),
    _of_freegrad("triangular", width=0.7),
    _of_freegrad("scale", s=0.7),
    _of_freegrad("clip_norm", max_norm=0.7),
    _of_freegrad("noise", sigma=0.7),
    _of_freegrad("centralize", dim=-1),
    _of_freegrad("full_jam"),
    _of_freegrad("positive_jam"),
    _of_freegrad("rectangular_jam", a=-0.7, b=0.3),
)


# --- attribution: a whole model ---


def network() -> nn.Sequential:
    """A network in double precision, the same at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = (nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        return nn.Sequential(*layers).double()


def _attributed(rule: Any, theirs: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    model = network()
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaf = x.clone().requires_grad_()
    score = fg.transform(model, {"relu": rule})(leaf)[:, 1].sum()
    return torch.autograd.grad(score, leaf)[0], theirs(model, x.clone().requires_grad_())


def _of_captum(name: str, rule: Any) -> Case:
    def compare(module: Any) -> tuple[Tensor, Tensor]:
        return _attributed(rule, lambda m, x: getattr(module, name)(m).attribute(x, target=1))

    return Case(name, "captum.attr", rule, compare)


def _of_zennit(name: str, rule: Any, **values: float) -> Case:
    def compare(module: Any) -> tuple[Tensor, Tensor]:
        def theirs(model: nn.Module, x: Tensor) -> Tensor:
            with getattr(module, name)(**values).context(model) as changed:
                return torch.autograd.grad(changed(x)[:, 1].sum(), x)[0]

        return _attributed(rule, theirs)

    return Case(name, "zennit.composites", rule, compare)


_ATTRIBUTIONS = (
    _of_captum("GuidedBackprop", r.guided),
    _of_captum("Deconvolution", r.deconvnet),
    _of_zennit("GuidedBackprop", r.guided),
    _of_zennit("DeconvNet", r.deconvnet),
    _of_zennit("BetaSmooth", r.smooth_relu(beta=3.0), beta_smooth=3.0),
)


def cases() -> Iterator[Case]:
    """All cases, library by library."""
    yield from _FREEGRAD
    for spike in _SPIKES:
        yield _of_a_spike(*spike)
    yield from _ATTRIBUTIONS
