"""The form of a tensor that is not kept, and tensors of that form."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["Form", "blank", "form_of"]

Form: TypeAlias = tuple[Any, torch.dtype, bool]
"""The shape of a tensor, its dtype, and whether its channels are last in memory."""


def form_of(x: Tensor) -> Form:
    """The form of a tensor."""
    last = _LAST.get(x.dim())
    channels_last = last is not None and x.is_contiguous(memory_format=last)
    return tuple(x.shape), x.dtype, channels_last and not x.is_contiguous()


_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def blank(form: Form, like: Tensor) -> Tensor:
    """A tensor of a form, for the place of one that the gradients do not depend on.

    Its entries are not initialised, except where a backward is recorded: a second derivative may multiply them by 0.
    """
    shape, dtype, channels_last = form
    order = _LAST[len(shape)] if channels_last else torch.contiguous_format
    found = torch.empty(shape, dtype=dtype, device=like.device, memory_format=order)
    return found.zero_() if torch.is_grad_enabled() else found
