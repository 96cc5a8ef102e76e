"""`attach_param_hooks`: rules for the gradients of parameters, at the time of the backward."""

from __future__ import annotations

from torch import Tensor, nn

from freegrad_fx.context import ambient_rules_of_backward

__all__ = ["attach_param_hooks"]


def attach_param_hooks(model: nn.Module) -> None:
    """Let the gradients of all parameters of a model go through the rule of the block that the backward runs in.

    The rule acts if the scope of its `use` block has ``"params"`` or ``"all"`` in it. It is given no input.
    """
    for parameter in model.parameters():
        parameter.register_hook(_through_the_rule)  # type: ignore[no-untyped-call]


def _through_the_rule(grad: Tensor) -> Tensor:
    for rule in ambient_rules_of_backward("params"):
        grad = rule.backward(grad)
    return grad
