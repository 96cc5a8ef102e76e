"""Booleans of eight entries to a byte, the first entry in the lowest bit. Does not know rules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch.dynamo import is_compiling

__all__ = ["memory_order", "pack", "unpack"]

# In 64 bits, a byte for each of eight booleans: each step halves the distance of those that it has not joined yet
_STEPS = ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))


def pack(mask: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return booleans of any shape as bytes, and what `unpack` needs besides their shape.

    Args:
        mask: A boolean tensor. A subclass of `Tensor`, such as a DTensor, is returned unchanged: it defines itself how
            its entries are stored.
    """
    if is_compiling():  # the compiler chooses the order in memory
        flat = mask.reshape(-1)
        flat = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8))
        # Inductor does not compile a view in which entries have another size
        return (flat.view(-1, 8) << _places(mask)).sum(-1, dtype=torch.uint8), ()
    if type(mask) is not Tensor:
        return mask, ()
    order = memory_order(mask)
    flat = mask.permute(order).reshape(-1)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    joined = flat.view(torch.int64)
    for shift, _ in reversed(_STEPS):
        joined = joined | (joined >> shift)
    return joined.to(torch.uint8), order


def unpack(packed: Tensor, shape: Sequence[int], order: tuple[int, ...]) -> Tensor:
    """Return the booleans that `pack` was given, in the same order in memory.

    Args:
        packed: The bytes that `pack` returned.
        shape: The shape of the booleans.
        order: What `pack` returned besides.
    """
    if packed.dtype is torch.bool:
        return packed
    if not order and shape:
        flat = ((packed[:, None] >> _places(packed)) & 1).to(torch.bool).view(-1)
        return flat[: math.prod(shape)].view(shape)
    spread = packed.to(torch.int64)
    for shift, bits in _STEPS:
        spread = (spread | (spread << shift)) & bits
    flat = spread.view(torch.bool)[: math.prod(shape)]
    places = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[dim] for dim in order]).permute(places)


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor in the order of their strides."""
    return tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


def _places(tensor: Tensor) -> Tensor:
    return torch.arange(8, device=tensor.device, dtype=torch.uint8)
