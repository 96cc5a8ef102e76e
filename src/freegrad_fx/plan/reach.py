"""What a table has to reach in a model and does not, where a silent miss would give plausible gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from .._torch.parametrized import plain_class
from ..capture import Capture
from ..errors import PlanError
from ..graph.nodes import called_module, called_path, operand_node
from ..graph.provenance import origin
from ..sites.operations import find_sites
from ..vocabulary.activations import GROUPS
from .plan import Plan

__all__ = ["require_reached", "run_in"]

# In eval mode, they are linear
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ATTENTION = "scaled_dot_product_attention"


def run_in(capture: Capture) -> set[str]:
    """The paths of the modules whose operations are in the graphs of a captured model."""
    found = set()
    for variant in capture.variants:
        for node in variant.graph.nodes:
            if node.op not in ("placeholder", "get_attr", "output"):
                found.add(origin(node).owner)
                if called_module(node, capture.root) is not None:
                    found.add(called_path(node))
    return found


def require_reached(
    plan: Plan, model: nn.Module, ran: Collection[str], capture: Capture | None = None
) -> None:
    """Raise `PlanError` if the table of a plan does not reach what it has to reach.

    Args:
        plan: The plan.
        model: The model.
        ran: The paths of the modules that ran.
        capture: The captured model, before it is rewritten; None if there is none, and gates are not known.
    """
    missed: list[str] = []
    if "norm" in plan.table.reaches:
        missed += _norms(plan, model, ran)
    if "attention" in plan.table.reaches:
        missed += _attentions(plan)
    if "gate" in plan.table.reaches and capture is not None:
        missed += _gates(plan, capture)
    if missed:
        whole = capture is not None and any(note.holds and not note.asked for note in plan.opaque)
        other_way = (
            "freegrad_fx.compile(model, rules) reaches into what is kept as one opaque call; so does "
            "transform(model, rules, example_inputs=(...)), if torch.export takes the model. Or add"
        )
        raise PlanError(
            f"the table has to reach every {' and every '.join(plan.table.reaches)}, and does not reach: "
            f"{'; '.join(missed)}. {other_way if whole else 'Add'} an entry for each; with None as the backward, it "
            f"stays native on purpose. To do without this check, make the table without strict=True or "
            f"reaches=."
        )


def _norms(plan: Plan, model: nn.Module, ran: Collection[str]) -> Iterator[str]:
    """The norms at and below whose paths no entry decides anything."""
    decided = {d.site.path for d in plan.decisions if d.entry is not None and d.action != "skip"}
    for path, module in model.named_modules():
        kind = plain_class(module).__name__
        is_norm = "norm" in kind.lower() and not [*module.children()]
        if not is_norm or isinstance(module, _BATCH_NORMS) or path not in ran:
            continue
        if not any(p == path or p.startswith(f"{path}.") for p in decided):
            yield f"{path or 'the root'} ({kind})"


def _attentions(plan: Plan) -> Iterator[str]:
    """The calls inside of which PyTorch computes activations, and that have no rule at their operands."""
    calls = [d for d in plan.decisions if d.site.op == _ATTENTION]
    decided = {(d.site.path, d.site.call) for d in calls if d.entry is not None}
    fused = {path for path, _ in decided}
    for note in plan.opaque:
        if not note.asked and not (note.path in fused and _ATTENTION in note.what):
            yield str(note)
    # In a block, a table that names the operation makes its calls sites, which no note lists.
    noted = {note.path for note in plan.opaque if _ATTENTION in note.what}
    for site in (d.site for d in calls if d.site.at == "replace"):
        if (site.path, site.call) not in decided and site.path not in noted:
            yield f"the attention {site.name} ({site.source})"


def _gates(plan: Plan, capture: Capture) -> Iterator[str]:
    """The products with the result of an activation that no entry decides."""
    decided = {
        (d.site.path, d.site.call)
        for d in plan.decisions
        if d.site.op == "mul" and d.entry is not None and d.action != "skip"
    }
    found: dict[str, None] = {}
    for variant in capture.variants:
        places = find_sites(variant.graph, capture.root, wanted=("mul",))
        results = {
            p.node for p in places if p.op is not None and p.op.name in GROUPS["activations"]
        }
        for place in places:
            if place.op is None or place.op.name != "mul":
                continue
            factors = [operand_node(place.node, operand) for operand in place.arguments]
            site = place.site
            gate = len(factors) == 2 and not results.isdisjoint(filter(None, factors))
            if gate and (site.path, site.call) not in decided:
                found[f"the gate {site.name} ({site.source})"] = None
    yield from found
