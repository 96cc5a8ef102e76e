"""The field `at` of an entry: what it selects, how it is written, what it refuses, and how sites are named."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

import freegrad_fx as fg
from freegrad_fx.sites.site import REPLACE

MODEL = nn.Sequential(nn.ReLU(), nn.GELU(), nn.ReLU())


def names(*entries: Any, action: str = "rewrite") -> list[str]:
    plan = fg.explain(MODEL, fg.RuleTable(entries))
    return [d.site.name for d in plan.with_action(action)]


def test_an_entry_without_at_selects_no_other_place() -> None:
    assert names(fg.on("relu").backward("stop")) == ["0:relu[0]", "2:relu[0]"]
    assert names(fg.on("relu", at=REPLACE).backward("stop")) == ["0:relu[0]", "2:relu[0]"]
    assert fg.on("relu", at=REPLACE) == fg.on("relu")


def test_each_place_gets_the_first_entry_that_matches_it() -> None:
    table = fg.RuleTable(
        [
            fg.on("relu", module="0", at="x").backward("stop"),
            fg.on("activations").backward("reverse"),
            fg.on(at=["x", "output"]).backward("scale", s=0.5),
        ]
    )
    found = {d.site.name: d.rules[0].name for d in fg.explain(MODEL, table).decisions if d.rules}
    assert found == {
        "0:relu[0]": "reverse", "0:relu[0]@x": "stop", "0:relu[0]@output": "scale",
        "1:gelu[0]": "reverse", "1:gelu[0]@x": "scale", "1:gelu[0]@output": "scale",
        "2:relu[0]": "reverse", "2:relu[0]@x": "scale", "2:relu[0]@output": "scale",
    }  # fmt: skip
    assert fg.explain(MODEL, table).hits == (1, 3, 5)


def test_a_place_is_listed_only_if_an_entry_decides_it() -> None:
    table = fg.RuleTable([fg.on("gelu", at="x").backward(None)])
    assert [d.site.name for d in fg.explain(MODEL, table).decisions] == [
        "0:relu[0]", "1:gelu[0]", "1:gelu[0]@x", "2:relu[0]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "entry",
    [
        fg.on("relu", at="output").backward("stop"),
        fg.on(["relu", "gelu"], call=0, at=["x", "replace"]).backward("scale", s=2.0),
        fg.on(type="torch.nn.ReLU", at="x").backward(None),
    ],
    ids=str,
)
def test_at_is_written_and_read(entry: Any) -> None:
    table = fg.RuleTable([entry])
    assert fg.RuleTable.from_toml(table.to_toml()) == table
    assert fg.RuleTable.from_dict(table.to_dict()) == table
    assert pickle.loads(pickle.dumps(table)) == table
    assert eval(repr(table), {**vars(fg), "on": fg.on, "RuleTable": fg.RuleTable}) == table
    assert hash(entry.sites) == hash(pickle.loads(pickle.dumps(entry)).sites)
    without = fg.RuleTable.from_dict({"rule": [{"op": "relu", "backward": "stop"}]})
    assert without != fg.RuleTable([fg.on("relu", at="output").backward("stop")])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"op": "relu", "at": "weight"}, r"unknown place at relu: 'weight'.*output.*replace.*x"),
        ({"op": "relu", "at": "outputs"}, "Did you mean 'output'"),
        ({"op": "relu", "at": 1}, "the name of an operand, got 1"),
        ({"op": "relu", "at": []}, "at is an empty list"),
        ({"op": "params", "at": "output"}, "the entry selects parameters"),
        ({"parameter": "*.weight", "at": "x"}, "the entry selects parameters"),
        ({"type": nn.Linear, "at": "weight"}, "unknown place at a call of a class: 'weight'"),
    ],
)
def test_what_is_no_place_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(fg.TableError, match=message):
        fg.on(given.pop("op", None), **given)


def test_a_forward_belongs_to_the_operation() -> None:
    for entry in (
        lambda: fg.on("relu", at="x", forward="tanh").backward("stop"),
        lambda: fg.on("relu", at="output").backward(fg.rules.stop(forward="tanh")),
    ):
        with pytest.raises(fg.TableError, match="give the forward to an entry without at="):
            entry()


@pytest.mark.parametrize(
    ("at", "rule", "message"),
    [
        ("x", "test: y alone", "needs the output y of an operation, and an operand has none"),
        ("output", "identity_rule", "which are one tensor at its output"),
    ],
)
def test_rules_that_cannot_act_at_a_place_are_refused(at: str, rule: str, message: str) -> None:
    @fg.register("test: y alone", overwrite=True)
    def from_y(grad: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """grad·y"""
        return grad * y

    with pytest.raises(fg.PlanError, match=message):
        names(fg.on("gelu", at=at).backward(rule))
    assert names(fg.on("gelu", at="output").backward("test: y alone"))


def test_reports_differences_and_parameters_name_the_place() -> None:
    def plan(s: float) -> Any:
        table = fg.RuleTable([fg.on("gelu", at="output").backward("scale", s=s)])
        return fg.explain(MODEL, table)

    assert "1:gelu[0]@output  nn.GELU()  scale(s=2.0)" in plan(2.0).to_text(0)
    assert plan(2.0).to_dict()["sites"][2]["at"] == "output"
    ((before, after),) = plan(2.0).diff(plan(3.0)).changed
    assert (before.site.name, after.rules[0].bound) == ("1:gelu[0]@output", {"s": 3.0})
    table = fg.RuleTable([fg.on("gelu", at=["x", "output"]).backward("scale", s=2.0)])
    gm = fg.transform(MODEL, table).set_rule_parameter("1:gelu[0]@x", s=5.0)
    assert [str(d.rules[0].bound["s"]) for d in fg.report(gm).with_action("rewrite")] == [
        "5.0",
        "2.0",
    ]
    gm.set_rule_parameter("gelu", s=7.0)
    assert {d.rules[0].bound["s"] for d in fg.report(gm).with_action("rewrite")} == {7.0}


def test_sites_and_selectors_that_were_saved_before_places_existed() -> None:
    site = fg.Site("operation", "relu", "act", 0)
    old = object.__new__(fg.Site)
    old.__setstate__({k: v for k, v in vars(site).items() if k != "at"})
    assert old == site
    entry = fg.on("relu").backward("stop")
    selector = object.__new__(type(entry.sites))
    selector.__dict__.update({k: v for k, v in vars(entry.sites).items() if k != "at"})
    assert selector == entry.sites


def test_an_optional_entry_may_match_nothing() -> None:
    entry = fg.on("silu", at="output", optional=True).backward("stop")
    table = fg.RuleTable([entry, fg.on("relu").backward("stop")])
    assert fg.RuleTable.from_toml(table.to_toml()) == table
    assert "optional=True" in repr(entry)
    gm = fg.transform(MODEL, table, strict=True)
    assert not fg.report(gm).unmatched
    assert "Entry 1, 'silu, at=output': 0 sites." in fg.report(gm).to_text(0)
    with fg.use(table, model=MODEL):
        MODEL(torch.ones(1))
    fg.compile(MODEL, table, backend="eager")(torch.ones(1))
    with pytest.raises(fg.TableError, match="optional has to be True or False"):
        fg.on("silu", optional="yes")  # type: ignore[arg-type]
