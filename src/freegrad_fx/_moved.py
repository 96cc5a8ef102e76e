"""Old names of modules that have moved, so that models saved under these names can still be loaded."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "find_moved"]

MOVED = {
    "activations": ("vocabulary", "vocabulary.op"),
    "captured": ("capture.captured",),
    "provenance": ("graph.provenance",),
    "rules.rule": ("core.rule",),
    "serialise": ("graph.serialise",),
}
"""Old module names that occur in models saved before 0.1.0, with the modules that hold their content now."""

_PACKAGE = __name__.rpartition(".")[0]


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports an old module name as a module that looks names up in the new modules."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        if package != _PACKAGE or module not in MOVED:
            return None
        return importlib.util.spec_from_loader(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        places = [f"{_PACKAGE}.{place}" for place in MOVED[spec.name.partition(".")[2]]]
        module = ModuleType(spec.name, f"The old name of {', '.join(places)}.")

        def look_up(name: str) -> Any:
            for found in map(importlib.import_module, places):
                if hasattr(found, name) and not name.startswith("__"):
                    return getattr(found, name)
            raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")

        module.__getattr__ = look_up  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def find_moved() -> None:
    """Make the old names importable."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
