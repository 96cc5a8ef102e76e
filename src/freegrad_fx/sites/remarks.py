"""What reports say beside the decisions: code that no rule can reach, and what a graph has lost."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Lost", "Opaque", "Remark"]


@dataclass(frozen=True)
class Remark:
    """Something about a part of a model.

    Attributes:
        path: The dotted path of the module.
        what: What it is.
        reason: Why it is so.
        source: ``file:line`` of the user's code; ``""`` where it is not known.
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
    """Code of the model that is one opaque call in the graph, so that no rule can reach what is in it.

    Attributes:
        asked: Whether the caller asked for it.
    """

    asked: bool = False


@dataclass(frozen=True)
class Lost(Remark):
    """Something that the model did and that the graph does not do."""
