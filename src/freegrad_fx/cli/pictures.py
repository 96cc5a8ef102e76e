"""The commands that draw."""

from __future__ import annotations

from typing import Annotated

import typer

from .models import captured, read_entry, read_table, rule_of
from .options import Imports, Inputs, Meta, ModelName, Param, RuleName, Strict, Table
from .output import UserError, file_error, print_text

__all__ = ["draw", "plot"]


def plot(
    name: RuleName,
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FILE", help="The picture: .png, .svg, .pdf."),
    ],
    param: Param = None,
    op: Annotated[
        str | None, typer.Option(help="The operation that the rule is drawn for.")
    ] = None,
    low: Annotated[float, typer.Option(help="The smallest x.")] = -3.0,
    high: Annotated[float, typer.Option(help="The largest x.")] = 3.0,
) -> None:
    """Draw what a rule does to the gradient of an operation."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("plot needs matplotlib: pip install matplotlib") from None
    from ..plot import plot_rule

    entry = read_entry(name, param or ())
    figure = Figure(figsize=(4.0, 3.0), layout="constrained")
    replaced = entry.forward if isinstance(entry.forward, str) else None
    plot_rule(rule_of(entry), op or replaced, low=low, high=high, ax=figure.subplots())
    try:
        figure.savefig(output, dpi=150)
    except OSError as error:
        raise file_error(output, "written", error) from error
    except ValueError as error:  # of an ending that matplotlib does not write
        raise UserError(f"{output} cannot be written: {error}") from error
    print_text(f"wrote {output}")


def draw(
    model: ModelName,
    table: Table,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The picture: .svg.")
    ],
    param: Param = None,
    inputs: Inputs = None,
    depth: Annotated[
        int | None,
        typer.Option(min=0, help="Draw the modules at this depth as one box each; 0 for none."),
    ] = None,
    theme: Annotated[str, typer.Option(help="light, dark, or auto.")] = "auto",
    strict: Strict = False,
    meta: Meta = False,
    allow_imports: Imports = False,
) -> None:
    """Draw a model as a column of its operations, with the rules that act at them."""
    from ..drawing import draw as draw_model
    from ..pipeline import transform

    rules = read_table(table, param or (), allow_imports)
    transformed = captured(transform, model, rules, inputs, strict=strict, meta=meta)
    try:
        draw_model(transformed, output, depth=depth, theme=theme)
    except OSError as error:
        raise file_error(output, "written", error) from error
    except ValueError as error:  # of the ending, or of the theme
        raise UserError(str(error)) from error
    print_text(f"wrote {output}")
