"""`unscaled`: rules that act on the gradients of the loss, where a `torch.amp.GradScaler` scales it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, overload

from torch import Tensor
from torch.amp import GradScaler

from ._torch.tensors import scale_of
from .core.contract import LOSS_SCALE
from .core.rule import Composition, Rule, RuleLike, get
from .core.unscaled import UNSCALED, follow_scale, without_scale
from .errors import RuleError
from .table import RulesLike, RuleTable
from .table.table import is_path

__all__ = ["rule_without_scaler", "unscaled"]


@overload
def unscaled(rules: Rule, scaler: GradScaler | Tensor) -> Rule: ...
@overload
def unscaled(rules: Composition, scaler: GradScaler | Tensor) -> Composition: ...
@overload
def unscaled(
    rules: RuleTable | Mapping[str | type[Any], RuleLike | None] | os.PathLike[str],
    scaler: GradScaler | Tensor,
) -> RuleTable: ...
@overload
def unscaled(rules: str, scaler: GradScaler | Tensor) -> Rule | RuleTable: ...
def unscaled(rules: RulesLike, scaler: GradScaler | Tensor) -> Rule | Composition | RuleTable:
    """Let rules act on gradients that are not scaled, in a training with a `torch.amp.GradScaler`.

    Formula: r(g) becomes S·r(g/S), where S is the scale. A training step scales its loss by the scale of its forward,
    and `GradScaler.update` comes after the step. If S changes between a forward and its backward, the backward uses
    the new S; in compiled code, and at operations with several operands, PyTorch refuses such a backward.

    Without it, a rule gets gradients that are S times too large: ``clip_norm(max_norm=0.1)`` at a scale of 65536
    leaves a gradient of norm 1.5e-6. A built-in rule that is linear in the gradient is the same with and without a
    scale, and is not changed. Scales that are powers of two, as those of PyTorch, add no rounding. A gradient in
    float16 is computed with in float32. One that has overflowed makes the result NaN, so that the scaler finds it.

    Args:
        rules: A rule name, a `Rule` or a composition; or a dict, a `RuleTable` or the path of a TOML file.
        scaler: The scaler of the loss; or a tensor of zero dimensions with the scale, which is written into if the
            scale changes. A scaler that is not enabled changes nothing.

    Returns:
        The rule or the composition; or the table of such rules.

    Raises:
        TypeError: `scaler` is neither a GradScaler nor a tensor of one number.
        RuleError: A rule is unknown, or has a scaler already.
        TableError: As for `RuleTable.of`.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        >>> weight = torch.ones(4, requires_grad=True)
        >>> with fg.use(fg.unscaled("clip_value", scaler)(max_value=0.5)):
        ...     loss = torch.relu(weight).sum()
        >>> scaler.scale(loss).backward()
        >>> (weight.grad / 1024.0).tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    if isinstance(scaler, Tensor):
        scale: Tensor | None = scaler if not scaler.dim() and scaler.is_floating_point() else None
        if scale is None:
            raise TypeError(
                f"unscaled() takes the scale as a tensor of zero dimensions, got one of shape {[*scaler.shape]} and "
                f"{scaler.dtype}"
            )
    elif isinstance(scaler, GradScaler):
        scale = scale_of(scaler)
    else:
        raise TypeError(
            f"unscaled() takes the torch.amp.GradScaler of the training, or a tensor with the scale, got {scaler!r}"
        )
    if isinstance(rules, Rule | Composition) or (isinstance(rules, str) and not is_path(rules)):
        parts = rules.parts if isinstance(rules, Composition) else (get(rules),)
        changed = tuple(_unscaled(rule, scale) for rule in parts)
        return Composition(changed) if isinstance(rules, Composition) else changed[0]
    table = RuleTable.of(rules)
    entries = [
        replace(e, rules=e.rules and tuple(_unscaled(rule, scale) for rule in e.rules))
        for e in table
    ]
    return RuleTable(entries, table.reaches)


def _unscaled(rule: Rule, scale: Tensor | None) -> Rule:
    if LOSS_SCALE in rule.parameters:
        raise RuleError(
            f"rule {rule!r} acts on gradients that are not scaled already; give the rule without its scaler"
        )
    declaration = rule.declaration
    if scale is None or (declaration.own and declaration.linear):
        return rule
    follow_scale(scale)
    other = get(UNSCALED + rule.name)
    values: dict[str, Any] = {**rule.bound, LOSS_SCALE: scale}
    return other(forward=rule.forward, **rule.options, **values)


def rule_without_scaler(rule: Rule) -> Rule:
    """The rule that was given to `unscaled`; the rule itself if it has no scaler."""
    name = without_scale(rule.name)
    if not name:
        return rule
    values: dict[str, Any] = {n: v for n, v in rule.bound.items() if n != LOSS_SCALE}
    return get(name)(forward=rule.forward, **rule.options, **values)
