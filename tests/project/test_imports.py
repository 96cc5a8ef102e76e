"""What an import loads: little, and nothing of the compilers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from places import IMPORTABLE

LOADED = (
    "import sys, torch; before = set(sys.modules); import {}; print(*set(sys.modules) - before)"
)
COMPILERS = (
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.export",
    "torch._functorch.aot_autograd",
)


def loaded_by(module: str) -> set[str]:
    """The modules that an import adds to those of torch, in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-c", LOADED.format(module)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(IMPORTABLE)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(process.stdout.split())


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("freegrad_fx", (*COMPILERS, "freegrad_fx.dynamo", "freegrad_fx.capture.export")),
        ("freegrad_fx.table", (*COMPILERS, "freegrad_fx.capture", "freegrad_fx.dynamo", "freegrad_fx.rewrite")),
        ("freegrad_fx.rules", (*COMPILERS, "freegrad_fx.capture", "freegrad_fx.plan")),
    ],
)  # fmt: skip
def test_an_import_loads_only_what_it_needs(module: str, without: tuple[str, ...]) -> None:
    found = loaded_by(module)
    assert module in found
    assert not {name for name in found if name.startswith(without)}
