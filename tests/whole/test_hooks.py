"""Forward hooks on layers with rules: a rule replaces the backward of the forward, and hooks keep their derivative.

The oracle is the untransformed model with its hooks, run while every activation has the rule's backward.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import weight_norm

import freegrad_fx as fg
from side_by_side import BACKWARD, RULE, Net, build, check_capture, sample
from sweep import Interception

TABLE = {"activations": fg.rules.rectangular(a=-0.8, b=1.2)}


def forward(hook: Any, **how: bool) -> Callable[[nn.Module], Any]:
    return lambda module: module.register_forward_hook(hook, **how)


def before(hook: Any, **how: bool) -> Callable[[nn.Module], Any]:
    return lambda module: module.register_forward_pre_hook(hook, **how)


def several(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    module.register_forward_pre_hook(lambda m, args: (args[0].sin(),), prepend=True)
    module.register_forward_hook(lambda m, args, y: y * 3)
    module.register_forward_hook(lambda m, args, y: y.cos(), prepend=True)
    module.register_forward_hook(lambda m, args, y: None)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "changes the output": forward(lambda m, args, y: y * 3),
    "changes the input": before(lambda m, args: (args[0] * 2,)),
    "changes the input, without a tuple": before(lambda m, args: args[0] * 2),
    "gets keywords": forward(lambda m, args, kwargs, y: y * 3, with_kwargs=True),
    "gets keywords before": before(lambda m, args, kw: ((args[0] * 2,), kw), with_kwargs=True),
    "makes it a keyword": before(lambda m, args, kw: ((), {"input": args[0] * 2}), with_kwargs=True),
    "runs always": forward(lambda m, args, y: y * 3, always_call=True),
    "reads the input": forward(lambda m, args, y: y + args[0].sin()),
    "returns the input": forward(lambda m, args, y: args[0]),
    "writes into the input before": before(lambda m, args: args[0].mul_(0.5)),
    "returns a tuple": forward(lambda m, args, y: (y * 2, args[0])),
    "returns a dict": forward(lambda m, args, y: {"y": y * 2, "x": args[0]}),
    "only looks": forward(lambda m, args, y: None),
    "only looks before": before(lambda m, args: None),
    "several": several,
}  # fmt: skip

ACTIVATIONS = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "in place": lambda: nn.ReLU(inplace=True),
    "prelu": lambda: nn.PReLU(6),
}


class Hooked(Net):
    """An activation with a hook; its input is read again afterwards."""

    returns: str = ""

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        y = self.act(h)
        if self.returns == "tuple":
            y = y[0] + y[1]
        elif self.returns == "dict":
            y = y["y"] + y["x"]
        return self.g(y) + h


def hooked(name: str, activation: str = "relu") -> Hooked:
    model = Hooked()
    model.act = ACTIVATIONS[activation]()
    model.returns = name.removeprefix("returns a ") if name.startswith("returns a ") else ""
    HOOKS[name](model.act)
    return model


@pytest.mark.sampled(6)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_keep_their_derivative(name: str, activation: str) -> None:
    check_capture(lambda: hooked(name, activation), modes=(True,))


# --- every way in ---


def exported(model: nn.Module) -> Any:
    with pytest.warns(fg.FreegradWarning, match="the hooks of ReLU: torch.export runs them once"):
        return fg.transform(model, TABLE, example_inputs=(sample(),))


def following(model: nn.Module) -> Any:
    gm = fg.transform(model)

    def call(x: Tensor) -> Any:
        with fg.use(RULE, scope="all"):
            return gm(x)

    return call


def twice(model: nn.Module) -> Any:
    return fg.transform(fg.transform(model), TABLE)


def saved(model: nn.Module) -> Any:
    return copy.deepcopy(fg.transform(model, TABLE))


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "symbolic": lambda model: fg.transform(model, TABLE),
    "export": exported,
    "ambient": following,
    "compile": lambda model: fg.compile(model, TABLE, backend="aot_eager"),
    "compiled": lambda model: torch.compile(
        fg.transform(model, TABLE), backend="aot_eager", fullgraph=True
    ),
    "twice": twice,
    "copied": saved,
}


def gradients(function: Callable[[Tensor], Tensor], of: nn.Module) -> list[Tensor]:
    x = sample().requires_grad_()
    y = function(x)
    return [y, *torch.autograd.grad(y.sin().sum(), [x, *of.parameters()])]


def expected(model: nn.Module) -> list[Tensor]:
    with Interception(BACKWARD):
        return gradients(model, model)


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert torch.equal(found[0], wanted[0])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["changes the output", "makes it a keyword", "reads the input", "returns a dict", "several"]
)  # fmt: skip
def test_all_ways_in_agree(name: str, way: str) -> None:
    model = build(lambda: hooked(name))
    wanted = expected(model)
    function = WAYS[way](model)
    of = model if way == "copied" else None
    if of is not None:  # a copy has its own parameters
        of = function
    same(gradients(function, of or model), wanted)


def test_a_straight_through_rule_leaves_the_factor_of_a_hook() -> None:
    model = nn.Sequential(nn.ReLU())
    model[0].register_forward_hook(lambda m, args, y: y * 3)
    gm, x = fg.transform(model, {"relu": "straight_through"}), torch.tensor([-1.0, 2.0])
    x.requires_grad_()
    gm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3]


def test_an_ambient_site_is_native_outside_of_blocks() -> None:
    model = build(lambda: hooked("several"))
    same(gradients(fg.transform(model), model), gradients(model, model))


class Swish(nn.Module):
    def forward(self, x: Tensor, by: float = 1.0) -> Tensor:
        return x * (by * x).sigmoid()


@pytest.mark.parametrize("way", ["symbolic", "ambient"])
def test_hooks_of_a_class_that_the_table_selects(way: str) -> None:
    """A pre-hook adds an argument, and the rule is around the forward alone."""
    model = nn.Sequential(nn.Linear(6, 6), Swish())
    model[1].register_forward_pre_hook(lambda m, args: (args[0] * 2, 1.5))
    model[1].register_forward_hook(lambda m, args, y: y + args[0] * args[1])
    gm = fg.transform(model, {Swish: "straight_through"})

    class ByHand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = model[0](x) * 2
            y = h * (1.5 * h).sigmoid()
            return (y.detach() + h - h.detach()) + h * 1.5

    by_hand = ByHand()
    assert torch.equal(gm(sample()), model(sample()))
    for a, b in zip(gradients(gm, model), gradients(by_hand, model), strict=True):
        torch.testing.assert_close(a, b)


def test_rules_on_an_operation_and_on_its_parameter() -> None:
    """Hooks read the parameter through its rule, as they do without a rule on the operation."""
    model = nn.Sequential(nn.Linear(6, 6), nn.PReLU(6))
    model[1].register_forward_pre_hook(lambda m, args: (args[0] * m.weight,))
    model[1].register_forward_hook(lambda m, args, y: y * m.weight)
    rules = {"prelu": "straight_through", "params": fg.rules.scale(s=2.0)}

    class ByHand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h, weight = model[0](x), model[1].weight
            h = h * weight
            return F.prelu(h.detach(), weight) * weight + (h - h.detach()) * weight.detach()

    gm = fg.transform(model, rules)
    wanted = gradients(ByHand(), model)
    for function in (gm, torch.compile(gm, backend="aot_eager", fullgraph=True)):
        found = gradients(function, model)
        assert torch.equal(found[0], model(sample()))
        for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
            torch.testing.assert_close(a, b if index < 2 else 2 * b)


def test_a_hook_that_writes_into_the_argument_of_the_forward() -> None:
    """The rule reads the input of the operation from before the write."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model[1].register_forward_hook(lambda m, args, y: args[0].mul_(0.5) * y)

    class ByHand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = model[0](x)
            passed = h * ((h >= -0.8) & (h <= 1.2))
            return h * 0.5 * (F.relu(h.detach()) + passed - passed.detach())

    gm = fg.transform(model, TABLE)
    assert torch.equal(gm(sample()), model(sample()))
    for a, b in zip(gradients(gm, model), gradients(ByHand(), model), strict=True):
        torch.testing.assert_close(a, b)


