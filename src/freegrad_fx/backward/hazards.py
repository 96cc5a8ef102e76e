"""Where PyTorch would drop a rule without a word: who records a forward now, and leaves its backward out.

Knows nothing of rules and graphs.
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
    "records_forward_alone",
    "refuse_compiled_transform",
    "refuse_sharded_parts",
    "warn_if_recorded",
]


# Dynamo takes the answers for constants
@takes_for_constant
def records_forward_alone() -> bool:
    """Whether `torch.export`, `torch.onnx.export` or `torch.jit.trace` records this call."""
    return dispatch.is_exporting() or dispatch.is_jit_tracing()


@takes_for_constant
def warn_if_recorded() -> bool:
    """The answer of `records_forward_alone`, with a warning where it is yes.

    `make_fx` is warned of too, but records the rules where the gradients are computed inside the traced function.
    """
    if records_forward_alone():
        warnings.warn(
            "the backward rules of this model stay behind: torch.export, torch.onnx.export and torch.jit.trace "
            "record the forward alone. What they make computes the same values, and is for inference: trained, it "
            "would pass no gradient where a rule stood. Train the transformed model itself, and save it with "
            "torch.save; export the original model where there is nothing to train.",
            FreegradWarning,
            stacklevel=3,
        )
        return True
    if not (dispatch.dispatch_modes() or dispatch.in_pre_dispatch()):
        return False  # what nearly every call comes to, in a tenth of the time
    if (
        torch.is_grad_enabled()
        and dispatch.proxy_mode() is not None
        and not dispatch.is_functionalised()  # AOTAutograd's trace records the backward too
    ):
        warnings.warn(
            "make_fx records the forward of a model with backward rules. The rules are in its graph only if the "
            "gradients, too, are computed inside the function that it traces: make_fx(lambda p, x: "
            "torch.autograd.grad(loss(p, x), p)).",
            FreegradWarning,
            stacklevel=3,
        )
    return False


def refuse_compiled_transform() -> None:
    """Raise `RuntimeError` if a transform of `torch.func` is being compiled: the compiler would drop the rule."""
    if is_compiling() and _in_transform():
        raise RuntimeError(
            "torch.compile drops the backward of an autograd.Function inside torch.func.grad, vmap and their kin. "
            "Do not compile the transform: put @torch.compiler.disable on the function that calls it. What is around "
            "it is still compiled."
        )


def refuse_sharded_parts(module: nn.Module, names: Iterable[str]) -> None:
    """Raise `RuntimeError` if `fully_shard` was called on a part of a model whose parameters have rules.

    Such a part gathers its parameters when it is called, behind the rules, and would then learn natively.

    Args:
        module: A module that is called with other tensors in the place of some parameters.
        names: Their names.
    """
    for name in names:
        part = module
        for step in (*name.split(".")[:-1], ""):
            if hasattr(part, "set_reshard_after_backward"):  # an FSDPModule
                raise RuntimeError(
                    f"the rule for the parameter {name!r} of {type(part).__name__} would be ignored: fully_shard makes "
                    f"that module gather its parameters when it is called, behind the rule. Shard the transformed "
                    f"model as a whole, fully_shard(gm), and not this part of it; rules on activations go with both."
                )
            part = getattr(part, step) if step else part


@takes_for_constant
def _in_transform() -> bool:
    return dispatch.in_function_transform()
