"""Vector-Jacobian and Jacobian-vector products of a function whose sites have rules: `vjp` and `jvp`.

`vjp` is an ordinary backward pass. `jvp` transposes the backward, which requires that every rule is linear in the
gradient. This module tests that property; it does not depend on individual rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ._torch.generators import random_state_kept, seed
from ._torch.graphs import make_fx
from ._torch.tensors import empty_like_gradient
from .backward.functions import rule_behind
from .backward.paths import HIDING
from .backward.several import several_behind
from .blocks import use
from .core.rule import RuleLike
from .errors import RuleError

__all__ = ["jvp", "vjp"]


def __dir__() -> list[str]:
    return __all__


def vjp(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    rule: RuleLike | None = None,
    params: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return f(x) and the vector-Jacobian product at x under the rules in force.

    Formula: v ↦ vᵀJ, where J is the Jacobian of f with the derivatives of the sites replaced by their rules.

    Args:
        f: A function from a tensor to a tensor. The rule acts at its ambient sites: `Activation` layers and those of
            ``transform(model)``. Sites that a table gave a rule keep it.
        x: The point at which to evaluate. It does not have to require a gradient, and is not changed.
        rule: A rule for a `use` block around `f`. By default the blocks that are active act.
        params: Values for the rule's parameters.

    Returns:
        ``f(x)``, and a function from v, of the shape of f(x), to vᵀJ, of the shape of x.

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
    """Return the Jacobian-vector product at x under the rules in force.

    Formula: J·v, where J is the Jacobian of `vjp`, so that uᵀ(J·v) = (uᵀJ)·v. The product is exact: it is computed by
    differentiating the backward, which is linear in the gradient. A random rule draws once for the whole product.

    Args:
        f: As for `vjp`.
        x: The point at which to evaluate.
        v: The vector, of the shape of `x`.
        rule: As for `vjp`.
        params: As for `vjp`.

    Returns:
        J·v, of the shape of f(x).

    Raises:
        RuleError: A rule is not linear in the gradient, for example because it clips, so that no Jacobian exists; or
            its linearity cannot be determined. Also as for `vjp`.
        RuntimeError: The rules of `f` cannot be found: it is compiled, or uses `torch.vmap` or a reentrant checkpoint.
        TypeError: `f` does not return a tensor.

    Source: the product by two transpositions. FreeGrad's ``freegrad.functional.jvp`` is a finite difference of the
    forward, which does not depend on rules.
    """
    x, y = _run(f, x, rule, params)
    if not y.requires_grad:
        return torch.zeros_like(y)
    for node in _nodes(y):
        if node.name().startswith(HIDING):
            raise RuntimeError(
                f"jvp cannot find the rules in the function, because {node.name()} hides them: the function is "
                f"compiled, or uses vmap or a reentrant checkpoint. Pass a function that does not."
            )
        if (found := rule_behind(node) or several_behind(node)) is not None:
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


def _run(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    rule: RuleLike | None,
    params: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    if rule is None and params:
        raise RuleError("params requires a rule: vjp(f, x, rule='scale', params={'s': 2.0})")
    block: AbstractContextManager[Any] = nullcontext() if rule is None else use(rule, params)
    x = x.detach().requires_grad_()
    with torch.enable_grad(), block:
        y = f(x)
    if not isinstance(y, Tensor):
        raise TypeError(f"the function has to return a tensor; it returned {type(y).__name__}")
    return x, y


def _nodes(y: Tensor) -> Iterator[Any]:
    """The nodes of the autograd graph of a tensor."""
    waiting: list[Any] = [y.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
            yield node


def _require_linear(name: str, rule: Callable[[Tensor], Tensor], like: Tensor) -> None:
    """Raise `RuleError` unless a rule is linear in the gradient, with the values that it reads at a site.

    Two tests are made. A traced program of the rule's derivative must not depend on the gradient. The rule must also
    map sums to sums and zero to zero, which is tested with random gradients of several magnitudes; this detects
    constants and step functions, whose derivative is constant too.

    Args:
        name: The name of the rule for error messages.
        rule: The rule as a function of only the gradient.
        like: A tensor of the shape, dtype and device of the gradient.
    """
    with random_state_kept(like.device):
        try:
            linear = not _derivative_depends_on_gradient(rule, like) and _adds(rule, like)
        except Exception as error:
            raise RuleError(
                f"jvp cannot determine whether {name} is linear in the gradient; vjp() does not require that. "
                f"The reason: {error}"
            ) from error
    if not linear:
        raise RuleError(
            f"{name} is not linear in the gradient, so jvp has no Jacobian to multiply with. Use vjp(), which does not "
            f"require linear rules."
        )


def _derivative_depends_on_gradient(rule: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    def derivative(grad: Tensor, v: Tensor) -> Any:
        return torch.func.vjp(rule, grad)[1](v)

    grad = torch.randn_like(like)
    program = make_fx(derivative)(grad, torch.randn_like(rule(grad)))
    first, *others = program.graph.nodes
    reached = {first}
    for node in others:
        # The result of `zeros_like` and the like depends only on the shape of its input
        name = getattr(node.target, "_opname", "")
        of_shape_alone = name.endswith("_like") or name.startswith("new_")
        if not of_shape_alone and not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return any(node.op == "output" for node in reached)


def _adds(rule: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    """Whether a rule maps sums to sums and zero to zero, with the same random numbers at each call."""

    def drawn_alike(grad: Tensor) -> Tensor:
        seed(like.device, 0)
        return rule(grad)

    tolerance = torch.finfo(like.dtype).eps ** 0.5
    for size in (1e-3, 1.0, 1e3):
        a, b = size * torch.randn_like(like), size * torch.randn_like(like)
        parts = [drawn_alike(a), drawn_alike(b)]
        difference = (drawn_alike(a + b) - sum(parts)).abs()
        if not (difference <= tolerance * max(part.abs().max() for part in parts)).all():
            return False
    return not drawn_alike(torch.zeros_like(like)).any()
