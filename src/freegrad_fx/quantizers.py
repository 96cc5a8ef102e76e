"""Quantizers for the weights of a model: a forward and its rule as one value for an entry.

    table = fg.RuleTable([fg.on(parameter="*.weight", type=nn.Linear).backward(fg.quantizers.int4())])

Each function returns a `Rule` whose `forward` quantizes. The forward pass reads the quantized weights; the optimizer
updates the weights themselves. `report` gives the ratio of signal to quantization noise of each parameter.
"""

from __future__ import annotations

import functools
import math

from torch import Tensor

from . import rules  # noqa: F401  (it registers them)
from .core.own import Own
from .core.rule import Rule, get
from .errors import RuleError
from .vocabulary.forwards import forward
from .vocabulary.learnt import step_quantize

__all__ = ["binary", "dorefa", "int4", "int8", "lsq", "ternary"]


def __dir__() -> list[str]:
    return __all__


def int8(per_channel: bool = True) -> Rule:
    """Eight bits, symmetric, with the largest magnitude as the end of the range.

    Formula: ``w ↦ s·round(w/s)`` with ``s = max|w|/127``; the gradient is passed straight through, as nothing is
    clipped. The levels are −127 to 127, so that 0 is one of them and −w has the levels of w.

    Args:
        per_channel: Whether each output channel (dim 0) has its own range.

    Source: Krishnamoorthi 2018, arXiv:1806.08342; Brevitas Int8WeightPerTensorFloat and Int8WeightPerChannelFloat,
    which also pass a gradient through s to the largest entry.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> fg.quantizers.int8().forward(torch.tensor([[-1.27, 0.004, 0.016]]))
        tensor([[-1.2700,  0.0000,  0.0200]])
    """
    return get("straight_through")(forward=forward("quantize", bits=8, per_channel=per_channel))


def int4(per_channel: bool = True) -> Rule:
    """Four bits, symmetric, with the largest magnitude as the end of the range.

    Formula: ``w ↦ s·round(w/s)`` with ``s = max|w|/7``; the gradient is passed straight through. The levels are −7
    to 7.

    Args:
        per_channel: Whether each output channel (dim 0) has its own range.

    Source: as for `int8`; Brevitas Int4WeightPerTensorFloatDecoupled has a learnt range.
    """
    return get("straight_through")(forward=forward("quantize", bits=4, per_channel=per_channel))


def ternary(threshold: float | None = None, scale: bool = True) -> Rule:
    """Three values: −α, 0 and α.

    Formula: ``w ↦ α·sign(w)·1[|w| > Δ]`` with ``Δ = 0.7·mean|w|`` over the tensor, and α the mean of the magnitudes
    above Δ; the gradient is passed straight through.

    Args:
        threshold: Δ, if it is a number of its own.
        scale: False for α = 1.

    Source: Li & Liu 2016, arXiv:1605.04711 (ternary weight networks).
    """
    own = {} if threshold is None else {"threshold": threshold}
    return get("straight_through")(forward=forward("ternarize", **own, scale=scale))


def binary(scale: bool = True) -> Rule:
    """Two values: −α and α.

    Formula: ``w ↦ α·sign(w)`` with sign(0) = 1. With `scale`, α is ``mean|w|`` of each output channel and the rule is
    `xnor_weight`; without it, α = 1 and the rule is ``clipped_straight_through(bound=1.0)``.

    Args:
        scale: Whether the magnitude of the weights is kept, as the mean of each output channel.

    Source: Rastegari et al. 2016, arXiv:1603.05279 (XNOR-Net); Hubara et al. 2016, arXiv:1602.02830.
    """
    if scale:
        return get("xnor_weight")(forward=forward("binarize", scale=True))
    return get("clipped_straight_through")(bound=1.0, forward="binarize")


def dorefa(bits: int = 4) -> Rule:
    """2^bits evenly spaced values from −1 to 1, whatever the size of the weights: a norm has to follow.

    Formula: ``w ↦ 2·round(n·u)/n − 1`` with ``n = 2^bits − 1`` and ``u = tanh(w)/(2·max|tanh(w)|) + 1/2``; the rule is
    `dorefa_weight`, the derivative of ``tanh(w)/max|tanh(w)|``.

    Args:
        bits: The number of bits, 2 to 16.

    Raises:
        TableError: The number of bits is not supported.

    Source: Zhou et al. 2016, arXiv:1606.06160 (DoReFa-Net).
    """
    return get("dorefa_weight")(forward=forward("dorefa", bits=bits))


def lsq(bits: int = 4, per_channel: bool = False) -> Rule:
    """2^bits levels whose step each weight learns.

    Formula: ``w ↦ s·clamp(round(w/s), n₀, n₁)`` with ``n₀ = −2^(bits − 1)`` and ``n₁ = 2^(bits − 1) − 1``; the rule is
    `lsq`, which also gives the step s its gradient. The step begins with ``2·mean|w|/√n₁``.

    Each parameter of the model has a step of its own. In a transformed model the steps are among its `parameters()`,
    and in its `rule_state_dict()`. In a block of `use` they stay the same from block to block as long as this rule is
    used; ``report(block).decisions`` has them in the rules. A program that is compiled with rules cannot make them:
    compile the transformed model.

    Args:
        bits: The number of bits, 2 to 16.
        per_channel: Whether each output channel (dim 0) has its own step.

    Raises:
        RuleError: The number of bits is not supported.

    Source: Esser et al. 2020, arXiv:1902.08153.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> weights = fg.on(parameter="*.weight").backward(fg.quantizers.lsq(bits=4))
        >>> gm = fg.transform(model, fg.RuleTable([weights]))
        >>> sorted(gm.rule_state_dict())
        ['0.weight/lsq.step', '2.weight/lsq.step']
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 16:
        raise RuleError(f"quantizers.lsq: bits has to be a whole number from 2 to 16, got {bits!r}")
    values = {"bits": bits, "per_channel": per_channel}
    step = Own(functools.partial(_first_step, **values), "lsq", values)  # type: ignore[arg-type]
    quantize = functools.partial(step_quantize, step=step, bits=bits)  # type: ignore[arg-type]
    return get("lsq")(step=step, bits=bits, forward=quantize)


def _first_step(weight: Tensor, *, bits: int, per_channel: bool) -> Tensor:
    size = weight.abs()
    several = per_channel and weight.dim() > 1
    mean = size.mean(tuple(range(1, weight.dim())), keepdim=True) if several else size.mean()
    # A weight of zeros would have a step of 0, by which it is divided
    return (2.0 * mean / math.sqrt(2 ** (bits - 1) - 1)).clamp(min=1e-8)
