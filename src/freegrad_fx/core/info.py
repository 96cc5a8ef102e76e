"""What a rule says of itself, for people who choose one and for pages that list them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .contract import BITS, MASK
from .declaration import Declaration
from .lean import KEPT
from .markup import html_view
from .text import shown

__all__ = ["ParameterInfo", "RuleInfo", "described", "info_of"]


class ParameterInfo(NamedTuple):
    """A parameter of a rule.

    Attributes:
        value: Its value; None if it has none yet.
        types: The names of the types that it accepts, such as ``"float"``; ``"Any"`` for all.
        range: The constraints that name it, such as ``"a <= b"``; ``""`` if there are none.
    """

    value: Any
    types: str
    range: str


@dataclass(frozen=True)
class RuleInfo:
    """A description of a rule with its values, from its declaration. ``print(rule.info)`` shows it as text.

    Attributes:
        name: The name in the registry.
        family: The module of ``freegrad_fx.rules`` that declares it, such as ``"surrogate"``; for a rule of your own,
            the full name of its module.
        formula: The formula.
        parameters: Its parameters, by name.
        saves: What it saves for the backward: operands, ``"mask"``, ``"bits"``, ``"y"``; or ``"kept"``, what the lean
            form of the rule keeps, or what it packs, whose size depends on the operation.
        mask_bits: The bits of an entry of the mask, if the rule has one.
        properties: What the declaration says of it: ``"elementwise"`` or ``"reducing"``, ``"linear"`` in the gradient,
            ``"random"``, ``"relevance"`` if it returns relevance, ``"sparse"`` if it takes sparse gradients,
            ``"mask"`` if ``save="mask"`` and ``save="bits"`` are possible.
        kinds: The kinds of sites that it can serve: ``"operation"``, ``"parameter"``.
        meant_for: The operations that it is meant for; empty for all.
        source: The paper or library that the formula comes from.
        peers: The libraries that have it, each with its name there.
        learns: The parameters that it gives a gradient to, if they are tensors that require one.
        answers: The operands that it gives a gradient to.
    """

    name: str
    family: str
    formula: str
    parameters: Mapping[str, ParameterInfo] = field(hash=False)
    saves: tuple[str, ...]
    mask_bits: int
    properties: tuple[str, ...]
    kinds: tuple[str, ...]
    meant_for: tuple[str, ...]
    source: str
    peers: tuple[str, ...]
    learns: tuple[str, ...] = ()
    answers: tuple[str, ...] = ("x",)

    def saved_bytes(self, dtype: torch.dtype = torch.float32) -> float | None:
        """Return the bytes that the rule saves for each entry: 1/8 for one bit.

        A rule that saves ``x`` or ``y`` often keeps only a tensor alive that another operation saves anyway.

        Args:
            dtype: The dtype of the input of the operation.

        Returns:
            The bytes; None if they depend on the operation. `freegrad_fx.memory` counts them in a model.
        """
        if KEPT in self.saves:
            return None
        sizes: dict[str, float] = {MASK: 1, BITS: self.mask_bits / 8}
        return sum(sizes.get(name, dtype.itemsize) for name in self.saves)

    def __str__(self) -> str:
        lines = (f"  {name}: {value}" for name, value in self._lines())
        return "\n".join([f"{self.name}: {self.formula}", *lines])

    def _repr_html_(self) -> str:
        return described(self, self.name)

    def _lines(self) -> list[tuple[str, str]]:
        """What the description holds, without what is empty."""
        parameters = [
            f"{name} = {shown(p.value)} ({', '.join(filter(None, (p.types, p.range)))})"
            for name, p in self.parameters.items()
        ]
        lines = {
            "family": self.family,
            "parameters": "; ".join(parameters),
            "saves": self._saved(),
            "answers for": " and ".join(self.answers) if self.answers != ("x",) else "",
            "learns": ", ".join(self.learns),
            "properties": ", ".join(self.properties),
            "sites": " and ".join(self.kinds),
            "meant for": ", ".join(self.meant_for),
            "source": self.source,
            "also in": ", ".join(self.peers),
        }
        return [(name, value) for name, value in lines.items() if value]

    def _saved(self) -> str:
        if KEPT in self.saves:
            return "less than it reads; freegrad_fx.memory counts it"
        size = f"{self.saved_bytes()} bytes for each float32 entry"
        return f"{' and '.join(self.saves)}, {size}" if self.saves else "nothing"


def described(info: RuleInfo, rule: str) -> str:
    """A description as HTML, for notebooks.

    Args:
        info: The description.
        rule: The rule as text.
    """
    return html_view(f"{rule}: {info.formula}", [("field", "value"), *info._lines()])


def info_of(declaration: Declaration, values: Mapping[str, Any], save: str) -> RuleInfo:
    """Describe a rule.

    Args:
        declaration: Its declaration.
        values: The values of its parameters.
        save: The option `save`.
    """
    saves = tuple(save if name == "x" else name for name in declaration.inputs)
    if declaration.lean is not None:
        saves = (KEPT, *declaration.lean.saves)
    elif declaration.packs is not None:
        saves = (KEPT,)
    held = {
        "reducing" if declaration.reducing else "elementwise": True,
        "linear": declaration.linear,
        "random": declaration.random,
        "relevance": declaration.relevance,
        "sparse": declaration.sparse,
        "mask": declaration.mask is not None,
    }
    parameters = {
        name: ParameterInfo(
            values.get(name),
            " or ".join(t.__name__ for t in p.types) if p.types else "Any",
            ", ".join(c.text for c in declaration.requires if name in c.names),
        )
        for name, p in declaration.parameters.items()
    }
    return RuleInfo(
        declaration.name,
        declaration.family,
        declaration.formula,
        parameters,
        saves,
        declaration.bits_of(values),
        tuple(name for name, holds in held.items() if holds),
        declaration.kinds,
        declaration.meant_for,
        declaration.reference,
        declaration.peers,
        tuple(declaration.learns),
        declaration.answers or ("x",),
    )
