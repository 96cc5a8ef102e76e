"""The commands of ``freegrad-fx``."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from .. import tables
from .._torch.tree import leaves
from ..core.info import RuleInfo
from ..core.rule import get
from ..core.text import shown
from ..errors import unknown
from ..table import RuleTable
from ..table.listing import list_rules
from ..vocabulary.activations import FORWARDS, GROUPS, OPS
from .check import check_table
from .demo import demo
from .doctor import as_rows, examine, version_of
from .models import (
    captured,
    model_of,
    read_entry,
    read_inputs,
    read_table,
    ready_table,
    rule_of,
)
from .options import Imports, Inputs, Json, Meta, ModelName, Param, RuleName, Strict, Table
from .output import Commands, UserError, print_json, print_rows, print_text, reported
from .pictures import draw, plot

__all__ = ["app"]

app = typer.Typer(
    cls=Commands,
    name="freegrad-fx",
    no_args_is_help=True,
    # a traceback that remains is for a bug report, where plain text is best
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
rules = typer.Typer(help="List the rules, or show one.")
app.add_typer(rules, name="rules")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"freegrad_fx {version_of('freegrad_fx')}, torch {torch.__version__}")
        raise typer.Exit


@app.callback()
def options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of an error.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Decoupled backward passes for PyTorch models: rules, tables, and what they do to a model.

    Exit codes: 0; 1 for an error, which is printed as one line; 2 for a wrong command or option.
    """


# --- rules and operations ---


