"""`Activation`: a layer whose backward can be decoupled without `transform`. Independent of graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._torch.tensors import mark_as_parameter
from .context import (
    OWN_RULES,
    in_python,
    in_the_blocks_of_now,
    left_alone,
    tables_cannot_be_traced,
)
from .core.rule import Rule, RuleLike
from .core.scopes import parts_for
from .errors import RuleError, unknown
from .ops.gradients import decoupled, stop_gradient
from .vocabulary.activations import FORWARDS, OPS

__all__ = ["Activation"]

# FreeGrad's names of forwards, in addition to the names of the vocabulary
FREEGRAD = {
    "Linear": "identity",
    "ReLU": "relu",
    "ReLU6": "relu6",
    "LeakyReLU": "leaky_relu",
    "ELU": "elu",
    "Tanh": "tanh",
    "Logistic": "sigmoid",
    "SiLU": "silu",
    "GELU": "gelu",
    "Softplus": "softplus",
    "Heaviside": "heaviside",
}
_FORWARDS = {**{name: name for name in FORWARDS}, **FREEGRAD}


globals()[OWN_RULES] = True  # Activation puts the rules around its call


class Activation(nn.Module):
    """An activation layer whose backward follows `use` blocks or has a fixed rule.

    Formula: y = f(x); ∂x = rule(∂y, x, y) where a rule acts, else f'(x)·∂y, with PyTorch's derivatives of every order.
    Shapes: any; y has the shape of x.

    The layer's own rule takes precedence over ambient rules; `native` disables both. In a transformed model the layer
    is a site: a table entry takes precedence over ambient rules, but not over the layer's own rule.

    A parameter that the layer's own rule learns is a parameter of the layer, under the same name.

    Args:
        forward: One of FreeGrad's names, ``"Linear"``, ``"ReLU"``, ``"ReLU6"``, ``"LeakyReLU"``, ``"ELU"``,
            ``"Tanh"``, ``"Logistic"``, ``"SiLU"``, ``"GELU"``, ``"Softplus"``, ``"Heaviside"``; or the canonical name
            of an op that takes one tensor and keeps its shape, for example ``"mish"`` or ``"round"``.
        rule: A rule name, a `Rule` or a composition.
        params: Values for the rule's parameters.
        **parameters: Parameters of the forward, by PyTorch's names, for example ``negative_slope=0.2``.

    Raises:
        RuleError: The rule is unknown, lacks a parameter value, replaces a forward, or cannot be used for activations.
        TypeError: The forward does not accept the parameters.
        ValueError: The forward is unknown.

    Source: FreeGrad, ``freegrad.wrappers.Activation``.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> act = fg.Activation("ReLU")
        >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> with fg.use("scale", {"s": 3.0}):
        ...     y = act(x)
        >>> torch.autograd.grad(y.sum(), x)
        (tensor([3., 3.]),)
    """

    def __init__(
        self,
        forward: str = "ReLU",
        *,
        rule: RuleLike | None = None,
        params: Mapping[str, Any] | None = None,
        **parameters: Any,
    ) -> None:
        super().__init__()
        if forward not in _FORWARDS:
            raise ValueError(unknown("forward", forward, _FORWARDS))
        self.name = forward
        self.parameters_of_forward = parameters
        try:
            with left_alone():  # no site of a block
                self._function(torch.empty(1, 1, device="meta"))
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(
                f"Activation({forward!r}) cannot be computed with these parameters: {error}"
            ) from error
        if rule is None and params:
            raise RuleError(
                "params requires a rule: Activation(..., rule='scale', params={'s': 2.0})"
            )
        self.rules = () if rule is None else parts_for(("activations",), rule, params)
        # For each rule the parameters that it learns, with their names in the layer
        self._learnt = tuple(
            {name: self._hold(name, t) for name, t in r.learnt.items()} for r in self.rules
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x)."""
        if tables_cannot_be_traced():
            return in_python(self.forward, x)  # type: ignore[no-any-return]
        site = f"Activation({self.name!r})"
        if _FORWARDS[self.name] == "identity":
            x = x.clone()  # a later in-place write into the result must not change x without autograd's knowledge
        if not self.rules:
            y = self._function(stop_gradient(x, ambient="activations", site=site))
            return decoupled(y, x, ambient="activations", site=site)
        source = x
        # All rules except the first act around identities; the last rule is nearest to x
        for number in range(len(self.rules) - 1, -1, -1):
            rule = self.rules[number]
            y = self._function(stop_gradient(x)) if number == 0 else stop_gradient(source)
            given = {**rule.given, **self._learnt_values(number)}
            read = _read(rule, source, x)
            source = decoupled(y, source, *read, rule=rule.name, site=site, **given)
        return source

    def _hold(self, name: str, tensor: Tensor) -> str:
        """Register a tensor as a parameter. Returns the name by which the layer has it."""
        for own, held in self.named_parameters():
            if held is tensor:
                return own
        if not tensor.is_leaf:
            return ""
        own, number = name, 1
        while hasattr(self, own):
            number += 1
            own = f"{name}_{number}"
        mark_as_parameter(tensor)
        self.register_parameter(own, tensor)  # type: ignore[arg-type]
        return own

    def _learnt_values(self, number: int) -> dict[str, Tensor]:
        """The parameters that a rule learns, as the layer has them now: a functional call swaps them."""
        if not (
            names := self.__dict__.get("_learnt")
        ):  # a layer that an earlier release saved has none
            return {}
        return {name: getattr(self, own) for name, own in names[number].items() if own}

    def _function(self, x: Tensor) -> Tensor:
        function: Any = OPS[_FORWARDS[self.name]].function
        result: Tensor = function(x, **self.parameters_of_forward)
        return result

    def _replicate_for_data_parallel(self) -> Any:
        new = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        # the replica runs in another thread, which has no blocks
        new.__dict__["forward"] = in_the_blocks_of_now(new.forward)
        return new

    def extra_repr(self) -> str:
        """The forward, its parameters and the rules, for `repr`."""
        given = [f"{name}={value!r}" for name, value in self.parameters_of_forward.items()]
        own = [f"rule={' then '.join(map(repr, self.rules))}"] if self.rules else []
        return ", ".join([repr(self.name), *given, *own])


def _read(rule: Rule, source: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """What a rule of a composition reads instead of its source, which is the result of the next rules."""
    return (x,) if source is not x and "x" in rule.inputs else ()
