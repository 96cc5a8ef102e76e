"""What the documentation shows of the results: all tables, and a summary. Does not measure.

Nothing on a page is a number that is written by hand: each line of the summary says which rows it is taken from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from . import _cases as cases
from ._cases import NATIVE, NATIVE_RELU, SPIKING_STEPS
from ._networks import BLOCK_MODELS, LAYERS, LIBRARIES, SMALL_RULES
from ._peers import PEERS, peer_of
from ._results import Results
from ._tables import SECTIONS, Row, cells, headings
from ._targets import GRADIENT_ALONE, LIGHT, PLAIN, USUAL, extended

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs/_static/performance/compare.json"
TABLES = ROOT / "docs/_tables"
README = ROOT / "README.md"

WRITTEN = (
    "<!-- Written by `python -m benchmarks.compare --docs`: measure again instead of editing. -->"
)
NOT_MEASURED = "not measured"


def files(results: Results) -> dict[Path, str]:
    """The text of each file that shows results."""
    return {
        TABLES / "performance.md": all_tables(results),
        TABLES / "cost.md": cost_table(results),
        TABLES / "beside.md": peers_table(results),
        README: readme(results),
    }


# --- all tables, for docs/measurements.md ---


def all_tables(results: Results) -> str:
    """All rows, a table for each section, with the machine of each."""
    lines = [WRITTEN]
    machines = [describe(run) for run in results.runs]
    distinct = [*dict.fromkeys(machines)]
    if len(distinct) == 1:
        lines += ["", f"Measured on: {distinct[0]}."]
    for name, section in SECTIONS.items():
        if not section.on_page:
            continue
        lines += ["", f"### {section.heading}", "", section.text, ""]
        found = results.section(name)
        if not found:
            lines.append("Not measured yet.")
            continue
        if len(distinct) > 1:
            there = dict.fromkeys(machines[run] for run, _ in found)
            lines += [f"Measured on: {'; '.join(there)}.", ""]
        lines += table(
            ["case", *headings(section)],
            (
                [group if not position else "", *texts]
                for group, members in groupby((row for _, row in found), lambda row: row.group)
                for position, texts in enumerate(cells([*members], aims=False))
            ),
        )
    return "\n".join([*lines, ""])


def describe(run: dict[str, object]) -> str:
    """The machine of a run, and the versions there; without what changes from run to run."""
    left_out = ("load", "date", "quick", "missing")
    return ", ".join(f"{k} {v}" for k, v in run.items() if v is not None and k not in left_out)


def table(heads: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A table of Markdown."""
    return [_line(heads), _line(["---"] * len(heads)), *map(_line, rows)]


