"""The model, the inputs and the rules that arguments of the command line stand for."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from .. import tables
from ..core.contract import NATIVE
from ..core.rule import Rule, available, get
from ..errors import CaptureError, TableError, unknown
from ..table import Entry, RuleTable
from ..table.data import load_table
from .output import UserError, file_error, in_a_line, reported

__all__ = [
    "captured",
    "find_modules_here",
    "model_of",
    "read_entry",
    "read_inputs",
    "read_table",
    "ready_table",
    "rule_of",
]

FORMS = (
    "A model is torchvision:NAME, timm:NAME, hf:CONFIG.json, or package.module:NAME of a module or of a function "
    "without arguments that returns one"
)


def model_of(given: str) -> nn.Module:
    """Build the model that an argument names. No weights are loaded.

    Args:
        given: The argument.

    Raises:
        UserError: The argument has another form, a package is missing, or the model cannot be built.
    """
    from ..capture import check_model

    source, colon, name = given.partition(":")
    if not colon or not source or not name:
        raise UserError(f"{given!r} names no model. {FORMS}.")
    with reported(f"{given} cannot be built"):
        model = _SOURCES[source](name) if source in _SOURCES else _imported(source, name)
        if not isinstance(model, nn.Module):
            raise UserError(f"{given} is not a model but of type {type(model).__name__}. {FORMS}.")
        check_model(model)
        return model


def _package(name: str, remedy: str) -> Any:
    """Import a package that the user has to install."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise UserError(f"{name} cannot be imported: {in_a_line(error)}.") from error
        raise UserError(f"{name} is not installed: {remedy}") from error
    except Exception as error:
        raise UserError(
            f"{name} is installed but does not load: {in_a_line(error)}. Its compiled parts may belong to another "
            f"build of PyTorch than the installed {torch.__version__}: install torch and torchvision from the same "
            f"index, in versions that belong together."
        ) from error


def _of_torchvision(name: str) -> Any:
    models = _package("torchvision", "pip install 'freegrad_fx[vision]'").models
    names = models.list_models()
    if name not in names:
        raise UserError(
            unknown(
                "model of torchvision", name, names, everything="torchvision.models.list_models()"
            )
        )
    build = models.get_model_builder(name)
    # else a detection or segmentation model downloads the weights of its backbone
    backbone = "weights_backbone" in inspect.signature(build).parameters
    return build(weights=None, **({"weights_backbone": None} if backbone else {}))


def _of_timm(name: str) -> Any:
    timm = _package("timm", "pip install timm")
    if not timm.is_model(name):
        raise UserError(
            unknown("model of timm", name, timm.list_models(), everything="timm.list_models()")
        )
    return timm.create_model(name, pretrained=False)


def _of_transformers(name: str) -> Any:
    if not Path(name).exists():
        raise UserError(
            f"{name} is neither a file nor a folder. hf: takes the path of a config.json, or of a folder with one; "
            f"nothing is downloaded."
        )
    file = Path(name, "config.json") if Path(name).is_dir() else Path(name)
    try:
        values = json.loads(file.read_text("utf-8"))
        kind = values["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not the config of a transformers model: {in_a_line(error)}."
        ) from error
    transformers = _package("transformers", "pip install transformers")
    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            unknown(
                "model_type",
                kind,
                transformers.CONFIG_MAPPING,
                everything="list(transformers.CONFIG_MAPPING)",
            )
        )
    config = transformers.CONFIG_MAPPING[kind].from_dict(values)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # torch.export does not take the class of the cache
    made = getattr(transformers, next(iter(values.get("architectures") or ()), ""), None)
    return made(config) if made else transformers.AutoModel.from_config(config)


_SOURCES: Mapping[str, Callable[[str], Any]] = {
    "torchvision": _of_torchvision,
    "timm": _of_timm,
    "hf": _of_transformers,
}


def _imported(module: str, name: str) -> Any:
    """An object of a module, which may be in the current folder; the result, if it is to be called."""
    find_modules_here()
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"there is no module {error.name!r}. {FORMS}.") from error
    path = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = _public(found)
            raise UserError(unknown(f"name in {path}:", part, names, everything=f"dir({path})"))
        found, path = getattr(found, part), f"{path}.{part}"
    return found if isinstance(found, nn.Module) or not callable(found) else found()


def _public(thing: Any) -> list[str]:
    return [name for name in vars(thing) if not name.startswith("_")]


