"""The errors and the warning of this package, and the one way in which they name valid choices.

Knows nothing of rules, graphs or tensors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CaptureError",
    "FreegradWarning",
    "PlanError",
    "RuleError",
    "TableError",
    "TorchVersionError",
    "unknown",
]


class RuleError(ValueError):
    """A backward rule is unknown, declared or bound wrongly, or returned what is no gradient."""


class PlanError(ValueError):
    """A rule table asks for something that cannot be had on the sites of this model."""


class TableError(PlanError):
    """A rule table is written wrongly: an unknown op or field, a pattern that is none, a mistake in its file."""


class CaptureError(RuntimeError):
    """A model cannot be turned into a graph that means what the model means."""


class TorchVersionError(RuntimeError):
    """The PyTorch that is installed lacks something that a feature of this package relies on."""


class FreegradWarning(UserWarning):
    """Something the caller asked for has no effect, or something of the model was not looked into."""


def unknown(kind: str, name: object, valid: Iterable[str], remedy: str = "") -> str:
    """The sentence for a name that is not in a list: what it is, the valid names (closest first), the remedy."""
    names = sorted(set(valid))
    folded = {n.casefold(): n for n in names}
    matches = difflib.get_close_matches(str(name).casefold(), folded, n=5, cutoff=0.5)
    close = [folded[match] for match in matches]
    ordered = close + [n for n in names if n not in close]
    hint = f" Did you mean {close[0]!r}?" if close else ""
    remedy = f" {remedy}" if remedy else ""
    return f"unknown {kind} {name!r}.{hint} Valid: {', '.join(ordered) or 'none'}.{remedy}"
