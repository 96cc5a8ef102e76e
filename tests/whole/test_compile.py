"""`torch.compile` of a transformed model: one graph for every rule, and nothing that is changed later is ignored.

What is right is decided by plain autograd: models in which the same operations are `autograd.Function`s by hand, native
gradients put through a rule's formula, and the transformed model uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import freegrad_fx as fg
import reference

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
    ),
]
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow]),
]
ON_EVERY_BACKEND = pytest.mark.parametrize("backend", BACKENDS)
# aot_eager runs the graph of eager, and more
ON_EAGER_SLOWLY = pytest.mark.parametrize(
    "backend", [pytest.param("eager", marks=pytest.mark.slow), *BACKENDS[1:]]
)
SLOWLY = pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])
ON_INDUCTOR_SLOWLY = pytest.mark.parametrize("backend", ["eager", "aot_eager", SLOWLY])
ON_EVERY_DEVICE = pytest.mark.parametrize("device", DEVICES)


def bound(name: str) -> fg.Rule:
    """A rule of the registry; what has no default is given a value that every rule so far can take."""
    rule = fg.get(name)
    return rule(**{p.name: 0.5 for p in rule.parameters.values() if p.required})


def is_random(rule: fg.Rule) -> bool:
    """Whether two gradients for the same input differ."""
    x, grad = torch.randn(2, 8, 8)
    y = x.tanh()
    return not torch.equal(rule.backward(grad, x=x, y=y), rule.backward(grad, x=x, y=y))


# Rules of several operands are in test_rules_of_operands.py
OF_ONE_INPUT = [r for r in fg.rules.available() if not fg.get(r).declaration.needs_operation]
RULES = {name: bound(name) for name in OF_ONE_INPUT}
DETERMINISTIC = {name: rule for name, rule in RULES.items() if not is_random(rule)}
RANDOM = {name: rule for name, rule in RULES.items() if name not in DETERMINISTIC}


def serving(kind: str, rules: dict[str, fg.Rule], backend: str = "") -> dict[str, fg.Rule]:
    """The rules for a kind of sites, or those of a share of the backend's, as compiling each with each takes long."""
    names = [name for name, rule in rules.items() if kind in rule.kinds and rule.keeps_shape]
    shares = {"eager": (0, 2), "aot_eager": (1, 2), "inductor": (0, 1 + len(names) // 12)}
    first, step = shares.get(backend, (0, 1))
    return {name: rules[name] for name in names[first::step]}


def gradients(model: Callable[..., Tensor], x: Tensor, leaves: Any) -> dict[str, Tensor]:
    """The gradients of a loss that weighs every output differently; `leaves` is a module or named tensors."""
    named = dict(leaves.named_parameters()) if isinstance(leaves, nn.Module) else leaves
    output = model(x)
    weights = torch.linspace(-1, 2, output.numel(), device=output.device).reshape(output.shape)
    found = torch.autograd.grad((output * weights).sum(), list(named.values()))
    return dict(zip(named, found, strict=True))


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], exact: bool = False
) -> None:
    rounding = {"rtol": 0, "atol": 0} if exact else {}
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, **rounding, msg=lambda m, name=name: f"{name}: {m}"
        )


def times(factor: float) -> Callable[..., Tensor]:
    return lambda grad: factor * grad


def compiled(model: Any, backend: Any, **options: Any) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True, **options)


# --- every rule ---


class Branches(nn.Module):
    """One linear layer and one activation for every rule: a single compilation tries them all."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(5, 5) for _ in names)
        self.act = nn.ModuleList(nn.Sigmoid() for _ in names)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([a(2 * f(x)) for f, a in zip(self.linear, self.act, strict=True)])


def by_hand(model: Branches, rules: list[fg.Rule]) -> Callable[[Tensor], Tensor]:
    """The branches, each with its activation as an `autograd.Function` around the rule's formula."""

    def forward(x: Tensor) -> Tensor:
        outputs = []
        for linear, rule in zip(model.linear, rules, strict=True):
            act = reference.oracle(torch.sigmoid, lambda g, x, y, rule=rule: chained(rule, g, x, y))
            outputs.append(act(2 * linear(x)))
        return torch.stack(outputs)

    return forward


