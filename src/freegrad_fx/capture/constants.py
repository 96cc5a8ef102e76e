"""Attributes that a forward reads and that are constants of its graphs: a later change of one is an error.

The check at each call costs one comparison of tuples for each module that has such attributes.
"""

from __future__ import annotations

import copy
import enum
import operator
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._torch.modules import buffers_of, children_of, parameters_of
from ..errors import CaptureError
from ..graph.nodes import submodule
from ..graph.state import ATTRIBUTES_OF_EVERY_MODULE, is_python_state
from .python_state import Attribute

__all__ = [
    "CONSTANTS",
    "Checks",
    "checks_of",
    "constants_read",
    "require_constants",
    "require_constants_compiled",
]

CONSTANTS = "_constant_attributes"
"""The attribute of a captured model that holds the constant attributes of its modules, by path and name."""

_ABSENT = "<absent>"
_PLAIN = (
    *(torch.dtype, torch.device, torch.memory_format, torch.layout, enum.Enum),
    *(types.FunctionType, types.BuiltinFunctionType, type),
)

Checks: TypeAlias = tuple[tuple[Callable[[Any], Any], dict[str, Any], Any, tuple[str, ...]], ...]
"""For each module: reads the attributes from a dict, the dict, what they have to be, and names that must be missing."""


def constants_read(
    root: nn.Module,
    read: Iterable[Attribute],
    changed: Iterable[Attribute],
    tensors: Iterable[Any],
) -> dict[str, dict[str, Any]]:
    """The constants among the attributes that a forward read, with their values, by the path of the module.

    Constants are numbers, texts, None, containers of them, enum members, functions, and classes and dtypes; and
    containers of tensors that the graphs contain. A name that no instance attribute had, because the class has it or
    because nothing has it, must not become one.

    Args:
        root: The model.
        read: The attributes that were read.
        changed: The attributes that the forward changes.
        tensors: The constants of the graphs. Only tensors matter.
    """
    addresses = {_address(value) for value in tensors if isinstance(value, Tensor)} - {0}
    found: dict[str, dict[str, Any]] = {}
    for path, name in dict.fromkeys(read).keys() - set(changed):
        module = submodule(root, path)
        tables = (children_of(module), parameters_of(module), buffers_of(module))
        if name in ATTRIBUTES_OF_EVERY_MODULE or any(name in table for table in tables):
            continue
        if name in module.__dict__:
            value = module.__dict__[name]
            if is_python_state(value) or isinstance(value, _PLAIN):
                value = copy.deepcopy(value)
            elif _holds(value, addresses):
                value = copy.copy(value)  # the tensors are compared by identity
            else:
                continue
        elif is_python_state(getattr(type(module), name, None)):
            value = _ABSENT
        else:
            continue  # a method or a property
        found.setdefault(path, {})[name] = value
    return {path: dict(sorted(found[path].items())) for path in sorted(found)}


def _holds(value: Any, addresses: set[int]) -> bool:
    """Whether a value is a container that has a tensor with one of some addresses in it."""
    if type(value) not in (dict, list, tuple):
        return False
    items = value.values() if type(value) is dict else value
    return any(isinstance(item, Tensor) and _address(item) in addresses for item in items)


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a fake tensor
        return 0


def _same(value: Any, expected: Any) -> bool:
    """Whether a value is the expected one. A tensor in it has to be the same object."""
    try:
        return value is expected or bool(value == expected)
    except RuntimeError:  # the truth of a comparison of two tensors
        return False


def checks_of(model: nn.Module, constants: Mapping[str, Mapping[str, Any]]) -> Checks:
    """What `require_constants` needs to check the constants of a model."""
    found: list[tuple[Callable[[Any], Any], dict[str, Any], Any, tuple[str, ...]]] = []
    for path, values in constants.items():
        try:
            attributes = model.get_submodule(path).__dict__
        except AttributeError:  # the module has been removed
            continue
        present = [name for name, value in values.items() if not _is_absent(value)]
        absent = tuple(name for name in values if name not in present)
        expected = tuple(values[name] for name in present)
        if not present:
            found.append((_nothing, attributes, (), absent))
        elif len(present) == 1:
            found.append((operator.itemgetter(*present), attributes, expected[0], absent))
        else:
            found.append((operator.itemgetter(*present), attributes, expected, absent))
    return tuple(found)


def require_constants(
    model: nn.Module, constants: Mapping[str, Mapping[str, Any]], checks: Checks
) -> None:
    """Raise `CaptureError` if an attribute is no longer the constant of the graphs."""
    for read, attributes, expected, absent in checks:
        try:
            same = _same(read(attributes), expected)
        except KeyError:
            same = False
        if not same or (absent and not attributes.keys().isdisjoint(absent)):
            _complain(model, constants)


def _complain(model: nn.Module, constants: Mapping[str, Mapping[str, Any]]) -> None:
    for path, values in constants.items():
        now = model.get_submodule(path).__dict__
        for name, before in values.items():
            value = now.get(name, _ABSENT)
            if _same(value, before):
                continue
            was = "not set" if _is_absent(before) else repr(before)
            what = "deleted" if _is_absent(value) else f"set to {value!r}"
            raise CaptureError(_changed(path, name, what, f" ({was})"))


def require_constants_compiled(module: nn.Module, path: str, values: Mapping[str, Any]) -> None:
    """`require_constants` for one module, in a form that Dynamo can trace. It compares numbers and texts only."""
    for name, before in values.items():
        plain = type(before) in (bool, int, float, str, type(None)) and before != _ABSENT
        if plain and getattr(module, name, _ABSENT) != before:
            raise CaptureError(_changed(path, name, "changed"))


def _changed(path: str, name: str, what: str, before: str = "") -> str:
    """The message of the error for an attribute that is no longer the constant of the graphs."""
    return (
        f"the attribute {path + '.' + name if path else name} of the transformed model has been {what}. The forward of "
        f"the model reads the attribute, and the graph has the value from the capture{before}. Set it on the original "
        f"model and transform the model again; or make it a buffer, which is read at each call."
    )


def _is_absent(value: Any) -> bool:
    return (
        type(value) is str and value == _ABSENT
    )  # not by identity: the model can have been pickled


def _nothing(attributes: Any) -> tuple[()]:
    return ()
