"""What a capture is, and what it says it could not look into."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..captured import Variant

__all__ = ["Capture", "Opaque"]


@dataclass(frozen=True)
class Opaque:
    """Code of the model that the capture kept whole or lost, and that no rule can reach.

    Attributes:
        path: The dotted path of the module.
        what: What it is.
        reason: Why it was not looked into.
        source: ``file:line`` of the user's code; ``""`` where it is not known.
        asked: Whether the caller asked for it.
    """

    path: str
    what: str
    reason: str
    source: str = ""
    asked: bool = False

    def __str__(self) -> str:
        at = f" ({self.source})" if self.source else ""
        return f"{self.path or 'the root'}: {self.what}: {self.reason}{at}"


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
    lost: tuple[Opaque, ...] = ()
