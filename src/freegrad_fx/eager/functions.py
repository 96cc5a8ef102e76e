"""Intercepts the calls of `torch.autograd.Function` classes.

Those that a table selects are sites, also through a stored ``apply``. All of them take parameters that have rules.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from .._torch.dynamo import is_compiling, leave_to_python
from .._torch.functions import (
    Finish,
    Function,
    applied_by,
    is_recorded,
    own_backward,
    with_backward,
    with_results,
)
from ..context import intercepting_blocks, left_alone
from ..core.rule import learnt_by
from ..errors import RuleError
from ..plan import Decision
from ..sites.site import OUTPUT, REPLACE
from .arguments import with_parameters
from .parameters import is_parameter
from .rules import (
    Decisions,
    gradients_by,
    is_differentiable,
    replaced_forward,
    require_tensor,
    to_rewrite,
)
from .running import has_rules_already, looks_for_sites, running_modules

__all__ = ["calls_of_functions", "parameters_of_functions"]


_PACKAGE = __name__.partition(".")[0]

_OF_GRAPHS = (f"{_PACKAGE}.", "torch._")
"""The modules of Functions that rules and compilers apply: the parameters of a graph have their rules in it."""


class Decides(Protocol):
    """What is needed of what a block sees."""

    def function_call(self, function: Function) -> Decisions | None:
        """The decisions for the `apply` that runs now."""


def calls_of_functions(
    functions: Iterable[Function], decides: Decides
) -> AbstractContextManager[None]:
    """A context in which every `apply` of some Functions, and of those derived from them, is a site of a block."""

    def applied(
        function: Function, inputs: Sequence[Any], compute: Callable[[], Any]
    ) -> tuple[Any, Finish | None]:
        looks = looks_for_sites(decides)
        decisions = to_rewrite([decides.function_call(function) if looks else None])
        position = _position(inputs) if decisions else None
        if not decisions or position is None:
            return compute(), None
        x = inputs[position]
        _note_learning(decisions, function, x)
        forward = decisions[REPLACE].forward if REPLACE in decisions else None
        result = compute() if forward is None else replaced_forward(forward, x)
        require_tensor(result, next(iter(decisions.values())).site.name)

        def finish(ctx: Any) -> None:
            if any(value is x for value in getattr(ctx, "dirty_tensors", None) or ()):
                raise RuleError(
                    f"{function.__name__} writes into its input, and a rule in a block would read the input after the "
                    f"write, at site {next(iter(decisions.values())).site.name!r}. Give it None, or let it return a "
                    f"new tensor."
                )
            with_backward(ctx, _Backward(function, decisions, position, x, result, ctx))

        return result, finish

    return with_results(functions, applied)


def _position(inputs: Sequence[Any]) -> int | None:
    """The position of the `x` of the rules among the inputs: the first tensor that is no buffer of a running module."""
    places = [i for i, value in enumerate(inputs) if is_differentiable(value)]
    if not places or inputs[places[0]].requires_grad:
        return places[0] if places else None
    modules = (running.module for running in running_modules() or ())
    buffers = {id(buffer) for module in modules for buffer in module.buffers()}
    return next((i for i in places if id(inputs[i]) not in buffers), places[0])


class _Thread(threading.local):
    """The rules of the `apply` that runs now which give a gradient to their parameters, with its input."""

    learning: list[tuple[Decision, Tensor]] | None = None


_thread = _Thread()


def _note_learning(decisions: Decisions, function: Function, x: Tensor) -> None:
    """Note a rule that gives a gradient to its parameters, which are no inputs of the Function.

    Raises:
        RuleError: The rule is at a place where its parameters cannot be connected to the result.
    """
    for at, decision in decisions.items():
        names = [name for rule in decision.rules for name in rule.learnt]
        if not names:
            continue
        where = f"rule {decision.rules[0].name!r} at site {decision.site.name!r}"
        if at != REPLACE or len(decisions) > 1:
            raise RuleError(
                f"{where} gives a gradient to its parameter {', '.join(names)}, which is possible in a block only if "
                f"it replaces the backward of {function.__name__} and no other rule is at the call. Transform the "
                f"model, transform(model, rules); or give a tensor with requires_grad=False."
            )
        if _thread.learning is None:
            raise RuleError(
                f"{where} gives a gradient to its parameter {', '.join(names)}, but the call is to a stored "
                f"{function.__name__}.apply: a block connects the parameter only where {function.__name__}.apply is "
                f"looked up. Call {function.__name__}.apply there, or transform the model: transform(model, rules)."
            )
        _thread.learning.append((decision, x))


class _Learnt(torch.autograd.Function):
    """Returns the result of a call; in the backward, its rules compute the gradients of what they learn."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, decision: Decision, *learnt: Tensor) -> Tensor:
        ctx.decision = decision
        ctx.save_for_backward(x, y)
        return y.clone()  # the program can write into it

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, y = ctx.saved_tensors
        decision: Decision = ctx.decision
        _, *found = gradients_by(decision.rules, y.detach(), x, grads[0], decision.site.name)
        return grads[0], None, None, *found


def parameters_of_functions() -> AbstractContextManager[None]:
    """A context in which every `apply` takes parameters with the rules of the blocks in force."""
    return applied_by(_apply, _require_rules, but=_PACKAGE)


