"""Remarks in reports besides the decisions: opaque code, and behaviour of the model that a graph lacks."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Lost", "Opaque", "Remark"]


@dataclass(frozen=True)
class Remark:
    """A remark on a part of a model.

    Attributes:
        path: The dotted path of the module.
        what: What the remark is about.
        reason: The reason.
        source: ``file:line`` of the user code; ``""`` if it is not known.
    """

    path: str
    what: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        at = f" ({self.source})" if self.source else ""
        return f"{self.path or 'the root'}: {self.what}: {self.reason}{at}"


@dataclass(frozen=True)
class Opaque(Remark):
    """Code of the model that is one opaque call in the graph, so that no rule can act inside of it.

    Attributes:
        asked: Whether the caller requested this, for example with `leaf_modules`.
    """

    asked: bool = False


@dataclass(frozen=True)
class Lost(Remark):
    """Behaviour of the model that the graph lacks."""
