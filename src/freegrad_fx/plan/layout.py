"""Text tables, and plain data as JSON. This module does not know plans."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..core.text import shown

__all__ = ["aligned", "as_json", "filled", "in_bytes", "plain", "terminal_width"]


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
