"""Pictures of rules: `plot_rule`. Needs matplotlib, which the package does not require otherwise."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .core.rule import Composition, Rule, RuleLike, get
from .errors import RuleError, unknown
from .vocabulary.activations import OPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_rule"]

_POINTS = 601
_DRAWS = 400
_TITLE = 44  # characters in a line
_BAND = (0.1, 0.9)


@dataclass(frozen=True)
class Curve:
    """What is drawn of a rule.

    Attributes:
        horizontal: The values on the horizontal axis: the input x, or the gradient of the output.
        against: What these are: ``"x"`` or ``"gradient"``.
        operation: The name of the operation; None for none.
        forward: The output of the operation, for values of x; None if there is none to draw.
        gradient: The gradient that the rule returns; the mean, if the rule draws random numbers.
        band: For such a rule, the quantiles that 80 % of the gradients lie between.
    """

    horizontal: Tensor
    against: str
    operation: str | None
    forward: Tensor | None
    gradient: Tensor
    band: tuple[Tensor, Tensor] | None = None


def plot_rule(
    rule: RuleLike,
    op: str | None = None,
    *,
    low: float = -3.0,
    high: float = 3.0,
    ax: Axes | None = None,
    seed: int = 0,
) -> Axes:
    """Draw what a rule does to the gradient of an operation.

    Formula: the effective derivative x ↦ rule(1, x, f(x)), beside y = f(x). For a rule that is not linear in the
    gradient, or mixes its entries: ∂y ↦ rule(∂y, x, y), of all the points at once, with x = ∂y. For a rule that draws
    random numbers the mean, with the band in which 80 % of the values lie.

    Args:
        rule: The rule: a name, a `Rule` with its parameters, or a composition.
        op: The operation f, such as ``"relu"``. By default the forward of the rule, or the operation that it is meant
            for; without either, y is x.
        low: The smallest x, or the smallest gradient.
        high: The largest one.
        ax: Where to draw; a new figure by default.
        seed: The seed of the random numbers. The state of PyTorch's generator is kept.

    Returns:
        The axes, for titles and for saving: ``fg.plot_rule("arctan").figure.savefig("arctan.png")``.

    Raises:
        ImportError: matplotlib is not installed.
        RuleError: The rule or the operation is unknown, the rule needs a tensor as a parameter or several operands, or
            `low` is not below `high`.

    Example:
        >>> import freegrad_fx as fg
        >>> axes = fg.plot_rule("arctan", "heaviside")    # doctest: +SKIP
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "plot_rule() needs matplotlib: pip install matplotlib, or the extra freegrad_fx[examples]"
        ) from error
    curve = curve_of(rule, op, low=low, high=high, seed=seed)
    where: dict[str, Any] = {}
    if ax is None:
        _, ax = pyplot.subplots(figsize=(4.0, 3.0), layout="constrained")
        # Below the axes, where it hides no part of a curve
        where = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "ncols": 2, "frameon": False}
    x = curve.horizontal.numpy()
    if curve.forward is not None:
        ax.plot(
            x, curve.forward.numpy(), color="0.6", linestyle="--", label=f"{curve.operation}(x)"
        )
    if curve.band is not None:
        below, above = curve.band
        ax.fill_between(x, below.numpy(), above.numpy(), alpha=0.25, label="80 % of draws")
    what = "effective derivative" if curve.against == "x" else "gradient of x"
    ax.plot(x, curve.gradient.numpy(), label=f"mean {what}" if curve.band else what)
    ax.set_xlabel("x" if curve.against == "x" else "gradient of y")
    title = textwrap.fill(str(_resolved(rule)), _TITLE, break_long_words=False)
    ax.set_title(title, fontsize="medium")
    ax.axhline(0.0, color="0.85", linewidth=0.8, zorder=0)
    ax.axvline(0.0, color="0.85", linewidth=0.8, zorder=0)
    ax.legend(fontsize="small", **where)
    return ax


def curve_of(
    rule: RuleLike, op: str | None = None, *, low: float, high: float, seed: int = 0
) -> Curve:
    """The numbers that `plot_rule` draws; see there."""
    if not low < high:
        raise RuleError(f"plot_rule() draws from low to high, and got low={low}, high={high}")
    parts = _resolved(rule).parts
    for part in parts:
        if needed := part.declaration.needs_operation:
            raise RuleError(
                f"rule {part.name!r} uses {needed} of an operation, and plot_rule() draws rules of one input"
            )
        part.require_bound()
    name = _op(rule, op)
    at = torch.linspace(low, high, _POINTS, dtype=torch.float64)
    function: Any = None if name is None else OPS[name].function
    y = at if function is None else function(at)
    if function is not None:
        parts = tuple(part.at_operation(function) for part in parts)
    by_entry = all(part.declaration.linear and not part.declaration.reducing for part in parts)
    grad = torch.ones_like(at) if by_entry else at
    if any(part.declaration.random for part in parts):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            drawn = torch.stack([_applied(parts, grad, at, y) for _ in range(_DRAWS)])
        band = (drawn.quantile(_BAND[0], 0), drawn.quantile(_BAND[1], 0))
        gradient = drawn.mean(0)
    else:
        gradient, band = _applied(parts, grad, at, y), None
    shown = None if name is None or not by_entry else y
    return Curve(at, "x" if by_entry else "gradient", name, shown, gradient, band)


def _applied(parts: tuple[Rule, ...], grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The gradient that the rules give, one after the other."""
    for part in parts:
        grad = part.backward(grad.clone(), x=x.clone(), y=y.clone())
    return grad.detach()


def _op(rule: RuleLike, op: str | None) -> str | None:
    """The name of the operation to draw."""
    if op is not None:
        if op not in OPS:
            raise RuleError(
                unknown("operation", op, OPS, everything="list(freegrad_fx.vocabulary.OPS)")
            )
        return op
    resolved = _resolved(rule)
    meant = (name for part in resolved.parts for name in part.declaration.meant_for)
    named = (name for name in (resolved.forward, *meant) if isinstance(name, str))
    return next((name for name in named if name in OPS), None)


def _resolved(rule: RuleLike) -> Rule | Composition:
    return rule if isinstance(rule, Composition) else get(rule)
