"""Recognises operations: which op a node calls, on which arguments, and whether in place.

Nodes are never changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from .._torch.operators import schema
from .._torch.parametrized import plain_class
from .activations import CASES, OPS
from .arguments import FIRST, Layout, layout_of
from .op import Op, Operand, Spelling
from .operations import LINEAR, MATMUL

__all__ = ["has_derivative", "may_be_recognised", "recognise", "recognise_call"]


@dataclass(frozen=True)
class _Entry:
    """The meaning of a node's target, independent of the arguments."""

    op: Op
    inplace: bool
    inplace_position: int | None = None  # index of the `inplace` argument
    layout: Layout = ()  # for an op with several operands

    @property
    def names(self) -> tuple[str, ...]:
        """The ops that a call of the target can be."""
        return (self.op.name, LINEAR.name) if self.op is MATMUL else (self.op.name,)


_Target: TypeAlias = tuple[str, Any]  # `op` and `target` of a node; for modules, the class


def _entries(op: Op) -> Iterator[tuple[_Target, _Entry]]:
    out_of_place, in_place = _Entry(op, inplace=False), _Entry(op, inplace=True)
    for module in op.modules:
        yield ("call_module", module), out_of_place
    for function in op.functions:
        parameters = inspect.signature(function).parameters if inspect.isfunction(function) else {}
        position = list(parameters).index("inplace") if "inplace" in parameters else None
        yield ("call_function", function), _Entry(op, False, position)
    for function in op.inplace_functions:
        yield ("call_function", function), in_place
    for method in op.methods:
        yield ("call_method", method), out_of_place
        if hasattr(Tensor, f"{method}_"):
            yield ("call_method", f"{method}_"), in_place
    packets = {overload.overloadpacket: overload for overload in op.aten}
    for target, overload in [*zip(op.aten, op.aten, strict=True), *packets.items()]:
        alias = schema(overload).arguments[0].alias_info
        writes = alias is not None and alias.is_write
        yield ("call_function", target), in_place if writes else out_of_place


def _index(table: tuple[Op, ...]) -> dict[_Target, _Entry]:
    index: dict[_Target, _Entry] = {}
    for target, entry in (pair for op in table for pair in _entries(op)):
        if entry.op.operands != ("x",) and target[0] != "call_module":
            entry = replace(entry, layout=layout_of(entry.op, target[1]))
            if entry.inplace and entry.layout[0][1] != 0:
                continue  # `addmm_` writes into the term that it adds, which is no operand
        first = index.setdefault(target, entry)
        if first != entry:
            raise ValueError(f"{target[1]} spells both {first.op.name!r} and {entry.op.name!r}")
    return index


_SPELLINGS = _index(tuple(OPS.values()))

_FUNCTIONS: dict[Any, _Entry] = {
    getattr(Tensor, target) if kind == "call_method" else target: entry
    for (kind, target), entry in _SPELLINGS.items()
    if kind != "call_module"
}


def has_derivative(value: Any) -> bool:
    """Whether a value can have a gradient; true for the nodes of a graph, of which it is not known."""
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, fx.Node)


def _no_parameter(argument: Any) -> int:
    return 0


def recognise(
    node: fx.Node,
    module: nn.Module | None,
    first: int = 0,
    wanted: Collection[str] = (),
    dims: Callable[[Any], int] = _no_parameter,
) -> Spelling | None:
    """Return how `node` calls an op, or None if it does not call one.

    Args:
        node: The node.
        module: The module that the node calls, or None.
        first: The index in `node.args` of the first argument of the called module or function.
        wanted: The ops to recognise among those that are sites only for tables that name them.
        dims: Returns the number of dimensions of a parameter, or of the transpose of one; 0 for other arguments.
    """
    called = ("call_module", plain_class(module)) if module is not None else None
    entry = _SPELLINGS.get(called or (node.op, node.target))
    if entry is None or not _is_wanted(entry, wanted):
        return None
    if getattr(module, "return_indices", False):
        return None
    # A flag that the graph computes is a node, and therefore counts as true
    inplace = bool(getattr(module, "inplace", False))
    spelling = _spelling(entry, node.args, node.kwargs, fx.Node, first, inplace, dims)
    if spelling is None or (spelling.op.on_demand and spelling.op.name not in wanted):
        return None
    if module is None or entry.op.operands == ("x",):
        return spelling
    held = {name for name, tensor in module.named_parameters(recurse=False) if tensor is not None}
    own = (Operand(name, held=name) for name in entry.op.operands if name in held)
    given = () if entry.op.operands[0] in held else spelling.operands
    return replace(spelling, found=(*given, *own))


def _is_wanted(entry: _Entry, wanted: Collection[str]) -> bool:
    if not entry.op.on_demand:
        return True
    # Most tables name no such op, and a block sees every sum and product of the model
    return bool(wanted) and any(name in wanted for name in entry.names)


