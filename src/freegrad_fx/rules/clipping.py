"""Rules that bound, normalise or rescale the size of the gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.register import register
from .precision import per_row, times, wide

__all__ = [
    "adaptive_clip",
    "block_rms",
    "clip_norm",
    "clip_value",
    "normalize",
    "per_sample_clip_norm",
    "trust_ratio",
]


@register(
    "clip_value",
    reference="Mikolov 2012, Statistical language models based on neural networks",
    peers=("optax clip", "torch.nn.utils.clip_grad_value_"),
    linear=False,
    requires="max_value >= 0",
    examples=({"max_value": 0.0}, {"max_value": 0.3}, {"max_value": 3.0}, {"max_value": math.inf}),
    pointwise=True,
)
def clip_value(grad: Tensor, *, max_value: float = 1.0) -> Tensor:
    """min(max(grad, −max_value), max_value)

    Args:
        max_value: The largest absolute value of an entry, at least 0.
    """
    return grad.clamp(-max_value, max_value)


@register(
    "clip_norm",
    reference="Pascanu et al. 2013, arXiv:1211.5063",
    peers=("FreeGrad clip_norm", "torch.nn.utils.clip_grad_norm_", "optax clip_by_global_norm"),
    linear=False,
    reducing=True,
    joint=True,
    requires="max_norm >= 0, eps >= 0",
    examples=(
        {"max_norm": 0.0},
        {"max_norm": 0.5, "eps": 1e-6},
        {"max_norm": 3.0, "eps": 50.0},
        {"max_norm": 100.0},
        {"max_norm": math.inf},
    ),
)
def clip_norm(grad: Tensor, *, max_norm: float = 1.0, eps: float = 1e-12) -> Tensor:
    """grad·min(1, max_norm/max(‖grad‖₂, eps)), the norm taken over the whole tensor

    The peers outside of FreeGrad take one norm over all parameters, as ``over="all"`` does; torch adds 10⁻⁶ to it.

    Args:
        max_norm: The largest norm, at least 0. Infinity leaves every gradient as it is, also one with infinite entries.
        eps: The smallest norm that is divided by, at least 0.
    """
    if not isinstance(max_norm, Tensor) and max_norm == math.inf:
        return grad  # the derivative of the factor would be 0·∞
    # at least float32: the norm of a large tensor overflows in float16, and the gradient would become zero
    norm = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32))
    factor: Tensor = max_norm / norm.clamp_min(eps)
    return grad * factor.clamp(max=1).to(grad.dtype)


@register(
    "block_rms",
    reference="Shazeer & Stern 2018, arXiv:1804.04235 (update clipping of Adafactor)",
    peers="optax clip_by_block_rms",
    linear=False,
    reducing=True,
    joint=True,
    requires="target > 0",
    examples=({"target": 0.3}, {"target": 50.0}, {"target": math.inf}),
)
def block_rms(grad: Tensor, *, target: float = 1.0) -> Tensor:
    """grad·min(1, target/rms(grad)), rms the root of the mean square over the whole tensor

    Args:
        target: The largest root mean square, above 0.
    """
    rms = torch.linalg.vector_norm(wide(grad)) / math.sqrt(max(grad.numel(), 1))
    return times(grad, _shrinking(target, rms))


@register(
    "per_sample_clip_norm",
    reference="Abadi et al. 2016, arXiv:1607.00133 (DP-SGD)",
    peers="Opacus DPOptimizer",
    linear=False,
    reducing=True,
    requires="max_norm > 0",
    examples=({"max_norm": 0.3}, {"max_norm": 50.0}, {"max_norm": math.inf}),
)
def per_sample_clip_norm(grad: Tensor, *, max_norm: float = 1.0) -> Tensor:
    """grad·min(1, max_norm/‖grad‖₂), the norm taken over all dims but the first

    Bounds the gradient of an activation for each sample. DP-SGD bounds that of all parameters together.

    Args:
        max_norm: The largest norm of a sample, above 0.
    """
    dims = tuple(range(1, grad.dim()))
    g = wide(grad)
    norm = torch.linalg.vector_norm(g, dim=dims, keepdim=True) if dims else g.abs()
    return times(grad, _shrinking(max_norm, norm))


@register(
    "adaptive_clip",
    reference="Brock et al. 2021, arXiv:2102.06171 (adaptive gradient clipping, NFNets)",
    peers=("optax adaptive_grad_clip", "timm adaptive_clip_grad"),
    kinds="parameter",
    linear=False,
    reducing=True,
    requires="clipping > 0, eps > 0",
    examples=({"clipping": 0.3}, {"clipping": 5.0, "eps": 0.5}, {"clipping": math.inf}),
)
def adaptive_clip(grad: Tensor, x: Tensor, *, clipping: float = 0.01, eps: float = 1e-3) -> Tensor:
    """grad·min(1, clipping·max(‖x‖₂, eps)/‖grad‖₂), both norms taken over dims 1…, which is by output channel

    Over all entries if there are fewer than two dims. optax's weights have the output channel last.

    Args:
        clipping: The largest ratio of the norms, above 0.
        eps: The smallest norm of the weights that counts, above 0.
    """
    dims = per_row(x)
    weight = torch.linalg.vector_norm(wide(x), dim=dims, keepdim=True).clamp(min=eps)
    norm = torch.linalg.vector_norm(wide(grad), dim=dims, keepdim=True)
    return times(grad, _shrinking(clipping, norm / weight), x)


@register(
    "normalize",
    reference="Hazan et al. 2015, arXiv:1507.02030 (normalised gradient descent)",
    peers="optax normalize_by_update_norm",
    linear=False,
    reducing=True,
    joint=True,
    requires="eps > 0",
    examples=({"eps": 0.3}, {"eps": 5.0}),
)
def normalize(grad: Tensor, *, eps: float = 1e-6) -> Tensor:
    """grad/(‖grad‖₂ + eps), the norm taken over the whole tensor

    Args:
        eps: What is added to the norm, above 0.
    """
    return times(grad, 1 / (torch.linalg.vector_norm(wide(grad)) + eps))


@register(
    "trust_ratio",
    reference="You et al. 2017, arXiv:1708.03888 (LARS)",
    peers="optax scale_by_trust_ratio",
    kinds="parameter",
    linear=False,
    reducing=True,
)
def trust_ratio(grad: Tensor, x: Tensor) -> Tensor:
    """grad·‖x‖₂/‖grad‖₂, the norms taken over the whole tensor; grad if one of them is 0"""
    weight = torch.linalg.vector_norm(wide(x))
    norm = torch.linalg.vector_norm(wide(grad))
    known = (weight > 0) & (norm > 0)
    return times(grad, torch.where(known, weight / torch.where(known, norm, 1), 1), x)


def _shrinking(limit: float, size: Tensor) -> Tensor:
    """min(1, limit/size), 1 where the size is 0"""
    over = size > limit
    return torch.where(over, limit / torch.where(over, size, 1), 1)
