"""Rules that save one to four bits of x for each entry: the derivative is a step function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .._torch.dynamo import takes_for_constant
from ..core.register import register
from ..errors import RuleError
from .precision import times
from .step_functions import level_of, nearest_steps, segment

__all__ = ["few_bit", "regelu2", "resilu2"]


def _steps_of(
    function: Callable[[Tensor], Tensor],
    *,
    bits: int,
    borders: tuple[float, ...],
    levels: tuple[float, ...],
) -> dict[str, Any]:
    """The steps at an operation, unless they are given."""
    if borders or levels:
        return {}
    try:
        borders, levels = nearest_steps(function, 2**bits)
    except RuleError as error:
        raise RuleError(
            f"{error}; steps of your own are possible: few_bit(borders=..., levels=...)"
        ) from error
    return {"borders": borders, "levels": levels}


@takes_for_constant
def _steps(
    bits: int, borders: tuple[float, ...], levels: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not (borders or levels):
        return nearest_steps(F.gelu, 2**bits)
    if len(levels) != len(borders) + 1 or len(levels) > 2**bits or [*borders] != sorted(borders):
        raise RuleError(
            f"few_bit needs borders in ascending order, one level more, and at most 2**bits levels; got bits={bits}, "
            f"borders={borders}, levels={levels}"
        )
    return borders, levels


def _code(x: Tensor, *, bits: int, borders: tuple[float, ...], levels: tuple[float, ...]) -> Tensor:
    """The number of the step at each entry."""
    return segment(x, _steps(bits, borders, levels)[0])


@register(
    "few_bit",
    reference="Novikov et al. 2023, arXiv:2202.00441 (few-bit backward)",
    peers="fewbit",
    kinds="operation",
    mask=_code,
    mask_bits="bits",
    save="bits",
    of_op=_steps_of,
    requires="1 <= bits <= 4",
    examples=({"bits": 1}, {"bits": 2, "borders": (-1.0, 1.0), "levels": (0.0, 1.0, 0.5)}),
)
def few_bit(
    grad: Tensor,
    mask: Tensor,
    *,
    bits: int = 3,
    borders: tuple[float, ...] = (),
    levels: tuple[float, ...] = (),
) -> Tensor:
    """grad·levels[number of borders below x], the step function nearest to the derivative of the operation

    The borders and levels are computed for the operation at the site, with its arguments: those that minimise
    ∫(f′(x) − step(x))² dx over [−100, 100]. Where the rule is at no site, they are those of GELU. The peer has tables
    of 12 functions.

    Args:
        bits: The bits that are saved for each entry, 1 to 4; there are at most 2**bits levels.
        borders: Where the levels change, in ascending order. Empty: those that are best at the operation.
        levels: The values, one more than borders.
    """
    return times(grad, level_of(mask, _steps(bits, borders, levels)[1], grad.dtype))


_REGELU2 = (-3.1858810036855245, -0.001178821281161997, 3.190832613414926)
_RESILU2 = (-6.3050461001646445, -0.0008684942046214787, 6.325815242089708)


def _regelu2_code(x: Tensor) -> Tensor:
    return segment(x, _REGELU2)


@register(
    "regelu2",
    reference="Yang et al. 2024, arXiv:2406.16282",
    peers="LowMemoryBP ReGELU2",
    kinds="operation",
    mask=_regelu2_code,
    mask_bits=2,
    save="bits",
    meant_for="gelu",
)
def regelu2(grad: Tensor, mask: Tensor) -> Tensor:
    """grad·(0, −0.0492, 1.0487, 1)[number of borders below x], borders −3.186, −0.0012, 3.191

    The derivative of three combined ReLUs, chosen so that they are nearest to GELU itself, not to its derivative.
    """
    steps = (-0.04922261145617846, 1.0979632065417297, -0.048740595085551286)
    return times(grad, level_of(mask, _summed(steps), grad.dtype))


def _resilu2_code(x: Tensor) -> Tensor:
    return segment(x, _RESILU2)


@register(
    "resilu2",
    reference="Yang et al. 2024, arXiv:2406.16282",
    peers="LowMemoryBP ReSiLU2",
    kinds="operation",
    mask=_resilu2_code,
    mask_bits=2,
    save="bits",
    meant_for="silu",
)
def resilu2(grad: Tensor, mask: Tensor) -> Tensor:
    """grad·(0, −0.0406, 1.0403, 1)[number of borders below x], borders −6.305, −0.0009, 6.326

    The derivative of three combined ReLUs, chosen so that they are nearest to SiLU itself, not to its derivative.
    """
    steps = (-0.04060357190528599, 1.080925428529668, -0.040321856624382146)
    return times(grad, level_of(mask, _summed(steps), grad.dtype))


def _summed(steps: tuple[float, float, float]) -> tuple[float, ...]:
    first, second, third = steps
    return 0.0, first, first + second, first + second + third
