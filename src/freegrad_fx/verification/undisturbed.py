"""Calls of models that change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..capture.outside import Outside
from .snapshot import RandomNumbers, Snapshot

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(model: nn.Module, *others: nn.Module) -> Iterator[None]:
    """A context at whose end everything that models hold, globals of their code, and random numbers are put back.

    Args:
        model: The model whose code is run.
        *others: Further models, such as one that was made of it.
    """
    random, held, outside = RandomNumbers(), Snapshot((model, *others)), Outside(model, model)
    try:
        yield
    finally:
        held.put_back(True)
        outside.put_back()
        random.put_back()
