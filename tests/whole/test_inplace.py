"""In-place activations and aliased memory: what an in-place operation writes, and who sees it.

Every case stands here twice: as a user writes it, and by hand, out of place, with the activation handed in.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

import freegrad_fx as fg
import runs
from inplace_cases import (
    CASE,
    RULES,
    Case,
    Written,
    assert_same_backward,
    assert_same_values,
    observe,
    rounded,
    with_x,
)
from models import naive
from runs import (
    Run,
    assert_identical,
    assert_same_gradients,
    close,
    difference_in_gradients,
    loss,
    run,
)

NATIVE: dict[str, None] = {"activations": None}


@fg.register("test: derivative of relu, from y", overwrite=True)
def relu_from_y(grad: Tensor, y: Tensor) -> Tensor:
    """grad·1[y > 0]"""
    return grad * (y > 0)


@pytest.mark.sampled(6)
@CASE
def test_native_rules_change_nothing(case: Case) -> None:
    model = Written(case.original)
    expected = observe(model, with_x(model))
    actual = observe(model, with_x(fg.transform(model, NATIVE)))
    assert_same_values(actual, expected)
    assert_same_backward(actual, expected)
    by_hand = observe(model, lambda x: case.by_hand(model, x, F.relu))
    assert_same_values(by_hand, expected)
    if not expected.error:
        assert_same_backward(by_hand, expected, rounded)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("rule", RULES)
@CASE
def test_a_rule_equals_the_case_written_by_hand(case: Case, rule: str) -> None:
    given_rule, backward = RULES[rule]
    model = Written(case.original)
    native = observe(model, with_x(model))
    actual = observe(model, with_x(fg.transform(model, {"relu": given_rule})))
    expected = observe(model, lambda x: case.by_hand(model, x, naive(F.relu, backward)))
    assert_same_values(actual, native)
    if native.error and actual.error:
        return  # autograd refuses the original too: to refuse is right, to be wrong is not
    assert_same_backward(actual, expected, rounded)
    changed = native.error or difference_in_gradients(expected, native, close)
    assert changed, "the rule makes no difference here: the case proves nothing"


@pytest.mark.sampled(6)
@CASE
def test_forward_is_the_same_where_no_gradient_is_recorded(case: Case) -> None:
    model = Written(case.original)
    gm = fg.transform(model, {"relu": RULES["rectangular"][0]})
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            x, y = torch.randn(2, 4, 6), torch.empty(2, 4, 6)
            y.copy_(x)
            torch.manual_seed(1)
            expected = tree_leaves(model(x))
            torch.manual_seed(1)
            actual = tree_leaves(gm(y))
            for a, e in zip(actual, expected, strict=True):
                assert_identical(a, e)
            assert_identical(y, x, "what the caller's tensor holds")


# --- what a rule reads of the output ---

OUTPUT_READ: dict[str, tuple[nn.Module, dict[str, str]]] = {
    "convolution": (nn.Conv1d(3, 2, 1), {"conv": "lrp_zplus"}),
    "activation": (nn.GELU(), {"gelu": "identity_rule"}),
}
WAYS = {
    "transform": lambda model, rules, x: fg.transform(model, rules)(x),
    "use": lambda model, rules, x: fg.use(rules, model=model)(model)(x),
    "compile": lambda model, rules, x: fg.compile(model, rules, backend="eager")(x),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operation", OUTPUT_READ)
def test_an_output_that_a_rule_reads_may_be_overwritten(operation: str, way: str) -> None:
    """Natively it may: neither operation saves its output."""
    first, rules = OUTPUT_READ[operation]
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    found = [
        torch.autograd.grad(
            WAYS[way](nn.Sequential(first.double(), nn.Mish(inplace)), rules, x).sum(), x
        )[0]
        for inplace in (True, False)
    ]
    assert torch.equal(*found)


# --- what autograd refuses ---


def test_a_tensor_that_autograd_saved_is_not_overwritten_unnoticed() -> None:
    """The linear layer saved `y`; to overwrite `y` makes its weight's gradient wrong, so autograd refuses."""

    def body(m, x):
        y = m.f(x)
        before = m.g(y)
        y.relu_()
        return before, y

    model = Written(body)
    for rule, _ in RULES.values():
        for m in (model, fg.transform(model, {"relu": rule})):
            assert "modified by an inplace operation" in str(observe(model, with_x(m)).error)


