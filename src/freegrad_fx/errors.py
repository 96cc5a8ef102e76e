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


def unknown(
    kind: str, name: object, valid: Iterable[str], remedy: str = "", *, everything: str = ""
) -> str:
    """Return the error message for an unknown name.

    Args:
        kind: The kind of the name, for example ``"rule"``.
        name: The unknown name.
        valid: The valid names; the message lists them, or some of them if they are many, the most similar first.
        remedy: A sentence that is appended.
        everything: The Python code that returns all valid names; shown if the message lists some of them.
    """
    names = sorted(set(valid))
    shown = _shortened(name)
    near = close(shown, names)
    ordered = near + [n for n in names if n not in near]
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(ordered) or "none"
    if len(ordered) > _ALL:
        hint = hint or " No valid name is similar."
        ordered[len(near) :] = sorted(ordered[len(near) :], key=lambda n: -_alike(shown, n))
        listed = f"{', '.join(ordered[:_SOME])}, and {len(ordered) - _SOME} more"
        listed += f": {everything}" if everything else ""
    return f"unknown {kind} {shown}.{hint} Valid: {listed}.{f' {remedy}' if remedy else ''}"


_ALL = 12  # names that a message lists; of more names it lists some
_SOME = 10
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
    letters = _letters(name)
    found: dict[str, float] = {}
    for candidate in valid:
        other = _letters(candidate)
        alike = _alike(name, candidate)
        shared = any(len(word) >= _WORD and word in other for word in words) or other in words
        if alike >= _ALIKE or shared:
            found[candidate] = alike + other.startswith(letters)
    return sorted(found, key=lambda candidate: -found[candidate])


def _alike(name: str, other: str) -> float:
    """How many of the letters of two names are the same, as a share."""
    letters = _letters(name)
    return difflib.SequenceMatcher(None, letters, _letters(other)).ratio() if letters else 0.0


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())
