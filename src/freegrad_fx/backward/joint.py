"""Joins the gradients of several tensors into one flat gradient, so that one rule acts on all of them.

`gather` returns a tensor without memory that stands for all of them, and `scatter` gives them back from it:

    flat = gather(xs)                      # backward: the flat gradient is divided among the xs
    flat = decoupled(flat, ...)            # a rule acts on the flat gradient
    outs = scatter(flat, ys)               # the values of the ys; backward: the gradients become one

Does not depend on individual rules or on graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from .._torch.dynamo import is_compiling
from ..errors import RuleError

__all__ = ["gather", "recomputations", "require_undistributed", "require_whole", "scatter"]


class _Gather(torch.autograd.Function):
    """Forward: a tensor of the size of all arguments, of zeros, without memory. Backward: each gets its part."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*xs: Tensor) -> Tensor:
        dtype = xs[0].dtype
        for x in xs[1:]:
            dtype = torch.promote_types(dtype, x.dtype)
        return xs[0].new_zeros((), dtype=dtype).expand(sum(x.numel() for x in xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.like = [(x.shape, x.dtype) for x in inputs]
        ctx.used = None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (flat,) = grads
        parts = torch.split(flat, [shape.numel() for shape, _ in ctx.like])
        used = ctx.used or (True,) * len(parts)
        return tuple(
            part.view(shape).to(dtype) if wanted and needed else None
            for part, (shape, dtype), wanted, needed in zip(
                parts, ctx.like, used, ctx.needs_input_grad, strict=True
            )
        )


class _Scatter(torch.autograd.Function):
    """Forward: the values of all arguments but the first. Backward: their gradients, also as one flat gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(flat: Tensor, *ys: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.detach() for y in ys)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        flat, *ys = inputs
        ctx.like = [(y.numel(), y.device) for y in ys]
        ctx.dtype = flat.dtype
        ctx.recomputed = recomputations()
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(grads))
        require_whole(ctx.recomputed)
        gathering = _gathering(ctx)
        if gathering is None:
            counted = tuple(grad is not None for grad in grads)
        else:
            # one that is frozen after the transform has a gradient here, and none there
            pairs = zip(grads, gathering.needs_input_grad, strict=True)
            gathering.used = counted = tuple(g is not None and needed for g, needed in pairs)
        parts = []
        like = next(grad for grad in grads if grad is not None)
        for grad, (count, _), wanted in zip(grads, ctx.like, counted, strict=True):
            if wanted and grad is not None:
                parts.append(_dense(grad).reshape(-1).to(ctx.dtype))
            else:
                parts.append(like.new_zeros(count, dtype=ctx.dtype))
        return torch.cat(parts), *grads


def _dense(grad: Tensor) -> Tensor:
    if grad.layout is not torch.strided:
        raise RuleError(
            f"a rule for several parameters together (over=...) does not support a gradient of layout {grad.layout}. "
            f"Make it dense, for example with nn.Embedding(..., sparse=False)."
        )
    return grad


def _gathering(ctx: Any) -> Any:
    """The context of `_Gather` behind that of `_Scatter`; None if it is not found."""
    node = ctx
    while not hasattr(node, "used"):
        following = getattr(node, "next_functions", None)
        if not following:
            return None
        # the first input of `_Scatter`, and the second of a rule, is what stands for all tensors
        node = next((n for n, _ in following if n is not None), None)
    return node


def require_whole(before: int) -> None:
    """Raise `RuntimeError` if a backward gets the gradients of a recomputed part alone.

    Args:
        before: The result of `recomputations` in the forward.
    """
    if recomputations() > before:
        raise RuntimeError(
            "a rule for several parameters together (over=...) got the gradients of one recomputed part alone, because "
            "the model has a torch.utils.checkpoint with use_reentrant=True in it. Use use_reentrant=False, or "
            "checkpoint the whole model."
        )


def recomputations() -> int:
    """How many recomputations of reentrant checkpoints, which call backward inside of a backward, are running."""
    if is_compiling():
        return 0
    count, frame = 0, sys._getframe()
    while frame is not None:
        count += frame.f_code is _RECOMPUTATION
        frame = frame.f_back  # type: ignore[assignment]
    return count


_RECOMPUTATION = CheckpointFunction.backward.__code__


def gather(xs: Sequence[Tensor]) -> Tensor:
    """Return a tensor that stands for several: it has as many entries as all of them, and no memory.

    Args:
        xs: The tensors.

    Raises:
        RuleError: They are on several devices, or one is distributed.
    """
    require_undistributed(xs)
    if is_compiling():
        return torch.ops.freegrad_fx.gather(list(xs))  # type: ignore[no-any-return]
    devices = {x.device for x in xs}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise RuleError(
            f"a rule for several parameters together (over=...) needs them on one device; they are on {names}. Give "
            f"the parameters of each device an entry of their own."
        )
    return _Gather.apply(*xs)  # type: ignore[no-any-return, no-untyped-call]


def require_undistributed(xs: Sequence[Tensor]) -> None:
    """Raise `RuleError` if one of several parameters that have a rule together is distributed."""
    if any(hasattr(x, "device_mesh") for x in xs):
        raise RuleError(
            "a rule for several parameters together (over=...) does not support DTensors, whose parts are on several "
            "processes: parameters of parallelize_module, and those that fully_shard has not gathered yet. Leave out "
            "over=, and the rule acts on each parameter; or shard the transformed model as a whole, "
            "fully_shard(transform(model, rules)); or clip what the optimizer receives, with "
            "torch.nn.utils.clip_grad_norm_."
        )


def scatter(flat: Tensor, ys: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the values of tensors, whose gradients become the flat gradient of `flat`.

    Args:
        flat: What `gather` returned, after a rule.
        ys: The tensors whose values are returned. They also get their gradients.
    """
    if is_compiling():
        return tuple(torch.ops.freegrad_fx.scatter(flat, list(ys)))
    return _Scatter.apply(flat, *ys)  # type: ignore[no-any-return, no-untyped-call]


# Composite, so that autograd and AOTAutograd trace into them
_library: Any = torch.library.Library("freegrad_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("gather(Tensor[] xs) -> Tensor")
_library.define("scatter(Tensor flat, Tensor[] ys) -> Tensor[]")
_library.impl("gather", lambda xs: _Gather.apply(*xs), "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl(
    "scatter",
    lambda flat, ys: list(_Scatter.apply(flat, *ys)),  # type: ignore[no-untyped-call]
    "CompositeImplicitAutograd",
)
