"""Assignments to attributes of modules in a forward."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..._torch.replacing import replaced
from ...graph.state import is_python_state
from ..proxies import any_proxy
from .recorder import Recorder

__all__ = ["noted_assignments", "recorded_assignments"]


def recorded_assignments(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """Record `self.name = value` in the graph if the value is traced."""

    def recording(assign: Callable[[nn.Module, str, Any], None]) -> Callable[..., None]:
        def record(module: nn.Module, name: str, value: Any) -> None:
            if not (any_proxy(value) and recorder.assign(module, name, value)):
                assign(module, name, value)

        return record

    return replaced(nn.Module, "__setattr__", recording)


@contextlib.contextmanager
def noted_assignments(root: nn.Module) -> Iterator[list[str]]:
    """Collect the attributes of the modules of a model whose Python values change."""
    modules = set(root.modules())
    names: list[str] = []
    # Export replaces containers by copies, so the original containers are compared
    containers = [
        (f"{type(module).__name__}.{name}", value, copy.deepcopy(value))
        for module in modules
        for name, value in module.__dict__.items()
        if type(value) in (list, dict, set) and is_python_state(value)
    ]

    def noting(assign: Callable[[nn.Module, str, Any], None]) -> Callable[..., None]:
        def note(module: nn.Module, name: str, value: Any) -> None:
            before = module.__dict__.get(name)
            python = is_python_state(value) and is_python_state(before)
            if module in modules and python and before != value:
                names.append(f"{type(module).__name__}.{name}")
            assign(module, name, value)

        return note

    try:
        with replaced(nn.Module, "__setattr__", noting):
            yield names
    finally:
        names += [n for n, now, was in containers if is_python_state(now) and now != was]
