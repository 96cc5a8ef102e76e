"""A rule on a parameter is a formula on the gradient that the parameter has in the untransformed model."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import freegrad_fx as fg
from models import Vision
from parameter_models import CASES, Case, Formula, entrywise, floats, whole
from runs import Run, assert_same_forward, run
from sweep import assert_same_state, fingerprint

RECTANGULAR = (fg.rules.rectangular(a=-0.5, b=0.8), entrywise("rectangular", a=-0.5, b=0.8))

DETERMINISTIC: dict[str, tuple[fg.Rule, Formula, bool]] = {
    "d(Linear)": (fg.get("d(Linear)"), entrywise("d(Linear)"), True),
    "d(ReLU)": (fg.get("d(ReLU)"), entrywise("d(ReLU)"), True),
    "rectangular": (*RECTANGULAR, True),
    "triangular": (fg.rules.triangular(width=2.0), entrywise("triangular", width=2.0), False),
    "scale": (fg.rules.scale(s=0.25), entrywise("scale", s=0.25), True),
    "reverse": (fg.rules.reverse(alpha=2.0), entrywise("reverse", alpha=2.0), True),
    "clip_value": (
        fg.rules.clip_value(max_value=0.1),
        entrywise("clip_value", max_value=0.1),
        True,
    ),
    "clipped_straight_through": (
        fg.rules.clipped_straight_through(bound=0.4),
        entrywise("clipped_straight_through", bound=0.4),
        True,
    ),
    "fast_sigmoid": (fg.rules.fast_sigmoid(slope=2.0), entrywise("fast_sigmoid", slope=2.0), False),
    "clip_norm": (fg.rules.clip_norm(max_norm=0.1), whole("clip_norm", max_norm=0.1), False),
    "centralize": (fg.rules.centralize(dim=-1), whole("centralize", dim=-1), False),
}
"""The rule, its formula, and whether both round alike."""

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")  # of a build without oneDNN


def transformed(case: Case, model: nn.Module, rules: Any, export: bool) -> fg.CapturedModule:
    options: dict[str, Any] = {"example_inputs": case.inputs} if export else {}
    return fg.transform(model, rules, **options)


def assert_ruled(
    actual: Run, native: Run, model: nn.Module, formula: Formula, exact: bool = True
) -> None:
    """Every parameter has the formula's gradient, and every input the native one."""
    parameters = dict(model.named_parameters())
    for name, gradient in native.gradients.items():
        ruled = actual.gradients[name]
        if gradient is None:
            assert ruled is None, name
            continue
        expected = formula(gradient, parameters[name]) if name in parameters else gradient
        if exact or name not in parameters:
            assert ruled is not None, name
            assert torch.equal(ruled, expected), name
        else:
            torch.testing.assert_close(ruled, expected)


# Their graphs from an export are like those of the layers that they are made of, or of others of their kind
LARGE = re.compile(
    "TransformerDecoder|TransformerEncoder$|norm-first|bias_k|separate|dropout|GRU|RNN|3d"
)

CAPTURES = [
    pytest.param(
        case,
        export,
        id=f"{case.name}-{'export' if export else 'symbolic'}",
        marks=pytest.mark.slow if export and LARGE.search(case.name) else (),
    )
    for case in CASES.values()
    for export in (False, True)
    if case.export or not export
]
SLOWER_WITH_EXPORT = [
    pytest.param(*p.values, id=p.id, marks=pytest.mark.slow if p.values[1] else ())
    for p in CAPTURES
]


@pytest.mark.thinned(2)
@pytest.mark.sampled(6)
@pytest.mark.parametrize(("case", "export"), CAPTURES)
def test_each_layer_gives_its_parameters_the_rule(case: Case, export: bool) -> None:
    model = case.build()
    before, random_state = fingerprint(model), torch.get_rng_state()
    rule, formula = RECTANGULAR
    gm = transformed(case, model, {"params": rule}, export)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_state(gm, model)
    for training in (True, False):
        model.train(training)
        gm.train(training)
        native, ruled = run(model, case.inputs), run(gm, case.inputs)
        assert_same_forward(ruled, native)
        assert_ruled(ruled, native, model, formula)


