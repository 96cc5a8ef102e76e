"""Feedback alignment: another matrix takes the place of the weight in the gradient that a layer sends back.

Only the gradient of the input changes; those of the weight and the bias are native.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.register import register
from ..errors import RuleError
from .draws import uniform_like

__all__ = ["feedback_alignment", "kolen_pollack", "sign_symmetric"]

_OF_LAYERS: dict[str, Any] = {
    "kinds": "operation",
    "reducing": True,
    "meant_for": ("linear", "conv"),
}


def _seed_of(site: str, *, seed: int | None, **others: Any) -> Mapping[str, Any]:
    """The seed of a site: every site has a matrix of its own."""
    return {"seed": zlib.crc32(site.encode()) if seed is None else seed}


def _bound(weight: Tensor) -> float:
    """The bound of the uniform distribution of Glorot and Bengio for a weight."""
    fan_in, fan_out = math.prod(weight.shape[1:]), weight.shape[0] * math.prod(weight.shape[2:])
    return math.sqrt(6 / (fan_in + fan_out))


def _fixed(weight: Tensor, seed: int | None) -> Tensor:
    """Numbers in [0, 1) in the shape of a weight, the same ones at every call, on every device and when compiled.

    They are the hashes of the positions of the entries: a generator would have a state.
    """
    number = torch.arange(weight.numel(), device=weight.device) + 0x9E3779B9 * (1 + (seed or 0))
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        number = number & 0xFFFFFFFF
        number = (number ^ (number >> shift)) * factor
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (number & 0xFFFFFF).to(wide).div(2**24).to(weight.dtype).view(weight.shape)


@register(
    "feedback_alignment",
    reference="Lillicrap et al. 2016, doi:10.1038/ncomms13276",
    peers="BioTorch fa",
    of_site=_seed_of,
    examples=[{"seed": 7}],
    **_OF_LAYERS,
)
def feedback_alignment(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    f: Any,
    feedback: Tensor | None = None,
    seed: int | None = None,
) -> Tensor:
    """Bᵀ·grad, with a fixed matrix B in the place of the weight W in Wᵀ·grad

    Args:
        feedback: B, in the shape of the weight. By default each site has a matrix of its own, with entries from
            U(−b, b), b = √(6/(fan_in + fan_out)); it is computed again in each backward, and is not saved.
        seed: Which matrix that is; None for the one that belongs to the name of the site.
    """
    if feedback is None:
        feedback = (2 * _fixed(weight, seed) - 1) * _bound(weight)
    return f.gradient("x", grad, weight=feedback)  # type: ignore[no-any-return]


@register(
    "sign_symmetric",
    reference="Liao et al. 2016, arXiv:1510.05067",
    peers=("BioTorch usf", "BioTorch brsf", "BioTorch frsf"),
    of_site=_seed_of,
    examples=[{"magnitude": "fixed"}, {"magnitude": "drawn"}],
    random=True,
    **_OF_LAYERS,
)
def sign_symmetric(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    f: Any,
    magnitude: str = "uniform",
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Bᵀ·grad, where B = |M|·sign(W)

    Args:
        magnitude: |M|: ``"uniform"``, the number √(2/(fan_in + fan_out)) (uSF of the paper); ``"fixed"``, a fixed
            matrix (frSF); or ``"drawn"``, drawn again in each backward (brSF). The entries of a matrix are from
            U(0, b), b = √(6/(fan_in + fan_out)).
        seed: Which fixed matrix that is; None for the one that belongs to the name of the site.
        generator: What ``"drawn"`` draws from; None for the global generator.

    Raises:
        RuleError: `magnitude` is another text.
    """
    b = _bound(weight)
    if magnitude == "uniform":
        size: Tensor | float = b / math.sqrt(3)
    elif magnitude == "fixed":
        size = _fixed(weight, seed) * b
    elif magnitude == "drawn":
        size = uniform_like(weight, generator) * b
    else:
        raise RuleError(
            f"magnitude of rule 'sign_symmetric' must be 'uniform', 'fixed' or 'drawn', got {magnitude!r}"
        )
    return f.gradient("x", grad, weight=weight.sign() * size)  # type: ignore[no-any-return]


@register(
    "kolen_pollack",
    reference="Akrout et al. 2019, arXiv:1904.05391",
    learns="feedback",
    **_OF_LAYERS,
)
def kolen_pollack(grad: Tensor, x: Tensor, weight: Tensor, *, f: Any, feedback: Tensor) -> Any:
    """∂x = Bᵀ·grad with a learnt matrix B, whose gradient is that of the weight: ∂B = ∂W

    With the same optimizer and the same weight decay for both, B approaches the weight W.

    Args:
        feedback: B, a parameter in the shape of the weight.
    """
    return {
        "x": lambda: f.gradient("x", grad, weight=feedback),
        "feedback": lambda: f.gradient("weight", grad),
    }
