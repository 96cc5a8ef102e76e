"""The results of an experiment: as JSON, as a table and as curves. Does not depend on models."""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from torch import Tensor

from _training import Epoch

__all__ = ["OURS", "PEER", "Results", "Run", "draw", "spread", "table"]

OURS, PEER = "freegrad_fx", "freegrad"

HEADINGS = ("forward / backward", "with", "seeds", "accuracy, %", "loss", "s/epoch")

# Okabe and Ito's colours, which colour-blind readers can distinguish
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7")


@dataclass(frozen=True)
class Run:
    """One variant, trained with one package from one seed."""

    variant: str
    library: str
    seed: int
    epochs: list[Epoch]

    @property
    def key(self) -> tuple[str, str, int]:
        return self.variant, self.library, self.seed

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, rounded to eight digits. A loss that is not finite is null, as JSON has no NaN."""
        columns = {
            name: [float(f"{v:.8g}") if math.isfinite(v) else None for v in values]
            for name, values in zip(Epoch._fields, zip(*self.epochs, strict=True), strict=True)
        }
        return {"variant": self.variant, "library": self.library, "seed": self.seed} | columns

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Run":
        columns = [[math.nan if v is None else v for v in data[name]] for name in Epoch._fields]
        epochs = [Epoch(*values) for values in zip(*columns, strict=True)]
        return cls(data["variant"], data["library"], data["seed"], epochs)


@dataclass
class Results:
    """The settings of an experiment and its runs."""

    about: dict[str, Any]
    runs: list[Run] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> "Results":
        content = json.loads(path.read_text("utf-8"))
        return cls(content["about"], [Run.of(run) for run in content["runs"]])

    def write(self, path: Path) -> None:
        """Write JSON atomically, one run per line."""
        runs = ",\n".join(json.dumps(run.to_dict(), allow_nan=False) for run in self.runs)
        about = json.dumps(self.about, indent=1, ensure_ascii=False, allow_nan=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(f'{{"about": {about},\n"runs": [\n{runs}\n]}}\n', "utf-8")
        unfinished.replace(path)

    def groups(self) -> dict[tuple[str, str], list[Run]]:
        """The runs by variant and package, in the order of their seeds."""
        groups: dict[tuple[str, str], list[Run]] = {}
        for run in sorted(self.runs, key=lambda run: run.seed):
            groups.setdefault((run.variant, run.library), []).append(run)
        return groups

    def rows(self) -> list[tuple[str, ...]]:
        """One row for each variant and package: accuracy and loss of the last epoch, and the time."""
        return [
            (
                variant,
                library,
                str(len(runs)),
                spread([100 * run.epochs[-1].accuracy for run in runs], ".2f"),
                spread([run.epochs[-1].loss for run in runs], ".4f"),
                f"{statistics.median(epoch.seconds for run in runs for epoch in run.epochs):.3g}",
            )
            for (variant, library), runs in self.groups().items()
        ]

    def difference(self) -> float:
        """The largest difference between the accuracies of the two packages, over all epochs."""
        groups = self.groups()
        return max(
            abs(one.accuracy - other.accuracy)
            for (variant, library), theirs in groups.items()
            if library == PEER
            for run, peer_run in zip(groups[variant, OURS], theirs, strict=True)
            for one, other in zip(run.epochs, peer_run.epochs, strict=True)
        )


def spread(values: list[float], form: str) -> str:
    """Mean ± sample standard deviation; only the mean if there is one value."""
    mean = f"{statistics.fmean(values):{form}}"
    return f"{mean} ± {statistics.stdev(values):{form}}" if len(values) > 1 else mean


def table(results: Results) -> Table:
    """Show the rows, with the other package below, so that 80 columns are enough."""
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column(HEADINGS[0], no_wrap=True)
    for heading in HEADINGS[2:]:
        shown.add_column(heading, no_wrap=True, justify="right")
    for variant, library, *values in results.rows():
        shown.add_row(variant if library == OURS else f"  with {library}", *values)
    return shown


def draw(results: Results, path: Path) -> None:
    """Draw the learning curves of all variants: the mean over the seeds, and the range."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    groups = results.groups()
    variants = list(dict.fromkeys(variant for variant, _ in groups))
    for (variant, library), runs in groups.items():
        colour = COLOURS[variants.index(variant) % len(COLOURS)]
        style, label = ("-", variant) if library == OURS else (":", f"{variant}, {library}")
        for axes, name, factor in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
            values = torch.tensor([[factor * getattr(e, name) for e in r.epochs] for r in runs])
            draw_mean_and_range(axes, values, style, colour, label)
    loss.set(title="Training set", ylabel="loss", yscale="log")
    accuracy.set(title="Held-out set", ylabel="accuracy, %")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = loss.get_legend_handles_labels()
    columns = len(variants)  # one line for each package
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.suptitle(f"{results.about['title']}, {results.about['data']}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def draw_mean_and_range(axes: Axes, values: Tensor, style: str, colour: str, label: str) -> None:
    epochs = torch.arange(values.shape[1]) + 1
    axes.plot(epochs, values.mean(dim=0), style, color=colour, label=label)
    low, high = values.amin(dim=0), values.amax(dim=0)
    axes.fill_between(epochs, low, high, color=colour, alpha=0.15, linewidth=0)