def chained(rule: Any, grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    for part in rule.parts:
        grad = part.at_operation(torch.sigmoid).backward(grad, x=x, y=y)
    return grad


def on_activations(rules: list[Any]) -> fg.RuleTable:
    return fg.RuleTable(
        [fg.on("sigmoid", module=f"act.{i}").backward(rule) for i, rule in enumerate(rules)]
    )


@ON_EVERY_DEVICE
@ON_EAGER_SLOWLY
def test_every_rule_on_activations_gives_the_gradients_of_plain_autograd(
    backend: str, device: str
) -> None:
    rules = serving("operation", DETERMINISTIC, backend)
    model = Branches(list(rules)).to(device)
    x = torch.randn(4, 5, device=device)
    gm = fg.transform(model, on_activations(list(rules.values())))
    expected = gradients(by_hand(model, list(rules.values())), x, model)
    assert_same(gradients(gm, x, model), expected)
    assert_same(gradients(compiled(gm, backend), x, model), expected)


@pytest.mark.slow
@ON_EVERY_DEVICE
@ON_INDUCTOR_SLOWLY
def test_every_rule_in_a_composition_gives_the_gradients_of_plain_autograd(
    backend: str, device: str
) -> None:
    """Each rule before the next, and two of one kind with other parameters (case 40)."""
    rules = list(serving("operation", DETERMINISTIC, backend).values())
    chains: list[Any] = [
        fg.compose(first, second)
        for first, second in zip(rules, [*rules[1:], rules[0]], strict=True)
        if "y" not in second.inputs
    ]
    chains.append(fg.compose(fg.rules.scale(s=2.0), fg.rules.clip_norm(), fg.rules.scale(s=5.0)))
    model = Branches([str(chain) for chain in chains]).to(device)
    x = torch.randn(4, 5, device=device)
    expected = gradients(by_hand(model, chains), x, model)
    gm = fg.transform(model, on_activations(chains))
    assert_same(gradients(compiled(gm, backend), x, model), expected)


@pytest.mark.slow
@ON_EVERY_DEVICE
@ON_EVERY_BACKEND
def test_every_rule_on_parameters_is_given_the_native_gradient(backend: str, device: str) -> None:
    rules = serving("parameter", DETERMINISTIC, backend)
    model = Branches(list(rules)).to(device)
    x = torch.randn(4, 5, device=device)
    table = fg.RuleTable(
        [
            fg.on(parameter=f"linear.{index}.weight").backward(rule)
            for index, rule in enumerate(rules.values())
        ]
    )
    native = gradients(model, x, model)
    expected = {
        **native,
        **{
            f"linear.{index}.weight": rule.backward(
                native[f"linear.{index}.weight"],
                x=model.linear[index].weight.detach(),
                y=model.linear[index].weight.detach(),
            )
            for index, rule in enumerate(rules.values())
        },
    }
    actual = gradients(compiled(fg.transform(model, table), backend), x, model)
    assert_same(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["activations", "params"])
def test_random_rules_are_reproducible_with_a_seed(kind: str) -> None:
    """Case 30. What eager draws need not be what compiled code draws, but a seed gives the same again."""
    for name, rule in serving(kind.removesuffix("s").replace("param", "parameter"), RANDOM).items():
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(5, 5), nn.Sigmoid())
        run = compiled(fg.transform(model, {kind: rule}), "aot_eager")
        x = torch.randn(4, 5)
        found = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(gradients(run, x, model)["0.weight"])
        assert torch.equal(found[0], found[1]), name
        assert not torch.equal(found[0], found[2]), name


