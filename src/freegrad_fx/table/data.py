"""Tables to and from plain data, the content of a table file. Independent of the file format.

{"version": 1, "rule": [{"op": "relu", "backward": "rectangular", "params": {"a": -1.0, "b": 1.0}}]}
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

from torch import Tensor

from .. import quantizers
from ..core.contract import NATIVE, OPTIONS
from ..core.own import Own
from ..core.parameter import Parameter
from ..core.rule import Forward, Rule, RuleLike, available, compose, get
from ..errors import PlanError, RuleError, TableError, unknown
from ..vocabulary.forwards import BoundForward, forward
from .entry import Entry, on
from .fields import brief, call_text

__all__ = ["dump_table", "load_table"]

VERSION = 1

_QUANTIZERS = "quantizers."
"""How a name in a table file begins that names a function of `freegrad_fx.quantizers`."""

_SELECTING = ("op", "module", "type", "parameter", "call", "at", "first", "last")
_FIELDS = (*_SELECTING, "optional", "forward", "backward", "params")


# --- reading ---


def load_table(
    data: Any, allow_imports: bool, place: Callable[[int], str] = "entry {}".format
) -> list[Entry]:
    """Read the entries of a table.

    Args:
        data: The table.
        allow_imports: Whether objects named ``package.module:name`` may be imported.
        place: Maps the number of an entry, counted from 1, to its name in error messages.

    Raises:
        TableError: `data` is not a valid table; the message names the invalid entry and the reason.
    """
    if not isinstance(data, Mapping):
        raise TableError(f"a table has to be a dict, got {brief(data)}")
    _refuse_unknown("key", data, ("version", "reaches", "rule"))
    version = data.get("version", VERSION)
    if type(version) is not int or version != VERSION:
        raise TableError(f"this release reads tables of version {VERSION}, got {brief(version)}")
    given = data.get("rule", [])
    if not isinstance(given, list | tuple):
        raise TableError(
            f"rule has to be a list of entries, in TOML each below [[rule]], got {brief(given)}"
        )
    entries = []
    for number, entry in enumerate(given, start=1):
        try:
            entries.append(_load_entry(entry, allow_imports))
        except (PlanError, RuleError, TypeError) as error:
            raise TableError(f"{place(number)}: {error}") from error
    return entries


def _refuse_unknown(kind: str, data: Mapping[Any, Any], valid: Iterable[str]) -> None:
    for key in data:
        if key not in valid:
            raise TableError(unknown(kind, key, valid))


def _load_entry(data: Any, allow_imports: bool) -> Entry:
    if not isinstance(data, Mapping):
        raise TableError(f"an entry has to be a table of fields, got {brief(data)}")
    _refuse_unknown("field", data, _FIELDS)
    fields = {name: data[name] for name in (*_SELECTING, "optional") if name in data}
    if "call" in fields:
        calls = fields["call"]
        fields["call"] = [*map(_load_call, calls)] if isinstance(calls, list) else _load_call(calls)
    if "backward" not in data:
        raise TableError(
            f"backward is missing; to keep the native backward, write backward = {NATIVE!r}"
        )
    replacement = _load_forward(data.get("forward"), allow_imports)
    rule = _load_backward(data["backward"], data.get("params"), allow_imports)
    return on(**fields, forward=replacement).backward(rule)


def _load_call(call: Any) -> Any:
    """A slice is written as text, for example ``"1:3"``."""
    if not isinstance(call, str):
        return call
    if not re.fullmatch(r"(\d{0,9}:){1,2}\d{0,9}", call):
        raise TableError(
            f"call has to be an index or a slice of indices ('1:3'), got {brief(call)}"
        )
    return slice(*(int(bound) if bound else None for bound in call.split(":")))


def _load_forward(given: Any, allow_imports: bool) -> Forward | None:
    if isinstance(given, str) and ":" in given:
        found = _load_reference(given, allow_imports)
        if not callable(found):
            raise TableError(f"forward {given!r} is not a function but {brief(found)}")
        return found  # type: ignore[no-any-return]
    if isinstance(given, Mapping) and isinstance(given.get("op"), str):
        return forward(given["op"], **{name: v for name, v in given.items() if name != "op"})
    if given is not None and not isinstance(given, str):
        raise TableError(
            "forward has to be the name of an op or a function 'package.module:name', or an op with parameters, such "
            f'as {{ op = "ternarize", threshold = 0.05 }}; got {brief(given)}'
        )
    return given


def _load_backward(backward: Any, parameters: Any, allow_imports: bool) -> RuleLike | None:
    """Read a rule's name with separate parameters, or a list of rules, each with its own parameters."""
    if isinstance(backward, list | tuple):
        if parameters is not None:
            raise TableError(
                "params belongs to a single rule. In a list, give each rule its own parameters: backward = "
                '[{ rule = "scale", s = 2.0 }, "noise"]'
            )
        return compose(*(_load_part(part, allow_imports) for part in backward))
    if not isinstance(backward, str):
        raise TableError(
            f"backward has to be a rule's name, a list of rules, or {NATIVE!r}, got {brief(backward)}"
        )
    if backward != NATIVE:
        return _load_rule(backward, {} if parameters is None else parameters, allow_imports)
    if parameters is not None:
        raise TableError("the native backward does not take params; leave params out")
    return None


