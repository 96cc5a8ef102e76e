"""Programs that Dynamo leaves to Python, wholly or in part: every site gets its rule once, in a graph or in Python.

The reference is the uncompiled model, run while torch hands every activation to a naive rule.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from sweep import RULES, Interception

# Dynamo reads `.grad` of whatever goes from one graph into the next
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

RULE, NAIVE = RULES["rectangular"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.GELU()


class OverTime(Net):
    """A break in a loop: Dynamo gives up the frame."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.relu(self.a(x)) + 0.1
            torch._dynamo.graph_break()
            x = self.act(self.b(x)).tanh()
        return x


class Helper(Net):
    """A method that is excluded from compilation, between two graphs."""

    @torch._dynamo.disable
    def helper(self, x: Tensor) -> Tensor:
        return F.relu(self.act(F.silu(self.b(x))) - 0.1, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.helper(torch.relu(self.a(x))) - 0.1)


class Recurrent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.lstm(torch.relu(self.a(x))[None])[0][0])


class Checkpoints(Net):
    checkpoint: Callable[..., Any] | None = None
    """None, to run the same program without checkpoints, which the reference needs."""

    def block(self, x: Tensor) -> Tensor:
        return self.act(torch.relu(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.b(x))
            torch._dynamo.graph_break()
            x = self.block(x) if self.checkpoint is None else self.checkpoint(self.block, x)
        return x


class Reentrant(Checkpoints):
    """The first forward of a checkpoint runs without gradients."""


class Prints(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        print(end="")
        if x.detach().sum().item() > 0:
            x = torch.tanh(x)
        return self.act(self.b(x))


class Generates(Net):
    def steps(self, x: Tensor) -> Iterator[Tensor]:
        for _ in range(3):
            x = torch.relu(self.a(x))
            torch._dynamo.graph_break()
            yield x

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.tanh(self.b(state)) for state in self.steps(x)])


class Experts(Net):
    """The data decide how many rows an expert gets, and which experts run."""

    def __init__(self) -> None:
        super().__init__()
        acts = (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.ReLU(inplace=True))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), act) for act in acts)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.a(x).softmax(-1)[:, :4].topk(2)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out


PROGRAMS = [
    OverTime, Helper, Recurrent, Checkpoints, Reentrant, Prints, Generates, Experts,
]  # fmt: skip


def sample() -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)