@pytest.mark.slow
@pytest.mark.inductor
def test_random_rules_under_inductor_draw_from_the_same_distribution() -> None:
    """The mean and the spread of the gradient of many entries, beside those of the formula itself."""
    names = ("noise", "positive_jam", "dropout_gradient", "stochastic_sign")
    rules = {name: RANDOM[name] for name in names}
    model = Branches(list(rules))
    x = torch.randn(4000, 5)
    run = compiled(fg.transform(model, on_activations(list(rules.values()))), "inductor")
    actual = inputs_gradient(model, run, x)
    expected = inputs_gradient(model, by_hand(model, list(rules.values())), x)
    for name, a, e in zip(rules, actual, expected, strict=True):
        error = e.std() / e.numel() ** 0.5
        assert abs(a.mean() - e.mean()) < 6 * error, name
        torch.testing.assert_close(a.std(), e.std(), rtol=0.05, atol=0, msg=name)
        assert not torch.equal(a, e), name


def inputs_gradient(model: Branches, run: Callable[..., Tensor], x: Tensor) -> Tensor:
    """The gradient that enters each branch's linear layer, whose bias has the sum over the samples."""
    x = x.clone().requires_grad_()
    output = run(x)
    seen = []
    for index in range(len(model.linear)):
        (g,) = torch.autograd.grad(output[index].sum(), x, retain_graph=True)
        # The gradient behind the layer's transposed weight
        seen.append(torch.linalg.solve(model.linear[index].weight.T, g.T).T)
    return torch.stack(seen)


# --- models of every form ---


class Modes(nn.Module):
    """Other activations in train and in eval mode, a keyword with a default, a dict for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 5)

    def forward(self, x: Tensor, *, shift: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.first(x)) + shift
        x = F.relu(x, inplace=True) if self.training else torch.tanh(x)
        return {"out": self.second(x)}


MODES_RULES = {"relu": "straight_through", "tanh": fg.rules.fast_sigmoid(slope=2.0)}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_modes_and_keywords_compile(backend: str) -> None:
    model = Modes()
    gm = fg.transform(model, MODES_RULES)
    run = compiled(gm, backend)
    x, shift = torch.randn(4, 5), torch.randn(5)
    for training in (True, False, True):
        for m in (gm, run, model):
            m.train(training)
        native = gradients(lambda x: model(x, shift=shift)["out"], x, model)
        expected = gradients(lambda x: gm(x, shift=shift)["out"], x, model)
        actual = gradients(lambda x: run(x, shift=shift)["out"], x, model)
        assert_same(actual, expected)
        assert not torch.equal(expected["first.weight"], native["first.weight"])


class Repeated(nn.Module):
    """Symbolic tracing cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[1] // 3):
            x = torch.relu(self.fc(x))
        return x


@pytest.mark.sampled(2)
@ON_INDUCTOR_SLOWLY
def test_a_model_captured_by_export_compiles(backend: str) -> None:
    model, x = Repeated(), torch.randn(4, 6)
    gm = fg.transform(model, "straight_through", example_inputs=(x,))
    by_hand_act = reference.oracle(torch.relu, lambda g, x, y: g)

    def reference_model(x: Tensor) -> Tensor:
        return by_hand_act(model.fc(by_hand_act(model.fc(x))))

    expected = gradients(reference_model, x, model)
    run = compiled(gm, backend)
    assert_same(gradients(run, x, model), expected)
    wider = torch.randn(7, 6)
    assert_same(gradients(run, wider, model), gradients(reference_model, wider, model))


def test_a_transformed_part_of_a_compiled_whole_keeps_its_rules() -> None:
    part = nn.Sequential(nn.Linear(5, 5), nn.ReLU())
    whole = nn.Sequential(fg.transform(part, {"relu": fg.rules.scale(s=3.0)}), nn.Linear(5, 2))
    act = reference.oracle(torch.relu, lambda g, x, y: 3 * g)
    x = torch.randn(4, 5)
    expected = gradients(lambda x: whole[1](act(part[0](x))), x, part)
    assert_same(gradients(compiled(whole, "aot_eager"), x, part), expected)


