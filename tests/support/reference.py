"""The expected values: a naive formula for every built-in rule, and the plainest decoupled operation.

Nothing here comes from the package. A formula is Python arithmetic in double precision, and its signature states what
the tests check: what the rule reads (`g`, then any of `x`, `y` and `draw`), its parameters, and their defaults.

This is the only place in the tests to edit for a new rule. Add one function:

    @entry("my_rule")
    def my_rule(g: float, x: float, *, slope: float = 1.0) -> float:
        return g * slope * x
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

__all__ = [
    "DRAWS",
    "ENTRYWISE",
    "EXACT",
    "RANDOM",
    "WHOLE_TENSOR",
    "defaults_of",
    "entry",
    "entrywise",
    "expected_of",
    "inputs_of",
    "of",
    "oracle",
    "whole_tensor",
]

Forward: TypeAlias = Callable[[Tensor], Tensor]
Backward: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
_F = TypeVar("_F", bound=Callable[..., Any])

ENTRYWISE: dict[str, Callable[..., float]] = {}
"""Formulas of one entry of the gradient, from the entries at the same place."""

WHOLE_TENSOR: dict[str, Callable[..., Tensor]] = {}
"""Formulas of the whole gradient."""

RANDOM: set[str] = set()
"""The rules that draw random numbers, `draw` in their formulas."""

EXACT: set[str] = set()
"""The rules that round at most once, so that the gradient is the formula's bit for bit."""

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {}
"""The random numbers of a rule, from a tensor of their shape and dtype."""


def entry(
    name: str, *, exact: bool = False, draw: Callable[[Tensor], Tensor] | None = None
) -> Callable[[_F], _F]:
    """Declare the formula of a rule that computes each entry from the entries at the same place.

    Args:
        name: The name of the rule.
        exact: Whether the rule rounds at most once. The gradient is then compared bit for bit.
        draw: For a random rule, the function that its `draw` comes from.
    """

    def declare(formula: _F) -> _F:
        ENTRYWISE[name] = formula
        EXACT.update([name] if exact else [])
        _draws(name, draw)
        return formula

    return declare


def whole_tensor(
    name: str, *, draw: Callable[[Tensor], Tensor] | None = None
) -> Callable[[_F], _F]:
    """Declare the formula of a rule that reads the whole gradient, and returns a tensor in double precision.

    Args:
        name: The name of the rule.
        draw: For a random rule, the function that its `draw` comes from.
    """

    def declare(formula: _F) -> _F:
        WHOLE_TENSOR[name] = formula
        _draws(name, draw)
        return formula

    return declare


def _draws(name: str, draw: Callable[[Tensor], Tensor] | None) -> None:
    if draw is not None:
        RANDOM.add(name)
        DRAWS[name] = draw


def in_single_precision(grad: Tensor) -> Tensor:
    """Numbers of U(0, 1) in at least single precision."""
    return torch.rand_like(grad, dtype=torch.promote_types(grad.dtype, torch.float32))


def of(name: str) -> Callable[..., Any]:
    """The formula of a rule."""
    for formulas in (ENTRYWISE, WHOLE_TENSOR):
        if name in formulas:
            return formulas[name]
    raise LookupError(
        f"the tests have no expected values for rule {name!r}. Add its naive formula to tests/support/reference.py, "
        f"decorated with @entry({name!r}) or @whole_tensor({name!r}). No other file of the tests has to change."
    )


def inputs_of(name: str) -> tuple[str, ...]:
    """Which of x and y a rule reads."""
    return tuple(n for n in inspect.signature(of(name)).parameters if n in ("x", "y"))


