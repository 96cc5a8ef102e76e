"""A plan, printed, as a notebook table, as data and beside another plan."""

from __future__ import annotations

import functools
import itertools
import json
import math
import shutil
import warnings
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision import models as vision

import freegrad_fx as fg
from freegrad_fx.plan.layout import aligned, folded


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection_of_the_block, self.activation = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.projection_of_the_block(x)) + F.gelu(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(), Block())
        self.encoder[1].projection_of_the_block.weight = self.encoder[
            0
        ].projection_of_the_block.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.encoder(x), -1)


RULES = fg.RuleTable(
    [
        fg.on("relu", module="encoder.0.*").backward(
            fg.compose(fg.rules.clip_norm(max_norm=1.0), fg.rules.noise(sigma=0.01), "reverse")
        ),
        fg.on("relu").backward("rectangular", a=-1.0, b=1.0),
        fg.on("relu", module="encoder.1.*").backward("scale"),
        fg.on(parameter="*.weight").backward("scale", s=2.0),
        fg.on("gelu").backward(None),
    ]
)
WIDTHS = [60, 80, 100, 120, 200, 0]


# --- printed ---


@pytest.mark.parametrize("width", WIDTHS)
def test_a_plan_fits_the_width_and_keeps_every_decision(width: int) -> None:
    totals, table, remarks = fg.explain(Net(), RULES).to_text(width).split("\n\n")
    assert not width or max(map(len, f"{table}\n{remarks}".splitlines())) <= width
    assert totals == "Net, 8 sites: 3 rewritten, 5 left native."
    assert column(table, "backward", "line").replace(" ", "") == "".join(
        [
            "clip_norm(max_norm=1.0,eps=1e-12)→noise(sigma=0.01)→reverse(alpha=1.0)",
            "native:gelu=None",
            "rectangular(a=-1.0,b=1.0)",
            "native:gelu=None",
            "native:noentrymatches",
            "scale(s=2.0)",
            "native:noentrymatches" * 2,
        ]
    )


@pytest.mark.sampled(3)
@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize(
    "make",
    [
        lambda: vision.resnet18(num_classes=10),
        lambda: vision.VisionTransformer(32, 16, 2, 2, 12, 24, num_classes=10),
    ],
    ids=["resnet18", "vit"],
)
def test_a_report_of_a_real_model_keeps_every_column_and_every_cell(make: Any, width: int) -> None:
    table = fg.RuleTable(
        [
            fg.on("relu", module="layer*.conv*").backward(None),
            fg.on(parameter="re:.*\\.(weight|bias)", type="torch.nn.Conv2d").backward(
                fg.compose(fg.rules.clip_norm(max_norm=1.0), fg.rules.noise(sigma=0.01))
            ),
            fg.on("all").backward("rectangular", a=-1.0, b=1.0),
        ]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.FreegradWarning)
        plan = fg.explain(make(), table)
    whole, narrow = (plan.to_text(w).split("\n\n")[1].splitlines() for w in (0, width))
    assert max(map(len, narrow)) <= width
    names = whole[0].split()
    assert narrow[0].split() == names
    assert "…" not in "".join(narrow)
    for lines in (whole, narrow):
        starts = [lines[0].index(name) for name in names]
        ends = [*starts[1:], None]
        cells = [
            "".join(line[a:b] for line in lines[2:]) for a, b in zip(starts, ends, strict=True)
        ]
        seen = ["".join(cell.split()) for cell in cells]
        if lines is whole:
            expected = seen
    assert seen == expected


def test_a_long_cell_is_broken_between_its_parts() -> None:
    rows = [("path", "rule"), ("encoder.layers.0.attention", "clip_norm(max_norm=1.0, eps=1e-12)")]
    assert aligned(rows, 34).splitlines() == [
        "path              rule",
        "----------------  ----------------",
        "encoder.layers.   clip_norm(max_",
        " 0.attention       norm=1.0,",
        "                   eps=1e-12)",
    ]


def column(table: str, name: str, following: str) -> str:
    """The cells of a column as one text."""
    head, _, *lines = table.splitlines()
    return "".join(line[head.index(name) : head.index(following)] for line in lines)


@pytest.mark.parametrize("columns", ["70", "130"])
def test_print_fits_the_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    plan = fg.explain(Net(), RULES)
    for text in (str(plan), str(plan.diff(fg.explain(Net(), "scale")))):
        assert max(map(len, text.splitlines())) <= int(columns)
    assert str(plan) == plan.to_text(int(columns))


