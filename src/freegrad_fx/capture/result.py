"""The result of a capture."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..sites.remarks import Lost, Opaque
from .captured import Variant

__all__ = ["Capture"]


@dataclass(frozen=True)
class Capture:
    """A captured model.

    Attributes:
        root: The structural copy of the model that the graphs run on.
        class_name: The name of the model's class.
        variants: The graphs.
        opaque: The calls that were not traced into.
        lost: What the model does and the graphs do not.
    """

    root: nn.Module
    class_name: str
    variants: tuple[Variant, ...]
    opaque: tuple[Opaque, ...] = ()
    lost: tuple[Lost, ...] = ()
