"""A line of the vocabulary, and how one is made from the names of torch.

A name in a line stands for all that torch calls by it: ``F.relu``, ``torch.relu``, ``torch.special.*``, the builtins
of ``torch._C._nn``, the tensor method, the ATen overloads, and the in-place twin ``relu_`` of each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch.operators import NATIVE, Overload, schema

__all__ = ["Op", "Spelling", "by_name", "make_op"]


@dataclass(frozen=True)
class Op:
    """A line of the vocabulary: an activation, what it is like, and its spellings."""

    name: str
    groups: frozenset[str]  # empty: a site only when a rule names the op itself
    elementwise: bool  # an output entry depends on the input entry at the same place alone
    keeps_shape: bool  # the output has the input's shape
    modules: tuple[type[nn.Module], ...]  # by exact type: to Python, nn.ReLU6 is an nn.Hardtanh
    functions: tuple[Callable[..., Any], ...]  # out of place, unless `inplace=` is given and true
    inplace_functions: tuple[Callable[..., Any], ...]
    methods: tuple[str, ...]  # of torch.Tensor; "relu" stands for "relu_" too
    aten: tuple[Overload[..., Any], ...]  # out of place, in place, and with `out=`
    function: Callable[..., Tensor] | None  # f(x), to replace a forward; None: x is not enough
    # The output is positive exactly where the input is, and natively saved
    keeps_positive: bool = False

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # By name: a copy of a line is the line itself, and ATen overloads do not pickle.
        if _lines.get(self.name) is self:
            return _line, (self.name,)
        return super().__reduce_ex__(protocol)


_lines: dict[str, Op] = {}


def by_name(lines: Iterable[Op]) -> Mapping[str, Op]:
    """The lines of a table, by their names; copies and pickles of them are the lines themselves from now on."""
    _lines.update((line.name, line) for line in lines)
    return MappingProxyType(_lines)


def _line(name: str) -> Op:
    return _lines[name]


@dataclass(frozen=True)
class Spelling:
    """How one node of a graph spells an op."""

    op: Op
    key: int | str  # where the activated tensor stands: in node.args (int) or node.kwargs (str)
    inplace: bool  # the call writes its result into that tensor
    writes_out: bool  # the call writes its result into an `out=` tensor


_FUNCTIONS: tuple[Any, ...] = (F, torch, torch.special, *NATIVE)


_OPERATORS: tuple[Any, ...] = (torch.ops.aten, torch.ops.freegrad_fx)


def make_op(
    name: str,
    *modules: type[nn.Module],
    group: str | None = None,
    also: str = "",
    functions: tuple[Callable[..., Any], ...] = (),
    elementwise: bool = True,
    keeps_shape: bool = True,
    keeps_positive: bool = False,
    needs_more: bool = False,
) -> Op:
    """Make a line from the op's names in torch (`also`: the others) and the functions that no name finds."""
    names = [name, *also.split()]
    twins = [f"{n}_" for n in names]
    functions = (*functions, *_found(names, _FUNCTIONS))
    operators = [p for n in (*names, *twins) for p in _found([n, f"special_{n}"], _OPERATORS)]
    return Op(
        name=name,
        groups=frozenset([group] if group else []),
        elementwise=elementwise,
        keeps_shape=keeps_shape,
        keeps_positive=keeps_positive,
        modules=modules,
        functions=tuple(dict.fromkeys(functions)),
        inplace_functions=tuple(_found(twins, _FUNCTIONS)),
        methods=tuple(n for n in names if hasattr(Tensor, n)),
        aten=tuple(o for packet in operators for o in _tensor_overloads(packet)),
        function=None if needs_more or not functions else functions[0],
    )


def _found(names: list[str], places: tuple[Any, ...]) -> list[Any]:
    return list(dict.fromkeys(getattr(p, n) for n in names for p in places if hasattr(p, n)))


def _tensor_overloads(packet: Any) -> Iterator[Overload[..., Any]]:
    """The overloads from a tensor to a tensor; TorchScript's have numbers in and out."""
    for overload in (getattr(packet, name) for name in packet.overloads()):
        found = schema(overload)
        ends = [found.arguments[0], *found.returns]
        if [str(end.type) for end in ends] == ["Tensor", "Tensor"]:
            yield overload
