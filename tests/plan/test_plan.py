"""`make_plan`: the decision for each site of hand-made graphs, and what the plan counts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import freegrad_fx as fg
from freegrad_fx.capture import Capture
from freegrad_fx.capture.captured import Variant
from freegrad_fx.graph.provenance import META, Origin
from freegrad_fx.plan import Decision, Plan, PlanDiff, make_plan
from freegrad_fx.plan.decision import backward_of, site_as_dict
from freegrad_fx.sites.remarks import Lost, Opaque
from freegrad_fx.sites.site import LocatedOperation, Site

# --- hand-made captures ---


class Root(nn.Module):
    """A linear layer, an activation and a part, which the graphs below call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(2, 2)
        self.layer10 = nn.Linear(2, 2)
        self.act = nn.ReLU()
        self.part = nn.Module()


def graph_of(*calls: tuple[Any, str]) -> fx.Graph:
    """A chain of calls, each with the path of its owner; the target of a module call is text."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for target, owner in calls:
        if isinstance(target, str):
            value = graph.call_module(target, (value,))
        else:
            value = graph.call_function(target, (value,))
        value.meta[META] = Origin(owner, f"net.py:{len(graph.nodes)}")
    graph.output(value)
    return graph


def captured(*graphs: fx.Graph, root: nn.Module | None = None, **fields: Any) -> Capture:
    """Graphs of a model; the first of two is for train mode, the second for eval mode."""
    flags: Sequence[dict[str, bool]] = [{"": True}, {"": False}] if len(graphs) == 2 else [{}]
    variants = tuple(Variant(f, g) for f, g in zip(flags, graphs, strict=True))
    return Capture(root or Root(), "Net", variants, **fields)


def planned(capture: Capture, *entries: Any, **options: Any) -> Plan:
    plan, decided = make_plan(capture, fg.RuleTable(entries), **options)
    assert len(decided) == len(capture.variants)
    return plan


def outcomes(plan: Plan) -> list[tuple[Any, ...]]:
    """Of each decision: site, action, rules, entry."""
    return [
        (d.site.name, d.action, [rule.name for rule in d.rules], d.entry) for d in plan.decisions
    ]


def reason(plan: Plan, name: str) -> str:
    (decision,) = [d for d in plan.decisions if d.site.name == name]
    return decision.reason


CHAIN = ((torch.relu, "part"), (torch.tanh, "part"), (torch.relu, "part"), ("act", "act"))

# --- entries ---


def test_the_first_entry_that_matches_decides() -> None:
    plan = planned(
        captured(graph_of(*CHAIN)),
        fg.on("relu", module="part", call=1).backward("reverse"),
        fg.on("relu").backward("scale"),
        fg.on("tanh").backward(None),
        fg.on("activations").backward("reverse"),
    )
    assert outcomes(plan) == [
        ("part:relu[0]", "rewrite", ["scale"], 1),
        ("part:tanh[0]", "native", [], 2),
        ("part:relu[1]", "rewrite", ["reverse"], 0),
        ("act:relu[0]", "rewrite", ["scale"], 1),
    ]
    assert reason(plan, "part:relu[0]") == "matches relu"
    assert reason(plan, "part:tanh[0]") == "tanh = None"


def test_a_site_that_no_entry_matches_is_native() -> None:
    plan = planned(captured(graph_of(*CHAIN)), fg.on("tanh").backward("scale"))
    assert outcomes(plan)[0] == ("part:relu[0]", "native", [], None)
    assert reason(plan, "part:relu[0]") == "no entry matches"


def test_the_rules_and_the_forward_of_the_entry_are_those_of_the_decision() -> None:
    both = fg.compose("scale", "reverse")
    entry = fg.on("relu", forward="tanh").backward(both)
    (decision,) = planned(captured(graph_of((torch.relu, ""))), entry).decisions
    assert decision.rules == (fg.get("scale"), fg.get("reverse"))
    assert decision.forward == "tanh"
    assert decision.site == Site(
        kind="operation",
        op="relu",
        path="",
        call=0,
        spelling="torch.relu",
        source="net.py:2",
        type=f"{__name__}.Root",
    )


def test_the_decisions_of_the_graph_are_those_of_the_plan() -> None:
    capture = captured(graph_of(*CHAIN))
    plan, (pairs,) = make_plan(capture, fg.RuleTable.of({"relu": "scale"}))
    assert [decision for _, decision in pairs] == list(plan.decisions)
    nodes = [place.node for place, _ in pairs if isinstance(place, LocatedOperation)]
    assert nodes == [n for n in capture.variants[0].graph.nodes if "call" in n.op]


# --- counts per entry ---


def test_each_entry_counts_the_sites_it_decides_and_those_it_matches() -> None:
    plan = planned(
        captured(graph_of(*CHAIN)),
        fg.on("relu", module="part").backward("scale"),
        fg.on("activations").backward("reverse"),
        fg.on("tanh").backward("scale"),
        fg.on("gelu").backward("scale"),
    )
    assert plan.hits == (2, 2, 0, 0)
    assert plan.meant == (2, 4, 1, 0)
    assert plan.unmatched == (plan.table.entries[3],)
    assert plan.shadowed == (plan.table.entries[2],)


def test_a_site_of_two_graphs_counts_once() -> None:
    graphs = graph_of(*CHAIN), graph_of(*CHAIN)
    plan = planned(captured(*graphs), fg.on("relu").backward("scale"))
    assert plan.hits == plan.meant == (3,)
    assert [d.modes for d in plan.decisions] == ["", "", "", ""]


def test_parameters_count_for_their_entries() -> None:
    capture = captured(graph_of(("layer1", "layer1"), ("layer10", "layer10")))
    plan = planned(
        capture,
        fg.on(parameter="layer1.*").backward("scale"),
        fg.on(parameter="*.weight").backward("reverse"),
        fg.on("params").backward(None),
    )
    assert outcomes(plan) == [
        ("layer1.weight", "rewrite", ["scale"], 0),
        ("layer1.bias", "rewrite", ["scale"], 0),
        ("layer10.weight", "rewrite", ["reverse"], 1),
        ("layer10.bias", "native", [], 2),
    ]
    assert plan.hits == (2, 1, 1)
    assert plan.meant == (2, 2, 4)


def test_an_entry_that_gets_a_part_of_its_sites_says_which_entries_decide_the_others() -> None:
    plan = planned(
        captured(graph_of(("layer1", "layer1"), ("layer10", "layer10"))),
        fg.on(parameter="layer1.bias").backward("scale"),
        fg.on(parameter="layer1.*").backward("scale"),
        fg.on("params").backward("reverse"),
        fg.on(parameter="*.bias").backward(None),
    )
    assert plan.hits == (1, 1, 2, 0)
    assert plan.meant == (1, 2, 4, 2)
    assert [line.partition(": ")[2] for line in str(plan).splitlines() if "Entry" in line] == [
        "1 site.",
        "1 site; 1 more matched, decided by entry 1.",
        "2 sites; 2 more matched, decided by entries 1, 2.",
        "no site; 2 matched, all decided by entries 1, 3.",
    ]
    taken = [entry["decided_by"] for entry in plan.to_dict()["entries"]]
    assert taken == [{}, {0: 1}, {0: 1, 1: 1}, {0: 1, 2: 1}]


CLIP, ROUND = fg.rules.clip_norm(max_norm=1.0), fg.rules.scale(s=2.0)


@pytest.mark.parametrize(
    ("entries", "late"),
    [
        ([fg.on("params").backward(CLIP), fg.on(parameter="*.weight").backward(ROUND)], True),
        ([fg.on(parameter="*.weight").backward(CLIP), fg.on("params").backward(ROUND)], False),
        ([fg.on("params").backward(CLIP), fg.on(parameter="*").backward(ROUND)], False),
        (
            [
                fg.on(parameter="layer1.*").backward(CLIP),
                fg.on(parameter="layer10.*").backward(CLIP),
                fg.on("params").backward(ROUND),  # what is left for other models
            ],
            False,
        ),
    ],
    ids=["narrower", "wider", "the same", "a rest of none"],
)
def test_an_entry_after_a_wider_one_is_a_warning(entries: list[Any], late: bool) -> None:
    layers = {"layer1": nn.Linear(2, 2), "layer10": nn.Linear(2, 2)}
    model, table = nn.Sequential(OrderedDict(layers)), fg.RuleTable(entries)
    words = "'parameter=.*weight' has no effect: the entry 'params' comes before it and decides all"
    if not late:
        assert fg.explain(model, table, strict=True).misplaced == {}
        return
    with pytest.warns(fg.FreegradWarning, match=words):
        fg.transform(model, table)
    with pytest.raises(fg.PlanError, match=f"strict: .*{words}"):
        fg.explain(model, table, strict=True)
    compiled = fg.compile(model, table, backend="eager")
    with pytest.warns(fg.FreegradWarning, match=words):
        compiled(torch.ones(3, 2))


# --- modes ---


def test_a_site_of_one_mode_has_its_name_and_operations_come_before_parameters() -> None:
    train = graph_of((torch.relu, ""), ("layer1", "layer1"))
    evaluation = graph_of(("layer1", "layer1"), (torch.tanh, ""), (torch.relu, ""))
    entries = fg.on("activations").backward("scale"), fg.on("params").backward("reverse")
    plan = planned(captured(train, evaluation), *entries)
    assert [(d.site.name, d.modes) for d in plan.decisions] == [
        ("<root>:relu[0]", "train"),  # at another line in the other graph
        ("<root>:tanh[0]", "eval"),
        ("<root>:relu[0]", "eval"),
        ("layer1.weight", ""),
        ("layer1.bias", ""),
        ("layer10.weight", ""),
        ("layer10.bias", ""),
    ]


# --- parameters ---


def linear(**options: Any) -> Plan:
    capture = captured(graph_of(("layer1", "layer1"), (torch.relu, "")))
    return planned(capture, fg.on("relu").backward("scale"), **options)


def test_parameters_are_listed_only_if_something_can_select_them() -> None:
    everything = ["<root>:relu[0]", *(name for name, _ in Root().named_parameters())]
    assert [d.site.name for d in linear().decisions] == everything[:1]
    assert [d.site.name for d in linear(parameters=True).decisions] == everything
    assert [d.site.name for d in linear(ambient=True).decisions] == everything
    assert [d.site.name for d in linear(ambient_before={"gone"}).decisions] == everything


def test_a_parameter_that_no_graph_uses_is_native_or_skipped() -> None:
    capture = captured(graph_of(("layer1", "layer1")))
    plan = planned(capture, fg.on(parameter="*.bias").backward("scale"))
    assert outcomes(plan) == [
        ("layer1.weight", "native", [], None),
        ("layer1.bias", "rewrite", ["scale"], 0),
        ("layer10.weight", "native", [], None),
        ("layer10.bias", "skip", [], 0),
    ]
    assert reason(plan, "layer10.weight") == "no graph of the model uses it"
    assert reason(plan, "layer10.bias") == "no graph of the model uses it"
    assert plan.hits == plan.meant == (2,)


def test_a_frozen_parameter_is_native_unless_its_forward_is_replaced() -> None:
    root = Root()
    root.layer1.requires_grad_(False)
    capture = captured(graph_of(("layer1", "layer1")), root=root)
    weight, bias, *_ = planned(
        capture,
        fg.on(parameter="layer1.weight").backward("scale"),
        fg.on(parameter="layer1.bias", forward=torch.tanh).backward("scale"),
    ).decisions
    assert (weight.action, weight.entry, weight.frozen) == ("native", 0, True)
    assert weight.reason.startswith("it is frozen (requires_grad=False)")
    assert (bias.action, bias.entry, bias.frozen) == ("rewrite", 1, False)


def test_a_frozen_parameter_with_a_rule_that_cannot_act_is_an_error() -> None:
    root = Root()
    root.layer1.requires_grad_(False)
    capture = captured(graph_of(("layer1", "layer1")), root=root)
    fg.register("of_operations", kinds=("operation",))(lambda grad: grad)
    with pytest.raises(fg.PlanError, match="is for operation sites only"):
        planned(capture, fg.on("params").backward("of_operations"))


def test_a_parameter_of_operations_whose_forward_is_replaced_is_unused() -> None:
    class Slope(Root):
        def __init__(self) -> None:
            super().__init__()
            self.prelu = nn.PReLU()

    capture = captured(graph_of(("prelu", "prelu")), root=Slope())
    (site, slope, *_) = planned(
        capture,
        fg.on("prelu", forward="tanh").backward("scale"),
        fg.on(parameter="prelu.weight").backward("scale"),
    ).decisions
    assert (site.action, site.forward) == ("rewrite", "tanh")
    assert (slope.action, slope.entry) == ("skip", 1)
    assert slope.reason == "every operation that uses it has its forward replaced"
    (site, slope, *_) = planned(
        capture,
        fg.on("prelu").backward("scale"),
        fg.on(parameter="prelu.weight").backward("scale"),
    ).decisions
    assert (site.action, slope.action) == ("rewrite", "rewrite")


def test_a_parameter_that_one_operation_still_uses_keeps_its_rule() -> None:
    class Slope(Root):
        def __init__(self) -> None:
            super().__init__()
            self.prelu = nn.PReLU()

    capture = captured(graph_of(("prelu", "prelu"), ("prelu", "prelu")), root=Slope())
    plan = planned(
        capture,
        fg.on("prelu", call=0, forward="tanh").backward("scale"),
        fg.on(parameter="prelu.weight").backward("scale"),
    )
    assert outcomes(plan)[:3] == [
        ("prelu:prelu[0]", "rewrite", ["scale"], 0),
        ("prelu:prelu[1]", "native", [], None),
        ("prelu.weight", "rewrite", ["scale"], 1),
    ]


@pytest.mark.parametrize("forward", [None, torch.tanh])
def test_a_parameter_that_the_forward_writes_into_keeps_its_own_forward(forward: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.get_attr("layer1.weight")
    graph.call_method("mul_", (weight, 2))
    graph.output(graph.call_function(torch.add, (x, weight)))
    plan = planned(
        captured(graph), fg.on(parameter="layer1.weight", forward=forward).backward("scale")
    )
    expected = "rewrite" if forward is None else "skip"
    assert [d.action for d in plan.decisions if d.site.name == "layer1.weight"] == [expected]
    if forward is not None:
        assert "its own forward cannot be replaced" in reason(plan, "layer1.weight")


def test_a_parameter_that_a_lookup_renormalises_keeps_its_own_forward() -> None:
    class Words(Root):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(3, 2, max_norm=1.0)

    capture = captured(graph_of(("words", "words")), root=Words())
    entry = fg.on(parameter="words.weight", forward=torch.tanh).backward("scale")
    assert "its own forward cannot be replaced" in reason(planned(capture, entry), "words.weight")


# --- obstacles ---


def stopped() -> fx.Graph:
    """A relu whose input is detached already."""
    graph = fx.Graph()
    stop = graph.call_function(fg.ops.stop_gradient, (graph.placeholder("x"),))
    graph.output(graph.call_function(torch.relu, (stop,)))
    return graph


OBSTACLE = "its input is already detached from the autograd graph"


@pytest.mark.parametrize(
    ("rule", "action", "entry"), [("scale", "skip", 0), (None, "native", 0), ("", "native", None)]
)
def test_a_site_with_an_obstacle_is_skipped_only_if_it_would_get_a_rule(
    rule: Any, action: str, entry: int | None
) -> None:
    entries = () if rule == "" else (fg.on("relu").backward(rule),)
    (decision,) = planned(captured(stopped()), *entries).decisions
    assert (decision.action, decision.entry) == (action, entry)
    assert (decision.rules, decision.reason) == ((), OBSTACLE)


def test_an_obstacle_comes_before_the_checks_of_the_rule() -> None:
    fg.register("of_parameters", kinds=("parameter",))(lambda grad: grad)
    (decision,) = planned(captured(stopped()), fg.on("relu").backward("of_parameters")).decisions
    assert decision.action == "skip"


def identity(read: str, written: bool) -> Decision:
    class Same(Root):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Identity()

    graph = fx.Graph()
    x = graph.call_function(torch.sin, (graph.placeholder("x"),))
    y = graph.call_module("same", (x,))
    if written:
        graph.call_method("add_", (y, 1))
    graph.output(y if read == "result" else graph.call_function(torch.sin, (x,)))
    (decision,) = planned(
        captured(graph, root=Same()), fg.on("identity").backward("scale")
    ).decisions
    return decision


@pytest.mark.parametrize(
    ("read", "written", "action"),
    [
        ("result", False, "rewrite"),
        ("result", True, "skip"),  # it can be the input
        ("input", False, "rewrite"),
        ("input", True, "skip"),
    ],
)
def test_an_identity_whose_result_is_written_into_is_skipped_if_its_input_is_read(
    read: str, written: bool, action: str
) -> None:
    decision = identity(read, written)
    assert decision.action == action
    if action == "skip":
        assert (decision.entry, decision.rules) == (0, ())
        assert decision.reason.startswith("it can return its input itself")


# --- ambient ---


def test_ambient_concerns_activations_and_parameters_that_no_entry_decides() -> None:
    graph = graph_of((torch.relu, ""), (torch.tanh, ""), (torch.round, ""), ("layer1", "layer1"))
    plan = planned(
        captured(graph),
        fg.on("tanh").backward(None),
        fg.on(parameter="layer1.bias").backward("scale"),
        ambient=True,
    )
    assert outcomes(plan) == [
        ("<root>:relu[0]", "ambient", [], None),
        ("<root>:tanh[0]", "native", [], 0),
        ("<root>:round[0]", "native", [], None),  # a quantizer is not an activation
        ("layer1.weight", "ambient", [], None),
        ("layer1.bias", "rewrite", ["scale"], 1),
        ("layer10.weight", "native", [], None),  # no graph uses it
        ("layer10.bias", "native", [], None),
    ]
    assert reason(plan, "<root>:relu[0]") == "native outside of use() blocks"


def test_an_obstacle_keeps_a_site_from_being_ambient() -> None:
    (decision, *_) = planned(captured(stopped()), ambient=True).decisions
    assert (decision.action, decision.reason) == ("native", OBSTACLE)


def test_what_was_ambient_before_stays_so_unless_an_entry_decides_it() -> None:
    graph = graph_of((torch.relu, ""), (torch.round, ""), (torch.tanh, ""), ("layer1", "layer1"))
    relu, rounded, tanh, layer = (n for n in graph.nodes if "call" in n.op)
    plan = planned(
        captured(graph),
        fg.on("tanh").backward("scale"),
        ambient_before={rounded, tanh, layer, "layer1.bias"},
    )
    assert outcomes(plan)[:5] == [
        ("<root>:relu[0]", "native", [], None),
        ("<root>:round[0]", "ambient", [], None),
        ("<root>:tanh[0]", "rewrite", ["scale"], 0),
        ("layer1.weight", "native", [], None),
        ("layer1.bias", "ambient", [], None),
    ]
    assert relu not in {rounded, tanh, layer}


def test_an_ambient_decision_reads_both_tensors_and_others_what_their_rules_read() -> None:
    site = Site("operation", "relu", "", 0)
    assert Decision(site, "ambient").reads("x")
    assert Decision(site, "ambient").reads("y")
    of_x = Decision(site, "rewrite", (fg.get("scale"), fg.get("rectangular")(a=-1.0, b=1.0)))
    assert of_x.reads("x")
    assert not of_x.reads("y")
    assert not Decision(site, "native").reads("x")


# --- errors ---


@pytest.mark.parametrize(
    ("entry", "calls", "message"),
    [
        (
            fg.on("glu").backward("scale"),
            [(F.glu, "")],
            r"'scale' returns a gradient of the shape of the output.*\{'glu': None\}.*on\('glu', at='x'\)",
        ),
        (
            fg.on("relu", forward=nn.Tanh()).backward("scale"),
            [(torch.relu, "")],
            r"must be a function of a tensor, got the module Tanh\(\), at site <root>:relu\[0\]",
        ),
        (
            fg.on("relu", forward=nn.Tanh).backward("scale"),
            [(torch.relu, "")],
            "got the class .*Tanh",
        ),
        (
            fg.on("relu", forward=torch.tanh_).backward("scale"),
            [(torch.relu, "")],
            "tanh_ works in place",
        ),
        (
            fg.on("relu", forward=partial(F.elu, inplace=True)).backward("scale"),
            [(torch.relu, "")],
            "works in place",
        ),
    ],
    ids=["shape", "module", "class", "in place", "inplace=True"],
)
def test_a_rule_or_a_forward_that_cannot_act_is_an_error(
    entry: Any, calls: list[tuple[Any, str]], message: str
) -> None:
    with pytest.raises(fg.PlanError, match=message):
        planned(captured(graph_of(*calls)), entry)


def test_a_partial_without_inplace_and_a_function_of_the_user_can_be_forwards() -> None:
    def smooth_(x: Tensor) -> Tensor:  # only names of PyTorch's functions have a meaning
        return torch.tanh(x)

    x = torch.randn(5)
    for forward in (partial(F.elu, inplace=False), partial(partial(F.elu), alpha=2.0), smooth_):
        entry = fg.on("relu", forward=forward).backward("scale")
        (decision,) = planned(captured(graph_of((torch.relu, ""))), entry).decisions
        assert torch.equal(decision.forward(x), forward(x))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_sparse_gradient_needs_a_rule_that_takes_it(sparse: bool) -> None:
    class Words(Root):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(3, 2, sparse=True)

    fg.register("of_sparse", sparse=sparse)(lambda grad: grad)
    capture = captured(graph_of(("words", "words")), root=Words())
    entry = fg.on(parameter="words.weight").backward("of_sparse")
    if sparse:
        assert ("words.weight", "rewrite", ["of_sparse"], 0) in outcomes(planned(capture, entry))
    else:
        with pytest.raises(fg.PlanError, match=r"'of_sparse' cannot take the sparse gradient of "):
            planned(capture, entry)


def test_a_rule_of_the_output_must_come_first_and_needs_an_output() -> None:
    fg.register("of_y")(lambda grad, y: grad * y)
    graph = graph_of((torch.relu, ""), ("layer1", "layer1"))

    def plan(selection: Any, *rules: str) -> Plan:
        return planned(captured(graph), selection.backward(fg.compose(*rules)))

    assert outcomes(plan(fg.on("relu"), "of_y", "scale"))[0][1] == "rewrite"
    with pytest.raises(fg.PlanError, match="must come first in the composition; at site <root>"):
        plan(fg.on("relu"), "scale", "of_y")
    with pytest.raises(fg.PlanError, match=r"a parameter has no output; .* at site layer1\.bias"):
        plan(fg.on(parameter="layer1.bias"), "of_y", "scale")
    replaced = plan(fg.on(parameter="layer1.bias", forward=torch.tanh), "of_y", "scale")
    assert ("layer1.bias", "rewrite", ["of_y", "scale"], 0) in outcomes(replaced)


def test_a_rule_for_one_kind_of_site_is_refused_at_the_other() -> None:
    fg.register("of_parameters", kinds=("parameter",))(lambda grad: grad)
    with pytest.raises(fg.PlanError, match=r"for parameter sites only.*the operation <root>:relu"):
        planned(captured(graph_of((torch.relu, ""))), fg.on("relu").backward("of_parameters"))


# --- remarks ---


def test_opaque_calls_of_the_capture_come_first_and_are_not_listed_twice() -> None:
    class Attends(Root):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.GRUCell(2, 2)
            self.other = nn.RNNCell(2, 2)

    graphs = [
        graph_of(("attention", "attention"), ("other", "other"), ("act", "act")) for _ in range(2)
    ]
    noted = Opaque("attention", "GRUCell", "noted by the capture")
    capture = captured(*graphs, root=Attends(), opaque=(noted,))
    plan = planned(capture, leaf_modules=[nn.RNNCell])
    assert plan.opaque[0] == noted
    assert [(o.path, o.asked) for o in plan.opaque] == [("attention", False), ("other", True)]


def test_what_the_capture_has_lost_is_in_the_plan() -> None:
    noted = Lost("part", "a hook", "noted by the capture")
    graphs = graph_of(("act", "act")), graph_of(("act", "act"))
    plan = planned(captured(*graphs, root=Root(), lost=(noted,)), fg.on("relu").backward("scale"))
    assert plan.lost == (noted,)


# --- text and data ---

RELU = Site("operation", "relu", "part", 1, "torch.relu", "net.py:3")


@pytest.mark.parametrize(
    ("decision", "text"),
    [
        (Decision(RELU, "native", reason="no entry matches"), "native: no entry matches"),
        (Decision(RELU, "skip", reason="an obstacle"), "skip: an obstacle"),
        (Decision(RELU, "rewrite", (fg.get("scale"),)), "scale(s=1.0)"),
        (
            Decision(RELU, "rewrite", (fg.get("scale"), fg.get("reverse")), "tanh", modes="train"),
            "scale(s=1.0) → reverse(alpha=1.0), FORWARD tanh (in train only)",
        ),
    ],
)
def test_the_backward_of_a_decision_as_text(decision: Decision, text: str) -> None:
    assert backward_of(decision) == text


def test_a_decision_as_data() -> None:
    decision = Decision(
        RELU, "rewrite", (fg.get("scale")(s=2.0),), F.elu, 3, "matches relu", "eval"
    )
    data = site_as_dict(decision)
    assert data["site"] == "part:relu[1]"
    assert data["rules"] == [{"rule": "scale", "params": {"s": 2.0}}]
    assert data["forward"] == "elu"
    assert (data["path"], data["call"], data["entry"], data["modes"]) == ("part", 1, 3, "eval")


def of_sites(*decisions: Decision) -> Plan:
    return Plan("Net", decisions, fg.RuleTable())


BASE = Decision(RELU, "rewrite", (fg.get("scale"),), entry=0, reason="matches relu")


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda d: d, False),
        (lambda d: replace(d, entry=5, reason="matches another entry"), False),
        (lambda d: replace(d, rules=(fg.get("reverse"),)), True),
        (lambda d: replace(d, action="native", rules=()), True),
        (lambda d: replace(d, forward="tanh"), True),
    ],
    ids=["same", "entry", "rules", "action", "forward"],
)
def test_plans_differ_in_actions_rules_and_forwards(
    change: Callable[[Decision], Decision], differs: bool
) -> None:
    found = of_sites(BASE).diff(of_sites(change(BASE)))
    assert bool(found) == differs
    assert (len(found.changed), found.same) == (differs, not differs)


def test_plans_differ_in_the_reason_of_a_skip_but_not_of_a_native_site() -> None:
    for action, differs in (("skip", True), ("native", False)):
        one = Decision(RELU, action, reason="one reason")
        assert bool(of_sites(one).diff(of_sites(replace(one, reason="another")))) == differs


def test_a_native_parameter_that_a_plan_does_not_list_is_not_a_difference() -> None:
    weight = Site("parameter", "parameter", "layer1", 0, names=("layer1.weight",))
    native = of_sites(BASE, Decision(weight, "native"))
    ruled = of_sites(BASE, replace(BASE, site=weight))
    assert not of_sites(BASE).diff(native)
    assert not native.diff(of_sites(BASE))
    found: PlanDiff = of_sites(BASE).diff(ruled)
    assert ([d.site.name for d in found.added], found.removed) == (["layer1.weight"], ())
    found = ruled.diff(of_sites(BASE))
    assert ([d.site.name for d in found.removed], found.added) == (["layer1.weight"], ())


def test_sites_of_other_modes_or_calls_are_other_sites() -> None:
    for other in (replace(BASE, modes="train"), replace(BASE, site=replace(RELU, call=2))):
        found = of_sites(BASE).diff(of_sites(other))
        assert (found.removed, found.added, found.same) == ((BASE,), (other,), 0)
