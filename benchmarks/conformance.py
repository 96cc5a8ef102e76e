"""``python -m benchmarks.conformance``: our rules beside those of the installed libraries, on the same input.

Prints a table, and writes it as Markdown with ``--write PATH``. The exit status is 1 if a gradient differs by more than
rounding.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from . import _peer_rules, _peer_transforms
from ._peer_rules import Case


@dataclass(frozen=True)
class Row:
    """A case, and the largest difference that was seen; None if the library is not installed."""

    case: Case
    difference: float | None

    @property
    def agrees(self) -> bool:
        """Whether the difference is rounding."""
        return self.difference is None or self.difference <= self.case.rounding * 10


def cases() -> Iterator[Case]:
    """All cases, library by library."""
    yield from _peer_rules.cases()
    yield from _peer_transforms.cases()


def rows() -> Iterator[Row]:
    """Compare all cases."""
    for case in cases():
        try:
            module = case.load()
        except ImportError:
            yield Row(case, None)
            continue
        ours, theirs = case.compare(module)
        yield Row(case, float((ours - theirs).abs().max()))


def as_markdown(found: list[Row]) -> str:
    """The table, as the documentation includes it."""
    lines = [
        f"Largest absolute difference of the gradients, with torch {torch.__version__.partition('+')[0]}:",
        "",
        "| library | its name | here | difference | note |",
        "|---|---|---|---|---|",
    ]
    for row in found:
        case = row.case
        release = "not installed" if row.difference is None else version(case.library)
        number = (
            "" if row.difference is None else "0" if not row.difference else f"{row.difference:.0e}"
        )
        lines.append(
            f"| {case.library} {release} | `{case.name}` | `{case.rule!r}` | {number} | {case.note} |"
        )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the table as Markdown")
    options = parser.parse_args(arguments)
    found = list(rows())
    text = as_markdown(found)
    print(text)
    if options.write:
        options.write.write_text(text, "utf-8")
    return 0 if all(row.agrees for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