def _apply(apply: Callable[..., Any], function: Function, args: tuple[Any, ...]) -> Any:
    if not is_compiling():
        return _with_rules(apply, function, args)
    if not intercepting_blocks() or has_rules_already():
        return apply(*args)
    return _outside_of_the_graph(apply, function, args)


@leave_to_python
def _outside_of_the_graph(
    apply: Callable[..., Any], function: Function, args: tuple[Any, ...]
) -> Any:
    return _with_rules(apply, function, args)


def _with_rules(apply: Callable[..., Any], function: Function, args: tuple[Any, ...]) -> Any:
    if not function.__module__.startswith(_OF_GRAPHS):
        observing = [block.observed for block in intercepting_blocks()]
        deciding = [observed for observed in observing if observed.wants_parameters]
        with left_alone():  # the rules are Functions and functions of PyTorch, too
            args, _ = with_parameters(deciding, apply, args, {})
        return _connected(apply, args)
    return apply(*args)


def _connected(apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call `apply`, and connect the parameters that the rules of the call learn to its result."""
    outer, _thread.learning = _thread.learning, []
    try:
        result = apply(*args)
        noted = _thread.learning
    finally:
        _thread.learning = outer
    with left_alone():
        for decision, x in noted:
            result = _Learnt.apply(result, x, decision, *learnt_by(decision.rules))  # type: ignore[no-untyped-call]
    return result


def _require_rules(function: Function, ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Raise `RuleError` if a Function takes a parameter that has rules, but takes it without them."""
    if is_compiling():
        return
    for value, needed in zip(inputs, ctx.needs_input_grad, strict=False):
        if not is_parameter(value):
            continue
        for block in intercepting_blocks():
            observed = block.observed
            decision = observed.wants_parameters and observed.parameter_decision(value)
            if not decision or decision.entry is None:
                continue
            gets_a_gradient = needed and is_recorded(ctx)
            if decision.action == "rewrite" and (gets_a_gradient or decision.forward is not None):
                name = function.__name__
                raise RuleError(
                    f"the parameter {decision.site.name!r} has a rule and is given to {name}.apply, which was stored "
                    f"before the block was entered: a block sees the parameters only where {name}.apply is looked up. "
                    f"Call {name}.apply where the parameter is used, or transform the model: transform(model, rules)."
                )
            break


class _Backward:
    """The backward of one `apply`: the rules for one input, the Function's own for the others.

    What the rules read is saved after what the Function saves, so that it lives as long, checkpoints recompute it, and
    a change in place is noticed.
    """

    def __init__(
        self,
        function: Function,
        decisions: Decisions,
        position: int,
        x: Tensor,
        y: Tensor,
        ctx: Any,
    ) -> None:
        self.function, self.decisions, self.position = function, decisions, position
        own = getattr(ctx, "to_save", None) or ()
        self.own = len(own)
        output = [decisions[OUTPUT]] if OUTPUT in decisions else []
        of_input = [decision for at, decision in decisions.items() if at != OUTPUT]
        self.reads_x = any(decision.reads("x") for decision in of_input)
        self.reads_y = any(decision.reads("y") for decision in decisions.values())
        self.reads_y = self.reads_y or any(decision.reads("x") for decision in output)
        # Each of these attributes is a call that the blocks see
        self.like = None if self.reads_x else (x.shape, x.dtype, x.device)
        self.like_result = None if self.reads_y else (y.shape, y.dtype, y.device)
        read = [*([x] if self.reads_x else []), *([y] if self.reads_y else [])]
        if read:
            ctx.save_for_backward(*own, *read)

    def __call__(self, ctx: Any, *grads: Any) -> Any:
        needed = list(ctx.needs_input_grad)
        given: list[Any] = [None] * len(needed)
        read = list(ctx.saved_tensors[self.own :]) if self.reads_x or self.reads_y else []
        x = _absent(*self.like) if self.like else read.pop(0)
        y = _absent(*self.like_result) if self.like_result else read.pop(0).detach()
        replaces = self.decisions.get(REPLACE)
        grad, *further = grads
        for decision in (d for at, d in self.decisions.items() if at == OUTPUT):
            grad = gradients_by(decision.rules, y, y, grad, decision.site.name)[0]
        others = any(need for i, need in enumerate(needed) if i != self.position)
        if replaces is None or (replaces.forward is None and others):
            own = own_backward(self.function)(_OwnContext(ctx, self.own), grad, *further)
            given = list(own) if isinstance(own, tuple) else [own]
        if not needed[self.position]:
            return tuple(given)
        if replaces is not None:
            given[self.position] = gradients_by(replaces.rules, y, x, grad, replaces.site.name)[0]
        for at, decision in self.decisions.items():
            native = given[self.position]
            if at not in (REPLACE, OUTPUT) and native is not None:
                name = decision.site.name
                given[self.position] = gradients_by(decision.rules, x, x, native, name)[0]
        return tuple(given)


def _absent(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a shape that no rule reads; it takes the memory of one entry."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


class _OwnContext:
    """The context as the Function's own backward sees it: with the tensors that the Function saved."""

    _ctx: Any
    _saved: int

    def __init__(self, ctx: Any, saved: int) -> None:
        self.__dict__["_ctx"], self.__dict__["_saved"] = ctx, saved

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that the Function saved."""
        saved: tuple[Tensor, ...] = self._ctx.saved_tensors
        return saved[: self._saved]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_ctx"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_ctx"], name, value)
