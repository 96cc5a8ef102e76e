"""Intercepts the calls of PyTorch's functions in `use` blocks, and puts the rules around them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch.overrides import TorchFunctionMode

from .._torch.dispatch import function_mode_active
from .._torch.dynamo import is_compiling, leave_to_python
from ..context import intercepting_blocks
from ..vocabulary.recognition import may_be_recognised, recognise_call
from .arguments import with_parameters
from .observed import Observed
from .rules import run, with_argument
from .running import has_rules_already, in_one_site, running_function

__all__ = ["enter", "leave"]


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
        if not blocks:
            return func(*args, **kwargs)
        if not is_compiling():
            return _intercepted(func, args, kwargs)
        acts = may_be_recognised(func) or any(block.observed.wants_parameters for block in blocks)
        if acts and not has_rules_already():
            return _outside_of_the_graph(func, args, kwargs)
        return func(*args, **kwargs)


def _intercepted(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    observing: list[Observed] = [block.observed for block in intercepting_blocks()]
    deciding = [observed.parameter for observed in observing if observed.wants_parameters]
    if deciding:
        args, kwargs = with_parameters(deciding, func, args, kwargs)
    if in_one_site():
        return func(*args, **kwargs)
    spelling = recognise_call(func, args, kwargs)
    if spelling is None:
        for observed in observing:
            observed.opaque(func)
        return func(*args, **kwargs)
    if (function := running_function(2)) is not None:
        for observed in observing:
            observed.inside(function)
        return func(*args, **kwargs)
    for observed in observing:
        decision = observed.operation(spelling, func)
        if decision is not None and decision.entry is not None:
            if decision.action == "rewrite":
                key = spelling.key
                x = args[key] if isinstance(key, int) else kwargs[key]
                operation = with_argument(func, args, kwargs, key)
                return run(operation, x, decision, inplace=spelling.inplace)
            break
    return func(*args, **kwargs)


@leave_to_python
def _outside_of_the_graph(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """Run a call in Python: Dynamo cannot trace the search for the module that runs."""
    return _intercepted(func, args, kwargs)


_INTERCEPTION = _Interception()


@dataclass
class _Entered:
    block: Any
    classes: AbstractContextManager[Any]
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
    if pushed:
        _INTERCEPTION.__enter__()  # type: ignore[no-untyped-call]
    classes = block.observed.classes()
    classes.__enter__()
    _thread.own.entered.append(_Entered(block, classes, pushed))


def leave(block: Any) -> None:
    """End what `enter` began. Blocks that were entered later may still be in force."""
    entered = _thread.own.entered
    index = max(i for i, e in enumerate(entered) if e.block is block)
    ended = entered.pop(index)
    ended.classes.__exit__(None, None, None)
    if not ended.pushed:
        return
    later = next((e for e in entered[index:] if not e.pushed), None)
    if later is not None:
        later.pushed = True
    else:
        _INTERCEPTION.__exit__(None, None, None)  # type: ignore[no-untyped-call]
