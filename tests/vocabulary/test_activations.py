"""The vocabulary: every spelling of every activation is recognised, in every kind of graph, and nothing else is."""

from __future__ import annotations

import copy
import inspect
import math
import operator
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from freegrad_fx.vocabulary import (
    GROUPS,
    OPS,
    Op,
    Spelling,
    binarize,
    heaviside,
    recognise,
    ternarize,
)
from freegrad_fx.vocabulary.recognition import _index
from spellings import OUT_SPELLINGS, SPELLINGS, Spell, quick

NAMES = """\
    relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh hardshrink softshrink
    tanhshrink threshold softplus softsign sigmoid logsigmoid tanh softmax log_softmax softmin glu sign heaviside
    binarize ternarize quantize dorefa jump_relu round floor ceil trunc clamp clamp_min clamp_max abs identity
    sample_one_hot
""".split()  # noqa: SIM905


def by_id(spell: Spell) -> str:
    return spell.id


def recognised(graph_module: fx.GraphModule) -> list[tuple[fx.Node, Spelling]]:
    """Every activation in a graph."""
    found = []
    for node in graph_module.graph.nodes:
        calls = node.op == "call_module"
        spelling = recognise(node, graph_module.get_submodule(node.target) if calls else None)
        if spelling is not None:
            found.append((node, spelling))
    return found


