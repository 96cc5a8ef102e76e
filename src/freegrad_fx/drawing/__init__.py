"""`draw`: a picture of a transformed model, with the sites of rules marked. It needs no other package."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..capture.captured import CapturedModule
from ..errors import unknown
from ..plan import Plan
from ..plan.lookup import layers_of, report
from .rows import Row, folded, rows_of_graph, rows_of_plan
from .svg import THEMES, svg_of

__all__ = ["Drawing", "draw"]

_READABLE = 48
"""How many rows a picture has at most, if modules can be folded."""


@dataclass(frozen=True)
class Drawing:
    """A picture of a model. A notebook shows it.

    Attributes:
        svg: The picture, as the text of an SVG file.
    """

    svg: str

    def __repr__(self) -> str:
        return f"Drawing({len(self.svg)} characters of SVG)"

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, file: str | PathLike[str]) -> None:
        """Write the picture.

        Args:
            file: The path, which ends in ``.svg``.

        Raises:
            ValueError: The path has another ending.
            OSError: The file cannot be written.
        """
        if Path(file).suffix.lower() != ".svg":
            raise ValueError(
                f"draw() writes SVG, and {str(file)!r} ends otherwise. Give a name that ends in .svg; a browser and "
                f"programs such as Inkscape convert it."
            )
        Path(file).write_text(self.svg, encoding="utf-8")


def draw(
    model: Any,
    file: str | PathLike[str] | None = None,
    *,
    depth: int | None = None,
    theme: str = "auto",
) -> Drawing:
    """Draw a model as a column of its operations, with the rules that act at them.

    An operation with a rule, and a parameter with one, has the colour of the rule, and the rule beside it. Arrows show
    which results an operation reads. Of a compiled model, a block and a plan, only the sites with rules are drawn, and
    no arrows, because they have no single graph.

    Args:
        model: The result of `transform`; a compiled model or a `backend`, after its first call; a `use` block, after it
            ran; or a plan of `explain` or `report`.
        file: Where the picture is written, a path that ends in ``.svg``; None for nowhere.
        depth: Modules whose path has this number of parts are one box each: 1 for ``layer1``, 2 for ``layer1.0``. 0
            draws every operation. By default, a large model is folded as little as a readable picture allows.
        theme: ``"light"``, ``"dark"``, or ``"auto"``, which follows the browser.

    Returns:
        The picture.

    Raises:
        TypeError: `model` is a plain model, or nothing of the above.
        ValueError: `depth` is negative, `theme` is unknown, or `file` has another ending.
        PlanError: `model` is compiled, and has not been called yet.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> gm = fg.transform(torch.nn.Sequential(torch.nn.ReLU()), "guided")
        >>> fg.draw(gm).svg.startswith("<svg")
        True
    """
    if theme not in THEMES:
        raise ValueError(unknown("theme", theme, THEMES))
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 0):
        raise ValueError(f"depth has to be a whole number from 0, got {depth!r}")
    plan, graph = _plan(model)
    every = rows_of_plan(plan) if graph is None else rows_of_graph(graph, plan)
    rows, level = _readable(every, depth)
    notes = [] if level is None else [f"Folded: depth={level}. depth=0 shows every operation."]
    if graph is None:
        notes.append("The sites with rules, in execution order.")
    elif len(graph.variants) > 1:
        notes.append(f"The graph in {'train' if graph.training else 'eval'} mode.")
    drawing = Drawing(svg_of(rows, _title(plan, rows), notes, theme, arrows=graph is not None))
    if file is not None:
        drawing.save(file)
    return drawing


def _plan(model: Any) -> tuple[Plan, CapturedModule | None]:
    """The plan of a model, and its graph if it has a single one."""
    if isinstance(model, Plan):
        return model, None
    try:
        plan = report(model)
    except TypeError as error:
        raise TypeError(
            f"draw() takes a transformed or compiled model, a block or a plan, got {type(model).__name__}. Transform "
            f"the model first: draw(transform(model, rules)). Without a transform: draw(explain(model, rules))."
        ) from error
    graphs = [layer for layer in layers_of(model) if isinstance(layer, CapturedModule)]
    return plan, graphs[-1] if graphs else None


def _title(plan: Plan, rows: list[Row]) -> str:
    decisions = [decision for row in rows for decision in row.decisions]
    ambient = sum(decision.action == "ambient" for decision in decisions)
    given = len(decisions) - ambient
    counts = [f"{given} site{'s' * (given != 1)} with a rule"] if given or not ambient else []
    counts += [f"{ambient} ambient site{'s' * (ambient != 1)}"] if ambient else []
    return f"{plan.model}: {', '.join(counts)}"


def _readable(rows: list[Row], depth: int | None) -> tuple[list[Row], int | None]:
    """The rows, folded, and the depth; None if nothing is folded."""
    if depth == 0 or (depth is None and len(rows) <= _READABLE):
        return rows, None
    deepest = max((row.path.count(".") + 1 for row in rows), default=1)
    levels = range(deepest, 0, -1) if depth is None else [depth]
    found = rows
    for level in levels:
        found = folded(rows, level)
        if len(found) <= _READABLE:
            break
    return (found, level) if len(found) < len(rows) else (rows, None)
