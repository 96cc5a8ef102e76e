"""Both sides of docs/porting/freegrad.md compute the same gradients."""

from __future__ import annotations

import re
from typing import Any

import freegrad.registry
import pytest
import torch

from freegrad_fx.core import rule as rule_module
from places import DOCS


@pytest.fixture(autouse=True)
def _rules_of_a_test_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule_module, "_registry", dict(rule_module._registry))
    monkeypatch.setattr(freegrad.registry, "_RULES", dict(freegrad.registry._RULES))


def blocks(page: str) -> list[str]:
    text = (DOCS / page).read_text("utf-8")
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run(code: str) -> dict[str, Any]:
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile(code, "docs", "exec"), names)
    return names


def pairs() -> list[Any]:
    imports, *sides = blocks("porting/freegrad.md")
    assert imports == "import freegrad_fx.compat.freegrad as freegrad\n"
    titles = re.findall(
        r"^### (.*)$", (DOCS / "porting" / "freegrad.md").read_text("utf-8"), re.MULTILINE
    )
    sides_of = zip(titles, sides[::2], sides[1::2], strict=True)
    return [pytest.param(theirs, ours, id=title) for title, theirs, ours in sides_of]


@pytest.mark.parametrize(("theirs", "ours"), pairs())
def test_both_sides_of_the_porting_guide_compute_the_same(theirs: str, ours: str) -> None:
    compatible = theirs.replace("import freegrad.", "import freegrad_fx.compat.freegrad.")
    compatible = re.sub(
        r"^import freegrad$",
        "import freegrad_fx.compat.freegrad as freegrad",
        compatible,
        flags=re.MULTILINE,
    )
    expected = [p.grad for p in run(theirs)["model"].parameters()]
    assert any(grad.any() for grad in expected)
    for code in (ours, compatible):
        found = [p.grad for p in run(code)["model"].parameters()]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
