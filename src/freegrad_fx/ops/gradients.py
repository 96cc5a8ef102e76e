"""The two functions around an operation: `stop_gradient` before it, `decoupled` after it.

They dispatch through ``__torch_function__``, so that a symbolic tracer records each as one node. The package `backward`
implements `decoupled`. This module does not depend on individual rules or on graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from .._torch.dynamo import is_compiling
from ..backward.again import Operands, carry, note
from ..backward.decouple import decouple
from ..backward.hazards import records_forward_alone, warn_if_recorded
from ..backward.saved import pack_saved
from ..context import ambient_rules, explicit_rules_act
from ..core.rule import Rule, get
from ..vocabulary.operands import operation_of
from .checks import require_result

__all__ = [
    "copied",
    "decoupled",
    "decoupled_by",
    "kept",
    "noted",
    "operands_by_name",
    "overwritten_by",
    "stop_gradient",
    "written_back",
]


def stop_gradient(x: Tensor, *, ambient: str = "", site: str = "", native: bool = False) -> Tensor:
    """Return `x` detached from the autograd graph, sharing memory with `x`.

    Formula: forward x; backward 0.

    With gradients disabled, `x` itself is returned, because some kernels check `requires_grad` even then. While a
    program is being exported, `x` is always detached, because the program can be run with gradients later.

    Args:
        x: Any tensor.
        ambient: As for `decoupled`. If no rule acts, `x` itself is returned.
        site: As for `decoupled`, if the site is ambient.
        native: As for `decoupled`. If true, `x` itself is returned.
    """
    if has_torch_function_unary(x):
        given = _if_given(ambient=ambient, site=site, native=native)
        return handle_torch_function(stop_gradient, (x,), x, **given)
    if native or not (torch.is_grad_enabled() or records_forward_alone()):
        return x
    acts = bool(ambient_rules(ambient, site)) if ambient else explicit_rules_act()
    # a traced function such as abs() can be called with a number
    return x.detach() if acts and isinstance(x, Tensor) else x


def kept(x: Tensor, *, ambient: str = "", site: str = "") -> Tensor:
    """Return a copy of `x` if a rule acts, else `x` itself. Used where the memory of `x` is overwritten.

    That of a detached tensor has the same strides, because kernels round differently on others.

    Args:
        x: Any tensor.
        ambient: As for `decoupled`.
        site: As for `decoupled`, if the site is ambient.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(kept, (x,), x, **_if_given(ambient=ambient, site=site))
    return copied(x) if _copies(ambient, site) and isinstance(x, Tensor) else x


def copied(x: Tensor) -> Tensor:
    """A copy of `x`. That of a detached tensor has the same strides, because kernels round differently on others."""
    copy = _copied(x)
    carry(x, copy)
    return copy


def _copied(x: Tensor) -> Tensor:
    copy = x.clone()
    if (
        is_compiling()
        or x.requires_grad
        or x.layout != torch.strided
        or copy.stride() == x.stride()
    ):
        return copy
    # A stride of 0 repeats one entry, which can be written only once
    once = x[tuple(slice(0, 1) if step == 0 else slice(None) for step in x.stride())]
    return x.new_empty_strided(once.shape, x.stride()).copy_(once).expand(x.shape)


def written_back(x: Tensor, out: Tensor, *, ambient: str = "", site: str = "") -> Tensor:
    """Write the result of an in-place operation into `x`, so that autograd tracks the write in all views of its memory.

    Formula: forward x ← out; backward ∂out = ∂x.

    If no rule acts, the operation was applied to `x` itself, not to a copy, and its result `out` is returned.

    Args:
        x: The tensor that the operation overwrites in the model.
        out: The result of `decoupled` for the operation, which was applied to ``kept(stop_gradient(x))``.
        ambient: As for `decoupled`.
        site: As for `decoupled`, if the site is ambient.
    """
    if has_torch_function_variadic(x, out):
        given = _if_given(ambient=ambient, site=site)
        return handle_torch_function(written_back, (x, out), x, out, **given)
    return overwritten_by(x, out) if _copies(ambient, site) else out


def overwritten_by(x: Tensor, out: Tensor) -> Tensor:
    """Write `out` into `x`, and return `x`."""
    result = x.copy_(out)
    carry(out, result)
    return result


def _copies(ambient: str, site: str) -> bool:
    """Whether `kept` makes a copy."""
    return torch.is_grad_enabled() and _acts(ambient, site)


def _acts(ambient: str, site: str) -> bool:
    return bool(ambient_rules(ambient, site)) if ambient else explicit_rules_act()


def _if_given(**keywords: Any) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if value}