@pytest.mark.thinned(3)
@pytest.mark.sampled(6)
@pytest.mark.parametrize(("case", "export"), SLOWER_WITH_EXPORT)
def test_without_gradients_nothing_changes(case: Case, export: bool) -> None:
    model = case.build()
    gm = transformed(case, model, {"params": "reverse"}, export)
    opened = export and ("ttention" in case.name or "ransformer" in case.name)
    for training, without in (
        (True, torch.no_grad),
        (False, torch.no_grad),
        (False, torch.inference_mode),
    ):
        model.train(training)
        gm.train(training)
        buffers = [buffer.clone() for buffer in model.buffers()]
        with without():
            torch.manual_seed(1)
            expected = tree_leaves(model(*case.inputs))
            state, statistics = torch.get_rng_state(), [b.clone() for b in model.buffers()]
            for buffer, value in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(value)
            torch.manual_seed(1)
            actual = tree_leaves(gm(*case.inputs))
            assert torch.equal(torch.get_rng_state(), state)
            assert all(map(torch.equal, gm.buffers(), statistics))
        for a, e in zip(actual, expected, strict=True):
            assert (a.requires_grad, a.is_inference()) == (e.requires_grad, e.is_inference())
            if opened and not training:  # PyTorch's fused path is closed to it
                torch.testing.assert_close(a, e)
            else:
                assert torch.equal(a, e)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize(
    "model", ["lstm-classifier", "transformer-classifier", "tied", "Conv2d", "bare"]
)
def test_each_rule_is_its_formula_on_the_native_gradient(name: str, model: str) -> None:
    rule, formula, exact = DETERMINISTIC[name]
    case = CASES[model]
    original = case.build().eval()
    if name == "centralize":  # a scalar has no last dimension to average over
        rules: Any = fg.RuleTable(
            [fg.on("params", where=lambda s: "temperature" not in s.name).backward(rule)]
        )
        rules = rules if model == "bare" else {"params": rule}
    else:
        rules = {"params": rule}
    gm = fg.transform(original, rules)
    native, ruled = run(original, case.inputs), run(gm, case.inputs)
    if name == "centralize" and model == "bare":
        assert torch.equal(ruled.gradients["temperature"], native.gradients.pop("temperature"))
    assert_ruled(ruled, native, original, formula, exact)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("export", [False, True], ids=["symbolic", "export"])
def test_resnet18(export: bool) -> None:
    vision = Vision("resnet18")
    model, x = vision.make(), vision.sample(True)
    options: dict[str, Any] = {"example_inputs": (x,)} if export else {}
    gm = fg.transform(model, {"params": fg.rules.rectangular(a=-0.02, b=0.02)}, **options)
    for training in (True, False):
        model.train(training)
        gm.train(training)
        native, ruled = run(model, x), run(gm, x)
        assert_same_forward(ruled, native)
        for name, p in model.named_parameters():
            window = (p >= -0.02) & (p <= 0.02)
            assert torch.equal(ruled.gradients[name], native.gradients[name] * window), name
        assert torch.equal(ruled.gradients["input 0"], native.gradients["input 0"])


def test_random_rules_draw_from_the_seed_and_stay_in_their_interval() -> None:
    case = CASES["Conv2d"]
    model = case.build()
    gm = fg.transform(model, {"params": "full_jam"})
    native = run(model, case.inputs)

    def jammed(seed: int) -> dict[str, Tensor]:
        output = gm(*case.inputs)
        torch.manual_seed(seed)
        parameters = dict(gm.named_parameters())
        weights = torch.arange(1.0, output.numel() + 1).sin().reshape(output.shape)
        found = torch.autograd.grad((output * weights).sum(), list(parameters.values()))
        return dict(zip(parameters, found, strict=True))

    first, again, other = jammed(3), jammed(3), jammed(4)
    for name, gradient in first.items():
        assert torch.equal(gradient, again[name])
        assert not torch.equal(gradient, other[name])
        factor = gradient / native.gradients[name]
        assert ((factor >= 0) & (factor < 1)).all()


