"""Folds the calls of the classes that a table selects, so that each call is one node."""

from __future__ import annotations

from collections import defaultdict

from torch import fx, nn

from ..table import RuleTable
from .frames import Setting
from .homes import Modules
from .nested import nodes_in_order
from .programs import Program
from .whole import Call, fold, refusal

__all__ = ["fold_calls"]


def fold_calls(
    gm: fx.GraphModule, table: RuleTable, setting: Setting, program: Program, modules: Modules
) -> dict[fx.GraphModule, list[fx.Node]]:
    """Fold every call of a class that the table selects into one node.

    Returns:
        The nodes, by the graph that contains them.

    Raises:
        PlanError: A call cannot be folded.
    """
    folded: dict[fx.GraphModule, list[fx.Node]] = defaultdict(list)
    kinds = tuple(table.types_in(program.root or gm))
    if not kinds:
        return folded
    for module in setting.modules:
        if isinstance(module, kinds):
            raise refusal(module, program.path(module), "Dynamo captures it in several graphs")
    calls: dict[tuple[fx.GraphModule, str], list[fx.Node]] = defaultdict(list)
    called: dict[str, nn.Module] = {}
    for node, graph_module in nodes_in_order(gm):
        if node.op in ("placeholder", "get_attr", "output"):
            continue  # Dynamo marks an input with the module that uses it first
        outermost = next((c for c in modules.calls(node) if isinstance(c[1], kinds)), None)
        if outermost is not None:
            key, module = outermost
            called[key] = module
            calls[graph_module, key].append(node)
    for number, ((graph_module, key), nodes) in enumerate(calls.items()):
        stack = dict(nodes[0].meta["nn_module_stack"])
        for further in list(stack)[list(stack).index(key) + 1 :]:
            del stack[further]
        call = Call(called[key], program.path(called[key]), stack, tuple(nodes))
        folded[graph_module].append(fold(graph_module, call, number))
    return folded
