"""Assignments to attributes of modules in a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import nn

from ..._torch.replacing import replaced
from .recorder import Recorder

__all__ = ["recorded_assignments"]


def recorded_assignments(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """Record `self.name = value` in the graph if the value is traced."""

    def recording(assign: Callable[[nn.Module, str, Any], None]) -> Callable[..., None]:
        def record(module: nn.Module, name: str, value: Any) -> None:
            if not recorder.assign(module, name, value):
                assign(module, name, value)

        return record

    return replaced(nn.Module, "__setattr__", recording)
