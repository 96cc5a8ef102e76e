"""Operators that run nested graphs in which a rule cannot act, and the sites in these graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx

from ..graph.provenance import META, Origin, origin
from ..sites.operations import find_sites
from ..sites.remarks import Opaque
from ..sites.site import Located
from ..table import RuleTable
from ..vocabulary.recognition import recognise
from .frames import Setting
from .homes import Home, Modules, source_of
from .nested import OPEN, all_bodies, graph_operator
from .programs import class_of

__all__ = ["closed_operators", "is_given_a_rule", "sites_in_closed"]


def sites_in_closed(
    homes: Mapping[fx.Node, Home], setting: Setting, modules: Modules, table: RuleTable
) -> Iterator[tuple[str, Located]]:
    """The sites in nested graphs in which a rule cannot act, each with the name of the operator that runs the graph."""
    for node, home in homes.items():
        name = graph_operator(node)
        if not name or name in OPEN or name == "autograd_function_apply":
            continue
        for body in all_bodies(node, home.graph_module):
            for inner in body.graph.nodes:
                owner = home.program.owner(
                    (*setting.modules, *modules.of(node), *modules.of(inner))
                )
                where = Origin(home.program.path(owner), source_of(inner), class_of(owner))
                inner.meta[META] = where
            yield from (
                (name, place) for place in find_sites(body.graph, body, wanted=table.on_demand)
            )


def is_given_a_rule(place: Located, table: RuleTable) -> bool:
    """Whether the table gives a rule to a site."""
    return table.gives(place) is not None


def closed_operators(homes: Mapping[fx.Node, Home]) -> Iterator[Opaque]:
    """The operators that run nested graphs in which a rule cannot act, if these compute activations.

    Also the autograd.Functions that Dynamo has traced into, if they do.
    """
    for node, home in homes.items():
        inside = origin(node)
        if inside.function and recognise(node, None) is not None:
            what, reason = f"autograd.Function {inside.function}", "keeps its own backward"
            yield Opaque(inside.owner, what, reason, inside.source)
        name = graph_operator(node)
        if not name or name in OPEN:
            continue
        where = origin(node)
        if name == "autograd_function_apply":
            what, reason = "an autograd.Function", "keeps its own backward"
        elif any(find_sites(b.graph, b) for b in all_bodies(node, home.graph_module)):
            what, reason = f"torch.{name}", "it runs nested graphs"
        else:
            continue
        yield Opaque(where.owner, what, reason, where.source)
