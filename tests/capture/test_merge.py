"""`merge`: the graphs of train and eval mode, made by hand, and what it makes of their differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten

from freegrad_fx._torch.graphs import with_structures
from freegrad_fx.capture.merge import Exported, FlagRead, merge
from freegrad_fx.graph.provenance import META, Origin, origin

ATEN = torch.ops.aten
DROP, RELU, TANH, ADD = ATEN.dropout.default, ATEN.relu.default, ATEN.tanh.default, ATEN.add_.Tensor


class Builder:
    """Makes the graph of one mode, line by line."""

    def __init__(self, **parts: Any) -> None:
        self.graph = fx.Graph()
        self.parts = parts
        self.x = self.graph.placeholder("x")

    def call(self, target: Any, *args: Any, owner: str = "", **kwargs: Any) -> fx.Node:
        return self._owned(self.graph.call_function(target, args, kwargs), owner)

    def get(self, name: str, owner: str = "") -> fx.Node:
        return self._owned(self.graph.create_node("get_attr", name), owner)

    def module(self, name: str, *args: Any, owner: str = "") -> fx.Node:
        return self._owned(self.graph.create_node("call_module", name, args), owner)

    def done(self, *outputs: Any) -> Exported:
        self.graph.output(outputs)
        self.graph.lint()
        return Exported(self.graph, self.parts)

    def _owned(self, node: fx.Node, owner: str) -> fx.Node:
        node.meta[META] = Origin(owner)
        return node


def lines(exported: Exported) -> list[str]:
    """The calls and reads of a graph as text."""
    return [
        f"{node.target}{node.args}" if node.op == "call_function" else str(node.target)
        for node in exported.graph.nodes
        if node.op not in ("placeholder", "output")
    ]


def pair(owner: str, train: Any, evaluation: Any, target: Any = DROP) -> tuple[Exported, Exported]:
    """One call in both modes, with other last arguments."""
    found = []
    for last in (train, evaluation):
        graph = Builder()
        found.append(graph.done(graph.call(target, graph.x, 0.5, last, owner=owner)))
    return found[0], found[1]


# --- equal graphs, and flags ---


def test_equal_graphs_are_valid_in_every_mode_and_not_changed() -> None:
    train, evaluation = pair("drop", True, True)
    assert merge(train, evaluation, []) == []
    assert lines(train) == lines(evaluation) == ["aten.dropout.default(x, 0.5, True)"]


@pytest.mark.parametrize(
    ("owner", "flag", "name"),
    [
        ("", "training", "training"),
        ("drop", "drop.training", "drop_training"),
        ("layer1.0.drop", "layer1.0.drop.training", "layer1_0_drop_training"),
    ],
)
def test_a_constant_that_is_true_in_train_mode_only_becomes_a_read_of_its_owners_flag(
    owner: str, flag: str, name: str
) -> None:
    train, evaluation = pair(owner, True, False)
    assert merge(train, evaluation, [FlagRead(owner, owner, users=False)]) == []
    expected = [flag, f"aten.dropout.default(x, 0.5, {name})"]
    assert lines(train) == lines(evaluation) == expected
    for exported in (train, evaluation):
        reads = [node for node in exported.graph.nodes if node.op == "get_attr"]
        assert [origin(node).owner for node in reads] == [owner]
        exported.graph.lint()


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [
        (False, True),
        (True, 0),
        (1, False),
        (1, 0),
        (0.1, 0.0),
        (True, None),
        (True, 1),
        (1.0, 1),
        ("a", "b"),
    ],
)
def test_other_constants_that_differ_are_not_flags(train: Any, evaluation: Any) -> None:
    exported = pair("drop", train, evaluation)
    assert merge(*exported, []) == ["drop"]
    assert [lines(one) for one in exported] == [
        [f"aten.dropout.default(x, 0.5, {constant!r})"] for constant in (train, evaluation)
    ]


def test_a_flag_beside_another_difference_stays_a_constant() -> None:
    graphs = []
    for rate, training in ((0.5, True), (0.1, False)):
        graph = Builder()
        graphs.append(graph.done(graph.call(DROP, graph.x, rate, training, owner="drop")))
    assert merge(graphs[0], graphs[1], []) == ["drop"]
    assert lines(graphs[1]) == ["aten.dropout.default(x, 0.1, False)"]


def test_a_constant_that_is_returned_is_not_a_flag_of_a_module() -> None:
    graphs = []
    for training in (True, False):
        graph = Builder()
        graph.graph.output(training)
        graphs.append(Exported(graph.graph))
    assert merge(graphs[0], graphs[1], []) == [""]


def test_nested_arguments_and_keywords_have_to_be_equal() -> None:
    def exported(sizes: list[int], **kwargs: Any) -> Exported:
        graph = Builder()
        return graph.done(graph.call(ATEN.zeros.default, sizes, owner="part", **kwargs))

    assert merge(exported([1, 2]), exported([1, 2]), []) == []
    assert merge(exported([1, 2], pin_memory=None), exported([1, 2], pin_memory=None), []) == []
    assert merge(exported([1, 2]), exported([1, 3]), []) == ["part"]
    assert merge(exported([1, 2]), exported([1, 2, 3]), []) == ["part"]
    assert merge(exported([1], pin_memory=True), exported([1], pin_memory=False), []) == ["part"]
    assert merge(exported([1], pin_memory=None), exported([1]), []) == ["part"]


def test_a_different_number_of_arguments_is_a_difference() -> None:
    graphs = []
    for more in ((), (1,)):
        graph = Builder()
        graphs.append(graph.done(graph.call(RELU, graph.x, *more, owner="part")))
    assert merge(graphs[0], graphs[1], []) == ["part"]


def test_arguments_that_correspond_are_compared_by_that_and_not_by_name() -> None:
    def exported(first: str, swapped: bool) -> Exported:
        graph = Builder()
        a = graph.call(RELU, graph.x, owner="a")
        a.name = first
        b = graph.call(TANH, graph.x, owner="b")
        return graph.done(graph.call(ATEN.sub.Tensor, *((b, a) if swapped else (a, b)), owner="c"))

    assert merge(exported("one", swapped=False), exported("two", swapped=False), []) == []
    assert merge(exported("one", swapped=False), exported("one", swapped=True), []) == ["c"]


# --- branches ---


def branching(owner: str, *following: str) -> tuple[Exported, Exported]:
    """A relu in train mode and a tanh in eval mode, followed by equal calls."""
    found = []
    for target in (RELU, TANH):
        graph = Builder()
        value = graph.call(target, graph.x, owner=owner)
        for owner_of_next in following:
            value = graph.call(ATEN.sin.default, value, owner=owner_of_next)
        found.append(graph.done(value))
    return found[0], found[1]


def test_the_owner_of_code_that_differs_is_named_and_the_rest_is_not() -> None:
    assert merge(*branching("layer1", "layer2"), []) == ["layer1"]


@pytest.mark.parametrize(("mode", "differing"), [("eval", ["b"]), ("train", ["b", "c"])])
def test_code_of_one_mode_alone_is_a_difference_of_its_owner(
    mode: str, differing: list[str]
) -> None:
    graphs = []
    for here in ("train", "eval"):
        graph = Builder()
        value = graph.call(RELU, graph.x, owner="a")
        if here == mode:
            value = graph.call(TANH, value, owner="b")
        graphs.append(graph.done(graph.call(ATEN.sin.default, value, owner="c")))
    # in the train graph `c` reads a node that has no counterpart, which is a difference of `c` too
    assert merge(graphs[0], graphs[1], []) == differing


def test_equal_calls_of_different_owners_are_a_difference_of_both() -> None:
    graphs = []
    for owner in ("a", "b"):
        graph = Builder()
        graphs.append(graph.done(graph.call(RELU, graph.x, owner=owner)))
    assert merge(graphs[0], graphs[1], []) == ["a", "b"]


def test_flags_after_a_branch_are_still_read() -> None:
    graphs = []
    for target, training in ((RELU, True), (TANH, False)):
        graph = Builder()
        value = graph.call(target, graph.x, owner="branch")
        graphs.append(graph.done(graph.call(DROP, value, 0.5, training, owner="drop")))
    assert merge(graphs[0], graphs[1], []) == ["branch"]
    assert lines(graphs[0])[1:] == [
        "drop.training",
        "aten.dropout.default(relu_default, 0.5, drop_training)",
    ]
    assert lines(graphs[1])[1:] == [
        "drop.training",
        "aten.dropout.default(tanh_default, 0.5, drop_training)",
    ]


@pytest.mark.parametrize(
    ("reader", "owner", "concerned"),
    [
        ("layer1", "layer1", True),
        ("layer1", "layer1.0.act", True),  # it calls the part, or does not
        ("layer1", "layer10", False),
        ("layer1", "layer10.0", False),
        ("layer10", "layer1", False),
        ("layer1.0", "layer1", False),
        ("layer1", "head.layer1", False),
        ("", "layer1", True),  # the root contains everything
        (None, "layer1", True),  # code outside of the modules, which can be called from anywhere
    ],
)
def test_a_branch_concerns_the_code_in_the_module_that_reads_the_flag(
    reader: str | None, owner: str, concerned: bool
) -> None:
    reads = [FlagRead(reader, "switch", users=True)]
    assert merge(*branching(owner), reads) == sorted([owner, *["switch"] * concerned])


def test_flags_that_pytorch_reads_do_not_decide_branches() -> None:
    assert merge(*branching("layer1"), [FlagRead("layer1", "switch", users=False)]) == ["layer1"]


def test_a_flag_is_named_only_if_code_differs() -> None:
    for exported in (pair("drop", True, True), pair("drop", True, False)):
        assert merge(*exported, [FlagRead("", "", users=True)]) == []


def test_paths_are_sorted_and_named_once() -> None:
    reads = [FlagRead("b", "a", users=True), FlagRead("b", "b", users=True)]
    assert merge(*branching("b"), reads) == ["a", "b"]


# --- flags of others ---


@pytest.mark.parametrize(
    ("reader", "constant"), [("drop", True), (None, True), ("other", False), ("", False)]
)
def test_a_constant_of_a_module_that_reads_flags_of_others_stays_a_constant(
    reader: str | None, constant: bool
) -> None:
    train, evaluation = pair("drop", True, False)
    differing = merge(train, evaluation, [FlagRead(reader, "switch", users=False)])
    assert differing == (["drop"] if constant else [])
    assert ("drop.training" in lines(train)) == (not constant)


def test_a_module_that_reads_its_own_flag_can_keep_one_graph() -> None:
    train, evaluation = pair("drop", True, False)
    assert merge(train, evaluation, [FlagRead("drop", "drop", users=True)]) == []


# --- counters ---


def counting(mode: bool, owner: str = "bn", amount: Any = 1, reads: bool = True) -> Exported:
    graph = Builder()
    counter = graph.get(f"{owner}.num_batches_tracked", owner) if mode or reads else None
    if mode:
        graph.call(ADD, counter, amount, owner=owner)
    return graph.done(graph.call(RELU, graph.x, owner="act"))


def test_the_counter_of_a_batch_norm_is_in_both_graphs_and_adds_the_flag() -> None:
    train, evaluation = counting(True), counting(False)
    assert merge(train, evaluation, []) == []
    assert (
        lines(train)
        == lines(evaluation)
        == [
            "bn.num_batches_tracked",
            "bn.training",
            "aten.add_.Tensor(bn_num_batches_tracked, bn_training)",
            "aten.relu.default(x,)",
        ]
    )
    for exported in (train, evaluation):
        (added,) = [node for node in exported.graph.nodes if node.target is ADD]
        assert origin(added).owner == "bn"
        exported.graph.lint()


def test_each_counter_has_the_flag_of_its_layer() -> None:
    graphs = []
    for mode in (True, False):
        graph = Builder()
        for owner in ("layer1", "layer10"):
            counter = graph.get(f"{owner}.num_batches_tracked", owner)
            if mode:
                graph.call(ADD, counter, 1, owner=owner)
        graphs.append(graph.done(graph.x))
    assert merge(graphs[0], graphs[1], []) == []
    for one in graphs:
        assert [line for line in lines(one) if "add_" in line] == [
            "aten.add_.Tensor(layer1_num_batches_tracked, layer1_training)",
            "aten.add_.Tensor(layer10_num_batches_tracked, layer10_training)",
        ]


def test_a_counter_that_eval_mode_does_not_read_is_not_added_there() -> None:
    train, evaluation = counting(True), counting(False, reads=False)
    assert merge(train, evaluation, []) == ["bn"]  # the read of the buffer
    assert lines(evaluation) == ["aten.relu.default(x,)"]


def test_another_amount_or_buffer_is_a_difference() -> None:
    assert merge(counting(True, amount=2), counting(False), []) == ["bn"]

    def exported(mode: bool) -> Exported:
        graph = Builder()
        counter = graph.get("bn.calls", "bn")
        if mode:
            graph.call(ADD, counter, 1, owner="bn")
        return graph.done(graph.x)

    assert merge(exported(True), exported(False), []) == ["bn"]


def test_a_counter_whose_result_is_used_is_a_difference() -> None:
    graphs = []
    for mode in (True, False):
        graph = Builder()
        counter = graph.get("bn.num_batches_tracked", "bn")
        graphs.append(graph.done(graph.call(ADD, counter, 1, owner="bn") if mode else counter))
    assert "bn" in merge(graphs[0], graphs[1], [])


# --- constants and regions that the exports named ---


def reading(constant: Any, name: str = "lifted", owner: str = "part") -> Exported:
    graph = Builder(**{name: constant})
    return graph.done(graph.call(ATEN.mul.Tensor, graph.x, graph.get(name, owner), owner=owner))


@pytest.mark.parametrize(
    ("train", "evaluation", "differing"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), []),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]), ["part"]),
        (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]]), ["part"]),
        (torch.tensor([1.0, 2.0]), torch.tensor([1, 2]), ["part"]),
        (torch.empty(0), torch.empty(0), []),
    ],
    ids=["equal", "value", "shape", "dtype", "empty"],
)
def test_constants_correspond_by_what_they_hold(
    train: Tensor, evaluation: Tensor, differing: list[str]
) -> None:
    assert merge(reading(train, "lifted_0"), reading(evaluation, "lifted_7"), []) == differing
    assert merge(reading(train), reading(evaluation), []) == differing


def test_tensors_of_the_model_correspond_by_name() -> None:
    def exported(name: str) -> Exported:
        graph = Builder()
        return graph.done(graph.get(name, "part"))

    assert merge(exported("part.a"), exported("part.a"), []) == []
    assert "part" in merge(exported("part.a"), exported("part.b"), [])


def region(target: Any) -> fx.GraphModule:
    graph = Builder()
    inside = graph.call(target, graph.x)
    graph.graph.output(inside)
    return fx.GraphModule(nn.Module(), graph.graph)


def test_regions_correspond_by_their_nodes() -> None:
    def exported(target: Any, name: str) -> Exported:
        graph = Builder(**{name: region(target)})
        return graph.done(graph.module(name, graph.x, owner="part"))

    assert merge(exported(RELU, "region_0"), exported(RELU, "region_1"), []) == []
    assert merge(exported(RELU, "region_0"), exported(TANH, "region_0"), []) == ["part"]


def test_checks_of_inputs_correspond_if_they_are_equal() -> None:
    def exported(*checks: str) -> Exported:
        guards = nn.Module()
        guards.checks = checks
        graph = Builder(guards=guards)
        graph.module("guards", graph.x)
        return graph.done(graph.x)

    assert merge(exported("a", "b"), exported("a", "b"), []) == []
    assert merge(exported("a", "b"), exported("a"), []) == [""]


# --- inputs and outputs ---


def test_graphs_with_other_structures_of_outputs_differ_in_the_root() -> None:
    def exported(output: Any) -> Exported:
        graph = Builder()
        done = graph.done(graph.call(RELU, graph.x, owner="act"))
        specs = tree_flatten(((1,), {}))[1], tree_flatten(output)[1]
        done.graph.set_codegen(with_structures(["x"], *specs))
        return done

    assert merge(exported([1]), exported([1]), []) == []
    assert merge(exported([1]), exported({"y": 1}), []) == [""]
    assert merge(exported([1]), exported((1,)), [FlagRead("", "switch", users=True)]) == [
        "",
        "switch",
    ]
