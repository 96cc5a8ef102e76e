"""Tells of threads that run, without rules, what a block gives rules to.

A block acts in the thread that enters it. A thread that is started in a block is watched: Python offers no way to see
what threads that exist already do.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch.dynamo import is_compiling, run_in_python
from .._torch.replacing import replace_for_good
from ..context import deciding_blocks, in_a_block, require_own_blocks
from ..errors import FreegradWarning
from ..vocabulary.recognition import recognise_call
from .running import running_function, running_modules

__all__ = ["watch_threads"]


class _Watch(TorchFunctionMode):
    """Watches the calls of a thread that was started in blocks."""

    def __init__(self, blocks: Sequence[Any]) -> None:
        super().__init__()
        self.blocks = blocks

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not is_compiling():
            for block in self.blocks:
                if block.watched:
                    _look(block, func, args, kwargs)
        return func(*args, **kwargs)


run_in_python(_Watch.__torch_function__.__code__)


def _look(
    block: Any, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Warn if a block gives a rule to a call that runs in a thread without blocks."""
    given = (*args, *kwargs.values())
    if not any(isinstance(value, Tensor) and value.requires_grad for value in given):
        return
    if in_a_block():
        return
    function = running_function()
    if not (torch.is_grad_enabled() or function is not None):
        return
    spelling = recognise_call(func, args, kwargs)
    modules = [running.module for running in running_modules(in_functions=True) or ()]
    if not block.observed.gives_rules_to(spelling, function, given, modules):
        return
    require_own_blocks()  # as in `asyncio.to_thread`, which copies the context of the task
    block.warned = True
    name = threading.current_thread().name
    warnings.warn(
        f"the thread {name!r}, which was started in a use() block, runs what the block gives rules to, and runs it "
        f"without rules: a block acts only in the thread that enters it. Enter the block in that thread, around the "
        f"call of the model. For DataParallel, transform the model instead: a replica of transform(model, rules) has "
        f"its rules in every thread.",
        FreegradWarning,
        stacklevel=3,
    )


@functools.cache
def watch_threads() -> None:
    """Watch, from now on, the threads that are started in blocks."""
    start = threading.Thread.start

    @functools.wraps(start)
    def started(thread: threading.Thread) -> None:
        if blocks := deciding_blocks():
            run = thread.run

            def watched() -> None:
                del thread.run
                with _Watch(blocks):
                    run()

            thread.run = watched  # type: ignore[method-assign]
        start(thread)

    replace_for_good(threading.Thread, "start", started)
