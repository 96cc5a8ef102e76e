"""What is decided for one site, and how that is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from ..core.rule import Forward, Rule
from ..core.text import shown
from ..sites.site import Located, Site
from .layout import plain

__all__ = ["Decided", "Decision", "backward_of", "named", "site_as_dict"]


@dataclass(frozen=True)
class Decision:
    """What happens at one site.

    Attributes:
        site: The site.
        action: ``"rewrite"``; ``"ambient"`` where it follows `use` blocks; ``"native"`` where the table leaves it;
            ``"skip"`` where the table wants a rule and none can be given.
        rules: The rules it gets, the first for the gradient that comes in.
        forward: What replaces its forward, the canonical name of an operation or a function; or None.
        entry: The index of the table's entry that decided, or None.
        reason: Why.
        modes: In which of the model's modes the site exists; ``""`` for all.
        frozen: Whether it is a parameter that would get a rule if it learnt.
    """

    site: Site
    action: str
    rules: tuple[Rule, ...] = ()
    forward: Forward | None = None
    entry: int | None = None
    reason: str = ""
    modes: str = ""
    frozen: bool = False

    def reads(self, name: str) -> bool:
        """Whether a rule of it reads ``"x"`` or ``"y"``; an ambient one may."""
        return self.action == "ambient" or any(name in rule.inputs for rule in self.rules)


Decided: TypeAlias = list[tuple[Located, Decision]]
"""The sites of one graph, with the decisions."""


def backward_of(decision: Decision) -> str:
    """The backward that a site gets, in words."""
    if decision.action != "rewrite":
        return f"{decision.action}: {decision.reason}"
    rules = " → ".join(map(repr, decision.rules))
    forward = f", FORWARD {named(decision.forward)}" if decision.forward is not None else ""
    modes = f" (in {decision.modes} only)" if decision.modes else ""
    return f"{rules}{forward}{modes}"


def named(forward: Any) -> str:
    """How a forward is called that replaces one."""
    return forward if isinstance(forward, str) else shown(forward)


def site_as_dict(decision: Decision) -> dict[str, Any]:
    """A decision as plain data."""
    rules = [
        {"rule": rule.name, "params": {name: plain(v) for name, v in rule.given.items()}}
        for rule in decision.rules
    ]
    return {
        **vars(decision.site),
        **vars(decision),
        "site": decision.site.name,
        "rules": rules,
        "forward": plain(decision.forward),
    }
