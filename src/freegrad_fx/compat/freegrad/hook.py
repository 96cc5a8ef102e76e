"""`attach_param_hooks`: applies rules to the gradients of parameters during the backward."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from freegrad_fx.context import ambient_rules
from freegrad_fx.errors import FreegradWarning

__all__ = ["attach_param_hooks"]


def attach_param_hooks(model: nn.Module) -> None:
    """Register hooks that apply the rule of the `use` block around the backward to all parameters of a model.

    The rule acts if the scope of the block includes ``"params"`` or ``"all"``. Its input is None. As in FreeGrad, rules
    never act on GPU parameters; a `FreegradWarning` is issued then.

    Args:
        model: The model.
    """
    for parameter in model.parameters():
        parameter.register_hook(_through_the_rule)  # type: ignore[no-untyped-call]


def _through_the_rule(grad: Tensor) -> Tensor:
    if grad.device.type != "cpu":
        warnings.warn(
            f"PyTorch runs the hooks of parameters on {grad.device} in its own thread, in which no block is in force, "
            f"so no rule acts on them. Use freegrad_fx.transform(model) instead of hooks: its parameters follow the "
            f"block of the forward on every device.",
            FreegradWarning,
            stacklevel=2,
        )
    for rule in ambient_rules("params"):
        grad = rule.backward(grad)
    return grad
