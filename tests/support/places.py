"""Where things are in the repository, and what another process needs on its path to import a test module."""

from __future__ import annotations

from pathlib import Path

import freegrad_fx

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
IMPORTABLE = [
    str(path)
    for path in (
        ROOT,
        Path(__file__).resolve().parent,
        Path(freegrad_fx.__file__).resolve().parents[1],
    )
]
