"""Text tables, HTML tables, and plain data as JSON. This module does not know plans."""

from __future__ import annotations

import html
import itertools
import json
import math
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..core.text import shown

__all__ = ["aligned", "as_json", "filled", "html_table", "plain", "terminal_width"]


def terminal_width() -> int:
    """The width of the terminal; 0 if the output goes to a file or a pipe."""
    return shutil.get_terminal_size((0, 0)).columns


def aligned(
    rows: Sequence[Sequence[str]], width: int, wrapped: Sequence[str], optional: Sequence[str] = ()
) -> str:
    """Lay out rows as a text table. The first row is the head.

    Args:
        rows: The cells.
        width: The maximal length of a line; 0 for no limit. A width of a few characters can be exceeded.
        wrapped: The columns whose long cells are broken into lines. In other columns the middle of a long cell is
            replaced by an ellipsis.
        optional: The columns that are omitted, in this order, if the table is too wide otherwise.
    """
    columns = list(zip(*rows, strict=True))
    least = {c: min(max(map(len, c)), 24 if c[0] in wrapped else 16) for c in columns}
    for name in optional if width else ():
        if _total(least[c] for c in columns) > width:
            columns = [c for c in columns if c[0] != name]
    widths = {c: max(map(len, c)) for c in columns}
    for _ in range(_total(widths.values()) - width if width else 0):
        widest = max(columns, key=lambda c: (widths[c] > least[c], widths[c]))
        widths[widest] -= 1
    lines = []
    for row in zip(*columns, strict=True):
        cells = [
            textwrap.wrap(text, widths[c], break_on_hyphens=False)
            if c[0] in wrapped
            else [_without_middle(text, widths[c])]
            for text, c in zip(row, columns, strict=True)
        ]
        for line in itertools.zip_longest(*cells, fillvalue=""):
            padded = (t.ljust(widths[c]) for t, c in zip(line, columns, strict=True))
            lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * widths[c] for c in columns))
    return "\n".join(lines)


def _total(widths: Iterable[int]) -> int:
    """The length of a line, with two spaces between columns."""
    return sum(width + 2 for width in widths) - 2


def _without_middle(text: str, width: int) -> str:
    """A text of at most `width` characters, with an ellipsis for the middle of a longer one."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def filled(text: str, width: int) -> str:
    """A paragraph, broken into lines of at most `width` characters; 0 for no limit."""
    return textwrap.fill(text, width, subsequent_indent="    ") if width else text


def html_table(rows: Iterable[Sequence[str]]) -> str:
    """Rows as an HTML table. The first row is the head."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    head, *body = rows
    lines = "".join(line(row, "td") for row in body)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{lines}</tbody></table>"


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