def test_rules_in_a_row_both_act_when_compiled() -> None:
    """Case 14: what stands behind a rule must see that its input requires a gradient."""
    model = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Sigmoid())
    run = compiled(fg.transform(model, fg.rules.scale(s=2.0)), "aot_eager")
    x = torch.randn(6, requires_grad=True)
    output = run(x)
    assert output.requires_grad
    (gradient,) = torch.autograd.grad(output, x, torch.ones(6))
    assert torch.equal(gradient, torch.full((6,), 8.0))


def test_rules_of_one_factory_keep_their_own_constants_when_compiled() -> None:
    """Case 34."""
    model = nn.Sequential(nn.ReLU(), nn.Tanh())
    table = {
        "relu": fg.register("twice")(times(2.0)),
        "tanh": fg.register("five_times")(times(5.0)),
    }
    run = compiled(fg.transform(model, table), "aot_eager")
    x = torch.randn(6, requires_grad=True)
    (gradient,) = torch.autograd.grad(run(x), x, torch.ones(6))
    assert torch.equal(gradient, torch.full((6,), 10.0))


# --- changes after compiling ---


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def small() -> Small:
    return Small()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 5)


def small_by_hand(model: Small, backward: Callable[[Tensor, Tensor], Tensor]) -> Any:
    act = reference.oracle(torch.relu, lambda g, x, y: backward(g, x))
    return lambda x: model.second(act(model.first(x)))


def scaled(model: Small, factor: float) -> Any:
    return small_by_hand(model, lambda g, x: factor * g)


def set_scale(gm: fg.CapturedModule, s: float) -> None:
    for node in gm.graph.nodes:
        if node.target is fg.ops.decoupled:
            node.update_kwarg("s", s)
    gm.recompile()


