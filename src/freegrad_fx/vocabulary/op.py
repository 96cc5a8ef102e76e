"""The lines of the vocabulary, and `make_op`, which makes a line from a name.

A name covers everything that PyTorch calls by it: ``F.relu``, ``torch.relu``, ``torch.special.*``, the builtins of
``torch._C._nn``, the tensor method, the ATen overloads, and the in-place variant ``relu_`` of each of them.
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

__all__ = ["Op", "Operand", "Spelling", "by_name", "make_op"]


@dataclass(frozen=True)
class Op:
    """A line of the vocabulary: an activation, its properties and its spellings."""

    name: str
    groups: frozenset[str]  # if empty, the op is a site only when a rule names it
    elementwise: bool  # each output entry depends only on the input entry at the same index
    keeps_shape: bool  # the output has the input's shape
    # Matched by exact type, because nn.ReLU6 is a subclass of nn.Hardtanh
    modules: tuple[type[nn.Module], ...]
    functions: tuple[Callable[..., Any], ...]  # out of place, unless called with inplace=True
    inplace_functions: tuple[Callable[..., Any], ...]
    methods: tuple[str, ...]  # of torch.Tensor; "relu" includes "relu_"
    aten: tuple[Overload[..., Any], ...]  # out of place, in place, and with `out=`
    # f(x), to replace a forward; None if it needs further arguments
    function: Callable[..., Tensor] | None
    # The output is positive exactly where the input is, and PyTorch saves the output for the backward
    keeps_positive: bool = False
    # Entries of a smaller magnitude become 0
    zero_below: float = 0.0
    # It can return its input tensor itself
    may_return_x: bool = False
    # The names of the operands, each with the names that PyTorch gives the argument, the preferred name first
    reads: tuple[tuple[str, tuple[str, ...]], ...] = (("x", ()),)
    swapped: frozenset[str] = (
        frozenset()
    )  # the names of functions that take the second operand first
    # A site only for tables that name the op
    on_demand: bool = False

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of the operands, in the order in which they are written."""
        return tuple(name for name, _ in self.reads)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # By name: copies are identical to the original, and ATen overloads cannot be pickled.
        if _lines.get(self.name) is self:
            return _line, (self.name,)
        return super().__reduce_ex__(protocol)


_lines: dict[str, Op] = {}


def by_name(lines: Iterable[Op]) -> Mapping[str, Op]:
    """The lines of a table, keyed by name. From now on, copying or unpickling a line returns the line itself."""
    _lines.update((line.name, line) for line in lines)
    return MappingProxyType(_lines)


def _line(name: str) -> Op:
    return _lines[name]


@dataclass(frozen=True)
class Operand:
    """Where a call has one of its operands: in an argument, or in a parameter that the called module holds.

    Attributes:
        name: The name of the operand.
        key: The argument: an index of the positional arguments, or a keyword.
        item: The index of the operand in the argument, if that is a list; else None.
        held: The name of the parameter in the called module; ``""`` for an argument.
        transposed: Whether the call takes the operand with its last two dimensions exchanged.
    """

    name: str
    key: int | str = ""
    held: str = ""
    transposed: bool = False
    item: int | None = None


@dataclass(frozen=True)
class Spelling:
    """How a node of a graph calls an op."""

    op: Op
    key: (
        int | str
    )  # of the first operand that is a tensor: an index of node.args or a key of node.kwargs
    inplace: bool  # the call writes its result into that tensor
    writes_out: bool  # the call writes its result into an `out=` tensor
    found: tuple[Operand, ...] = ()  # the operands that are tensors; empty if `key` is the only one

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The operands of the call that are tensors, in the order of `Op.operands`."""
        return self.found or (Operand(self.op.operands[0], self.key),)


_FUNCTIONS: tuple[Any, ...] = (F, torch, torch.special, *NATIVE)


_OPERATORS: tuple[Any, ...] = (torch.ops.aten, torch.ops.freegrad_fx)


def make_op(
    name: str,
    *modules: type[nn.Module],
    group: str = "",
    also: str = "",
    functions: tuple[Callable[..., Any], ...] = (),
    elementwise: bool = True,
    keeps_shape: bool = True,
    keeps_positive: bool = False,
    needs_more: bool = False,
    zero_below: float = 0.0,
    may_return_x: bool = False,
    operands: str = "",
    swapped: str = "",
    inplace_functions: tuple[Callable[..., Any], ...] = (),
    on_demand: bool = False,
) -> Op:
    """Make a line of the vocabulary.

    Args:
        name: The canonical name of the op. It is looked up in PyTorch; see the module.
        *modules: The module classes that apply the op.
        group: The groups of the op, separated by spaces.
        also: Further names in PyTorch, separated by spaces.
        functions: Functions that cannot be found by name.
        elementwise: See `Op`.
        keeps_shape: See `Op`.
        keeps_positive: See `Op`.
        needs_more: Whether the op needs arguments besides the tensor.
        zero_below: See `Op`.
        may_return_x: See `Op`.
        operands: The operands, separated by spaces: each a name, followed by the names that PyTorch gives the
            argument, ``"b=mat2,other"``. The default is ``"x"``, which is the first argument.
        swapped: Further names in PyTorch, of functions that take the second operand first, separated by spaces.
        inplace_functions: Functions that work in place and cannot be found by name.
        on_demand: See `Op`.
    """
    also = f"{also} {swapped}"
    names = [name, *also.split()]
    twins = [f"{n}_" for n in names]
    functions = (*functions, *_found(names, _FUNCTIONS))
    operators = [p for n in (*names, *twins) for p in _found([n, f"special_{n}"], _OPERATORS)]
    return Op(
        name=name,
        groups=frozenset(group.split()),
        elementwise=elementwise,
        keeps_shape=keeps_shape,
        keeps_positive=keeps_positive,
        zero_below=zero_below,
        may_return_x=may_return_x,
        modules=modules,
        functions=tuple(dict.fromkeys(functions)),
        inplace_functions=(*inplace_functions, *_found(twins, _FUNCTIONS)),
        methods=tuple(n for n in names if hasattr(Tensor, n)),
        aten=tuple(o for packet in operators for o in _tensor_overloads(packet)),
        function=None if needs_more or not functions else functions[0],
        reads=tuple(map(_operand, operands.split())) or (("x", ()),),
        swapped=frozenset(swapped.split()),
        on_demand=on_demand,
    )


def _operand(text: str) -> tuple[str, tuple[str, ...]]:
    name, _, arguments = text.partition("=")
    return name, tuple(arguments.split(",")) if arguments else (name,)


def _found(names: list[str], places: tuple[Any, ...]) -> list[Any]:
    return list(dict.fromkeys(getattr(p, n) for n in names for p in places if hasattr(p, n)))


def _tensor_overloads(packet: Any) -> Iterator[Overload[..., Any]]:
    """The overloads from a tensor to a tensor. Those for TorchScript take and return numbers."""
    for overload in (getattr(packet, name) for name in packet.overloads()):
        found = schema(overload)
        ends = [found.arguments[0], *found.returns]
        if [str(end.type) for end in ends] == ["Tensor", "Tensor"]:
            yield overload
