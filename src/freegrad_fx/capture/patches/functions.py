"""Calls of a user's `torch.autograd.Function`: one node in a symbolic trace, an error in an export."""

from __future__ import annotations

import contextlib
from typing import Any

from torch.utils.checkpoint import CheckpointFunction

from ..._torch.functions import Function, functions_answered_by
from ...ops.functions import apply_function, function_key
from ..proxies import any_proxy
from ..refusal import NotExportedError
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


_LOST_WITH_THEIR_BACKWARD = (
    "torch.utils.checkpoint",
    "torch.nn.parallel",
    "torch.distributed",
    "torch.ao",
)


def refused_functions() -> contextlib.AbstractContextManager[None]:
    """Raise `NotExportedError` at a call of an `autograd.Function`, whose backward export would drop silently."""

    def refuse(function: Function, _: tuple[Any, ...]) -> Any:
        home = function.__module__
        ours = home.partition(".")[0] in ("torch", __name__.partition(".")[0])
        if ours and not home.startswith(_LOST_WITH_THEIR_BACKWARD):
            return NotImplemented  # those of modules with backward hooks are reported as lost hooks
        if home == CheckpointFunction.__module__:
            raise NotExportedError(
                "the forward calls torch.utils.checkpoint with use_reentrant=True, whose backward torch.export drops.",
                instead="give use_reentrant=False",
            )
        raise NotExportedError(
            f"the model calls the autograd.Function {function.__qualname__}, whose backward torch.export drops.",
            symbolic=True,
        )

    return functions_answered_by(refuse)
