"""What a check finds: `Failure`, the comparison of tensors, and errors in one line."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Failure", "apart", "first_line", "listed"]


@dataclass(frozen=True)
class Failure:
    """One thing that is wrong with a rule.

    Attributes:
        check: The name of the check, as `check_rule` takes it in `skip`.
        at: The input at which it was found.
        expected: What should be there.
        found: What is there.
        remedy: What can be done.
        more: The number of further inputs at which the check fails too.
    """

    check: str
    at: str
    expected: str
    found: str
    remedy: str
    more: int = 0

    def __str__(self) -> str:
        more = f" (and at {self.more} more)" if self.more else ""
        lines = (
            f"{self.check}, at {self.at}{more}",
            f"    expected: {self.expected}",
            f"    found:    {self.found}",
            f"    remedy:   {self.remedy}",
        )
        return "\n".join(lines)


def listed(failures: list[Failure]) -> list[Failure]:
    """The failures, of those of the same check and remedy only the first, with the number of the others."""
    first: dict[tuple[str, str], Failure] = {}
    for failure in failures:
        key = failure.check, failure.remedy
        known = first.get(key)
        first[key] = failure if known is None else replace(known, more=known.more + 1)
    return list(first.values())


def first_line(error: BaseException) -> str:
    """The type and the first line of an error, with the next one if the first introduces it."""
    text, _, rest = str(error).strip().partition("\n")
    if text.endswith(":"):
        following = rest.strip().partition("\n")[0]
        text = f"{text} {following}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def apart(
    actual: Tensor, expected: Tensor, allowed: Tensor | float = 0.0
) -> tuple[str, str] | None:
    """Compare two tensors of one shape, and return the first entries that differ, as texts; None if there are none.

    NaN equals NaN, and 0 equals −0.

    Args:
        actual: What was found.
        expected: What was expected.
        allowed: By how much finite entries can differ.
    """
    if actual.shape != expected.shape:
        return f"shape {tuple(expected.shape)}", f"shape {tuple(actual.shape)}"
    a, b = (t.detach().to("cpu", torch.float64) for t in (actual, expected))
    limit = allowed.detach().to("cpu", torch.float64) if isinstance(allowed, Tensor) else allowed
    same = (a == b) | (a.isnan() & b.isnan())
    same |= a.isfinite() & b.isfinite() & ((a - b).abs() <= limit)
    if same.all():
        return None
    wrong = (~same).nonzero()
    place = tuple(wrong[0].tolist())
    where = f" at index {place}" if place else ""
    count = f"; {len(wrong)} of {a.numel()} entries differ" if a.numel() > 1 else ""
    return f"{b[place].item():.9g}{where}", f"{a[place].item():.9g}{count}"
