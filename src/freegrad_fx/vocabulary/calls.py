"""The arguments of a call that are no operands, so that a rule can compute the operation at other operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .._torch.parametrized import plain_class
from .arguments import argument_names, layout_of, name_of
from .op import Op, Operand
from .operands import operation_of

__all__ = ["Held", "constants_of"]


@dataclass(frozen=True)
class Held:
    """An argument that the called module holds, and that can change from call to call.

    Attributes:
        name: The name of the attribute.
    """

    name: str


_CONVOLUTION = "stride padding dilation groups"
_POOL = "kernel_size stride padding ceil_mode"

# The attributes that are arguments of the function of the operation, and the name of the function
_MODULES: dict[type[nn.Module], tuple[str, str]] = {
    nn.Linear: ("", ""),
    nn.LayerNorm: ("normalized_shape eps", ""),
    nn.RMSNorm: ("normalized_shape eps", ""),
    nn.GroupNorm: ("num_groups eps", ""),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), ("eps", "")),
    nn.Softmax: ("dim", ""),
    nn.LogSoftmax: ("dim", ""),
    nn.Conv1d: (f"{_CONVOLUTION} padding_mode", "conv1d"),
    nn.Conv2d: (f"{_CONVOLUTION} padding_mode", "conv2d"),
    nn.Conv3d: (f"{_CONVOLUTION} padding_mode", "conv3d"),
    nn.ConvTranspose1d: (f"{_CONVOLUTION} output_padding", "conv_transpose1d"),
    nn.ConvTranspose2d: (f"{_CONVOLUTION} output_padding", "conv_transpose2d"),
    nn.ConvTranspose3d: (f"{_CONVOLUTION} output_padding", "conv_transpose3d"),
    nn.MaxPool1d: (f"{_POOL} dilation", "max_pool1d"),
    nn.MaxPool2d: (f"{_POOL} dilation", "max_pool2d"),
    nn.MaxPool3d: (f"{_POOL} dilation", "max_pool3d"),
    nn.AvgPool1d: (f"{_POOL} count_include_pad", "avg_pool1d"),
    nn.AvgPool2d: (f"{_POOL} count_include_pad divisor_override", "avg_pool2d"),
    nn.AvgPool3d: (f"{_POOL} count_include_pad divisor_override", "avg_pool3d"),
    nn.AdaptiveAvgPool1d: ("output_size", "adaptive_avg_pool1d"),
    nn.AdaptiveAvgPool2d: ("output_size", "adaptive_avg_pool2d"),
    nn.AdaptiveAvgPool3d: ("output_size", "adaptive_avg_pool3d"),
}
# They change nothing in the result, or only how it is stored
_IGNORED = frozenset(
    {"cudnn_enable", "cudnn_enabled", "out", "inplace", "_stacklevel", "return_indices"}
)


def constants_of(
    op: Op,
    operands: Sequence[Operand],
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    module: nn.Module | None = None,
) -> dict[str, Any] | None:
    """The arguments of a call besides its operands, by the names that the function of the operation gives them.

    Args:
        op: The operation.
        operands: The operands that are tensors.
        target: The function, the operator, or the name of the method that is called.
        args: The positional arguments; those of the module, if one is called.
        kwargs: The keyword arguments.
        module: The module that is called, or None.

    Returns:
        The arguments; None if the operation cannot be computed again from its operands.
    """
    operation = operation_of(op.name)
    if operation is None:
        return None
    if module is not None:
        kind = plain_class(module)
        if kind not in _MODULES:
            return None
        if len(args) + len(kwargs) > 1:
            return None  # `output_size` of a transposed convolution
        attributes, name = _MODULES[kind]
        found = {key: getattr(module, key) for key in attributes.split()}
        found.update(_state_of(module) if op.name == "batch_norm" else {})
        return {**found, "kind": name} if name else found
    if op.name == "linear":
        return {}
    if name_of(target) == "einsum":
        return {"equation": args[0]}
    names = argument_names(target)
    taken = {operand.key for operand in operands}
    given = {n: v for i, (n, v) in enumerate(zip(names, args, strict=False)) if i not in taken}
    given.update((name, value) for name, value in kwargs.items() if name not in taken)
    tensors = {operand.name for operand in operands}
    missing = [name for name in op.operands if name not in tensors]
    found = {}
    for _, position, keywords in layout_of(op, target):
        known = (*keywords, *([names[position]] if position is not None else []))
        value = next((given.pop(name) for name in known if name in given), None)
        if value is not None and missing:
            found[operation.arguments[missing.pop(0)]] = value  # a number
    for name, value in given.items():
        if name in operation.accepts:
            found[name] = value
        elif name not in _IGNORED and name not in operation.apart and value is not None:
            return None
    if found.get("dropout_p"):
        return None  # it would draw other random numbers
    if "kind" not in operation.accepts:
        return found
    return {**found, "kind": op.name if op.name in ("add", "sub") else name_of(target)}


def _state_of(module: nn.Module) -> dict[str, Any]:
    """The arguments of a batch norm that are the state of its module."""
    if module.running_mean is None and module.running_var is None:
        return {"training": True}
    return {name: Held(name) for name in ("running_mean", "running_var", "training")}
