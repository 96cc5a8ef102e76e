"""Which entry decides a site: the cases of docs/tables.md, one by one, and a naive reading of it on random tables."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.core import rule as rule_module
from places import DOCS

PAGE = (DOCS / "tables.md").read_text("utf-8")


def between(start: str, end: str) -> str:
    return PAGE.partition(start)[2].partition(end)[0]


def python_in(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


NAMES: dict[str, Any] = {"fg": fg, "__name__": __name__}
exec(python_in(between("<!-- model -->", "<!-- cases -->"))[0], NAMES)
CASES = between("<!-- cases -->", "<!-- end of cases -->").split("\n### ")[1:]


def decided(model: nn.Module, rules: Any) -> dict[str, str]:
    """For every site that is rewritten the names of its rules."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.FreegradWarning)
        plan = fg.explain(model, rules)
    return {d.site.name: " → ".join(r.name for r in d.rules) for d in plan.with_action("rewrite")}


# --- the documented cases ---


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.partition("\n")[0])
def test_the_documented_case_decides_as_documented(case: str) -> None:
    (code,) = python_in(case)
    names = dict(NAMES)
    exec(code, names)
    rows = dict(re.findall(r"^\| `(.+)` \| (.+) \|$", case, re.MULTILINE))
    assert rows
    assert decided(names["model"], names["rules"]) == rows


def test_the_page_shows_the_same_table_in_python_and_in_toml() -> None:
    names = dict(NAMES)
    exec(python_in(PAGE)[0], names)
    (toml,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert fg.RuleTable.from_toml(toml) == names["rules"]


def test_the_page_names_the_sites_of_its_model() -> None:
    sites = [d.site for d in fg.explain(NAMES["model"]).decisions]
    assert [s.name for s in sites if s.kind == "operation"] == [
        "layer1.act:relu[0]",
        "layer1.act:relu[1]",
        "layer2.act:relu[0]",
        "layer2.act:relu[1]",
        "<root>:relu[0]",
        "head.1:gelu[0]",
        "<root>:softmax[0]",
    ]
    (tied,) = (s for s in sites if len(s.names) > 1)
    assert tied.names == ("layer1.fc.weight", "layer2.fc.weight")


def test_the_page_s_rule_requires_what_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule_module, "_registry", dict(rule_module._registry))
    names = dict(NAMES)
    exec(next(block for block in python_in(PAGE) if '@fg.register("window"' in block), names)
    with pytest.raises(fg.RuleError) as error:
        names["window"](low=2.0)
    assert f"*{error.value}*" in PAGE


def test_the_page_shows_the_diff_that_is_printed() -> None:
    names = dict(NAMES)
    code = next(block for block in python_in(PAGE) if "before.diff(after)" in block)
    exec(code.replace("print(before.diff(after))", "text = str(before.diff(after))"), names)
    assert names["text"] in PAGE


# --- a naive reading of the precedence, on random tables and models ---


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.gelu = nn.Linear(2, 2), nn.ReLU(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.gelu(self.act(self.fc(x)))).tanh()


class Special(Leaf):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.act(self.act(x))) + F.softmax(x, -1).round()


