"""The methods of a tracer that the patches call."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.fx.proxy import Proxy

from ..._torch import tree
from ..outside import Outside
from ..questions import Question

__all__ = ["Recorder", "with_proxies"]


class Recorder(Protocol):
    """The methods of a tracer that the patches call, and what the forward can reach."""

    outside: Outside | None

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a node."""

    def training_flag(self, module: nn.Module) -> Any:
        """The proxy of the flag of a module; None if the module is not traced."""

    def known_tensor(self, tensor: torch.Tensor) -> Proxy | None:
        """The proxy of a parameter, buffer or tensor attribute of the model; None for other tensors."""

    def describe(self, proxy: Any) -> bool:
        """Whether the shape of a tensor of the model, given by its proxy, is a constant of the graph."""

    def read(self, module: nn.Module, name: str) -> None:
        """Note that an attribute of a module is read, or asked for. Raise an error if it cannot be traced."""

    def is_held(self, tensor: torch.Tensor) -> bool:
        """Whether a list or dict of the model contains a tensor."""

    def answer(self, question: Question, now: Any) -> Any:
        """The answer to a question that the forward asks, which is `now` in an eager call at present."""

    def assign(self, module: nn.Module, name: str, value: Any) -> bool:
        """Record an assignment of a proxy to an attribute. Return False if the assignment has to be executed too."""


def with_proxies(
    recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace the tensors of the model in arguments by proxies. Without such tensors, return the same objects."""
    found = False

    def swap(value: Any) -> Any:
        nonlocal found
        proxy = recorder.known_tensor(value) if isinstance(value, torch.Tensor) else None
        found = found or proxy is not None
        return value if proxy is None else proxy

    swapped = tree.map_leaves(swap, (args, kwargs))
    return swapped if found else (args, kwargs)
