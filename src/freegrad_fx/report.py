"""A plan, for people, notebooks and programs. Knows how to lay out, and decides nothing."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .captured import CapturedModule
from .plan import Decision, Plan

__all__ = ["PLAN", "as_dict", "as_html", "as_text", "report"]

PLAN = "_freegrad_fx_plan"
"""The attribute of a transformed model that holds what was done to it."""

_COLUMNS = ("path", "call", "op", "spelling", "backward", "line")


def report(model: nn.Module) -> Plan:
    """What was rewritten in a transformed model, what was not, and why.

    Returns:
        The plan that was carried out: ``print`` it, show it in a notebook, or take ``to_dict()``.

    Raises:
        TypeError: `model` does not come from `transform`.
    """
    plan = model.__dict__.get(PLAN) if isinstance(model, CapturedModule) else None
    if not isinstance(plan, Plan):
        raise TypeError(
            f"report() takes what transform() returned, got {type(model).__name__}. A second trace of a transformed "
            f"model keeps its rules, but not the report."
        )
    return plan


def _backward(decision: Decision) -> str:
    if decision.action != "rewrite":
        return f"{decision.action}: {decision.reason}"
    rules = " → ".join(repr(replace(rule, forward=None)) for rule in decision.rules)
    forward = f", FORWARD {decision.forward}" if decision.forward else ""
    modes = f" (in {decision.modes} only)" if decision.modes else ""
    return f"{rules}{forward}{modes}"


def _row(decision: Decision) -> tuple[str, ...]:
    site = decision.site
    backward, source = _backward(decision), _short(site.source)
    return (site.path or "<root>", str(site.call), site.op, site.spelling, backward, source)


def _short(source: str) -> str:
    """The last two parts of a path are enough to find a file."""
    return os.sep.join(source.split(os.sep)[-2:])


_ACTIONS = (("rewrite", "rewritten"), ("native", "left native"), ("skip", "SKIPPED"))


def _totals(plan: Plan) -> str:
    counts = [f"{len(plan.with_action(a))} {w}" for a, w in _ACTIONS if plan.with_action(a)]
    return f"{plan.model}, {_sites(len(plan.decisions))}: {', '.join(counts) or 'nothing to do'}."


def _sites(count: int) -> str:
    return f"{count} site" if count == 1 else f"{count} sites"


def _remarks(plan: Plan) -> Iterable[str]:
    for entry, hits in zip(plan.table.entries, plan.hits, strict=True):
        none = "MATCHES NOTHING" if entry in plan.unmatched else "all its sites are another entry's"
        yield f"Entry {entry.selector!r}: {_sites(hits) if hits else none}."
    for forward in sorted({d.forward for d in plan.decisions if d.forward}):
        count = sum(d.forward == forward for d in plan.decisions)
        yield f"THE FORWARD IS CHANGED at {_sites(count)}, to {forward}."
    for opaque in plan.opaque:
        yield f"Not looked into: {opaque}."
    for lost in plan.lost:
        yield f"LOST: {lost}."


def as_text(plan: Plan) -> str:
    """The plan as an aligned table."""
    rows = [_COLUMNS, *map(_row, plan.decisions)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    parts = [_totals(plan), "\n".join(lines) if plan.decisions else "", "\n".join(_remarks(plan))]
    return "\n\n".join(part for part in parts if part)


def as_html(plan: Plan) -> str:
    """The plan as an HTML table."""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(_row(d), "td") for d in plan.decisions)
    remarks = "".join(f"<li>{html.escape(r)}</li>" for r in _remarks(plan))
    return (
        f"<p>{html.escape(_totals(plan))}</p><table><thead>{line(_COLUMNS, 'th')}</thead>"
        f"<tbody>{body}</tbody></table><ul>{remarks}</ul>"
    )


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: dicts, lists, text and numbers."""
    return {
        "model": plan.model,
        "sites": [
            {
                "kind": d.site.kind,
                "path": d.site.path,
                "call": d.site.call,
                "op": d.site.op,
                "spelling": d.site.spelling,
                "source": d.site.source,
                "action": d.action,
                "rules": [{"rule": r.name, "params": dict(r.bound)} for r in d.rules],
                "forward": d.forward,
                "entry": d.entry,
                "reason": d.reason,
                "modes": d.modes,
            }
            for d in plan.decisions
        ],
        "entries": [
            {
                "selector": entry.selector,
                "rules": None if entry.rules is None else [repr(r) for r in entry.rules],
                "hits": hits,
            }
            for entry, hits in zip(plan.table.entries, plan.hits, strict=True)
        ],
        "opaque": [vars(o) for o in plan.opaque],
        "lost": [vars(o) for o in plan.lost],
    }