class Tree(nn.Module):
    def __init__(self, children: list[nn.Module], tie: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(children)
        leaves = [m for m in self.modules() if isinstance(m, Leaf)]
        if tie:
            leaves[-1].fc.weight = leaves[0].fc.weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = F.relu(block(x))
        return x


leaves = st.sampled_from([Leaf, Special]).map(lambda kind: kind())
trees = st.lists(
    leaves | st.builds(Tree, st.lists(leaves, min_size=1, max_size=2), st.booleans()),
    min_size=2,
    max_size=3,
)
models = leaves | st.builds(Tree, trees, st.sampled_from([True, True, False]))

GROUP = {
    "activations": {"relu", "gelu", "tanh"},
    "softmax": {"softmax"},
    "quantizers": {"round"},
    "all": {"relu", "gelu", "tanh", "parameter"},
    "params": {"parameter"},
}
PATTERNS: dict[str, Callable[[str], bool]] = {
    "*": lambda name: True,
    "": lambda name: name == "",
    "block.0": lambda name: name == "block.0",
    "block.0*": lambda name: name.startswith("block.0"),
    "block.1*": lambda name: name.startswith("block.1"),
    "*.act": lambda name: name.endswith(".act"),
    "*.weight": lambda name: name.endswith(".weight"),
    "block.?.fc*": lambda name: name.startswith("block.") and name[7:].startswith(".fc"),
    "re:.*[gf].*": lambda name: "g" in name or "f" in name,
    "re:block": lambda name: name == "block",
}
CALLS: list[tuple[Any, Callable[[int], bool]]] = [
    (0, lambda call: call == 0),
    (2, lambda call: call == 2),
    (slice(1, None), lambda call: call >= 1),
    (slice(None, None, 2), lambda call: call % 2 == 0),
    (slice(1, 2), lambda call: call == 1),
]
OPS = [
    "relu",
    "gelu",
    "tanh",
    "softmax",
    "round",
    "activations",
    "quantizers",
    "all",
    "params",
    "params",
]
TYPES: list[tuple[Any, type]] = [
    *((kind, kind) for kind in (nn.ReLU, Leaf, Special, Tree, nn.Linear)),
    ("torch.nn.GELU", nn.GELU),
    ("torch.nn.modules.module.Module", nn.Module),
]


def several(values: list[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=2, unique_by=repr)


fields = st.fixed_dictionaries(
    {},
    optional={
        "op": several(OPS),
        "module": several(sorted(PATTERNS)),
        "type": several([kind for kind, _ in TYPES]),
        "parameter": several(sorted(PATTERNS)),
        "call": several([call for call, _ in CALLS]),
    },
).filter(lambda f: "parameter" not in f or {"params", "all"}.issuperset(f.get("op", [])))
# A class alone makes its calls sites, which have its name for an op.
CLASSES = ["Leaf", "Special"]
fields = fields.filter(
    lambda f: {"op", "parameter"} & {*f} or {Leaf, Special}.issuperset(f.get("type", []))
)


def holds(field: str, value: Any, site: fg.Site, model: nn.Module) -> bool:
    names = site.names
    owners = [name.rpartition(".")[0] for name in names] or [site.path]
    kinds = [type(model.get_submodule(owner)) for owner in owners]
    if field == "op":
        return site.op in GROUP.get(value, {value})
    if field == "module":
        return any(map(PATTERNS[value], owners))
    if field == "type":
        return any(issubclass(kind, dict(TYPES)[value]) for kind in kinds)
    if field == "parameter":
        return any(map(PATTERNS[value], names))
    return {repr(call): test for call, test in CALLS}[repr(value)](site.call)


def naive_decision(table: list[dict[str, Any]], site: fg.Site, model: nn.Module) -> int | None:
    """The documented precedence: of the entries all of whose fields hold, with any value each, the first."""
    for number, entry in enumerate(table):
        implied = {"parameter": ["params"], "type": CLASSES, "": ["activations"]}
        op = next(ops for field, ops in implied.items() if field in entry or not field)
        conditions = {"op": op, **entry}
        if all(any(holds(f, v, site, model) for v in vs) for f, vs in conditions.items()):
            return number
    return None


@given(model=models, table=st.lists(fields, min_size=1, max_size=5))
@settings(max_examples=100)
def test_the_entry_that_decides_is_that_of_a_naive_reading(
    model: nn.Module, table: list[dict[str, Any]]
) -> None:
    rules = fg.RuleTable(fg.on(**entry).backward("scale") for entry in table)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.FreegradWarning)
        plan = fg.explain(model, rules)
    for decision in plan.decisions:
        assert decision.entry == naive_decision(table, decision.site, model), decision.site
    decided = [naive_decision(table, d.site, model) for d in plan.decisions]
    matched = [
        sum(naive_decision([entry], d.site, model) is not None for d in plan.decisions)
        for entry in table
    ]
    assert plan.hits == tuple(decided.count(number) for number in range(len(table)))
    assert plan.meant == tuple(matched)
