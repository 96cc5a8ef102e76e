"""Intercepts the calls of PyTorch's functions in `use` blocks, and puts the rules around them."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch.dispatch import function_mode_active, innermost_function_mode
from .._torch.dynamo import is_compiling, leave_to_python, run_in_python, takes_for_constant
from ..context import intercepting_blocks, left_alone, programs
from ..ops.comparisons import input_of_step
from ..ops.gradients import noted
from ..sites.merged import MERGED
from ..sites.site import REPLACE
from ..vocabulary.op import Spelling
from ..vocabulary.recognition import may_be_recognised, recognise_call
from .arguments import with_parameters
from .comparisons import difference_of, may_be_a_step, note_comparison
from .merged import run_layer, run_norm
from .operands import used_call
from .parameters import parameter_dims
from .rules import Decisions, rules_act, run, to_rewrite, with_argument, with_edges
from .running import has_rules_already, in_one_site
from .sites import EagerSites

__all__ = ["enter", "leave", "resuming", "unintercepted"]


class _Interception(TorchFunctionMode):
    """Passes each call of a function of PyTorch to the blocks that are in force in this thread."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        blocks = intercepting_blocks()
        if not is_compiling():
            return _intercepted(blocks, func, args, kwargs) if blocks else func(*args, **kwargs)
        if not blocks:
            _tell_programs()
            return func(*args, **kwargs)
        observing = [block.observed for block in blocks]
        on_demand = _on_demand(observing)
        acts = (
            may_be_recognised(func, on_demand)
            or ("comparison" in on_demand and may_be_a_step(func))
            or any(observed.wants_parameters for observed in observing)
        )
        if acts and not has_rules_already():
            return _outside_of_the_graph(func, args, kwargs)
        return func(*args, **kwargs)


# Behind a graph break, Dynamo would compile it by itself, as if it traced the code that makes the call
run_in_python(_Interception.__torch_function__.__code__)


