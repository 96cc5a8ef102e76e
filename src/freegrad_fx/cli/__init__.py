"""The command line ``freegrad-fx``. Needs typer and rich, which the package does not require otherwise."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]


def main() -> None:
    """Run the command line, and end the process with its exit code.

    Raises:
        SystemExit: Always. The code is 0; 1 for an error of the user, or if typer or rich is missing; 2 for a command
            or an option that does not exist.
    """
    if missing := [name for name in ("typer", "rich") if not _installed(name)]:
        sys.exit(
            f"error: the command line needs {' and '.join(missing)}: pip install {' '.join(missing)}, or the extra "
            f"freegrad_fx[cli]"
        )
    from .app import app

    app()


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # the entry in sys.modules is None or has no spec
        return False