def test_a_replaced_forward_keeps_the_hooks() -> None:
    model = nn.Sequential(nn.ReLU())
    model[0].register_forward_hook(lambda m, args, y: y * 3)
    model[0].register_forward_pre_hook(lambda m, args: (args[0] - 1,))
    entry = fg.on("relu", forward="heaviside").backward("straight_through")
    gm = fg.transform(model, fg.RuleTable([entry]))
    x = torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)
    y = gm(x)
    y.sum().backward()
    assert y.tolist() == [0, 0, 3]
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3, 3]


def test_hooks_of_layers_with_rules_on_their_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model[0].register_forward_hook(lambda m, args, y: y * m.bias)
    model[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    wanted = gradients(model, model)
    found = gradients(fg.transform(model, {"params": fg.rules.scale(s=2.0)}), model)
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1], wanted[1])
    for a, b in zip(found[2:], wanted[2:], strict=True):
        torch.testing.assert_close(a, 2 * b)


def test_weight_norm_by_a_pre_hook() -> None:
    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return nn.Sequential(weight_norm(nn.Linear(6, 6)), weight_norm(nn.PReLU(6), dim=None))

    model = build(make)
    wanted = expected(model)
    same(gradients(fg.transform(model, TABLE), model), wanted)


# --- when and with what hooks are called ---

