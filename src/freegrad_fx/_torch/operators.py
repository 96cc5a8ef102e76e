"""The operators of ATen, and the operators that run graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .releases import private, uses_private_names

__all__ = [
    "NATIVE",
    "NATIVE_ATTENTIONS",
    "GraphOperator",
    "Overload",
    "is_composite",
    "operator_name",
    "schema",
]

_OPERATORS = "telling the operators of a graph"

if TYPE_CHECKING:
    from torch._ops import HigherOrderOperator as GraphOperator
    from torch._ops import OpOverload as Overload
else:
    Overload = private("torch._ops.OpOverload", _OPERATORS)
    GraphOperator = private("torch._ops.HigherOrderOperator", _OPERATORS)

NATIVE: tuple[Any, ...] = tuple(filter(None, [getattr(torch._C, "_nn", None)]))
"""The modules whose functions `torch.nn.functional` exports."""


def _existing(*names: str) -> tuple[Any, ...]:
    return tuple(f for f in (getattr(torch, name, None) for name in names) if f is not None)


def _default_overloads(*names: str) -> tuple[Any, ...]:
    packets = (getattr(torch.ops.aten, name, None) for name in names)
    return tuple(packet.default for packet in packets if packet is not None)


_FUSED = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")
NATIVE_ATTENTIONS = (*_existing(*_FUSED), *_default_overloads(*_FUSED))
"""The functions and operators in which PyTorch computes a whole attention layer."""


@uses_private_names("telling which memory an operator returns")
def schema(overload: Overload[..., Any]) -> Any:
    """The schema of an operator: its arguments and results, and which of them share memory."""
    return overload._schema


_has_kernel = private(
    "torch._C._dispatch_has_kernel_for_dispatch_key", "telling which memory an operator returns"
)


def is_composite(overload: Overload[..., Any]) -> bool:
    """Whether an operator is composed of others, so that its schema does not show which memory it returns."""
    return bool(_has_kernel(operator_name(overload), "CompositeImplicitAutograd"))


def operator_name(operator: Any) -> str:
    """The name of an operator, such as ``aten::relu``."""
    return str(operator.name())
