"""Rules at the output and the operands of operations, by every way in, and in every mode of execution.

The reference is a model that is written by hand: an identity with a naive backward stands on each edge that has a rule.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
import models
from doors import DOORS
from models import Backward, naive
from runs import assert_same_forward, assert_same_gradients, close, differs, run

# Dynamo reads `.grad` of whatever goes from one graph into the next
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

WINDOW = fg.rules.rectangular(a=-0.4, b=0.9)
WINDOW_BY_HAND = models.rectangular(-0.4, 0.9)


def edge(x: Tensor, *backwards: Backward) -> Tensor:
    for backward in backwards:
        x = naive(lambda v: v.clone(), backward)(x)
    return x


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * x**2


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 1.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Net(nn.Module):
    """Modules, functions and methods, one module called twice, a class that the table selects, and PReLU's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)
        self.act, self.prelu, self.scaled = nn.GELU(), nn.PReLU(), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        a = self.act(self.act(h) + h)
        b = F.softmax(h, -1) @ h.t() @ self.prelu(h)
        return a + self.scaled(b).tanh() + torch.sigmoid(h)


TABLE = fg.RuleTable(
    [
        fg.on("gelu", call=1, at="x").backward(fg.compose("reverse", WINDOW)),
        fg.on("gelu", at="output").backward(WINDOW),
        fg.on("softmax", at="output").backward("stop"),
        fg.on("prelu", at=["x", "output"]).backward("scale", s=0.5),
        fg.on("prelu").backward("straight_through"),
        fg.on(type=Scaled, at="output").backward("scale", s=3.0),
        fg.on(type=Scaled, at="x").backward(WINDOW),
        fg.on("tanh", at="x").backward(None),
        fg.on(["tanh", "sigmoid"], at="x").backward("scale", s=-2.0),
    ]
)
HALF, THIRD = models.scale(0.5), models.scale(3.0)


class ByHand(Net):
    by_class = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        first = edge(F.gelu(h), WINDOW_BY_HAND)
        inner = edge(
            first + h, WINDOW_BY_HAND, models.scale(-1.0)
        )  # the first rule is nearest to gelu
        a = edge(F.gelu(inner), WINDOW_BY_HAND)
        p = edge(h, HALF)
        b = F.softmax(h, -1).detach() @ h.t() @ edge(self.through(p), HALF)
        of_class = (WINDOW_BY_HAND, THIRD) if self.by_class else ()
        s = edge(edge(b, *of_class[:1]) * self.scaled.factor, *of_class[1:])
        return a + s.tanh() + torch.sigmoid(edge(h, models.scale(-2.0)))

    def through(self, p: Tensor) -> Tensor:
        """PReLU, straight through for its input, and with its own gradient of the weight."""
        y = F.prelu(p.detach(), self.prelu.weight)
        return y + (p - p.detach())


def made(kind: type[Net]) -> Net:
    torch.manual_seed(0)
    return kind()


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_every_way_in_gives_the_gradients_of_the_model_written_by_hand(door: Any) -> None:
    by_hand, native, table = made(ByHand), run(made(Net), X), TABLE
    if door is DOORS["exported"]:  # which opens every class
        table, by_hand.by_class = fg.RuleTable(e for e in TABLE if not e.sites.by_class), False
    expected = run(by_hand, X)
    assert differs(expected, native)
    model = made(Net)
    for _ in range(2):
        actual = run(door(model, table, (X,)), X, of=model)
        assert_same_forward(actual, native)
        assert_same_gradients(actual, expected, close)


def test_a_copy_a_loaded_model_and_a_second_trace_keep_the_rules(tmp_path: Any) -> None:
    expected = run(made(ByHand), X)
    gm = fg.transform(made(Net), TABLE)
    torch.save(gm, tmp_path / "gm.pt")
    loaded = torch.load(tmp_path / "gm.pt", weights_only=False)
    for other in (copy.deepcopy(gm), loaded, pickle.loads(pickle.dumps(gm))):
        assert_same_gradients(run(other, X), expected, close)
        assert [d.site for d in fg.report(other).decisions] == [
            d.site for d in fg.report(gm).decisions
        ]
    again = fg.transform(gm, {"sigmoid": None})
    assert_same_gradients(run(again, X, of=gm), expected, close)


def test_the_modes_of_execution_agree() -> None:
    model = made(Net).double()
    gm, by_hand = fg.transform(model, TABLE), made(ByHand).double()
    x = X.double()
    with torch.no_grad():
        assert torch.equal(gm(x), model(x))
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    assert_same_gradients(run(compiled, x, of=gm), run(by_hand, x), close)
    given = torch.func.grad(lambda v: gm(v).sum())(x)
    wanted = torch.autograd.grad(by_hand(leaf := x.clone().requires_grad_()).sum(), leaf)[0]
    torch.testing.assert_close(given, wanted)
    rows = torch.stack([x, x + 0.1])
    each = torch.func.vmap(torch.func.grad(lambda v: gm(v).sum()))(rows)
    torch.testing.assert_close(each[0], wanted)
    with torch.autocast("cpu", torch.bfloat16):
        half, other = run(gm, X.double(), of=gm), run(by_hand, X.double())
    assert_same_gradients(half, other, lambda a, b: close(a, b, 0.05, 0.05))


