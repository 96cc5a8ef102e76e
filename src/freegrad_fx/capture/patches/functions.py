"""Calls of a user's `torch.autograd.Function`: one node in a symbolic trace, an error in an export."""

from __future__ import annotations

import contextlib
from typing import Any

from ..._torch.functions import Function, functions_answered_by
from ...errors import CaptureError
from ...ops.functions import apply_function, function_key
from ..proxies import any_proxy
from .recorder import Recorder, with_proxies

__all__ = ["recorded_functions", "refused_functions"]


def recorded_functions(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """Record a call of a user's `autograd.Function` as one node. Traced into, it would lose its backward."""

    def record(function: Function, args: tuple[Any, ...]) -> Any:
        args, _ = with_proxies(recorder, args, {})
        if not any_proxy(args):
            return NotImplemented
        key = function_key(function)
        return recorder.create_proxy("call_function", apply_function, (key, *args), {})

    return functions_answered_by(record)


def refused_functions() -> contextlib.AbstractContextManager[None]:
    """Raise `CaptureError` at a call of a user's `autograd.Function`, whose backward export would drop silently."""

    def refuse(function: Function, _: tuple[Any, ...]) -> Any:
        if function.__module__.partition(".")[0] in ("torch", __name__.partition(".")[0]):
            return NotImplemented
        raise CaptureError(
            f"the model calls the autograd.Function {function.__qualname__}, whose backward torch.export drops. "
            f"Transform the model without example_inputs, because symbolic tracing keeps such calls. If the model "
            f"cannot be traced symbolically, use freegrad_fx.compile(model, rules), which keeps them too."
        )

    return functions_answered_by(refuse)
