"""Converts measurements into rows, and rows into text, Markdown and JSON. Does not measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ._measure import Comparison, Spread
from ._targets import Target, baseline, targets


@dataclass(frozen=True)
class Row:
    """A candidate, compared with another one.

    Attributes:
        section: The section.
        group: The group of candidates that were measured in alternation.
        name: The candidate.
        value: Its median time in milliseconds, or the bytes that it saves for each element.
        over: The candidate that it is compared with.
        relative: The ratio of the times, or the difference of the bytes.
        rounds: The number of measurements.
        limit: The target, if it has one.
        verdict: Whether the target is met.
        note: A remark.
    """

    section: str
    group: str
    name: str
    value: float
    over: str
    relative: Spread
    rounds: int
    limit: float | None = None
    verdict: str = ""
    note: str = ""


@dataclass(frozen=True)
class Section:
    """The heading of a section, its introduction, and its unit."""

    heading: str
    text: str
    unit: str = "ms"

    @property
    def relative(self) -> str:
        """The heading of the column of ratios or differences."""
        return "ratio [quartiles]" if self.unit == "ms" else "beyond native"


SECTIONS = {
    "operators": Section(
        "Operators, 1000×1000",
        "Forward and backward of one activation on a million float32 numbers, in eager mode.",
    ),
    "small": Section(
        "Operators, 64×64",
        "The same on a small tensor, where the calls take longer than the arithmetic.",
    ),
    "compiled": Section("Operators, compiled", "The same as the first, behind `torch.compile`."),
    "fuse": Section(
        "Operators with a fused backward",
        "`compile=True` runs a rule as one compiled kernel, while the model is in eager mode.",
    ),
    "steps": Section(
        "Training steps", "Forward, backward and a step of SGD of a whole model, in eager mode."
    ),
    "compiled-steps": Section(
        "Training steps, compiled",
        "The same, both models behind `torch.compile`. The target is 1.00; a median of at most 1.02, or a first "
        "quartile of at most 1.00, is within noise of it.",
    ),
    "attribution": Section(
        "Attributions", "Guided backpropagation of a small network: one map for each picture."
    ),
    "transform": Section(
        "The time that `transform` takes",
        "It captures a model in train and in eval mode; a bare symbolic trace captures one of them.",
    ),
    "compile": Section(
        "The time that compiling takes",
        "The first training step less the second one, in a new process: cold, and with the caches of the one before.",
    ),
    "memory": Section(
        "Memory",
        "What is kept for the backward, in bytes for each float32 number that an activation returns. What follows the "
        "activation keeps it in any case, as most layers do.",
        unit="bytes per element",
    ),
}


def timed_rows(
    section: str, group: str, times: Comparison, notes: Mapping[str, str] | None = None
) -> list[Row]:
    """One row for each candidate relative to the first one, and one for each of its targets."""
    first, rows = next(iter(times.times)), []
    for name in times.times:
        found: dict[str, Target | None] = {first: None}
        for target in targets(section, group, name):
            if (over := baseline(target, times)) is not None:
                found[over] = target
        for over, aim in found.items():
            ratio = times.ratio(name, over)
            limit, verdict = (aim.limit, aim.verdict(ratio)) if aim else (None, "")
            note = (notes or {}).get(name, "") if over == first else ""
            value = 1e3 * times.seconds(name)
            rows.append(
                Row(section, group, name, value, over, ratio, times.rounds, limit, verdict, note)
            )
    return rows


def memory_rows(group: str, found: Iterable[tuple[str, float]]) -> list[Row]:
    """One row for each candidate, relative to the first one, which is native."""
    rows: list[Row] = []
    for name, value in found:
        beyond = Spread.of([value - (rows[0].value if rows else value)])
        aim = next(targets("memory", group, name), None)
        limit, verdict = (aim.limit, aim.verdict(beyond)) if aim else (None, "")
        over = rows[0].name if rows else name
        rows.append(Row("memory", group, name, value, over, beyond, 1, limit, verdict))
    return rows


HEADINGS = ("candidate", "{unit}", "{relative}", "over", "rounds", "target", "verdict")


def _cells(row: Row, repeated: bool) -> list[str]:
    """The cells of a row; the name of a candidate is omitted if the row before has the same one."""
    relative, quartiles = row.relative, ""
    if row.rounds > 1:
        quartiles = f" [{relative.low:.2f}, {relative.high:.2f}]"
    alone = row.over == row.name
    target = "" if row.limit is None else f"≤ {row.limit:g}"
    return [
        "" if repeated else row.name,
        "" if repeated else f"{row.value:.3f}",
        "" if alone else f"{relative.median:.2f}{quartiles}",
        "" if alone else row.over,
        "" if repeated else str(row.rounds),
        target,
        ", ".join(filter(None, [row.verdict, row.note])),
    ]


def _group_cells(rows: list[Row]) -> list[list[str]]:
    before = [None, *(row.name for row in rows)]
    return [_cells(row, row.name == last) for row, last in zip(rows, before, strict=False)]


def _headings(section: Section) -> list[str]:
    return [h.format(unit=section.unit, relative=section.relative) for h in HEADINGS]


def as_text(rows: list[Row]) -> str:
    """The rows of one group, aligned."""
    section = SECTIONS[rows[0].section]
    table = [_headings(section), *_group_cells(rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    return "\n".join([f"{rows[0].section}: {rows[0].group}", *lines])


def as_markdown(rows: Iterable[Row], about: Mapping[str, Any]) -> str:
    """All rows, a table for each section, for docs/measurements.md."""
    lines = [
        "<!-- Written by `python -m benchmarks.compare --markdown`: measure again instead of editing. -->",
        "",
        "Measured on: " + ", ".join(f"{k} {v}" for k, v in about.items() if v is not None) + ".",
    ]
    for name, found in groupby(rows, lambda row: row.section):
        section = SECTIONS[name]
        headings = ["case", *_headings(section)]
        lines += ["", f"### {section.heading}", "", section.text, ""]
        lines += [_line(headings), _line(["---"] * len(headings))]
        for group, members in groupby(found, lambda row: row.group):
            for position, cells in enumerate(_group_cells(list(members))):
                lines.append(_line([group if not position else "", *cells]))
    return "\n".join([*lines, ""])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def as_data(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """All rows as plain data, for JSON."""
    return [dataclasses.asdict(row) for row in rows]
