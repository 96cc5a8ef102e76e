"""How a model is called with one batch, so that it is as before afterwards, and a progress bar over many."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

__all__ = ["called", "restored", "shown"]

Item = TypeVar("Item")


def called(model: nn.Module, batch: Any) -> Any:
    """The output for a batch: a tuple of positional arguments, a dict of keyword arguments, or one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


@contextmanager
def restored(model: nn.Module, seed: int) -> Iterator[None]:
    """Run with the random numbers of a seed; then restore the random state and the buffers of the model."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    setattr(module, name, buffer)  # the model can have assigned another one
                    buffer.copy_(value)


def shown(items: Sequence[Item], progress: bool, name: str) -> Iterable[Item]:
    """The items, with a progress bar of a name on the standard error stream if `progress` is true.

    Raises:
        ImportError: `progress` is true, and tqdm is not installed.
    """
    if not progress:
        return items
    try:
        tqdm = importlib.import_module("tqdm.auto").tqdm
    except ImportError:
        raise ImportError(
            "progress=True needs tqdm. Install it with `pip install tqdm`, or leave out progress."
        ) from None
    return tqdm(items, desc=name, unit="batch")  # type: ignore[no-any-return]
