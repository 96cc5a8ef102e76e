"""What a table decides for the parameters of a plain model, before the model runs in a block."""

from __future__ import annotations

from torch import Tensor, nn

from ..plan import Decision
from ..plan.decide import decide
from ..sites.parameters import named_parameters
from ..table import RuleTable
from .sites import parameter_site

__all__ = ["decided_parameters"]


def decided_parameters(model: nn.Module, table: RuleTable) -> list[tuple[Tensor, Decision]]:
    """The parameters of a model that get rules or another forward, each once, with the decisions."""
    names: dict[int, tuple[str, ...]] = {}
    tensors: dict[int, Tensor] = {}
    for name, parameter in named_parameters(model):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
        tensors[id(parameter)] = parameter
    found: list[tuple[Tensor, Decision]] = []
    for identity, tensor in tensors.items():
        own = names[identity]
        holders = [model.get_submodule(name.rpartition(".")[0]) for name in own]
        decision = decide(parameter_site(tensor, own, holders), table)
        if decision.action == "rewrite":
            found.append((tensor, decision))
    return found
