"""A plan, for people, notebooks and programs. Knows how to lay out, and decides nothing."""

from __future__ import annotations

import html
import itertools
import json
import math
import os
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from .plan import Decision, Plan
from .rules.rule import shown

__all__ = [
    "PLAN",
    "aligned",
    "as_dict",
    "as_html",
    "as_json",
    "as_text",
    "backward_of",
    "html_table",
    "report",
    "site_as_dict",
    "terminal_width",
]

PLAN = "_freegrad_fx_plan"
"""The attribute that holds what was done, or a function that tells it."""

_COLUMNS = ("path", "call", "op", "spelling", "backward", "line", "entry")


def report(model: Any) -> Plan:
    """What was rewritten, what was not, and why.

    Args:
        model: What `transform` or `compile` returned, also wrapped by `torch.compile` or `DataParallel`, or a
            `backend`.

    Returns:
        The plan that was carried out: ``print`` it, show it in a notebook, or take ``to_dict()``. That of compiled code
        grows as graphs are captured.

    Raises:
        TypeError: `model` comes from none of these.
        PlanError: Of compiled code, nothing has run yet.
    """
    found, wrapped = None, model
    while found is None and wrapped is not None:
        found = getattr(wrapped, "__dict__", {}).get(PLAN)
        wrapped = _wrapped_by(wrapped)
    plan = found() if callable(found) else found
    if not isinstance(plan, Plan):
        raise TypeError(
            f"report() takes what transform() or compile() returned, or a backend, got {type(model).__name__}. A "
            f"second trace of a transformed model keeps its rules, but not the report."
        )
    return plan


def _wrapped_by(model: Any) -> nn.Module | None:
    """The model that torch.compile, DataParallel and their kin have wrapped."""
    parts = getattr(model, "__dict__", {}).get("_modules", {})
    return parts.get("_orig_mod") or parts.get("module") if len(parts) == 1 else None


# --- what is said ---


def backward_of(decision: Decision) -> str:
    """The backward that a site gets, in words."""
    if decision.action != "rewrite":
        return f"{decision.action}: {decision.reason}"
    rules = " → ".join(map(repr, decision.rules))
    forward = f", FORWARD {_named(decision.forward)}" if decision.forward is not None else ""
    modes = f" (in {decision.modes} only)" if decision.modes else ""
    return f"{rules}{forward}{modes}"


def _named(forward: Any) -> str:
    return forward if isinstance(forward, str) else shown(forward)


def _row(plan: Plan, decision: Decision) -> tuple[str, ...]:
    site = decision.site
    path = " = ".join(site.names) or site.path or "<root>"
    call = "" if site.names else str(site.call)
    entry = "" if decision.entry is None else plan.table.entries[decision.entry].selector
    backward, source = backward_of(decision), _short(site.source)
    return (path, call, site.op, site.spelling, backward, source, entry)


def _short(source: str) -> str:
    """The last two parts of a path are enough to find a file."""
    return os.sep.join(source.split(os.sep)[-2:])


_ACTIONS = (
    ("rewrite", "rewritten"),
    ("ambient", "ambient"),
    ("native", "left native"),
    ("skip", "SKIPPED"),
)


def _totals(plan: Plan) -> str:
    counts = [f"{len(plan.with_action(a))} {w}" for a, w in _ACTIONS if plan.with_action(a)]
    return f"{plan.model}, {_sites(len(plan.decisions))}: {', '.join(counts) or 'nothing to do'}."


def _sites(count: int) -> str:
    return f"{count} site" if count == 1 else f"{count} sites"


def _remarks(plan: Plan) -> Iterable[str]:
    for entry, hits in zip(plan.table.entries, plan.hits, strict=True):
        none = "MATCHES NOTHING" if entry in plan.unmatched else "all its sites are another entry's"
        yield f"Entry {entry.selector!r}: {_sites(hits) if hits else none}."
    for forward in dict.fromkeys(d.forward for d in plan.decisions if d.forward is not None):
        count = sum(d.forward == forward for d in plan.decisions)
        yield f"THE FORWARD IS CHANGED at {_sites(count)}, to {_named(forward)}."
    for opaque in plan.opaque:
        yield f"Not looked into: {opaque}."
    for lost in plan.lost:
        yield f"LOST: {lost}."


