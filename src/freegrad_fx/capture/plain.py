"""The plain model of a captured one: an instance of the model's own class, with the state that the captured one has."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .._torch.modules import BUFFERS, CHILDREN, PARAMETERS
from ..core.contract import RULE_PARAMETER
from ..errors import PlanError
from .captured import KEYWORD_ONLY, SPECIALISED, CapturedModule
from .constants import CONSTANTS
from .export import ADOPTED
from .rule_parameters import GENERATOR, LEARNT, PLAN

__all__ = ["plain_model"]

_OF_CAPTURE = (PLAN, LEARNT, CONSTANTS, SPECIALISED, KEYWORD_ONLY, ADOPTED)
_OF_RULES = (RULE_PARAMETER, GENERATOR)


def plain_model(model: CapturedModule, memo: dict[int, Any]) -> nn.Module:
    """Copy a captured model as an instance of the class of the model that was captured, without graphs and rules.

    Args:
        model: The captured model.
        memo: The memo of the copy, as for `copy.deepcopy`. Captured parts of the model that are in it stay plain, too.

    Raises:
        PlanError: The model that was captured is a graph itself.
    """
    if model.own_class is None:
        raise PlanError(
            f"the model that was transformed into {type(model).__name__} is a graph itself, which the result does not "
            f"keep. Give that model, and the rules: materialize(model, rules)."
        )
    new: nn.Module = object.__new__(model.own_class)
    memo[id(model)] = new
    added = {*_OF_CAPTURE, *model.__dict__.get(ADOPTED, ())}

    def is_own(name: str) -> bool:
        return name not in added and not name.startswith(_OF_RULES)

    state: dict[str, Any] = {}
    for name, value in model.own_state().items():
        if name in (PARAMETERS, BUFFERS, CHILDREN):
            value = type(value)((n, v) for n, v in value.items() if is_own(n))
        if is_own(name) and not (name == "meta" and not value):  # that of a GraphModule is empty
            state[name] = value
    new.__dict__.update(copy.deepcopy(state, memo))
    return new
