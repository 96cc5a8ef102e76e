"""The backward that a rule has: the one `torch.autograd.Function`, what it saves, and what it hands on.

`decouple` is what `ops.decoupled` comes to where a rule acts. In eager mode that is a plain Function; under the
transforms of torch.func one that they can take apart; and under the compiler an operator, which Dynamo leaves whole
and AOTAutograd opens, so that caches of compiled code know by its arguments which backward it has. (A formula that
reads variables is left for Dynamo to look into, which guards their values.) This file knows no rule by name and nothing
of graphs.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._torch.dispatch import function_transforms_active, without_dead_transform
from ._torch.dynamo import takes_for_constant
from ._torch.functions import direct_apply
from ._torch.tensors import version
from .errors import RuleError
from .hazards import refuse_compiled_transform
from .rules.fused import runs_alone
from .rules.kernels import run_fused
from .rules.masks import positive
from .rules.rule import MASK, Rule, of_token

__all__ = ["OVERWRITTEN", "decouple", "operands", "rule_behind"]

OVERWRITTEN = "overwritten"
"""What a graph says is saved where the operation has written its output into ``x``."""


class _Call(NamedTuple):
    """A rule at a place, and how it runs."""

    rule: Rule
    site: str
    parameters: dict[str, Any]
    save: str
    fuse: bool


def decouple(
    y: Tensor,
    x: Tensor,
    rule: Rule,
    site: str,
    parameters: dict[str, Any],
    save: str,
    fuse: bool,
) -> Tensor:
    """Return the values of `y`; in the backward, `x` receives what the rule makes of the gradient.

    Args:
        y: The output of the operation.
        x: Its input.
        rule: The rule.
        site: The name of the place in the model, for error messages.
        parameters: The rule's parameters, all of them.
        save: What is saved where the rule reads ``x``: ``"x"``; ``"mask"``, its mask alone; ``"y"``, the output, which
            is positive where ``x`` is; ``"overwritten"``, ``x``, which has become the output.
        fuse: Whether the backward is to run as one kernel in eager mode.

    Raises:
        RuleError: The rule asks of ``x`` more than what is saved tells.
    """
    if save in ("y", OVERWRITTEN) and rule.mask is not positive:
        raise RuleError(
            f"rule {rule.name!r} at site {site!r} asks now for more of x than where it is positive, which is all that "
            f"the graph has kept: it was registered anew since. Transform the original model again."
        )
    if torch.compiler.is_compiling():
        refuse_compiled_transform()
        tensors, numbers, call = operands(rule, site, parameters, save)
        if call and all(isinstance(value, Tensor) for value in tensors):
            return torch.ops.freegrad_fx.decoupled(y, x, tensors, numbers, call)  # type: ignore[no-any-return]
    elif not function_transforms_active():
        # a tensor may have escaped from a transform that is over
        y, x = without_dead_transform(y), without_dead_transform(x)
        return _apply(y, x, _Call(rule, site, parameters, save, fuse))  # type: ignore[no-any-return]
    values = tuple(_distinct(x, parameters.values()))
    return _Composable.apply(y, x, rule, site, save, tuple(parameters), values)  # type: ignore[no-any-return, no-untyped-call]


def _distinct(x: Tensor, values: Iterable[Any]) -> Iterable[Any]:
    """The values, none of them a tensor that was there before: torch.compile takes none twice for one Function."""
    if not torch.compiler.is_compiling():
        return values
    found: list[Any] = [x]
    for value in values:
        twice = isinstance(value, Tensor) and any(value is other for other in found)
        found.append(value.detach() if twice else value)
    return found[1:]


# --- the Function ---


class _Decoupled(torch.autograd.Function):
    """The identity on `y` in the forward, a rule on `x` in the backward."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, call: _Call) -> Tensor:
        # `y` itself or a view of it would make autograd refuse in-place operations on the result
        output = y.detach()
        _save(ctx, x, output, call)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return grad, _gradient(ctx, grad) if ctx.needs_input_grad[1] else None, None


_apply = direct_apply(_Decoupled)


class _Composable(torch.autograd.Function):
    """`_Decoupled` once more, as the transforms of torch.func take it; several times as slow. It saves no masks."""

    generate_vmap_rule = True

    # Where nothing requires a gradient, Dynamo counts the arguments to tell a forward like this from one with a `ctx`:
    # their number has to be fixed
    @staticmethod
    def forward(
        y: Tensor,
        x: Tensor,
        rule: Rule,
        site: str,
        save: str,
        names: tuple[str, ...],
        values: tuple[Any, ...],
    ) -> Tensor:
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, x, rule, site, save, names, values = inputs
        parameters = dict(zip(names, values, strict=True))
        save = "x" if save == MASK else save
        _save(ctx, x, output, _Call(rule, site, parameters, save, False))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        unlearned = (None,) * len(ctx.needs_input_grad[2:])
        return grad, _gradient(ctx, grad) if ctx.needs_input_grad[1] else None, *unlearned


# What a call costs where tensors are small is what these functions cost: they do nothing twice, and nothing early.


