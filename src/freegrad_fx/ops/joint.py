"""The two functions around a rule for several tensors together: `gathered` before it, `scattered` after it.

    flat = gathered(p, q)
    flat = decoupled(stop_gradient(flat), flat, rule="clip_norm", max_norm=1.0)
    p, q = scattered(flat, stop_gradient(p), stop_gradient(q))

Like `stop_gradient` and `decoupled`, they dispatch through ``__torch_function__``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..backward.hazards import records_forward_alone
from ..backward.joint import gather, scatter
from ..context import explicit_rules_act

__all__ = ["gathered", "scattered"]


def gathered(*xs: Tensor) -> Tensor:
    """Return a tensor without memory that stands for several tensors.

    Formula: forward a tensor of Σ numel(x) entries; backward ∂xᵢ = its part of ∂out.

    Args:
        *xs: The tensors.

    Raises:
        RuleError: They are on several devices, or one is distributed.
    """
    if has_torch_function(xs):
        return handle_torch_function(gathered, xs, *xs)
    return gather(xs) if _acts() else xs[0]


def scattered(flat: Tensor, *ys: Tensor, sites: tuple[str, ...] = ()) -> tuple[Tensor, ...]:
    """Return the values of tensors whose gradients become one flat gradient.

    Formula: forward y₁, y₂, …; backward ∂flat = the entries of ∂y₁, ∂y₂, … one after the other, and 0 for those that
    have no gradient.

    Args:
        flat: The result of `gathered`, after the rule.
        *ys: The tensors whose values are returned.
        sites: The names of their sites.
    """
    if has_torch_function((flat, *ys)):
        return handle_torch_function(scattered, (flat, *ys), flat, *ys, sites=sites)
    return scatter(flat, ys) if _acts() else ys


def _acts() -> bool:
    """Whether `decoupled` applies its rule."""
    return torch.is_grad_enabled() and explicit_rules_act() and not records_forward_alone()
