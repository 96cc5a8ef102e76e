"""PyTorch's generators of random numbers: which a device uses, and their state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["generators", "random_state_kept", "seed"]


def generators(device: torch.device) -> list[torch.Generator]:
    """The global generators that code on a device can use."""
    if device.type in ("cpu", "meta"):
        return [torch.default_generator]
    own = torch.get_device_module(device).default_generators
    return [torch.default_generator, own[device.index or 0]]


def seed(device: torch.device, number: int) -> None:
    """Seed the generators of a device. `torch.manual_seed` takes longer, and seeds those of all devices."""
    for generator in generators(device):
        generator.manual_seed(number)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Give the generators of a device back the state that they had before the block."""
    used = generators(device)
    states = [generator.get_state() for generator in used]
    try:
        yield
    finally:
        for generator, state in zip(used, states, strict=True):
            generator.set_state(state)
