"""`compare`: the gradients of a model under tables beside its native ones, for each parameter and each site."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._torch.modules import compiled_model
from .batches import called, restored, shown
from .blocks import native
from .capture.captured import CapturedModule
from .core.declaration import Declaration
from .core.markup import html_view
from .core.rule import Rule
from .eager import use
from .errors import unknown
from .plan import report
from .plan.layout import aligned, as_json, terminal_width
from .sites.site import REPLACE, Site
from .table import RulesLike, RuleTable, on
from .table.entry import Entry
from .vocabulary.activations import OPS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Comparison", "ComparisonRow", "Statistic", "compare"]

# Colours of Okabe and Ito, which colour-blind readers can distinguish
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")

Loss: TypeAlias = Callable[..., Tensor]


@dataclass(frozen=True)
class Statistic:
    """The mean and the spread of a measure over batches and seeds.

    Attributes:
        mean: The mean of the finite values; NaN if there is none.
        std: Their standard deviation, with the divisor n; NaN if there is no finite value.
        count: The number of finite values.
    """

    mean: float
    std: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Statistic:
        """The statistic of some values."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return cls(math.nan, math.nan, 0)
        mean = math.fsum(finite) / len(finite)
        variance = math.fsum((value - mean) ** 2 for value in finite) / len(finite)
        return cls(mean, math.sqrt(variance), len(finite))

    def __str__(self) -> str:
        if not self.count:
            return "-"
        std = 0.0 if self.std < 1e-12 * abs(self.mean) else self.std  # rounding
        spread = f" ± {std:.2g}" if self.count > 1 else ""
        return f"{self.mean:.4g}{spread}"


@dataclass(frozen=True)
class ComparisonRow:
    """One parameter or site under one table. With g the native gradient and r that of the table, all entries in one:

    Attributes:
        table: The name of the table.
        kind: ``"parameter"``; or ``"site"``, for the gradient that the operation gives its first operand.
        name: The name of the parameter or site.
        cosine: ⟨g, r⟩ / (‖g‖·‖r‖)
        norm_ratio: ‖r‖ / ‖g‖
        sign_agreement: The share of the entries with sign(r) = sign(g).
        zeroed: The share of the entries with r = 0 among those with g ≠ 0.
        nonfinite: The share of the entries of r that are not finite.
    """

    table: str
    kind: str
    name: str
    cosine: Statistic
    norm_ratio: Statistic
    sign_agreement: Statistic
    zeroed: Statistic
    nonfinite: Statistic


MEASURES = tuple(field.name for field in fields(ComparisonRow))[3:]


