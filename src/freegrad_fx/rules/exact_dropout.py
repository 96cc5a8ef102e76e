"""The rule that keeps the mask of a dropout as bits."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.packing import pack, unpack
from ..core.register import register

__all__ = ["exact_dropout"]

_INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16}
_INTEGERS |= {torch.float32: torch.int32, torch.float64: torch.int64}


def _pack_mask(saved: Tensor) -> Any:
    """The bits of a tensor of booleans, or of one that is +0 or one number everywhere; NotImplemented for others."""
    # A part of other memory would be kept beside its bits
    whole = saved.untyped_storage().nbytes() == saved.numel() * saved.itemsize
    if type(saved) is not Tensor or not whole or saved.numel() < 8:
        return NotImplemented
    mask, number = saved, 1.0
    if saved.dtype is not torch.bool:
        # Elsewhere the mask is of booleans, and the checks would wait for the device
        if saved.device.type not in ("cpu", "meta") or saved.dtype not in _INTEGERS:
            return NotImplemented
        entries = saved.view(_INTEGERS[saved.dtype])
        mask = entries.bool()
        if not saved.is_meta:
            largest = entries.max()
            number = largest.view(saved.dtype).item()
            if not (0 <= number < math.inf and torch.equal(entries == largest, mask)):
                return NotImplemented
    packed, order = pack(mask, 1)
    return packed, order, saved.shape, saved.dtype, number


def _unpack_mask(kept: Any) -> Tensor:
    packed, order, shape, dtype, number = kept
    mask = unpack(packed, shape, order, 1)
    if dtype is torch.bool:
        return mask
    return mask.to(dtype).mul_(number)


@register(
    "exact_dropout",
    reference="the native gradient of a dropout",
    kinds="operation",
    meant_for="dropout",
    packs=(_pack_mask, _unpack_mask),
)
def exact_dropout(grad: Tensor, *, f: Any) -> Tensor:
    """the native gradient of a dropout; its mask is kept as bits

    The backward is PyTorch's own, which keeps the mask as numbers, or as booleans on a GPU. The mask stays as it is in
    a dropout in place, in compiled code, and in a checkpoint.
    """
    return f.gradient("x", grad)  # type: ignore[no-any-return]
