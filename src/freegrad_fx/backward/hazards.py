"""Detects situations in which PyTorch would silently drop a rule, such as exporters that record only the forward.

Independent of rules and graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from .._torch import dispatch
from .._torch.dynamo import is_compiling, takes_for_constant
from ..errors import FreegradWarning

__all__ = [
    "is_sharded",
    "records_forward_alone",
    "refuse_compiled_transform",
    "refuse_sharded_parts",
    "warn_if_recorded",
]


# Dynamo treats the results as constants
@takes_for_constant
def records_forward_alone() -> bool:
    """Whether `torch.export`, `torch.onnx.export` or `torch.jit.trace` is recording this call."""
    return dispatch.is_exporting() or dispatch.is_jit_tracing()


@takes_for_constant
def warn_if_recorded() -> bool:
    """Return `records_forward_alone()`, and warn if it is true.

    Also warns under `make_fx`, but returns False there: `make_fx` records the rules if the gradients are computed
    inside of the traced function.
    """
    if records_forward_alone():
        warnings.warn(
            "the backward rules of this model are not exported: torch.export, torch.onnx.export and torch.jit.trace "
            "record only the forward. The exported program computes the same values and is for inference only: in "
            "training, no gradient would pass at the sites of rules. To train, use the transformed model itself and "
            "save it with torch.save. For inference, export the original model to avoid this warning.",
            FreegradWarning,
            stacklevel=3,
        )
        return True
    if not (dispatch.dispatch_modes() or dispatch.in_pre_dispatch()):
        return False  # a fast path for nearly every call
    if (
        torch.is_grad_enabled()
        and dispatch.proxy_mode() is not None
        and not dispatch.is_functionalised()  # AOTAutograd's trace records the backward too
    ):
        warnings.warn(
            "make_fx records the forward of a model with backward rules. Its graph contains the rules only if the "
            "gradients are also computed inside of the traced function: make_fx(lambda p, x: "
            "torch.autograd.grad(loss(p, x), p)).",
            FreegradWarning,
            stacklevel=3,
        )
    return False


def refuse_compiled_transform() -> None:
    """Raise `RuntimeError` if a `torch.func` transform is being compiled, because the compiler would drop the rule."""
    if is_compiling() and _in_transform():
        raise RuntimeError(
            "torch.compile drops the backward of an autograd.Function inside of torch.func transforms such as grad and "
            "vmap. Do not compile the transform: decorate the function that calls it with @torch.compiler.disable. "
            "The surrounding code is still compiled."
        )


def is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to a module, so that its call gathers its parameters."""
    return hasattr(module, "set_reshard_after_backward")  # it is an FSDPModule


def refuse_sharded_parts(module: nn.Module, names: Iterable[str]) -> None:
    """Raise `RuntimeError` if `fully_shard` was applied to a submodule whose parameters have rules.

    Such a submodule gathers its own parameters when it is called, so the rules would have no effect.

    Args:
        module: A module that is called with other tensors in place of some parameters.
        names: The dotted names of these parameters.
    """
    for name in names:
        part = module
        for step in (*name.split(".")[:-1], ""):
            if is_sharded(part):
                raise RuntimeError(
                    f"the rule for the parameter {name!r} of {type(part).__name__} would be ignored, because "
                    f"fully_shard makes that module gather its own parameters when it is called. Shard a module "
                    f"around it instead of this one, such as the block that it belongs to, or the transformed model "
                    f"as a whole, fully_shard(gm); or give the rules with use(rules, model=model) or "
                    f"compile(model, rules). Rules on activations work with all of them."
                )
            part = getattr(part, step) if step else part


@takes_for_constant
def _in_transform() -> bool:
    return dispatch.in_function_transform()