def defaults_of(name: str) -> dict[str, Any]:
    """The parameters of a rule, with their defaults."""
    parameters = inspect.signature(of(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def entrywise(
    formula: Callable[..., float],
    grad: Tensor,
    x: Tensor | None = None,
    y: Tensor | None = None,
    draw: Tensor | None = None,
    **parameters: Any,
) -> Tensor:
    """Apply a formula to each entry of `grad` and to the entries at the same place of what else it reads."""
    given = {"x": x, "y": y, "draw": draw}
    read = [given[n] for n in inspect.signature(formula).parameters if n in given]
    entries = [t.reshape(-1).double().tolist() for t in (grad, *read)]
    values = [formula(*numbers, **parameters) for numbers in zip(*entries, strict=True)]
    return torch.tensor(values, dtype=torch.float64).reshape(grad.shape).to(grad.dtype)


def expected_of(
    name: str, grad: Tensor, draw: Tensor | None = None, **read_and_values: Any
) -> Tensor:
    """The gradient of a rule of either kind, in the dtype of `grad`."""
    given = {} if draw is None else {"draw": draw}
    if name in ENTRYWISE:
        return entrywise(of(name), grad, **given, **read_and_values)
    result: Tensor = of(name)(grad, **given, **read_and_values)
    return result.to(grad.dtype)


# --- one entry of the gradient ---
# g·1[...] is 0 where the condition does not hold, also for an infinite g, as in PyTorch's derivative of relu.


@entry("d(ReLU)", exact=True)
def d_relu(g: float, x: float) -> float:
    return g if x > 0 else 0.0


@entry("d(Linear)", exact=True)
def d_linear(g: float) -> float:
    return g


@entry("rectangular", exact=True)
def rectangular(g: float, x: float, *, a: float = -0.5, b: float = 0.5) -> float:
    return g if a <= x <= b else 0.0


@entry("triangular")
def triangular(g: float, x: float, *, width: float = 1.0) -> float:
    slope = 1 - abs(x) / (1e-6 if width < 1e-6 else width)
    return g * (0.0 if slope < 0 else slope)


@entry("half", exact=True)
def half(g: float) -> float:
    return g / 2


@entry("scale", exact=True)
def scale(g: float, *, s: float = 1.0) -> float:
    return s * g


@entry("reverse", exact=True)
def reverse(g: float, *, alpha: float = 1.0) -> float:
    return -alpha * g


@entry("clip_value", exact=True)
def clip_value(g: float, *, max_value: float = 1.0) -> float:
    if g > max_value:
        return max_value
    return -max_value if g < -max_value else g


@entry("straight_through", exact=True)
def straight_through(g: float) -> float:
    return g


@entry("clipped_straight_through", exact=True)
def clipped_straight_through(g: float, x: float, *, bound: float = 1.0) -> float:
    return g if abs(x) <= bound else 0.0


@entry("fast_sigmoid")
def fast_sigmoid(g: float, x: float, *, slope: float = 25.0) -> float:
    d = 1 + slope * abs(x)
    return g / (d * d)


def _levels(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


@entry("lsq")
def lsq(
    g: float,
    x: float,
    *,
    step: float = 0.1,
    bits: int = 4,
    signed: bool = True,
    per_sample: bool = False,
) -> float:
    low, high = _levels(bits, signed)
    return g if low <= x / step <= high else 0.0


@entry("lsq_plus")
def lsq_plus(
    g: float,
    x: float,
    *,
    step: float = 0.1,
    offset: float = 0.0,
    bits: int = 4,
    signed: bool = False,
    per_sample: bool = False,
) -> float:
    low, high = _levels(bits, signed)
    return g if low <= (x - offset) / step <= high else 0.0


@entry("pact")
def pact(g: float, x: float, *, bound: float = 10.0) -> float:
    return g if 0 <= x < bound else 0.0


@entry("jump_relu")
def jump_relu(g: float, x: float, *, threshold: float = 0.0, bandwidth: float = 0.001) -> float:
    return g if x > threshold else 0.0


@entry("arctan")
def arctan(g: float, x: float, *, alpha: float = 2.0) -> float:
    z = math.pi * alpha * x / 2
    return g * ((alpha / 2) / (1 + z * z))


@entry("guided", exact=True)
def guided(g: float, x: float) -> float:
    return (0.0 if g < 0 else g) if x > 0 else 0.0


@entry("deconvnet", exact=True)
def deconvnet(g: float) -> float:
    return 0.0 if g < 0 else g


@entry("redirected", exact=True)
def redirected(g: float, x: float, *, leak: float = 0.1) -> float:
    return g if x >= 0 else leak * g


@entry("exact_relu", exact=True)
def exact_relu(g: float, x: float) -> float:
    return 0.0 if x <= 0 else g


@entry("exact_leaky_relu", exact=True)
def exact_leaky_relu(g: float, x: float, *, slope: float = 0.01) -> float:
    return g if x > 0 else g * slope


@entry("exact_silu")
def exact_silu(g: float, x: float) -> float:
    return g * logistic(x) * (1 + x * logistic(-x))


@entry("smooth_relu")
def smooth_relu(g: float, x: float, *, beta: float = 10.0) -> float:
    return g * logistic(beta * x)


@entry("identity_rule")
def identity_rule(g: float, x: float, y: float, *, at_zero: float = 0.5) -> float:
    return g * at_zero if x == 0 else g * (y / x)


@entry("decay")
def decay(g: float, x: float, *, rate: float = 0.01) -> float:
    return g + rate * x


@entry("nan_to_zero", exact=True)
def nan_to_zero(g: float) -> float:
    return g if math.isfinite(g) else 0.0


@entry("stop", exact=True)
def stop(g: float) -> float:
    return 0.0


@entry("sign_gradient", exact=True)
def sign_gradient(g: float) -> float:
    return g if math.isnan(g) else float((g > 0) - (g < 0))


# --- surrogates: g times a function of x ---


def logistic(z: float) -> float:
    return (1 + math.tanh(z / 2)) / 2


def logistic_slope(z: float) -> float:
    return (1 - math.tanh(z / 2) ** 2) / 4


@entry("softsign")
def softsign(g: float, x: float, *, alpha: float = 2.0) -> float:
    return g * (alpha / 2 / (1 + alpha * abs(x)) ** 2)


@entry("superspike")
def superspike(g: float, x: float, *, alpha: float = 1.0) -> float:
    return g * (alpha / (1 + abs(x)) ** 2)


@entry("sigmoid_derivative")
def sigmoid_derivative(g: float, x: float, *, slope: float = 4.0) -> float:
    return g * (slope * logistic_slope(slope * x))


@entry("piecewise_quadratic")
def piecewise_quadratic(g: float, x: float, *, alpha: float = 1.0) -> float:
    height = 1 - alpha * abs(x)
    return g * (alpha * (0.0 if height < 0 else height))


@entry("piecewise_exponential")
def piecewise_exponential(g: float, x: float, *, alpha: float = 1.0) -> float:
    return g * (alpha / 2 * math.exp(-alpha * abs(x)))


@entry("spike_rate_escape")
def spike_rate_escape(g: float, x: float, *, beta: float = 1.0, slope: float = 25.0) -> float:
    return g * (slope * math.exp(-beta * abs(x - 1)))


@entry("gaussian")
def gaussian(g: float, x: float, *, alpha: float = 2.0) -> float:
    return g * (alpha / math.sqrt(math.pi) * math.exp(-alpha * alpha * x * x))


@entry("tanh_derivative")
def tanh_derivative(g: float, x: float, *, slope: float = 1.0) -> float:
    return g * (1 - math.tanh(slope * x) ** 2)


def density(x: float, mean: float, deviation: float) -> float:
    z = (x - mean) / deviation
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi * deviation * deviation)


@entry("multi_gaussian")
def multi_gaussian(
    g: float, x: float, *, sigma: float = 0.5, h: float = 0.15, s: float = 6.0
) -> float:
    peak = (1 + h) * density(x, 0.0, sigma)
    return g * (peak - h * density(x, sigma, s * sigma) - h * density(x, -sigma, s * sigma))


@entry("sparse_fast_sigmoid")
def sparse_fast_sigmoid(g: float, x: float, *, slope: float = 25.0, bound: float = 1.0) -> float:
    return g * (1 / (1 + slope * abs(x)) ** 2 if x > bound else 0.0)


@entry("leaky_relu_derivative", exact=True)
def leaky_relu_derivative(g: float, x: float, *, leak: float = 0.0, slope: float = 1.0) -> float:
    return slope * g if x >= 0 else leak * g


@entry("piecewise_leaky")
def piecewise_leaky(g: float, x: float, *, width: float = 1.0, leak: float = 0.01) -> float:
    return g / (2 * width) if abs(x) < width else leak * g


@entry("log_abs")
def log_abs(g: float, x: float, *, alpha: float = 1.0) -> float:
    return g * (1 / (1 / alpha + abs(x)))


@entry("q_pseudo_spike")
def q_pseudo_spike(g: float, x: float, *, alpha: float = 2.0) -> float:
    return g * (1 + 2 * abs(x) / (alpha - 1)) ** -alpha


@entry("s2nn")
def s2nn(g: float, x: float, *, alpha: float = 4.0, beta: float = 1.0) -> float:
    return g * (alpha * logistic_slope(alpha * x) if x < 0 else beta / (x + 1))


@entry("squarewave_fourier")
def squarewave_fourier(g: float, x: float, *, n: int = 2, period: float = 8.0) -> float:
    if n > 1 and math.isinf(x):
        return math.nan
    turns = [math.remainder((2 * i - 1) * x, period) / period for i in range(1, n)]
    return g * (4 / period * sum(math.cos(2 * math.pi * t) for t in turns))


@entry("log_tailed_relu")
def log_tailed_relu(g: float, x: float, *, alpha: float = 0.0) -> float:
    if x < 0:
        return g * alpha
    return g * (1.0 if x <= 1 else 1 / x)


@entry("circle")
def circle(g: float, x: float, *, alpha: float = 1.0) -> float:
    return g * (alpha**3 / (x * x + alpha * alpha) ** 1.5)


@entry("periodic_exponential")
def periodic_exponential(g: float, x: float, *, width: float = 0.5, period: float = 1.0) -> float:
    if x < 0:
        return g * math.exp(x / width)
    if x == math.inf:
        return math.nan
    return g * math.exp(-2 * min(x % period, period - x % period) / width)


# --- straight through ---


@entry("approx_sign")
def approx_sign(g: float, x: float) -> float:
    return g * (0.0 if abs(x) > 1 else 2 - 2 * abs(x))


@entry("swish_sign")
def swish_sign(g: float, x: float, *, beta: float = 5.0) -> float:
    z = beta * x
    if abs(z) > 700:
        return g * 0.0
    return g * (beta * (2 - z * math.tanh(z / 2)) / (1 + math.cosh(z)))


@entry("error_decay")
def error_decay(g: float, x: float, *, t: float = 10.0, k: float = 1.0) -> float:
    # 1 − tanh² loses all digits for large t·x
    return g * (k * t / math.cosh(min(abs(t * x), 350.0)) ** 2)


@entry("dorefa_activation", exact=True)
def dorefa_activation(g: float, x: float) -> float:
    return g if 0 <= x <= 1 else 0.0


@entry("abs_subgradient", exact=True)
def abs_subgradient(g: float, x: float) -> float:
    return g if x >= 0 else -g


@entry("reste")
def reste(
    g: float, x: float, *, power: float = 3.0, bound: float = 1.5, margin: float = 0.1
) -> float:
    if not abs(x) <= bound:
        return g * 0.0
    if abs(x) <= margin:
        return g * (margin ** (1 / power) / margin)
    return g * (abs(x) ** (1 / power - 1) / power)


@entry("dsq")
def dsq(
    g: float,
    x: float,
    *,
    bits: int = 2,
    low: float = -1.0,
    high: float = 1.0,
    alpha: float = 0.2,
) -> float:
    if not low <= x <= high:
        return g * 0.0
    step = (high - low) / (2**bits - 1)
    middle = low + (math.floor((x - low) / step) + 0.5) * step
    k = math.log(2 / alpha - 1) / step
    return g * (step / 2 / (1 - alpha) * k * (1 - math.tanh(k * (x - middle)) ** 2))


@entry("n2uq")
def n2uq(
    g: float,
    x: float,
    *,
    start: float = 0.0,
    widths: tuple[float, ...] = (1.0, 1.0, 1.0),
    step: float = 1.0,
) -> float:
    for width in (max(w, 1e-3) for w in widths):
        if start <= x < start + width:
            return g * (step / width)
        start += width
    return g * 0.0


# --- one entry of the gradient, with a random number ---


@entry("noise", draw=torch.randn_like)
def noise(g: float, draw: float, *, sigma: float = 0.1, generator: None = None) -> float:
    return g + sigma * draw


@entry("full_jam", exact=True, draw=torch.rand_like)
def full_jam(g: float, draw: float, *, generator: None = None) -> float:
    return g * draw


@entry("positive_jam", exact=True, draw=torch.rand_like)
def positive_jam(g: float, x: float, draw: float, *, generator: None = None) -> float:
    return g * draw if x >= 0 else 0.0


@entry("rectangular_jam", exact=True, draw=torch.rand_like)
def rectangular_jam(
    g: float, x: float, draw: float, *, a: float = -5.0, b: float = 5.0, generator: None = None
) -> float:
    return g * draw if a <= x <= b else 0.0


@entry("dropout_gradient", draw=in_single_precision)
def dropout_gradient(g: float, draw: float, *, p: float = 0.5, generator: None = None) -> float:
    return g / (1 - p) if draw >= p else 0.0


@entry("stochastic_spike", draw=torch.rand_like)
def stochastic_spike(
    g: float,
    x: float,
    draw: float,
    *,
    mean: float = 0.0,
    variance: float = 0.2,
    generator: None = None,
) -> float:
    return g if x > 0 else g * ((draw - 0.5 + mean) * variance)


# --- the whole gradient ---


def by_group(
    compute: Callable[..., list[float]], dims: tuple[int, ...], grad: Tensor, *others: Tensor
) -> Tensor:
    """Apply a function of lists to the entries that differ only in `dims`, for every choice of the other indices."""
    result = grad.double().clone()
    kept = [[slice(None)] if d in dims else range(n) for d, n in enumerate(grad.shape)]
    for index in itertools.product(*kept):
        groups = [t[index].reshape(-1).double().tolist() for t in (grad, *others)]
        if groups[0]:
            values = torch.tensor(compute(*groups), dtype=torch.float64)
            result[index] = values.reshape(result[index].shape)
    return result


def channel(tensor: Tensor) -> tuple[int, ...]:
    """The dims of an output channel: all but the first; all if there are fewer than two."""
    return tuple(range(1, tensor.dim())) if tensor.dim() > 1 else tuple(range(tensor.dim()))


def along(tensor: Tensor, dim: int) -> tuple[int, ...]:
    return (dim % tensor.dim(),) if tensor.dim() else ()


def everything(tensor: Tensor) -> tuple[int, ...]:
    return tuple(range(tensor.dim()))


def length(entries: list[float]) -> float:
    return math.sqrt(sum(v * v for v in entries))


def shortened(entries: list[float], size: float, limit: float) -> list[float]:
    return [v * (limit / size) if size > limit else v for v in entries]


@whole_tensor("block_rms")
def block_rms(grad: Tensor, *, target: float = 1.0) -> Tensor:
    def compute(g: list[float]) -> list[float]:
        return shortened(g, length(g) / math.sqrt(len(g)), target)

    return by_group(compute, everything(grad), grad)


@whole_tensor("per_sample_clip_norm")
def per_sample_clip_norm(grad: Tensor, *, max_norm: float = 1.0) -> Tensor:
    def compute(g: list[float]) -> list[float]:
        return shortened(g, length(g), max_norm)

    return by_group(compute, tuple(range(1, grad.dim())), grad)


@whole_tensor("adaptive_clip")
def adaptive_clip(grad: Tensor, x: Tensor, *, clipping: float = 0.01, eps: float = 1e-3) -> Tensor:
    def compute(g: list[float], w: list[float]) -> list[float]:
        size = length(w)
        return shortened(g, length(g), clipping * (eps if size < eps else size))

    return by_group(compute, channel(grad), grad, x)


@whole_tensor("normalize")
def normalize(grad: Tensor, *, eps: float = 1e-6) -> Tensor:
    def compute(g: list[float]) -> list[float]:
        return [v * (1 / (length(g) + eps)) for v in g]

    return by_group(compute, everything(grad), grad)


@whole_tensor("trust_ratio")
def trust_ratio(grad: Tensor, x: Tensor) -> Tensor:
    def compute(g: list[float], w: list[float]) -> list[float]:
        known = length(w) > 0 and length(g) > 0
        return [v * (length(w) / length(g)) for v in g] if known else g

    return by_group(compute, everything(grad), grad, x)


@whole_tensor("magnitude_aware_sign")
def magnitude_aware_sign(grad: Tensor, x: Tensor) -> Tensor:
    def compute(g: list[float], w: list[float]) -> list[float]:
        mean = sum(map(abs, w)) / len(w)
        return [v * (mean if abs(u) <= 1 else 0.0) for v, u in zip(g, w, strict=True)]

    return by_group(compute, channel(grad), grad, x)


def sign(value: float) -> float:
    return float((value > 0) - (value < 0))


@whole_tensor("xnor_weight")
def xnor_weight(grad: Tensor, x: Tensor) -> Tensor:
    def compute(g: list[float], w: list[float]) -> list[float]:
        n = len(w)
        scale, s = sum(map(abs, w)) / n, x.shape[1] if x.dim() > 1 else n
        through = sum(sign(u) * v for v, u in zip(g, w, strict=True)) / n
        return [
            n * (1 - 1 / s) * ((scale * v if abs(u) <= 1 else 0.0) + sign(u) * through)
            for v, u in zip(g, w, strict=True)
        ]

    return by_group(compute, channel(grad), grad, x)


@whole_tensor("dorefa_weight")
def dorefa_weight(grad: Tensor, x: Tensor) -> Tensor:
    def compute(g: list[float], w: list[float]) -> list[float]:
        # entries of the largest magnitude share a gradient, and more of them round to 1 in single precision
        wide = torch.promote_types(x.dtype, torch.float32)
        t = torch.tensor([math.tanh(u) for u in w], dtype=torch.float64).to(wide).double().tolist()
        m = math.nan if any(map(math.isnan, t)) else max(map(abs, t)) or 1.0
        ends = sum(abs(u) == m for u in t)
        total = sum(v * u for v, u in zip(g, t, strict=True))
        return [
            (1 - u * u) * (v - (sign(u) * total / (m * ends) if abs(u) == m else 0.0)) / m
            for v, u in zip(g, t, strict=True)
        ]

    return by_group(compute, tuple(range(grad.dim())), grad, x)


def through_softmax(p: list[float], g: list[float]) -> list[float]:
    """The derivative of a softmax with the result p, times g."""
    mean = sum(a * b for a, b in zip(p, g, strict=True))
    return [a * (b - mean) for a, b in zip(p, g, strict=True)]


def softmax(x: list[float]) -> list[float]:
    largest = max(x)
    sizes = [math.exp(v - largest) for v in x]
    return [s / sum(sizes) for s in sizes]


@whole_tensor("reinmax")
def reinmax(grad: Tensor, x: Tensor, y: Tensor, *, tau: float = 1.0, dim: int = -1) -> Tensor:
    def compute(g: list[float], v: list[float], d: list[float]) -> list[float]:
        middle = [(a + b) / 2 for a, b in zip(softmax([u / tau for u in v]), d, strict=True)]
        first, second = through_softmax(middle, g), through_softmax(softmax(v), g)
        return [2 * a - b / 2 for a, b in zip(first, second, strict=True)]

    return by_group(compute, along(grad, dim), grad, x, y)


@whole_tensor("gumbel_straight_through", draw=in_single_precision)
def gumbel_straight_through(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    draw: Tensor,
    *,
    tau: float = 1.0,
    samples: int = 1,
    dim: int = -1,
    generator: None = None,
) -> Tensor:
    def compute(g: list[float], v: list[float], d: list[float], u: list[float]) -> list[float]:
        largest = max(d, key=lambda a: (math.isnan(a), a))
        chosen, p = next(i for i, a in enumerate(d) if a is largest), softmax(v)
        e = [-math.log(max(a, 1e-38)) for a in u]
        # a probability of 0 never reaches the maximum
        noisy = [
            -math.log(b / a + e[chosen]) if a else -math.inf for a, b in zip(p, e, strict=True)
        ]
        noisy[chosen] = -math.log(e[chosen])
        return [a / tau for a in through_softmax(softmax([t / tau for t in noisy]), g)]

    assert samples == 1
    return by_group(compute, along(grad, dim), grad, x, y, draw)


@whole_tensor("rotation_trick")
def rotation_trick(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """With the matrix of the rotation."""

    def compute(g: list[float], e: list[float], q: list[float]) -> list[float]:
        sizes = [math.hypot(*e), math.hypot(*q)]
        if sizes[0] == 0:
            return g
        u = [a / sizes[0] for a in e]
        v = [a / sizes[1] if sizes[1] else 0.0 for a in q]
        both = [a + b for a, b in zip(u, v, strict=True)]
        size = math.hypot(*both) or 1.0
        w, n = [a / size for a in both], range(len(e))
        matrix = [[(i == j) - 2 * w[i] * w[j] + 2 * v[i] * u[j] for j in n] for i in n]
        return [sizes[1] / sizes[0] * sum(matrix[i][j] * g[i] for i in n) for j in n]

    return by_group(compute, (grad.dim() - 1,), grad, x, y)


@whole_tensor("top_k")
def top_k(grad: Tensor, *, fraction: float = 0.1) -> Tensor:
    def compute(g: list[float]) -> list[float]:
        count = max(1, math.ceil(fraction * len(g) - 0.5))
        sizes = [math.inf if math.isnan(v) else abs(v) for v in g]
        order = sorted(range(len(g)), key=lambda i: (not math.isnan(g[i]), -sizes[i], i))
        return [v if i in order[:count] else 0.0 for i, v in enumerate(g)]

    return by_group(compute, (grad.dim() - 1,), grad)


@whole_tensor("quantize_int8")
def quantize_int8(grad: Tensor) -> Tensor:
    def compute(g: list[float]) -> list[float]:
        largest = math.nan if any(map(math.isnan, g)) else max(map(abs, g))
        if largest == 0:
            return g
        if not math.isfinite(largest):
            return [math.nan] * len(g)
        return [round(127 * (v / largest)) * (largest / 127) for v in g]

    return by_group(compute, (grad.dim() - 1,), grad)


@whole_tensor("stochastic_sign", draw=in_single_precision)
def stochastic_sign(grad: Tensor, draw: Tensor, *, generator: None = None) -> Tensor:
    def compute(g: list[float], u: list[float]) -> list[float]:
        largest = max(map(abs, g))
        return [
            (2 * (d < (1 + v / largest) / 2) - 1.0) if largest else 0.0
            for v, d in zip(g, u, strict=True)
        ]

    return by_group(compute, everything(grad), grad, draw)


@whole_tensor("stochastic_round", draw=in_single_precision)
def stochastic_round(
    grad: Tensor, draw: Tensor, *, bits: int = 8, generator: None = None
) -> Tensor:
    def compute(g: list[float], u: list[float]) -> list[float]:
        largest, n = max(map(abs, g)), 2**bits - 1
        if largest == 0:
            return g
        levels = [math.floor(n * (v / (2 * largest) + 0.5) + d) for v, d in zip(g, u, strict=True)]
        return [2 * largest * (min(level, n) / n - 0.5) for level in levels]

    return by_group(compute, channel(grad), grad, draw)


@whole_tensor("clip_norm")
def clip_norm(grad: Tensor, *, max_norm: float = 1.0, eps: float = 1e-12) -> Tensor:
    entries = grad.reshape(-1).double().tolist()
    norm = math.sqrt(sum(g * g for g in entries))
    factor = max_norm / (eps if norm < eps else norm) if max_norm < math.inf else 1.0
    factor = 1.0 if factor > 1 else factor
    return torch.tensor([g * factor for g in entries], dtype=torch.float64).reshape(grad.shape)


@whole_tensor("centralize")
def centralize(grad: Tensor, *, dim: int | tuple[int, ...] = -1) -> Tensor:
    if grad.dim() == 0:
        return grad.double() - grad.double()
    dims = {d % grad.dim() for d in (dim if isinstance(dim, tuple) else (dim,))}
    result = grad.double().clone()
    # one slice for every choice of the indices that are kept
    kept = [[slice(None)] if d in dims else range(n) for d, n in enumerate(grad.shape)]
    for index in itertools.product(*kept):
        entries = result[index].reshape(-1).tolist()
        if entries:
            result[index] -= sum(entries) / len(entries)
    return result


# --- the plainest decoupled operation ---


class Decoupled(torch.autograd.Function):
    """One class for all oracles: a transform looks at every class of Functions that is alive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Forward, rule: Backward) -> Tensor:
        y = forward(x.clone())  # it may write into its argument
        ctx.save_for_backward(x, y)
        ctx.rule = rule
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, y = ctx.saved_tensors
        return ctx.rule(grad, x, y), None, None


def oracle(forward: Forward, rule: Backward) -> Forward:
    """The operation with `forward` as its forward and ``rule(grad, x, y)`` as its backward, written by hand."""
    return lambda x: Decoupled.apply(x, forward, rule)


# --- few bits ---

_GELU = {
    1: ((0.0,), (0.0, 1.0)),
    3: (
        (-2.415516, -0.710125, -0.325949, 0.0, 0.325949, 0.710125, 2.415516),
        (-0.000194, -0.088314, 0.125616, 0.372231, 0.627769, 0.874384, 1.088314, 1.000194),
    ),
}


def _step(x: float, borders: tuple[float, ...], levels: tuple[float, ...]) -> float:
    return levels[sum(not x <= border for border in borders)]


@entry("few_bit")
def few_bit(
    g: float,
    x: float,
    *,
    bits: int = 3,
    borders: tuple[float, ...] = (),
    levels: tuple[float, ...] = (),
) -> float:
    return g * _step(x, *((borders, levels) if levels else _GELU[bits]))


@entry("regelu2")
def regelu2(g: float, x: float) -> float:
    a, b, c = -0.04922261145617846, 1.0979632065417297, -0.048740595085551286
    borders = (-3.1858810036855245, -0.001178821281161997, 3.190832613414926)
    return g * _step(x, borders, (0.0, a, a + b, a + b + c))


@entry("resilu2")
def resilu2(g: float, x: float) -> float:
    a, b, c = -0.04060357190528599, 1.080925428529668, -0.040321856624382146
    borders = (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708)
    return g * _step(x, borders, (0.0, a, a + b, a + b + c))