def test_what_goes_to_a_file_is_as_wide_as_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback: _no_terminal(*fallback))
    plan = fg.explain(Net(), RULES)
    assert str(plan) == plan.to_text(0)


def _no_terminal(columns: int, lines: int) -> Any:
    import os

    return os.terminal_size((columns, lines))


class Repeated(nn.Module):
    """Equal blocks in a row."""

    def __init__(self, count: int) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(count))
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.gelu(self.head(x))


def test_repeated_blocks_of_a_large_model_are_one_row() -> None:
    first = fg.on("relu", module="blocks.5.*").backward("scale")
    rules = fg.RuleTable([first, fg.on("relu").backward("reverse")])
    plan = fg.explain(Repeated(30), rules)
    table = plan.to_text(0).split("\n\n")[1].splitlines()[2:]
    assert [line.split()[:3] for line in table] == [
        ["blocks.0-4,6-29.1:relu[0]", "×29", "nn.ReLU()"],
        ["blocks.5.1:relu[0]", "nn.ReLU()", "scale(s=1.0)"],
        ["<root>:gelu[0]", "F.gelu", "native:"],
    ]
    for whole in (plan.to_text(0, fold=False), fg.explain(Repeated(20), rules).to_text(0)):
        assert "×" not in whole
        assert "blocks.19.1:relu[0]" in whole
    assert "×19" in fg.explain(Repeated(20), rules).to_text(0, fold=True)
    assert "×29" in plan._repr_html_()
    assert len(plan.to_dict()["sites"]) == 31


def test_opaque_calls_of_repeated_blocks_are_one_line() -> None:
    model = nn.Sequential(nn.ReLU(), *(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3)))
    plan = fg.explain(model, "scale")

    def opaque(**options: Any) -> list[str]:
        lines = plan.to_text(0, **options).splitlines()
        return [line for line in lines if line.startswith("Opaque: ")]

    first, *others = opaque(fold=False)
    assert len(others) == 2
    assert first.startswith("Opaque: 1: ")
    assert opaque() == [f"{first[:-1].replace('1', '1-3', 1)} ×3."]


PATHS = st.lists(st.sampled_from(["a", "b", "0", "1", "2", "4"]), min_size=1, max_size=5).map(
    ".".join
)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(PATHS, st.sampled_from("xy")), unique=True, max_size=25))
def test_folded_rows_stand_for_the_same_rows(rows: list[tuple[str, str]]) -> None:
    def numbers(part: str) -> list[str]:
        if not part[0].isdigit():
            return [part]
        runs = ([*map(int, run.split("-"))] for run in part.split(","))
        return [str(n) for run in runs for n in range(run[0], run[-1] + 1)]

    found = []
    for name, cell in folded(rows):
        path, _, count = name.partition(" ×")
        paths = [".".join(p) for p in itertools.product(*map(numbers, path.split(".")))]
        assert len(paths) == int(count or 1)
        found += [(path, cell) for path in paths]
    assert sorted(found) == sorted(rows)


def test_a_row_says_where_what_and_which_entry() -> None:
    head, _, *rows = fg.explain(Net(), RULES).to_text(0).split("\n\n")[1].splitlines()
    assert head.split() == ["site", "spelling", "backward", "line", "entry"]
    (first,) = (row for row in rows if row.startswith("encoder.1.activation"))
    assert first.split()[:3] == [
        "encoder.1.activation:relu[0]",
        "nn.ReLU(inplace=True)",
        "rectangular(a=-1.0,",
    ]
    assert "test_report.py:" in first
    assert first.endswith("  relu")
    (tied,) = (row for row in rows if "scale(s=2.0)" in row)
    assert tied.startswith(
        "encoder.0.projection_of_the_block.weight = encoder.1.projection_of_the_block.weight"
    )
    assert tied.endswith("parameter=*.weight")


