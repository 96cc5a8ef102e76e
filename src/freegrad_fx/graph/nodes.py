"""Queries about a single node: its module, its arguments, its op. Independent of rules and sites."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._torch.modules import children_of
from ..ops.calls import call_with
from ..ops.hooked import call_without_hooks, forward_of, run_hooks, run_pre_hooks
from ..vocabulary.op import Operand, Spelling
from ..vocabulary.recognition import has_derivative, recognise
from .provenance import origin
from .shape_values import known_number

__all__ = [
    "argument",
    "attribute",
    "called_module",
    "called_path",
    "first_argument",
    "hooked_module",
    "new_node",
    "operand_node",
    "parameter_of",
    "set_operand",
    "spelled",
    "submodule",
    "takes_parameters",
]


def new_node(
    graph: fx.Graph,
    op: str,
    target: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> fx.Node:
    """Insert a node. Equivalent to `graph.create_node`, but faster.

    FX searches the arguments of a new node for symbolic numbers, which those that this package inserts do not contain,
    and makes a name in snake case.
    """
    name = getattr(target, "__name__", "")
    node = graph.create_node(op, target, name=name if name.islower() else None)
    node.args = args
    if kwargs:
        node.kwargs = dict(kwargs)
    return node


def attribute(node: fx.Node, root: nn.Module) -> Any:
    """The value that a get_attr node reads; None for other nodes, and if the attribute does not exist."""
    found: Any = root if node.op == "get_attr" else None
    for name in str(node.target).split("."):
        found = getattr(found, name, None)
    return found


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path. Equivalent to `root.get_submodule(path)`, but faster.

    Raises:
        AttributeError: There is no module at the path.
    """
    found: nn.Module | None = root
    for name in path.split(".") if path else ():
        # `_modules` of a ScriptModule is not a dict
        if found is None or isinstance(found, torch.jit.ScriptModule):
            return root.get_submodule(path)
        found = children_of(found).get(name)
    return root.get_submodule(path) if found is None else found


# Functions whose first two arguments are a module and tensors in place of its parameters
_CALLS = (call_with, call_without_hooks, forward_of)
_HOOKS = (run_pre_hooks, run_hooks)


def called_module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module that a node calls, directly or through a function of `ops`; None for other nodes."""
    if node.op == "call_module":
        return submodule(root, str(node.target))
    return _given_module(node, root) if node.target in _CALLS else None


def hooked_module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module whose forward hooks or pre-hooks a node runs; None for other nodes."""
    return _given_module(node, root) if node.target in _HOOKS else None


def _given_module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    module = attribute(node.args[0], root)  # type: ignore[arg-type]
    return module if isinstance(module, nn.Module) else None


def takes_parameters(node: fx.Node) -> bool:
    """Whether a node calls a function of `ops` whose second argument takes the place of parameters of a module."""
    return node.target in _CALLS or node.target in _HOOKS


def called_path(node: fx.Node) -> str:
    """The dotted path of the module that a node calls, directly or through a function of `ops`."""
    return str(node.args[0].target) if takes_parameters(node) else str(node.target)  # type: ignore[union-attr]


def first_argument(node: fx.Node) -> int:
    """The index in `node.args` of the first argument of the called module or function."""
    return 2 if node.target in _CALLS else 0


def argument(node: fx.Node, key: int | str) -> Any:
    """The argument of a node at a position or with a keyword."""
    return node.args[key] if isinstance(key, int) else node.kwargs[key]


def operand_node(node: fx.Node, operand: Operand) -> fx.Node | None:
    """The node of an operand of a call; None if the called module reads it from itself."""
    if operand.held:
        own = node.args[1] if takes_parameters(node) else {}
        return own.get(operand.held)  # type: ignore[union-attr,return-value]
    value = argument(node, operand.key)
    value = value if operand.item is None else value[operand.item]
    return value if isinstance(value, fx.Node) else None


def set_operand(node: fx.Node, operand: Operand, value: fx.Node) -> None:
    """Let a call take another node as an operand. A held one is among the parameters that the call is given."""
    if operand.held:
        node.update_arg(1, {**node.args[1], operand.held: value})  # type: ignore[dict-item]
    elif operand.item is not None:
        items = list(argument(node, operand.key))
        items[operand.item] = value
        node.update_arg(operand.key, items)  # type: ignore[arg-type]
    elif isinstance(operand.key, int):
        node.update_arg(operand.key, value)
    else:
        node.update_kwarg(operand.key, value)


def spelled(node: fx.Node, root: nn.Module, wanted: Collection[str] = ()) -> Spelling | None:
    """The op that a node calls, and how; None if it calls no op of the vocabulary.

    Args:
        node: The node.
        root: The module whose submodules the graph calls.
        wanted: The ops to recognise among those that are sites only for tables that name them.
    """
    module, first = called_module(node, root), first_argument(node)
    found = recognise(node, module, first, wanted, lambda argument: _dims(argument, root))
    if found is None or not found.op.on_demand:
        return found
    values = ((o, operand_node(node, o)) for o in found.operands)
    tensors = [o for o, v in values if o.held or (v is not None and not _is_number(v, root))]
    if not tensors:
        return None
    key = found.key if tensors[0].held else tensors[0].key
    return replace(found, key=key, found=tuple(tensors))


def _is_number(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node computes a number or a tensor without a derivative, as far as it is known."""
    example = node.meta.get("example_value", node.meta.get("val"))
    if node.op == "get_attr":
        example = attribute(node, root)
    if example is None:
        return known_number(node) is not None
    return not has_derivative(example)


def parameter_of(node: Any, root: nn.Module) -> Tensor | None:
    """The parameter that is the value of a node, or its example tensor; None for other nodes."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "get_attr":
        tensor = attribute(node, root)
        return tensor if isinstance(tensor, nn.Parameter) else None
    if node.op == "placeholder" and origin(node).parameter:
        example = node.meta.get("example_value", node.meta.get("val"))
        return example if isinstance(example, Tensor) else None
    return None


def _dims(argument: Any, root: nn.Module) -> int:
    """The number of dimensions of a parameter, or of the transpose of one; 0 for other values."""
    source = argument
    while isinstance(source, fx.Node) and _is_transpose(source):
        source = source.args[0]
    parameter = parameter_of(source, root)
    return 0 if parameter is None else parameter.dim()


_TRANSPOSES = ("t", "transpose", "swapaxes", "swapdims", "permute", "numpy_T", "adjoint", "mT")


def _is_transpose(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in ("T", "mT")
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op != "placeholder" and str(name).partition(".")[0] in _TRANSPOSES
