"""The naive oracles: every rule once more, as its formula in the catalogue, and the plainest decoupled operation.

Nothing here comes from the product. A formula is Python arithmetic on one entry of each tensor, in double precision;
a rule that looks at the whole tensor is a few lines over lists. The defaults are stated anew, so that a changed
default fails a test.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["ENTRYWISE", "JAMS", "WHOLE_TENSOR", "entrywise", "oracle"]


# --- one entry of the gradient, from one entry of the gradient and of the input ---
# g·1[...] is 0 outside, also for an infinite g: nothing passes, as in PyTorch's own derivative of relu.


def d_relu(g: float, x: float) -> float:
    return g if x > 0 else 0.0


def d_linear(g: float, x: float) -> float:
    return g


def rectangular(g: float, x: float, *, a: float = -0.5, b: float = 0.5) -> float:
    return g if a <= x <= b else 0.0


def triangular(g: float, x: float, *, width: float = 1.0) -> float:
    slope = 1 - abs(x) / width
    return g * (0.0 if slope < 0 else slope)


def scale(g: float, x: float, *, s: float = 1.0) -> float:
    return s * g


def reverse(g: float, x: float, *, alpha: float = 1.0) -> float:
    return -alpha * g


def clip_value(g: float, x: float, *, max_value: float = 1.0) -> float:
    if g > max_value:
        return max_value
    return -max_value if g < -max_value else g


def straight_through(g: float, x: float) -> float:
    return g


def clipped_straight_through(g: float, x: float, *, bound: float = 1.0) -> float:
    return g if abs(x) <= bound else 0.0


def fast_sigmoid(g: float, x: float, *, slope: float = 25.0) -> float:
    d = 1 + slope * abs(x)
    return g / (d * d)


def arctan(g: float, x: float, *, alpha: float = 2.0) -> float:
    z = math.pi * alpha * x / 2
    return g * ((alpha / 2) / (1 + z * z))


def guided(g: float, x: float) -> float:
    return (0.0 if g < 0 else g) if x > 0 else 0.0


ENTRYWISE: dict[str, Callable[..., float]] = {
    "d(ReLU)": d_relu,
    "d(Linear)": d_linear,
    "rectangular": rectangular,
    "triangular": triangular,
    "scale": scale,
    "reverse": reverse,
    "clip_value": clip_value,
    "straight_through": straight_through,
    "clipped_straight_through": clipped_straight_through,
    "fast_sigmoid": fast_sigmoid,
    "arctan": arctan,
    "guided": guided,
}


def entrywise(formula: Callable[..., float], grad: Tensor, x: Tensor, **parameters: Any) -> Tensor:
    """Apply a formula to each entry of `grad` and the entry of `x` at the same place."""
    entries = zip(grad.reshape(-1).double().tolist(), x.reshape(-1).double().tolist(), strict=True)
    values = [formula(g, e, **parameters) for g, e in entries]
    return torch.tensor(values, dtype=torch.float64).reshape(grad.shape).to(grad.dtype)


# --- rules that look at the whole gradient ---


def clip_norm(grad: Tensor, *, max_norm: float = 1.0, eps: float = 1e-12) -> Tensor:
    entries = grad.reshape(-1).double().tolist()
    norm = math.sqrt(sum(g * g for g in entries))
    factor = max_norm / (eps if norm < eps else norm)
    factor = 1.0 if factor > 1 else factor
    return torch.tensor([g * factor for g in entries], dtype=torch.float64).reshape(grad.shape)


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


WHOLE_TENSOR: dict[str, Callable[..., Tensor]] = {"clip_norm": clip_norm, "centralize": centralize}


# --- random rules: the interval in which an entry has to be ---


def full_jam(g: float, x: float) -> float:
    return g


def positive_jam(g: float, x: float) -> float:
    return g if x >= 0 else 0.0


def rectangular_jam(g: float, x: float, *, a: float = -5.0, b: float = 5.0) -> float:
    return g if a <= x <= b else 0.0


JAMS: dict[str, Callable[..., float]] = {
    "full_jam": full_jam,
    "positive_jam": positive_jam,
    "rectangular_jam": rectangular_jam,
}
"""What U(0, 1) is multiplied with."""


# --- the plainest decoupled operation ---


def oracle(
    forward: Callable[[Tensor], Tensor], rule: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The operation with `forward` as its forward and ``rule(grad, x, y)`` as its backward, written by hand."""

    class Decoupled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            y = forward(x.clone())  # it may write into its argument
            ctx.save_for_backward(x, y)
            return y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            x, y = ctx.saved_tensors
            return rule(grad, x, y)

    return Decoupled.apply
