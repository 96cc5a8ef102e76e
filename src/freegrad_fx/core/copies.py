"""Copies of tensors that are parameters of rules: which tensor each is a copy of, and whether that one changed since.

A copied model has tensors of its own. A write into the original tensor would have no effect on the copy.
"""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .._torch.tensors import version

__all__ = ["changed_since_copied", "forget", "remember"]

_sources: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remember(copy: Tensor, source: Tensor) -> None:
    """Note that a tensor is a copy of another one."""
    if copy is not source and not source.is_inference():
        _sources[copy] = (weakref.ref(source), version(source))


def forget(tensor: Tensor) -> None:
    """Let a tensor no longer count as a copy."""
    _sources.pop(tensor, None)  # type: ignore[no-untyped-call]


def changed_since_copied(tensor: Tensor) -> bool:
    """Whether the tensor of which this one is a copy has been written into since."""
    if not _sources.data or tensor not in _sources:  # the first is a fast path
        return False
    source, before = _sources[tensor]
    original = source()
    return original is not None and version(original) != before