def called(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Spelling | None:
    """What a node that calls `target` is taken for; `...` stands for a tensor of the graph."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    args = tuple(x if a is ... else a for a in args)
    kwargs = {k: x if a is ... else a for k, a in kwargs.items()}
    return recognise(graph.call_function(target, args, kwargs), None)


# --- the table ---


def test_every_activation_of_the_contract_has_a_line() -> None:
    assert {name for name, op in OPS.items() if not op.on_demand} >= set(NAMES)
    assert all(op.name == name for name, op in OPS.items())


def test_groups_hold_what_users_were_promised() -> None:
    no_group = {"glu", "clamp", "clamp_min", "clamp_max", "abs", "identity", "sample_one_hot"}
    softmax = {"softmax", "log_softmax", "softmin"}
    heaviside = {"heaviside", "comparison"}
    quantizers = {"sign", "binarize", "ternarize", "quantize", "dorefa"}
    quantizers |= {"round", "floor", "ceil", "trunc"}
    assert dict(GROUPS) == {
        "activations": frozenset(NAMES) - no_group - softmax - quantizers,
        "heaviside": heaviside,
        "softmax": softmax,
        "quantizers": quantizers,
    }
    assert all(op.groups == {g for g in GROUPS if name in GROUPS[g]} for name, op in OPS.items())


def test_every_activation_class_of_torch_is_in_the_table() -> None:
    not_an_activation = {"MultiheadAttention"}  # a layer; its softmax is a site once it is opened
    documented = set(torch.nn.modules.activation.__all__) - not_an_activation
    assert documented <= {kind.__name__ for op in OPS.values() for kind in op.modules}


def test_every_elementwise_activation_class_of_torch_is_in_the_group() -> None:
    elsewhere = {"MultiheadAttention", "GLU", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
    documented = set(torch.nn.modules.activation.__all__) - elsewhere
    assert documented == {k.__name__ for name in GROUPS["activations"] for k in OPS[name].modules}


def test_every_function_with_an_inplace_argument_is_known_or_a_dropout() -> None:
    dropouts = {
        "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
    }  # fmt: skip
    functions = {
        name: function
        for name, function in vars(F).items()
        if inspect.isfunction(function) and "inplace" in inspect.signature(function).parameters
    }
    assert set(functions) >= dropouts | {"relu", "relu6", "elu", "threshold"}
    unknown = {name for name, function in functions.items() if called(function, ...) is None}
    assert unknown == dropouts


def test_every_function_that_writes_in_place_by_its_name_is_marked_so() -> None:
    for op in (op for op in OPS.values() if not op.on_demand):
        for function in (*op.functions, *op.inplace_functions, *op.aten):
            name = getattr(function, "_schema", function)
            name = name.name if hasattr(name, "name") else function.__name__
            spelling = called(function, ...)
            assert spelling is not None
            assert spelling.op.name == op.name
            assert spelling.inplace == (name.endswith("_")), name


def test_a_line_is_the_same_line_after_a_copy() -> None:
    for op in OPS.values():
        assert copy.deepcopy(op) is op
        assert pickle.loads(pickle.dumps(op)) is op


def custom(x: Tensor) -> Tensor:
    return x


def test_a_line_that_is_not_in_the_table_can_be_copied_too() -> None:
    op = Op("mine", frozenset(), True, True, (nn.Bilinear,), (custom,), (), (), (), custom)
    assert copy.deepcopy(op) == op
    assert pickle.loads(pickle.dumps(op)) == op


def test_one_spelling_in_two_lines_is_an_error() -> None:
    other = replace(OPS["elu"], functions=(F.relu,))
    with pytest.raises(ValueError, match=r"relu.* spells both 'relu' and 'elu'"):
        _index((OPS["relu"], other))


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.function is not None])
def test_a_replacement_forward_needs_x_alone_and_is_recognised_itself(name: str) -> None:
    function = OPS[name].function
    x = torch.randn(2, 4)
    assert (function(x).shape == x.shape) == OPS[name].keeps_shape
    spelling = called(function, ...)
    assert spelling is not None
    assert spelling.op is OPS[name]


def test_only_ops_that_need_more_than_x_have_no_replacement_forward() -> None:
    listed = {name: op for name, op in OPS.items() if not op.on_demand}
    assert {name for name, op in listed.items() if op.function is None} == {
        "prelu", "threshold", "softmax", "log_softmax", "softmin", "clamp", "clamp_min", "clamp_max",
    }  # fmt: skip


def threshold_given(spell: Spell) -> bool:
    """Whether what else is computed from the whole tensor is given."""
    given = spell.op == "ternarize" and "()" not in spell.id
    # tanh moves little, and a sample can stay the same
    given |= spell.op in ("dorefa", "sample_one_hot")
    return given or "-1.0, 2.0" in spell.id or (spell.op == "binarize" and "scale" not in spell.id)


@pytest.mark.parametrize("spell", quick(SPELLINGS))
def test_an_op_keeps_the_shape_and_is_elementwise_as_its_line_says(spell: Spell) -> None:
    op, module, x = OPS[spell.op], spell.make().eval(), spell.sample()
    changed = x.clone()
    moves = spell.op in ("ternarize", "quantize", "binarize")  # the threshold, or the range
    changed[0, 0, 0, 0] += 1e6 if moves else 5.25
    with torch.no_grad():
        torch.manual_seed(0)
        y = module(x)
        torch.manual_seed(0)
        difference = module(changed) - y
    assert (y.shape == x.shape) == op.keeps_shape
    difference[0, 0, 0, 0] = 0
    if op.elementwise:
        assert not difference.any()
    elif op.keeps_shape and not threshold_given(spell):
        assert difference.any()


# --- spellings in the graphs of the three ways in ---


@pytest.mark.sampled(4)
@pytest.mark.parametrize("spell", [*SPELLINGS, *OUT_SPELLINGS], ids=by_id)
def test_every_spelling_is_recognised_in_a_symbolic_trace(spell: Spell) -> None:
    graph_module = fx.symbolic_trace(spell.make())
    ((node, spelling),) = recognised(graph_module)
    assert spelling.op is OPS[spell.op]
    assert spelling.inplace == spell.inplace
    assert spelling.writes_out == spell.writes_out
    activated = (node.args if isinstance(spelling.key, int) else node.kwargs)[spelling.key]
    assert activated.name == ("mul" if spell.inplace else "x")


class Branches(nn.Module):
    """Many spellings, each on its own."""

    def __init__(self, spells: list[Spell]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(spell.make() for spell in spells)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [branch(x) * 1 for branch in self.branches]


# What some ops are in the other graphs. Dynamo sees an nn.Identity as nothing at all, and so does torch.export.
EXPORTED_AS = {
    "tanhshrink": {"tanh"},  # x - tanh(x)
    "softsign": {"abs"},  # x / (1 + |x|)
    "softmin": {"softmax"},  # softmax(-x)
}


# Ops that an export shows as others, and some of each kind; the rest takes half a second for each name
QUICK = {*EXPORTED_AS, "relu", "relu6", "prelu", "leaky_relu", "gelu", "silu", "sigmoid", "glu", "softmax"} | {
    "log_softmax", "heaviside", "binarize", "ternarize", "round", "clamp_min", "identity",
}  # fmt: skip
SOME_NAMES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES]


def spells_of(name: str) -> list[Spell]:
    return [s for s in SPELLINGS if s.op == name and "nn.Identity" not in s.id]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", SOME_NAMES)
@pytest.mark.filterwarnings("ignore::FutureWarning")  # copying a treespec, inside torch.export
def test_every_spelling_is_recognised_in_an_exported_graph(name: str) -> None:
    spells = spells_of(name)
    exported = torch.export.export(Branches(spells), (spells[0].sample(),), strict=False).module()
    found: dict[str, list[str]] = {}
    for node, spelling in recognised(exported):
        owner = list(node.meta["nn_module_stack"].values())
        path = next(path for path, _ in owner if path.startswith("branches."))
        found.setdefault(path, []).append(spelling.op.name)
    for i, spell in enumerate(spells):
        branch = ".".join(["branches", str(i)])
        assert set(found[branch]) == EXPORTED_AS.get(name, {name}), spell.id
        assert len(found[branch]) == 1, spell.id


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", SOME_NAMES)
def test_every_spelling_is_recognised_in_a_graph_of_dynamo(name: str) -> None:
    spells = [s for s in spells_of(name) if "parametrized" not in s.id]
    counts: Counter[str] = Counter()

    def backend(graph_module: fx.GraphModule, example_inputs: list[Tensor]) -> fx.GraphModule:
        counts.update(spelling.op.name for _, spelling in recognised(graph_module))
        return graph_module

    torch.compile(Branches(spells), backend=backend, fullgraph=True)(spells[0].sample())
    assert counts == {name: len(spells)}


# --- spellings that no trace of a module shows ---


def test_an_activation_of_a_constant_is_none() -> None:
    assert called(F.relu, 1.0) is None
    assert called(F.relu) is None
    assert called(torch.clamp, min=0.0) is None
    assert called(torch.clamp, 1.0, min=...) is None


def test_an_inplace_flag_that_the_graph_computes_counts_as_in_place() -> None:
    for spelling in (called(F.relu, ..., ...), called(F.relu, ..., inplace=...)):
        assert spelling == Spelling(OPS["relu"], 0, inplace=True, writes_out=False)
    assert called(F.elu, ..., 1.0, inplace=1).inplace
    assert not called(F.elu, ..., 1.0, inplace=0).inplace


def test_a_parametrized_module_is_what_it_was_made_from() -> None:
    module = nn.PReLU()
    parametrize.register_parametrization(module, "weight", nn.Softplus())
    node = fx.Graph().call_module("act", (fx.Graph().placeholder("x"),))
    assert type(module) is not nn.PReLU
    assert recognise(node, module) == Spelling(OPS["prelu"], 0, inplace=False, writes_out=False)


def test_a_module_without_an_inplace_attribute_is_not_in_place() -> None:
    module = nn.ReLU()
    del module.inplace  # as in a checkpoint of an old PyTorch
    node = fx.Graph().call_module("act", (fx.Graph().placeholder("x"),))
    assert not recognise(node, module).inplace


def test_an_out_of_place_overload_with_out_says_so() -> None:
    aten = torch.ops.aten
    assert called(aten.sigmoid.out, ..., out=...).writes_out
    assert called(aten.sigmoid, ..., out=...).writes_out
    assert not called(aten.sigmoid.default, ...).writes_out


@pytest.mark.parametrize(
    ("overload", "name"),
    [
        ("_softmax.default", "softmax"),
        ("_safe_softmax.default", "softmax"),
        ("_log_softmax.default", "log_softmax"),
        ("_prelu_kernel.default", "prelu"),
        ("rrelu_with_noise.default", "rrelu"),
        ("rrelu_with_noise_.default", "rrelu"),
        ("clamp_min_.Tensor", "clamp_min"),
        ("round.decimals", "round"),
        ("special_round.default", "round"),
    ],
)
def test_overloads_that_only_decompositions_write_are_recognised(overload: str, name: str) -> None:
    packet, which = overload.split(".")
    spelling = called(getattr(getattr(torch.ops.aten, packet), which), ...)
    assert spelling == Spelling(OPS[name], 0, packet.endswith("_"), writes_out=False)


def test_a_hardtanh_from_0_to_6_is_a_relu6_but_a_module_is_what_it_says() -> None:
    assert called(F.hardtanh, ..., 0.0, max_val=6.0).op.name == "relu6"
    assert called(torch.ops.aten.hardtanh_.default, ..., 0.0, 6.0).op.name == "relu6"
    assert called(F.hardtanh, ..., 0.0, ...).op.name == "hardtanh"
    assert called(F.hardtanh, ..., 0.0, 6.5).op.name == "hardtanh"
    node = fx.Graph().call_module("act", (fx.Graph().placeholder("x"),))
    assert recognise(node, nn.Hardtanh(0.0, 6.0)).op.name == "hardtanh"
    assert recognise(node, nn.ReLU6()).op.name == "relu6"


# --- what is no activation ---


class MyReLU(nn.ReLU):
    """Not an nn.ReLU: what it does is its own affair."""


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(3, 3),
        nn.Conv2d(3, 3, 1),
        nn.BatchNorm2d(3),
        nn.LayerNorm(3),
        nn.Dropout(inplace=True),
        nn.AlphaDropout(),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Embedding(3, 3),
        nn.MultiheadAttention(4, 2),
        nn.AdaptiveLogSoftmaxWithLoss(4, 8, [2]),
        nn.Sequential(nn.ReLU()),
        MyReLU(inplace=True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_are_not_recognised(module: nn.Module) -> None:
    node = fx.Graph().call_module("other", (fx.Graph().placeholder("x"),))
    assert recognise(node, module) is None


@pytest.mark.parametrize(
    "function",
    [
        F.conv2d, F.linear, F.max_pool2d, F.dropout, F.alpha_dropout, F.layer_norm, F.normalize,
        F.gumbel_softmax, F.scaled_dot_product_attention, F.cross_entropy, F.pad,
        torch.maximum, torch.minimum, torch.add, torch.where, torch.exp, torch.log, torch.square,
        torch.sqrt, torch.neg, torch.frac, torch.logsumexp, torch.dropout_, torch.special.entr,
        torch.ops.aten.add.Tensor, torch.ops.aten.tanh.float, torch.ops.aten.gelu_backward.default,
        torch.ops.aten.log_sigmoid_forward.default, operator.add, operator.pos, max, float, round,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_other_functions_are_not_recognised(function: Callable[..., Any]) -> None:
    assert called(function, ..., ...) is None


@pytest.mark.parametrize("method", ["add", "mul_", "view", "exp", "relu6", "hardtanh", "detach"])
def test_other_methods_are_not_recognised(method: str) -> None:
    graph = fx.Graph()
    assert recognise(graph.call_method(method, (graph.placeholder("x"),)), None) is None


def test_a_name_alone_makes_no_activation() -> None:
    graph = fx.Graph()
    x = graph.placeholder("relu")
    held = graph.get_attr("relu")
    module = graph.call_module("relu", (x,))
    output = graph.output(x)
    assert [recognise(node, None) for node in (x, held, module, output)] == [None] * 4


# --- heaviside ---

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def step(x: float, value_at_zero: float) -> float:
    if math.isnan(x):
        return x
    return value_at_zero if x == 0 else float(x > 0)


@given(
    st.lists(st.floats(width=16) | st.just(0.0), max_size=5),
    st.sampled_from([0.0, 0.5, 1.0, -2.0]),
    st.sampled_from(FLOATS),
)
def test_heaviside_is_the_step_function(
    values: list[float], value_at_zero: float, dtype: torch.dtype
) -> None:
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    expected = torch.tensor([step(v, value_at_zero) for v in x.tolist()]).to(dtype)
    torch.testing.assert_close(
        heaviside(x, value_at_zero), expected, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
def test_heaviside_keeps_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    y = heaviside(torch.ones(shape, dtype=dtype))
    assert torch.equal(y, torch.ones(shape, dtype=dtype))
    assert y.dtype == dtype


def test_heaviside_is_torch_s_where_both_are_defined() -> None:
    x = torch.tensor([-math.inf, -1.0, -0.0, 0.0, 1e-45, 2.0, math.inf])
    assert torch.equal(heaviside(x, 0.5), torch.heaviside(x, torch.tensor(0.5)))


def test_heaviside_s_own_derivative_is_zero() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0, math.inf], requires_grad=True)
    (grad,) = torch.autograd.grad(heaviside(x).sum(), x)
    assert torch.equal(grad, torch.zeros(4))


def test_heaviside_works_under_vmap_and_functional_gradients() -> None:
    x = torch.tensor([[-1.0, 0.0, 2.0, math.nan], [3.0, -4.0, 0.0, 0.5]])
    assert torch.equal(torch.vmap(heaviside)(x).nan_to_num(9), heaviside(x).nan_to_num(9))
    grads = torch.vmap(torch.func.grad(lambda row: heaviside(row).sum()))(x[:, :3])
    assert torch.equal(grads, torch.zeros(2, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's import
@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])],
)
def test_heaviside_compiles_as_a_whole(backend: str) -> None:
    compiled = torch.compile(lambda x: heaviside(x * 2, 0.5) + x, backend=backend, fullgraph=True)
    for shape in ((), (0,), (4, 5)):
        x = torch.randn(shape).round().requires_grad_()
        y = compiled(x)
        assert torch.equal(y, heaviside(x * 2, 0.5) + x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, torch.ones(shape))


def test_heaviside_stays_one_node_through_every_trace_and_a_pickle() -> None:
    first = fx.symbolic_trace(lambda x: heaviside(x, value_at_zero=0.5))
    second = fx.symbolic_trace(pickle.loads(pickle.dumps(first)))
    for graph_module in (first, second):
        ((node, spelling),) = recognised(graph_module)
        assert node.target is heaviside
        assert spelling.op.name == "heaviside"
    x = torch.tensor([-1.0, 0.0, 2.0])
    assert second(x).tolist() == [0.0, 0.5, 1.0]


# --- binarize and ternarize ---


def binary(x: float) -> float:
    return x if math.isnan(x) else 1.0 if x >= 0 else -1.0


def ternary(x: float, threshold: float) -> float:
    return x if math.isnan(x) else 1.0 if x > threshold else -1.0 if x < -threshold else 0.0


@given(st.lists(st.floats(width=16) | st.just(0.0), max_size=5), st.sampled_from(FLOATS))
def test_binarize_has_two_values(values: list[float], dtype: torch.dtype) -> None:
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    expected = torch.tensor([binary(v) for v in x.tolist()]).to(dtype)
    torch.testing.assert_close(binarize(x), expected, rtol=0, atol=0, equal_nan=True)


@given(
    st.lists(st.floats(width=16) | st.just(0.0), max_size=5),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.sampled_from(FLOATS),
)
def test_ternarize_has_three_values(
    values: list[float], threshold: float, dtype: torch.dtype
) -> None:
    x = torch.tensor(values, dtype=torch.float64).to(dtype)
    limit = torch.tensor(threshold, dtype=dtype).item()
    expected = torch.tensor([ternary(v, limit) for v in x.tolist()]).to(dtype)
    torch.testing.assert_close(ternarize(x, threshold), expected, rtol=0, atol=0, equal_nan=True)


def test_ternarize_has_the_threshold_of_ternary_weight_networks() -> None:
    x = torch.tensor([[-4.0, 1.0], [1.5, 0.5]])  # mean of the sizes: 1.75
    assert ternarize(x).tolist() == [[-1.0, 0.0], [1.0, 0.0]]
    large = torch.full((1000, 1000), 6e4, dtype=torch.float16)
    assert torch.equal(ternarize(large), torch.ones_like(large))


@pytest.mark.parametrize("function", [binarize, ternarize])
def test_a_quantizer_s_own_derivative_is_zero(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.tensor([-1.0, 0.0, 2.0, math.inf], requires_grad=True)
    (grad,) = torch.autograd.grad(function(x).sum(), x)
    assert torch.equal(grad, torch.zeros(4))
    rows = torch.randn(3, 4)
    assert torch.equal(torch.vmap(function)(rows), torch.stack([function(r) for r in rows]))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32]
)
def test_the_short_way_to_a_step_takes_every_number_where_the_long_one_does(
    dtype: torch.dtype,
) -> None:
    numbers = torch.tensor([0.0, -0.0, 1.0, -1.0, 3e4, -3e4, 0.01, -0.01])
    x = numbers.to(dtype)
    if dtype.is_floating_point:
        limits = torch.finfo(dtype)
        smallest = torch.tensor([limits.tiny, limits.smallest_normal], dtype=dtype)
        more = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e-45, 6e-8, 1e-40])
        x = torch.cat([x, smallest, -smallest, smallest / 2, -smallest / 2, more.to(dtype)])
    expected = torch.where(x.isnan(), x, (x > 0).to(dtype))
    actual = heaviside(x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert not actual.signbit()[~x.isnan()].any()  # no -0, which 1/x would tell from 0
    if dtype.is_floating_point:
        tracked = heaviside(x.clone().requires_grad_())
        torch.testing.assert_close(tracked.detach(), actual, rtol=0, atol=0, equal_nan=True)
