"""Cases of `_peer_rules` for libraries whose rules are no spikes or attributions: transforms of gradients, samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import freegrad_fx as fg

from ._peer_rules import Case

_SINGLE = "the library computes in single precision"


def _inputs(*shape: int) -> tuple[Tensor, ...]:
    """A gradient, an input and an output of normal numbers."""
    return tuple(torch.randn(3, *shape, generator=torch.Generator().manual_seed(2)))


# --- optax: transforms of the gradient of a parameter ---


def _of_optax(rule: Any, name: str, *values: Any, last: bool = False, nan: bool = False) -> Case:
    """A transform of optax.

    Args:
        rule: Ours.
        name: What optax calls it.
        *values: Its arguments.
        last: Whether it takes the output channels in the last dimension.
        nan: Whether an entry of the gradient is NaN.
    """

    def compare(module: Any) -> tuple[Tensor, Tensor]:
        grad, x, _ = _inputs(6, 20)
        if nan:
            grad[0, 0] = torch.nan
        transform = getattr(module, name)(*values)
        given = [(t.T if last else t).numpy() for t in (grad, x)]
        found, _ = transform.update(given[0], transform.init(given[1]), given[1])
        theirs = torch.tensor(found.tolist())
        return rule.backward(grad, x=x), theirs.T if last else theirs

    return Case(name, "optax", rule, compare, rounding=1e-6, note=_SINGLE)


# --- torchao ---


def _int8_rowwise(module: Any) -> tuple[Tensor, Tensor]:
    grad, _, _ = _inputs(6, 20)
    levels, scale = module.quantize_int8_rowwise(grad)
    return fg.get("quantize_int8").backward(grad), levels * scale[:, None]


# --- samples and vector quantisation ---


def _reinmax(module: Any) -> tuple[Tensor, Tensor]:
    grad, x, _ = (t.double() for t in _inputs(6, 20))
    leaf = x.clone().requires_grad_()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        sample, _ = module.reinmax(leaf, 1.3)
    (theirs,) = torch.autograd.grad(sample, leaf, grad)
    return fg.get("reinmax")(tau=1.3).backward(grad, x=x, y=sample.detach()), theirs


def _rotation(module: Any) -> tuple[Tensor, Tensor]:
    grad, x, y = (t.double() for t in _inputs(6, 20))
    leaf = x.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(module.rotate_to(leaf, y), leaf, grad)
    return fg.get("rotation_trick").backward(grad, x=x, y=y), theirs


def _named(rule: str, **values: Any) -> Any:
    return fg.get(rule)(**values)


def cases() -> Iterator[Case]:
    """All cases, library by library."""
    yield _of_optax(_named("clip_value", max_value=0.7), "clip", 0.7)
    yield _of_optax(_named("clip_norm", max_norm=0.7), "clip_by_global_norm", 0.7)
    yield _of_optax(_named("block_rms", target=0.7), "clip_by_block_rms", 0.7)
    yield _of_optax(
        _named("adaptive_clip", clipping=0.3, eps=0.2), "adaptive_grad_clip", 0.3, 0.2, last=True
    )
    yield _of_optax(_named("normalize"), "normalize_by_update_norm")
    yield _of_optax(_named("sign_gradient"), "scale_by_sign")
    yield _of_optax(_named("trust_ratio"), "scale_by_trust_ratio")
    yield _of_optax(_named("centralize", dim=1), "centralize")
    yield _of_optax(_named("decay", rate=0.3), "add_decayed_weights", 0.3)
    yield _of_optax(_named("nan_to_zero"), "zero_nans", nan=True)
    yield Case(
        "quantize_int8_rowwise",
        "torchao.prototype.quantized_training.int8",
        _named("quantize_int8"),
        _int8_rowwise,
        rounding=1e-6,
        note=_SINGLE,
    )
    yield Case("reinmax", "reinmax", _named("reinmax", tau=1.3), _reinmax)
    yield Case(
        "rotate_to",
        "vector_quantize_pytorch.vector_quantize_pytorch",
        _named("rotation_trick"),
        _rotation,
    )
