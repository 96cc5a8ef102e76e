"""Callbacks for trainers, in `lightning` and `transformers`. Each imports its library, and is imported on demand."""

import importlib
from typing import Any

__all__ = ["lightning", "transformers"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
