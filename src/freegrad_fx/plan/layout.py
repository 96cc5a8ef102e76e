"""Text tables, and plain data as JSON. This module does not know plans."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..core.text import shown

__all__ = ["aligned", "as_json", "filled", "folded", "in_bytes", "plain", "terminal_width"]


def terminal_width() -> int:
    """The width of the terminal; 0 if the output goes to a file or a pipe."""
    return shutil.get_terminal_size((0, 0)).columns


def aligned(rows: Sequence[Sequence[str]], width: int) -> str:
    """Lay out rows as a text table. The first row is the head.

    Args:
        rows: The cells.
        width: The maximal length of a line; 0 for no limit. Long cells are broken into lines, the widest column first,
            and no column is left out. A column is never narrower than its head, so a width of a few characters can be
            exceeded.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    least = [len(column[0]) for column in columns]
    for _ in range(_total(widths) - width if width else 0):
        widest = max(range(len(columns)), key=lambda i: (widths[i] > least[i], widths[i]))
        widths[widest] = max(widths[widest] - 1, least[widest])
    lines = []
    for row in zip(*columns, strict=True):
        cells = [_broken(text, size) for text, size in zip(row, widths, strict=True)]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            padded = (text.ljust(size) for text, size in zip(line, widths, strict=True))
            lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * size for size in widths))
    return "\n".join(lines)


def _total(widths: Iterable[int]) -> int:
    """The length of a line, with two spaces between columns."""
    return sum(width + 2 for width in widths) - 2


# A part of a cell ends with a space or with a character that separates names: a path is broken after a dot
_PARTS = re.compile(r"[^\s._/(,:]*[\s._/(,:]|[^\s._/(,:]+")


def _broken(text: str, width: int) -> list[str]:
    """A text as lines of at most `width` characters. The lines after the first are indented, where there is room."""
    indent = " " if width > 4 else ""
    lines, line = list[str](), ""
    for part in _PARTS.findall(text):
        while len((line + part).rstrip()) > width:
            if line.strip():
                lines.append(line.rstrip())
                line = indent
            else:  # a single part that is too long
                room = width - len(line)
                lines.append(line + part[:room])
                line, part = indent, part[room:]
        line += part
    return [*lines, line.rstrip()] if line.strip() else lines


def filled(text: str, width: int) -> str:
    """A paragraph, broken into lines of at most `width` characters; 0 for no limit."""
    return textwrap.fill(text, width, subsequent_indent="    ") if width else text


# A number that is a whole part of a path: the 0 of ``blocks.0.act:relu[1]``
_NUMBER = re.compile(r"((?:^|(?<=\.))\d+(?=[.:]|$))")


def folded(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Rows that differ only in a number of the path in their first cell, as one row: ``blocks.0-7.act ×8``.

    Every path that the row stands for can be read from it, also if several numbers differ: ``layers.0-1.blocks.0-5`` is
    twelve paths.

    Args:
        rows: The cells, without the head.
    """
    found = [_Row(_parts(path), 1, tuple(cells)) for path, *cells in rows]
    longest = max((len(row.parts) for row in found), default=0)
    for place in range(
        longest - 2, 0, -2
    ):  # the last number first, as blocks are repeated in blocks
        merged: dict[Any, _Row] = {}
        for row in found:
            numbers = row.parts[place : place + 1]
            key = (row.parts[:place], len(numbers), row.parts[place + 1 :], row.cells)
            merged[key] = row.joined(merged[key], place) if key in merged else row
        found = [*merged.values()]
    return [
        (row.path + (f" ×{row.stands_for}" if row.stands_for > 1 else ""), *row.cells)
        for row in found
    ]


class _Row(NamedTuple):
    """A row that stands for several.

    Attributes:
        parts: The parts of the path. Every second one is a set of numbers, the others are text.
        stands_for: How many rows that is.
        cells: The other cells.
    """

    parts: tuple[str | frozenset[int], ...]
    stands_for: int
    cells: tuple[str, ...]

    @property
    def path(self) -> str:
        """The path as text."""
        return "".join(part if isinstance(part, str) else _ranges(part) for part in self.parts)

    def joined(self, other: _Row, place: int) -> _Row:
        """This row together with one that has other numbers at one place."""
        mine, theirs = self.parts[place : place + 1], other.parts[place : place + 1]
        numbers = frozenset(n for part in (*mine, *theirs) for n in part if isinstance(n, int))
        parts = (*self.parts[:place], *([numbers] if mine else []), *self.parts[place + 1 :])
        return _Row(parts, self.stands_for + other.stands_for, self.cells)


def _parts(path: str) -> tuple[str | frozenset[int], ...]:
    split = enumerate(_NUMBER.split(path))
    return tuple(frozenset([int(part)]) if place % 2 else part for place, part in split)


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as text: ``0-3,5``."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)


def in_bytes(count: int) -> str:
    """A number of bytes as text."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def as_json(data: dict[str, Any], indent: int | None = None) -> str:
    """Plain data as JSON. JSON has no infinity; it is written as the text ``"inf"``."""
    return json.dumps(_mapped(data, _finite), indent=indent, allow_nan=False, ensure_ascii=False)


def plain(value: Any) -> Any:
    """A value as plain data. Functions and tensors become text."""
    return _mapped(
        value, lambda v: v if v is None or isinstance(v, bool | int | float | str) else shown(v)
    )


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Apply a function to every value in nested dicts, lists and tuples."""
    if isinstance(value, dict):
        return {str(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, change) for item in value)
    return change(value)
