"""Chooses the implementation of a decoupled backward for the current execution mode.

`decouple` implements `ops.decoupled` where a rule acts:

- In eager mode it calls a plain `autograd.Function`.
- Under `torch.func` transforms it calls a Function with `setup_context` and a vmap rule.
- Under `torch.compile` it calls an operator. Dynamo records the operator as one call, AOTAutograd traces into it, and
  caches of compiled code identify the backward by the operator's arguments. A formula that reads variables cannot be
  identified that way, so Dynamo traces the Function instead and guards the values.

This module does not depend on individual rules or on graphs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._torch.dispatch import function_transforms_active, without_dead_transform
from .._torch.dynamo import is_compiling
from ..core.rule import Rule
from ..errors import RuleError
from .again import Operands, note
from .functions import OVERWRITTEN, Call, Composable, follows_another
from .hazards import refuse_compiled_transform
from .node import apply
from .observing import observers_of_now
from .operator import are_floats, operands
from .several import answers_for_several, apply_composable, apply_several

__all__ = ["decouple"]


def decouple(
    y: Tensor,
    x: Tensor,
    rule: Rule,
    site: str,
    parameters: dict[str, Any],
    save: str,
    compile: bool,
    read: Tensor | None = None,
    operation: Operands | None = None,
    last: bool | None = None,
) -> Tensor:
    """Return the values of `y`; in the backward, the rule computes the gradient of `x`, or several gradients.

    Args:
        y: The output of the operation.
        x: The input of the operation.
        rule: The rule.
        site: The name of the site, for error messages.
        parameters: All parameters of the rule.
        save: What is saved for the backward if the rule reads ``x``: ``"x"``; ``"mask"``, only the mask of ``x``;
            ``"bits"``, the mask with eight entries to a byte; ``"y"``, the output, which is positive exactly where
            ``x`` is; or ``"overwritten"``, ``x``, into which the operation has written its output.
        compile: Whether the backward runs as one kernel in eager mode.
        read: The tensor that the rule reads as ``x``, with the values of `x`; None for `x` itself. In a composition,
            `x` is the result of the next rules, and a second derivative would go through these rules.
        operation: The operation with all its operands, of which `x` is the first; None if it has only one.
        last: Whether the rule is the last of its composition, and gives the gradient that the site does; None if the
            autograd graph tells.

    Raises:
        RuleError: The rule needs more of ``x`` than is saved.
    """
    if save in ("y", OVERWRITTEN) and not rule.declaration.reads_sign:
        raise RuleError(
            f"rule {rule.name!r} at site {site!r} needs more of x than where it is positive, but the graph saves only "
            f"that: the rule has been registered again since. Transform the original model again."
        )
    if is_compiling():
        # Dynamo traces this for every site
        refuse_compiled_transform()
        if rule.declaration.random:
            _refuse_generator(rule, site, parameters)
        floats = are_floats(tuple(map(type, parameters.values())))
        tensors, numbers, call = operands(rule, site, parameters, save, operation, floats)
        if call and (not tensors or all(isinstance(value, Tensor) for value in tensors)):
            return torch.ops.freegrad_fx.decoupled(y, x, tensors, numbers, call, read)  # type: ignore[no-any-return]
        _refuse_generator(rule, site, parameters)
    elif not function_transforms_active():
        # a tensor may be left over from a transform that has ended
        y, x = without_dead_transform(y), without_dead_transform(x)
        observers = observers_of_now()
        if observers and (follows_another(x, site) if last is None else not last):
            observers = ()
        described = Call(rule, site, parameters, save, compile, observers)
        if answers_for_several(rule.declaration, parameters):
            out = apply_several(y, operation or Operands("", {"x": x}, {}), described, read)
        elif read is None:
            out = apply(y, x, described)
        else:
            out = apply(y, x, described, without_dead_transform(read))
        if rule.declaration.again:
            note(out, operation, rule.declaration)
        return out
    if answers_for_several(rule.declaration, parameters):
        described = Call(rule, site, parameters, save, compile)
        return apply_composable(y, operation or Operands("", {"x": x}, {}), described, read)
    values = tuple(_distinct((x, read), parameters.values()))
    return Composable.apply(y, x, read, rule, site, save, tuple(parameters), values)  # type: ignore[no-any-return, no-untyped-call]


def _refuse_generator(rule: Rule, site: str, parameters: dict[str, Any]) -> None:
    for name, value in parameters.items():
        # Dynamo of PyTorch 2.15 cannot ask whether a tensor is a generator
        if not isinstance(value, Tensor) and isinstance(value, torch.Generator):
            raise RuleError(
                f"rule {rule.name!r} at site {site!r} draws from a generator of its own ({name}), which compiled code "
                f"cannot do. Leave out {name}= and seed with torch.manual_seed; or run the model without torch.compile."
            )


def _distinct(before: tuple[Any, ...], values: Iterable[Any]) -> Iterable[Any]:
    """The values, each tensor at most once: torch.compile does not accept the same tensor twice for one Function."""
    if not is_compiling():
        return values
    found: list[Any] = [*before]
    for value in values:
        twice = isinstance(value, Tensor) and any(value is other for other in found)
        found.append(value.detach() if twice else value)
    return found[len(before) :]
