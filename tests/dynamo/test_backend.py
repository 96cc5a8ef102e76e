"""The pass behind `torch.compile`: the sites, rules and gradients that `transform` gives, and nothing lost in silence.

The reference is the uncompiled model, run while torch hands every activation to a naive rule; or, for a table that
tells places apart, the transformed model.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from sweep import RULES, Interception

# Dynamo reads `.grad` of whatever goes from one graph into the next
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

RULE, NAIVE = RULES["rectangular"]
OUTSIDE = "outside of the captured graphs"
# The graphs of the second are those of the first, behind AOTAutograd
EAGER = [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"]


class Model(nn.Module):
    """Two layers, an activation, and a forward that a test gives it."""

    def __init__(self, forward: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = nn.ReLU()
        self.given = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.given(self, x)


def sample(rows: int = 3) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows)) * 2


def gradients(call: Callable[..., Any], model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Those of the input and the parameters, and the output last."""
    x = x.detach().clone().requires_grad_()
    output = call(x)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(output.sin().sum(), leaves, allow_unused=True)
    return [*found, output.detach()]


def by_interception(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    if isinstance(model, Model) and model.given is checkpointed:
        # a checkpoint recomputes where the interception is over
        model = copy.copy(model)
        model.given = not_checkpointed
    with Interception(NAIVE):
        return gradients(model, model, x)


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, e in zip(actual, expected, strict=True):
        if e is None or a is None:
            assert a is e
        else:
            torch.testing.assert_close(a, e)


def names(plan: fg.Plan, action: str = "rewrite") -> list[str]:
    return [decision.site.name for decision in plan.with_action(action)]


# --- every kind of code ---


def graph_breaks(self: Model, x: Tensor) -> Tensor:
    x = torch.relu(self.a(x))
    torch._dynamo.graph_break()
    x = self.act(torch.relu(self.b(x) + 0.1))
    torch._dynamo.graph_break()
    return torch.relu(self.act(x - 0.1) - 0.05)


def branch_on_data(self: Model, x: Tensor) -> Tensor:
    x = self.a(x)
    x = F.relu(x) if x.sum() > 0 else torch.tanh(x)
    return torch.sigmoid(self.b(x))


def in_place(self: Model, x: Tensor) -> Tensor:
    x = self.a(x)
    F.relu_(x)
    y = self.b(x)
    y[:, :2].relu_()
    return F.relu(y + x - 0.5, inplace=True)


def on_an_input(self: Model, x: Tensor) -> Tensor:
    y = x * 1
    torch._dynamo.graph_break()
    y.relu_()
    return self.a(y).tanh_() + y


def not_checkpointed(self: Model, x: Tensor) -> Tensor:
    return torch.relu(self.b(torch.tanh(self.a(x))))


def checkpointed(self: Model, x: Tensor) -> Tensor:
    return checkpoint(lambda x: not_checkpointed(self, x), x, use_reentrant=False)


def partly_without_gradients(self: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = torch.relu(self.a(x))
    return torch.relu(self.b(x)) + y


def made_inside(self: Model, x: Tensor) -> Tensor:
    return nn.ReLU()(self.a(x)) + sum(torch.tanh(self.b(x) + i) for i in range(2))


def through_numpy(self: Model, x: Tensor) -> Tensor:
    y = torch.relu(self.a(x))
    scale = float(y.detach().numpy().sum())
    return torch.tanh(self.b(y) / (1 + scale))


def autocast(self: Model, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.relu(self.a(x))
    return torch.tanh(x.float())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("inner", EAGER)
@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (graph_breaks, ["<root>:relu[0]", "<root>:relu[1]", "act:relu[0]", "act:relu[1]", "<root>:relu[2]"]),
        (branch_on_data, ["<root>:relu[0]", "<root>:sigmoid[0]"]),
        (in_place, ["<root>:relu[0]", "<root>:relu[1]", "<root>:relu[2]"]),
        (on_an_input, ["<root>:relu[0]", "<root>:tanh[0]"]),
        (checkpointed, ["<root>:tanh[0]", "<root>:relu[0]"]),
        (partly_without_gradients, ["<root>:relu[0]", "<root>:relu[1]"]),
        (made_inside, ["<root>:relu[0]", "<root>:tanh[0]", "<root>:tanh[1]"]),
        (through_numpy, ["<root>:relu[0]", "<root>:tanh[0]"]),
        (autocast, ["<root>:relu[0]", "<root>:tanh[0]"]),
    ],
    ids=lambda given: getattr(given, "__name__", None),
)  # fmt: skip
def test_any_code_gets_its_rules(
    forward: Callable[[Model, Tensor], Tensor], expected: list[str], inner: str
) -> None:
    model, x = Model(forward), sample()
    if forward is branch_on_data:
        nn.init.constant_(model.a.bias, 5.0)
    backend = fg.backend({"activations": RULE}, inner=inner)
    compiled = torch.compile(model, backend=backend)
    assert_same(gradients(compiled, model, x), by_interception(model, x))
    assert names(backend.report()) == expected


@pytest.mark.sampled(3)
@pytest.mark.inductor
@pytest.mark.parametrize("forward", [graph_breaks, in_place, checkpointed])
def test_inductor_compiles_what_was_rewritten(forward: Callable[[Model, Tensor], Tensor]) -> None:
    model, x = Model(forward), sample()
    compiled = fg.compile(model, {"activations": RULE})
    assert_same(gradients(compiled, model, x), by_interception(model, x))


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize(
    "options",
    [{"mode": "reduce-overhead"}, {"mode": "max-autotune"}, {"options": {"max_autotune": False}}],
    ids=["reduce-overhead", "max-autotune", "options"],
)
def test_options_reach_inductor_by_every_way(options: dict[str, Any]) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), sample()
    expected = by_interception(model, x)
    rules = {"activations": RULE}
    for compiled in (
        fg.compile(model, rules, **options),
        torch.compile(model, backend=fg.backend(rules, **options)),
        torch.compile(model, backend=fg.backend(rules), **options),
    ):
        torch._dynamo.reset()
        assert_same(gradients(compiled, model, x), expected)


