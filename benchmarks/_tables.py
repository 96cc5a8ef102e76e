"""The sections of a comparison, and its rows: measurements become rows, and rows become text. Does not measure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ._measure import Comparison, Spread
from ._targets import Target, baseline, targets


@dataclass(frozen=True)
class Row:
    """A candidate, compared with another one.

    Attributes:
        section: The section.
        group: The group of candidates that were measured in alternation.
        name: The candidate.
        value: Its median time in milliseconds, or the bytes that it saves; the section says in which unit.
        over: The candidate that it is compared with.
        relative: The ratio, or the difference of the bytes.
        rounds: The number of measurements.
        note: A remark.
        target: The target, if it has one.
    """

    section: str
    group: str
    name: str
    value: float
    over: str
    relative: Spread
    rounds: int
    note: str = ""
    target: Target | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is met; empty if there is none."""
        return self.target.verdict(self.relative) if self.target else ""


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        heading: Its heading.
        text: Its introduction.
        unit: The unit of the values.
        relative: The heading of the column of ratios or differences.
        on_page: Whether docs/measurements.md has it; docs/performance.md includes the memory of whole models, which
            `benchmarks.memory` writes.
    """

    heading: str
    text: str
    unit: str = "ms"
    relative: str = "ratio [quartiles]"
    on_page: bool = True


SECTIONS = {
    "operators": Section(
        "Operators, 1000×1000",
        "Forward and backward of one activation on a million float32 numbers, in eager mode.",
    ),
    "small": Section(
        "Operators, 64×64",
        "The same on a small tensor, where the calls take longer than the arithmetic.",
    ),
    "small-steps": Section(
        "Networks of small tensors",
        "Forward and backward of networks in eager mode, whose layers have 64 or 128 units, on a batch of 64.",
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
        "The same, both models behind `torch.compile`.",
    ),
    "blocks": Section(
        "Blocks of `use`",
        "A training step of a model in a block of `use`, transformed, and in a block without a site, on small batches.",
    ),
    "spiking": Section(
        "Spiking networks of other libraries",
        "Forward and backward of a network with neurons of snnTorch or SpikingJelly, ten time steps, with their own "
        "surrogates, and in a block of `use` whose table exchanges the surrogate.",
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
        relative="beyond native",
    ),
    "model-memory": Section(
        "Memory of whole models",
        "What a forward keeps for the backward, in single precision.",
        unit="MiB",
        relative="ratio",
        on_page=False,
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
            note = (notes or {}).get(name, "") if over == first else ""
            value = 1e3 * times.seconds(name)
            rows.append(Row(section, group, name, value, over, ratio, times.rounds, note, aim))
    return rows


def memory_rows(
    section: str, group: str, found: Iterable[tuple[str, float]], *, ratio: bool = False
) -> list[Row]:
    """One row for each candidate, relative to the first one, which is native: the difference, or the ratio."""
    rows: list[Row] = []
    for name, value in found:
        native = rows[0].value if rows else value
        relative = Spread.of([value / native if ratio else value - native])
        aim = next(targets(section, group, name), None)
        over = rows[0].name if rows else name
        rows.append(Row(section, group, name, value, over, relative, 1, target=aim))
    return rows


HEADINGS = ("candidate", "{unit}", "{relative}", "over", "rounds")


def headings(section: Section) -> list[str]:
    """The headings of the columns."""
    return [h.format(unit=section.unit, relative=section.relative) for h in HEADINGS] + ["note"]


def cells(rows: list[Row], *, aims: bool) -> list[list[str]]:
    """The cells of the rows of a group; the name of a candidate is omitted if the row before has the same one.

    Args:
        rows: The rows.
        aims: Whether the last cell has the target.
    """
    before = [None, *(row.name for row in rows)]
    return [_cells(row, row.name == last, aims) for row, last in zip(rows, before, strict=False)]


def _cells(row: Row, repeated: bool, aims: bool) -> list[str]:
    relative, quartiles = row.relative, ""
    if row.rounds > 1:
        quartiles = f" [{relative.low:.2f}, {relative.high:.2f}]"
    alone = row.over == row.name
    aim = row.target
    target = f"≤ {aim.limit:g}: {row.verdict}" if aims and aim and aim.limit is not None else ""
    return [
        "" if repeated else row.name,
        "" if repeated else f"{row.value:.3f}",
        "" if alone else f"{relative.median:.2f}{quartiles}",
        "" if alone else row.over,
        "" if repeated else str(row.rounds),
        ", ".join(filter(None, [target, row.note])),
    ]


def as_text(rows: list[Row]) -> str:
    """The rows of one group, aligned, with their targets."""
    table = [headings(SECTIONS[rows[0].section]), *cells(rows, aims=True)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  "
        + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    return "\n".join([f"{rows[0].section}: {rows[0].group}", *lines])
