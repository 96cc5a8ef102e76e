"""The weight and the bias of a layer into which the batch norm behind it is merged, for the rules that read them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import fx, nn

from ..graph.nodes import called_module, called_path, operand_node
from ..ops.merging import merged_parameters
from ..plan import Decided, Decision
from ..sites.merged import boundaries
from ..sites.site import REPLACE, Located, LocatedOperation, LocatedParameter
from ..vocabulary.arguments import argument_names
from ..vocabulary.op import Operand
from .surgery import Surgery

__all__ = ["has_merged", "with_merged_parameters"]


def has_merged(decided: Decided) -> bool:
    """Whether a layer into which a batch norm is merged gets a rule."""
    return any(_gets_rule(place, decision) for place, decision in decided)


def _gets_rule(place: Located, decision: Decision) -> bool:
    if not isinstance(place, LocatedOperation) or place.compound is None:
        return False
    merged = place.compound.merged is not None
    return merged and decision.acts and place.site.at == REPLACE


def with_merged_parameters(root: nn.Module, decided: Decided) -> Decided:
    """Insert what computes the parameters of merged layers that get a rule.

    Returns:
        The sites; the parameters are read by further nodes.
    """
    reads: dict[str, list[fx.Node]] = {}
    found: Decided = []
    for place, decision in decided:
        if isinstance(place, LocatedOperation) and _gets_rule(place, decision):
            place = _with_parameters(root, place, reads)
        found.append((place, decision))
    return [(_read(place, reads), decision) for place, decision in found] if reads else found


def _read(place: Located, reads: Mapping[str, list[fx.Node]]) -> Located:
    if not isinstance(place, LocatedParameter):
        return place
    more = [node for name in place.site.names for node in reads.get(name, ())]
    return replace(place, reads=(*place.reads, *more)) if more else place


def _with_parameters(
    root: nn.Module, place: LocatedOperation, reads: dict[str, list[fx.Node]]
) -> LocatedOperation:
    compound = place.compound
    assert compound is not None
    assert compound.merged is not None
    layer, norm = compound.parts
    surgery = Surgery(norm.graph, root, place.site, norm.meta)

    def read(path: str, module: nn.Module, name: str) -> fx.Node | None:
        if getattr(module, name, None) is None:
            return None
        node = surgery.node("get_attr", f"{path}.{name}")
        reads.setdefault(str(node.target), []).append(node)
        return node

    def own(operand: Operand | None) -> fx.Node | None:
        if operand is None:
            return None
        value = None if operand.held and called is not None else operand_node(layer, operand)
        if value is None and called is not None:
            return read(called_path(layer), called, operand.held)
        if value is not None and operand.transposed:
            return surgery.node("call_method", "transpose", (value, -2, -1))
        return value

    called, module = called_module(layer, root), called_module(norm, root)
    constants = compound.constants
    how: dict[str, Any] = {
        "site": place.site.name,
        "groups": constants.get("groups", 1),
        "transposed": "transpose" in constants.get("kind", "") or bool(constants.get("transposed")),
    }
    with norm.graph.inserting_before(norm):
        given: list[Any] = [own(compound.merged.weight), own(compound.merged.bias)]
        if module is not None:
            path = called_path(norm)
            given += [read(path, module, name) for name in _STATISTICS]
            how["norm"] = surgery.node("get_attr", path)
        else:
            names = argument_names(norm.target)
            arguments = {**dict(zip(names, norm.args, strict=False)), **norm.kwargs}
            given += [arguments.get(name) for name in _STATISTICS]
            how |= {"eps": arguments.get("eps", 1e-5), "training": arguments.get("training", False)}
        for name, paths in zip(("left", "entered"), boundaries(layer, norm, root), strict=True):
            how[name] = tuple(surgery.node("get_attr", path) for path in paths)
        given.insert(0, compound.operand("x"))
        both = surgery.node("call_function", merged_parameters, tuple(given), how)
        weight, bias = (
            surgery.node("call_function", operator.getitem, (both, index)) for index in (0, 1)
        )
    return replace(place, compound=replace(compound, computed={"weight": weight, "bias": bias}))


_STATISTICS = ("running_mean", "running_var", "weight", "bias")