def _load_part(part: Any, allow_imports: bool) -> Rule:
    if isinstance(part, str):
        return _load_rule(part, {}, allow_imports)
    if not isinstance(part, Mapping) or not isinstance(part.get("rule"), str):
        raise TableError(
            f'a part of a composition has to be a rule\'s name or {{ rule = "scale", s = 2.0 }}, got {brief(part)}'
        )
    values = {name: value for name, value in part.items() if name != "rule"}
    return _load_rule(part["rule"], values, allow_imports)


def _load_rule(name: str, values: Any, allow_imports: bool) -> Rule:
    if not isinstance(values, Mapping):
        raise TableError(f"params has to be a table of the rule's parameters, got {brief(values)}")
    if name.startswith(_QUANTIZERS):
        return _load_quantizer(name.removeprefix(_QUANTIZERS), values)
    rule = _load_reference(name, allow_imports) if _is_reference(name) else get(name)
    if not isinstance(rule, Rule):
        raise TableError(f"{name!r} is not a Rule but {brief(rule)}")
    declared = rule.parameters
    _refuse_unknown(f"parameter of rule {rule.name!r}:", values, (*declared, *OPTIONS))
    return rule(
        **{n: _load_value(declared[n], v) if n in declared else v for n, v in values.items()}
    )


def _load_quantizer(name: str, values: Mapping[str, Any]) -> Rule:
    if name not in quantizers.__all__:
        raise TableError(unknown("quantizer", name, quantizers.__all__))
    make = getattr(quantizers, name)
    _refuse_unknown(f"parameter of quantizers.{name}:", values, inspect.signature(make).parameters)
    rule: Rule = make(**values)
    return rule


def _is_reference(name: str) -> bool:
    return ":" in name and name not in available()


def _load_value(parameter: Parameter, value: Any) -> Any:
    """Convert a value of plain data to the type in the parameter's annotation: tuple, or infinite float."""
    types = parameter.types or (type(parameter.default),)
    if isinstance(value, list) and tuple in types and list not in types:
        return tuple(value)
    if value in ("inf", "-inf") and float in types and str not in types:
        return float(value)
    return value


def _load_reference(name: str, allow_imports: bool) -> Any:
    """Import the object that is named ``package.module:name``."""
    if not allow_imports:
        raise TableError(
            f"{name!r} has to be imported, which runs the code of its module. If you trust the table, pass "
            f"allow_imports=True: RuleTable.from_toml(..., allow_imports=True); on the command line --allow-imports"
        )
    module, _, qualname = name.partition(":")
    if module == "__main__":
        raise TableError(
            f"{name!r} is in the script that is run, and another script can read the table. Move the definition into a "
            f"module, and write 'module:name'"
        )
    try:
        return reduce(getattr, qualname.split("."), importlib.import_module(module))
    except Exception as error:  # importing a module can raise any exception
        raise TableError(f"{name!r} cannot be imported: {type(error).__name__}: {error}") from error


# --- writing ---


def dump_table(entries: Iterable[Entry], reaches: Iterable[str] = ()) -> dict[str, Any]:
    """Convert entries to a table of dicts, lists, strings, numbers and booleans.

    Args:
        entries: The entries.
        reaches: What the table has to reach.

    Raises:
        TableError: An entry contains something that is not plain data; the message names both.
    """
    return {
        "version": VERSION,
        **({"reaches": list(reaches)} if (reaches := tuple(reaches)) else {}),
        "rule": [_dump(number, entry) for number, entry in enumerate(entries, start=1)],
    }


class _NotPlainError(Exception):
    """Something cannot be written as plain data. The message gives the reason and a remedy."""


def _dump(number: int, entry: Entry) -> dict[str, Any]:
    try:
        data = _dump_entry(entry)
        (again,) = load_table({"rule": [data]}, allow_imports=True)
        # What each parameter has for itself is another object in each entry that is read
        same = _dump_entry(again) == data if _made_by_quantizer(entry) else again == entry
        if not same:
            raise _NotPlainError(
                "a value would be read back with another type; annotate the rule's parameter with the type of the value"
            )
        return data
    except (_NotPlainError, TableError) as error:
        raise TableError(
            f"entry {number} ({entry.selector}) cannot be written as plain data: {error}"
        ) from None


