"""Runs the code in docs/parameters.md, and compares its TOML table with the one in Python."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import freegrad_fx as fg
from freegrad_fx.core import rule as rule_module
from places import DOCS

PAGE = (DOCS / "parameters.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_the_page_on_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule_module, "_registry", dict(rule_module._registry))
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile("\n".join(blocks("python")), "docs", "exec"), names)
    (toml,) = blocks("toml")
    assert fg.RuleTable.from_toml(toml) == names["binary"]
