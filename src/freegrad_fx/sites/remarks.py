"""Remarks in reports besides the decisions: opaque code, and behaviour of the model that a graph lacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Cache", "Lost", "Opaque", "Remark", "add_once"]

R = TypeVar("R", bound="Remark")


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
        holds: The operations in it that the table selects, each as ``path:op``.
    """

    asked: bool = False
    holds: tuple[str, ...] = ()

    def __str__(self) -> str:
        held = f"; the table selects {', '.join(self.holds)} in it" if self.holds else ""
        return super().__str__() + held


@dataclass(frozen=True)
class Lost(Remark):
    """Behaviour of the model that the graph lacks."""


@dataclass(frozen=True)
class Cache(Lost):
    """A dict that the forward fills with tensors made from parameters and buffers, which the graph makes at each call.

    Attributes:
        name: The attribute of the module that holds the dict.
    """

    name: str = ""

    @classmethod
    def of(cls, path: str, name: str) -> Cache:
        """The remark on an attribute of the module at a path."""
        reason = "the forward fills it; the graph computes these tensors at each call"
        return cls(path, f"the cache {name!r}", reason, name=name)


def add_once(remarks: list[R], remark: R) -> None:
    """Append a remark to a list that does not contain it."""
    if remark not in remarks:
        remarks.append(remark)
