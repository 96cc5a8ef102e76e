"""Tells which tensors are the parameters of running modules, also those that `torch.func.functional_call` swaps in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .._torch.dynamo import is_compiling, leave_to_python
from .._torch.modules import around_swapped_parameters, parameters_of
from .._torch.tensors import viewed
from ..context import intercepting_blocks
from .running import has_rules_already

__all__ = [
    "Role",
    "is_parameter",
    "mark_in_place",
    "parameter_dims",
    "parameters_swapped_in",
    "role_of",
]


@dataclass(frozen=True, eq=False)
class Role:
    """The parameter whose role a tensor takes.

    Attributes:
        holder: The module that holds the parameter.
        name: The name of the parameter in it.
        tensor: The tensor.
        kept: What blocks keep for the tensor while it has the role.
    """

    holder: nn.Module
    name: str
    tensor: Tensor
    kept: dict[int, Any] = field(default_factory=dict)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.roles: dict[int, Role] = {}


_thread = _Thread()


def is_parameter(value: Any) -> bool:
    """Whether a value is a parameter, or a tensor that takes the role of one."""
    return isinstance(value, nn.Parameter) or (
        bool(_thread.roles) and isinstance(value, Tensor) and id(value) in _thread.roles
    )


def parameter_dims(value: Any) -> int:
    """The number of dimensions of a parameter, or of the transpose of one; 0 for other values."""
    if _has_values_of_parameter(value):
        return int(value.dim())
    source = viewed(value) if isinstance(value, Tensor) else None
    if source is None or not _has_values_of_parameter(source):
        return 0
    transposed = value.shape == source.shape[::-1] and value.stride() == source.stride()[::-1]
    return value.dim() if transposed else 0


_IN_PLACE = "_freegrad_fx_in_place_of_parameter"


def mark_in_place(tensor: Tensor) -> None:
    """Mark a tensor that takes the place of a parameter with a rule, so that it is known as an operand."""
    for marked in (tensor, viewed(tensor)):
        if marked is not None:
            setattr(marked, _IN_PLACE, True)


def _has_values_of_parameter(value: Any) -> bool:
    return is_parameter(value) or hasattr(value, _IN_PLACE)


def role_of(tensor: Tensor) -> Role | None:
    """The role of a tensor that is swapped in for a parameter."""
    return _thread.roles.get(id(tensor))


def parameters_swapped_in() -> AbstractContextManager[None]:
    """A context in which the tensors of `torch.func.functional_call` take the roles of the parameters."""
    return around_swapped_parameters(_with_roles, _call)


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if is_compiling() and intercepting_blocks() and not has_rules_already():
        return _outside_of_the_graph(function, args, kwargs)
    return function(*args, **kwargs)


@leave_to_python
def _outside_of_the_graph(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a call in Python: in a graph, the tensors that are swapped in have no identity."""
    return function(*args, **kwargs)


@contextmanager
def _with_roles(module: nn.Module, before: Mapping[tuple[int, str], Tensor]) -> Iterator[None]:
    outer = _thread.roles
    roles = {
        id(tensor): Role(holder, name, tensor)
        for holder in module.modules()
        for name, tensor in parameters_of(holder).items()
        if tensor is not None and tensor is not before.get((id(holder), name))
    }
    _thread.roles = {**outer, **roles}
    try:
        yield
    finally:
        _thread.roles = outer
