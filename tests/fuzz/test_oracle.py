"""The oracle against gradients that are written out by hand, and the fuzzer against planted faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from fuzz_cases import Case, check
from fuzz_oracle import FORMULAS, Oracle, apply_rules
from fuzz_programs import Class, Program, load, make, sample, unload
from fuzz_tables import ANYWHERE, WITH_OUTPUT, Entry, Table
from reference import ENTRYWISE, inputs_of

HALF = (("scale", (("s", 0.5),)),)
DOUBLED = (("scale", (("s", -2.0),)),)


def program(
    *body: Any, init: tuple[str, ...] = (), returns: str = "a", before: tuple[Class, ...] = ()
) -> Program:
    return Program((*before, Class("Model", init, body, returns)))


def gradients(made: Program, table: Table, whole: tuple[str, ...] = ()) -> dict[str, Tensor | None]:
    """What the oracle says that the gradients of the sum of the output are."""
    module = load(made)
    try:
        model = make(made, module)
        oracle = Oracle(model, table, module.__dict__, whole)
        (x,), _ = sample(made, 1)
        out = oracle([x], {})
        named = {"x": x, **dict(model.named_parameters())}
        found = torch.autograd.grad(out.sum(), [*named.values()], allow_unused=True)
        return oracle.of_parameters(dict(zip(named, found, strict=True)))
    finally:
        unload(module)


INNER = Class("Block0", (), ("a = F.relu(a)",))
X = sample(program(), 1)[0][0].detach()
ACTIVATIONS = Table((Entry(HALF, op=("activations",)),))

# The gradient of the sum of the output, by hand: a is x, b is x + 0.5, c is x / 2 at the start
BY_HAND: dict[str, tuple[Program, Table, Tensor]] = {
    "an activation": (program("a = F.relu(a)"), ACTIVATIONS, X * 0 + 0.5),
    "after another": (program("a = F.relu(torch.tanh(a))"), ACTIVATIONS, X * 0 + 0.25),
    "an operation that is not selected": (
        program("a = torch.tanh(a).round()"), Table((Entry(HALF, op=("relu",)),)), X * 0,
    ),
    "a quantizer": (program("a = a.round()"), Table((Entry(HALF, op=("quantizers",)),)), X * 0 + 0.5),
    "the native backward": (program("a = torch.tanh(a)"), Table((Entry(None, op=("all",)),)), 1 - X.tanh() ** 2),
    "in place, the result thrown away": (program("F.relu_(a)"), ACTIVATIONS, X * 0 + 0.5),
    "in place, by a keyword": (program("F.elu(a, inplace=True)"), ACTIVATIONS, X * 0 + 0.5),
    "in place, on a part": (
        program("a[:, :2].relu_()"), ACTIVATIONS, torch.tensor([0.5, 0.5, 1, 1]).double().expand(3, 4),
    ),
    "in place, and an alias": (program("b = a\na.relu_()", returns="b"), ACTIVATIONS, X * 0 + 0.5),
    "the first entry decides": (
        program("a = F.relu(a)"), Table((Entry(DOUBLED, op=("relu",)), Entry(HALF, op=("activations",)))), X * 0 - 2,
    ),
    "None decides too": (
        program("a = torch.tanh(a)"), Table((Entry(None, op=("tanh",)), Entry(HALF))), 1 - X.tanh() ** 2,
    ),
    "the second call": (
        program("a = torch.tanh(a) * 0 + F.relu(F.relu(b))"), Table((Entry(HALF, op=("relu",), call=1),)),
        0.5 * (X + 0.5 > 0),
    ),
    "by path": (
        program("a = self.act0(a) + F.relu(b)", init=("self.act0 = nn.ReLU()",)),
        Table((Entry(HALF, module="act*"),)), 0.5 + (X + 0.5 > 0),
    ),
    "by class of the owner": (
        program("a = self.act0(a) + F.relu(b)", init=("self.act0 = nn.ReLU()",)),
        Table((Entry(HALF, type="nn.ReLU"),)), 0.5 + (X + 0.5 > 0),
    ),
    "x is what it was": (
        program("b = F.relu(a)\na.zero_()", returns="b"),
        Table((Entry((("triangular", (("width", 1.5),)),), op=("relu",)),)), (1 - X.abs() / 1.5).clamp(min=0),
    ),
    "y": (
        program("a = torch.tanh(a)"), Table((Entry((("fuzz_xy", (("k", 0.25),)),)),)), X * 0.25 + X.tanh(),
    ),
    "a composition": (program("a = torch.tanh(a)"), Table((Entry(HALF + DOUBLED),)), X * 0 - 1),
    "another forward": (
        program("a = F.relu(a) * c"), Table((Entry(HALF, op=("relu",), forward="tanh"),)),
        0.5 * (X / 2) + X.tanh() / 2,
    ),
    "inside of an autograd.Function": (program("a = Halved.apply(a)"), ACTIVATIONS, X * 0 + 0.5),
    "a block of use": (program("a = F.relu(a)"), Table((), (HALF, "activations")), X * 0 + 0.5),
    "a checkpoint": (program("a = checkpoint(torch.relu, a, use_reentrant=False)"), ACTIVATIONS, X * 0 + 0.5),
    "a class whose calls are sites": (
        program("a = self.part0(a)", init=("self.part0 = Block0()",), before=(INNER,)),
        Table((Entry(DOUBLED, type="Block0"), Entry(HALF))), X * 0 - 2,
    ),
    "a softmax": (program("a = F.softmax(a, 1)"), Table((Entry(HALF, op=("softmax",)),)), X * 0 + 0.5),
    "ReLU6 is no hardtanh": (
        program("a = self.act0(a)", init=("self.act0 = nn.ReLU6()",)),
        Table((Entry(HALF, op=("relu6",)),)), X * 0 + 0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_the_oracle_is_right_about(name: str) -> None:
    made, table, expected = BY_HAND[name]
    found = gradients(made, table)["x"]
    torch.testing.assert_close(found, expected.double(), rtol=1e-12, atol=1e-12)


def test_a_module_that_is_kept_whole_keeps_its_backward() -> None:
    block = Class("Block0", (), ("a = torch.tanh(a)",))
    made = program(
        "a = self.part0(a) + F.relu(a)", init=("self.part0 = Block0()",), before=(block,)
    )
    found = gradients(made, ACTIVATIONS, whole=("part0",))["x"]
    torch.testing.assert_close(found, 1 - X.tanh() ** 2 + 0.5)


def test_a_parameter_gets_the_rule_once_on_the_sum_of_its_uses() -> None:
    made = program(
        "a = self.scale * a + self.scale * b", init=("self.scale = nn.Parameter(torch.ones(4))",)
    )
    native = gradients(made, Table(()))["scale"]
    assert native is not None
    torch.testing.assert_close(native, (2 * X + 0.5).sum(0))
    clipped = Table(
        (Entry((("clip_norm", (("max_norm", 0.5), ("eps", 1e-12))),), parameter="scale"),)
    )
    found = gradients(made, clipped)["scale"]
    torch.testing.assert_close(found, native * 0.5 / native.norm())


def test_a_parameter_that_is_read_through_another_forward() -> None:
    made = program(
        "a = a * self.scale",
        init=("self.scale = nn.Parameter(torch.tensor([0.5, -0.7, 1.1, 0.9]))",),
    )
    found = gradients(made, Table((Entry(HALF, parameter="*", forward="sign"),)))
    torch.testing.assert_close(found["scale"], 0.5 * X.sum(0))
    torch.testing.assert_close(found["x"], torch.tensor([1.0, -1, 1, 1]).double().expand(3, 4))


@pytest.mark.parametrize("rule", [*ANYWHERE, *WITH_OUTPUT], ids=lambda rule: rule[0])
def test_formulas_are_those_of_plain_arithmetic(rule: Any) -> None:
    """Against the formulas in Python's arithmetic, for which the oracle's are written anew."""
    name, parameters = rule
    g, y = X.flip(0), X.tanh()
    found = apply_rules([rule], g, X, y)
    others = {
        "clip_norm": lambda: g * min(1.0, 0.5 / float(g.square().sum()) ** 0.5),
        "centralize": lambda: g - g.sum(1, keepdim=True) / 4,
        "noise": lambda: g,
        "fuzz_x": lambda: g + g * 0.5 * X**2,
        "fuzz_xy": lambda: g * X / 4 + g * y,
    }
    if name in others:
        plain = others[name]()
    else:
        reads = 1 + len(inputs_of(name))
        pairs = zip(g.flatten().tolist(), X.flatten().tolist(), strict=True)
        values = [ENTRYWISE[name](*(p[:reads]), **dict(parameters)) for p in pairs]
        plain = torch.tensor(values, dtype=torch.float64).view_as(g)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    assert name in FORMULAS


# --- planted faults: the fuzzer is not satisfied with anything ---

NET = program(
    "a = self.fc(a)", "b = a * 1.0\nF.relu_(b)", "a = torch.tanh(a) + b", "self.mean = a.detach().mean(0)",
    init=("self.fc = nn.Linear(4, 4)", "self.register_buffer('mean', torch.zeros(4))"),
)  # fmt: skip
CASE = Case(NET, Table((Entry((("arctan", (("alpha", 2.0),)),), op=("relu", "tanh")),)))


def test_the_case_without_a_fault() -> None:
    outcome = check(CASE)
    assert (outcome.kind, outcome.acted > 0) == ("ok", True)


def _without(target: Any) -> Any:
    """`transform`, followed by a change: the nodes of that target hand on their first argument."""
    original = fg.transform

    def transform(*args: Any, **kwargs: Any) -> Any:
        gm = original(*args, **kwargs)
        for node in [n for n in gm.graph.nodes if n.target is target or n.target == target]:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
            break
        else:
            raise AssertionError("nothing to leave out")
        gm.recompile()
        return gm

    return transform


@pytest.mark.parametrize(
    "target", [fg.ops.decoupled, torch.tanh, F.relu_], ids=lambda f: f.__name__
)
def test_an_operation_that_is_lost_is_found(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fg, "transform", _without(target))
    outcome = check(CASE)
    assert outcome.kind == "failure", outcome


@pytest.mark.parametrize("name", sorted({name for name, _ in (*ANYWHERE, *WITH_OUTPUT)}))
def test_a_rule_with_another_formula_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = dict((*ANYWHERE, *WITH_OUTPUT))[name]
    own = FORMULAS[name]
    monkeypatch.setitem(FORMULAS, name, lambda *args, **given: own(*args, **given) * 1.001)
    case = Case(NET, Table((Entry(((name, parameters),), op=("relu", "tanh")),)))
    assert check(case).detail.startswith("call 0: gradients of")


def test_a_lost_buffer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = fg.transform

    def transform(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        gm = original(model, *args, **kwargs)
        gm.register_forward_hook(
            lambda module, *_: setattr(module, "mean", torch.zeros(4).double())
        )
        return gm

    monkeypatch.setattr(fg, "transform", transform)
    assert check(CASE).detail.startswith("call 0: state .mean")