class Container(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def compiled_in_place(gm: Any, backend: Any) -> Any:
    gm.compile(backend=backend, fullgraph=True)
    return gm


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "torch.compile(gm)": compiled,
    "gm.compile()": compiled_in_place,
    "a part of a compiled module": lambda gm, backend: compiled(Container(gm), backend),
    "called by a compiled function": lambda gm, backend: compiled(lambda x: gm(x), backend),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", WAYS)
def test_an_edited_graph_takes_effect(small: Small, x: Tensor, way: str) -> None:
    gm = fg.transform(small, {"relu": fg.rules.scale(s=2.0)})
    counter = CompileCounterWithBackend("aot_eager")
    run = WAYS[way](gm, counter)
    assert_same(gradients(run, x, small), gradients(scaled(small, 2.0), x, small))
    for s in (3.0, 4.0):
        set_scale(gm, s)
        assert_same(gradients(run, x, small), gradients(scaled(small, s), x, small))
    assert counter.frame_count == 3


def test_an_edited_graph_of_a_mode_takes_effect() -> None:
    gm = fg.transform(Modes(), MODES_RULES)
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(Container2(gm), counter)
    x = torch.randn(4, 5)
    for training in (True, False):
        gm.train(training)
        before = gradients(run, x, gm)
        set_rule(gm, fg.rules.scale(s=3.0))
        expected = gradients(lambda x: gm(x, shift=torch.zeros(5))["out"], x, gm)
        assert_same(gradients(run, x, gm), expected)
        assert not torch.equal(before["first.weight"], expected["first.weight"])


class Container2(Container):
    def forward(self, x: Tensor) -> Tensor:
        return self.part(x, shift=torch.zeros(5))["out"]


def set_rule(gm: fg.CapturedModule, rule: fg.Rule) -> None:
    for node in gm.graph.nodes:
        if node.target is fg.ops.decoupled:
            node.kwargs = {"rule": rule.name, "site": node.kwargs["site"], **rule.bound}
    gm.recompile()


def test_a_new_transform_has_its_own_rule(small: Small, x: Tensor) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    for s in (2.0, 3.0, 2.0):
        gm = fg.transform(small, {"relu": fg.rules.scale(s=s)})
        actual = gradients(compiled(gm, counter), x, small)
        assert_same(actual, gradients(scaled(small, s), x, small))


def test_a_rule_registered_anew_takes_effect_and_is_compiled_once(small: Small, x: Tensor) -> None:
    formulas = {factor: times(factor) for factor in (2.0, 3.0, 4.0)}
    fg.register("replaced")(formulas[2.0])
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(fg.transform(small, {"relu": "replaced"}), counter)
    for factor in (2.0, 3.0, 4.0, 3.0, 2.0):
        fg.register("replaced", overwrite=True)(formulas[factor])
        assert_same(gradients(run, x, small), gradients(scaled(small, factor), x, small))
    assert counter.frame_count <= 3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_block_with_another_rule_takes_effect_and_is_compiled_once(
    small: Small, x: Tensor, backend: str
) -> None:
    counter = CompileCounterWithBackend(backend)
    run = compiled(fg.transform(small), counter)
    for _ in range(2):
        for s in (2.0, 3.0):
            with fg.use("scale", {"s": s}):
                assert_same(gradients(run, x, small), gradients(scaled(small, s), x, small))
        assert_same(gradients(run, x, small), gradients(small, x, small))
    assert counter.frame_count == 3


def test_native_switches_compiled_rules_off(small: Small, x: Tensor) -> None:
    run = compiled(fg.transform(small, {"relu": fg.rules.scale(s=2.0)}), "aot_eager")
    for _ in range(2):
        assert_same(gradients(run, x, small), gradients(scaled(small, 2.0), x, small))
        with fg.native():
            assert_same(gradients(run, x, small), gradients(small, x, small))


def test_more_settings_than_the_compiler_keeps_are_never_stale(small: Small, x: Tensor) -> None:
    fg.register("replaced")(lambda grad: grad)
    gm = fg.transform(small, {"relu": "replaced"})
    run = torch.compile(gm, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for factor in (2.0, 3.0, 4.0, 5.0):
            fg.register("replaced", overwrite=True)(times(factor))
            assert_same(gradients(run, x, small), gradients(scaled(small, factor), x, small))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_tensor_that_is_filled_never_recompiles(small: Small, x: Tensor, backend: str) -> None:
    """Case 25: a schedule."""
    slope = torch.tensor(1.0)
    gm = fg.transform(
        small, {"relu": fg.rules.fast_sigmoid(slope=slope), "params": fg.rules.scale(s=slope)}
    )
    counter = CompileCounterWithBackend(backend)
    run = compiled(gm, counter)
    for value in (1.0, 2.0, 5.0, 10.0, 20.0, 25.0):
        slope.fill_(value)
        formula = small_by_hand(small, lambda g, x: g / (1 + slope * x.abs()) ** 2)
        expected = {n: value * g for n, g in gradients(formula, x, small).items()}
        assert_same(gradients(run, x, small), expected)
    assert counter.frame_count == 1


@pytest.mark.inductor
def test_a_tensor_that_is_filled_is_read_by_inductor(small: Small, x: Tensor) -> None:
    s = torch.tensor(1.0)
    run = compiled(fg.transform(small, {"relu": fg.rules.scale(s=s)}), "inductor")
    for value in (1.0, 2.0, 3.0):
        s.fill_(value)
        assert_same(gradients(run, x, small), gradients(scaled(small, value), x, small))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_tensor_may_be_several_parameters_when_compiled(
    small: Small, x: Tensor, backend: str
) -> None:
    @fg.register("product")
    def product(grad: Tensor, x: Tensor, *, p: float = 1.0, q: float = 1.0) -> Tensor:
        return grad * p * q

    factor = torch.tensor(3.0)
    run = compiled(fg.transform(small, {"relu": product(p=factor, q=factor)}), backend)
    assert_same(gradients(run, x, small), gradients(scaled(small, 9.0), x, small))


def test_a_parameter_of_the_model_may_be_that_of_its_own_rule_when_compiled() -> None:
    class Sloped(Small):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.slope * super().forward(x)

    model, x = Sloped(), torch.randn(4, 5)
    run = compiled(fg.transform(model, {"params": fg.rules.scale(s=model.slope)}), "aot_eager")
    expected = {name: 3 * g for name, g in gradients(model, x, model).items()}
    assert_same(gradients(run, x, model), expected)


# --- shapes, devices, options ---


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [True, None, "marked"])
def test_shapes_may_change(small: Small, dynamic: Any, backend: str) -> None:
    table = {"relu": fg.compose("clip_norm", "fast_sigmoid"), "params": "clip_norm"}
    gm = fg.transform(small, table)
    counter = CompileCounterWithBackend(backend)
    run = compiled(gm, counter, dynamic=None if dynamic == "marked" else dynamic)
    for samples in (4, 7, 9, 3):
        x = torch.randn(samples, 5)
        if dynamic == "marked":
            torch._dynamo.mark_dynamic(x, 0)
        assert_same(gradients(run, x, small), gradients(gm, x, small))
    assert counter.frame_count == (2 if dynamic is None else 1)


@ON_EVERY_DEVICE
@pytest.mark.inductor
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
@pytest.mark.filterwarnings("ignore:.*cudagraphs?.*:UserWarning")
def test_modes_of_the_compiler_pass_through(mode: str, device: str) -> None:
    small, x = Small().to(device), torch.randn(4, 5, device=device)
    gm = fg.transform(small, {"relu": fg.rules.scale(s=2.0)})
    run = torch.compile(gm, mode=mode, fullgraph=True)
    for _ in range(3):  # CUDA graphs are recorded at the second call
        assert_same(gradients(run, x, small), gradients(scaled(small, 2.0), x, small))


@ON_EVERY_DEVICE
@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)]
)
def test_autocast_leaves_a_gradient_the_dtype_of_its_input(device: str, backend: str) -> None:
    """Case 28."""
    small = Small().to(device)
    gm = fg.transform(small, {"relu": fg.rules.rectangular(a=-1.0, b=1.0), "params": "clip_value"})
    x = torch.randn(4, 5, device=device)
    weights = torch.linspace(-1, 2, 20, device=device).reshape(4, 5)

    def loss(x: Tensor, model: Any = gm) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            output = model(x)
        assert output.dtype == torch.bfloat16
        return (output.float() * weights).sum()

    results = []
    for run in (loss, compiled(loss, backend)):
        leaf = x.clone().requires_grad_()
        found = torch.autograd.grad(run(leaf), [leaf, *small.parameters()])
        assert {g.dtype for g in found} == {torch.float32}
        results.append(found)
    torch.testing.assert_close(*results, rtol=0.02, atol=0.002)