def _save(ctx: Any, x: Tensor, output: Tensor, call: _Call) -> None:
    rule, _, parameters, save, _ = call
    tensors = [n for n, v in parameters.items() if isinstance(v, Tensor)] if parameters else None
    ctx.call, ctx.like = call, (x.shape, x.dtype)
    inputs = rule.inputs
    saved: tuple[Tensor, ...] = ()
    if inputs:
        if save == "y":
            x = output
        elif save == MASK and "x" in inputs:
            x = _mask(x, call)
        # The output stands for `y`: in a second backward its derivative is the rule's, not the operation's own.
        saved = (x,) if inputs == _X else tuple(x if name == "x" else output for name in inputs)
    if tensors:
        ctx.tensors = tensors
        saved = (*saved, *map(parameters.__getitem__, tensors))
    if saved:
        ctx.save_for_backward(*saved)


_X = ("x",)


def _mask(x: Tensor, call: _Call) -> Tensor:
    """The mask of ``x`` that a rule reads; raise `RuleError` where there is none."""
    rule, where = call.rule, f"rule {call.rule.name!r} at site {call.site!r}"
    if rule.mask is None:
        raise RuleError(
            f"{where} reads more of x than a mask, so that there is none to save. Leave save='mask' out; if it was "
            f"registered anew since, transform the original model again."
        )
    counts = not (rule.own or torch.compiler.is_compiling() or x.is_inference())
    before = version(x) if counts else 0
    mask: Any = rule.mask_of(x, call.parameters)
    if counts and version(x) != before:
        raise RuleError(f"{where} has a mask that changes x in place. Make it a pure function.")
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != x.shape:
        got = type(mask).__name__
        if isinstance(mask, Tensor):
            got = f"a tensor of {mask.dtype} and shape {tuple(mask.shape)}"
        raise RuleError(
            f"{where} has a mask that returns {got}; it has to return booleans of the shape of x, {tuple(x.shape)}."
        )
    return mask


def _formula(ctx: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], dict[str, Any]]:
    """The formula that a backward is computed with, what it reads, and its parameters."""
    rule, _, parameters, save, _ = ctx.call
    inputs: tuple[Tensor, ...] = ctx.saved_tensors
    count = len(rule.inputs)
    if len(inputs) > count:
        values = dict(zip(ctx.tensors, inputs[count:], strict=True))
        parameters, inputs = {**parameters, **values}, inputs[:count]
    return rule.gate if save == MASK else rule.function, inputs, parameters


