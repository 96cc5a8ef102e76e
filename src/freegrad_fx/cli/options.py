"""Options and arguments that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from ..table.listing import list_rules

__all__ = [
    "Imports",
    "Inputs",
    "Json",
    "Meta",
    "ModelName",
    "Param",
    "RuleName",
    "Strict",
    "Table",
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Param = Annotated[
    list[str] | None,
    typer.Option(
        "--param", "-p", metavar="NAME=VALUE", help="A parameter of the rule; several times."
    ),
]
Imports = Annotated[
    bool,
    typer.Option("--allow-imports", help="Import the rules and functions that the file names."),
]


def _names(incomplete: str) -> list[str]:
    """The rules for the completion of the shell."""
    return [name for name in list_rules() if name.startswith(incomplete)]


RuleName = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A rule, or package.module:name.", autocompletion=_names),
]

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, hf:CONFIG.json or package.module:NAME; built without weights.",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="[NAME=][int:]SHAPE",
        help="An example input, such as 1,3,224,224 or input_ids=int:1,16; several times. "
        "With it, `explain` and `draw` capture the model by torch.export.",
    ),
]
Table = Annotated[
    str | None,
    typer.Option(
        "--rules",
        "-r",
        metavar="FILE|NAME",
        help="A table: a file, or a name of `tables`; or a rule for all activations.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if an entry or a rule has no effect.")]
Meta = Annotated[
    bool, typer.Option("--meta", help="Build the model without memory for its weights.")
]
