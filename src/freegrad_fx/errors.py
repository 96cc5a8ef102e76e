"""The exceptions and the warning category of this package, and the common message for an unknown name.

Independent of rules, graphs and tensors.
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
    """A backward rule is unknown, is declared or bound incorrectly, or returned an invalid gradient."""


class PlanError(ValueError):
    """A rule table cannot be applied to the sites of this model."""


class TableError(PlanError):
    """A rule table is invalid: an unknown op or field, an invalid pattern, or an error in its file."""


class CaptureError(RuntimeError):
    """A model cannot be captured as a graph that is equivalent to the model."""


class TorchVersionError(RuntimeError):
    """The installed PyTorch release lacks an internal function or attribute that a feature of this package needs."""


class FreegradWarning(UserWarning):
    """Something that was requested has no effect, or a part of the model was not analysed."""


def unknown(kind: str, name: object, valid: Iterable[str], remedy: str = "") -> str:
    """Return the error message for an unknown name.

    Args:
        kind: The kind of the name, for example ``"rule"``.
        name: The unknown name.
        valid: The valid names; the message lists them, the most similar first.
        remedy: A sentence that is appended.
    """
    names = sorted(set(valid))
    folded = {n.casefold(): n for n in names}
    matches = difflib.get_close_matches(str(name).casefold(), folded, n=5, cutoff=0.6)
    close = [folded[match] for match in matches]
    ordered = close + [n for n in names if n not in close]
    hint = f" Did you mean {close[0]!r}?" if close else ""
    remedy = f" {remedy}" if remedy else ""
    return f"unknown {kind} {name!r}.{hint} Valid: {', '.join(ordered) or 'none'}.{remedy}"