def _gradient(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient of x."""
    call: _Call = ctx.call
    function, inputs, parameters = _formula(ctx)
    if torch.compiler.is_compiling():  # it sees writes by itself, and takes no sparse gradient
        inputs = tuple(_after(tensor, grad) for tensor in inputs)
        return _checked(function(grad, *inputs, **parameters), grad, ctx)
    if grad.layout is not torch.strided:
        grad = _coalesced(grad, call)
    rule = call.rule
    before = 0 if rule.own else _versions(grad, inputs)
    result: Any = NotImplemented
    if call.fuse:
        if runs_alone(grad):
            result = run_fused(rule, call.site, function, grad, *inputs, **parameters)
    elif (
        rule.fused is not None
        and call.save != MASK
        and parameters is call.parameters  # no tensors among them
        and runs_alone(grad)
    ):
        result = rule.fused(grad, *inputs, **parameters)
    if result is NotImplemented:
        result = function(grad, *inputs, **parameters)
    if not rule.own and before != _versions(grad, inputs):
        raise RuleError(
            f"rule {rule.name!r} at site {call.site!r} changes its arguments in place, which other gradients are "
            f"computed from. Make it a pure function: grad * 2, not grad.mul_(2)."
        )
    return _checked(result, grad, ctx)


def rule_behind(node: Any) -> tuple[Rule, str, Callable[[Tensor], Tensor]] | None:
    """The rule that a node of an autograd graph applies, its site, and the rule as a function of the gradient alone.

    None for other nodes, and where the input of the site needs no gradient.
    """
    call = getattr(node, "call", None)
    if not isinstance(call, _Call) or not node.needs_input_grad[1]:
        return None
    function, inputs, parameters = _formula(node)
    saved = [tensor.detach() for tensor in inputs]
    parameters = {n: v.detach() if isinstance(v, Tensor) else v for n, v in parameters.items()}
    return call.rule, call.site, lambda grad: function(grad, *saved, **parameters)


def _after(tensor: Tensor, grad: Tensor) -> Tensor:
    """The same values, as if they depended on the gradient; a mask that is to be saved as it is.

    A compiler then computes masks of them in the backward. Left to itself it computes them in the forward and saves
    them as booleans, which Inductor's code for CPUs writes one by one, ten times slower than the rest together.
    """
    if (
        grad.device.type != "cpu"
        or tensor.shape != grad.shape
        or not tensor.dtype.is_floating_point
    ):
        return tensor
    return torch.where(grad == grad, tensor, tensor)


def _versions(grad: Tensor, inputs: tuple[Tensor, ...]) -> int:
    """How often the tensors were written into, together."""
    count = 0 if grad.is_inference() else version(grad)
    for tensor in inputs:
        count += 0 if tensor.is_inference() else version(tensor)
    return count


def _coalesced(grad: Tensor, call: _Call) -> Tensor:
    """A sparse gradient with one entry for each index; raise `RuleError` where the rule wants a dense one."""
    if not call.rule.sparse or grad.layout != torch.sparse_coo:
        raise RuleError(
            f"rule {call.rule.name!r} cannot take the gradient at site {call.site!r}, whose layout is {grad.layout}. "
            f"Make it dense, nn.Embedding(..., sparse=False) say, or register the rule with sparse=True if it treats "
            f"every entry by itself and keeps zeros."
        )
    return grad.coalesce()


def _checked(result: Any, grad: Tensor, ctx: Any) -> Tensor:
    """Return a rule's result in the dtype of `x`, or raise `RuleError` where it is no gradient for `x`."""
    shape, dtype = ctx.like
    if type(result) is Tensor and result.dtype is dtype and result.shape == shape:
        return result
    rule, site = ctx.call.rule, ctx.call.site
    where = f" at site {site!r}" if site else ""
    if not isinstance(result, Tensor):
        raise RuleError(
            f"rule {rule.name!r}{where} returned {type(result).__name__}, not a tensor. "
            f"A rule returns the gradient for x; for no gradient, torch.zeros_like(grad)."
        )
    if result.shape != shape:
        raise RuleError(
            f"rule {rule.name!r}{where} returned a gradient of shape {tuple(result.shape)} "
            f"for an input of shape {tuple(shape)}; grad has shape {tuple(grad.shape)}."
        )
    if result.dtype == dtype:
        return result
    # Under autocast an operation's output may have another dtype than its input: its rule may compute in either.
    if result.dtype not in (grad.dtype, torch.promote_types(grad.dtype, dtype)):
        raise RuleError(
            f"rule {rule.name!r}{where} returned a gradient of dtype {result.dtype} for an input of dtype "
            f"{dtype}; grad has dtype {grad.dtype}. Keep the dtype: result.to(grad.dtype)."
        )
    return result.to(dtype)


# --- the operator ---


def operands(
    rule: Rule, site: str, parameters: dict[str, Any], save: str
) -> tuple[list[Any], list[Any], str]:
    """What ``freegrad_fx::decoupled`` is given behind `y` and `x`.

    Returns:
        The parameters that are neither numbers nor plain, which have to be tensors; those that are numbers, which a
        compiler may take for variables; and everything else as text, ``""`` where it cannot be written.
    """
    if not rule.token:
        return [], [], ""
    if not parameters:
        return [], [], _written(rule.token, site, save, (), ())
    found: list[dict[str, Any]] = [{}, {}, {}]
    # One loop, and no function: Dynamo goes through it for every site
    for name, value in parameters.items():
        kind = type(value)
        if kind is float or (
            kind is int and -(2**63) <= value < 2**63
        ):  # which an operator can hold
            found[1][name] = value
        elif kind in _PLAIN:
            found[2][name] = value
        else:
            found[0][name] = value
    tensors, numbers, plain = found
    names = (*tensors, *numbers, *plain)
    call = _written(rule.token, site, save, names, tuple(plain.values()))
    return [*tensors.values()], [*numbers.values()], call


_PLAIN = (bool, int, str, tuple, type(None))


# Dynamo calls it while it traces, and takes the answer for a constant
@takes_for_constant
def _written(
    token: str, site: str, save: str, names: tuple[str, ...], values: tuple[Any, ...]
) -> str:
    try:
        text = json.dumps([token, site, save, names, values, _digest()])
    except (TypeError, ValueError):  # a tuple can hold anything
        return ""
    return text if _read(text)[3:] == (names, values) else ""


def _read(call: str) -> tuple[str, str, str, tuple[str, ...], tuple[Any, ...]]:
    token, site, save, names, values, _ = json.loads(call)
    found = tuple(tuple(value) if isinstance(value, list) else value for value in values)
    return token, site, save, tuple(names), found


@functools.cache
def _digest() -> str:
    """What this package computes, as a number: a cache is to serve no other release."""
    texts = [file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:16]


def _run_operator(
    y: Tensor, x: Tensor, tensors: list[Tensor], numbers: list[int | float], call: str
) -> Tensor:
    token, site, save, names, values = _read(call)
    parameters = dict(zip(names, [*tensors, *numbers, *values], strict=True))
    return _apply(y, x, _Call(of_token(token), site, parameters, save, False))  # type: ignore[no-any-return]


# Composite: autograd, and AOTAutograd's trace of it, sees what it calls
_library: Any = torch.library.Library("freegrad_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "decoupled(Tensor y, Tensor x, Tensor[] tensors, Scalar[] numbers, str call) -> Tensor"
)
_library.impl("decoupled", _run_operator, "CompositeImplicitAutograd")
