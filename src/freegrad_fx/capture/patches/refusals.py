"""Errors for code whose effect a graph would lose."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from ..._torch import exporting
from ..._torch.replacing import replaced
from ...context import Block
from ...graph.nodes import attribute
from ...graph.provenance import is_users
from ..refusal import NotExportedError

__all__ = ["refused_constants", "refused_contexts"]


def refused_constants() -> contextlib.AbstractContextManager[None]:
    """Raise `NotExportedError` for an unregistered tensor that requires a gradient: export would make it a constant."""

    def refusing(lift: Callable[..., Any]) -> Callable[..., Any]:
        def look(graph_module: fx.GraphModule, *rest: Any) -> Any:
            for node in graph_module.graph.nodes:
                value = attribute(node, graph_module)
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    raise NotExportedError(
                        f"the forward uses a tensor of shape {tuple(value.shape)} that requires a gradient and is not "
                        f"registered under the name by which it is used, for example one in a list, a closure or a "
                        f"global. torch.export would make it a constant, which is never trained.",
                        symbolic=True,
                        instead="use nn.ParameterList or nn.Parameter",
                    )
            return lift(graph_module, *rest)

        return look

    return exporting.constants_lifted_by(refusing)


@contextlib.contextmanager
def refused_contexts() -> Iterator[None]:
    """Raise where a forward enters `torch.autocast`, `torch.inference_mode` or `use`, which a graph would lose."""

    def refusing(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def refuse(context: Any) -> Any:
            # A block of this package can be entered by its own decorator instead of user code
            if isinstance(context, Block) or is_users(sys._getframe(2).f_code):
                package = type(context).__module__.partition(".")[0]
                raise TypeError(
                    f"{package}.{type(context).__name__} inside a forward cannot be captured in a graph"
                )
            return enter(context)

        return refuse

    with contextlib.ExitStack() as stack:
        for context in (torch.autocast, torch.inference_mode, Block):
            stack.enter_context(replaced(context, "__enter__", refusing))
        yield
