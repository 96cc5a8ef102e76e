"""A column of rows as SVG: boxes, arrows between neighbours, lines at the left for what is read from further above."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from ..plan import Decision
from ..sites.site import REPLACE
from .rows import Row

__all__ = ["THEMES", "svg_of"]

_SIZE, _CHARACTER = 12, 7.23  # of a monospaced letter
_HEIGHT, _GAP, _LANE, _MARGIN = 26, 16, 12, 16
_LONGEST = 56  # characters of a text in a box

# Okabe and Ito's colours, which colour-blind readers can distinguish: on white, and on a dark ground
_COLOURS = {
    "light": ("#0072B2", "#C26A00", "#007A5A", "#B3437E", "#1D7FB5", "#C14400", "#7A6A00"),
    "dark": ("#56B4E9", "#E69F00", "#2FC296", "#DE8FBC", "#8CCBF0", "#F07A3C", "#F0E442"),
}
_GREYS = {
    # text, weaker text, lines, boxes
    "light": ("#1b1c1e", "#5f6368", "#9aa0a6", "#f4f5f6"),
    "dark": ("#e8eaed", "#a9aeb4", "#7d8288", "#25272a"),
}
THEMES = ("auto", "light", "dark")


def svg_of(
    rows: Sequence[Row], title: str, notes: Sequence[str], theme: str, arrows: bool = True
) -> str:
    """Draw rows.

    Args:
        rows: The rows, from top to bottom.
        title: The title.
        notes: Lines below the title.
        theme: ``"light"``, ``"dark"``, or ``"auto"``, which follows the browser.
        arrows: Whether it is known what the rows read.
    """
    counts = Counter(rule for row in rows for rule in map(_rule, row.decisions))
    classes = {rule: f"r{number % len(_COLOURS['light'])}" for number, rule in enumerate(counts)}
    texts = [_texts(row) for row in rows]
    width = _CHARACTER * max((len(path) + len(name) + 1 for path, name in texts), default=0) + 24
    lanes = _lanes(rows) if arrows else {}
    left = _MARGIN + _LANE * (max(lanes.values(), default=-1) + 2) * bool(lanes)
    head, y = _head(title, notes, counts, classes)
    parts = list(head)
    tops: list[float] = []
    right = 0.0
    for row, (path, name) in zip(rows, texts, strict=True):
        tops.append(y)
        pills, end = _pills(row, left + width + 10, y, classes)
        parts += [*_box(row, left, y, width, path, name, classes), *pills]
        right = max(right, end)
        y += _HEIGHT + _GAP
    if arrows:
        parts += _edges(rows, lanes, left, tops, left + min(width / 2, 60))
    widest = max(len(line) for line in (title, *notes))
    legend = sum(len(rule) + 8 for rule in counts)
    full = max(right, left + width, _CHARACTER * max(widest, legend) + 40) + _MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{full:.0f}" height="{y + 4:.0f}" '
        f'viewBox="0 0 {full:.0f} {y + 4:.0f}" role="img" aria-label="{html.escape(title)}">\n'
        f"<style>{_style(theme)}</style>\n"
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
        '<path d="M0,0 L6,3 L0,6" class="line"/></marker></defs>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _style(theme: str) -> str:
    def colours(name: str) -> str:
        text, weak, line, box = _GREYS[name]
        rules = "".join(
            f".r{number}{{stroke:{colour}}}.t.r{number},.f.r{number}{{fill:{colour};stroke:none}}"
            for number, colour in enumerate(_COLOURS[name])
        )
        return (
            f".t{{fill:{text}}}.w{{fill:{weak}}}.line{{stroke:{line};fill:none}}"
            f".box{{fill:{box};stroke:{line}}}{rules}"
        )

    font = f"text{{font:{_SIZE}px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace}}"
    common = f"{font}.b{{font-weight:bold}}.marked{{stroke-width:2}}.pill{{fill:none}}"
    if theme != "auto":
        return common + colours(theme)
    dark = f"@media (prefers-color-scheme:dark){{{colours('dark')}}}"
    return f"{common}{colours('light')}{dark}"


# --- the parts ---


def _rule(decision: Decision) -> str:
    """What a decision is called in the legend."""
    if decision.action == "ambient":
        return "ambient"
    return " → ".join(rule.name for rule in decision.rules) or "another forward"


def _head(
    title: str, notes: Iterable[str], counts: Mapping[str, int], classes: Mapping[str, str]
) -> tuple[list[str], float]:
    """The title, the notes and the legend, and where the rows begin."""
    y = 28.0
    parts = [_text(_MARGIN, y, title, "t b")]
    for note in notes:
        y += 18
        parts.append(_text(_MARGIN, y, note, "w"))
    x = float(_MARGIN)
    if counts:
        y += 24
    for rule, count in counts.items():
        label = f"{rule} ×{count}"
        parts.append(
            f'<rect x="{x:.1f}" y="{y - 10:.1f}" width="12" height="12" rx="3" class="f {classes[rule]}"/>'
        )
        parts.append(_text(x + 18, y, label, "t"))
        x += 18 + _CHARACTER * (len(label) + 2)
    return parts, y + 20


def _texts(row: Row) -> tuple[str, str]:
    path = row.path if len(row.path) <= _LONGEST else f"…{row.path[1 - _LONGEST :]}"
    return path, row.name if len(row.name) <= _LONGEST else f"{row.name[: _LONGEST - 1]}…"


def _box(
    row: Row, x: float, y: float, width: float, path: str, name: str, classes: Mapping[str, str]
) -> list[str]:
    rules = list(dict.fromkeys(map(_rule, row.decisions)))
    marked = f" marked {classes[rules[0]]}" if rules else ""
    dashes = ' stroke-dasharray="5 3"' if rules == ["ambient"] else ""
    radius = _HEIGHT / 2 if row.kind in ("parameter", "input", "output") else 4
    shadow = (
        [
            f'<rect x="{x + 4:.1f}" y="{y + 4:.1f}" width="{width:.1f}" height="{_HEIGHT}" rx="4" class="box"/>'
        ]
        if row.kind == "folded"
        else []
    )
    box = (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{_HEIGHT}" rx="{radius:g}" '
        f'class="box{marked}"{dashes}/>'
    )
    start = x + 12
    texts = [_text(start, y + 17, path, "t")] if path else []
    at = start + _CHARACTER * (len(path) + 1) * bool(path)
    return [*shadow, box, *texts, _text(at, y + 17, name, "w" if path else "t")]


def _pills(row: Row, x: float, y: float, classes: Mapping[str, str]) -> tuple[list[str], float]:
    """What acts at a row, at its right, and where it ends."""
    if row.kind == "folded":
        counts = Counter(map(_rule, row.decisions))
        labels = [(f"{rule} ×{count}", rule) for rule, count in counts.items()]
    else:
        labels = [(_label(decision), _rule(decision)) for decision in row.decisions]
    parts = []
    for label, rule in labels:
        label = label if len(label) <= 2 * _LONGEST else f"{label[: 2 * _LONGEST - 1]}…"
        width = _CHARACTER * len(label) + 18
        parts.append(
            f'<rect x="{x:.1f}" y="{y + 3:.1f}" width="{width:.1f}" height="{_HEIGHT - 6}" rx="10" '
            f'class="pill {classes[rule]}"/>'
        )
        parts.append(_text(x + 9, y + 17, label, f"t {classes[rule]}"))
        x += width + 6
    return parts, x


def _label(decision: Decision) -> str:
    """The place, if it is not the whole operation, and the rules with their parameters."""
    at = "" if decision.site.at == REPLACE else f"{decision.site.at}: "
    if decision.action == "ambient":
        return f"{at}ambient"
    rules = " → ".join(map(str, decision.rules))
    if decision.forward is not None:
        forward = getattr(decision.forward, "__name__", str(decision.forward))
        return f"{at}forward {forward}{', ' * bool(rules)}{rules}"
    return f"{at}{rules}"


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{html.escape(text)}</text>'


# --- the lines ---


def _far(rows: Sequence[Row]) -> dict[int, list[int]]:
    """For each row, those that read it and are not directly below it."""
    found: dict[int, list[int]] = {}
    for reader, row in enumerate(rows):
        for source in sorted(row.sources):
            if source != reader - 1:
                found.setdefault(source, []).append(reader)
    return found


def _lanes(rows: Sequence[Row]) -> dict[int, int]:
    """The lane of the line that leaves a row: short lines are near the boxes, and no two of a lane overlap."""
    taken: list[list[tuple[int, int]]] = []
    lanes: dict[int, int] = {}
    spans = {s: (min(s, *readers), max(s, *readers)) for s, readers in _far(rows).items()}
    for source, (start, end) in sorted(spans.items(), key=lambda i: i[1][1] - i[1][0]):
        free = (
            lane
            for lane, used in enumerate(taken)
            if all(end < other_start or start > other_end for other_start, other_end in used)
        )
        lane = next(free, len(taken))
        if lane == len(taken):
            taken.append([])
        taken[lane].append((start, end))
        lanes[source] = lane
    return lanes


def _edges(
    rows: Sequence[Row], lanes: Mapping[int, int], left: float, tops: Sequence[float], middle: float
) -> list[str]:
    parts = []
    for number, row in enumerate(rows):
        if number - 1 in row.sources:
            parts.append(
                f'<path d="M{middle:.1f},{tops[number - 1] + _HEIGHT:.1f} V{tops[number] - 1:.1f}" '
                f'class="line" marker-end="url(#head)"/>'
            )
    for source, readers in _far(rows).items():
        x = left - _LANE * (lanes[source] + 1.5)
        start = tops[source] + _HEIGHT - 7
        for reader in readers:
            end = tops[reader] + 7
            turn = 5 if end > start else -5
            parts.append(
                f'<path d="M{left:.1f},{start:.1f} H{x + 5:.1f} Q{x:.1f},{start:.1f} {x:.1f},{start + turn:.1f} '
                f'V{end - turn:.1f} Q{x:.1f},{end:.1f} {x + 5:.1f},{end:.1f} H{left - 1:.1f}" '
                f'class="line" marker-end="url(#head)"/>'
            )
    return parts