def may_be_recognised(function: Callable[..., Any], wanted: Collection[str] = ()) -> bool:
    """Whether `recognise_call` can find that a call of a function calls an op."""
    entry = _FUNCTIONS.get(function)
    return entry is not None and _is_wanted(entry, wanted)


def recognise_call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    wanted: Collection[str] = (),
    dims: Callable[[Any], int] = _no_parameter,
) -> Spelling | None:
    """Return how a call that is about to run calls an op, or None if it does not call one.

    Args:
        function: A function of PyTorch, as ``__torch_function__`` receives it.
        args: Positional arguments.
        kwargs: Keyword arguments.
        wanted: See `recognise`.
        dims: See `recognise`.
    """
    entry = _FUNCTIONS.get(function)
    if entry is None or not _is_wanted(entry, wanted):
        return None
    spelling = _spelling(entry, args, kwargs, Tensor, dims=dims)
    if spelling is None or (spelling.op.on_demand and spelling.op.name not in wanted):
        return None
    return spelling


def _spelling(
    entry: _Entry,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    kind: type,
    first: int = 0,
    inplace: bool = False,
    dims: Callable[[Any], int] = _no_parameter,
) -> Spelling | None:
    flag = _argument(args, kwargs, entry.inplace_position, "inplace")
    how: dict[str, Any] = {
        "inplace": entry.inplace or inplace or bool(flag),
        "writes_out": kwargs.get("out") is not None,
    }
    if kwargs.get("return_indices") or kwargs.get("rounding_mode") is not None:
        return None  # a tuple, or integers
    if entry.layout:
        op, found = _with_operands(entry, args, kwargs, kind, dims)
        return Spelling(op, found[0].key, **how, found=found) if found else None
    key: int | str | None = first
    if len(args) <= first:
        key = next((k for k in FIRST if k in kwargs), None)
    if key is None or not isinstance(_argument(args, kwargs, key, key), kind):
        return None
    return Spelling(_narrowed(entry.op, args, kwargs), key, **how)


def _with_operands(
    entry: _Entry,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    kind: type,
    dims: Callable[[Any], int],
) -> tuple[Op, tuple[Operand, ...]]:
    """The op, and its operands that are tensors. A product with a parameter on its right is a linear layer."""
    if args and isinstance(args[0], str):  # the equation of `einsum`
        return entry.op, _of_einsum(args, kind)
    found = []
    for name, position, keywords in entry.layout:
        key = position if position is not None and position < len(args) else None
        place = next((k for k in keywords if k in kwargs), None) if key is None else key
        value = None if place is None else _argument(args, kwargs, place, place)
        if place is not None and isinstance(value, kind) and has_derivative(value):
            found.append(Operand(name, place))
    if entry.op is not MATMUL:
        if entry.op.name in ("add", "mul") and len(found) == 1:
            # PyTorch writes `2 * x` as `x * 2`, and so do some graphs
            found = [replace(found[0], name=entry.op.operands[0])]
        return entry.op, tuple(found)
    if len(found) < 2:  # no tensor is on one side
        return entry.op, ()
    a, b = found
    if dims(_argument(args, kwargs, b.key, b.key)) != 2:
        return entry.op, (a, b)
    if "alpha" in kwargs or "beta" in kwargs:
        return entry.op, (a, b)
    operands = [replace(a, name="x"), replace(b, name="weight", transposed=True)]
    if a.key != 0:  # `addmm` takes the bias first
        bias = next((k for k in (0, *FIRST) if k in kwargs or (k == 0 and args)), None)
        if bias is not None and dims(_argument(args, kwargs, bias, bias)) == 1:
            operands.append(Operand("bias", bias))
    return LINEAR, tuple(operands)


def _of_einsum(args: tuple[Any, ...], kind: type) -> tuple[Operand, ...]:
    """The operands of `einsum`, if they are two: arguments, or the items of a list."""
    listed = len(args) == 2 and isinstance(args[1], list | tuple)
    values = args[1] if listed else args[1:]
    if len(values) != 2 or not all(isinstance(v, kind) and has_derivative(v) for v in values):
        return ()
    if listed:
        return Operand("a", 1, item=0), Operand("b", 1, item=1)
    return Operand("a", 1), Operand("b", 2)


def _narrowed(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Op:
    case, given = CASES.get(op.name, (op.name, {}))
    arguments = [_argument(args, kwargs, i, name) for i, name in enumerate(given, start=1)]
    return OPS[case] if arguments == list(given.values()) else op


def _argument(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], position: int | str | None, name: int | str
) -> Any:
    if isinstance(position, int) and position < len(args):
        return args[position]
    return kwargs.get(str(name))