TABLES = {
    "with a rule": TABLE,
    "native": {"activations": None},
    "rules on parameters": {"params": "straight_through"},
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_are_called_once_with_the_module_of_the_graph(table: str, inplace: bool) -> None:
    calls: list[tuple[Any, ...]] = []
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace))
    for part in model:
        part.register_forward_pre_hook(lambda m, args: calls.append(("before", m, args)))
        part.register_forward_hook(lambda m, args, y: calls.append(("after", m, args, y)))
    gm = fg.transform(model, TABLES[table])
    assert not calls, "the capture called a hook"
    for _ in range(2):
        calls.clear()
        y = gm(sample())
        assert [c[:2] for c in calls] == [
            ("before", gm[0]), ("after", gm[0]), ("before", gm[1]), ("after", gm[1]),
        ]  # fmt: skip
        assert calls[2][2][0] is calls[3][2][0] is calls[1][3]
        assert calls[3][3] is y
        if inplace:
            assert y is calls[3][2][0]
    modules = [node.op for node in gm.graph.nodes if node.op == "call_module"]
    assert len(modules) == {"with a rule": 1, "native": 2, "rules on parameters": 1}[table]


@pytest.mark.parametrize("table", ["with a rule", "native"])
def test_hooks_for_errors_are_called_once(table: str) -> None:
    """As by PyTorch: also if a hook, a pre-hook or the forward raises the error."""
    for fails in ("before", "forward", "after", "later"):
        seen: list[Any] = []

        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        model = nn.Sequential(nn.ReLU())
        act = model[0]
        if fails == "before":
            act.register_forward_pre_hook(fail)
        if fails == "after":
            act.register_forward_hook(fail)
        act.register_forward_hook(
            lambda m, args, y, seen=seen: seen.append(y is None), always_call=True
        )
        act.register_forward_hook(
            lambda m, args, kwargs, y, seen=seen: seen.append(kwargs),
            always_call=True,
            with_kwargs=True,
        )
        if fails == "later":
            act.register_forward_hook(fail)
        gm = fg.transform(model, TABLES[table])
        found = []
        for function in (model, gm):
            seen.clear()
            given: Any = "no tensor" if fails == "forward" else sample()
            with pytest.raises((ZeroDivisionError, TypeError, RuntimeError)):
                function(given)
            found.append(list(seen))
        if fails != "forward" or table == "native":  # a rule refuses what is no tensor
            assert found[0] == found[1], fails