def gradients(call: Callable[..., Any], model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, then the gradients of the input and of the parameters."""
    model.zero_grad()
    x.grad = None
    y = call(x)
    y.sin().sum().backward()
    found = [x.grad, *(p.grad for p in model.parameters())]
    return [y.detach(), *(torch.zeros(()) if g is None else g for g in found)]


def with_checkpoints(model: nn.Module) -> nn.Module:
    if isinstance(model, Checkpoints):
        reentrant = isinstance(model, Reentrant)
        model.checkpoint = functools.partial(checkpoint, use_reentrant=reentrant)
    return model


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.fixture(autouse=True)
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", fg.FreegradWarning)
        yield


@pytest.mark.sampled(2)
@pytest.mark.parametrize("make", PROGRAMS)
def test_every_site_gets_its_rule_once(make: Callable[[], nn.Module]) -> None:
    model, x = make(), sample()
    with Interception(NAIVE) as reference:
        expected = gradients(model, model, x)
    native = gradients(with_checkpoints(model), model, x)
    compiled = fg.compile(
        model, {"activations": RULE}, backend="aot_eager", strict=make is not Recurrent
    )
    for _ in range(2):
        actual = gradients(compiled, model, x)
        assert torch.equal(actual[0], native[0])
        assert_close(actual, expected)
    plan = fg.report(compiled)
    sites = [d.site.name for d in plan.with_action("rewrite")]
    assert len(sites) == len({*sites})
    assert Counter(d.site.op for d in plan.with_action("rewrite")) == Counter(reference.calls)
    if make is not Generates:  # without a model around it, a generator is no call
        with fg.use({"activations": RULE}, model=model) as block:
            model(x)
        assert {*sites} == {d.site.name for d in fg.report(block).with_action("rewrite")}
    assert [o.what for o in plan.opaque] == ["torch.lstm"] * (make is Recurrent)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("make", [p for p in PROGRAMS if p is not Reentrant])
def test_a_rule_acts_on_the_whole_gradient_of_a_parameter(make: Callable[[], nn.Module]) -> None:
    """One clip of the sum, also if graphs, Python and several steps use the parameter."""
    model, x = with_checkpoints(make()), sample()
    native = gradients(model, model, x)
    rules = {"params": fg.rules.clip_norm(max_norm=0.1)}
    compiled = fg.compile(model, rules, backend="eager")
    for _ in range(2):
        actual = gradients(compiled, model, x)
        assert torch.equal(actual[0], native[0])
        clipped = [g * (0.1 / g.norm()).clamp(max=1) if g.ndim else g for g in native[2:]]
        assert_close(actual, [*native[:2], *clipped])


def test_the_report_tells_what_runs_in_graphs_and_what_in_python() -> None:
    compiled = fg.compile(Helper(), {"activations": RULE}, backend="eager")
    compiled(sample())
    plan = fg.report(compiled)
    assert plan.eager == ("<root>:silu[0]", "act:gelu[0]", "<root>:relu[1]")
    assert [d.site.name for d in plan.with_action("rewrite")] == [
        "<root>:relu[0]", "<root>:silu[0]", "act:gelu[0]", "<root>:relu[1]", "<root>:relu[2]",
    ]  # fmt: skip
    assert (
        "Run in Python, outside of the captured graphs, 3 sites: <root>:silu[0], act:gelu[0], <root>:relu[1]."
        in plan.to_text(width=0)
    )
    assert plan.to_dict()["eager"] == list(plan.eager)


def test_places_and_call_indices_are_those_of_the_transform() -> None:
    table = fg.RuleTable(
        [
            fg.on("relu", call=1).backward("reverse"),
            fg.on("gelu", module="act", type=nn.GELU).backward("scale", s=0.5),
            fg.on(parameter="b.*").backward("clip_value", max_value=0.01),
            fg.on("relu").backward(None),
        ]
    )
    for make in (OverTime, Helper):
        model, x = make(), sample()
        expected = gradients(fg.transform(model, table), model, x)
        compiled = fg.compile(model, table, backend="eager")
        assert_close(gradients(compiled, model, x), expected)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("make", [OverTime, Helper, Checkpoints, Reentrant])
@pytest.mark.parametrize("key", ["activations", "params"])
def test_a_forward_is_replaced_in_python_too(make: Callable[[], nn.Module], key: str) -> None:
    rule = fg.rules.fast_sigmoid if key == "activations" else fg.rules.straight_through
    rules = {key: rule(forward="heaviside" if key == "activations" else "sign")}
    model, x = make(), sample()
    with fg.use(rules, model=model):  # without checkpoints
        expected = gradients(model, model, x)
    compiled = fg.compile(with_checkpoints(model), rules, backend="eager")
    assert_close(gradients(compiled, model, x), expected)


# --- classes ---


class Swish(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((8,), 1.3))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x * self.slope)


class Broken(Swish):
    """Dynamo cannot keep its call whole."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(x * self.slope)
        torch._dynamo.graph_break()
        return x * y


class Swishes(Net):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.first, self.second = kind(), kind()

    @torch._dynamo.disable
    def helper(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.b(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.helper(self.first(self.a(x))))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", [Swish, Broken])
@pytest.mark.parametrize(
    "rules",
    [
        {Swish: "straight_through", "relu": "reverse", "params": fg.rules.clip_norm(max_norm=0.1)},
        {Swish: None, "activations": "reverse"},
        {Swish: fg.rules.fast_sigmoid(forward="heaviside")},
        fg.RuleTable([fg.on(type=Swish, call=1).backward("reverse")]),
    ],
    ids=["rule", "None", "forward", "call"],
)
def test_the_call_of_a_class_in_python_is_one_site(kind: type[nn.Module], rules: Any) -> None:
    model, x = Swishes(kind), sample()
    with fg.use(rules, model=model) as block:
        expected = gradients(model, model, x)
    graphs: list[Any] = []
    compiled = fg.compile(model, rules, backend=lambda gm, inputs: graphs.append(gm) or gm)
    assert_close(gradients(compiled, model, x), expected)
    count = len(graphs)
    assert_close(gradients(compiled, model, x), expected)
    assert len(graphs) == count  # nothing is compiled again
    found = ({d.site.name for d in fg.report(p).with_action("rewrite")} for p in (compiled, block))
    assert next(found) == next(found)
    assert f"second:{kind.__name__}[0]" in fg.report(compiled).eager
    assert "forward" in vars(kind)
    assert vars(kind)["forward"].__code__.co_filename == __file__


# --- blocks ---


class Blocks(Net):
    @torch._dynamo.disable
    def helper(self, x: Tensor) -> Tensor:
        with fg.native():
            x = self.act(x)
        with fg.use("reverse"):
            x = torch.relu(x + 0.5)
        with fg.use({"tanh": "reverse"}):
            x = torch.sigmoid(torch.tanh(x))
        return torch.sigmoid(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.helper(torch.relu(self.a(x))))


def test_blocks_inside_of_the_program_take_precedence() -> None:
    model, x = Blocks(), sample()
    with fg.use({"activations": RULE}, model=model):
        expected = gradients(model, model, x)
    compiled = fg.compile(model, {"activations": RULE}, backend="eager")
    assert_close(gradients(compiled, model, x), expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", [OverTime, Helper, Checkpoints, Reentrant])
@pytest.mark.parametrize("key", ["activations", "params"])
def test_native_around_the_program_switches_python_off_too(make: Any, key: str) -> None:
    model, x = with_checkpoints(make()), sample()
    native = gradients(model, model, x)
    compiled = fg.compile(model, {key: "reverse"}, backend="eager")
    gradients(compiled, model, x)
    with fg.native():
        actual = gradients(compiled, model, x)
    assert all(map(torch.equal, actual, native))


def test_a_replaced_forward_stays_in_a_native_block_with_a_warning() -> None:
    rules = {"activations": fg.rules.fast_sigmoid(forward="heaviside")}
    model, x = Helper(), sample()
    compiled = fg.compile(model, rules, backend="eager")
    outputs = compiled(x)
    with fg.native(), pytest.warns(fg.FreegradWarning, match="the forward stays replaced at"):
        assert torch.equal(compiled(x), outputs)


class Counts(TorchFunctionMode):
    """A mode of the user's own."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class Modes(Net):
    @torch._dynamo.disable
    def helper(self, x: Tensor) -> Tensor:
        with Counts():
            x = torch.tanh(x)
        return self.act(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.helper(torch.relu(self.a(x)))
        with Counts():
            x = torch.sigmoid(x)
        with torch.device("cpu"):
            x = torch.relu(x - 0.1) + torch.zeros(8)
        torch._dynamo.graph_break()
        return F.silu(x)


def test_other_function_modes_keep_working() -> None:
    model, x = Modes(), sample()
    with Interception(NAIVE):
        expected = gradients(model, model, x)
    compiled = fg.compile(model, {"activations": RULE}, backend="eager")
    assert_close(gradients(compiled, model, x), expected)
    with Counts():
        assert_close(gradients(compiled, model, x), expected)
    assert not torch.overrides._get_current_function_mode_stack()


def test_an_error_in_python_leaves_nothing_behind() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.a(x))
            torch._dynamo.graph_break()
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fg.compile(Fails(), {"activations": RULE}, backend="eager")(sample())
    assert not torch.overrides._get_current_function_mode_stack()
    x = sample()
    torch.relu(x).sum().backward()
    assert torch.equal(x.grad, (x > 0).to(x.dtype))


def test_a_training_step_that_is_compiled_whole() -> None:
    """The backward runs in the call; rules for parameters act, with those of activations in Python."""
    rules = {"activations": RULE, "params": "reverse"}

    def train(compile_it: bool) -> list[float]:
        model, x = Helper(), sample().detach()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def step() -> Tensor:
            optimizer.zero_grad()
            loss = model(x).sin().sum()
            loss.backward()
            optimizer.step()
            return loss.detach()

        if compile_it:
            compiled = fg.compile(step, rules, backend="eager")
            return [float(compiled()) for _ in range(3)]
        with fg.use(rules, model=model):
            return [float(step()) for _ in range(3)]

    assert train(True) == pytest.approx(train(False), rel=1e-4)


# --- what cannot have a rule ---


class Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(torch.relu(x), weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return (grad @ weight) * 3, grad.t() @ x


def test_a_parameter_that_only_a_function_in_python_takes_is_a_warning() -> None:
    class Applies(Net):
        @torch._dynamo.disable
        def helper(self, x: Tensor) -> Tensor:
            return Multiply.apply(x, self.b.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.helper(self.a(x))

    compiled = fg.compile(Applies(), {"params": "scale"}, backend="eager")
    with pytest.warns(fg.FreegradWarning, match=r"native backward: b\.weight"):
        compiled(sample())


def test_a_part_that_another_backend_compiles_is_a_warning() -> None:
    class Parts(Net):
        def __init__(self) -> None:
            super().__init__()
            self.part = torch.compile(nn.Sequential(self.b, nn.ReLU()), backend="aot_eager")

        @torch._dynamo.disable(recursive=False)
        def helper(self, x: Tensor) -> Tensor:
            return self.act(self.part(x))

        def forward(self, x: Tensor) -> Tensor:
            return self.helper(torch.relu(self.a(x)))

    compiled = fg.compile(Parts(), {"activations": RULE}, backend="eager")
    with pytest.warns(fg.FreegradWarning, match="part.* is compiled with another backend"):
        compiled(sample())
    assert fg.report(compiled).eager == ("act:gelu[0]",)