def test_entries_without_sites_are_flagged_each_for_what_it_is() -> None:
    table = RULES + fg.RuleTable([fg.on("tanh").backward("scale")])
    with pytest.warns(fg.FreegradWarning, match="'tanh' matches nothing"):
        plan = fg.explain(Net(), table)
    assert plan.hits == (1, 1, 0, 1, 2, 0)
    assert [e.selector for e in plan.shadowed] == ["relu, module=encoder.1.*"]
    assert [e.selector for e in plan.unmatched] == ["tanh"]
    text = str(plan)
    assert (
        "Entry 3, 'relu, module=encoder.1.*': no site; 1 matched, all decided by entry 2." in text
    )
    assert "Entry 6, 'tanh': MATCHES NOTHING." in text
    flags = [(e["hits"], e["unmatched"], e["shadowed"]) for e in plan.to_dict()["entries"]]
    assert flags == [
        (1, False, False),
        (1, False, False),
        (0, False, True),
        (1, False, False),
        (2, False, False),
        (0, True, False),
    ]


def test_an_entry_written_twice_is_shadowed_by_itself() -> None:
    entry = fg.on("relu").backward("scale")
    plan = fg.explain(Net(), fg.RuleTable([entry, entry]))
    assert plan.hits == (2, 0)
    assert [e["shadowed"] for e in plan.to_dict()["entries"]] == [False, True]


cells = st.text(st.characters(categories=["L", "N", "P"]), max_size=30) | st.sampled_from(
    ["a b c d e f g h i j k"]
)


@given(
    st.lists(st.tuples(cells, cells, cells), max_size=5),
    st.integers(60, 120),
)
@settings(max_examples=200)
def test_a_table_is_aligned_within_its_width(rows: list[Any], width: int) -> None:
    head = ("first", "second", "third")
    text = aligned([head, *rows], width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert not any(line.endswith(" ") for line in lines)
    starts = [0, lines[0].index("second"), lines[0].index("third"), width]
    for start in starts[1:3]:
        assert all(line[start - 2 : start].strip() == "" for line in lines)
    for i, (start, end) in enumerate(itertools.pairwise(starts)):
        cells = "".join("".join(line[start:end] for line in lines[2:]).split())
        assert cells == "".join("".join(row[i] for row in rows).split())


# --- for notebooks and programs ---


class _Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def test_a_notebook_shows_all_of_it() -> None:
    plan, other = fg.explain(Net(), RULES), fg.explain(Net(), "scale")
    for html, words in (
        (plan._repr_html_(), ["parameter=*.weight", "rectangular(a=-1.0, b=1.0)", "<root>"]),
        (plan.diff(other)._repr_html_(), ["4 changed", "not listed"]),
    ):
        page = _Balanced()
        page.feed(html)
        page.close()
        assert not page.open
        assert all(word in page.text for word in words)


def round_up(x: Tensor) -> Tensor:
    return x.ceil()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "entry",
    [
        fg.on("relu").backward("clip_norm", max_norm=math.inf),
        fg.on("relu").backward("scale", s=torch.tensor(3.0)),
        fg.on("relu").backward("scale", s=torch.ones(4)),
        fg.on("params").backward("centralize", dim=(0, 1)),
        fg.on("relu", forward=round_up).backward("scale"),
        fg.on("relu", forward=functools.partial(torch.clamp, min=0.0)).backward("scale"),
        fg.on("relu", forward=lambda x: x, where=lambda site: True).backward("scale"),
    ],
    ids=repr,
)
def test_a_plan_is_json_whatever_its_rules_hold(entry: Any) -> None:
    plan = fg.explain(Net(), fg.RuleTable([entry]))
    for text in (plan.to_json(), plan.to_json(indent=2), plan.diff(fg.explain(Net())).to_json()):
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    data = json.loads(plan.to_json())
    assert data["entries"][0]["hits"] > 0
    assert {site["action"] for site in data["sites"]} == {"rewrite", "native"}
    assert str(plan)
    assert plan._repr_html_()


def test_data_says_of_a_parameter_which_ones_they_are() -> None:
    data = fg.explain(Net(), RULES).to_dict()
    (tied,) = (site for site in data["sites"] if len(site["names"]) == 2)
    assert tied["kind"] == "parameter"
    assert tied["path"] == "encoder.0.projection_of_the_block"
    assert tied["type"] == "torch.nn.modules.linear.Linear"
    assert tied["rules"] == [{"rule": "scale", "params": {"s": 2.0}}]
    assert tied["entry"] == 3


def test_an_infinite_number_is_text_in_json_alone() -> None:
    plan = fg.explain(Net(), {"relu": fg.rules.clip_norm(max_norm=math.inf)})
    assert plan.to_dict()["sites"][0]["rules"][0]["params"]["max_norm"] == math.inf
    assert json.loads(plan.to_json())["sites"][0]["rules"][0]["params"]["max_norm"] == "inf"


