"""Rules and forwards that are defined in the script that is run: tables name the reason why they cannot hold them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import freegrad_fx as fg

SCRIPT = """
import freegrad_fx as fg

@fg.register("of the script")
def mine(grad):
    "grad"
    return grad

def step(x):
    return x

for entry in (fg.on("relu").backward(mine), fg.on("relu", forward=step).backward("reverse")):
    try:
        fg.RuleTable([entry]).to_toml()
    except fg.TableError as error:
        print(error)
"""


def test_a_table_is_not_written(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    rule, forward = run.stdout.splitlines()
    reason = "is defined in the script that is run, which other scripts cannot import; define it in a module that"
    assert f"rule 'of the script' {reason}" in rule
    assert f"the forward {reason}" in forward


def test_a_table_is_not_read() -> None:
    text = 'version = 1\n[[rule]]\nop = "relu"\nbackward = "__main__:mine"\n'
    with pytest.raises(fg.TableError, match=r"'__main__:mine' is in the script that is run.*Move"):
        fg.RuleTable.from_toml(text, allow_imports=True)