@rules.callback(invoke_without_command=True)
def list_the_rules(
    context: typer.Context,
    family: Annotated[str | None, typer.Option(help="Only this family, such as surrogate.")] = None,
    op: Annotated[
        str | None,
        typer.Option(help="Only rules for this operation or group; params for parameters."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the rules, or show one."""
    if context.invoked_subcommand is not None:
        return
    infos = [get(name).info for name in list_rules(family, op)]
    if as_json:
        print_json([_info(info) for info in infos])
        return
    rows = [("rule", "family", "gradient of x", "parameters")]
    for info in infos:
        given = ", ".join(f"{name}={shown(p.value)}" for name, p in info.parameters.items())
        rows.append((info.name, info.family, info.formula, given))
    print_rows(rows)


@rules.command("show")
def show_a_rule(name: RuleName, as_json: Json = False) -> None:
    """Show a rule: its formula, parameters with their ranges, what it saves, its source, its names elsewhere."""
    info = rule_of(read_entry(name, ())).info
    if as_json:
        print_json(_info(info))
    else:
        print_text(str(info))


def _info(info: RuleInfo) -> dict[str, Any]:
    parameters = {
        name: {"value": p.value, "types": p.types, "range": p.range}
        for name, p in info.parameters.items()
    }
    return {**vars(info), "parameters": parameters, "saved_bytes": info.saved_bytes()}


@app.command()
def ops(
    group: Annotated[str | None, typer.Option(help="Only the operations of this group.")] = None,
    as_json: Json = False,
) -> None:
    """List the operations that rules can be given to, and how PyTorch calls them."""
    if group is not None and group not in GROUPS:
        raise UserError(unknown("group", group, GROUPS))
    found = [
        {
            "op": op.name,
            "groups": sorted(op.groups),
            "modules": [f"nn.{kind.__name__}" for kind in op.modules],
            "functions": _public(function.__name__ for function in op.functions),
            "methods": list(op.methods),
            "operands": list(op.operands),
            "elementwise": op.elementwise,
            "replaces_forwards": op.name in FORWARDS,
            "only_if_named": not op.groups,
        }
        for op in OPS.values()
        if group is None or group in op.groups
    ]
    if as_json:
        print_json(found)
        return
    columns = ("op", "groups", "modules", "functions", "operands")
    texts = [[", ".join(_listed(line[column])) for column in columns] for line in found]
    print_rows([columns, *texts])


def _public(names: Iterable[str]) -> list[str]:
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


# --- models and tables ---


@app.command()
def explain(
    model: ModelName,
    table: Table = None,
    param: Param = None,
    inputs: Inputs = None,
    strict: Strict = False,
    meta: Meta = False,
    allow_imports: Imports = False,
    as_json: Json = False,
) -> None:
    """Show which sites of a model get which backward; without rules, the sites of the model."""
    # imported here, because the other commands do not need the capture
    from ..pipeline import explain as explain_model

    rules = read_table(table, param or (), allow_imports)
    plan = captured(explain_model, model, rules, inputs, strict=strict, meta=meta)
    if as_json:
        print_json(plan.to_dict())
    else:
        print_text(str(plan))


@app.command()
def compare(
    model: ModelName,
    table: Annotated[
        list[str],
        typer.Option(
            "--rules",
            "-r",
            metavar="FILE|NAME",
            help="A table: a file, or a name of `tables`; or a rule for all activations; several times.",
        ),
    ],
    inputs: Inputs = None,
    batches: Annotated[int, typer.Option(min=1, help="The number of random batches.")] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="The number of seeds for each batch.")] = 1,
    allow_imports: Imports = False,
    as_json: Json = False,
) -> None:
    """Compare the gradients of a model under tables with its native ones.

    The inputs are random, the weights those of the construction, and the loss is the mean of the squared outputs.
    """
    from ..compared import compare as compare_gradients

    if not inputs:
        raise typer.BadParameter("compare runs the model: give its inputs", param_hint="--input")
    rules = [(name, RuleTable.of(read_table(name, (), allow_imports))) for name in table]
    torch.manual_seed(0)
    built = model_of(model)
    drawn = [read_inputs(inputs) for _ in range(batches)]
    with reported(f"{model} cannot be compared"):
        found = compare_gradients(built, rules, drawn, loss=_mean_square, seeds=seeds)
    if as_json:
        print_json(found.to_dict())
    else:
        print_text(str(found))


@app.command()
def memory(
    model: ModelName,
    table: Annotated[
        str | None,
        typer.Option(
            "--rules",
            "-r",
            metavar="FILE|NAME",
            help="A table: a file, or a name of `tables`; or a rule for all activations.",
        ),
    ] = None,
    inputs: Inputs = None,
    evaluation: Annotated[
        bool, typer.Option("--eval", help="In evaluation mode; the default is train mode.")
    ] = False,
    allow_imports: Imports = False,
    as_json: Json = False,
) -> None:
    """Count the bytes that a forward of a model keeps for its backward, natively and with a table.

    The inputs are random, the weights those of the construction.
    """
    from ..counted import memory as count
    from ..eager import use

    if not inputs:
        raise typer.BadParameter("memory runs the model: give its inputs", param_hint="--input")
    rules = read_table(table, (), allow_imports)
    torch.manual_seed(0)
    built = model_of(model).train(not evaluation)
    given = read_inputs(inputs)
    positional = given if isinstance(given, tuple) else ()
    keywords = given if isinstance(given, dict) else {}
    with reported(f"what {model} keeps cannot be counted"):
        block = contextlib.nullcontext() if rules is None else use(rules, model=built)
        with block:
            found = count(built, *positional, **keywords)
    if as_json:
        print_json(found.to_dict())
    else:
        print_text(str(found))


def _mean_square(output: Any) -> Tensor:
    """A loss for any model: of all numbers in its output."""
    found = [leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not found:
        raise UserError("the output of the model does not depend on its parameters")
    return torch.stack([leaf.float().square().mean() for leaf in found]).sum()


@app.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A table in TOML.")],
    allow_imports: Imports = False,
    as_json: Json = False,
) -> None:
    """Check a table, without a model. All faults are listed, each with its line."""
    table, lines, faults = check_table(file, allow_imports)
    entries = [
        {
            "line": line,
            "sites": entry.selector,
            "backward": "native" if entry.rules is None else " → ".join(map(repr, entry.rules)),
            "forward": "" if entry.forward is None else shown(entry.forward),
        }
        for line, entry in zip(lines, table.entries, strict=True)
    ]
    if as_json:
        print_json({"file": file, "entries": entries, "faults": [vars(fault) for fault in faults]})
    elif faults:
        for fault in faults:
            place = f"{file}:{fault.line}" if fault.line else file
            print_text(f"{place}: {fault.text}")
    else:
        print_text(f"{file} is valid.")
        columns = ("line", "sites", "backward", "forward")
        print_rows([columns, *([str(entry[name] or "") for name in columns] for entry in entries)])
    if faults:
        raise typer.Exit(1)


@app.command(name="tables")
def ready(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one.")] = None,
    as_json: Json = False,
) -> None:
    """List the ready tables, or print one as TOML, to be saved and changed."""
    if name is not None:
        table = ready_table(name)
        if as_json:
            print_json(table.to_dict())
        else:
            typer.echo(table.to_toml(), nl=False)
        return
    found = [
        {
            "table": name,
            "entries": len(ready_table(name)),
            "what": (inspect.getdoc(getattr(tables, name)) or "").partition("\n")[0],
        }
        for name in tables.__all__
    ]
    if as_json:
        print_json(found)
    else:
        print_rows([("table", "entries", "what"), *(tuple(map(str, t.values())) for t in found)])


# --- pictures, and the package at work ---

app.command()(plot)
app.command()(draw)
app.command()(demo)


# --- the installation ---


@app.command()
def build(
    force: Annotated[bool, typer.Option("--force", help="Build it again if it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Build the C++ extension for this PyTorch and Python, which makes rules on small tensors faster."""
    from ..extension import build as build_extension

    found = build_extension(force=force)
    if as_json:
        print_json({"active": found.active, "reason": found.reason, "library": str(found.library)})
    else:
        print_text(f"The C++ extension is {found}.")
    if not found.active:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, what is available on this machine, and the releases that were tested; for bug reports."""
    found = examine()
    if as_json:
        print_json(found)
    else:
        print_rows(as_rows(found))