def test_a_callable_compiles_what_was_rewritten() -> None:
    seen = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append([node.target for node in gm.graph.nodes if node.op == "call_function"])
        return gm

    torch.compile(nn.ReLU(), backend=fg.backend("scale", inner))(sample())
    decoupled = torch.ops.freegrad_fx.decoupled.default
    assert seen == [[torch.ops.aten.detach.default, F.relu, decoupled]]


def test_options_for_torch_compile_are_refused_by_the_backend() -> None:
    with pytest.raises(
        TypeError, match=r"mode, options, dynamic for inner, got fullgraph.*torch.compile\(model"
    ):
        fg.backend("scale", fullgraph=True)


@pytest.mark.parametrize("make", [fg.backend, lambda rules: fg.compile(nn.ReLU(), rules)])
def test_ambient_rules_are_refused_with_the_way_to_have_them(make: Any) -> None:
    with pytest.raises(TypeError, match=r"torch\.compile\(freegrad_fx\.transform\(model\)\)"):
        make(None)


@pytest.mark.slow
def test_fullgraph_and_dynamic_shapes_reach_torch_compile() -> None:
    model = Model(lambda self, x: torch.relu(self.a(x)))
    compiled = fg.compile(model, RULE, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 5, 7):
        assert_same(gradients(compiled, model, sample(rows)), by_interception(model, sample(rows)))
    broken = fg.compile(Model(graph_breaks), RULE, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        broken(sample())


# --- names and calls ---


@pytest.mark.slow
def test_recompilation_neither_counts_twice_nor_shifts_a_call() -> None:
    def forward(self: Model, x: Tensor) -> Tensor:
        return graph_breaks(self, x) if self.training else F.relu(graph_breaks(self, x))

    model = Model(forward)
    backend = fg.backend({"activations": RULE}, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    for rows, training in ((3, True), (5, True), (5, False), (1, False), (9, True)):
        model.train(training)
        assert_same(gradients(compiled, model, sample(rows)), by_interception(model, sample(rows)))
    assert sorted(names(backend.report())) == [
        *(f"<root>:relu[{call}]" for call in range(4)),
        *(f"act:relu[{call}]" for call in range(2)),
    ]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.linear(x))
        torch._dynamo.graph_break()
        return F.relu(self.linear(x))


class Blocks(nn.Module):
    """Dynamo compiles the code of a block once, and runs it for every one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Block(), Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.second(self.first(x))))


class WholeBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(self.act(self.linear(x))))


class WholeBlocks(Blocks):
    """The same without graph breaks, which `transform` can take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = WholeBlock(), WholeBlock(), WholeBlock()


TABLES = {
    "ops": fg.RuleTable([fg.on("relu").backward(RULE)]),
    "module": fg.RuleTable(
        [fg.on("relu", module="second*").backward("reverse"), fg.on("relu").backward(RULE)]
    ),
    "call": fg.RuleTable(
        [fg.on("relu", call=1).backward("reverse"), fg.on("relu").backward("straight_through")]
    ),
    "where": fg.RuleTable([fg.on("relu", where=lambda s: "act" in s.path).backward(RULE)]),
    "where, for one module": fg.RuleTable(
        [fg.on("relu", where=lambda s: "second" in s.path).backward("reverse"), fg.on("relu").backward(RULE)]
    ),
    "type": fg.RuleTable([fg.on("relu", type=nn.ReLU).backward(RULE)]),
    "parameter": fg.RuleTable([fg.on(parameter="third.*.weight").backward("reverse")]),
    "none": fg.RuleTable([fg.on("relu", module="first").backward(None), fg.on("relu").backward(RULE)]),
}  # fmt: skip


@pytest.mark.sampled(8)
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_code_that_dynamo_shares_between_modules_has_the_rules_of_each(table: fg.RuleTable) -> None:
    model, whole = Blocks(), WholeBlocks()
    whole.load_state_dict(model.state_dict())
    transformed = fg.transform(whole, table)
    backend = fg.backend(table, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    torn = [name for name in names(fg.report(transformed)) if name.endswith("weight")]
    with warnings.catch_warnings():
        if torn:  # `linear` is used before and behind the break
            warnings.simplefilter("ignore", fg.FreegradWarning)
        for _ in range(2):
            actual = gradients(compiled, model, sample())
    assert_same(actual, gradients(transformed, transformed, sample()))
    assert sorted(names(backend.report())) == sorted(names(fg.report(transformed)))


def test_a_module_of_the_user_is_told_by_its_class_and_line() -> None:
    backend = fg.backend("scale", inner="eager")
    torch.compile(Blocks(), backend=backend)(sample())
    types = {d.site.path: d.site.type for d in backend.report().decisions}
    assert types["first.act"] == "torch.nn.modules.activation.ReLU"
    assert types["first"].endswith("Block")
    files = {d.site.source.rpartition(":")[0] for d in backend.report().decisions}
    assert files == {__file__}


def test_a_wrapper_around_the_model_is_not_in_the_paths() -> None:
    backend = fg.backend("scale", inner="eager")
    torch.compile(nn.DataParallel(Blocks()).cpu(), backend=backend)(sample())
    assert "first.act:relu[0]" in names(backend.report())


@pytest.mark.slow
def test_methods_are_compiled_by_module_compile() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def encode(self, x: Tensor) -> Tensor:
            return torch.relu(self.layers(x) - 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.encode(x))

    model, x = Encoder(), sample()
    expected = by_interception(model, x)
    backend = fg.backend({"activations": RULE}, inner="aot_eager")
    model.compile(backend=backend)
    assert type(model) is Encoder
    assert_same(gradients(model, model, x), expected)
    assert names(backend.report()) == ["layers.1:relu[0]", "<root>:relu[0]", "<root>:tanh[0]"]
    torch.compile(model.encode, backend=backend)(x)
    assert names(backend.report()) == ["layers.1:relu[0]", "<root>:relu[0]", "<root>:tanh[0]"]


def test_a_container_of_pytorchs_own_is_captured_by_module_compile_too() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), sample()
    expected = by_interception(model, x)
    model.compile(backend=fg.backend({"activations": RULE}, inner="aot_eager"))
    assert_same(gradients(model, model, x), expected)


@pytest.mark.slow
def test_parts_that_are_compiled_each_alone_have_reports_of_their_own() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    backend = fg.backend("scale", inner="eager")
    for part in model:
        part.compile(backend=backend)
    model(sample())
    assert [names(backend.report(part)) for part in model] == [["1:relu[0]"]] * 3
    with pytest.raises(fg.PlanError, match=r"several models .*Name one: report\(model\)"):
        backend.report()


@pytest.mark.slow
def test_a_function_may_call_several_models() -> None:
    first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    second = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    backend = fg.backend("scale", inner="eager")

    @torch.compile(backend=backend)
    def step(x: Tensor) -> Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return torch.sigmoid(second(second(y)))

    step(sample())
    assert names(backend.report(first)) == ["1:relu[0]"]
    assert names(backend.report(second)) == ["1:tanh[0]", "1:tanh[1]"]


# --- classes ---


class Swish(nn.Module):
    """An activation of the user's own, with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.full((4,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * self.slope) + self.shift


class Swishes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.swish = nn.Linear(4, 4), Swish()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Swish())

    def forward(self, x: Tensor) -> Tensor:
        return self.swish(self.layers(self.swish(self.linear(x))))


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    "rules",
    [
        {Swish: "straight_through", "relu": "reverse"},
        {Swish: fg.compose(RULE, "reverse")},
        {Swish: None, "activations": "reverse"},
        {Swish: fg.rules.fast_sigmoid(forward="heaviside"), "relu": "reverse"},
        fg.RuleTable([fg.on(type=Swish, module="layers*").backward("reverse")]),
        fg.RuleTable([fg.on(type=Swish, call=1).backward("reverse")]),
    ],
    ids=["rule", "composition", "None", "forward", "module", "call"],
)
@pytest.mark.parametrize(
    "dynamic",
    [pytest.param(False, id="static", marks=pytest.mark.slow), pytest.param(True, id="dynamic")],
)
def test_the_calls_of_a_class_are_sites(rules: Any, dynamic: bool) -> None:
    model = Swishes()
    transformed = fg.transform(model, rules)
    backend = fg.backend(rules, inner="aot_eager")
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    actual = gradients(compiled, model, sample())
    assert_same(actual, gradients(transformed, transformed, sample()))
    for action in ("rewrite", "native"):
        assert names(backend.report(), action) == names(fg.report(transformed), action)


def test_a_call_that_cannot_be_kept_whole_is_refused_with_the_reason() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(x) + y

    class Net(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x * 1, x * 2) if isinstance(self.part, Two) else self.part(x * 1)

    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_() + 1

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return torch.relu(x), torch.tanh(x)

    for part, reason in (
        (Two(), "it has 2 tensors as input.*; or use transform\\(\\) and use\\(\\)"),
        (Writes(), r"it writes into its input tensor.*Select the ops inside of Writes instead\.$"),
        (Pair(), r"does not return one tensor.*Select the ops inside of Pair instead\.$"),
    ):
        compiled = torch.compile(Net(part), backend=fg.backend({type(part): "scale"}, "eager"))
        with pytest.raises(
            fg.PlanError, match=rf"calls of {type(part).__name__}, .* of part .*{reason}"
        ):
            compiled(sample())


def test_the_calls_of_an_autograd_function_are_refused_by_name() -> None:
    class Spike(torch.autograd.Function):
        pass

    with pytest.raises(fg.PlanError, match=r"'Spike' selects calls of the autograd.Function Spike"):
        fg.backend({Spike: "scale"})


def test_an_autograd_function_keeps_its_backward_and_is_reported() -> None:
    class Triple(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.relu()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 3

    model, x = Model(lambda self, x: torch.tanh(Triple.apply(self.a(x)))), sample()
    backend = fg.backend({"activations": RULE}, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    assert_same(gradients(compiled, model, x), by_interception(model, x))
    assert [(o.what, o.reason) for o in backend.report().opaque] == [
        ("an autograd.Function", "keeps its own backward")
    ]


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.relu(x) + 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_what_a_function_computes_is_no_site_also_if_nothing_needs_a_gradient() -> None:
    """Dynamo then traces into the Function."""
    model, x = (
        Model(lambda self, x: torch.relu(self.a(Clip.apply(x)))),
        sample().requires_grad_(False),
    )
    rules = fg.RuleTable(
        [
            fg.on("relu", call=0).backward("straight_through", forward="heaviside"),
            fg.on("relu").backward(None),
        ]
    )
    compiled = fg.compile(model, rules, backend="eager")
    with fg.use(rules, model=model) as block:
        expected = model(x)
    assert torch.equal(compiled(x), expected)
    for plan in (fg.report(compiled), fg.report(block)):
        assert [d.site.call for d in plan.decisions] == [0]
        assert [(o.what, o.reason) for o in plan.opaque] == [
            ("autograd.Function Clip", "keeps its own backward")
        ]
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)


# --- never in silence ---


@torch._dynamo.disable
def not_compiled(x: Tensor) -> Tensor:
    return torch.relu(x)


def with_a_gap(self: Model, x: Tensor) -> Tensor:
    x = torch.relu(self.a(x))
    x = not_compiled(self.b(x))
    return torch.relu(x - 0.1)


def ours(caught: Any) -> list[Any]:
    """The warnings of this package: Dynamo has some of its own on Python 3.13.0."""
    return [warning for warning in caught if issubclass(warning.category, fg.FreegradWarning)]


@torch._dynamo.disable
def unseen(x: Tensor) -> Tensor:
    """A place that is hidden from function modes."""
    with torch._C.DisableTorchFunction():
        return torch.relu(x)


def test_what_no_rule_can_reach_is_a_warning_with_its_name_and_line() -> None:
    model = Model(lambda self, x: torch.relu(unseen(self.b(torch.relu(self.a(x)))) - 0.1))
    backend = fg.backend("straight_through", inner="eager")
    compiled = torch.compile(model, backend=backend)
    with pytest.warns(fg.FreegradWarning, match=OUTSIDE) as caught:
        compiled(sample().requires_grad_())
    (warning,) = ours(caught)
    line = unseen.__wrapped__.__code__.co_firstlineno + 4
    assert (
        f"of Model, these sites ran with their native backward: <root>:relu[1] ({__file__}:{line})."
        in str(warning.message)
    )
    assert warning.filename == __file__
    # the call index counts it, and the report knows it
    assert names(backend.report()) == ["<root>:relu[0]", "<root>:relu[2]"]
    assert [lost.source for lost in backend.report().lost] == [f"{__file__}:{line}"]
    compiled(sample().requires_grad_())  # and it is said once


def test_strict_raises_where_it_runs() -> None:
    model = Model(lambda self, x: unseen(torch.relu(self.a(x))))
    compiled = fg.compile(model, "scale", backend="eager", strict=True)
    with pytest.raises(
        fg.PlanError, match=rf"strict: {OUTSIDE} of Model, these sites ran.* <root>:relu\[1\]"
    ):
        compiled(sample().requires_grad_())


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("rules", "warns"),
    [
        ("scale", False),
        ({"relu": None}, False),
        ({"tanh": "scale", "gelu": None}, False),
        ({"relu": fg.rules.fast_sigmoid(forward="heaviside")}, True),
    ],
    ids=["rule", "native", "other op", "forward"],
)
def test_without_gradients_only_a_forward_can_be_missed(rules: Any, warns: bool) -> None:
    model = Model(lambda self, x: unseen(torch.relu(self.a(x))))
    compiled = fg.compile(model, rules, backend="eager")
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled(sample())
    assert any(OUTSIDE in str(w.message) for w in caught) == warns


def in_a_loop(self: Model, x: Tensor) -> Tensor:
    for _ in range(2):
        x = torch.relu(self.a(x))
        torch._dynamo.graph_break()
    return x


def in_a_try(self: Model, x: Tensor) -> Tensor:
    try:
        x = torch.relu(self.a(x))
        torch._dynamo.graph_break()
    finally:
        x = self.act(x)
    return x


@pytest.mark.parametrize("forward", [in_a_loop, in_a_try])
def test_a_frame_that_dynamo_gives_up_gets_its_rules(
    forward: Callable[[Model, Tensor], Tensor],
) -> None:
    model = Model(forward)
    compiled = fg.compile(model, {"activations": RULE}, backend="eager", strict=True)
    assert_same(gradients(compiled, model, sample()), by_interception(model, sample()))
    assert len(fg.report(compiled).eager) == 2


def test_running_without_compilation_gets_its_rules() -> None:
    model = Model(graph_breaks)
    compiled = fg.compile(model, {"activations": RULE}, backend="eager", strict=True)
    with torch.compiler.set_stance("force_eager"):
        assert_same(gradients(compiled, model, sample()), by_interception(model, sample()))
    compiled = fg.compile(model, {"gelu": "scale"}, backend="eager")
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.warns(fg.FreegradWarning, match="'gelu' matched nothing in the first call of Model"),
    ):
        compiled(sample())


def test_a_call_in_which_nothing_runs_is_a_warning() -> None:
    compiled = fg.compile(lambda x: x, "scale", backend="eager")
    with pytest.warns(fg.FreegradWarning, match="no captured graph ran"):
        compiled(sample())


def test_an_error_of_the_inner_backend_that_dynamo_suppresses_leaves_the_rules() -> None:
    def failing(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("no")

    model = Model(with_a_gap)
    compiled = fg.compile(model, {"activations": RULE}, backend=failing, strict=True)
    with torch._dynamo.config.patch(suppress_errors=True):
        assert_same(gradients(compiled, model, sample()), by_interception(model, sample()))


def test_the_recompilation_limit_leaves_the_rules() -> None:
    model = Model(lambda self, x: torch.relu(self.a(x)) * len(self.text))
    compiled = fg.compile(
        model, {"activations": RULE}, backend="eager", recompile_limit=2, strict=True
    )
    for length in range(4):
        model.text = "a" * length
        assert_same(gradients(compiled, model, sample()), by_interception(model, sample()))
    assert names(fg.report(compiled)) == ["<root>:relu[0]"]  # in a graph, and in Python
    assert fg.report(compiled).eager == ("<root>:relu[0]",)


@torch._dynamo.disable
def many(x: Tensor) -> Tensor:
    modules = nn.Sequential(nn.ReLU6(), nn.Softplus(), nn.PReLU(), nn.Mish())
    return modules(F.softsign(x) + F.logsigmoid(x) + torch.tanh(x) + F.tanhshrink(x)).sigmoid()


def test_every_activation_is_known_outside_of_the_graphs() -> None:
    backend = fg.backend("scale", inner="eager")
    compiled = torch.compile(Model(lambda self, x: many(self.a(x)).relu()), backend=backend)
    compiled(sample().requires_grad_())
    ops = [name.partition(":")[2].partition("[")[0] for name in backend.report().eager]
    assert sorted(ops) == sorted(
        [
            "softsign",
            "logsigmoid",
            "tanh",
            "tanhshrink",
            "relu6",
            "softplus",
            "prelu",
            "mish",
            "sigmoid",
        ]
    )


def test_a_transform_of_torch_func_is_a_skip_with_the_reason() -> None:
    model = Model(lambda self, x: torch.func.vmap(lambda v: torch.relu(self.a(v)))(x).tanh())
    backend = fg.backend("scale", inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    with pytest.warns(
        fg.FreegradWarning, match=r"<root>:relu\[0\] keeps its backward: .* torch.func"
    ):
        compiled(sample().requires_grad_())
    assert names(backend.report()) == ["<root>:tanh[0]"]


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def through(x: Tensor) -> Tensor:
    """A ReLU that the gradient passes through."""
    return x + (torch.relu(x) - x).detach()


def in_branches(self: Model, x: Tensor) -> Tensor:
    def otherwise(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > -1, torch.sin, torch.tanh, (x,))

    x = torch.relu(self.a(x))
    return torch.relu(torch.cond(x.sum() > 0, self.act, otherwise, (x - 0.5,)))


@pytest.mark.slow
def test_a_site_in_a_branch_of_cond_keeps_its_backward_and_is_named() -> None:
    model, x = Model(in_branches), sample()
    model.act = Branch()
    backend = fg.backend({"activations": "straight_through"}, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    with pytest.warns(
        fg.FreegradWarning, match=r"is inside of torch\.cond, which runs nested"
    ) as caught:
        actual = gradients(compiled, model, x)
    said = " ".join(str(warning.message) for warning in ours(caught))
    assert len(ours(caught)) == 2
    assert "site act.act:relu[0]" in said
    assert "site <root>:tanh[0]" in said
    # calls are counted as if the branches were not there
    assert names(backend.report()) == ["<root>:relu[0]", "<root>:relu[1]"]
    by_hand = Model(lambda self, x: through(torch.relu(through(self.a(x)) - 0.5)))
    by_hand.load_state_dict(model.state_dict())
    assert_same(actual, gradients(by_hand, by_hand, x))
    with pytest.raises(fg.PlanError, match=r"torch\.cond"):
        fg.compile(model, "straight_through", backend="aot_eager", strict=True)(x)


@pytest.mark.slow
def test_an_encoder_layer_in_one_function_is_reported() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    backend = fg.backend({"relu": "scale"}, inner="eager")
    compiled = torch.compile(Model(lambda self, x: torch.relu(layer(x[None]))), backend=backend)
    with torch.no_grad():
        compiled(sample())
    (note,) = backend.report().opaque
    assert note.what.endswith("_transformer_encoder_layer_fwd")
    assert note.reason == "PyTorch computes activations inside of this call"


@pytest.mark.slow
def test_an_entry_that_matched_nothing_in_the_first_call_is_a_warning() -> None:
    compiled = fg.compile(Model(graph_breaks), {"relu": "scale", "gelu": "scale"}, backend="eager")
    with pytest.warns(
        fg.FreegradWarning, match="entry 'gelu' matched nothing.*ops found there are: relu"
    ):
        compiled(sample())
    compiled(sample())
    strict = fg.compile(Model(graph_breaks), {"gelu": "scale"}, backend="eager", strict=True)
    with pytest.raises(fg.PlanError, match="entry 'gelu' matched nothing"):
        strict(sample())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("suppress", [False, True])
def test_a_rule_that_cannot_serve_a_site_is_an_error_of_its_own_kind(suppress: bool) -> None:
    compiled = fg.compile(
        Model(lambda self, x: F.glu(self.a(x))), {"glu": "scale"}, backend="eager"
    )
    with (
        torch._dynamo.config.patch(suppress_errors=suppress),
        pytest.raises(fg.PlanError, match="glu changes the shape"),
    ):
        compiled(sample())


def test_a_backend_that_is_called_by_hand_says_what_it_cannot_do() -> None:
    gm = torch.fx.symbolic_trace(nn.ReLU())
    with pytest.warns(fg.FreegradWarning, match="not called through torch"):
        fg.backend("scale", inner="eager")(gm, [sample()])


# --- parameters ---


def tied(self: Model, x: Tensor) -> Tensor:
    return self.a(torch.relu(self.b(self.a(x))))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "rules",
    [
        {"params": fg.rules.clip_norm(max_norm=0.1)},
        {"all": "reverse"},
        fg.RuleTable([fg.on(parameter="a.*").backward("clip_norm", max_norm=0.1)]),
    ],
    ids=["params", "all", "pattern"],
)
def test_a_rule_acts_on_the_whole_gradient_of_a_parameter(rules: Any) -> None:
    model = Model(tied)
    transformed = fg.transform(model, rules)
    backend = fg.backend(rules, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    expected = gradients(transformed, transformed, sample())
    assert_same(gradients(compiled, model, sample()), expected)
    assert names(backend.report()) == names(fg.report(transformed))


def over_graphs(self: Model, x: Tensor) -> Tensor:
    x = self.a(x)
    torch._dynamo.graph_break()
    x = self.b(torch.relu(self.a(x)))
    if x.sum() > 100:
        x = -x
    x = torch.tanh(self.a(x))
    torch._dynamo.graph_break()
    with torch.no_grad():
        y = self.a(x)
    return x + y


def in_one_graph(self: Model, x: Tensor) -> Tensor:
    x = torch.tanh(self.a(self.b(torch.relu(self.a(self.a(x))))))
    with torch.no_grad():
        y = self.a(x)
    return x + y


@pytest.mark.slow
@pytest.mark.parametrize("inner", EAGER)
@pytest.mark.parametrize(
    "rules",
    [
        {"params": fg.rules.clip_norm(max_norm=0.1)},
        {"params": fg.compose("reverse", fg.rules.clip_norm(max_norm=torch.tensor(0.1)))},
        {"params": fg.rules.clip_norm(max_norm=0.1, forward="round"), "relu": RULE},
    ],
    ids=["rule", "composition", "forward"],
)
def test_a_rule_acts_on_the_whole_gradient_of_a_parameter_that_several_graphs_use(
    rules: Any, inner: str
) -> None:
    model = Model(over_graphs)
    whole = Model(in_one_graph)
    whole.load_state_dict(model.state_dict())
    expected = gradients(fg.transform(whole, rules), whole, sample())
    backend = fg.backend(rules, inner=inner, strict=True)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):  # the second time nothing is captured
        assert_same(gradients(compiled, model, sample()), expected)
    assert {"a.weight", "a.bias", "b.weight", "b.bias"} <= set(names(backend.report()))
    with fg.native():
        native = gradients(model, model, sample())
        if "relu" not in rules:  # a forward that was replaced stays so
            assert_same(gradients(compiled, model, sample()), native)
    assert not torch.allclose(native[1], expected[1])


@pytest.mark.slow
@pytest.mark.inductor
def test_inductor_takes_parameters_whose_rules_are_outside_of_its_graphs() -> None:
    rules = {"params": fg.rules.clip_norm(max_norm=0.1)}
    model, whole = Model(over_graphs), Model(in_one_graph)
    whole.load_state_dict(model.state_dict())
    expected = gradients(fg.transform(whole, rules), whole, sample())
    assert_same(gradients(fg.compile(model, rules, strict=True), model, sample()), expected)


def test_a_rule_acts_once_for_each_call_of_a_model_that_runs_in_graphs() -> None:
    rules = {"params": fg.rules.clip_norm(max_norm=0.1)}
    model, whole = Model(over_graphs), Model(in_one_graph)
    whole.load_state_dict(model.state_dict())
    compiled, gm = fg.compile(model, rules, backend="aot_eager"), fg.transform(whole, rules)
    actual = gradients(lambda x: compiled(x) * compiled(x + 1), model, sample())
    assert_same(actual, gradients(lambda x: gm(x) * gm(x + 1), whole, sample()))


@pytest.mark.slow
def test_a_parameter_that_several_graphs_of_a_function_use_is_a_warning() -> None:
    model = Model(tied)

    def step(x: Tensor) -> Tensor:
        x = model.a(x)
        torch._dynamo.graph_break()
        return model.a(x)

    compiled = fg.compile(step, {"params": "scale"}, backend="eager")
    with pytest.warns(
        fg.FreegradWarning, match=r"parameter (weight|bias) of Linear .* not on their sum"
    ):
        compiled(sample())


def test_a_parameter_that_a_graph_writes_into_and_another_uses_is_a_warning() -> None:
    def forward(self: Model, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        with torch.no_grad():
            self.a.bias.add_(1)
        return self.a(x)

    compiled = fg.compile(Model(forward), {"params": "scale"}, backend="eager")
    with pytest.warns(fg.FreegradWarning, match=r"parameter a.bias of Model .* not on their sum"):
        compiled(sample())


def test_a_parameter_that_a_graph_and_python_use_has_one_rule() -> None:
    linear = torch._dynamo.disable(F.linear)
    model = Model(lambda self, x: linear(self.a(x), self.a.weight, self.b.bias))
    native = gradients(model, model, sample())
    rules = {"params": fg.rules.clip_norm(max_norm=0.1)}
    compiled = fg.compile(model, rules, backend="eager", strict=True)
    actual = gradients(compiled, model, sample())
    clipped = [None if g is None else g * (0.1 / g.norm()).clamp(max=1) for g in native[1:-1]]
    assert_same(actual[1:-1], clipped)


def test_a_parameter_that_learns_again_gets_its_rule() -> None:
    model = Model(lambda self, x: self.a(x))
    model.a.weight.requires_grad_(False)
    backend = fg.backend({"params": "reverse"}, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    compiled(sample())
    assert names(backend.report()) == ["a.bias"]
    (frozen,) = backend.report().with_action("native")
    assert frozen.reason.endswith("compiled again once it is trained")
    model.a.weight.requires_grad_(True)
    native = gradients(model, model, sample())
    actual = gradients(compiled, model, sample())
    assert_same(actual[1:2], [-native[1]])


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "inner", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_a_tensor_that_is_a_rules_parameter_changes_without_recompilation(inner: str) -> None:
    compilations = []

    def counting(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        compilations.append(gm)
        return torch._dynamo.lookup_backend(inner)(gm, inputs)

    model, s = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.tensor(1.0)
    compiled = fg.compile(model, {"relu": fg.get("scale")(s=s)}, backend=counting)
    once = gradients(compiled, model, sample())
    for value in (2.0, 3.0):
        s.fill_(value)
        assert_same(
            gradients(compiled, model, sample())[:3], [value * 1 * g for g in scaled_by_one(model)]
        )
    assert len(compilations) == 1
    assert once[0] is not None


def scaled_by_one(model: nn.Module) -> list[Tensor]:
    transformed = fg.transform(model, {"relu": fg.get("scale")(s=1.0)})
    return [g for g in gradients(transformed, transformed, sample())[:3] if g is not None]


# --- other rules, other graphs ---


@pytest.mark.slow
def test_another_backend_is_another_compilation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    for s in (2.0, 3.0, 2.0):
        compiled = fg.compile(model, fg.get("scale")(s=s), backend="aot_eager")
        assert_same(gradients(compiled, model, sample())[:3], [s * g for g in scaled_by_one(model)])


@pytest.mark.slow
@pytest.mark.inductor
def test_no_cache_serves_the_formula_that_a_name_had_before() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def times(factor: float) -> Callable[..., Tensor]:
        namespace: dict[str, Any] = {}
        exec(f"def formula(grad, x):\n    return grad * {factor}", namespace)
        return namespace["formula"]

    for factor in (2.0, 3.0, 2.0):
        fg.register("again", overwrite=True)(times(factor))
        torch._dynamo.reset()  # as in a new process: what is left are the caches on the disk
        compiled = fg.compile(model, {"relu": "again"})
        expected = [factor * g for g in scaled_by_one(model)]
        assert_same(gradients(compiled, model, sample())[:3], expected)


def test_a_rule_that_is_registered_anew_is_refused_by_graphs_that_are_captured_later() -> None:
    fg.register("again")(lambda grad, x: grad)
    compiled = fg.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "again", backend="eager")
    fg.register("again", overwrite=True)(lambda grad, x: grad * 2)
    with pytest.raises(
        fg.RuleError, match="'again' was registered again after this backend was created"
    ):
        compiled(sample())


def test_a_rule_that_is_registered_anew_is_refused_by_graphs_that_are_there_already() -> None:
    fg.register("again")(lambda grad, x: grad)
    compiled = fg.compile(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "again", backend="aot_eager")
    compiled(sample())
    fg.register("again", overwrite=True)(lambda grad, x: grad * 2)
    with pytest.raises(
        fg.RuleError, match="'again' was registered again after this backend was created"
    ):
        compiled(sample())


@pytest.mark.slow
def test_switching_rules_off_reaches_graphs_that_are_compiled_already() -> None:
    model, x = Model(graph_breaks), sample()
    native, ruled = gradients(model, model, x), by_interception(model, x)
    for first in (True, False):
        torch._dynamo.reset()
        compiled = fg.compile(model, {"activations": RULE}, backend="aot_eager")
        for off in (first, not first, first):
            with fg.native() if off else contextlib.nullcontext():
                assert_same(gradients(compiled, model, x), native if off else ruled)


def test_copies_and_pickles_keep_their_rules() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), sample()
    backend = fg.backend({"activations": RULE}, inner="aot_eager")
    compiled = torch.compile(model, backend=backend)
    expected = by_interception(model, x)
    assert_same(gradients(compiled, model, x), expected)
    copied = copy.deepcopy(compiled)
    assert_same(gradients(copied, copied, x), expected)
    loaded = pickle.loads(pickle.dumps(backend))
    assert (loaded.table, loaded.inner, loaded.strict) == (backend.table, "aot_eager", False)
    model.compile(backend=backend)
    assert copy.deepcopy(model)._compiled_call_impl is None


def test_a_compiled_model_has_the_signature_of_the_model() -> None:
    class Optional(nn.Module):
        def forward(self, x: Tensor, *, mask: Tensor | None = None, **others: Any) -> Tensor:
            return F.relu(x)

    model = Optional()
    compiled = fg.compile(model, RULE, backend="aot_eager")
    assert inspect.signature(compiled.forward) == inspect.signature(model.forward)


def test_compiled_autograd_compiles_the_backward_as_it_is() -> None:
    model, x = Model(graph_breaks), sample()
    expected = by_interception(model, x)
    backend = fg.backend({"activations": RULE}, inner="aot_eager")
    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(model, backend=backend)
        assert_same(gradients(compiled, model, x), expected)
    assert len(names(backend.report())) == 5


def test_the_report_is_empty_before_the_first_call_and_says_so() -> None:
    backend = fg.backend("scale", inner="eager")
    with pytest.raises(fg.PlanError, match="captured nothing"):
        backend.report()
    with pytest.raises(fg.PlanError, match="captured nothing"):
        backend.report(nn.ReLU())


def test_the_report_grows() -> None:
    model = Model(branch_on_data)
    backend = fg.backend({"activations": "scale"}, inner="eager")
    compiled = torch.compile(model, backend=backend)
    seen = []
    for bias in (5.0, -5.0):
        nn.init.constant_(model.a.bias, bias)
        compiled(sample())
        seen.append(sorted(names(backend.report())))
    assert seen == [
        ["<root>:relu[0]", "<root>:sigmoid[0]"],
        ["<root>:relu[0]", "<root>:sigmoid[0]", "<root>:tanh[0]"],
    ]
    assert "Model, 3 sites: 3 rewritten." in str(backend.report())


def test_threads_have_calls_of_their_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model = Model(graph_breaks)
    backend = fg.backend({"activations": RULE}, inner="eager")
    compiled = torch.compile(model, backend=backend)
    expected = by_interception(model, sample())
    compiled(sample().requires_grad_())
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: gradients(compiled, model, sample()), range(8)):
            assert_same(result, expected)
    assert len(names(backend.report())) == 5


def test_report_takes_what_was_compiled_and_the_backend() -> None:
    model = Model(lambda model, x: model.act(model.a(x)))
    compiled = fg.compile(model, {"relu": "scale"}, backend="eager")
    with pytest.raises(fg.PlanError, match="has captured nothing"):
        fg.report(compiled)
    compiled(sample())
    assert names(fg.report(compiled)) == ["act:relu[0]"]
    assert not [name for name in vars(model) if "freegrad" in name]
    function = fg.compile(lambda x: torch.relu(x), {"relu": "scale"}, backend="eager")
    function(sample())
    assert names(fg.report(function)) == ["<root>:relu[0]"]
    backend = fg.backend({"relu": "scale"}, inner="eager")
    torch.compile(model, backend=backend)(sample())
    assert fg.report(backend) == backend.report() != fg.report(function)
    with pytest.raises(TypeError, match="got Model"):
        fg.report(model)


@pytest.mark.parametrize("inner", EAGER)
def test_a_dropout_that_is_in_place_by_position_leaves_the_rule_its_input(inner: str) -> None:
    def forward(self: Model, x: Tensor, inplace: bool = True) -> Tensor:
        x = self.a(x)
        y = torch.tanh(x)
        return y + self.b(F.dropout(x, 1.0, True, inplace))

    model = Model(forward)
    out_of_place = copy.copy(model)
    out_of_place.given = lambda self, x: forward(self, x, inplace=False)
    expected = by_interception(out_of_place, sample())
    compiled = fg.compile(model, {"activations": RULE}, backend=inner, fullgraph=True)
    assert_same(gradients(compiled, model, sample()), expected)


def test_a_function_of_a_size_stays_one() -> None:
    """abs() is written for numbers too, of which no gradient is cut off."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs() * abs(x.shape[0] - 10)

    compiled = fg.compile(Model(), {"abs": "straight_through"}, backend="aot_eager", dynamic=True)
    for rows in (4, 12):
        x = torch.randn(rows, 2, requires_grad=True)
        (grad,) = torch.autograd.grad(compiled(x).sum(), x)
        assert torch.equal(grad, torch.full((rows, 2), float(abs(rows - 10))))


# --- models that were transformed before ---


@pytest.mark.sampled(3)
@pytest.mark.parametrize("around", [lambda gm: gm, nn.Sequential], ids=["itself", "a part"])
@pytest.mark.parametrize(
    "second", ["reverse", {"params": "reverse"}], ids=["operation", "parameter"]
)
def test_what_is_decoupled_already_is_skipped_with_the_reason(second: Any, around: Any) -> None:
    """Two rules at one site would not both act: `transform` refuses the second in the same words."""
    first = fg.rules.scale(s=2.0) if second == "reverse" else {"params": fg.rules.scale(s=2.0)}
    gm = fg.transform(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), first)
    x = sample()
    backend = fg.backend(second, inner="aot_eager")
    with pytest.warns(fg.FreegradWarning, match="already decoupled, with the rule 'scale"):
        actual = gradients(torch.compile(around(gm), backend=backend), gm, x)
    for a, e in zip(actual, gradients(gm, gm, x), strict=True):
        assert a is not None
        assert e is not None
        assert torch.equal(a, e)
    kind = "operation" if second == "reverse" else "parameter"
    found = [d.action for d in backend.report().decisions if d.site.kind == kind]
    assert found == ["skip"] * (1 if kind == "operation" else 2)
    strict = fg.backend(second, inner="aot_eager", strict=True)
    with pytest.raises(Exception, match="already decoupled"):
        torch.compile(around(gm), backend=strict)(x)


@pytest.mark.parametrize("ambient", [False, True])
def test_a_model_that_was_transformed_without_a_rule_takes_one(ambient: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh())
    others = {} if ambient else {"tanh": "scale"}
    gm = fg.transform(model) if ambient else fg.transform(model, {"relu": None, **others})
    x = sample()
    compiled = torch.compile(gm, backend=fg.backend({"relu": "reverse"}, inner="aot_eager"))
    by_hand = fg.transform(model, {"relu": "reverse", **others})
    for a, e in zip(gradients(compiled, gm, x), gradients(by_hand, by_hand, x), strict=True):
        torch.testing.assert_close(a, e)
