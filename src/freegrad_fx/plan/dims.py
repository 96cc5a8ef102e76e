"""Checks that the rules and the forward for a softmax are along its dimension."""

from __future__ import annotations

from ..errors import PlanError
from ..sites.site import Located
from ..table import Entry
from ..vocabulary.forwards import BoundForward, default_dim

__all__ = ["check_dims"]


def check_dims(place: Located, entry: Entry) -> None:
    """Raise `PlanError` if a rule or a forward for a softmax is along another dimension than that of the site."""
    if place.op is None or place.dim is None:
        return
    found = [
        (f"rule {rule.name!r}", f"{rule.name}(dim={place.dim})", rule.bound["dim"])
        for rule in entry.rules or ()
        if place.op.name in rule.declaration.meant_for and "dim" in rule.bound
    ]
    name = entry.forward.op if isinstance(entry.forward, BoundForward) else entry.forward
    if isinstance(name, str) and (default := default_dim(name)) is not None:
        values = entry.forward.keywords if isinstance(entry.forward, BoundForward) else {}
        remedy = f"forward=fg.forward({name!r}, dim={place.dim})"
        found.append((f"forward {name!r}", remedy, values.get("dim", default)))
    for what, remedy, dim in found:
        if dim != place.dim:
            raise PlanError(
                f"the {what} is along dim={dim}, but site {place.site.name} ({place.site.spelling}) computes a "
                f"softmax along dim={place.dim}. Give it the same number: {remedy}."
            )
