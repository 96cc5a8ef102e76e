"""The copy of a model that is captured: modules new, tensors shared; and which models can be copied at all."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..errors import CaptureError

__all__ = ["check_model", "structural_copy"]


def check_model(model: Any) -> None:
    """Raise what tells the caller why a model cannot be captured at all."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"transform() takes an instance of nn.Module, the model itself, got {what}")
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        raise TypeError(
            "the model is already compiled: rules given to it now would not reach the compiled code. Transform "
            "first, then compile: torch.compile(freegrad_fx.transform(compiled._orig_mod, rules))."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "the model is a TorchScript module, whose code cannot be traced. Transform the nn.Module it was made from."
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, UninitializedBuffer | UninitializedParameter):
            raise CaptureError(
                f"{name!r} is not initialised yet (a lazy module). Run the model once on an example input, "
                f"then transform it."
            )


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy a model's modules, hooks and attributes, and share every tensor.

    Raises:
        CaptureError: An attribute cannot be copied.
    """
    shared: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            shared[id(module)] = module
        _collect_tensors(module.__dict__, shared)
    try:
        return copy.deepcopy(model, dict(shared))
    except Exception as error:
        # What refuses to be copied (locks, open files, generators) is shared with the original.
        for module in model.modules():
            for value in module.__dict__.values():
                try:
                    copy.deepcopy(value, dict(shared)) if not isinstance(value, dict) else None
                except Exception:
                    shared[id(value)] = value
        try:
            return copy.deepcopy(model, dict(shared))
        except Exception:
            raise CaptureError(
                f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}. transform() copies the "
                f"modules (never the tensors), so copy.deepcopy(model) has to work."
            ) from error


def _collect_tensors(value: Any, found: dict[int, Any]) -> None:
    if isinstance(value, Tensor):
        found[id(value)] = value
    elif isinstance(value, dict):
        for item in value.values():
            _collect_tensors(item, found)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _collect_tensors(item, found)
