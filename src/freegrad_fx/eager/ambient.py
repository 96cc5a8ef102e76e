"""What the table of a block decides for the ambient sites of a transformed model.

The graphs of the model hold these sites, so their calls are not intercepted: the plan of the model tells what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ..capture.captured import CapturedModule
from ..errors import RuleError
from ..plan import PLAN, Decision, Plan, also
from ..plan.decide import decide
from ..plan.groups import acts_together
from ..sites.owners import class_at, short_name
from ..sites.site import Located, LocatedParameter
from ..table import RuleTable
from ..vocabulary.activations import OPS

__all__ = ["at_ambient_sites", "follows_blocks", "path_in"]

_NOT_AMBIENT = (
    "the model was transformed without a rule for it, so that it follows no block; transform the original model with "
    "the table, or call that model in the block"
)

_NO_PLACES = (
    "the model was transformed without a rule there, and an ambient site follows a block in place of its own backward "
    "only; transform the original model with the table, or call that model in the block"
)


def follows_blocks(model: CapturedModule) -> bool:
    """Whether a transformed model has ambient sites."""
    plan = model.__dict__.get(PLAN)
    return isinstance(plan, Plan) and bool(plan.with_action("ambient"))


def path_in(model: nn.Module, part: CapturedModule) -> str | None:
    """The path of a transformed model in a model, also for a replica of it; None if it is no part of it."""
    plan = part.__dict__.get(PLAN)
    path: str
    for path, module in model.named_modules():
        if module is part or (plan is not None and module.__dict__.get(PLAN) is plan):
            return path
    return None


def at_ambient_sites(
    model: CapturedModule, table: RuleTable, path: str
) -> Iterator[tuple[str, Decision]]:
    """What a table decides for the sites of a transformed model that no entry of its own table decides.

    Args:
        model: The transformed model.
        table: The table of the block.
        path: The path of the transformed model, which the paths in the decisions begin with.

    Returns:
        The names of the sites in the model, each with the decision. One whose action is ``"skip"`` is not ambient.

    Raises:
        RuleError: An entry with `forward=`, or with a rule for several parameters together, decides a site.
    """
    if not follows_blocks(model):
        return
    plan: Plan = model.__dict__[PLAN]
    if table.ordered:
        raise RuleError(
            f"the entry {table.entries[table.ordered[0]].selector!r} selects the first operation of a call, and the "
            f"ambient sites of a transformed model do not tell their order. Transform the original model with the "
            f"table, transform(model, rules); or call that model in the block."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for own in plan.decisions:
        if own.action != "ambient" and (own.action != "native" or own.entry is not None):
            continue
        located = _located(model, own, parameters)
        if own.action != "ambient":
            located = replace(located, obstacle=located.obstacle or _NOT_AMBIENT)
        located = _below(path, located)
        decision = also(located, decide(located, table), table)
        if decision.forward is not None:
            raise RuleError(
                f"the entry {table.entries[decision.entry or 0].selector!r} replaces the forward of "
                f"{decision.site.name}, which is ambient: ambient sites keep their forward. Transform the original "
                f"model with the table, transform(model, rules); or call that model in the block."
            )
        if acts_together(decision.rules):
            raise RuleError(
                f"the entry {table.entries[decision.entry or 0].selector!r} gives a rule for several parameters "
                f"together (over=...) to {decision.site.name}, which is ambient. Transform the original model with the "
                f"table, transform(model, rules); or call that model in the block."
            )
        yield own.site.name, decision
        for edge in located.edges(table.placements):
            obstacle = edge.obstacle or _NO_PLACES
            held = replace(edge, obstacle=obstacle)
            yield f"{own.site.name}@{edge.site.at}", also(held, decide(held, table), table)


def _located(model: nn.Module, own: Decision, parameters: dict[str, Any]) -> Located:
    """A site of a transformed model, from its plan."""
    site = own.site
    if site.kind == "parameter":
        owners = tuple(class_at(model, name.rpartition(".")[0]) for name in site.names)
        return LocatedParameter(site, owners, tensor=parameters[site.names[0]], reads=())
    owner, op = class_at(model, site.path), OPS.get(site.op)
    is_call = op is not None and owner in op.modules and site.spelling.startswith(short_name(owner))
    obstacle = own.reason if own.action == "native" and own.reason != _UNDECIDED else ""
    return Located(site, (owner,), obstacle, op, owner if is_call else None)


_UNDECIDED = "no entry matches"


def _below(path: str, located: Located) -> Located:
    if not path:
        return located
    site = located.site
    inner = f"{path}.{site.path}" if site.path else path
    names = tuple(f"{path}.{name}" for name in site.names)
    return replace(located, site=replace(site, path=inner, names=names))
