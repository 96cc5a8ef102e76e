"""Rules for the norms, the attention and the gates of transformers, for attribution in gradient space.

What flows backward is relevance divided by value. The README of LXT says that layer-wise relevance propagation is
patented, and free for personal and scientific use.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..core.register import register
from .precision import wide

__all__ = ["attention_temperature", "frozen_norm", "half", "softmax_temperature"]


@register(
    "half",
    reference="Jafari et al. 2025, arXiv:2508.21258 (RelP); Achtibat et al. 2024, arXiv:2402.05602 (AttnLRP)",
    peers="LXT divide_gradient",
    sparse=True,
    pointwise=True,
)
def half(grad: Tensor) -> Tensor:
    """grad/2

    At the output of a product a·b, both factors get half of the relevance, instead of all of it each.
    """
    return grad / 2


@register(
    "frozen_norm",
    reference="Ali et al. 2022, arXiv:2202.07304 (CP-LRP)",
    peers="LXT layer_norm, rms_norm",
    kinds="operation",
    meant_for=("layer_norm", "rms_norm", "group_norm"),
    reducing=True,
)
def frozen_norm(grad: Tensor, x: Tensor, weight: Tensor | None, *, f: Any) -> Tensor:
    """h − mean(h), with h = grad·weight/σ and a constant σ, the denominator of the norm; h at an RMSNorm

    The norm is then linear in its input, up to the division by σ. In a second derivative, σ is constant too.
    """
    constants, rms = f.constants, f.operation == "rms_norm"
    g, rows = wide(grad), wide(x.detach())
    if f.operation == "group_norm":
        g = g if weight is None else g * weight.reshape(-1, *[1] * (x.dim() - 2))
        shape: tuple[int, ...] = (x.shape[0], constants["num_groups"], -1)
    else:
        g = g if weight is None else g * weight
        sizes = constants.get("normalized_shape", ())
        count = constants.get("dims", 1 if isinstance(sizes, int) else len(sizes))
        shape = (*x.shape[: x.dim() - count], prod(x.shape[x.dim() - count :]))
    g, rows = g.reshape(shape), rows.reshape(shape)
    if not rms:
        rows = rows - rows.mean(-1, keepdim=True)
    eps = constants.get("eps", None if rms else 1e-5)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    h = g * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)
    h = h if rms else h - h.mean(-1, keepdim=True)
    return h.reshape(x.shape).to(x.dtype)


@register(
    "softmax_temperature",
    reference="Edin et al. 2025, arXiv:2505.17630 (GIM)",
    peers="gim-explain",
    kinds="operation",
    meant_for="softmax",
    requires="temperature > 0",
    reducing=True,
    examples=({"temperature": 1.0}, {"temperature": 4.0}),
)
def softmax_temperature(grad: Tensor, x: Tensor, *, f: Any, temperature: float = 2.0) -> Tensor:
    """s·(grad − Σ grad·s), with s = softmax(x/temperature)

    A saturated softmax has nearly no gradient; a higher temperature shows what competes in it.

    Args:
        temperature: The temperature of the backward; with 1, the gradient is native.
    """
    return f.gradient("x", grad, x=x / temperature)  # type: ignore[no-any-return]


@register(
    "attention_temperature",
    reference="Edin et al. 2025, arXiv:2505.17630 (GIM)",
    kinds="operation",
    meant_for="scaled_dot_product_attention",
    requires="temperature > 0",
    answers=("query", "key"),
    reducing=True,
    examples=({"temperature": 1.0}, {"temperature": 4.0}),
)
def attention_temperature(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    f: Any,
    temperature: float = 2.0,
) -> Any:
    """Those of query and key through softmax(scores/temperature); that of value is native

    The same as `softmax_temperature` at the softmax inside of the attention.

    Args:
        temperature: The temperature of the backward; with 1, the gradient is native.
    """
    cooled = query / temperature
    return {
        "query": lambda: f.gradient("query", grad, query=cooled),
        "key": lambda: temperature * f.gradient("key", grad, query=cooled),
    }
