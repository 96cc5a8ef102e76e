"""Tables that are very large, and tables from somebody else."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from torch import nn

import freegrad_fx as fg
from freegrad_fx.table import table as table_module
from freegrad_fx.table.selector import Selector

STRANGE = [
    *('"x"', "-1", "1.5", "nan", "inf", "1e400", "1979-05-27T07:32:00Z", "07:32:00", "[[[]]]"),
    *("{ a = 1 }", "true", "99999999999999999999", "0x" + "f" * 5000, '"re:("', '"\\u0000"'),
    *('"os:system"', "\"__import__('os')\"", '[1, "a"]', '"99999999999:1"', f'"{"a" * 5000}"'),
]
FIELDS = ("op", "module", "type", "parameter", "call", "at", "first", "optional", "forward")
FIELDS = (*FIELDS, "backward", "params", "version", "reaches", "rule")


class Blocks(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(count))
        self.blocks = nn.Sequential(*layers)

    def forward(self, x: Any) -> Any:
        return self.blocks(x)


def entry_for(index: int) -> fg.Entry:
    """One of several kinds of entries, most of which name a place."""
    path = f"blocks.{index // 5}"
    chosen = {
        0: fg.on("relu", module=f"{path}.1"),
        1: fg.on(parameter=f"{path}.0.weight"),
        2: fg.on("params", module=[f"{path}.0", "nowhere"]),
        3: fg.on("relu", module=f"{path}.[12]", call=0),
        4: fg.on(parameter=[f"re:{path}.0.b.*", f"{path}.0.bias"]),
    }
    return chosen[index % 5].backward("scale", s=float(index))


def test_the_entries_of_a_site_are_those_that_match_it() -> None:
    table = fg.RuleTable(entry_for(index) for index in range(40))
    plan = fg.explain(Blocks(8), table)
    found = {
        name: (d.entry, *d.also) for d in plan.decisions for name in d.site.names or [d.site.name]
    }
    for block in range(8):
        weight, bias = f"blocks.{block}.0.weight", f"blocks.{block}.0.bias"
        first = 5 * block
        assert found[f"blocks.{block}.1:relu[0]"] == (first, first + 3)
        assert found[weight] == (first + 1, first + 2)
        assert found[bias] == (first + 2, first + 4)


def test_an_entry_for_one_place_is_tried_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Selector] = []
    matches = Selector.matches

    def counted(self: Selector, located: Any) -> bool:
        tried.append(self)
        return matches(self, located)

    monkeypatch.setattr(Selector, "matches", counted)
    large = fg.RuleTable(
        fg.on("relu", module=f"blocks.{i}.1").backward("scale", s=2.0) for i in range(10_000)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = fg.explain(Blocks(8), large)
    assert len(caught) < 50
    assert "more entries match nothing" in str(caught[-1].message)
    assert [d.entry for d in plan.decisions if d.site.kind == "operation"] == [*range(8)]
    assert len(tried) < 100


@pytest.mark.parametrize("field", FIELDS)
def test_values_of_strange_types_are_errors_that_are_short(field: str) -> None:
    told = []
    for value in STRANGE:
        entry = {"op": '"relu"', "backward": '"scale"', "params": "{ s = 2.0 }"}
        above = ""
        if field in ("version", "reaches", "rule"):
            above = f"{field} = {value}\n"
        else:
            entry[field] = value
        if field == "parameter":
            del entry["op"]
        below = "[[rule]]\n" + "\n".join(f"{k} = {v}" for k, v in entry.items())
        try:
            fg.RuleTable.from_toml(above + (below if field != "rule" else "") + "\n")
        except fg.TableError as error:
            told.append(str(error))
    assert told
    assert max(map(len, told)) < 4000


@pytest.mark.parametrize(
    "text", ["x = " + "[" * 20_000, "x = " + "{a=" * 3000, "a" + ".a" * 5000 + " = 1"]
)
def test_nesting_is_bounded(text: str) -> None:
    with pytest.raises(fg.TableError):
        fg.RuleTable.from_toml(text + "\n")


def test_size_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(table_module, "LARGEST", 100)
    text = fg.RuleTable(entry_for(index) for index in range(3)).to_toml()
    path = tmp_path / "large.toml"
    path.write_text(text, "utf-8")
    for source in (text, path):
        with pytest.raises(fg.TableError, match=r"more than 100 characters.*from_toml.first. [+]"):
            fg.RuleTable.from_toml(source)