# --- for people ---


def as_text(plan: Plan, width: int | None = None) -> str:
    """The plan as an aligned table.

    Args:
        plan: The plan.
        width: How many characters a line may have; 0 for any number. By default those of the terminal.
    """
    width = terminal_width() if width is None else width
    rows = [_COLUMNS, *(_row(plan, d) for d in plan.decisions)]
    table = aligned(rows, width, wrapped=("backward",), optional=("spelling", "entry"))
    remarks = [_filled(remark, width) for remark in _remarks(plan)]
    parts = [_totals(plan), table if plan.decisions else "", "\n".join(remarks)]
    return "\n\n".join(part for part in parts if part)


def terminal_width() -> int:
    """The width of the terminal; 0 where the output goes to a file or a pipe, which have none."""
    return shutil.get_terminal_size((0, 0)).columns


def aligned(
    rows: Sequence[Sequence[str]], width: int, wrapped: Sequence[str], optional: Sequence[str] = ()
) -> str:
    """Lay out rows as a table, the first of them as its head.

    Args:
        rows: The cells.
        width: How many characters a line may have; 0 for any number. A terminal of a handful is not catered for.
        wrapped: The columns whose cells go on in the next line where they are too long; the cells of others lose
            their middle.
        optional: The columns that are left out where the rest would become too narrow, the first one first.
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
    """The length of a line, with two blanks between columns."""
    return sum(width + 2 for width in widths) - 2


def _without_middle(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _filled(text: str, width: int) -> str:
    return textwrap.fill(text, width, subsequent_indent="    ") if width else text


# --- for notebooks ---


def as_html(plan: Plan) -> str:
    """The plan as an HTML table."""
    remarks = "".join(f"<li>{html.escape(r)}</li>" for r in _remarks(plan))
    table = html_table([_COLUMNS, *(_row(plan, d) for d in plan.decisions)])
    return f"<p>{html.escape(_totals(plan))}</p>{table}<ul>{remarks}</ul>"


def html_table(rows: Iterable[Sequence[str]]) -> str:
    """Rows as an HTML table, the first of them as its head."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    head, *body = rows
    lines = "".join(line(row, "td") for row in body)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{lines}</tbody></table>"


# --- for programs ---


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: dicts, lists, tuples, text and numbers. Functions and tensors are text."""
    unmatched, shadowed = plan.unmatched, plan.shadowed
    return {
        "model": plan.model,
        "sites": [site_as_dict(decision) for decision in plan.decisions],
        "entries": [
            {
                "selector": entry.selector,
                "rules": None if entry.rules is None else [repr(r) for r in entry.rules],
                "forward": _plain(entry.forward),
                "hits": hits,
                "unmatched": entry in unmatched,
                "shadowed": entry in shadowed and not hits,
            }
            for entry, hits in zip(plan.table.entries, plan.hits, strict=True)
        ],
        "opaque": [vars(o) for o in plan.opaque],
        "lost": [vars(o) for o in plan.lost],
    }


def site_as_dict(decision: Decision) -> dict[str, Any]:
    """A decision as plain data."""
    rules = [
        {"rule": rule.name, "params": {name: _plain(v) for name, v in rule.given.items()}}
        for rule in decision.rules
    ]
    return {
        **vars(decision.site),
        **vars(decision),
        "site": decision.site.name,
        "rules": rules,
        "forward": _plain(decision.forward),
    }


def as_json(data: dict[str, Any], indent: int | None = None) -> str:
    """Plain data as JSON, which has no infinity: it is the text ``"inf"``."""
    return json.dumps(_mapped(data, _finite), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    return _mapped(
        value, lambda v: v if v is None or isinstance(v, bool | int | float | str) else shown(v)
    )


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Change what is inside of dicts, lists and tuples."""
    if isinstance(value, dict):
        return {str(key): _mapped(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, change) for item in value)
    return change(value)
