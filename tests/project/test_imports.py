"""What an import loads: little, and nothing of the compilers."""

from __future__ import annotations

import os
import subprocess
import sys

from places import IMPORTABLE

LOADED = """
import importlib, sys, torch
before = set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(*set(sys.modules) - before)
"""
COMPILERS = (
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.export",
    "torch._functorch.aot_autograd",
)


WITHOUT = {
    "freegrad_fx": (*COMPILERS, "freegrad_fx.dynamo", "freegrad_fx.capture.export"),
    "freegrad_fx.rules": (*COMPILERS, "freegrad_fx.capture", "freegrad_fx.plan"),
    "freegrad_fx.table": (*COMPILERS, "freegrad_fx.capture", "freegrad_fx.dynamo", "freegrad_fx.rewrite"),
}  # fmt: skip


def test_an_import_loads_only_what_it_needs() -> None:
    """Each import adds to those before it, in a process of its own."""
    process = subprocess.run(
        [sys.executable, "-c", LOADED, *WITHOUT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(IMPORTABLE)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    for (module, without), found in zip(WITHOUT.items(), process.stdout.splitlines(), strict=True):
        assert module in found.split()
        assert not {name for name in found.split() if name.startswith(without)}, module
