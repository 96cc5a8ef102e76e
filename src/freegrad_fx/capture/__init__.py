"""nn.Module → Graph.

`symbolic` traces; `copying` makes the copy that is traced; `result` is what comes out. Nothing here knows rules or
sites.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..captured import CapturedModule
from .copying import check_model, structural_copy
from .result import Capture, Opaque
from .symbolic import capture_symbolically

__all__ = ["Capture", "Opaque", "capture", "structural_copy"]


def capture(
    model: nn.Module,
    leaf_types: Sequence[type[nn.Module]] = (),
    concrete_args: Mapping[str, Any] | None = None,
) -> Capture:
    """Capture a model as graphs that mean what it means, in train and in eval mode.

    Args:
        model: The model. It is not changed.
        leaf_types: Module classes to keep whole.
        concrete_args: Values for which arguments of the forward are specialised; `torch.fx.PH` keeps one open.

    Raises:
        TypeError: `model` is no `nn.Module`.
        CaptureError: The model cannot be copied or traced; the message says where and why.
    """
    check_model(model)
    root = structural_copy(model)
    if isinstance(root, CapturedModule):
        return Capture(root, type(model).__name__, root.variants)
    return capture_symbolically(model, root, tuple(leaf_types), concrete_args or {})