@dataclass(frozen=True)
class Comparison:
    """The gradients of a model under tables beside its native ones. ``print`` it for a table.

    Attributes:
        model: The name of the model's class.
        rows: Parameters in the order of the model, then sites in the order of execution; for each table.
        batches: The number of batches.
        seeds: The seeds of the random numbers.
        notes: What was not compared, and why.
    """

    model: str
    rows: tuple[ComparisonRow, ...]
    batches: int
    seeds: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of the tables."""
        return tuple(dict.fromkeys(row.table for row in self.rows))

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int | None = None) -> str:
        """The comparison as an aligned table.

        Args:
            width: The maximal length of a line; 0 for no limit. Default: the width of the terminal.
        """
        width = terminal_width() if width is None else width
        cells = self._cells()
        parts = [self._head(), aligned(cells, width) if len(cells) > 1 else "", *self.notes]
        return "\n\n".join(part for part in parts if part)

    def _repr_html_(self) -> str:
        return html_view(self._head(), self._cells(), self.notes)

    def _head(self) -> str:
        batches = f"{self.batches} batch{'es' * (self.batches != 1)}"
        seeds = f"{len(self.seeds)} seed{'s' * (len(self.seeds) != 1)}"
        return f"{self.model}: gradients beside the native ones, {batches}, {seeds}"

    def _cells(self) -> list[list[str]]:
        heads = [measure.replace("_", " ") for measure in MEASURES]
        lines = [["table", "kind", "name", *heads]]
        for row in self.rows:
            values = [str(getattr(row, measure)) for measure in MEASURES]
            lines.append([row.table, row.kind, row.name, *values])
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain data: dicts, lists, text and numbers. A mean of nothing is None."""

        def plain(statistic: Statistic) -> dict[str, Any]:
            return {k: None if v != v else v for k, v in vars(statistic).items()}

        return {
            "model": self.model,
            "batches": self.batches,
            "seeds": list(self.seeds),
            "notes": list(self.notes),
            "rows": [
                {k: plain(v) if isinstance(v, Statistic) else v for k, v in vars(row).items()}
                for row in self.rows
            ],
        }

    def to_json(self, indent: int | None = None) -> str:
        """The comparison as JSON."""
        return as_json(self.to_dict(), indent)

    def plot(
        self, measure: str = "cosine", kind: str = "parameter", *, ax: Axes | None = None
    ) -> Axes:
        """Draw a measure along the depth of the model: a line for each table, a bar for the spread.

        Args:
            measure: ``"cosine"``, ``"norm_ratio"``, ``"sign_agreement"``, ``"zeroed"`` or ``"nonfinite"``.
            kind: ``"parameter"`` or ``"site"``.
            ax: Where to draw; a new figure by default.

        Returns:
            The axes.

        Raises:
            ValueError: The measure or the kind is unknown.
            ImportError: matplotlib is not installed.
        """
        if measure not in MEASURES:
            raise ValueError(unknown("measure", measure, MEASURES))
        if kind not in ("parameter", "site"):
            raise ValueError(unknown("kind", kind, ("parameter", "site")))
        names = list(dict.fromkeys(row.name for row in self.rows if row.kind == kind))
        if ax is None:
            try:
                pyplot = importlib.import_module("matplotlib.pyplot")
            except ImportError:
                raise ImportError(
                    "plot() needs matplotlib. Install it with `pip install matplotlib`."
                ) from None
            width = min(4.0 + 0.25 * len(names), 16.0)
            _, ax = pyplot.subplots(figsize=(width, 4.5), layout="constrained")
        assert ax is not None
        for number, table in enumerate(self.tables):
            rows = [row for row in self.rows if row.table == table and row.kind == kind]
            found = [getattr(row, measure) for row in rows]
            ax.errorbar(
                [names.index(row.name) for row in rows],
                [statistic.mean for statistic in found],
                yerr=[statistic.std for statistic in found],
                marker="osD^v"[number % len(_COLOURS)],
                color=_COLOURS[number % len(_COLOURS)],
                markersize=4,
                linewidth=1.2,
                capsize=2,
                label=table,
            )
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize="x-small")
        ax.set_ylabel(measure.replace("_", " "))
        ax.set_title(f"{self.model}: gradients beside the native ones")
        ax.grid(axis="y", color="0.9")
        if self.tables:
            ax.legend(fontsize="small")
        return ax


