"""Small numbers of one to eight bits, packed without gaps: the first entry in the lowest bit. Does not know rules.

The bits of the same place value are packed together, eight entries to a byte: three bits take three such planes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._torch.dynamo import is_compiling

__all__ = ["memory_order", "pack", "unpack"]

_LOWEST = 0x0101010101010101
"""The lowest bit of each of eight bytes."""

# Each step halves the distance between the bits that it has not joined yet
_STEPS = ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, _LOWEST))


def pack(mask: Tensor, bits: int) -> tuple[Tensor, tuple[int, ...] | None]:
    """Return small numbers of any shape as planes of ⌈n/8⌉ bytes, and what `unpack` needs besides their shape.

    Args:
        mask: Booleans, or bytes below ``2**bits``. A subclass of `Tensor`, such as a DTensor, is returned unchanged: it
            defines itself how its entries are stored.
        bits: The bits of an entry.
    """
    if is_compiling():  # the compiler chooses the order in memory
        flat = mask.reshape(-1).to(torch.uint8)
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
        # Inductor does not compile a view in which entries have another size
        places = _places(mask)
        planes = [(((flat >> p) & 1) << places).sum(-1, dtype=torch.uint8) for p in range(bits)]
        return torch.stack(planes), ()
    if type(mask) is not Tensor:
        return mask, None
    order = memory_order(mask)
    flat = mask.permute(order).reshape(-1)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    numbers = flat.view(torch.int64)
    if bits == 1:
        return _joined(numbers).to(torch.uint8)[None], order
    planes = [_joined((numbers >> place) & _LOWEST).to(torch.uint8) for place in range(bits)]
    return torch.stack(planes), order


def unpack(
    packed: Tensor, shape: Sequence[int], order: tuple[int, ...] | None, bits: int
) -> Tensor:
    """Return the numbers that `pack` was given, in the same order in memory.

    Args:
        packed: The bytes that `pack` returned.
        shape: The shape of the numbers.
        order: What `pack` returned besides.
        bits: The bits of an entry.
    """
    if order is None:
        return packed
    count = math.prod(shape)
    if is_compiling():
        spread = ((packed[:, :, None] >> _places(packed)) & 1) << _places(packed)[:bits, None, None]
        flat = spread.sum(0, dtype=torch.uint8).view(-1)[:count].view(shape)
        return flat.to(torch.bool) if bits == 1 else flat
    number = _spread(packed[0])
    for place in range(1, bits):
        number = number | (_spread(packed[place]) << place)
    flat = number.view(torch.bool if bits == 1 else torch.uint8)[:count]
    places = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[dim] for dim in order]).permute(places)


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor in the order of their strides."""
    return tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))


def _joined(numbers: Tensor) -> Tensor:
    """The lowest bits of eight bytes in the lowest byte of each number of 64 bits."""
    for shift, _ in reversed(_STEPS):
        numbers = numbers | (numbers >> shift)
    return numbers


def _spread(packed: Tensor) -> Tensor:
    """The bits of each byte in the lowest bits of eight bytes."""
    numbers = packed.to(torch.int64)
    for shift, bits in _STEPS:
        numbers = (numbers | (numbers << shift)) & bits
    return numbers


def _places(tensor: Tensor) -> Tensor:
    return torch.arange(8, device=tensor.device, dtype=torch.uint8)
