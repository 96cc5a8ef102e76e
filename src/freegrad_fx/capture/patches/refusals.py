"""What a graph would lose or answer once and for ever: it refuses to be captured."""

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
from ...errors import CaptureError
from ...graph.nodes import attribute
from ...graph.provenance import is_users

__all__ = ["is_grad_enabled", "refused_constants", "refused_contexts", "refused_questions"]


def refused_constants() -> contextlib.AbstractContextManager[None]:
    """A tensor that learns and that no module has registered raises: export would make a constant of it."""

    def refusing(lift: Callable[..., Any]) -> Callable[..., Any]:
        def look(graph_module: fx.GraphModule, *rest: Any) -> Any:
            for node in graph_module.graph.nodes:
                value = attribute(node, graph_module)
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    raise CaptureError(
                        f"the forward uses a tensor of shape {tuple(value.shape)} that requires a gradient and that "
                        f"no module has registered under the name by which it is used (kept in a list, a function or "
                        f"a global?): torch.export would make it a constant, which never learns. Use nn.ParameterList "
                        f"or nn.Parameter, or transform the model without example_inputs."
                    )
            return lift(graph_module, *rest)

        return look

    return exporting.constants_lifted_by(refusing)


@contextlib.contextmanager
def refused_contexts() -> Iterator[None]:
    """`torch.autocast`, `torch.inference_mode` and `use` in a forward would be lost: they refuse to be traced."""

    def refusing(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def refuse(context: Any) -> Any:
            # a block of ours may be a decorator of the user's function
            if isinstance(context, Block) or is_users(sys._getframe(2).f_code):
                package = type(context).__module__.partition(".")[0]
                raise TypeError(
                    f"{package}.{type(context).__name__} inside a forward cannot be put into a graph"
                )
            return enter(context)

        return refuse

    with contextlib.ExitStack() as stack:
        for context in (torch.autocast, torch.inference_mode, Block):
            stack.enter_context(replaced(context, "__enter__", refusing))
        yield


is_grad_enabled = torch.is_grad_enabled


@contextlib.contextmanager
def refused_questions() -> Iterator[None]:
    """A forward that asks for the grad mode would have the answer of the capture for ever."""

    def refusing(question: Callable[..., bool]) -> Callable[..., bool]:
        def ask(*args: Any) -> bool:
            if is_users(sys._getframe(2).f_code):
                raise TypeError(
                    f"the forward asks torch.{question.__name__}(), which a graph cannot answer anew"
                )
            return question(*args)

        return ask

    with (
        replaced(torch, "is_grad_enabled", refusing),
        replaced(torch, "is_autocast_enabled", refusing),
    ):
        yield