def compare(
    model: nn.Module,
    rules: RulesLike | Sequence[RulesLike | tuple[str, RulesLike]] | None,
    inputs: Any,
    targets: Any = None,
    loss: Loss | None = None,
    *,
    seeds: int | Sequence[int] = 1,
    progress: bool = False,
) -> Comparison:
    """Compare the gradients of one or several tables with the native ones, on the same batches and random numbers.

    Formula: for each parameter and each site, the measures of `ComparisonRow` between ∂loss under the table and the
    native ∂loss, as mean and spread over the batches and seeds.

    The model is not changed: its parameters get no gradient, its buffers and PyTorch's random state are restored. It
    runs in its present mode. A compiled model is compared without the compiler, whose code computes the same.

    Args:
        model: A plain model; or a transformed one, whose own rules are compared, and of which only parameters are.
        rules: The rules, in any form that `use` takes; or a list of them, each alone or as a pair of a name and the
            rules. None for a transformed model.
        inputs: One batch: a tensor, a tuple of positional arguments or a dict of keyword arguments; or a list of
            batches.
        targets: The targets of the loss; for a list of batches a list. None if the loss needs none.
        loss: A function of the output, and of the targets if there are any, to a tensor of one number. By default
            cross-entropy for targets that are whole numbers, the mean squared error for others; without targets the
            output itself if it is one number, or its attribute ``loss``.
        seeds: The number of seeds, or the seeds themselves. For each, every batch is run with each table.
        progress: True for a progress bar on the standard error stream. Needs `tqdm`.

    Returns:
        The comparison.

    Raises:
        TypeError: An argument has the wrong type, or rules are given for a transformed model.
        ValueError: The loss is not one number, or there is no default for it; there are no batches or seeds; or there
            is not one target for each batch.
        ImportError: `progress` is given, and tqdm is not installed.
        RuleError: As for `use`.
        TableError: As for `use`.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> batch, classes = torch.randn(16, 4), torch.randint(3, (16,))
        >>> found = fg.compare(model, ["d(Linear)", {"relu": "fast_sigmoid"}], batch, classes, seeds=2)
        >>> found.tables
        ('d(Linear)', "{'relu': 'fast_sigmoid'}")
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be an nn.Module, got {type(model).__name__}")
    inner = compiled_model(model)
    model = model if inner is None else inner
    tables = _tables(model, rules)
    batches = inputs if isinstance(inputs, list) else [inputs]
    wanted = (
        targets if isinstance(inputs, list) and targets is not None else [targets] * len(batches)
    )
    if not batches:
        raise ValueError("inputs is an empty list; give at least one batch")
    if len(wanted) != len(batches):
        raise ValueError(
            f"there are {len(batches)} batches and {len(wanted)} targets; give one target for each batch"
        )
    if loss is not None and not callable(loss):
        raise TypeError(f"loss has to be a function of the output and the targets, got {loss!r}")
    numbers = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not numbers or not all(isinstance(seed, int) for seed in numbers):
        raise ValueError(f"seeds has to be a number from 1, or the seeds themselves, got {seeds!r}")
    runs = [
        (batch, target, seed)
        for batch, target in zip(batches, wanted, strict=True)
        for seed in numbers
    ]
    found: dict[tuple[str, str, str], list[tuple[float, ...]]] = {}
    order: dict[tuple[str, str], None] = {
        ("parameter", name): None for name, p in model.named_parameters() if p.requires_grad
    }
    for batch, target, seed in shown(runs, progress, "compare"):
        sites = _sites(model, tables, batch, seed)
        order.update(dict.fromkeys(map(_key, sites)))

        def gradients(
            table: RuleTable | None,
            *,
            batch: Any = batch,
            target: Any = target,
            seed: int = seed,
            sites: list[Site] = sites,
        ) -> dict[_Key, Tensor]:
            at_sites: dict[_Key, list[Tensor]] = {}
            entries = [*(table or ()), *(_observed(site, at_sites) for site in sites)]
            block = use(RuleTable(entries), model=model) if entries else nullcontext()
            return _gradients(model, batch, target, loss, seed, block, at_sites)

        with native():  # and outside of the blocks around
            reference = gradients(None)
        for name, table in tables:
            with nullcontext() if table is None else native():
                under_table = gradients(table)
            for key in reference | under_table:
                order.setdefault(key)
                value = reference.get(key, torch.zeros_like(under_table.get(key, _NONE)))
                # What gets no gradient has one of zero
                other = under_table.get(key, torch.zeros_like(value))
                found.setdefault((name, *key), []).append(_measured(value, other))
    rows = [
        ComparisonRow(name, *key, *map(Statistic.of, zip(*found[name, *key], strict=True)))
        for name, _ in tables
        for key in order
        if (name, *key) in found
    ]
    notes: tuple[str, ...] = ()
    if rules is None:
        notes = (
            "The sites of a transformed model are not compared. Give the original and its rules.",
        )
    return Comparison(type(model).__name__, tuple(rows), len(batches), numbers, notes)


def _tables(model: nn.Module, rules: Any) -> list[tuple[str, RuleTable | None]]:
    """The tables, each with its name; None in the place of one that a transformed model has."""
    transformed = any(isinstance(module, CapturedModule) for module in model.modules())
    if transformed:
        if rules is not None:
            raise TypeError(
                "rules are given for a model that is transformed already, and has its own. Give None, or the original "
                "model."
            )
        return [("its rules", None)]
    if rules is None:
        raise TypeError(
            "rules is None, which is for a transformed model; give the rules to compare"
        )
    given = rules if isinstance(rules, list) else [rules]
    named = [
        pair if isinstance(pair, tuple) and len(pair) == 2 else (_name(pair), pair)
        for pair in given
    ]
    names = [name for name, _ in named]
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"the name of a table has to be text, got {name!r}")
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"two tables have the name {twice!r}. Give pairs of a name and the rules: [('first', ...), ('second', ...)]"
        )
    return [(name, RuleTable.of(table)) for name, table in named]


def _name(rules: Any) -> str:
    text = rules if isinstance(rules, str) else repr(rules)
    return (
        " ".join(text.split())
        if len(text) <= 50
        else f"a table, {len(RuleTable.of(rules))} entries"
    )


# --- one run ---

_Key: TypeAlias = tuple[str, str]
_NONE = torch.empty(0)


def _sites(
    model: nn.Module, tables: list[tuple[str, RuleTable | None]], batch: Any, seed: int
) -> list[Site]:
    """The sites of operations that the tables see, one for each operation, in the order of execution."""
    found: dict[tuple[str, str, int], Site] = {}
    for _, table in tables:
        if table is not None:
            with (
                torch.no_grad(),
                restored(model, seed),
                native(),
                use(table, model=model) as block,
            ):
                called(model, batch)
            for decision in report(block).decisions:
                site = decision.site
                if site.kind == "operation" and site.op in OPS:
                    found.setdefault((site.path, site.op, site.call), site)
    return list(found.values())


def _key(site: Site) -> _Key:
    return "site", replace(site, at=REPLACE).name


def _observed(site: Site, found: dict[_Key, list[Tensor]]) -> Entry:
    """An entry that notes the gradient that the operation of a site gives its first operand."""
    here = (site.path, site.op, site.call)
    key = _key(site)

    def observe(grad: Tensor) -> Tensor:
        found.setdefault(key, []).append(grad.detach().flatten())
        return grad

    rule = Rule.of(Declaration("observe", observe, (), {}))
    selection = on(
        site.op,
        at=OPS[site.op].operands[0],
        where=lambda other: (other.path, other.op, other.call) == here,
    )
    return Entry(selection.sites, (rule,))


def _gradients(
    model: nn.Module,
    batch: Any,
    target: Any,
    loss: Loss | None,
    seed: int,
    block: AbstractContextManager[Any],
    found: Mapping[_Key, list[Tensor]],
) -> dict[_Key, Tensor]:
    """The gradients of parameters and of the sites that `found` is filled with, flattened."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.enable_grad(), restored(model, seed):
        with block:
            value = _loss(called(model, batch), target, loss)
        gradients: tuple[Tensor | None, ...] = (None,) * len(named)
        if value.requires_grad and named:
            gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    of_parameters = {
        ("parameter", name): gradient.detach().to_dense().flatten()
        for name, gradient in zip(named, gradients, strict=True)
        if gradient is not None
    }
    return of_parameters | {key: torch.cat(parts) for key, parts in found.items()}