def test_a_leaf_is_not_overwritten_unnoticed() -> None:
    model = Written(lambda m, x: m.f(x.relu_()))
    for rule, _ in RULES.values():
        for m in (model, fg.transform(model, {"relu": rule})):
            with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
                m(torch.randn(2, 4, 6).requires_grad_())


def test_an_out_argument_is_skipped_and_reported() -> None:
    def body(m, x):
        out = torch.empty_like(x)
        torch.sigmoid(x, out=out)
        return out, torch.tanh(x)

    model = Written(body)
    with pytest.warns(fg.FreegradWarning, match="out="):
        gm = fg.transform(model, "rectangular")
    actions = [(d.site.op, d.action) for d in fg.report(gm).decisions]
    assert actions == [("sigmoid", "skip"), ("tanh", "rewrite")]
    with pytest.raises(fg.PlanError, match="out="):
        fg.transform(model, "rectangular", strict=True)
    x = torch.randn(2, 4, 6)
    for a, e in zip(gm(x), model(x), strict=True):
        assert_identical(a, e)


def identity_is_overwritten(m: Any, x: Tensor) -> Any:
    before = m.f(x)
    after = m.identity(before)
    after.mul_(-2.0)
    return before, after


def identity_alone_is_read(m: Any, x: Tensor) -> Any:
    return m.identity(m.f(x)).mul_(-2.0)


def identity_and_its_input_are_read(m: Any, x: Tensor) -> Any:
    before = m.f(x)
    return before, m.identity(before)


@pytest.mark.parametrize(
    ("body", "action"),
    [
        (identity_is_overwritten, "skip"),
        (identity_alone_is_read, "rewrite"),
        (identity_and_its_input_are_read, "rewrite"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_identity_whose_input_sees_a_later_write_is_skipped_with_the_reason(
    body: Any, action: str
) -> None:
    """A rule would cut its result from its input, which then keeps the old values."""
    model = Written(body)
    model.identity = nn.Identity()
    expected = observe(model, with_x(model))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gm = fg.transform(model, {"identity": "straight_through"})
    (decision,) = fg.report(gm).decisions
    assert decision.action == action
    if action == "skip":
        assert decision.reason.startswith("it can return its input itself, and")
        assert decision.reason in str(caught[0].message)
    actual = observe(gm, with_x(gm))
    assert_same_values(actual, expected)
    assert_same_backward(actual, expected)


def test_an_identity_whose_result_is_written_into_has_memory_of_its_own() -> None:
    """What is in front of it may have saved its output: the original is refused by autograd, this one is right."""
    model = Written(lambda m, x: m.identity(torch.tanh(m.f(x))).mul_(-2.0))
    model.identity = nn.Identity()
    assert "modified by an inplace operation" in str(observe(model, with_x(model)).error)
    gm = fg.transform(model, {"identity": "straight_through"})
    by_hand = Written(lambda m, x: torch.tanh(m.f(x)) * -2.0)
    by_hand.load_state_dict(model.state_dict())
    actual, expected = (observe(m, with_x(m)) for m in (gm, by_hand))
    assert_same_values(actual, expected)
    assert_same_backward(actual, expected)


# --- any program ---

# With the rule that is the true derivative of relu the rewritten model must have the gradients of the original, which
# autograd computes without us: an oracle for every program. `y` alone, `x` alone, and both in chains.
TRUE_DERIVATIVES = {
    "from x": fg.get("d(ReLU)"),
    "from y": relu_from_y,
    "from x, at the end of a chain": fg.compose(fg.rules.scale(s=1.0), fg.get("d(ReLU)")),
    "from x, in every link": fg.compose(fg.get("d(ReLU)"), fg.get("d(ReLU)")),
}

Instruction = tuple[Any, ...]
ROWS, COLUMNS = 4, 4

ACTIVATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "F.relu(x)": lambda m, x: F.relu(x),
    "x.relu()": lambda m, x: x.relu(),
    "nn.ReLU()(x)": lambda m, x: m.act(x),
    "F.relu_(x)": lambda m, x: F.relu_(x),
    "F.relu(x, inplace=True)": lambda m, x: F.relu(x, inplace=True),
    "x.relu_()": lambda m, x: x.relu_(),
    "nn.ReLU(inplace=True)(x)": lambda m, x: m.inplace(x),
}
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "x.t()": lambda x: x.t(),
    "x.view_as(x)": lambda x: x.view_as(x),
    "x.flip(0)": lambda x: x.flip(0),  # a copy
    "x.reshape(x.shape)": lambda x: x.reshape(x.shape),
    "x.contiguous()": lambda x: x.contiguous(),
    "x[:]": lambda x: x[:],
    "x[...].transpose(0, 1)": lambda x: x[...].transpose(0, 1),
    "torch.flatten(x).view(4, 4)": lambda x: torch.flatten(x).view(ROWS, COLUMNS),
    "x.unsqueeze(0).squeeze(0)": lambda x: x.unsqueeze(0).squeeze(0),
    "x.to(x.dtype)": lambda x: x.to(torch.float64),
    "dropout in eval": lambda x: F.dropout(x, 0.5, training=False),
    "x.narrow(0, 0, 4)": lambda x: x.narrow(0, 0, 4),
}
OUT_OF_PLACE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: m.linear(x),
    "x * 2": lambda m, x: x * 2,
    "clone": lambda m, x: x.clone(),
    "tanh": lambda m, x: torch.tanh(x),
    "dropout": lambda m, x: m.dropout(x),
    "leaky_relu": lambda m, x: F.leaky_relu(x, 0.3),
    "chunk, cat": lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1),
}
IN_PLACE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "x.add_(0.25)": lambda m, x: x.add_(0.25),
    "x *= -1.5": lambda m, x: _multiply(x),
    "x.neg_()": lambda m, x: x.neg_(),
    "tanh_": lambda m, x: torch.tanh_(x),
    "leaky_relu_": lambda m, x: F.leaky_relu_(x, 0.3),
    "inplace dropout": lambda m, x: m.dropout_(x),
    "x[0] = 0.5": lambda m, x: _set(x),
}


