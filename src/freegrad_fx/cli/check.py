"""What is wrong with a table file, each fault with its line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TableError
from ..table import Entry, RuleTable
from ..table.data import load_table
from ..table.toml import entry_lines, loads
from .models import find_modules_here
from .output import file_error

__all__ = ["Fault", "check_table"]


@dataclass(frozen=True)
class Fault:
    """A fault in a file.

    Attributes:
        line: The line in which the entry begins, or the line of the wrong syntax; None if it is not known.
        text: What is wrong.
    """

    line: int | None
    text: str


def check_table(file: str, allow_imports: bool) -> tuple[RuleTable, list[int | None], list[Fault]]:
    """Read a table, and go on after a fault.

    Args:
        file: The path.
        allow_imports: Whether the file may name objects that are to be imported.

    Returns:
        The entries without a fault, the lines in which they begin (None if not known), and the faults.

    Raises:
        UserError: The file cannot be read.
    """
    find_modules_here()
    try:
        text = Path(file).read_bytes().decode("utf-8-sig")
        data = loads(text)
    except OSError as error:
        raise file_error(file, "read", error) from error
    except UnicodeDecodeError as error:
        return RuleTable(), [], [Fault(None, f"the file is not UTF-8 text: {error}")]
    except TableError as error:
        found = re.search(r"at line (\d+)", str(error))
        return RuleTable(), [], [Fault(int(found[1]) if found else None, str(error))]
    entries = data.get("rule", [])
    if not isinstance(entries, list):
        entries, around = [], data
    else:
        around = {key: value for key, value in data.items() if key != "rule"}
    faults, good, begins = list[Fault](), list[Entry](), list[int | None]()
    try:
        load_table(around, allow_imports)
    except TableError as error:
        faults.append(Fault(None, str(error)))
    lines = entry_lines(text, data)
    for index, entry in enumerate(entries):
        line = lines[index] if lines else None
        place = f"entry {index + 1}".format  # the same, whatever number it is called with
        try:
            good += load_table({"rule": [entry]}, allow_imports, place)
            begins.append(line)
        except TableError as error:
            texts = dict.fromkeys([str(error), *_of_selector(entry, allow_imports, place)])
            faults += [Fault(line, one) for one in texts]
    return RuleTable(good), begins, faults


def _of_selector(entry: Any, allow_imports: bool, place: Callable[..., str]) -> list[str]:
    """What is wrong with the selector of an entry: the rule is read first, and its fault hides this one."""
    if not isinstance(entry, dict):
        return []
    selector = {k: v for k, v in entry.items() if k not in ("backward", "forward", "params")}
    try:
        load_table({"rule": [{**selector, "backward": "native"}]}, allow_imports, place)
    except TableError as error:
        return [str(error)]
    return []