def test_a_second_derivative_goes_through_the_rules_at_edges() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x)

    smooth, by_hand = fg.rules.fast_sigmoid(slope=2.0), models.fast_sigmoid(2.0)
    gm = fg.transform(
        Model(), fg.RuleTable(fg.on("tanh", at=at).backward(smooth) for at in ("x", "output"))
    )
    x = torch.randn(5, dtype=torch.float64).requires_grad_()
    ys = gm(x), edge(torch.tanh(edge(x, by_hand)), by_hand)
    given, wanted = (torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in ys)
    torch.testing.assert_close(given, wanted)
    second, wanted = (torch.autograd.grad(g.sum(), x)[0] for g in (given, wanted))
    torch.testing.assert_close(second, wanted)


def test_a_function_that_a_table_selects_has_places_in_a_graph_and_in_a_block() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Cube.apply(x * 1)

    table = fg.RuleTable(
        [
            fg.on(type=Cube, at="x").backward(WINDOW),
            fg.on(type=Cube, at="output").backward("scale", s=0.5),
        ]
    )
    x = torch.tensor([-1.0, -0.3, 0.5, 2.0], requires_grad=True)
    wanted = torch.tensor([0.0, 1.5 * 0.09, 1.5 * 0.25, 0.0])
    (given,) = torch.autograd.grad(fg.transform(Model(), table)(x).sum(), x)
    torch.testing.assert_close(given, wanted)
    with fg.use(table):
        y = Model()(x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], wanted)


def test_of_nested_blocks_the_innermost_decides_each_place() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    outer = fg.RuleTable([fg.on("relu", at=["x", "output"]).backward("scale", s=2.0)])
    inner = fg.RuleTable([fg.on("relu", at="x").backward("scale", s=5.0)])
    with fg.use(outer), fg.use(inner):
        y = torch.relu(x)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [10.0, 10.0]
    with fg.use(outer), fg.use(fg.RuleTable([fg.on("relu", at="x").backward(None)])):
        y = torch.relu(x)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [2.0, 2.0]


def test_places_follow_hooks_and_rules_of_blocks() -> None:
    """The rule is around the forward alone; an ambient rule at the same operation acts besides."""
    model = nn.Sequential(nn.ReLU())
    model[0].register_forward_hook(lambda module, args, y: y * 3.0)
    gm = fg.transform(
        model, fg.RuleTable([fg.on("relu", at="output").backward("reverse")]), ambient=True
    )
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    assert torch.autograd.grad(gm(x).sum(), x)[0].tolist() == [0.0, -3.0]
    with fg.use("straight_through"):
        y = gm(x)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [-3.0, -3.0]
    with fg.native():
        y = gm(x)
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 3.0]


def test_a_later_transform_adds_other_places_and_refuses_the_same() -> None:
    def at(place: str) -> fg.RuleTable:
        return fg.RuleTable([fg.on("relu", at=place).backward("scale", s=2.0)])

    gm = fg.transform(nn.Sequential(nn.ReLU()), at("output"))
    both = fg.transform(gm, at("x"))
    x = torch.ones(2, requires_grad=True)
    assert torch.autograd.grad(both(x).sum(), x)[0].tolist() == [4.0, 4.0]
    with pytest.warns(fg.FreegradWarning, match="already decoupled, with the rule 'scale'"):
        same = fg.transform(both, at("x"))
    assert torch.autograd.grad(same(x).sum(), x)[0].tolist() == [4.0, 4.0]
    with pytest.warns(fg.FreegradWarning, match="already decoupled"):
        fg.transform(both, at("output"))


def test_an_output_that_is_no_tensor_is_refused() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x * 3

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair = Pair()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.pair(x)
            return a + b

    gm = fg.transform(Model(), fg.RuleTable([fg.on(type=Pair, at="output").backward("stop")]))
    with pytest.raises(TypeError, match="'pair:Pair\\[0\\]@output' returned tuple"):
        gm(torch.ones(2, requires_grad=True))
    table = fg.RuleTable([fg.on(type=nn.LSTM, at="output").backward("stop")])
    with pytest.raises(fg.PlanError, match="output of LSTM, which returns a tuple"):
        fg.transform(nn.Sequential(nn.LSTM(2, 2)), table)


def compile_in_parts(model: nn.Module) -> Callable[..., Any]:
    return fg.compile(model, TABLE, backend="eager")


def test_places_in_code_that_a_compiler_leaves_to_python() -> None:
    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    model = made(Broken)
    compiled = compile_in_parts(model)
    assert_same_gradients(run(compiled, X, of=model), run(made(ByHand), X), close)
    names = [d.site.name for d in fg.report(compiled).with_action("rewrite")]
    assert "act:gelu[1]@x" in names
    assert "act:gelu[0]@x" not in names
