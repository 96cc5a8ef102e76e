"""Finds the sites of operations in a graph."""

from __future__ import annotations

import types as kinds
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from .._torch.operators import Overload
from ..graph.nodes import (
    argument,
    attribute,
    called_module,
    called_path,
    first_argument,
    operand_node,
    spelled,
)
from ..graph.provenance import origin
from ..ops.functions import apply_function, function_of
from ..ops.gradients import kept, stop_gradient
from ..vocabulary.activations import OPS
from ..vocabulary.comparisons import step_at
from ..vocabulary.op import Op, Operand, Spelling
from .alone import node_alone
from .compound import Compound
from .compounds import find_compounds
from .owners import already, class_at, decoupling, qualified, short_name
from .site import OUTPUT, LocatedOperation, Site

__all__ = ["dim_of", "find_sites", "spelled_function", "spelling_of"]


def find_sites(
    graph: fx.Graph,
    root: nn.Module,
    types: Sequence[type[Any]] = (),
    wanted: Collection[str] = (),
) -> list[LocatedOperation]:
    """List the sites of operations in a graph, in execution order.

    Args:
        graph: A captured graph.
        root: The module whose submodules the graph calls.
        types: Classes of modules and of autograd.Functions whose calls are also sites.
        wanted: The ops that are sites only for tables that name them, and that the table names.
    """
    found: list[LocatedOperation] = []
    calls: Counter[tuple[str, str]] = Counter()
    compounds = find_compounds(graph, root, wanted)
    for node in graph.nodes:
        if origin(node).function:
            continue
        for compound in compounds.get(node, ()):
            found.append(_compound_site(compound, root, calls))
        module = called_module(node, root)
        called = _called(node, module)
        step = step_at(node) if "comparison" in wanted else None
        spelling: Spelling | _Custom | None = spelled(node, root, wanted)
        if spelling is None and called is not None and issubclass(called, tuple(types)):
            spelling = _custom_spelling(node, module, root)
        if step is not None:
            spelling = Spelling(OPS["comparison"], step.key, inplace=False, writes_out=False)
        if spelling is None:
            continue
        where = origin(node)
        # An origin with a class also has the right path; the graph may call modules by other names
        own = module is None or where.owner_type is not None
        path = where.owner if own else called_path(node)
        name = spelling.op.name if isinstance(spelling, Spelling) else _class_name(called)
        owner = where.owner_type or class_at(root, path)
        operands = (
            spelling.operands if isinstance(spelling, Spelling) else (Operand("x", spelling.key),)
        )
        site = Site(
            kind="operation",
            op=name,
            path=path,
            call=where.call(name, calls[path, name]),
            spelling=spelling_of(node, called, spelling.inplace),
            source=where.source,
            type=qualified(owner),
        )
        calls[path, name] += 1
        found.append(
            LocatedOperation(
                site=site,
                owners=(owner,),
                obstacle=_obstacle(node, spelling),
                op=spelling.op if isinstance(spelling, Spelling) else None,
                called=called,
                # what a step converts is not its input
                alone=None if step else node_alone(node, spelling.key, module),
                dim=_dim_at(node, module, spelling),
                node=node,
                key=spelling.key,
                inplace=spelling.inplace,
                module=module,
                arguments=operands,
                tensors=tuple(operand.name for operand in operands),
                decoupled=tuple(_edges(node, ((o.name, operand_node(node, o)) for o in operands))),
                step=step,
            )
        )
    return found


def _compound_site(
    compound: Compound, root: nn.Module, calls: Counter[tuple[str, str]]
) -> LocatedOperation:
    """The site of an operation of several calls, whose owner is that of the last one."""
    node, name = compound.node, compound.op.name
    where = origin(node)
    own = called_module(node, root) is None or where.owner_type is not None
    path = where.owner if own else called_path(node)
    owner = where.owner_type or class_at(root, path)
    site = Site(
        kind="operation",
        op=name,
        path=path,
        call=where.call(name, calls[path, name]),
        spelling=compound.spelling,
        source=where.source,
        type=qualified(owner),
    )
    calls[path, name] += 1
    operands = tuple(Operand(operand) for operand in compound.reads)
    return LocatedOperation(
        site=site,
        owners=(owner,),
        obstacle=compound.obstacle or _has_rules(node) or _is_stopped(compound.operand("x")),
        op=compound.op,
        alone=compound.alone,
        node=node,
        key="",
        inplace=False,
        arguments=operands,
        tensors=tuple(compound.reads),
        decoupled=tuple(_edges(node, ((o.name, compound.operand(o.name)) for o in operands))),
        compound=compound,
    )


@dataclass(frozen=True)
class _Custom:
    """How a node calls a class that the table selects by type; like `Spelling` for an op of the vocabulary."""

    key: int | str
    inplace: bool
    writes_out: bool = False