def test_noise_is_added_with_its_spread() -> None:
    model = nn.Linear(200, 100)
    gm = fg.transform(nn.Sequential(model), {"params": fg.rules.noise(sigma=0.5)})
    gm(torch.zeros(1, 200)).sum().backward()  # the weight's own gradient is zero
    assert model.weight.grad is not None
    assert model.weight.grad.mean().abs() < 0.02
    assert model.weight.grad.std() == pytest.approx(0.5, rel=0.05)


# --- one site for a parameter, however it is used ---


@pytest.mark.parametrize(
    ("name", "parameter", "names"),
    [
        ("tied", "embed.weight", ("embed.weight", "head.weight")),
        ("shared", "first.weight", ("first.weight", "second.weight")),
        ("loop", "cell.weight_hh", ("cell.weight_hh",)),
        ("bare", "scale", ("scale",)),
        ("lists", "list.1", ("list.1",)),
    ],
)
def test_a_parameter_is_one_site_and_its_rule_sees_the_sum(
    name: str, parameter: str, names: tuple[str, ...]
) -> None:
    case = CASES[name]
    model = case.build()
    gm = fg.transform(model, {"params": fg.rules.clip_norm(max_norm=0.05)})
    sites = [d.site for d in fg.report(gm).decisions if d.site.kind == "parameter"]
    assert [s.names for s in sites if parameter in s.names] == [names]
    native, ruled = run(model, case.inputs), run(gm, case.inputs)
    assert_ruled(ruled, native, model, whole("clip_norm", max_norm=0.05), exact=False)


# --- what reaches the original ---


def test_training_leaves_no_mark_on_the_original() -> None:
    case = CASES["lstm-classifier"]
    model = case.build()
    gm = fg.transform(model, {"params": "reverse"})
    optimizer = torch.optim.Adam(gm.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        gm(*case.inputs).square().sum().backward()
        optimizer.step()
    for parameter in model.parameters():
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks
        assert parameter.is_leaf
    untouched = case.build()
    untouched.load_state_dict(model.state_dict())
    native, actual = run(untouched, case.inputs), run(model, case.inputs)
    assert_same_forward(actual, native)
    for name, gradient in native.gradients.items():
        assert torch.equal(actual.gradients[name], gradient), name


# --- what is not rewritten, and what is said of it ---


def decision(plan: fg.Plan, name: str) -> fg.Decision:
    (found,) = [d for d in plan.decisions if d.site.name == name]
    return found


def test_a_frozen_parameter_stays_native_and_raises_once_it_learns() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)
    gm = fg.transform(model, {"params": "reverse"})
    frozen = decision(fg.report(gm), "0.weight")
    assert frozen.action == "native"
    assert "requires_grad=False" in frozen.reason
    gm(floats(4, 6)).sum().backward()
    assert model[0].weight.grad is None
    model[0].weight.requires_grad_(True)
    for copied in (gm, copy.deepcopy(gm)):
        with pytest.raises(RuntimeError, match=r"'0\.weight' was frozen"):
            copied(floats(4, 6))
        with torch.no_grad():
            assert torch.equal(copied(floats(4, 6)), model(floats(4, 6)))


def test_a_rewritten_parameter_can_be_frozen_later() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    gm = fg.transform(model, {"params": "reverse"})
    model[0].weight.requires_grad_(False)
    gm(floats(4, 6)).sum().backward()
    assert model[0].weight.grad is None
    assert torch.equal(model[0].bias.grad, torch.full((3,), -4.0))
    model.requires_grad_(False)
    assert not gm(floats(4, 6)).requires_grad


class HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_an_unused_parameter_is_reported_with_the_reason() -> None:
    with pytest.warns(fg.FreegradWarning, match=r"unused\.\w+ keeps its backward: no graph"):
        gm = fg.transform(HalfUsed(), {"params": "reverse"})
    for name in ("unused.weight", "unused.bias"):
        assert decision(fg.report(gm), name).action == "skip"
        assert "no graph of the model uses it" in decision(fg.report(gm), name).reason
    assert decision(fg.report(gm), "used.weight").action == "rewrite"
    with pytest.raises(fg.PlanError, match=r"unused\.weight"):
        fg.transform(HalfUsed(), {"params": "reverse"}, strict=True)


class InOneMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if self.training else self.b(x)


def test_a_parameter_of_one_mode_says_which() -> None:
    gm = fg.transform(InOneMode(), {"params": "reverse"})
    assert [(d.site.name, d.modes) for d in fg.report(gm).decisions] == [
        ("a.weight", "train"),
        ("a.bias", "train"),
        ("b.weight", "eval"),
        ("b.bias", "eval"),
    ]
    gm.eval()
    gm(floats(4, 6)).sum().backward()
    assert gm.get_parameter("a.weight").grad is None
    assert torch.equal(gm.get_parameter("b.bias").grad, torch.full((3,), -4.0))


@pytest.mark.parametrize("example_inputs", [None, (floats(4, 6),)], ids=["symbolic", "export"])
def test_a_lazy_module_is_to_be_initialised_first(example_inputs: Any) -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with pytest.raises(fg.CaptureError, match="Run the model once"):
        fg.transform(model, {"params": "reverse"}, example_inputs=example_inputs)


class Hoards(nn.Module):
    """Kept whole; it uses a parameter through a list."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.inner = nn.Parameter(torch.ones(6)), nn.Linear(6, 6)
        self.held = [self.gain]

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e6 else self.inner(x) * self.held[0]


def test_a_parameter_that_kept_whole_code_holds_elsewhere_is_a_reported_skip() -> None:
    with pytest.warns(fg.FreegradWarning, match=r"0\.gain keeps its backward: 0 \(Hoards, kept"):
        gm = fg.transform(nn.Sequential(Hoards()), {"params": "reverse"})
    assert decision(fg.report(gm), "0.gain").action == "skip"
    assert decision(fg.report(gm), "0.inner.weight").action == "rewrite"


def test_a_decoupled_parameter_is_not_decoupled_again_and_others_still_are() -> None:
    case = CASES["LSTMCell"]
    model = case.build()
    once = fg.transform(
        model, fg.RuleTable([fg.on(parameter="*.weight_ih").backward("reverse", alpha=2.0)])
    )
    with pytest.warns(fg.FreegradWarning, match="already decoupled, with the rule 'reverse'"):
        twice = fg.transform(once, {"params": fg.rules.scale(s=8.0)})
    native, ruled = run(model, case.inputs), run(twice, case.inputs)
    assert_same_forward(ruled, native)
    for name, _ in model.named_parameters():
        factor = -2 if name.endswith("weight_ih") else 8
        assert torch.equal(ruled.gradients[name], factor * native.gradients[name])


def test_a_decoupled_parameter_of_a_part_is_not_decoupled_again() -> None:
    part = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    once = fg.transform(part, {"params": fg.rules.scale(s=4.0)})
    with pytest.warns(fg.FreegradWarning, match=r"0\.0\.\w+ keeps .* already decoupled, with"):
        gm = fg.transform(nn.Sequential(once, nn.Linear(6, 3)), {"params": "reverse"})
    x = floats(4, 6)
    native, ruled = run(nn.Sequential(part, gm.get_submodule("1")), x), run(gm, x)
    for name, gradient in native.gradients.items():
        factor = {"0": 4, "1": -1}.get(name[0], 1)
        assert torch.equal(ruled.gradients[name], factor * gradient), name


class Shrinks(nn.Module):
    """Writes into its parameter, so that a rule which reads the value needs a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.mul_(0.5)
        return x * self.weight


