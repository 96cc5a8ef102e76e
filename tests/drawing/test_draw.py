"""`draw`: what a picture shows is what the report says and what the model computes."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.drawing.rows import Row, folded, rows_of_graph, rows_of_plan

SVG = "{http://www.w3.org/2000/svg}"


class Residual(nn.Module):
    """A block that is called twice, an activation that is called four times, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.GELU())
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.act(x + self.block(x))
        return x


COMPOSED = fg.compose(fg.rules.scale(s=0.5), "clip_norm")
TABLES: dict[str, list[Any]] = {
    "an operation": [fg.on("gelu").backward("identity_rule")],
    "a composition": [fg.on("gelu").backward(COMPOSED)],
    "an output": [fg.on("linear", at="output").backward(COMPOSED)],
    "an operand": [
        fg.on("linear", at="weight").backward("half"),
        fg.on("linear", at="x").backward(COMPOSED),
        fg.on("linear").backward("feedback_alignment"),
    ],
    "a forward": [fg.on("tanh", forward="heaviside").backward("arctan")],
    "a parameter": [
        fg.on(parameter="*.weight", forward="binarize").backward("straight_through"),
        fg.on(parameter="*.bias").backward(COMPOSED),
    ],
    "several parameters": [fg.on(parameter="*").backward("clip_norm", over="all")],
}


def acting(plan: fg.Plan) -> set[str]:
    given = (d for d in plan.decisions if d.action in ("rewrite", "ambient"))
    return {decision.site.name for decision in given}


def names(rows: list[Row]) -> Counter[str]:
    return Counter(decision.site.name for row in rows for decision in row.decisions)


@pytest.mark.parametrize("captured", ["symbolic", "export", "loaded"])
@pytest.mark.parametrize("table", TABLES)
def test_every_site_with_a_rule_is_drawn_at_its_operation(table: str, captured: str) -> None:
    examples = (torch.randn(2, 4),) if captured == "export" else None
    gm = fg.transform(Residual(), fg.RuleTable(TABLES[table]), example_inputs=examples)
    gm = pickle.loads(pickle.dumps(gm)) if captured == "loaded" else gm
    plan = fg.report(gm)
    rows = rows_of_graph(gm, plan)
    assert names(rows) == Counter(acting(plan))
    for row in rows:
        for decision in row.decisions:
            assert decision.site.path == row.path or decision.site.name == row.path
            assert decision.site.op in row.name.lower() or decision.forward is not None
    assert names(folded(rows, 1)) == names(rows)
    assert names(rows_of_plan(plan)) == names(rows)


def test_arrows_follow_the_values() -> None:
    rows = rows_of_graph(gm := fg.transform(Residual(), {"gelu": "identity_rule"}), fg.report(gm))
    found = [(row.path, row.name, sorted(row.sources)) for row in rows]
    assert found == [
        ("", "x", []),
        ("block.0", "Linear", [0]),
        ("block.1", "GELU", [1]),
        ("", "add", [0, 2]),
        ("act", "Tanh", [3]),
        ("block.0", "Linear", [4]),
        ("block.1", "GELU", [5]),
        ("", "add", [4, 6]),
        ("act", "Tanh", [7]),
        ("", "output", [8]),
    ]
    once = [(row.kind, row.path, row.name, sorted(row.sources)) for row in folded(rows, 1)]
    assert once[1:4] == [
        ("folded", "block", "2 operations", [0]),
        ("operation", "", "add", [0, 1]),
        ("operation", "act", "Tanh", [2]),
    ]
    assert len(once) == 8


def test_arrows_follow_the_values_through_hooks_and_writes() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.GELU(), nn.ReLU(inplace=True), nn.Linear(4, 4)
    )
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    table = {"relu": "half", "gelu": "identity_rule"}
    rows = rows_of_graph(gm := fg.transform(model, table), fg.report(gm))
    assert [(row.path, row.name, sorted(row.sources)) for row in rows] == [
        ("", "input", []),
        ("0", "Linear", [0]),
        ("1", "ReLU", [1]),
        ("2", "GELU", [2]),
        ("3", "ReLU", [3]),
        ("4", "Linear", [4]),
        ("", "output", [5]),
    ]


def test_a_parameter_stands_before_its_reader_and_a_shared_one_once() -> None:
    table = fg.RuleTable([fg.on(parameter="*.weight").backward("clip_norm")])
    rows = rows_of_graph(gm := fg.transform(Residual(), table), fg.report(gm))
    assert [row.kind for row in rows].count("parameter") == 1
    assert rows[1].kind == "parameter"
    assert [row.path for row in rows if 1 in row.sources] == ["block.0", "block.0"]