def _loss(output: Any, target: Any, loss: Loss | None) -> Tensor:
    value: Any
    if loss is not None:
        value = loss(output) if target is None else loss(output, target)
    elif target is None:
        value = getattr(output, "loss", output)
    elif isinstance(output, Tensor) and isinstance(target, Tensor):
        whole = not target.is_floating_point()
        value = (functional.cross_entropy if whole else functional.mse_loss)(output, target)
    else:
        value = None
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
        what = "the loss returned" if loss is not None else "without loss=, the loss is"
        raise ValueError(
            f"{what} {got!r}; it has to be a tensor of one number. Give a function of the output"
            f"{' and the targets' * (target is not None)}: loss=lambda output"
            f"{', targets' * (target is not None)}: ..."
        )
    return value.sum()


def _measured(reference: Tensor, found: Tensor) -> tuple[float, ...]:
    """The measures, in the order of `MEASURES`."""
    g, r = reference.double(), found.double()
    if not g.numel():
        return (math.nan,) * len(MEASURES)
    norm, other = float(g.norm()), float(r.norm())
    product = norm * other
    cosine = float(g @ r) / product if product else math.nan
    nonzero = g != 0
    zeroed = float((r[nonzero] == 0).double().mean()) if bool(nonzero.any()) else math.nan
    return (
        cosine,
        other / norm if norm else math.nan,
        float((g.sign() == r.sign()).double().mean()),
        zeroed,
        float((~r.isfinite()).double().mean()),
    )
