"""Runs the code in docs/testing.md, and compares its error and its table with those of the package."""

from __future__ import annotations

import re
from typing import Any

import pytest

from freegrad_fx.testing import CHECKS
from places import DOCS

PAGE = (DOCS / "testing.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_page_on_testing(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile("\n".join(blocks("python")), "docs", "exec"), names)
    (shown,) = blocks("text")
    assert capsys.readouterr().out.startswith(shown.removesuffix("…\n"))


def test_the_page_lists_every_check() -> None:
    lines = [f"| `{name}` | {text} |" for name, text in CHECKS.items()]
    assert "\n".join(lines) in PAGE