# --- where there is no gradient, a rule costs nothing ---


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("run", ["eager", "aot_eager"])
def test_without_gradients_a_rule_costs_nothing(
    small: Small, x: Tensor, context: Any, run: str
) -> None:
    gm = fg.transform(small, {"relu": "fast_sigmoid"})
    model = gm if run == "eager" else compiled(gm, run)
    with context():
        output = model(x)
        assert output.grad_fn is None
        assert torch.equal(output, small(x))
    # and what was compiled without gradients does not serve where there are some
    expected = small_by_hand(small, lambda g, x: g / (1 + 25 * x.abs()) ** 2)
    assert_same(gradients(model, x, small), gradients(expected, x, small))


def test_without_gradients_nothing_is_saved(small: Small, x: Tensor) -> None:
    gm = fg.transform(small, {"relu": "fast_sigmoid"})
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        with torch.no_grad():
            gm(x)
        assert saved == []
        gm(x)
    assert saved


def test_compiled_graphs_without_gradients_hold_no_rule(small: Small, x: Tensor) -> None:
    counter = CompileCounterWithBackend("eager")
    run = compiled(fg.transform(small, {"relu": "fast_sigmoid"}), counter)
    with torch.no_grad():
        run(x)
    names = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert not any("autograd_function" in name for name in names)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "rule",
    ["straight_through", fg.rules.scale(s=2.0), fg.rules.rectangular(a=-1.0, b=1.0)],
    ids=str,
)
def test_what_is_frozen_when_it_is_compiled_may_learn_later(
    small: Small, x: Tensor, rule: Any, backend: str
) -> None:
    """With gradients enabled and nothing in front of the rule that requires one."""
    gm = fg.transform(small, {"relu": rule})
    run = compiled(gm, backend)
    small.first.requires_grad_(False)
    assert_same(gradients(run, x, small.second), gradients(gm, x, small.second))
    small.first.requires_grad_(True)
    by_hand = small_by_hand(small, lambda g, x: chained(fg.get(rule), g, x, x.relu()))
    assert_same(gradients(run, x, small), gradients(by_hand, x, small))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition", SLOWLY])