def _multiply(x: Tensor) -> Tensor:
    x *= -1.5
    return x


def _set(x: Tensor) -> Tensor:
    x[0] = 0.5
    return x


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "x[:, :2]": lambda x: x[:, :2],
    "x[1:3]": lambda x: x[1:3],
    "x.chunk(2, 1)[0]": lambda x: x.chunk(2, 1)[0],
}


class Program(nn.Module):
    """A straight line of instructions over a list of 4×4 tensors."""

    def __init__(self, instructions: list[Instruction], returned: list[int]) -> None:
        super().__init__()
        self.instructions, self.returned = instructions, returned
        self.linear = nn.Linear(COLUMNS, COLUMNS)
        self.act, self.inplace = nn.ReLU(), nn.ReLU(inplace=True)
        self.dropout, self.dropout_ = nn.Dropout(0.3), nn.Dropout(0.3, inplace=True)

    def forward(self, x: Tensor) -> Any:
        names = [x, self.linear(x)]
        for kind, which, i, *more in self.instructions:
            t = names[i % len(names)]
            match kind:
                case "activation":
                    result = ACTIVATIONS[which](self, t)
                case "view":
                    result = VIEWS[which](t)
                case "new":
                    result = OUT_OF_PLACE[which](self, t)
                case "in place":
                    result = IN_PLACE[which](self, t)
                case "part":
                    ACTIVATIONS[which](self, PARTS[more[0]](t))
                    result = None
                case "two":
                    result = self.two(which, t, names[more[0] % len(names)])
            if result is not None and more[-1:] != ["discard"]:
                names.append(result)
        return tuple(names[i % len(names)] for i in self.returned)

    def two(self, which: str, a: Tensor, b: Tensor) -> Tensor:
        if which == "a + b":
            return a + b
        if which == "a += b":
            a += b
            return a
        if which == "a.mul_(b)":
            return a.mul_(b)
        if which == "a[:, 1:3] = b[:, :2]":
            a[:, 1:3] = b[:, :2].clone()  # they may overlap; what is copied then is undefined
            return a
        return torch.cat([a[:2], b[2:]], 0)