def find_modules_here() -> None:
    """Let imports find modules in the current folder, as ``python -m`` does."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


# --- inputs ---

_TYPES = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}


def read_inputs(given: Sequence[str]) -> tuple[Tensor, ...] | dict[str, Tensor] | None:
    """Make example inputs.

    Args:
        given: The options, each ``1,3,224,224`` or ``int:1,16``, and all or none of them after a name and ``=``.

    Returns:
        A tuple; a dict for inputs with names; None for no options.

    Raises:
        typer.BadParameter: An option has another form.
    """
    found = [_read_input(text) for text in given]
    names = [name for name, _ in found]
    if not any(names):
        return tuple(tensor for _, tensor in found) or None
    if not all(names) or len({*names}) < len(names):
        raise typer.BadParameter(
            "give every input a name of its own, or none of them a name", param_hint="--input"
        )
    return dict(found)


def _read_input(text: str) -> tuple[str, Tensor]:
    name, _, value = text.rpartition("=")
    kind, _, sizes = value.rpartition(":")
    try:
        shape = [int(size) for size in sizes.split(",")]
        dtype = _TYPES[kind or "float"]
        if min(shape) < 0 or (name and not name.isidentifier()):
            raise ValueError
    except (KeyError, ValueError):
        raise typer.BadParameter(
            f"{text!r} is not a shape such as 1,3,224,224. int: or bool: before it gives another type than float, and "
            f"a name before that makes it a keyword argument: input_ids=int:1,16",
            param_hint="--input",
        ) from None
    # Ones are valid ids, and a mask that hides nothing
    return name, torch.randn(shape) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)


def captured(
    function: Callable[..., Any],
    model: str,
    rules: Any,
    inputs: Sequence[str] | None,
    *,
    strict: bool,
    meta: bool,
) -> Any:
    """Build a model and give it to a function that captures it, `transform` or `explain`; return its result.

    Args:
        function: The function.
        model: As for `model_of`.
        rules: The rules.
        inputs: As for `read_inputs`; None for none.
        strict: As for the function.
        meta: Whether the tensors have no memory.

    Raises:
        UserError: The model cannot be captured without example inputs; the message names the option for them.
    """
    with torch.device("meta") if meta else contextlib.nullcontext():
        built = model_of(model)
        examples = read_inputs(inputs or ())
        try:
            return function(built, rules, strict=strict, example_inputs=examples)
        except CaptureError as error:
            if examples is not None:
                raise
            raise UserError(
                f"{error} On the command line, --input gives example inputs."
            ) from error


# --- rules ---


def read_table(
    given: str | None, parameters: Sequence[str], allow_imports: bool = False
) -> RuleTable | None:
    """Read the rules: a file with a table, a ready table, or a rule for all activations.

    Args:
        given: The path of the file, or the name of a ready table or of a rule.
        parameters: Values for parameters of the rule, each ``a=-1.0``.
        allow_imports: Whether the file may name objects that are to be imported.

    Raises:
        UserError: The file cannot be read, or the rule is not valid.
        TableError: The table is not valid.
        RuleError: The rule is unknown.
        typer.BadParameter: Values are given for a file, or have another form.
    """
    if given is None:
        if parameters:
            raise typer.BadParameter("there is no rule in --rules for it", param_hint="--param")
        return None
    if given in tables.__all__ and not parameters:
        return ready_table(given)
    if not _is_file(given):
        return RuleTable([read_entry(given, parameters)])
    if parameters:
        raise typer.BadParameter(
            f"a table has its own parameters: write them into {given}", param_hint="--param"
        )
    find_modules_here()
    try:
        return RuleTable.from_toml(Path(given), allow_imports=allow_imports)
    except OSError as error:
        raise file_error(given, "read", error) from error


def ready_table(name: str) -> RuleTable:
    """Make a ready table.

    Args:
        name: The name of its function in `tables`.

    Raises:
        UserError: There is no such table.
    """
    if name not in tables.__all__:
        raise UserError(unknown("ready table", name, tables.__all__))
    made: RuleTable = getattr(tables, name)()
    return made


def _is_file(given: str) -> bool:
    """Whether rules are the path of a file: one that exists, or text that can be no rule."""
    if given in (*available(), NATIVE):
        return False
    return Path(given).is_file() or (":" not in given and bool({"/", "\\", "."} & {*given}))


def read_entry(name: str, parameters: Sequence[str]) -> Entry:
    """Make a rule from its name and values for its parameters, as the entry of a table for all activations.

    Args:
        name: A registered name, or ``package.module:name``.
        parameters: The values, each ``a=-1.0``, with the value in the notation of TOML.

    Raises:
        RuleError: The rule is unknown.
        UserError: It cannot be imported, a parameter is unknown, or a value is not valid.
        typer.BadParameter: A value has another form.
    """
    values = dict(_read_parameter(text) for text in parameters)
    entry = {"backward": name, **({"params": values} if values else {})}
    if ":" in name:
        find_modules_here()
    elif name != NATIVE:
        get(name)  # raises, for an unknown name, without naming the place in a table
    try:
        (loaded,) = load_table({"rule": [entry]}, allow_imports=True)
    except TableError as error:
        # without the number of the entry, which the user did not write
        raise UserError(str(error.__cause__ or error)) from error
    return loaded


def rule_of(entry: Entry) -> Rule:
    """The rule of an entry that was made from a name.

    Raises:
        UserError: The name is ``native``.
    """
    if not entry.rules:
        raise UserError(
            "native is not a rule but the backward of PyTorch, which is not described here"
        )
    return entry.rules[0]


def _read_parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(
            f"{text!r} is not a name and a value, such as a=-1.0", param_hint="--param"
        )
    try:
        return name, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return name, value
