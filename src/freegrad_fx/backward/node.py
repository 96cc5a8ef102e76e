"""Applies a rule with the node of the C++ extension, if that is in use, or else with the Function in Python.

The node has what the Function has: the rule (``call``), the saved tensors, the name. It runs the program of a pointwise
rule itself, where nothing differentiates, records or transforms the backward, and otherwise calls the Function's
gradient. So both ways give the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._torch.tensors import empty_like_gradient
from ..context import thread_state
from ..core.contract import BITS, OF_MASK
from ..core.rule import Rule, get
from ..errors import RuleError
from ..extension.library import current
from .functions import Call, apply_function, gradient
from .observing import thread_observers
from .program import Part, Program, program_of
from .several import answers_for_several

__all__ = ["apply", "direct", "extension_in_use", "resolved"]

# What a node saves as `x`, as in the C++ source
_NOTHING, _INPUT, _OUTPUT, _MASK = range(4)


def apply(y: Tensor, x: Tensor, call: Call, read: Tensor | None = None) -> Tensor:
    """Return the values of `y`; in the backward, the rule computes the gradient of `x`.

    For use where no `torch.func` transform is active.

    Args:
        y: The output of the operation.
        x: Its input.
        call: The rule at its site.
        read: What the rule reads in the place of `x`, if that is another tensor.
    """
    if read is not None or call.observers:
        return apply_function(y, x, call, read)  # type: ignore[no-any-return]
    extension = extension_in_use()
    if extension is not None and (saved := _saved(call)) is not None:
        output = extension.apply(y, x, call, *saved)
        if output is not None:
            return output  # type: ignore[no-any-return]
    return apply_function(y, x, call)  # type: ignore[no-any-return]


def direct(
    stop_gradient: Callable[..., Any], decoupled: Callable[..., Any]
) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The two functions around an operation in C++, for generated code; None without the extension.

    Args:
        stop_gradient: The function in Python, which is called in unusual cases.
        decoupled: The same.
    """
    extension = extension_in_use()
    if extension is None:
        return None
    return extension.direct(stop_gradient, None), extension.direct(decoupled, resolved)


_configured: list[Any] = []


def extension_in_use() -> Any:
    """The module of the extension, which has what it needs of Python; None if it is not in use."""
    extension = current()
    if extension is not None and extension not in _configured:
        extension.configure(
            *thread_state(), *thread_observers(), get, gradient, _program, _stand_in
        )
        torch.autograd.graph.Node.register(extension.Node)
        _configured.append(extension)
    return extension


def _saved(call: Call) -> tuple[int, bool] | None:
    """What a node saves as `x`, and whether it saves `y`; None if it cannot hold what the rule needs."""
    inputs = call.rule.declaration.inputs
    masked = call.save in OF_MASK and "x" in inputs
    if masked and (call.save == BITS or call.rule.declaration.mask_bits != 1):
        return None
    if inputs not in ((), ("x",), ("y",), ("x", "y")):
        return None
    if any(isinstance(value, Tensor) for value in call.parameters.values()):
        return None
    how = _OUTPUT if call.save == "y" else _MASK if masked else _INPUT
    return how if "x" in inputs else _NOTHING, "y" in inputs


def resolved(keywords: Mapping[str, Any]) -> tuple[Call, int, bool, Rule] | None:
    """What a call of `decoupled` with these keywords does; None if the function in Python has to decide."""
    values = dict(keywords)
    rule, site = values.pop("rule", ""), values.pop("site", "")
    save, compile = values.pop("save", ""), values.pop("compile", False)
    if (
        not (isinstance(rule, str | Rule) and isinstance(site, str))
        or "ambient" in values
        or "operation" in values
        or "operands" in values
    ):
        return None
    try:
        found = get(rule)
    except RuleError:
        return None
    call = Call(
        found, site, {**found.bound, **values}, save or found.save, compile or found.compile
    )
    saved = _saved(call)
    if saved is None or answers_for_several(found.declaration, call.parameters):
        return None
    if call.save not in ("", "x", *OF_MASK) and not found.declaration.reads_sign:
        return None
    return call, *saved, found


def _program(call: Call, dtype: torch.dtype, part: Part = "function") -> Program | None:
    if call.compile:
        return None
    return program_of(call.rule.declaration, call.parameters, dtype, _evaluate, part)


def _evaluate(program: Program, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    result: Tensor = current().evaluate(program, grad, x, y)
    return result


def _stand_in(node: Any) -> Tensor:
    """A tensor whose node is that of the Function, with what a node of the extension holds, for compiled autograd."""
    call, (shape, dtype), (of_y, of_x) = node.call, node.like, node.needs_input_grad
    saved = dict(zip(call.rule.declaration.inputs, node.saved_tensors, strict=True))
    as_saved = call
    if call.save in OF_MASK and "x" in saved:
        mask = saved.pop("x")
        given = replace(
            call.rule.declaration,
            mask=lambda _: mask,
            mask_parameters=(),
            parameters={},
            requires=(),
        )
        as_saved = Call(Rule(given), *call[1:])
    if call.save == "y":
        saved["y"] = saved.pop("x")
    y = saved["y"].detach() if "y" in saved else empty_like_gradient(node)
    x = saved.get("x", y.new_empty(shape, dtype=dtype))
    with torch.enable_grad():
        if x.requires_grad != of_x:
            x = x.detach().requires_grad_(of_x)
        output = apply_function(y.requires_grad_(of_y), x, as_saved)
    output.grad_fn.call = call
    return output  # type: ignore[no-any-return]
