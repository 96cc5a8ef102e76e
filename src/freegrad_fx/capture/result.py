"""What a capture is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..sites.remarks import Lost, Opaque
from .captured import Variant

__all__ = ["Capture"]


@dataclass(frozen=True)
class Capture:
    """A model as graphs.

    Attributes:
        root: The structural copy of the model that the graphs run on.
        class_name: The name of the model's class.
        variants: The graphs.
        opaque: What was kept whole.
        lost: What the graphs cannot do that the model did.
    """

    root: nn.Module
    class_name: str
    variants: tuple[Variant, ...]
    opaque: tuple[Opaque, ...] = ()
    lost: tuple[Lost, ...] = ()