def _dump_entry(entry: Entry) -> dict[str, Any]:
    fields = entry.sites.given()
    if "where" in fields:
        raise _NotPlainError(
            "`where` is a function; select with module, type, parameter or call instead"
        )
    for kind in _as_list(fields.get("type")):
        if isinstance(kind, type):
            raise _NotPlainError(
                f"the class {kind.__name__} cannot be imported by name; define it at the top level of a module"
            )
    if "call" in fields:
        calls = [call_text(c) if isinstance(c, slice) else c for c in _as_list(fields["call"])]
        fields["call"] = calls if isinstance(fields["call"], list) else calls[0]
    if entry.optional:
        fields["optional"] = True
    made = _made_by_quantizer(entry)
    if made is not None:
        params = {"params": made.values} if made.values else {}
        return {**fields, "backward": _QUANTIZERS + made.quantizer, **params}
    if isinstance(entry.forward, BoundForward):
        fields["forward"] = _dump_bound(entry.forward)
    elif entry.forward is not None:
        known = isinstance(entry.forward, str)
        fields["forward"] = entry.forward if known else _reference(entry.forward, "the forward")
    if entry.rules is None:
        return {**fields, "backward": NATIVE}
    if len(entry.rules) > 1:
        return {**fields, "backward": [_dump_part(rule) for rule in entry.rules]}
    (rule,) = entry.rules
    values = _dump_values(rule)
    return {**fields, "backward": _rule_name(rule), **({"params": values} if values else {})}


def _made_by_quantizer(entry: Entry) -> Own | None:
    """What each parameter has for itself, in an entry whose rule and forward are as a quantizer made them."""
    if entry.rules is None or len(entry.rules) > 1:
        return None
    (rule,) = entry.rules
    for value in rule.bound.values():
        if isinstance(value, Own):
            made = getattr(quantizers, value.quantizer)(**value.values)
            if _described(rule, entry.forward) != _described(made, made.forward):
                raise _NotPlainError(
                    f"rule {rule.name!r} and its forward are not as quantizers.{value.quantizer} returns them; give it "
                    f"the other values"
                )
            return value
    return None


def _described(rule: Rule, forward: Forward | None) -> tuple[Any, ...]:
    """A rule and a forward, with the name of each tensor that each parameter has for itself."""
    keywords = getattr(forward, "keywords", {})
    function = getattr(forward, "func", forward)
    values = [{**rule.bound}, {**keywords}]
    for some in values:
        some.update({n: (v.quantizer, v.values) for n, v in some.items() if isinstance(v, Own)})
    return rule.name, function, *values


def _dump_part(rule: Rule) -> str | dict[str, Any]:
    values = _dump_values(rule)
    return {"rule": _rule_name(rule), **values} if values else _rule_name(rule)


def _dump_values(rule: Rule) -> dict[str, Any]:
    defaults = rule.declaration.defaults
    return {
        name: _dump_value(f"rule {rule.name!r}", name, value)
        for name, value in rule.given.items()
        if not (value is None and defaults.get(name, ...) is None)  # TOML has no None
    }


def _dump_bound(bound: BoundForward) -> dict[str, Any]:
    values = {n: v for n, v in bound.keywords.items() if v is not None}  # TOML has no None
    plain = {n: _dump_value(f"forward {bound.op!r}", n, v) for n, v in values.items()}
    return {"op": bound.op, **plain}


def _dump_value(of: str, name: str, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_dump_value(of, name, item) for item in value]
    if type(value) in (bool, int, float, str):
        return value
    kind = "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    raise _NotPlainError(f"the parameter {name!r} of {of} is {kind}")


def _rule_name(rule: Rule) -> str:
    """The name of a built-in rule; for a user's rule, the ``module:name`` to import it from."""
    module = rule.function.__module__
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return rule.name
    for name, value in vars(sys.modules.get(module, object)).items():
        if module != "__main__" and isinstance(value, Rule) and value.function is rule.function:
            return f"{module}:{name}"
    raise _NotPlainError(f"rule {rule.name!r} {_not_importable(module)}")


def _reference(function: Any, what: str) -> str:
    module = getattr(function, "__module__", None) or "__main__"  # builtins have None
    name = getattr(function, "__qualname__", "")
    try:
        if (
            module != "__main__"
            and reduce(getattr, name.split("."), sys.modules[module]) is function
        ):
            return f"{module}:{name}"
    except (KeyError, AttributeError):
        pass
    raise _NotPlainError(f"{what} {_not_importable(getattr(function, '__module__', None))}")


def _not_importable(module: str | None) -> str:
    """Why an object of a module cannot be named in a table, as a predicate."""
    if module == "__main__":
        return (
            "is defined in the script that is run, which other scripts cannot import; define it in a module that the "
            "script imports"
        )
    return "cannot be imported; define it at the top level of a module"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
