"""Where PyTorch would drop a rule without a word: who records a forward now, and leaves its backward out.

Knows nothing of rules and graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch._C import _len_torch_dispatch_stack
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .errors import FreegradWarning

__all__ = [
    "records_forward_alone",
    "refuse_compiled_transform",
    "refuse_sharded_parts",
    "warn_if_recorded",
]


_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # in force while a mode of its own is


def records_forward_alone() -> bool:
    """Whether `torch.export`, `torch.onnx.export` or `torch.jit.trace` records this call."""
    return torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None


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
    included = torch._C._dispatch_tls_is_dispatch_key_included
    if not (_len_torch_dispatch_stack() or included(_PRE_DISPATCH)):
        return False  # what nearly every call comes to, in a tenth of the time
    if torch.is_grad_enabled() and get_proxy_mode() is not None and not _functionalised():
        warnings.warn(
            "make_fx records the forward of a model with backward rules. The rules are in its graph only if the "
            "gradients, too, are computed inside the function that it traces: make_fx(lambda p, x: "
            "torch.autograd.grad(loss(p, x), p)).",
            FreegradWarning,
            stacklevel=3,
        )
    return False


def _functionalised() -> bool:
    """Whether AOTAutograd traces, which records the backward too."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None


def refuse_compiled_transform() -> None:
    """Raise `RuntimeError` if a transform of `torch.func` is being compiled: the compiler would drop the rule."""
    if torch.compiler.is_compiling() and _in_functorch():
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


def _in_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# Dynamo calls them while it traces, and takes the answer for a constant. (torch.compiler.assume_constant_result does
# the same, and imports the whole compiler.)
records_forward_alone._dynamo_marked_constant = True  # type: ignore[attr-defined]
warn_if_recorded._dynamo_marked_constant = True  # type: ignore[attr-defined]
_in_functorch._dynamo_marked_constant = True  # type: ignore[attr-defined]
