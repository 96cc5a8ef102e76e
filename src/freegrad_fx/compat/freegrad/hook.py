"""`attach_param_hooks`: rules for the gradients of parameters, at the time of the backward."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from freegrad_fx.context import ambient_rules
from freegrad_fx.errors import FreegradWarning

__all__ = ["attach_param_hooks"]


def attach_param_hooks(model: nn.Module) -> None:
    """Let the gradients of all parameters of a model go through the rule of the block that the backward runs in.

    The rule acts if the scope of its `use` block has ``"params"`` or ``"all"`` in it. It is given no input. On a GPU no
    rule ever acts, as in FreeGrad, and a `FreegradWarning` says so.
    """
    for parameter in model.parameters():
        parameter.register_hook(_through_the_rule)  # type: ignore[no-untyped-call]


def _through_the_rule(grad: Tensor) -> Tensor:
    if grad.device.type != "cpu":
        warnings.warn(
            f"the hooks of parameters on {grad.device} run in a thread of PyTorch's own, which is in no block: no rule "
            f"acts on them. Transform the model, freegrad_fx.transform(model), instead of attaching hooks; its "
            f"parameters follow the block of the forward on every device.",
            FreegradWarning,
            stacklevel=2,
        )
    for rule in ambient_rules("params"):
        grad = rule.backward(grad)
    return grad