def test_a_decoupled_parameter_that_is_written_into_is_not_decoupled_again() -> None:
    once = fg.transform(Shrinks(), {"params": fg.rules.rectangular(a=2.0, b=3.0)})
    with pytest.warns(fg.FreegradWarning, match="already decoupled, with the rule 'rectangular'"):
        twice = fg.transform(once, {"params": "reverse"})
    twice(floats(4, 6)).sum().backward()
    assert torch.equal(twice.weight.grad, torch.zeros(6))


def test_which_parameters_a_table_means() -> None:
    model = CASES["transformer-classifier"].build().eval()
    entry = fg.on(parameter="*.weight", module="encoder.*")
    gm = fg.transform(model, fg.RuleTable([entry.backward("reverse")]))
    inputs = CASES["transformer-classifier"].inputs
    native, ruled = run(model, inputs), run(gm, inputs)
    for name, gradient in native.gradients.items():
        meant = name.startswith("encoder.") and name.endswith(".weight")
        assert torch.equal(ruled.gradients[name], -gradient if meant else gradient), name


@pytest.mark.parametrize("kind", [nn.Embedding, nn.Linear])
def test_a_tied_parameter_is_one_of_every_class_that_holds_it(kind: type[nn.Module]) -> None:
    table = fg.RuleTable([fg.on("params", type=kind, module=["embed", "head"]).backward("reverse")])
    case = CASES["tied"]
    model = case.build()
    native, ruled = run(model, case.inputs), run(fg.transform(model, table), case.inputs)
    assert torch.equal(ruled.gradients["embed.weight"], -native.gradients["embed.weight"])


def test_a_misspelt_parameter_is_answered_with_those_that_there_are() -> None:
    table = fg.RuleTable([fg.on(parameter="*.wieght").backward("reverse")])
    with pytest.raises(fg.PlanError, match=r"parameters of the model include: .*used\.weight"):
        fg.explain(HalfUsed(), table, strict=True)


def test_all_means_activations_and_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.PReLU(6), nn.Linear(6, 3))
    x = floats(4, 6)
    gm = fg.transform(model, {"all": fg.rules.scale(s=4.0)})
    kinds = [d.site.kind for d in fg.report(gm).with_action("rewrite")]
    assert kinds == ["operation"] + ["parameter"] * 5
    native, ruled = run(model, x), run(gm, x)
    # the slope of a PReLU learns natively but for its own rule
    for name in ("1.weight", "2.weight", "2.bias"):
        assert torch.equal(ruled.gradients[name], 4 * native.gradients[name])


def test_a_parameter_has_no_output() -> None:
    @fg.register("of_the_output")
    def of_the_output(grad: Tensor, y: Tensor) -> Tensor:
        """grad·y"""
        return grad * y

    with pytest.raises(fg.PlanError, match="a parameter has no output"):
        fg.transform(nn.Sequential(nn.Linear(6, 3)), {"params": of_the_output})


@contextlib.contextmanager
def counted() -> Iterator[list[nn.Module]]:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(m))
    try:
        yield seen
    finally:
        handle.remove()


def test_hooks_of_every_kind_get_the_real_module() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    x = floats(4, 6).requires_grad_()
    for register in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ):
        seen: list[nn.Module] = []
        handle = getattr(model[0], register)(lambda m, *_, seen=seen: seen.append(m))
        gm = fg.transform(model, {"params": "reverse"})
        gm(x).sum().backward()
        handle.remove()
        assert seen == [gm.get_submodule("0")], register
    gm = fg.transform(model, {"params": "reverse"})
    with counted() as seen:
        gm(x)
    assert {gm.get_submodule(str(i)) for i in range(3)} <= set(seen)
    assert set(seen) <= set(gm.modules())


def test_a_parameter_whose_only_user_is_replaced_is_skipped() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.PReLU())
    rules = {nn.PReLU: fg.rules.scale(forward="tanh"), "params": "reverse"}
    with pytest.warns(fg.FreegradWarning, match=r"1\.weight keeps .* every operation that uses it"):
        gm = fg.transform(model, rules)
    got = {d.site.name: d.action for d in fg.report(gm).decisions}
    assert got["1.weight"] == "skip"
    assert got["0.weight"] == "rewrite"
