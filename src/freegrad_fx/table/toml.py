"""TOML text to and from plain data. Reading uses `tomllib`; writing supports only what tables need.

Independent of rules.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import TableError

__all__ = ["dumps", "entry_lines", "entry_place", "loads"]


def loads(text: str) -> dict[str, Any]:
    """Read TOML.

    Raises:
        TableError: The text is not valid TOML; the message gives the line.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise TableError("the TOML text is nested too deeply") from None
    except ValueError as error:  # syntax errors, and integers with too many digits
        raise TableError(f"invalid TOML: {error}") from error


def entry_lines(text: str, table: Mapping[str, Any]) -> list[int]:
    """The lines in which the entries of a table begin, from 1; empty unless the lines of all entries can be found."""
    head = re.compile(r"\s*\[\[\s*rule\s*]]")
    # not splitlines(), which also splits at characters that do not end a line in TOML
    lines = [number for number, line in enumerate(text.split("\n"), 1) if head.match(line)]
    entries = table.get("rule")
    return lines if isinstance(entries, list) and len(entries) == len(lines) else []


def entry_place(text: str, table: Mapping[str, Any]) -> Callable[[int], str]:
    """How to name entries in error messages: by number, and by line if the lines of all entries can be found."""
    lines = entry_lines(text, table)

    def place(number: int) -> str:
        return f"entry {number} (line {lines[number - 1]})" if lines else f"entry {number}"

    return place


def dumps(table: Mapping[str, Any]) -> str:
    """Write a table as TOML: first the plain values, then each list as an array of tables."""
    plain = {k: v for k, v in table.items() if not (isinstance(v, list) and _are_tables(v))}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items()]
    for key, entries in table.items():
        for entry in () if key in plain else entries:
            lines += ["", f"[[{_key(key)}]]"]
            lines += [f"{_key(name)} = {_value(value)}" for name, value in entry.items()]
    return "\n".join(lines) + "\n"


def _are_tables(values: list[Any]) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def _value(value: Any) -> str:
    if isinstance(value, str):
        return f'"{_escaped(value)}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(k)} = {_value(v)}' for k, v in value.items())} }}"
    return repr(value)  # Python and TOML write numbers alike


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else f'"{_escaped(key)}"'


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def _escaped(text: str) -> str:
    return "".join(
        _ESCAPES.get(c) or (f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c) for c in text
    )