def _intercepted(
    blocks: tuple[Any, ...],
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    observing: list[EagerSites] = [block.observed for block in blocks]
    deciding = [observed for observed in observing if observed.wants_parameters]
    # What takes the place of a parameter cannot be told from other tensors
    on_demand = _on_demand(observing)
    if func is torch.einsum and on_demand:
        args = _without_list(args)
    spelling = recognise_call(func, args, kwargs, on_demand, parameter_dims)
    if deciding:
        args, kwargs = with_parameters(deciding, func, args, kwargs)
    if in_one_site():
        return func(*args, **kwargs)
    if "comparison" in on_demand and may_be_a_step(func):
        comparing = [o for o in observing if "comparison" in o.on_demand]
        found = difference_of(func, args, kwargs)
        if found is not None or spelling is None:
            return _step(comparing, found, func, args, kwargs)
    if spelling is None:
        opaque = [observed.opaque(func) for observed in observing]
        if not any(opaque):
            return func(*args, **kwargs)
        return observing[-1].run(lambda: func(*args, **kwargs))
    given = observing, spelling, func, args, kwargs
    if spelling.op.name in MERGED and MERGED[spelling.op.name] in on_demand:
        return run_layer(*given, functools.partial(_operation, observing, spelling, func))
    if spelling.op.name == "batch_norm" and not on_demand.isdisjoint(MERGED.values()):
        return run_norm(*given, functools.partial(_operation, observing, spelling, func))
    return _operation(*given)[0]


def _operation(
    observing: list[EagerSites],
    spelling: Spelling,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[Any, list[Decisions | None]]:
    """Run a call of an op with the rules of the blocks, and return also what they decided."""
    op = spelling.op
    asking = [o for o in observing if op.name in o.on_demand] if op.on_demand else observing
    asked = [observed.operation(spelling, func, args, kwargs) for observed in asking]
    decisions = to_rewrite(asked)
    if not decisions:
        return observing[-1].run(lambda: func(*args, **kwargs)), asked
    key = spelling.key
    x = args[key] if isinstance(key, int) else kwargs[key]
    if len(spelling.found) > 1:
        inplace = spelling.inplace
        args, kwargs = with_edges(spelling.found, args, kwargs, decisions, inplace=inplace)
        other = {operand.name for operand in spelling.found[1:]}
        decisions = {at: d for at, d in decisions.items() if at not in other}
    used, native, replaces = None, None, decisions.get(REPLACE)
    if replaces is not None and replaces.uses_operands and rules_act():
        used = used_call(spelling, func, args, kwargs, replaces)
        if used is not None and used.native:
            used, native = None, used
            decisions = {at: d for at, d in decisions.items() if at != REPLACE}
        args, kwargs = (args, kwargs) if used is None else (used.args, used.kwargs)
    operation = with_argument(func, args, kwargs, key)
    inplace = spelling.inplace
    result = observing[-1].run(lambda: run(operation, x, decisions, inplace=inplace, used=used))
    if native is not None and replaces is not None and not decisions:
        result = noted(result, x, replaces.rules[0], native.operation, native.operands)
    return result, asked


def _without_list(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of `einsum` with the operands one by one."""
    listed = len(args) == 2 and isinstance(args[1], list | tuple)
    return (args[0], *args[1]) if listed else args


def _on_demand(observing: list[EagerSites]) -> frozenset[str]:
    """The ops that the tables of some blocks name among those that are sites only then, and the parts of these."""
    if len(observing) == 1:
        return observing[0].looks_at
    return frozenset().union(*(observed.looks_at for observed in observing))


def _step(
    comparing: list[EagerSites],
    found: tuple[Spelling, Tensor] | None,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Run a call that compares, or that converts the result of a comparison into numbers."""
    if found is None:
        result = comparing[-1].run(lambda: func(*args, **kwargs))
        note_comparison(func, args, kwargs, result)
        return result
    spelling, difference = found
    decisions = to_rewrite([o.operation(spelling, func, args, kwargs) for o in comparing])
    result = comparing[-1].run(lambda: func(*args, **kwargs))
    if not decisions:
        return result
    x = input_of_step(difference, result)
    return comparing[-1].run(lambda: run(lambda _: result, x, decisions, inplace=False))


@takes_for_constant
def _tell_programs() -> None:
    for block in programs():
        block.observed.traced()


@leave_to_python
def _outside_of_the_graph(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run a call in Python: Dynamo cannot trace the search for the module that runs."""
    return _intercepted(intercepting_blocks(), func, args, kwargs)


_INTERCEPTION = _Interception()


@dataclass
class _Entered:
    block: Any
    classes: AbstractContextManager[Any] | None  # None if the thread is in the block already
    pushed: bool


class _Pushed:
    """Ends the interception of a thread that ends inside of a block; PyTorch would abort the process."""

    def __init__(self) -> None:
        self.entered: list[_Entered] = []

    def __del__(self) -> None:
        # At the end of the program the module may be gone already
        if _INTERCEPTION is not None and any(entered.pushed for entered in self.entered):
            _INTERCEPTION.__exit__(None, None, None)  # type: ignore[no-untyped-call]


class _Thread(threading.local):
    def __init__(self) -> None:
        self.own = _Pushed()


_thread = _Thread()


def enter(block: Any) -> None:
    """Begin to intercept the calls of this thread for a block."""
    pushed = not function_mode_active(_INTERCEPTION)
    classes = None
    # A backward inside of the block runs a checkpoint again, which enters it again
    if all(entered.block is not block for entered in _thread.own.entered):
        classes = block.observed.classes()
        classes.__enter__()
    # The last steps, so that nothing remains if one before fails
    if pushed:
        _INTERCEPTION.__enter__()  # type: ignore[no-untyped-call]
    _thread.own.entered.append(_Entered(block, classes, pushed))


def leave(block: Any) -> None:
    """End what `enter` began. Blocks that were entered later may still be in force."""
    entered = _thread.own.entered
    index = len(entered) - 1
    while entered[index].block is not block:
        index -= 1
    ended = entered.pop(index)
    if ended.classes is not None:
        remaining = next((e for e in entered if e.block is block), None)
        if remaining is None:
            ended.classes.__exit__(None, None, None)
        else:
            remaining.classes = ended.classes
    if not ended.pushed:
        return
    later = next((e for e in entered[index:] if not e.pushed), None)
    if later is not None:
        later.pushed = True
    else:
        _INTERCEPTION.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def resuming(block: Any) -> Callable[[], AbstractContextManager[Any]]:
    """A function that returns a context in which code runs again as it runs now, in a block."""
    here = block.observed.here()

    @contextmanager
    def again() -> Iterator[None]:
        with block.observed.resumed(here):
            enter(block)
            try:
                yield
            finally:
                leave(block)

    return again


def unintercepted(call: Callable[[], Any]) -> Any:
    """Call a function whose calls of PyTorch no block intercepts."""
    if innermost_function_mode() is not _INTERCEPTION:
        with left_alone():
            return call()
    # Calls are faster without the mode
    _INTERCEPTION.__exit__(None, None, None)
    try:
        return call()
    finally:
        _INTERCEPTION.__enter__()
