"""A piece: one hand-made graph of Dynamo's, its sites at each place where it runs, and the rules of its parameters."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import freegrad_fx as fg
from freegrad_fx.dynamo.frames import Setting
from freegrad_fx.dynamo.pieces import Occurrence, Piece
from freegrad_fx.dynamo.programs import Program


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))


class Net(nn.Module):
    """Two equal blocks, whose code Dynamo compiles once."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1, self.layer10 = Block(), Block()


class Captured:
    """A graph as Dynamo captures it: each node knows the modules that are being called."""

    def __init__(self, *modules: nn.Module) -> None:
        self.graph = fx.Graph()
        self.stack = {str(id(m)): ("", type(m)) for m in modules}
        self.x = self.graph.placeholder("x")

    def call(self, target: Any, *args: Any, inside: nn.Module | None = None) -> fx.Node:
        node = self.graph.call_function(target, args)
        more = {} if inside is None else {str(id(inside)): ("", type(inside))}
        node.meta["nn_module_stack"] = {**self.stack, **more}
        return node

    def parameter(self, tensor: nn.Parameter) -> fx.Node:
        with self.graph.inserting_after(self.x):
            node = self.graph.placeholder("parameter")
        node.meta.update(grapharg=SimpleNamespace(example=tensor), example_value=tensor)
        return node

    def done(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule(nn.Module(), self.graph)


class Programs:
    """The programs of one backend."""

    def __init__(self, table: fg.RuleTable) -> None:
        self.table = table
        self.found: dict[nn.Module | None, Program] = {}

    def __call__(self, root: nn.Module | None) -> Program:
        if root not in self.found:
            self.found[root] = Program(root, type(root).__name__, self.table)
        return self.found[root]


def piece_of(
    gm: fx.GraphModule, setting: Setting, *entries: Any, before: Any = None, alone: bool = True
) -> Piece:
    table = fg.RuleTable(entries)
    return Piece(gm, table, setting, before or Counter(), Programs(table), alone)


def names(occurrence: Occurrence) -> list[str]:
    return [place.site.name for _, place, _ in occurrence.sites]


def relus(net: Net, count: int = 1) -> fx.GraphModule:
    """The graph of the first block: some activations of its own, then one of its part."""
    graph = Captured(net, net.layer1)
    value = graph.x
    for _ in range(count):
        value = graph.call(torch.relu, value)
    return graph.done(graph.call(torch.relu, value, inside=net.layer1.act))


def at(net: Net, *modules: nn.Module) -> Setting:
    return Setting(net, (net, *modules))


# --- names ---


def test_a_piece_names_its_sites_where_it_is_captured() -> None:
    net = Net()
    piece = piece_of(relus(net, 2), at(net, net.layer1), fg.on("relu").backward("scale"))
    here = piece.at(at(net, net.layer1), Counter())
    assert names(here) == ["layer1:relu[0]", "layer1:relu[1]", "layer1.act:relu[0]"]
    assert here.entries == piece.entries == (0, 0, 0)
    assert [decision.action for _, _, decision in here.sites] == ["rewrite"] * 3
    assert [decision.site for _, _, decision in here.sites] == [p.site for _, p, _ in here.sites]


def test_the_code_of_one_block_has_the_names_and_entries_of_another_where_it_runs_for_that() -> (
    None
):
    net = Net()
    entries = (
        fg.on("relu", module="layer1.*").backward("scale"),
        fg.on("relu", module="layer10*").backward("reverse"),
    )
    piece = piece_of(relus(net), at(net, net.layer1), *entries)
    assert piece.entries == (None, 0)
    there = piece.at(at(net, net.layer10), Counter())
    assert names(there) == ["layer10:relu[0]", "layer10.act:relu[0]"]
    assert there.entries == (1, 1)
    assert [decision.site.path for _, _, decision in there.sites] == ["layer10", "layer10.act"]


def test_a_site_outside_of_the_block_has_its_own_name_wherever_the_code_runs() -> None:
    net = Net()
    net.shared = nn.ReLU()
    graph = Captured(net, net.layer1)
    gm = graph.done(graph.call(torch.relu, graph.x, inside=net.shared))
    piece = piece_of(gm, at(net, net.layer1), fg.on("relu").backward("scale"))
    for block in (net.layer1, net.layer10):
        assert names(piece.at(at(net, block), Counter())) == ["shared:relu[0]"]


def test_call_indices_go_on_where_earlier_graphs_of_the_call_have_left_off() -> None:
    net = Net()
    table = fg.RuleTable([fg.on("relu", call=2).backward("scale")])
    programs = Programs(table)
    before = Counter({(programs(net), "layer1", "relu"): 2})
    setting = at(net, net.layer1)
    piece = Piece(relus(net), table, setting, before, programs, alone=True)
    assert piece.entries == (0, None)
    here = piece.at(setting, before)
    assert names(here) == ["layer1:relu[2]", "layer1.act:relu[0]"]
    assert here.entries == (0, None)
    assert here.counts == {
        (programs(net), "layer1", "relu"): 1,
        (programs(net), "layer1.act", "relu"): 1,
    }
    assert piece.at(setting, Counter()).entries == (None, None)


def test_an_occurrence_is_made_once_for_each_place_and_count() -> None:
    net = Net()
    table = fg.RuleTable([fg.on("relu").backward("scale")])
    programs = Programs(table)
    setting = at(net, net.layer1)
    piece = Piece(relus(net), table, setting, Counter(), programs, alone=True)
    once = piece.at(setting, Counter())
    other = Counter({(programs(net), "head", "relu"): 5})
    mine = Counter({(programs(net), "layer1.act", "relu"): 1})
    assert piece.at(setting, Counter()) is once
    assert names(piece.at(setting, other)) == names(once)
    assert piece.at(setting, mine) is piece.at(setting, mine) is not once
    assert names(piece.at(setting, mine)) == ["layer1:relu[0]", "layer1.act:relu[1]"]
    assert piece.at(at(net, net.layer10), Counter()) is not once


# --- rules ---


def test_the_rewritten_graph_has_the_rules() -> None:
    net = Net()
    gm = relus(net)
    piece_of(gm, at(net, net.layer1), fg.on("relu", module="layer1").backward("scale", s=3.0))
    x = torch.tensor([1.0, -1.0], requires_grad=True)
    (output,) = gm(x)
    output.sum().backward()
    assert output.tolist() == [1.0, 0.0]
    assert x.grad is not None
    assert x.grad.tolist() == [3.0, 0.0]  # of the part, the own backward


def test_a_site_inside_of_a_transform_is_skipped_and_one_behind_it_is_not() -> None:
    net = Net()
    graph = Captured(net, net.layer1)

    def _vmap_increment_nesting(x: Any) -> Any:
        return x

    def _vmap_decrement_nesting(x: Any) -> Any:
        return x

    value = graph.call(torch.relu, graph.x)
    value = graph.call(_vmap_increment_nesting, value)
    value = graph.call(torch.relu, value)
    value = graph.call(_vmap_decrement_nesting, value)
    gm = graph.done(graph.call(torch.relu, value))
    piece = piece_of(gm, at(net, net.layer1), fg.on("relu").backward("scale"))
    decisions = [d for _, _, d in piece.at(at(net, net.layer1), Counter()).sites]
    assert [d.action for d in decisions] == ["rewrite", "skip", "rewrite"]
    assert decisions[1].entry == 0
    assert "inside of a transform of torch.func" in decisions[1].reason
    assert piece.entries == (0, 0, 0)


# --- parameters ---


def product(net: Net, written: bool = False) -> fx.GraphModule:
    """The first block multiplies its input by its parameter."""
    graph = Captured(net, net.layer1)
    weight = graph.parameter(net.layer1.weight)
    gm = graph.call(torch.mul, graph.x, weight)
    if written:
        graph.graph.call_method("mul_", (weight, 1.0))
    return graph.done(gm)


ON_WEIGHTS = fg.on(parameter="*.weight").backward("scale", s=5.0)


def gradient(run: Any, weight: Tensor) -> list[float]:
    (found,) = torch.autograd.grad(run(weight).sum(), weight)
    return found.tolist()


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_the_rule_of_a_parameter_is_in_the_graph_if_no_other_graph_can_use_it(
    alone: bool, written: bool
) -> None:
    net = Net()
    piece = piece_of(product(net, written), at(net, net.layer1), ON_WEIGHTS, alone=alone)
    here = piece.at(at(net, net.layer1), Counter())
    assert names(here) == ["layer1.weight"]
    assert here.parameters == {(piece.program, "layer1.weight"): alone or written}


@pytest.mark.parametrize("alone", [False, True])
def test_the_rule_of_a_parameter_acts_once_in_the_graph_or_on_its_inputs(alone: bool) -> None:
    net = Net()
    gm = product(net)
    piece = piece_of(gm, at(net, net.layer1), ON_WEIGHTS, alone=alone)
    x, weight = torch.tensor([1.0, 2.0]), net.layer1.weight
    assert gradient(lambda w: gm(x, w)[0], weight) == ([5.0, 10.0] if alone else [1.0, 2.0])
    found = gradient(lambda w: gm(*piece.decouple([x, w], {}))[0], weight)
    assert found == [5.0, 10.0]


def test_graphs_of_one_call_share_what_the_rule_makes_of_a_parameter_in_one_version() -> None:
    net = Net()
    pieces = [
        piece_of(product(net), at(net, net.layer1), ON_WEIGHTS, alone=False) for _ in range(2)
    ]
    x, weight, known = torch.ones(2), net.layer1.weight, {}
    first, again = (piece.decouple([x, weight], known) for piece in pieces)
    assert first[0] is x
    assert again[1] is first[1] is not weight
    with torch.no_grad():
        weight.mul_(2)
    assert pieces[0].decouple([x, weight], known)[1] is not first[1]
    assert pieces[0].decouple([x, weight], {})[1] is not first[1]
    with torch.no_grad():
        assert pieces[0].decouple([x, weight], known)[1] is weight  # nothing for a rule to act on


def test_the_parameter_of_another_block_has_its_own_name() -> None:
    net = Net()
    entry = fg.on(parameter="layer1.weight").backward("scale")
    piece = piece_of(product(net), at(net, net.layer1), entry)
    there = piece.at(at(net, net.layer10), Counter())
    assert (names(there), there.entries, piece.entries) == (["layer10.weight"], (None,), (0,))


def test_a_frozen_parameter_is_compiled_again_once_it_is_trained() -> None:
    net = Net()
    net.layer1.weight.requires_grad_(False)
    piece = piece_of(product(net), at(net, net.layer1), ON_WEIGHTS)
    here = piece.at(at(net, net.layer1), Counter())
    ((_, _, decision),) = here.sites
    assert (decision.action, decision.entry) == ("native", 0)
    assert decision.reason.endswith("compiled again once it is trained")
    assert here.parameters == {}


def test_a_function_outside_of_modules_has_a_program_of_its_own() -> None:
    graph = Captured()
    gm = graph.done(graph.call(torch.relu, graph.x))
    piece = piece_of(gm, Setting(None, ()), fg.on("relu").backward("scale"))
    assert piece.program.root is None
    assert names(piece.at(Setting(None, ()), Counter())) == ["<root>:relu[0]"]
