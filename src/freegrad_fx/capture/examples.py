"""Example inputs: tensors in any nesting, and copies of them that share no memory."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .._torch import exporting

__all__ = ["distinct", "map_tensors", "twin"]

Value = TypeVar("Value")

_ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


def distinct(inputs: Value) -> Value:
    """The same inputs with a tensor of its own at every place.

    torch.export tells tensors apart by their identity: for a tensor that is given twice, the graph has one input, and
    for a tensor that is a parameter or buffer of the model, it has none.
    """
    new: Value = map_tensors(inputs, twin)
    return new


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A copy of a value in which `function` replaces every tensor, once for each place.

    The copy has new containers: mappings, sequences, dataclasses and other objects with attributes. Modules, classes,
    functions and objects without a `__dict__` are not copied.
    """
    return _mapped(value, function, ())


def _mapped(value: Any, function: Callable[[Tensor], Any], around: tuple[int, ...]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, _ATOMS) or id(value) in around:
        return value
    around = (*around, id(value))
    if isinstance(value, tuple):
        items = [_mapped(item, function, around) for item in value]
        if hasattr(value, "_fields"):  # a namedtuple, whose class can have a constructor of its own
            return tuple.__new__(type(value), items)
        return type(value)(items) if items else value
    if isinstance(value, list | collections.deque):
        new = copy.copy(value)
        for index, item in enumerate(value):
            new[index] = _mapped(item, function, around)
        return new
    if isinstance(value, Mapping):
        return _mapped_mapping(value, function, around)
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is not dict or isinstance(value, nn.Module | type) or callable(value):
        return value
    try:
        new = copy.copy(value)
    except Exception:  # an object that cannot be copied is given as it is
        return value
    for name, item in attributes.items():
        object.__setattr__(new, name, _mapped(item, function, around))
    return new


def _mapped_mapping(
    value: Mapping[Any, Any], function: Callable[[Tensor], Any], around: tuple[int, ...]
) -> Any:
    try:
        new: Any = copy.copy(value)
        for key in value:
            new[key] = _mapped(value[key], function, around)
    except TypeError:  # a mapping that cannot be written to
        return value
    if dataclasses.is_dataclass(value):  # such as the outputs of Hugging Face's models
        for name, item in vars(value).items():
            object.__setattr__(new, name, new.get(name, item))
    return new


def twin(tensor: Tensor) -> Tensor:
    """A copy of a tensor in memory of its own, with the same strides.

    It is a leaf of the autograd graph, requires a gradient if the tensor does, and is a parameter if the tensor is.
    """
    with torch.no_grad():
        new = _copied(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new.requires_grad_(tensor.requires_grad)


def _copied(tensor: Tensor) -> Tensor:
    plain = type(tensor) is Tensor and not exporting.is_fake(tensor)
    if not plain or tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        return tensor.clone()
    size, strides = tensor.size(), tensor.stride()
    if tensor.is_meta:
        return torch.empty_strided(size, strides, dtype=tensor.dtype, device=tensor.device)
    if tensor.is_conj() or tensor.is_neg():
        return tensor.clone()
    # Expanded tensors, and windows that overlap, have fewer elements in memory than in their shape
    length = 1 + sum((n - 1) * step for n, step in zip(size, strides, strict=True))
    memory = tensor.as_strided((length if tensor.numel() else 0,), (1,)).clone()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        memory.untyped_storage(), 0, size, strides
    )
