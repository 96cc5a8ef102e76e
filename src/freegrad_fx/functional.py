"""Products with the Jacobian that rules make: `vjp` and `jvp` of a function, under the rules of its sites.

A rule is a map of gradients, so `vjp` needs nothing else. Where the map is linear it has a transpose, which is what
`jvp` applies; this file knows how to tell, and no rule by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._torch.graphs import make_fx
from ._torch.tensors import empty_like_gradient
from .backward.functions import rule_behind
from .context import use
from .core.rule import RuleLike
from .errors import RuleError

__all__ = ["jvp", "vjp"]


def vjp(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    rule: RuleLike | None = None,
    params: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return f(x) and the function that maps v, of the shape of f(x), to the gradient that reaches x.

    Formula: v ↦ vᵀJ, where J is the Jacobian that the rules in force make of that of f.

    Args:
        f: A function of a tensor. The rule acts at the ambient sites in it: `Activation` layers, and those of
            ``transform(model)``. Tables keep theirs.
        x: Where. It need not require a gradient, and is not changed.
        rule: A rule for `use`; without one, the blocks that are entered act.
        params: Values for the rule's parameters.

    Raises:
        RuleError: As for `use`.
        TypeError: `f` does not return a tensor.

    Source: FreeGrad, ``freegrad.functional.vjp``.
    """
    x, y = _run(f, x, rule, params)

    def vjp_function(v: Tensor) -> Tensor:
        if not y.requires_grad:
            return torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(y, x, v, retain_graph=True, materialize_grads=True)
        return gradient

    return y, vjp_function


def jvp(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    v: Tensor,
    *,
    rule: RuleLike | None = None,
    params: Mapping[str, Any] | None = None,
) -> Tensor:
    """Return the product with the same Jacobian from the other side.

    Formula: J·v, of the shape of f(x); uᵀ(J·v) = (uᵀJ)·v with the uᵀJ of `vjp`. It is exact: a rule that is linear in
    the gradient is transposed, by differentiating it. What a rule draws at random is drawn once for the whole product.

    Args:
        f: As for `vjp`.
        x: Where.
        v: Of the shape of `x`.
        rule: As for `vjp`.
        params: As for `vjp`.

    Raises:
        RuleError: A rule is not linear in the gradient, as those that clip are not, so that there is no Jacobian; or it
            cannot be told. Otherwise as for `vjp`.
        RuntimeError: `f` hides its rules: it is compiled, or uses `torch.vmap` or a reentrant checkpoint.
        TypeError: `f` does not return a tensor.

    Source: the product by two transpositions; FreeGrad's ``freegrad.functional.jvp`` is a finite difference of the
    forward, which no rule changes.
    """
    x, y = _run(f, x, rule, params)
    if not y.requires_grad:
        return torch.zeros_like(y)
    for node in _nodes(y):
        if node.name().startswith(_HIDING):
            raise RuntimeError(
                f"the rules in the function cannot be seen behind {node.name()}: it is compiled, or uses vmap or a "
                f"reentrant checkpoint. Give jvp a function without."
            )
        if (found := rule_behind(node)) is not None:
            rule_found, site, apply = found
            _require_linear(
                f"rule {rule_found.name!r}" + (f" at site {site!r}" if site else ""),
                apply,
                empty_like_gradient(node),
            )
    u = torch.zeros_like(y, requires_grad=True)
    (gradient,) = torch.autograd.grad(y, x, u, create_graph=True, materialize_grads=True)
    if not gradient.requires_grad:
        return torch.zeros_like(y)
    (product,) = torch.autograd.grad(gradient, u, v, materialize_grads=True)
    return product


# Of nodes of an autograd graph: what they do in the backward is in no node
_HIDING = ("CompiledFunction", "ApplyTemplate", "Vmapped", "CheckpointFunction")


def _run(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    rule: RuleLike | None,
    params: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    if rule is None and params:
        raise RuleError("params are those of a rule: vjp(f, x, rule='scale', params={'s': 2.0})")
    block: AbstractContextManager[Any] = nullcontext() if rule is None else use(rule, params)
    x = x.detach().requires_grad_()
    with torch.enable_grad(), block:
        y = f(x)
    if not isinstance(y, Tensor):
        raise TypeError(f"the function returned {type(y).__name__}, and not a tensor")
    return x, y


def _nodes(y: Tensor) -> Iterator[Any]:
    """The nodes of the autograd graph behind a tensor."""
    waiting: list[Any] = [y.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
            yield node


def _require_linear(name: str, rule: Callable[[Tensor], Tensor], like: Tensor) -> None:
    """Raise `RuleError` unless a rule is linear in the gradient, with the values that it has at a site.

    A rule is linear if its derivative does not depend on the gradient, which the program that computes the derivative
    shows, and if it maps sums to sums and zero to zero, which a few gradients of several sizes show. The second
    catches constants and steps, of which a derivative tells nothing.

    Args:
        name: What to call it in an error.
        rule: The rule as a function of the gradient alone.
        like: A tensor of the shape, dtype and device of the gradient.
    """
    with _random_state_kept(like.device):
        try:
            linear = not _derivative_depends_on_gradient(rule, like) and _adds(rule, like)
        except Exception as error:
            raise RuleError(
                f"it cannot be told whether {name} is linear in the gradient, and so whether there is a Jacobian to "
                f"multiply with: {error}"
            ) from error
    if not linear:
        raise RuleError(
            f"{name} is not linear in the gradient, so that there is no Jacobian to multiply with; vjp() takes it."
        )


def _generators(device: torch.device) -> list[torch.Generator]:
    """What a rule may draw from."""
    if device.type == "cpu":
        return [torch.default_generator]
    own = torch.get_device_module(device).default_generators
    return [torch.default_generator, own[device.index or 0]]


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    generators = _generators(device)
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _derivative_depends_on_gradient(rule: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    def derivative(grad: Tensor, v: Tensor) -> Any:
        return torch.func.vjp(rule, grad)[1](v)

    grad = torch.randn_like(like)
    program = make_fx(derivative)(grad, torch.randn_like(rule(grad)))
    first, *others = program.graph.nodes
    reached = {first}
    for node in others:
        # What is made in the shape of a tensor does not depend on its values
        name = getattr(node.target, "_opname", "")
        of_shape_alone = name.endswith("_like") or name.startswith("new_")
        if not of_shape_alone and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return any(node.op == "output" for node in reached)


def _adds(rule: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    """Whether a rule maps sums to sums and zero to zero, where it draws the same random numbers."""

    def drawn_alike(grad: Tensor) -> Tensor:
        for generator in _generators(like.device):
            generator.manual_seed(0)
        return rule(grad)

    tolerance = torch.finfo(like.dtype).eps ** 0.5
    for size in (1e-3, 1.0, 1e3):
        a, b = size * torch.randn_like(like), size * torch.randn_like(like)
        parts = [drawn_alike(a), drawn_alike(b)]
        difference = (drawn_alike(a + b) - sum(parts)).abs()
        if not (difference <= tolerance * max(part.abs().max() for part in parts)).all():
            return False
    return not drawn_alike(torch.zeros_like(like)).any()
