"""The comparisons that get a rule, as calls of one function of the difference of the two sides."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..graph.provenance import META
from ..ops.comparisons import difference, input_of_step
from ..plan import Decided
from ..sites.site import Located, LocatedOperation
from ..vocabulary.comparisons import Step, compared
from ..vocabulary.op import Operand

__all__ = ["steps_to_open", "with_open_steps"]


def steps_to_open(decided: Decided) -> dict[fx.Node, Step]:
    """The comparisons that get a rule, by the node that converts their results into numbers."""
    return {
        place.node: place.step
        for place, decision in decided
        if isinstance(place, LocatedOperation) and place.step is not None and decision.acts
    }


def with_open_steps(decided: Decided) -> Decided:
    """Open the comparisons that get a rule.

    Returns:
        The sites with the nodes that they have now.
    """
    opened = {node: _open(step) for node, step in steps_to_open(decided).items()}
    return [
        (_opened(place, opened[place.node]), decision)
        if isinstance(place, LocatedOperation) and place.node in opened
        else (place, decision)
        for place, decision in decided
    ]


def _open(step: Step) -> fx.Node:
    """Insert the call of `compared`. Its value is still the one that the model computes.

    The difference is computed where the comparison is, because the model may write into the sides later.
    """
    node, graph = step.node, step.node.graph
    with graph.inserting_before(step.compared):
        found = graph.call_function(difference, (step.larger, step.smaller))
    with graph.inserting_after(node):
        x = graph.call_function(input_of_step, (found, node))
    with graph.inserting_after(x):
        value = graph.call_function(compared, (x, node))
    for new in (found, x, value):
        new.meta.update({key: node.meta[key] for key in _PLACE if key in node.meta})
    node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in (x, value))
    return value


_PLACE = ("nn_module_stack", META)
"""What tells the place of a node in the model."""


def _opened(place: LocatedOperation, value: fx.Node) -> Located:
    return replace(place, node=value, key=0, arguments=(Operand("x", 0),), step=None)
