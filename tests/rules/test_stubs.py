"""The stub of `fg.rules`, from which editors and type checkers know the rules and their parameters."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import freegrad_fx as fg
from rule_stubs import PLACE, stub

SOURCE = PLACE.parents[1]


def test_the_stub_is_what_the_registry_generates() -> None:
    text = PLACE.read_text("utf-8")
    assert text == stub(), "the rules have changed: run `python tests/support/rule_stubs.py`"


def test_the_stub_has_every_name_of_the_package() -> None:
    tree = ast.parse(PLACE.read_text("utf-8"))
    names = {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)}  # type: ignore[union-attr]
    names |= {a.asname for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names} - {
        None
    }  # type: ignore[arg-type]
    assert names == set(fg.rules.__all__)


GOOD = """
import freegrad_fx as fg
from torch import Tensor

def use(t: Tensor) -> None:
    fg.rules.rectangular(a=-1.0, save="mask")
    fg.rules.rectangular(a=t)(b=1.0).backward(t, x=t)
    fg.rules.straight_through(forward="round", compile=True)
    fg.rules.get("rectangular")(anything=1)
"""

BAD = {
    'fg.rules.rectangular(a="x")': "arg-type",
    "fg.rules.rectangular(widht=3)": "call-arg",
    "fg.rules.rectangular(1.0)": "call-arg",
    'fg.rules.triangular(save="mask")': "arg-type",
    "fg.rules.rectangle(a=1.0)": "attr-defined",
}


@pytest.mark.slow
def test_a_type_checker_accepts_and_rejects_what_the_rules_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = pytest.importorskip("mypy.api", reason="needs the extra `types`")
    lines = [f"    {line}" for line in BAD]
    first = len(GOOD.split("\n"))
    (tmp_path / "snippet.py").write_text(GOOD + "\n".join(lines) + "\n", "utf-8")
    # In place of PyTorch, which takes a minute
    (tmp_path / "torch").mkdir()
    tensor = tmp_path / "torch" / "__init__.pyi"
    tensor.write_text("class Tensor: ...\nclass Generator: ...\n", "utf-8")
    monkeypatch.setenv("MYPYPATH", str(tmp_path))
    files = ["__init__.py", "rules/__init__.pyi", "core/rule.py", "core/declaration.py"]
    out, error, _ = api.run(
        [
            "--follow-imports=skip",
            "--no-error-summary",
            "--config-file=",
            f"--cache-dir={tmp_path}",
            str(tmp_path / "snippet.py"),
            str(tensor),
            *(str(SOURCE / file) for file in files),
        ]
    )
    assert not error
    found = [line for line in out.splitlines() if "snippet.py" in line and " error: " in line]
    assert len(found) == len(BAD), out
    for number, (line, kind) in enumerate(zip(found, BAD.values(), strict=True), first):
        assert f"snippet.py:{number}:" in line
        assert line.endswith(f"[{kind}]")