# --- beside another plan ---


def sites(decisions: Any) -> list[str]:
    return [decision.site.name for decision in decisions]


def test_a_plan_differs_from_another_where_its_decisions_do() -> None:
    before = fg.explain(Net(), {"relu": "scale", "gelu": "reverse", "softmax": None})
    after = fg.explain(
        Net(), {"relu": "scale", nn.ReLU: "scale", "gelu": fg.rules.reverse(alpha=2.0)}
    )
    diff = before.diff(after)
    assert diff
    assert sites(a for a, _ in diff.changed) == ["encoder.0:gelu[0]", "encoder.1:gelu[0]"]
    assert [(a.rules[0].bound["alpha"], b.rules[0].bound["alpha"]) for a, b in diff.changed] == [
        (1.0, 2.0)
    ] * 2
    assert (diff.removed, diff.added, diff.same) == ((), (), 3)
    assert str(diff).splitlines() == [
        "Net: 2 changed, 3 the same.",
        "",
        "site               before              after",
        "-----------------  ------------------  ------------------",
        "encoder.0:gelu[0]  reverse(alpha=1.0)  reverse(alpha=2.0)",
        "encoder.1:gelu[0]  reverse(alpha=1.0)  reverse(alpha=2.0)",
    ]


def test_a_plan_does_not_differ_from_itself_or_from_another_way_to_say_it() -> None:
    plan = fg.explain(Net(), {"relu": "scale"})
    same = fg.explain(Net(), fg.RuleTable([fg.on("relu", module="encoder.*").backward("scale")]))
    for other in (plan, same):
        assert not plan.diff(other)
        assert str(plan.diff(other)) == "Net: 5 the same."


def test_a_site_that_is_skipped_for_another_reason_is_a_difference() -> None:
    plans = []
    for rule in ("scale", "guided"):
        gm = fg.transform(nn.Sequential(nn.ReLU()), rule)
        with pytest.warns(fg.FreegradWarning, match="already decoupled"):
            plans.append(fg.explain(gm, "reverse"))
    diff = plans[0].diff(plans[1])
    assert [(a.action, b.action) for a, b in diff.changed] == [("skip", "skip")]
    assert "'scale'" in diff.changed[0][0].reason
    assert "'guided'" in diff.changed[0][1].reason
    assert not plans[0].diff(plans[0])


def test_sites_of_one_plan_alone_are_listed() -> None:
    before = fg.explain(Net(), {"relu": "scale"})
    after = fg.explain(Net(), {Block: "scale", "params": fg.rules.scale(s=3.0)})
    diff = before.diff(after)
    assert sites(diff.removed) == [
        "encoder.0.activation:relu[0]",
        "encoder.0:gelu[0]",
        "encoder.1.activation:relu[0]",
        "encoder.1:gelu[0]",
    ]
    assert {s for s in sites(diff.added) if "Block" in s} == {
        "encoder.0:Block[0]",
        "encoder.1:Block[0]",
    }
    assert "4 only before" in str(diff)
    text = str(after.diff(before))
    assert "no such site" in text
    assert diff.to_dict()["same"] == diff.same == 1


def test_a_parameter_that_is_native_in_both_is_no_difference() -> None:
    before = fg.explain(Net(), {"relu": "scale"})
    after = fg.explain(Net(), RULES[3:4] + fg.RuleTable.of({"relu": "scale"}))
    diff = before.diff(after)
    assert sites(diff.added) == ["encoder.0.projection_of_the_block.weight"]
    assert "not listed" in str(diff)
    assert not diff.removed
    assert not diff.changed


def test_a_forward_makes_a_difference() -> None:
    before = fg.explain(Net(), {"relu": "arctan"})
    after = fg.explain(Net(), {"relu": fg.rules.arctan(forward="heaviside")})
    assert sites(a for a, _ in before.diff(after).changed) == [
        "encoder.0.activation:relu[0]",
        "encoder.1.activation:relu[0]",
    ]
    assert "FORWARD heaviside" in str(before.diff(after))


def test_plans_of_two_models_are_compared_by_the_names_of_their_sites() -> None:
    diff = fg.explain(nn.Sequential(nn.ReLU()), "scale").diff(
        fg.explain(nn.ModuleList([nn.ReLU()])[0], "scale")
    )
    assert str(diff).startswith("Sequential → ReLU: 1 only before, 1 only after.")
