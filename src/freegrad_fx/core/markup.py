"""What notebooks show of an object: a line, a table, and notes, as HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["html_view"]


def html_view(head: str, rows: Iterable[Sequence[str]] = (), notes: Iterable[str] = ()) -> str:
    """A line, a table and notes as HTML. A table without a row below its head is left out.

    Args:
        head: The line above the table.
        rows: The cells. The first row is the head of the table.
        notes: The items of the list below the table.
    """

    def line(cells: Sequence[str], tag: str) -> str:
        # notebooks align the cells of a table to the right, as for numbers
        start, end = f'<{tag} style="text-align: left">', f"</{tag}>"
        return "<tr>" + "".join(start + html.escape(cell) + end for cell in cells) + "</tr>"

    first, *body = [*rows] or [()]
    lines = "".join(line(row, "td") for row in body)
    table = f"<table><thead>{line(first, 'th')}</thead><tbody>{lines}</tbody></table>"
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    parts = [f"<p>{html.escape(head)}</p>", table if body else "", f"<ul>{items}</ul>"]
    return "".join(parts if items else parts[:-1])
