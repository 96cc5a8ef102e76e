"""How a model is called with one batch, and a progress bar over many."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

__all__ = ["called", "shown"]

Item = TypeVar("Item")


def called(model: nn.Module, batch: Any) -> Any:
    """The output for a batch: a tuple of positional arguments, a dict of keyword arguments, or one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


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