def test_a_pre_hook_that_leaves_no_tensor_is_an_error_that_names_the_module() -> None:
    class Takes(nn.Module):
        def forward(self, x: Any = 1.0) -> Any:
            return torch.ones(2) * x

    model = nn.Sequential(Takes())
    model[0].register_forward_pre_hook(lambda m, args: (2.0,))
    gm = fg.transform(model, {Takes: "straight_through"})
    with pytest.raises(RuntimeError, match="the forward pre-hooks of Takes leave no tensor"):
        gm(sample())


def test_a_pre_hook_with_keywords_has_to_return_a_pair() -> None:
    model = nn.Sequential(nn.ReLU())
    model[0].register_forward_pre_hook(lambda m, args, kwargs: args[0], with_kwargs=True)
    with pytest.raises(
        RuntimeError, match="a forward pre-hook of ReLU with keywords has to return"
    ):
        fg.transform(model, TABLE)(sample())


# --- hooks that come later, and hooks for all modules ---


def test_hooks_that_hold_state_run_at_each_call() -> None:
    class Counts:
        def __init__(self) -> None:
            self.number = 0

        def __call__(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
            self.number += 1
            return y * self.number

    model, counts = nn.Sequential(nn.ReLU()), Counts()
    model[0].register_forward_hook(counts)
    gm, x = fg.transform(model, {"relu": "straight_through"}), torch.ones(2, requires_grad=True)
    for number in (1, 2, 3):
        (grad,) = torch.autograd.grad(gm(x).sum(), x)
        assert grad.tolist() == [number, number]


def test_hooks_can_be_removed_and_added_where_a_layer_had_hooks() -> None:
    model, x = nn.Sequential(nn.ReLU()), torch.ones(2, requires_grad=True)
    model[0].register_forward_hook(lambda m, args, y: None)
    gm = fg.transform(model, {"relu": "straight_through"})
    handle = gm[0].register_forward_hook(lambda m, args, y: y * 3)
    assert torch.autograd.grad(gm(x).sum(), x)[0].tolist() == [3, 3]
    handle.remove()
    assert torch.autograd.grad(gm(x).sum(), x)[0].tolist() == [1, 1]


@pytest.mark.parametrize("ruled", [False, True])
def test_hooks_that_come_after_the_transform_run(ruled: bool) -> None:
    model, x = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), torch.ones(3, 2)
    gm = fg.transform(model, {"relu": "straight_through"})
    gm[int(ruled)].register_forward_hook(lambda m, args, y: y * 3)
    y = gm(x)
    h = model[0](x)
    assert torch.equal(y, F.relu(h) * 3 if ruled else F.relu(h * 3))
    (grad,) = torch.autograd.grad(y.sum(), gm[0].bias)
    assert grad.tolist() == [9, 9]


@contextlib.contextmanager
def for_all(hook: Any, pre_hook: Any) -> Iterator[None]:
    handles = [
        torch_module.register_module_forward_hook(hook),
        torch_module.register_module_forward_pre_hook(pre_hook),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_for_all_modules(inplace: bool) -> None:
    def hook(module: nn.Module, args: Any, y: Any) -> Any:
        return y * 3 if isinstance(module, nn.ReLU) else None

    def pre_hook(module: nn.Module, args: Any) -> Any:
        return args[0] * 2 if isinstance(module, nn.ReLU) else None

    model = build(lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace)))
    with for_all(hook, pre_hook):
        gm = fg.transform(model, TABLE)
        same(gradients(gm, model), expected(model))
        ambient = WAYS["ambient"](model)
        same(gradients(ambient, model), expected(model))
    same(gradients(gm, model), expected(model))  # after they are removed


def test_an_export_refuses_hooks_for_all_modules() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    with for_all(lambda *_: None, lambda *_: None):
        with pytest.raises(fg.CaptureError, match="forward hooks for all modules"):
            fg.transform(model, TABLE, example_inputs=(sample(),))
        fg.transform(model, TABLE)(sample())


# --- saved ---


def times_three(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y * 3


def test_a_saved_model_keeps_its_hooks() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model[1].register_forward_hook(times_three)
    gm = pickle.loads(pickle.dumps(fg.transform(model, TABLE)))
    same(gradients(gm, gm), expected(model))