def decoupled(
    y: Tensor,
    x: Tensor,
    *read: Tensor,
    rule: str | Rule = "",
    ambient: str = "",
    site: str = "",
    save: str = "",
    compile: bool = False,
    operation: str = "",
    operands: Mapping[str, Any] | None = None,
    native: bool = False,
    **parameters: Any,
) -> Tensor:
    """Return the values of `y`; in the backward, the rule computes the gradient of `x`.

    Formula: forward y; backward ∂x = rule(∂out, x, y), ∂y = ∂out.

    A rule can answer for several operands. Each of these has to be detached before the operation; the others keep
    their native gradient, which `y` receives. In a second derivative, the native gradients are constant in the operands
    that are detached.

    `y` also receives its gradient. A PReLU between `stop_gradient(x)` and `y`, for example, is trained as usual.

    Args:
        y: The output of the operation, computed from ``stop_gradient(x)``. Any shape.
        x: The input of the operation. The rule has to return a gradient of its shape.
        *read: At most one tensor, with the values of `x`, that the rule reads instead of `x`. In a composition, `x` is
            the result of the next rule, and all rules read the input of the operation.
        rule: The name of a registered rule, or a `Rule`.
        ambient: ``"activations"`` or ``"params"``, instead of a rule: the rule of the `use` block of this scope that is
            in force at the call. Outside of such a block `y` itself is returned.
        site: The name of the site, for error messages, and for the tables of blocks if it is ambient.
        save: What is saved for the backward if the rule reads ``x``: ``"x"``; ``"mask"`` or ``"bits"``, only the
            mask of ``x``; or ``"y"``, the output, which must have the same mask. The default is the rule's own option.
        compile: Whether the backward runs as one compiled kernel in eager mode.
        operation: The canonical name of the operation; needed by rules that use ``f``, and if it has several operands.
        operands: The further arguments of the operation: its operands by their names (``weight``, ``bias``; ``b``),
            the others by PyTorch's names. An operand that the call leaves out, or that is a number, is None.
        native: Whether the call keeps its native backward, so that `y` itself is returned.
        **parameters: The rule's parameters. Missing ones are taken from the rule.

    Returns:
        A tensor with the values of `y`.

    Raises:
        RuleError: The rule is unknown; or, in the backward, its result is not a valid gradient for `x`.
        TypeError: `y` is not a tensor.
        RuntimeError: The call is compiled inside of a `torch.func` transform, where the compiler would drop the rule.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> x = torch.tensor([-0.5, 3.0], requires_grad=True)
        >>> y = torch.relu(fg.ops.stop_gradient(x))
        >>> out = fg.ops.decoupled(y, x, rule="rectangular", a=-1.0, b=1.0)
        >>> torch.autograd.grad(out.sum(), x)
        (tensor([1., 0.]),)
    """
    if has_torch_function_variadic(y, x):  # `read` is computed by the same tracer as `x`
        given = _if_given(ambient=ambient) if ambient else {"rule": rule}
        how = _if_given(
            save=save, compile=compile, operation=operation, operands=operands, native=native
        )
        given = {**given, **how}
        return handle_torch_function(
            decoupled, (y, x), y, x, *read, **given, site=site, **parameters
        )
    if not isinstance(y, Tensor):
        if not isinstance(x, Tensor):
            return y
        require_result(y, site)
    # Only the grad mode is read here: `requires_grad` is not reliable under functorch and Dynamo.
    if not _acts(ambient, site) or warn_if_recorded() or not torch.is_grad_enabled():
        return y
    if native:
        return noted(y, x, get(rule), operation, operands or {})
    if not ambient:
        found = get(rule)
        if len(parameters) < len(found.parameters):
            parameters = {**dict(found.values), **parameters}
        save, compile = save or found.save, compile or found.compile
        used = operands_by_name(operation, x, operands or {}) if operation else None
        values = read[0] if read else None
        return decouple(y, x, found, site, parameters, save, compile, values, used)
    return decoupled_by(ambient_rules(ambient, site), y, x, site)


def noted(y: Tensor, x: Tensor, rule: Rule, operation: str, operands: Mapping[str, Any]) -> Tensor:
    """Return `y`, the output of a call that keeps its native backward.

    It is noted how `y` can be computed again, or what the call has saved is packed, as the rule declares it.

    Args:
        y: The output.
        x: The first operand.
        rule: The rule of the site.
        operation: As for `decoupled`.
        operands: As for `decoupled`.
    """
    if is_compiling():
        return y
    if rule.declaration.packs is not None:
        pack_saved(y, x, rule.declaration.packs)
    elif rule.declaration.again:
        used = operands_by_name(operation, x, operands)
        note(y, used, rule.declaration, next(iter(used.values)))
    return y


def operands_by_name(operation: str, x: Tensor, others: Mapping[str, Any]) -> Operands:
    """The operands of a call, given the arguments `x`, `operation` and `operands` of `decoupled`."""
    found = operation_of(operation)
    names = ("x",) if found is None else found.operands
    first = next(name for name in names if name not in others)  # numbers are given as None
    values = {name: others[name] for name in names if name in others}
    constants = {name: value for name, value in others.items() if name not in names}
    return Operands(operation, {first: x, **values}, constants)


def decoupled_by(
    rules: tuple[Rule, ...],
    y: Tensor,
    x: Tensor,
    site: str,
    operation: str = "",
    operands: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return the values of `y`; in the backward, the rules compute the gradient of `x`, the first from that of `y`.

    Args:
        rules: The rules.
        y: The output of the operation.
        x: The input of the operation, or its first operand.
        site: The name of the site.
        operation: As for `decoupled`, for the first rule.
        operands: As for `decoupled`, for the first rule.
    """
    first, *others = rules
    # All rules except the first act around identities; the last rule is nearest to x
    source = x
    for other in reversed(others):
        source = _decoupled_by(other, source.detach(), source, x, site)
    used = operands_by_name(operation, source, operands or {}) if operation else None
    return _decoupled_by(first, y, source, x, site, used)


def _decoupled_by(
    rule: Rule, y: Tensor, source: Tensor, x: Tensor, site: str, used: Operands | None = None
) -> Tensor:
    last = source is x
    read = None if last else x
    values = dict(rule.values)
    return decouple(y, source, rule, site, values, rule.save, rule.compile, read, used, last)
