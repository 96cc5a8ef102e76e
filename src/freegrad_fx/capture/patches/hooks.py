"""Errors for what a forward asks of autograd, which is not in an exported graph: hooks, gradients and `data`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph

from ..._torch.replacing import Make, all_replaced
from ...graph.provenance import caller, is_users
from ..refusal import NotExportedError

__all__ = ["refused_autograd"]


def refused_autograd() -> contextlib.AbstractContextManager[None]:
    """Raise `NotExportedError` where a forward registers hooks on tensors, or computes gradients."""
    return all_replaced(
        [
            *(
                (Tensor, name, _refusing(f"calls Tensor.{name}()"))
                for name in ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")
            ),
            (Tensor, "backward", _refusing("calls Tensor.backward()")),
            (torch.autograd, "backward", _refusing("calls torch.autograd.backward()")),
            (torch.autograd, "grad", _refusing("calls torch.autograd.grad()", symbolic=True)),
            (graph, "register_multi_grad_hook", _refusing("calls register_multi_grad_hook()")),
            (graph.saved_tensors_hooks, "__enter__", _refusing("enters saved_tensors_hooks()")),
            (Tensor, "grad_fn", _refusing_to_read),
        ]
    )


def _refusing(what: str, symbolic: bool = False) -> Make:
    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if _is_checkpoint(sys._getframe(2)):
                return function(*args, **kwargs)
            raise NotExportedError(
                f"the forward {what}, which torch.export drops (at {caller()}).", symbolic=symbolic
            )

        return refuse

    return make


def _refusing_to_read(attribute: Any) -> property:
    def read(tensor: Tensor) -> Any:
        if is_users(sys._getframe(2).f_code):
            raise NotExportedError(
                f"the forward reads Tensor.grad_fn, which has no meaning in an export (at {caller()})."
            )
        return attribute.__get__(tensor)

    return property(read)


def _is_checkpoint(frame: FrameType) -> bool:
    """Whether a frame is of `torch.utils.checkpoint`, whose hooks do not change values."""
    name = frame.f_globals.get("__name__")
    return name == "torch.utils.checkpoint"
