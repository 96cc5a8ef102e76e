"""Runs the code of every page of the documentation, and compares what pages say with what the code does.

A page is one program: its blocks are run in order. `tests/table/test_precedence.py` runs docs/tables.md, and
``nox -s examples`` the README.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import freegrad_fx as fg
from freegrad_fx.core import rule as rule_module
from freegrad_fx.testing import CHECKS
from places import DOCS

# Libraries that pages show, and that the environment of the tests does not have to have
OPTIONAL = {
    "accelerate",
    "brevitas",
    "captum",
    "lightning",
    "peft",
    "snntorch",
    "spikingjelly",
    "torchao",
    "zennit",
}
ELSEWHERE = {"porting/freegrad.md", "tables.md"}
SLOW = {
    "backend.md",
    "compile.md",
    "howto/attribution.md",
    "howto/frameworks.md",
    "howto/trainers.md",
    "porting/lxt.md",
}  # they compile much, or import large libraries


def text_of(page: str) -> str:
    return (DOCS / page).read_text("utf-8")


def blocks(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)


def not_ours(page: str) -> bool:
    """Whether the page imports libraries whose warnings are not this project's."""
    return bool(
        re.search(
            rf"^import ({'|'.join(OPTIONAL)})|^from ({'|'.join(OPTIONAL)})",
            text_of(page),
            re.MULTILINE,
        )
    )


def pages() -> list[Any]:
    names = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    names = [n for n in names if not n.startswith("_") and n not in ELSEWHERE and blocks(n)]
    return [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in names]


def run(code: str) -> dict[str, Any]:
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile(code, "model.py", "exec"), names)
    return names


def run_page(page: str) -> dict[str, Any]:
    try:
        return run("\n".join(blocks(page)))
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in OPTIONAL:
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.fixture(autouse=True)
def _a_page_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rule_module, "_registry", dict(rule_module._registry))
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings(
    r"ignore:The .grad attribute of a Tensor:UserWarning"
)  # Dynamo's own, in backend.md
@pytest.mark.parametrize("page", pages())
def test_the_code_of_the_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        if not_ours(page):
            warnings.simplefilter("ignore")
        names = run_page(page)
    if page == "parameters.md":
        (toml,) = blocks(page, "toml")
        assert fg.RuleTable.from_toml(toml) == names["binary"]
    if page in ("testing.md", "tutorial.md"):
        (shown,) = blocks(page, "text")
        assert capsys.readouterr().out.startswith(shown.removesuffix("…\n"))


def test_the_page_on_testing_lists_every_check() -> None:
    lines = [f"| `{name}` | {text} |" for name, text in CHECKS.items()]
    assert "\n".join(lines) in text_of("testing.md")


def test_the_drawing_on_the_page_is_what_the_page_draws() -> None:
    names = run(blocks("howto/drawing.md")[0].replace("resnet18.svg", "drawn.svg"))
    for theme in ("light", "dark"):
        assert fg.draw(names["gm"], theme=theme).svg == text_of(f"_static/drawing-{theme}.svg")


def test_both_variants_of_the_picture_show_the_same() -> None:
    light, dark = (
        re.sub("#[0-9a-f]{6}", "", text_of(f"_static/before-after-{name}.svg"))
        for name in ("light", "dark")
    )
    assert light == dark
