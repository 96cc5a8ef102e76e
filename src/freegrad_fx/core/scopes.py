"""Scopes: the sites that a single rule acts on, and whether a rule can act on all of them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..errors import RuleError, unknown
from .contract import OVER
from .rule import Rule, RuleLike, compose, get

__all__ = ["SCOPES", "parts_for", "scopes_of", "unlearned"]

SCOPES = {"operation": "activations", "parameter": "params"}
"""The scope of an ambient rule, by the kind of the sites in it."""


def parts_for(
    scopes: tuple[str, ...], rule: RuleLike, params: Mapping[str, Any] | None = None
) -> tuple[Rule, ...]:
    """Bind parameters to a rule and return its parts, for use at all sites of some scopes.

    Raises:
        RuleError: The rule is unknown, lacks a parameter value, replaces a forward, or cannot be used at every site in
            these scopes.
    """
    if params:
        rule = get(rule)(**params) if isinstance(rule, str) else rule(**params)
    parts = compose(rule).parts
    for part in parts:
        _check(part, parts, scopes)
    return parts


def scopes_of(scope: str | tuple[str, ...]) -> tuple[str, ...]:
    """The scopes that a name, ``"all"`` or a tuple of names denotes. Raise `RuleError` if one is unknown."""
    asked = (scope,) if isinstance(scope, str) else tuple(scope)
    valid = (*SCOPES.values(), "all")
    for name in asked:
        if name not in valid:
            raise RuleError(unknown("scope", name, valid))
    return tuple(s for s in SCOPES.values() if s in asked or "all" in asked)


def _check(rule: Rule, parts: tuple[Rule, ...], scopes: tuple[str, ...]) -> None:
    """Raise `RuleError` if a rule cannot be used at every site in some scopes."""
    rule.require_bound()
    if rule.declaration.of_op is not None:
        raise RuleError(
            f"rule {rule.name!r} depends on the operation whose backward it replaces, and use() and Activation get it "
            f"for any operation. Give it in a table: use({{'activations': {rule.name!r}}}, model=model), or "
            f"transform(model, {{'activations': {rule.name!r}}})."
        )
    if rule.over != OVER[0]:
        raise RuleError(
            f"{rule!r} acts on the parameters of an entry together, and a block of a single rule has no entries. Give "
            f"it in a table: use({{'params': rule}}, model=model), or transform(model, {{'params': rule}})."
        )
    if rule.forward is not None:
        raise RuleError(
            f"{rule!r} replaces a forward, which only transform() supports: pass the rule to transform(), or leave out "
            f"forward=."
        )
    if needed := rule.declaration.needs_operation:
        raise RuleError(f"rule {rule.name!r} needs {needed}, which sites of one input do not have")
    if not rule.keeps_shape:
        raise RuleError(
            f"rule {rule.name!r} changes the shape of the gradient, so it cannot be used in a block. Give it to "
            f"single sites with transform()."
        )
    for kind, scope in SCOPES.items():
        if scope not in scopes:
            continue
        if kind not in rule.kinds:
            raise RuleError(
                f"rule {rule.name!r} supports only {' and '.join(rule.kinds)} sites, so it cannot be used for scope "
                f"{scope!r}"
            )
        if "y" in rule.inputs and (kind == "parameter" or rule is not parts[0]):
            reason = (
                "a parameter does not have one"
                if kind == "parameter"
                else "it must come first in a composition"
            )
            raise RuleError(f"rule {rule.name!r} needs the output y of an operation: {reason}")


def unlearned(rules: Iterable[Rule], learnt: Container[int] = ()) -> list[str]:
    """What to warn of: parameters of rules that are tensors which require a gradient, as no rule gives them one.

    Args:
        rules: The rules.
        learnt: The ids of tensors that get a gradient elsewhere, because the forward of the model uses them.
    """
    return [
        f"the tensor {name!r} of rule {rule.name!r} requires a gradient, but gets none from the rule, which "
        f"does not define one. To silence this, give a tensor with requires_grad=False"
        for rule in rules
        for name, value in rule.values
        if isinstance(value, Tensor)
        and value.requires_grad
        and name not in rule.declaration.learns
        and id(value) not in learnt
    ]