def _line(texts: list[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"


# --- the summary, for docs/performance.md and the README ---


@dataclass(frozen=True)
class Of:
    """Some of the rows.

    Attributes:
        section: Their section.
        names: Their candidates; empty for all of this package.
        groups: Their groups; empty for all.
        over: What they are compared with: a candidate or a peer.
    """

    section: str
    names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    over: str = NATIVE

    def has(self, row: Row) -> bool:
        """Whether a row is one of them."""
        return (
            row.section == self.section
            and row.name != row.over
            and (row.name in self.names if self.names else cases.is_ours(row.name))
            and (not self.groups or row.group in self.groups)
            and self.over in (row.over, peer_of(row.over))
        )

    def extended(self) -> Of:
        """The same candidates with the C++ extension."""
        return Of(self.section, extended(self.names), self.groups, self.over)

    def ratios(self, results: Results) -> str:
        """The range of their ratios."""
        found = [row.relative.median for _, row in results.rows if self.has(row)]
        return between(found) if found else NOT_MEASURED


def between(values: list[float]) -> str:
    """The range of some numbers, as text."""
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


SYMBOLIC = f"{NATIVE} symbolic_trace"
WITH_X = ("rectangular", "clipped_straight_through", "d(ReLU)", "guided")


@dataclass(frozen=True)
class Cost:
    """A line of the summary.

    Attributes:
        what: What is measured.
        uncompiled: The rows of it.
        compiled: The rows of it behind `torch.compile`.
        extension: Whether there are rows with the C++ extension.
    """

    what: str
    uncompiled: Of | None = None
    compiled: Of | None = None
    extension: bool = True


STEPS = Cost(
    "a training step of an MLP, resnet18, vgg11_bn or a ViT",
    Of("steps", PLAIN, USUAL),
    Of("compiled-steps", cases.COMPILED_RULES, USUAL),
)
SMALL = Cost("one activation of 64×64 numbers: common rules", Of("small", LIGHT, over=NATIVE_RELU))
COSTS = (
    STEPS,
    Cost(
        "a training step of a spiking MLP, 20 activations of 32 768 numbers",
        Of("steps", (*PLAIN, "arctan, heaviside"), (SPIKING_STEPS,)),
        Of("compiled-steps", cases.COMPILED_RULES, (SPIKING_STEPS,)),
    ),
    Cost(
        "one activation of a million numbers: rules of the gradient alone",
        Of("operators", GRADIENT_ALONE, over=NATIVE_RELU),
    ),
    Cost(
        "the same: `rectangular`, `clipped_straight_through`, `d(ReLU)`, `guided`",
        Of("operators", WITH_X, over=NATIVE_RELU),
    ),
    SMALL,
    Cost("20 layers of 64×64 with activations", Of("small-steps", (*SMALL_RULES[LAYERS],), (LAYERS,))),
    Cost(
        "a training step of an MLP or resnet18 with a small batch, in a block of `use`",
        Of("blocks", ("rectangular, use",), (*(f"{name}, small" for name in BLOCK_MODELS),)),
    ),
    *(
        Cost(f"a spiking network of {peer}, in a block of `use`", Of("spiking", ("arctan, use",), over=peer))
        for peer in LIBRARIES
    ),
    Cost(
        "`transform` of resnet152 or vit_l_16, over a plain symbolic trace of FX",
        Of("transform", ("transform",), ("resnet152", "vit_l_16"), SYMBOLIC),
        extension=False,
    ),
    Cost("compiling resnet18 for the first time", compiled=Of("compile", (), ("resnet18, cold",))),
    Cost("compiling resnet18 from the cache", compiled=Of("compile", (), ("resnet18, warm",))),
)  # fmt: skip


def cost_table(results: Results) -> str:
    """What costs how much, relative to native PyTorch."""
    rows = []
    for cost in COSTS:
        with_extension = cost.uncompiled.extended() if cost.uncompiled and cost.extension else None
        found = (cost.uncompiled, with_extension, cost.compiled)
        rows.append([cost.what, *(of.ratios(results) if of else "" for of in found)])
    heads = ["what", "uncompiled", "with the C++ extension", "compiled"]
    return "\n".join([WRITTEN, "", *table(*measured(heads, rows)), ""])


def measured(
    heads: list[str], rows: list[list[str]], first: int = 1
) -> tuple[list[str], list[list[str]]]:
    """A table without the rows and columns that hold no measurement.

    Args:
        heads: The headings.
        rows: The rows.
        first: The first column of measurements.
    """

    def holds(texts: Iterable[str]) -> bool:
        return any(text not in ("", NOT_MEASURED) for text in texts)

    rows = [row for row in rows if holds(row[first:])]
    kept = [c for c in range(len(heads)) if c < first or holds(row[c] for row in rows)]
    return [heads[c] for c in kept], [[row[c] for c in kept] for row in rows]


# What is compared with other libraries: the rule, and the rows.
BESIDE: tuple[tuple[str, str, Of], ...] = (
    *(
        ("forward and backward of a million numbers", rule, Of("operators", (rule,), (rule,)))
        for rule in ("rectangular", "triangular", "fast_sigmoid", "arctan", "clipped_straight_through")
    ),
    *(
        ("the same of 64×64 numbers", rule, Of("small", (rule,), (rule,)))
        for rule in ("rectangular", "triangular", "fast_sigmoid", "arctan")
    ),
    ("a step of a spiking MLP", "arctan, heaviside", Of("steps", ("arctan, heaviside",), (SPIKING_STEPS,))),
    ("guided backpropagation of a small network", "guided", Of("attribution", ("guided",), ("guided",))),
)  # fmt: skip


def peers_table(results: Results) -> str:
    """What takes how much of the time of other libraries."""
    rows = []
    for what, rule, of in BESIDE:
        found = [
            _over_peers(results, of.section, of.groups[0], name)
            for name in (rule, *extended((rule,)))
        ]
        with_extension = "" if of.section == "attribution" else found[1]
        rows.append([what, f"`{rule.partition(',')[0]}`", found[0], with_extension])
    heads = ["what", "rule", "uncompiled", "with the C++ extension"]
    heads, rows = measured(heads, rows, first=2)
    for row, above in reversed([*zip(rows[1:], rows, strict=False)]):
        row[0] = row[0] if row[0] != above[0] else ""
    return "\n".join([WRITTEN, "", *table(heads, rows), ""])


def _over_peers(results: Results, section: str, group: str, name: str) -> str:
    """The time of a candidate over the fastest candidate of each peer: the ratios of their medians."""
    times = {row.name: row.value for _, row in results.section(section) if row.group == group}
    found: dict[str, list[float]] = {}
    for other, value in times.items():
        if peer := peer_of(other):
            found.setdefault(peer, []).append(value)
    if name not in times or not found:
        return NOT_MEASURED
    return ", ".join(f"{times[name] / min(found[p]):.2f} of {p}" for p in PEERS if p in found)


BEGIN, END = "<!-- measured -->\n", "<!-- end of what was measured -->"


def readme(results: Results) -> str:
    """The README with the numbers of the results."""
    assert STEPS.uncompiled is not None
    assert STEPS.compiled is not None
    assert SMALL.uncompiled is not None
    extension = SMALL.uncompiled.extended().ratios(results)
    end = "" if extension == NOT_MEASURED else f", and {extension} with the optional C++ extension"
    lines = [
        f"- A training step of an MLP, resnet18, vgg11_bn or a ViT takes {STEPS.uncompiled.ratios(results)} of the",
        f"  native time, compiled {STEPS.compiled.ratios(results)}.",
        f"- One activation of a small tensor (64×64) takes {SMALL.uncompiled.ratios(results)} of the time of a native",
        f"  ReLU{end}, without the compiler.",
        "- A rule that reads only the gradient saves nothing for the backward; others save their input, or a byte or a",
        "  bit for each entry.",
    ]
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join([*lines, END]) + after