@pytest.mark.parametrize("rule", ["full_jam", "noise", "rectangular_jam"])
def test_two_sites_draw_different_numbers(rule: str, backend: str) -> None:
    class Branches(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.relu(a) + torch.tanh(b)

    a, b = (torch.zeros(100, requires_grad=True) for _ in range(2))
    run = torch.compile(fg.transform(Branches(), rule), backend=backend, fullgraph=True)
    for grads in (torch.autograd.grad(run(a, b).sum(), (a, b)) for _ in range(2)):
        assert not torch.equal(*grads)


def test_a_number_that_no_operator_holds_reaches_the_formula() -> None:
    fg.register("by a number")(made_of("def f(grad, *, n: int = 1):\n    return grad * (n % 7)"))
    run = torch.compile(
        fg.transform(nn.Tanh(), fg.get("by a number")(n=2**70 + 3)), backend="aot_eager"
    )
    x = torch.zeros(3, requires_grad=True)
    (grad,) = torch.autograd.grad(run(x).sum(), x)
    assert grad.tolist() == [(2**70 + 3) % 7] * 3


def test_a_tuple_in_a_tuple_reaches_the_formula_as_one() -> None:
    formula = made_of(
        "def f(grad, *, t: tuple = ()):\n"
        "    return grad * (t[0][1] if isinstance(t[0], tuple) else -1.0)"
    )
    fg.register("by nested tuples")(formula)
    for value in (2.0, 3.0):
        rule = fg.get("by nested tuples")(t=((1.0, value), 4))
        run = torch.compile(fg.transform(nn.Tanh(), rule), backend="aot_eager", fullgraph=True)
        x = torch.zeros(3, requires_grad=True)
        (grad,) = torch.autograd.grad(run(x).sum(), x)
        assert grad.tolist() == [value] * 3


def made_of(text: str) -> Callable[..., Tensor]:
    namespace: dict[str, Any] = {}
    exec(text, namespace)
    return namespace["f"]


def by_a_branch(grad: Tensor, x: Tensor) -> Tensor:
    """grad·2 if the largest x is positive, else grad"""
    return grad * 2 if x.max() > 0 else grad


def by_a_number(grad: Tensor, x: Tensor) -> Tensor:
    """grad·max(x)"""
    return grad * float(x.max())


def by_numpy(grad: Tensor, x: Tensor) -> Tensor:
    """grad where x is positive"""
    return grad * torch.from_numpy(x.detach().numpy() > 0)


@pytest.mark.parametrize("formula", [by_a_branch, by_a_number, by_numpy], ids=lambda f: f.__name__)
def test_a_formula_that_cannot_be_compiled_is_named_with_the_remedy(
    formula: Callable[..., Tensor],
) -> None:
    name = f"uncompilable_{formula.__name__}"
    fg.register(name, overwrite=True)(formula)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    text = rf"rule '{name}' at site '1:relu\[0\]' failed .*torch\.where.* transform\(\) and use\(\)"
    with pytest.raises(fg.RuleError, match=text):
        fg.compile(model, {"relu": name}, backend="aot_eager")(x)
    with pytest.raises(Exception, match=text):
        torch.compile(fg.transform(model, {"relu": name}), backend="aot_eager", fullgraph=True)(x)
    pre = model[0](x).detach().requires_grad_()
    expected = formula(torch.ones(3, 4), pre.detach())
    gm = fg.transform(model[1:], {"relu": name})
    (found,) = torch.autograd.grad(gm(pre).sum(), pre)
    assert torch.equal(found, expected)
