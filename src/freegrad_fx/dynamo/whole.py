"""Folds the call of a module into one node, in graphs in which Dynamo has traced into every module.

The nodes of the call are one node while sites are found and rewritten. Afterwards they are put back. This file does not
know rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..errors import PlanError
from ..graph.aliasing import written_argument

__all__ = ["Call", "captured_tensor", "fold", "refusal", "unfold"]


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        module: The module.
        name: Its dotted path, for errors.
        stack: The entries of `nn_module_stack` up to the module.
        nodes: The nodes of the call, in order.
    """

    module: nn.Module
    name: str
    stack: Mapping[str, Any]
    nodes: tuple[fx.Node, ...]


def fold(gm: fx.GraphModule, call: Call, number: int) -> fx.Node:
    """Fold a call into one node.

    Args:
        gm: The module of the graph; it is changed.
        call: The call.
        number: A number that no other call of the graph has.

    Returns:
        The node. Its first argument is the input tensor of the call; the others are parameters, buffers and sizes.

    Raises:
        PlanError: The call does not have exactly one tensor as input and one as output, or writes into its input.
    """
    inside = set(call.nodes)
    inputs = dict.fromkeys(
        value for node in call.nodes for value in node.all_input_nodes if value not in inside
    )
    state = {id(tensor) for tensor in (*call.module.parameters(), *call.module.buffers())}
    given = [v for v in inputs if _is_tensor(v) and id(captured_tensor(v)) not in state]
    outputs = [node for node in call.nodes if any(user not in inside for user in node.users)]
    if len(given) != 1:
        raise refusal(call.module, call.name, f"it has {len(given) or 'no'} tensors as input")
    if len(outputs) != 1 or not _is_tensor(outputs[0]):
        raise refusal(call.module, call.name, "it does not return one tensor", ways="")
    (x,), (y,) = given, outputs
    if any(written_argument(node, gm) is x for node in call.nodes):
        ways = "transform() and use()" if getattr(call.module, "inplace", False) else ""
        raise refusal(call.module, call.name, "it writes into its input tensor", ways=ways)
    body = fx.Graph()
    order = (x, *(value for value in inputs if value is not x))
    copies = {value: body.placeholder(value.name) for value in order}
    for node in call.nodes:
        copies[node] = body.node_copy(node, copies.__getitem__)
    body.output(copies[y])
    name = f"_freegrad_fx_call_{number}"
    gm.add_submodule(name, _instance(type(call.module), fx.GraphModule(gm, body)))
    with gm.graph.inserting_after(call.nodes[-1]):
        whole = gm.graph.call_module(name, order)
    whole.meta = {**y.meta, "nn_module_stack": dict(call.stack)}
    y.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in inside)
    for node in reversed(call.nodes):
        gm.graph.erase_node(node)
    return whole


def refusal(
    module: nn.Module, path: str, reason: str, *, ways: str = "transform() and use()"
) -> PlanError:
    """The error for a call that cannot be folded.

    Args:
        module: The module that is called.
        path: Its dotted path.
        reason: Why the call cannot be folded, as a clause.
        ways: What accepts such a call; ``""`` if nothing does.
    """
    kind = type(module).__name__
    remedy = f"Select the ops inside of {kind} instead"
    return PlanError(
        f"the table selects the calls of {kind}, but the call of {path or 'the root'} cannot be one site: {reason}. "
        f"Dynamo traces into every module, so a call can be a site only if it is in one graph and has one tensor as "
        f"input and one as output. {remedy}{f'; or use {ways}, where such a call can be a site' if ways else ''}."
    )


def unfold(gm: fx.GraphModule, whole: fx.Node) -> None:
    """Replace the node that `fold` made by the nodes of the call."""
    name = str(whole.target)
    body: fx.GraphModule = gm.get_submodule(name).get_submodule("body")  # type: ignore[assignment]
    copies: dict[fx.Node, Any] = {}
    arguments = iter(whole.args)
    with gm.graph.inserting_before(whole):
        for node in body.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(arguments)
            elif node.op == "output":
                whole.replace_all_uses_with(copies[node.args[0]])
            else:
                copies[node] = gm.graph.node_copy(node, copies.__getitem__)
    gm.graph.erase_node(whole)
    gm.delete_submodule(name)


def captured_tensor(node: fx.Node) -> Any:
    """The tensor that is an input of a captured graph; None if it is not known."""
    argument = node.meta.get("grapharg") if node.op == "placeholder" else None
    return None if argument is None else argument.example


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor)


def _instance(kind: type[nn.Module], body: fx.GraphModule) -> nn.Module:
    """An instance of a subclass of `kind` whose forward runs a graph."""

    def forward(self: Any, *args: Any) -> Any:
        return self.body(*args)

    made = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    module: nn.Module = object.__new__(made)
    nn.Module.__init__(module)
    module.body = body
    return module