INDEX = st.integers(0, 7)
KEPT = st.sampled_from(["keep", "discard"])
INSTRUCTION = st.one_of(
    st.tuples(st.just("activation"), st.sampled_from(list(ACTIVATIONS)), INDEX, KEPT),
    st.tuples(st.just("activation"), st.sampled_from(list(ACTIVATIONS)), INDEX, KEPT),
    st.tuples(st.just("view"), st.sampled_from(list(VIEWS)), INDEX),
    st.tuples(st.just("new"), st.sampled_from(list(OUT_OF_PLACE)), INDEX),
    st.tuples(st.just("in place"), st.sampled_from(list(IN_PLACE)), INDEX, KEPT),
    st.tuples(
        st.just("part"), st.sampled_from(list(ACTIVATIONS)), INDEX,
        st.sampled_from(list(PARTS)),
    ),
    st.tuples(
        st.just("two"),
        st.sampled_from(["a + b", "a += b", "a.mul_(b)", "a[:, 1:3] = b[:, :2]", "cat"]),
        INDEX, INDEX, KEPT,
    ),
)  # fmt: skip
PROGRAM = st.tuples(
    st.lists(INSTRUCTION, min_size=1, max_size=7),
    st.lists(INDEX, min_size=1, max_size=3),
    st.booleans(),
)