# --- the picture ---


def boxes(svg: str, kind: str) -> list[tuple[float, float, float, float]]:
    """Left, top, right and bottom of the rectangles of a class."""
    found = []
    for shape in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        if kind in shape.attrib["class"].split():
            x, y, width, height = (float(shape.attrib[n]) for n in ("x", "y", "width", "height"))
            found.append((x, y, x + width, y + height))
    return found


@pytest.mark.parametrize("table", TABLES)
def test_nothing_overlaps_and_everything_is_inside(table: str) -> None:
    svg = fg.draw(fg.transform(Residual(), fg.RuleTable(TABLES[table]))).svg
    root = ElementTree.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    drawn = [*boxes(svg, "box"), *boxes(svg, "pill")]
    for number, (left, top, right, bottom) in enumerate(drawn):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        for other in drawn[:number]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    for text in root.iter(f"{SVG}text"):
        assert float(text.attrib["x"]) + 7 * len(text.text or "") <= width


def test_a_large_model_is_folded_and_small_ones_are_not() -> None:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(20)]
    gm = fg.transform(nn.Sequential(nn.Sequential(*blocks), nn.Linear(4, 2)), {"gelu": "half"})
    assert len(boxes(fg.draw(gm, depth=0).svg, "box")) == 63
    folded_svg = fg.draw(gm).svg
    assert len(boxes(folded_svg, "pill")) == 20
    assert "Folded: depth=2" in folded_svg
    assert "60 operations" in fg.draw(gm, depth=1).svg


def test_the_theme_is_in_the_file() -> None:
    gm = fg.transform(nn.ReLU(), "guided")
    light, dark, auto = (fg.draw(gm, theme=theme).svg for theme in ("light", "dark", "auto"))
    assert "#0072B2" in light
    assert "#56B4E9" in dark
    assert "prefers-color-scheme" in auto
    assert "prefers-color-scheme" not in light + dark
    without = [re.sub("<style>.*</style>", "", svg) for svg in (light, dark, auto)]
    assert without[0] == without[1] == without[2]


def test_an_ambient_site_is_dashed_and_names_are_escaped() -> None:
    svg = fg.draw(fg.transform(nn.Sequential(nn.ReLU()))).svg
    assert "stroke-dasharray" in svg
    assert "Sequential: 1 ambient site" in svg
    lookalike = type("A<b>&", (nn.Sequential,), {})
    assert "A&lt;b&gt;&amp;: 1 site" in fg.draw(fg.explain(lookalike(nn.ReLU()), "guided")).svg


def test_what_has_no_graph_shows_its_sites() -> None:
    model, x = Residual(), torch.randn(2, 4)
    rules = {"gelu": "identity_rule"}
    compiled = fg.compile(model, rules, backend="eager")
    compiled(x)
    with fg.use(rules, model=model) as block:
        model(x)
    for subject in (compiled, block, fg.explain(model, rules)):
        svg = fg.draw(subject).svg
        assert len(boxes(svg, "pill")) == 2
        assert "marker-end" not in svg


def test_a_file_is_written_and_a_notebook_shows_the_picture(tmp_path: Path) -> None:
    drawing = fg.draw(fg.transform(nn.ReLU(), "guided"), tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text("utf-8") == drawing.svg == drawing._repr_svg_()
    assert len(repr(drawing)) < 50


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fg.draw(nn.ReLU()), TypeError, r"got ReLU\. .*draw\(explain\(model, rules\)\)"),
        (lambda: fg.draw(3), TypeError, "got int"),
        (lambda: fg.draw(GUIDED, depth=-1), ValueError, "from 0, got -1"),
        (lambda: fg.draw(GUIDED, depth=True), ValueError, "from 0, got True"),
        (lambda: fg.draw(GUIDED, theme="drak"), ValueError, "Did you mean 'dark'?"),
        (lambda: fg.draw(GUIDED, "a.png"), ValueError, r"'a.png' ends otherwise.*\.svg"),
        (lambda: fg.draw(fg.compile(nn.ReLU(), "guided")), fg.PlanError, "captured nothing yet"),
    ],
)
def test_what_cannot_be_drawn(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


GUIDED = fg.explain(nn.ReLU(), "guided")
