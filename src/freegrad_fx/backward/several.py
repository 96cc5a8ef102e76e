"""The `torch.autograd.Function` of rules that answer for several values: operands, and parameters of their own.

The operands that the rule does not answer for keep their native gradient: only the others are detached before the
operation. Rules that answer for one operand take the faster way of `functions`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._torch.dispatch import without_dead_transform
from .._torch.dynamo import is_compiling
from .._torch.functions import direct_apply
from ..core.contract import OPERATION
from ..core.declaration import Declaration
from ..core.lean import KEPT, Lean
from ..core.rule import Rule
from ..errors import RuleError
from .again import Operands
from .functions import (
    Call,
    blame_parameters,
    blame_shapes,
    checked,
    coalesced,
    explain,
    parameter_versions,
    refuse_writes,
    tell,
    versions,
)
from .keeping import kept_again, saved_of
from .native import Native, autocast_of_now
from .observing import Observer
from .once import differentiated_once

__all__ = [
    "answers_for_several",
    "apply_composable",
    "apply_several",
    "rule_of_several",
    "several_behind",
]


def answers_for_several(declaration: Declaration, parameters: Mapping[str, Any]) -> bool:
    """Whether a rule with these parameters answers for more than the first operand, or returns a dict."""
    if not declaration.learns:  # nearly every call
        return declaration.several
    return declaration.several or any(_learns(parameters[name]) for name in declaration.learns)


def _learns(value: Any) -> bool:
    # `requires_grad` is not reliable under Dynamo and for tensors of transforms
    return isinstance(value, Tensor) and (
        is_compiling() or type(value) is not Tensor or value.requires_grad
    )


class _Layout:
    """How a call uses the tensors that its Function gets, besides ``y``: first those that can get a gradient.

    Attributes:
        rule: The rule.
        site: The name of the site.
        plain: The parameters that are no tensors.
        answers: The operands that the rule answers for.
        learnt: The parameters that are tensors.
        reads: For each value that the formula reads, its place among the tensors; None for a missing operand, -1 for y.
        operation: The canonical name of the operation.
        present: The operands that the call of the operation has.
        constants: The further arguments of the operation.
        lean: The form of the rule that is used instead of its formula, or None.
        observers: Who observes the gradient of the first value that the rule answers for.
    """

    def __init__(
        self,
        rule: Rule,
        site: str,
        plain: dict[str, Any],
        answers: tuple[str, ...],
        learnt: tuple[str, ...],
        reads: tuple[tuple[str, int | None], ...],
        operation: str,
        present: tuple[str, ...],
        constants: Mapping[str, Any],
        lean: Lean | None,
        observers: tuple[Observer, ...],
    ) -> None:
        self.rule = rule
        self.site = site
        self.plain = plain
        self.answers = answers
        self.learnt = learnt
        self.reads = reads
        self.operation = operation
        self.present = present
        self.constants = constants
        self.lean = lean
        self.observers = observers


def _laid_out(
    call: Call, operands: Operands, read: Tensor | None, lean: Lean | None = None
) -> tuple[_Layout, list[Tensor]]:
    """Arrange the tensors of a call, for the formula of the rule or for its lean form.

    Raises:
        RuleError: The rule needs an operand that the operation does not have.
    """
    declaration = call.rule.declaration
    values = dict(operands.values)
    first = next(iter(values))
    values.setdefault("x", values[first])  # a formula of `x` is for the first operand
    answers = declaration.answers or ("x",)
    for name in (*answers, *declaration.inputs):
        if name != "y" and name not in values:
            of = f", {operands.operation!r}," if operands.operation else ""
            raise RuleError(
                f"rule {call.rule.name!r} needs the operand {name!r}, but the operation{of} at site {call.site!r} has "
                f"only: {', '.join(operands.values)}. Give the rule to an operation with this operand."
            )
    answers = tuple(name for name in answers if values[name] is not None)
    learnt = tuple(n for n, v in call.parameters.items() if isinstance(v, Tensor))
    plain = {n: v for n, v in call.parameters.items() if n not in learnt}
    tensors: list[Any] = [*(values[n] for n in answers), *(call.parameters[n] for n in learnt)]
    reads: list[tuple[str, int | None]] = []
    for name in declaration.inputs if lean is None else lean.uses:
        place: int | None
        if name == "y" or (name == "x" and call.save == "y"):
            place = -1
        elif values[name] is None:
            place = None
        elif name in answers and (read is None or name not in ("x", first)):
            place = answers.index(name)
        else:
            place = len(tensors)
            tensors.append(values[name] if read is None or name not in ("x", first) else read)
        reads.append((name, place))
    present = tuple(name for name, value in operands.values.items() if value is not None)
    layout = _Layout(
        call.rule,
        call.site,
        plain,
        answers,
        learnt,
        tuple(reads),
        operands.operation,
        present,
        operands.constants,
        lean,
        call.observers,
    )
    return layout, tensors


def apply_several(y: Tensor, operands: Operands, call: Call, read: Tensor | None) -> Tensor:
    """Return the values of `y`; in the backward, the rule computes the gradients. For eager mode.

    Args:
        y: The output of the operation, computed from its operands; those that the rule answers for are detached.
        operands: The operation with its operands, which are not detached.
        call: The rule, with its parameters.
        read: The tensor that the rule reads as the first operand, with the same values; None for the operand itself.
    """
    layout, tensors = _laid_out(call, operands, read, call.rule.declaration.lean)
    alive = map(without_dead_transform, tensors)
    return _apply(without_dead_transform(y), layout, *alive)  # type: ignore[no-any-return]


def apply_composable(y: Tensor, operands: Operands, call: Call, read: Tensor | None) -> Tensor:
    """`apply_several` for transforms of torch.func, and for Dynamo, which traces it."""
    layout, tensors = _laid_out(call, operands, read)
    return _Composable.apply(y, layout, *tensors)  # type: ignore[no-any-return, no-untyped-call]


class _Several(torch.autograd.Function):
    """Forward: `y`. Backward: a rule computes the gradients of operands and of its own parameters."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, layout: _Layout, *tensors: Tensor) -> Tensor:
        output = y.detach()
        _save(ctx, layout, output, tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, *_gradients(ctx, grads[0])


_apply = direct_apply(_Several)


class _Composable(torch.autograd.Function):
    """`_Several` for transforms of `torch.func`. It is several times slower."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        # If no input requires a gradient, Dynamo calls it with a context before `y`
        y = inputs[0] if isinstance(inputs[0], Tensor) else inputs[1]
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, layout, *tensors = inputs
        _save(ctx, layout, output, tuple(tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, *_gradients(ctx, grads[0])


def _save(ctx: Any, layout: _Layout, output: Tensor, tensors: tuple[Tensor, ...]) -> None:
    answers, learnt = len(layout.answers), len(layout.learnt)
    ctx.layout = layout
    ctx.like = [(tensor.shape, tensor.dtype) for tensor in tensors[: answers + learnt]]
    values = tensors[answers : answers + learnt]
    described = _call(layout, values)
    ctx.values, ctx.versions = values, parameter_versions(described, list(layout.learnt))
    if layout.rule.declaration.operation:
        ctx.autocast = autocast_of_now(output.device.type)
    # The output is saved as `y`: a double backward then differentiates the rule, not the operation
    read = {n: output if p == -1 else tensors[p] for n, p in layout.reads if p is not None}
    if layout.lean is not None:
        read = _kept(ctx, layout, layout.lean, read, described)
    ctx.save_for_backward(*read.values(), *values)


def _kept(
    ctx: Any, layout: _Layout, lean: Lean, read: dict[str, Tensor], call: Call
) -> dict[str, Tensor]:
    """The tensors that the lean form of a rule saves. The other values that it keeps become attributes of `ctx`."""
    ctx.kept, ctx.once = (), False
    needs = _needs(ctx, layout)
    if not needs:
        return {}
    arguments: dict[str, Any] = {name: read.get(name) for name in lean.reads}
    if layout.rule.declaration.operation:
        arguments[OPERATION] = _native(ctx, layout, read, needs)
    values = lean.keep(**arguments, **call.parameters)
    known = tuple(layout.constants.values())
    saved, ctx.kept, ctx.once = saved_of(values, lean, read, known)
    return saved


def _needs(ctx: Any, layout: _Layout) -> frozenset[str]:
    """The operands that a rule answers for and whose gradient is needed."""
    needed = zip(layout.answers, ctx.needs_input_grad[2:], strict=False)
    return frozenset(name for name, needs in needed if needs)


def _native(ctx: Any, layout: _Layout, known: Mapping[str, Any], needs: frozenset[str]) -> Native:
    return Native(
        layout.operation,
        {n: v for n, v in known.items() if n != "y"},
        layout.present,
        layout.constants,
        ctx.autocast,
        f"rule {layout.rule.name!r} at site {layout.site!r}",
        needs,
    )


def _call(layout: _Layout, values: tuple[Tensor, ...]) -> Call:
    parameters = {**layout.plain, **dict(zip(layout.learnt, values, strict=True))}
    return Call(layout.rule, layout.site, parameters, "x", False, layout.observers)


def _gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Compute the gradients of all tensors of the Function besides ``y``."""
    layout: _Layout = ctx.layout
    needs: tuple[bool, ...] = tuple(ctx.needs_input_grad[2:])
    found: list[Tensor | None] = [None] * len(needs)
    count = len(layout.answers)
    names = (*layout.answers, *layout.learnt)
    if not any(needs[: len(names)]):
        return found
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        blame_parameters(_call(layout, ctx.values), ctx.versions, error)
        raise
    held = len(saved) - len(layout.learnt)
    call = _call(layout, saved[held:])
    tensors = iter(saved[:held])
    lean = layout.lean
    names_saved = [n for n, _ in layout.reads] if lean is None else lean.saves
    present = {n for n, p in layout.reads if p is not None}
    inputs = {name: next(tensors) if name in present else None for name in names_saved}
    if not is_compiling() and grad.layout is not torch.strided:
        grad = coalesced(grad, call)
    declaration = layout.rule.declaration
    arguments: dict[str, Any] = {**inputs, **call.parameters}
    if declaration.operation:
        arguments[OPERATION] = _native(ctx, layout, inputs, _needs(ctx, layout))
    formula: Callable[..., Any] = declaration.function
    if lean is not None:
        arguments[KEPT] = kept_again(ctx.kept, tensors)
        formula = lean.formula
    counts = not (declaration.own or is_compiling())
    before = versions(grad, saved) if counts else 0
    try:
        results: dict[str, Any] | None = None
        for place, name in enumerate(names):
            if not needs[place]:
                continue
            function = declaration.learns.get(name) if place >= count else None
            if function is not None:
                result: Any = function(grad, **arguments)
            elif place >= count and name not in declaration.learns:
                continue  # no gradient is defined
            else:
                if results is None:
                    results = _results(formula(grad, **arguments), layout, call)
                if name not in results:
                    raise RuleError(_missing(name, results, call))
                result = results[name]
                result = result() if callable(result) else result
            found[place] = _fitted(result, grad, ctx.like[place], call, name)
    except RuleError:
        raise
    except Exception as error:
        if is_compiling():
            if not torch.compiler.is_dynamo_compiling():
                explain(error, call)
        elif isinstance(error, RuntimeError):
            blame_shapes(call, grad, error)
        raise
    if counts and before != versions(grad, saved):
        refuse_writes(call)
    if call.observers and found[0] is not None:
        tell(call, found[0])
    if lean is not None and ctx.once and torch.is_grad_enabled() and not is_compiling():
        where = f"rule {layout.rule.name!r} at site {layout.site!r}"
        return [
            None if gradient is None else differentiated_once(gradient, where) for gradient in found
        ]
    return found


def rule_of_several(node: Any) -> tuple[Rule, str] | None:
    """`rule_of` for the nodes of this module."""
    layout = getattr(node, "layout", None)
    return (layout.rule, layout.site) if isinstance(layout, _Layout) else None


def several_behind(node: Any) -> tuple[Rule, str, Callable[[Tensor], Tensor]] | None:
    """`rule_behind` for the nodes of this module. The function returns the gradients of all operands as one vector."""
    layout = getattr(node, "layout", None)
    if not isinstance(layout, _Layout):
        return None
    count = len(layout.answers)
    needs = tuple(node.needs_input_grad)
    if not any(needs[2 : 2 + count]):
        return None
    alone = types.SimpleNamespace(**vars(node))
    alone.saved_tensors = [tensor.detach() for tensor in node.saved_tensors]
    alone.needs_input_grad = (*needs[: 2 + count], *(False for _ in needs[2 + count :]))

    def gradients(grad: Tensor) -> Tensor:
        found = _gradients(alone, grad)
        return torch.cat([gradient.flatten() for gradient in found if gradient is not None])

    return layout.rule, layout.site, gradients


def _results(returned: Any, layout: _Layout, call: Call) -> dict[str, Any]:
    """What a formula returned, by the names of the values that get it as their gradient."""
    declaration = layout.rule.declaration
    answers = declaration.answers or ("x",)
    if not isinstance(returned, Mapping):
        return {answers[0]: returned}
    for name in returned:
        if name not in answers and name not in declaration.learns:
            raise RuleError(
                f"rule {call.rule.name!r} at site {call.site!r} returned a gradient for {name!r}, for which it is not "
                f"registered. Name it in answers= if it is an operand, in learns= if it is a parameter."
            )
    return dict(returned)


def _missing(name: str, results: Mapping[str, Any], call: Call) -> str:
    option = "learns" if name in call.rule.declaration.learns else "answers"
    return (
        f"rule {call.rule.name!r} at site {call.site!r} returned no gradient for {name!r}, only for: "
        f"{', '.join(results) or 'nothing'}. Return a dict that contains it; or leave {name!r} out of {option}=, and "
        f"{'it gets no gradient' if option == 'learns' else 'it keeps its native gradient'}."
    )


def _fitted(
    result: Any, grad: Tensor, like: tuple[torch.Size, torch.dtype], call: Call, name: str
) -> Tensor:
    """A gradient, summed over the dimensions in which its value was broadcast, as autograd does it."""
    shape, dtype = like
    if isinstance(result, Tensor) and result.shape != shape and _broadcasts(shape, result.shape):
        result = result.sum_to_size(shape)
    if name in call.rule.declaration.learns and isinstance(result, Tensor):
        result = result.to(dtype)  # a sum is computed in at least single precision
    return checked(result, grad, like, call, name)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    ends = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wide) for size, wide in ends)