def _dim_at(node: fx.Node, module: nn.Module | None, spelling: Spelling | _Custom) -> int | None:
    op = spelling.op if isinstance(spelling, Spelling) else None
    if op is None or module is None:
        return None if op is None else dim_of(op, node.args, node.kwargs)
    held = -3 if isinstance(module, nn.Softmax2d) else getattr(module, "dim", None)
    return dim_of(op, (), {"dim": held})


def dim_of(op: Op, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The dimension along which a call computes a softmax, if the call says it; None for other ops."""
    if "softmax" not in op.groups:
        return None
    given = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return given if type(given) is int else None


def _called(node: fx.Node, module: nn.Module | None) -> type[Any] | None:
    if node.target is apply_function:
        function: type[Any] = function_of(str(node.args[0]))
        return function
    return None if module is None else type(module)


def _class_name(called: type[Any] | None) -> str:
    return called.__name__ if called is not None else ""


def _custom_spelling(node: fx.Node, module: nn.Module | None, root: nn.Module) -> _Custom | None:
    """Take the first tensor argument that is no buffer as the activated tensor.

    It is overwritten if the module has a true `inplace`.
    """
    first = first_argument(node)
    positional = list(enumerate(node.args))[first:]
    given: list[tuple[int | str, Any]] = [*positional, *node.kwargs.items()]
    tensors = {key: value for key, value in given if isinstance(value, fx.Node)}
    moving = (key for key, value in tensors.items() if not _is_buffer(value, root))
    key = next(moving, next(iter(tensors), None))
    return None if key is None else _Custom(key, bool(getattr(module, "inplace", False)))


def _is_buffer(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node reads a tensor of a module that is no parameter."""
    tensor = attribute(node, root) if node.op == "get_attr" else None
    return isinstance(tensor, Tensor) and not isinstance(tensor, nn.Parameter)


def _edges(
    node: fx.Node, operands: Iterable[tuple[str, fx.Node | None]]
) -> Iterator[tuple[str, str]]:
    """The placements at which an earlier transform has put rules around a node, each with a rule."""
    for user in node.users:
        if user.args[1:2] == (node,) and (found := decoupling(user)):
            yield from [(OUTPUT, found[0])] if found[1].endswith(f"@{OUTPUT}") else []
    for name, value in operands:
        found = None if value is None else decoupling(_original(value))
        if found is not None and found[1].endswith(f"@{name}"):
            yield name, found[0]


def _original(source: fx.Node) -> fx.Node:
    while source.target in ("clone", kept):  # an in-place operation can run on a copy of its input
        source = source.args[0]  # type: ignore[assignment]
    return source


def _first(node: fx.Node, spelling: Spelling | _Custom) -> fx.Node:
    found = operand_node(node, spelling.operands[0]) if isinstance(spelling, Spelling) else None
    first: fx.Node = argument(node, spelling.key) if found is None else found
    return first


def _has_rules(node: fx.Node) -> str:
    rules = [
        found[0] for user in node.users if user.args[:1] == (node,) and (found := decoupling(user))
    ]
    return already(*rules) if rules else ""


def _is_stopped(value: fx.Node) -> str:
    stopped = _original(value).target is stop_gradient
    return "its input is already detached from the autograd graph" if stopped else ""


def _obstacle(node: fx.Node, spelling: Spelling | _Custom) -> str:
    if found := _has_rules(node) or _is_stopped(_first(node, spelling)):
        return found
    if node.kwargs.get("return_indices"):
        return "it returns a tuple"
    if spelling.writes_out:
        return "it writes its result into an out= tensor, which autograd does not support"
    return ""


def spelling_of(node: fx.Node, called: type[Any] | None, inplace: bool) -> str:
    """The call of a node as written in the model, for reports."""
    if called is not None and issubclass(called, nn.Module):
        return f"{short_name(called)}({'inplace=True' if inplace else ''})"
    if called is not None:
        return f"{called.__name__}.apply"
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return spelled_function(node.target, inplace)


def spelled_function(function: Any, inplace: bool) -> str:
    """The call of a function of PyTorch as users write it."""
    if isinstance(function, Overload):
        return str(function).rpartition(".")[0]
    if isinstance(function, kinds.MethodDescriptorType):
        return f"Tensor.{function.__name__}"
    owner = getattr(function, "__module__", None) or "torch"
    owner = {"torch.nn.functional": "F", "torch._C._nn": "F", "_operator": "operator"}.get(
        owner, owner
    )
    owner = "F" if owner.startswith("torch.nn") else owner
    name = getattr(function, "__name__", str(function))
    return f"{owner}.{name}{'(inplace=True)' if inplace and not name.endswith('_') else ''}"
