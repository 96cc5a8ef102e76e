"""The exceptions and the warning category of this package, and the common message for an unknown name.

Independent of rules, graphs and tensors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

__all__ = [
    "CaptureError",
    "FreegradWarning",
    "PlanError",
    "RuleCheckError",
    "RuleError",
    "TableError",
    "TorchVersionError",
    "VerificationError",
    "close",
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


class VerificationError(CaptureError):
    """A transformed model does not do what its original does.

    Attributes:
        report (Verification | None): What differs.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


class RuleCheckError(AssertionError):
    """A rule does not do what it has to do, or what it declares; `freegrad_fx.testing.check_rule` raises it.

    Attributes:
        failures (tuple[freegrad_fx.testing.Failure, ...]): All that was found.
    """

    def __init__(self, message: str, failures: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.failures = failures


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
    shown = _shortened(name)
    near = close(shown, names)
    ordered = near + [n for n in names if n not in near]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    remedy = f" {remedy}" if remedy else ""
    return f"unknown {kind} {shown}.{hint} Valid: {', '.join(ordered) or 'none'}.{remedy}"


_SHOWN = 200  # characters of a name that nobody can have meant


def _shortened(name: object) -> str:
    try:
        text = repr(name)
    except ValueError:  # an integer with too many digits
        text = type(name).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


_ALIKE = 0.75  # of the letters: 'rectangle' for 'rectangular', but not 'quantize' for 'centralize'
_WORD = 4  # the letters of a part that tells names apart: 'clip' for 'clip_norm', but not 'act' for 'arctan'


def close(name: str, valid: Iterable[str]) -> list[str]:
    """The valid names that an unknown name can stand for, the most similar first; often none.

    A name is similar to another with almost the same letters, to one that contains a word of it, and to one that is a
    word of it. Those that begin with the name come first. Case and punctuation do not count.
    """
    words = [word for word in re.split(r"[\W_]+", name.casefold()) if word]
    letters = "".join(words)
    found: dict[str, float] = {}
    for candidate in valid:
        other = re.sub(r"[\W_]+", "", candidate.casefold())
        alike = difflib.SequenceMatcher(None, letters, other).ratio() if letters else 0.0
        shared = any(len(word) >= _WORD and word in other for word in words) or other in words
        if alike >= _ALIKE or shared:
            found[candidate] = alike + other.startswith(letters)
    return sorted(found, key=lambda candidate: -found[candidate])
