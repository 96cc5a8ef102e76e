"""Arguments of a forward and of the calls in it, as a graph holds them."""

from __future__ import annotations

import collections
import dataclasses
import enum
import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.aliasing import named_in_place
from .proxies import IN_PLACE, FlagProxy

__all__ = [
    "Constant",
    "as_argument",
    "decided",
    "flag_path",
    "is_written_in_place",
    "refuse_unbuildable",
]


@dataclass(frozen=True)
class Constant:
    """Wraps a constant argument, because FX would take a dict or tuple apart."""

    value: Any


def as_argument(value: Any) -> Any:
    """A value that a graph can hold as an argument; ``...`` for other values."""
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return value if all(as_argument(v) is not ... for v in value) else ...
    if type(value) is dict:
        plain = all(type(k) is str and as_argument(v) is not ... for k, v in value.items())
        return value if plain else ...
    plain = value is None or type(value) in _PLAIN or isinstance(value, enum.Enum)
    return value if plain else ...


def refuse_unbuildable(value: Any) -> None:
    """Raise `NotImplementedError` for an object that a graph cannot build again from its parts."""
    kind = type(value)  # a trace replaces isinstance
    if issubclass(kind, collections.defaultdict):
        raise NotImplementedError(
            f"a graph cannot hold a {kind.__name__}; dict(...) of it can be returned"
        )
    if dataclasses.is_dataclass(kind):
        made = [field.name for field in dataclasses.fields(kind) if not field.init]
        if made:
            raise NotImplementedError(
                f"a graph cannot build the dataclass {kind.__name__}, whose field {made[0]!r} has init=False"
            )


_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)


def decided(target: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with the assumed value in place of a flag that is passed as ``inplace``."""
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # built in, or a method
        names = []
    named = itertools.zip_longest(names[: len(args)], args)
    return (
        tuple(_decide(name, value) for name, value in named),
        {name: _decide(name, value) for name, value in kwargs.items()},
    )


def _decide(name: str | None, value: Any) -> Any:
    return bool(value) if name == "inplace" and type(value) is FlagProxy else value


def flag_path(node: fx.Node) -> str | None:
    """The path of the module whose `training` flag a node reads; None for other nodes."""
    if node.op != "get_attr" or not isinstance(node.target, str):
        return None
    path, _, name = node.target.rpartition(".")
    return path if name == "training" else None


def is_written_in_place(node: fx.Node, name: str) -> bool:
    """Whether a node is the result of in-place operators on the tensor with a name, which is the tensor."""
    while node.target in IN_PLACE or (
        node.op == "call_method" and named_in_place(str(node.target))
    ):
        node = node.args[0]  # type: ignore[assignment]
    return node.op == "get_attr" and node.target == name
