"""A site as one call: the operation and its rule together, without the two functions around the operation.

The call runs the operation where autograd does not look at it, and gives the result the node. It answers only where
nothing is unusual, and otherwise leaves the call to the functions that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.dispatch import runs_alone
from .._torch.dynamo import is_compiling
from .._torch.functions import direct_apply
from ..core.contract import OF_MASK
from ..core.rule import get
from ..vocabulary.quantizers import heaviside
from .functions import Call, gradient, save_inputs
from .node import extension_in_use, resolved

__all__ = ["Operation", "fused"]


class Operation:
    """What a site runs.

    Attributes:
        function: What is called: a function, or a module; None for the identity.
        values: Its arguments, those by keyword at the end, with None in the place of the tensor.
        place: The index of the tensor among the arguments.
        names: The names of the arguments by keyword.
    """

    def __init__(
        self,
        function: Callable[..., Any] | None = None,
        values: tuple[Any, ...] = (None,),
        place: int = 0,
        names: tuple[str, ...] = (),
    ) -> None:
        self.function, self.values, self.place, self.names = function, values, place, names

    def of_one(self) -> Callable[[Tensor], Any]:
        """The operation as a function of the tensor."""
        if self.function is None:
            return Tensor.detach
        if len(self.values) == 1 and not self.names:
            return self.function
        function, values, place, names = self.function, [*self.values], self.place, self.names
        count = len(values) - len(names)

        def run(x: Tensor) -> Any:
            given = [*values]
            given[place] = x
            return function(*given[:count], **dict(zip(names, given[count:], strict=True)))

        return run


def fused(
    operation: Operation,
    keywords: Mapping[str, Any],
    stop_gradient: Callable[[Tensor], Tensor],
    decoupled: Callable[..., Any],
) -> Callable[[Tensor], Any] | None:
    """A function of ``x`` that gives what `decoupled` does for an operation on ``stop_gradient(x)``.

    Whoever calls it has to ask before whether anything watches or changes what the call does, as `capture.direct` does.

    Args:
        operation: The operation. It is one of PyTorch's or of this package, has no other tensor, and computes each
            entry of its result from the entry at the same place.
        keywords: The keywords of the call of `decoupled`.
        stop_gradient: The function before the operation, for unusual tensors.
        decoupled: The function after it.

    Returns:
        The function; None if the rule needs more.
    """
    if resolved(keywords) is None:
        return None
    run = operation.of_one()

    def around(y: Any, x: Tensor) -> Any:
        return decoupled(y, x, **keywords)

    def usual(x: Tensor) -> Any:
        return around(run(stop_gradient(x)), x)

    extension = extension_in_use()
    if extension is not None:
        function, values, place = operation.function, operation.values, operation.place
        names, rule = operation.names or None, keywords["rule"]
        again = lambda: resolved(keywords)  # noqa: E731
        step = function is heaviside and len(values) == 1
        return extension.fused(  # type: ignore[no-any-return]
            function, values, place, names, rule, usual, around, again, step
        )
    return _in_python(run, keywords, usual)


def _in_python(
    run: Callable[[Tensor], Any], keywords: Mapping[str, Any], usual: Callable[[Tensor], Any]
) -> Callable[[Tensor], Any]:
    name = keywords["rule"]
    rule: Any = None
    made: _Site | None = None
    is_enabled, apply, nothing = torch.is_grad_enabled, _apply, _NOTHING

    def site(x: Tensor) -> Any:
        nonlocal rule, made
        kind = type(x)
        if (kind is not Tensor and kind is not nn.Parameter) or not (
            is_enabled() and x.requires_grad
        ):
            return usual(x)
        if get(name) is not rule:
            rule, answer = get(name), resolved(keywords)
            made = None if answer is None else _Site(answer[0], run)
        return usual(x) if made is None else apply(nothing, x, made)

    return site


class _Site:
    """What the node of a site needs.

    Attributes:
        call: The rule with its parameters and options.
        run: The operation.
        saves: The names of what is saved; None if only `save_inputs` knows.
        formula: The formula of a rule of this package, which is tested to return a valid gradient; None otherwise.
        fast: Its fast form, if any.
    """

    __slots__ = ("call", "fast", "formula", "parameters", "run", "saves")

    def __init__(self, call: Call, run: Callable[[Tensor], Any]) -> None:
        declaration, masked = call.rule.declaration, call.save in OF_MASK
        self.call, self.run, self.parameters = call, run, call.parameters
        inputs = declaration.inputs
        self.saves = None if masked or call.save == "y" or len(inputs) > 1 else inputs
        own = declaration.own and not masked and not call.compile
        self.formula = declaration.function if own else None
        self.fast = declaration.fast


class _Decoupled(torch.autograd.Function):
    """What `functions._Decoupled` is, with the operation in its forward. The first input stands for its output."""

    @staticmethod
    def forward(ctx: Any, nothing: Tensor, x: Tensor, site: _Site) -> Tensor:
        y: Tensor = site.run(x)
        if y is x:  # autograd would take it for a view
            y = x.detach()
        saves = site.saves
        if saves is None:
            save_inputs(ctx, x, y, site.call)
        else:
            ctx.call, ctx.like = site.call, (x.shape, x.dtype)
            if saves:
                ctx.save_for_backward(x if saves == _X else y)
        ctx.site = site
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        site: _Site = ctx.site
        formula = site.formula
        if formula is None or is_compiling() or grad.layout is not torch.strided:
            return None, gradient(ctx, grad), None
        saved = ctx.saved_tensors
        fast = site.fast
        if fast is not None and runs_alone(grad):
            result = fast(grad, *saved, **site.parameters)
            if result is not NotImplemented:
                return None, result, None
        return None, formula(grad, *saved, **site.parameters), None


_X = ("x",)
_NOTHING = torch.empty(0)
_apply = direct_apply(_Decoupled)