LEAF = torch.randn(ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def behave(model: nn.Module, looks_at_x: bool, grad: bool = True) -> Run:
    """A run on a tensor that the caller goes on using: what it holds afterwards is the last output."""

    def around(leaf: Tensor) -> tuple[list[Tensor], Tensor]:
        x = leaf * 1
        outputs = [*model(x), *([x * 0.5] if looks_at_x else [])]
        return outputs, x.detach()

    with torch.set_grad_enabled(grad):
        return run(around, LEAF, of=model, backward=grad, catch=RuntimeError, catch_backward=True)


def assert_gradients_by_differences(
    program: Program, gradients: Iterable[Tensor | None], looks_at_x: bool
) -> None:
    """Where autograd refuses the original, its derivative is still what differences of its forward say."""
    names = [name for name, _ in program.named_parameters()]
    at = [LEAF, *program.parameters()]
    towards = [runs.weights(tensor) for tensor in at]

    def value(t: float) -> float:
        leaf, *parameters = (a + t * d for a, d in zip(at, towards, strict=True))
        torch.manual_seed(1)
        with torch.no_grad():
            outputs = functional_call(program, dict(zip(names, parameters, strict=True)), (leaf,))
            return loss([*outputs, *([leaf * 0.5] if looks_at_x else [])]).item()

    slope, check = ((value(h) - value(-h)) / (2 * h) for h in (1e-6, 1e-5))
    assume(abs(slope - check) < 1e-4 * (1 + abs(slope)))  # else there is a kink in between
    given_slope = sum(
        (g * d).sum().item() for g, d in zip(gradients, towards, strict=True) if g is not None
    )
    assert given_slope == pytest.approx(slope, rel=1e-4, abs=1e-4)


def transform_quietly(program: Program, rule: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.FreegradWarning)  # a program may have no relu at all
        return fg.transform(program, {"relu": rule})


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(PROGRAM)
def test_any_program_keeps_its_forward_and_its_true_gradients(drawn: Any) -> None:
    instructions, returned, looks_at_x = drawn
    torch.manual_seed(0)
    program = Program(instructions, returned).double()
    plain = behave(program, looks_at_x, grad=False)
    expected = behave(program, looks_at_x)

    native = transform_quietly(program, None)
    if plain.error:  # such as an addition to overlapping memory: the operation itself refuses
        for rule in (None, *TRUE_DERIVATIVES.values()):
            assert behave(transform_quietly(program, rule), looks_at_x, grad=False).error
        return
    assert_same_values(behave(native, looks_at_x, grad=False), plain)
    actual = behave(native, looks_at_x)
    assert_same_backward(actual, expected)

    for rule in TRUE_DERIVATIVES.values():
        with_rule = transform_quietly(program, rule)
        assert_same_values(behave(with_rule, looks_at_x, grad=False), plain)
        actual = behave(with_rule, looks_at_x)
        if expected.error and actual.error:
            event("refused, with the rule too")
            continue
        assert not actual.error
        assert_same_values(actual, plain)
        if expected.error:
            event("refused, but not with the rule")
            assert_gradients_by_differences(program, actual.gradients.values(), looks_at_x)
            continue
        event("not refused")
        exactly = functools.partial(close, rtol=1e-12, atol=1e-12)
        assert_same_gradients(actual, expected, exactly)


# --- code that the graph shows as one call: what it shares and what it writes ---


class Kept(nn.Module):
    """Kept whole by the capture, for its branch on a value."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x, x) if x.sum() > 1e9 else (x, x * 2)


class KeptAndWrites(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else x.mul_(-2)


class KeptLinear(nn.Linear):
    """A subclass of a layer that makes new memory; this one returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 1e9 else x


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x.mul_(-2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * -2


@torch.fx.wrap
def wrapped_and_writes(x):
    return x.mul_(-2)


def hooked(module: nn.Module, hook: Any = None, pre_hook: Any = None) -> nn.Module:
    if hook is not None:
        module.register_forward_hook(hook)
    if pre_hook is not None:
        module.register_forward_pre_hook(pre_hook)
    return module


class OneCall(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.body, self.linear = body, nn.Linear(COLUMNS, COLUMNS)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def transposed_by_einsum(m, x):
    y = m.linear(x)
    z = torch.einsum("ij->ji", y)
    z.relu_()
    return y, z


def results_joined_in_a_tuple(m, x):
    a, b = m.first(m.linear(x)), m.second(x * 2)
    c = a + b  # tuples, of which the graph knows nothing
    c[0].relu_()
    return a[0] * 3, b[1]


def a_kept_module_returns_its_input(m, x):
    y = m.linear(x)
    z = m.first(y)[0]
    z.relu_()
    return y, z


def a_kept_layer_returns_its_input(m, x):
    y = m.linear(x)
    z = m.layer(y)
    z.relu_()
    return (y * 2,)


def a_module_writes(m, x):
    y = m.linear(x)
    h = torch.relu(y)
    m.writes(y)
    return h, y


def a_function_of_autograd_writes(m, x):
    y = m.linear(x)
    h = torch.relu(y)
    return h, Dirty.apply(y)


def a_wrapped_function_writes(m, x):
    y = m.linear(x)
    h = torch.relu(y)
    return h, wrapped_and_writes(y)


def an_activation_has_hooks(m, x):
    y = m.linear(x)
    z = m.act(y)
    return y, z


def data_is_set(m, x):
    y = m.linear(x)
    h = torch.relu(y)
    y.data = torch.zeros_like(y)
    return h, y


def relu_() -> nn.Module:
    return nn.ReLU(inplace=True)


ONE_CALL: dict[str, Callable[[], OneCall]] = {
    "einsum returns a view": lambda: OneCall(transposed_by_einsum),
    "tuples are added": lambda: OneCall(results_joined_in_a_tuple, first=Kept(), second=Kept()),
    "a kept module returns its input": lambda: OneCall(
        a_kept_module_returns_its_input, first=Kept()
    ),
    "a kept layer returns its input": lambda: OneCall(
        a_kept_layer_returns_its_input, layer=KeptLinear(4, 4)
    ),
    "a hook returns a layer's input": lambda: OneCall(
        a_kept_layer_returns_its_input,
        layer=hooked(nn.Linear(4, 4), lambda m, inputs, y: inputs[0]),
    ),
    "a kept module writes": lambda: OneCall(a_module_writes, writes=KeptAndWrites()),
    "a hook writes": lambda: OneCall(
        a_module_writes, writes=hooked(nn.Identity(), lambda m, inputs, y: y.mul_(-2))
    ),
    "an autograd.Function writes": lambda: OneCall(a_function_of_autograd_writes),
    "a wrapped function writes": lambda: OneCall(a_wrapped_function_writes),
    "a hook on an activation in place": lambda: OneCall(
        an_activation_has_hooks, act=hooked(relu_(), lambda m, inputs, y: y * 2)
    ),
    "a hook before an activation in place": lambda: OneCall(
        an_activation_has_hooks, act=hooked(relu_(), pre_hook=lambda m, inputs: (inputs[0] * 2,))
    ),
    "a hook on an activation": lambda: OneCall(
        an_activation_has_hooks, act=hooked(nn.ReLU(), lambda m, inputs, y: y * 2)
    ),
    "data is set": lambda: OneCall(data_is_set),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ONE_CALL)
def test_what_the_graph_shows_as_one_call(name: str) -> None:
    """Right, or refused with an error of this package: never other numbers."""
    model = ONE_CALL[name]().double()
    plain, expected = behave(model, looks_at_x=False, grad=False), behave(model, looks_at_x=False)
    assert not expected.error
    rules = list(TRUE_DERIVATIVES.values())
    for rule in (None, *rules):
        try:
            gm = fg.transform(model, {"relu": rule})
        except fg.CaptureError:
            continue
        assert_same_values(behave(gm, looks_at_x=False, grad=False), plain)
        actual = behave(gm, looks_at_x=False)
        assert not actual.error
        assert_same_values(actual, plain)
        exactly = functools.partial(close, rtol=1e-12, atol=1e-12)
        assert_same_gradients(actual, expected, exactly)
