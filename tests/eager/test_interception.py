"""`use` around plain models: what is intercepted, compared with cases written by hand, naive models and formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
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
from models import VISION, Vision, edited_by_hand, naive, rectangular
from parameter_models import CASES, entrywise, whole
from parameter_models import Case as ParameterCase
from runs import (
    Run,
    assert_same_forward,
    assert_same_gradients,
    close,
    difference_in_gradients,
    run,
)
from spellings import OUT_SPELLINGS, SPELLINGS, Spell, quick

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")  # of a build without oneDNN


def inside(called: Callable[..., Any], rules: Any, **options: Any) -> Callable[..., Any]:
    """The model, called in a block."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with fg.use(rules, **options):
            return called(*args, **kwargs)

    return call


# --- operations ---

# A graph shows that the input is written later, and keeps a copy of it for a rule that reads it. A block cannot know,
# and autograd raises.
WRITTEN_LATER = (
    "the_input_is_added_to",
    "out_of_place_and_its_input_written_later",
    "out_of_place_and_the_base_written_later",
    "out_of_place_and_a_view_written_later",
)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rule", RULES)
@CASE
def test_in_place_code_equals_the_case_written_by_hand(case: Case, rule: str) -> None:
    given, backward = RULES[rule]
    model = Written(case.original)
    native = observe(model, with_x(model))
    actual = observe(model, with_x(inside(model, {"relu": given})))
    expected = observe(model, lambda x: case.by_hand(model, x, naive(F.relu, backward)))
    assert_same_values(actual, native)
    if actual.error and (native.error or case.name in WRITTEN_LATER):
        return
    assert_same_backward(actual, expected, rounded)
    assert native.error or difference_in_gradients(expected, native, close)


@CASE
def test_native_entries_change_nothing(case: Case) -> None:
    model = Written(case.original)
    expected = observe(model, with_x(model))
    actual = observe(model, with_x(inside(model, {"activations": None})))
    assert_same_values(actual, expected)
    assert_same_backward(actual, expected)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("spell", quick(s for s in SPELLINGS if s.op not in ("glu", "identity")))
def test_every_spelling_is_intercepted(spell: Spell) -> None:
    model, x = spell.make(), spell.sample()
    torch.manual_seed(0)
    expected = model(x.clone())
    leaf = x.clone().requires_grad_()
    torch.manual_seed(0)
    with fg.use({spell.op: fg.rules.scale(s=3.0)}) as block:
        y = model(leaf * 1)
    assert torch.equal(y, expected)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, leaf, grad)
    assert torch.equal(found, 3.0 * grad)
    assert [d.site.op for d in fg.report(block).with_action("rewrite")] == [spell.op]


@pytest.mark.parametrize("spell", OUT_SPELLINGS, ids=lambda spell: spell.id)
def test_an_out_argument_is_skipped_and_reported(spell: Spell) -> None:
    model, x = spell.make(), spell.sample()
    block = fg.use({spell.op: fg.rules.scale(s=3.0)})
    with torch.no_grad(), pytest.warns(fg.FreegradWarning, match="out="), block:
        inside = model(x.clone())
    assert torch.equal(inside, model(x.clone()))
    assert {d.action for d in fg.report(block).decisions} == {"skip"}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("vision", VISION[:6], ids=lambda v: v.name)
def test_a_classifier_equals_the_one_edited_by_hand(vision: Vision) -> None:
    torch.manual_seed(0)
    model = vision.make().eval()
    x = vision.sample(training=False)
    table = {"activations": fg.rules.rectangular(a=-0.5, b=0.5)}
    with edited_by_hand(model, rectangular(-0.5, 0.5)) as edited:
        expected = run(edited, x, of=model)
    actual = run(inside(model, table), x, of=model)
    assert_same_forward(actual, expected)
    assert_same_gradients(actual, expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("vision", VISION[:6], ids=lambda v: v.name)
def test_sites_are_those_of_the_transform(vision: Vision) -> None:
    torch.manual_seed(0)
    model = vision.make().eval()
    gm = fg.transform(model, "straight_through")
    with fg.use("straight_through", model=model) as block:
        model(vision.sample(training=False))
    for plan in (fg.report(gm), fg.report(block)):
        assert plan.with_action("rewrite")
    seen, captured = (
        {d.site: d.rules for d in plan.with_action("rewrite")}
        for plan in (fg.report(block), fg.report(gm))
    )
    assert seen == captured


# --- parameters ---


THREE = fg.rules.scale(s=3.0)
RECTANGULAR = fg.rules.rectangular(a=-0.3, b=0.4), entrywise("rectangular", a=-0.3, b=0.4)
CLIP_NORM = fg.rules.clip_norm(max_norm=0.1), whole("clip_norm", max_norm=0.1)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_each_layer_gives_its_parameters_the_rule(case: ParameterCase) -> None:
    model = case.build()
    rule, formula = RECTANGULAR
    for training in (True, False):
        model.train(training)
        native = run(model, case.inputs)
        ruled = run(inside(model, {"params": rule}, model=model), case.inputs, of=model)
        assert_same_forward(ruled, native)
        assert_ruled(ruled, native, model, formula)


def assert_ruled(actual: Run, native: Run, model: nn.Module, formula: Any) -> None:
    parameters = dict(model.named_parameters())
    for name, gradient in native.gradients.items():
        ruled = actual.gradients[name]
        if gradient is None or ruled is None:
            assert gradient is ruled, name
            continue
        expected = formula(gradient, parameters[name]) if name in parameters else gradient
        assert torch.equal(ruled, expected), name


def test_a_rule_for_parameters_needs_no_model() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(3, 4)
    native = run(model, x)
    rule, formula = CLIP_NORM
    ruled = run(inside(model, rule, scope="params"), x, of=model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            ruled.gradients[name], formula(native.gradients[name], parameter)
        )


def test_the_gradient_of_several_calls_is_one_gradient() -> None:
    """`clip_norm` of a sum differs from the sum of clipped gradients."""
    model, (a, b) = nn.Linear(4, 2, bias=False), torch.randn(2, 3, 4)
    rule, formula = CLIP_NORM
    (native,) = torch.autograd.grad((model(a) + model(b)).sum(), [model.weight])
    with fg.use(rule, scope="params"):
        (found,) = torch.autograd.grad((model(a) + model(b)).sum(), [model.weight])
    assert torch.equal(found, formula(native, model.weight))


def test_a_training_loop_in_one_block_follows_the_optimizer() -> None:
    def train(make: Callable[[nn.Module], Any]) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        with make(model):
            for _ in range(4):
                for _ in range(2):  # gradients of two batches are accumulated
                    model(torch.randn(3, 4)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()]

    def by_hand(model: nn.Module) -> Any:
        for p in model.parameters():
            p.register_hook(lambda grad: grad * 0.5)
        return torch.enable_grad()

    half = fg.rules.scale(s=0.5)
    found = train(lambda model: fg.use({"params": half}, model=model))
    assert all(map(torch.equal, found, train(by_hand)))


@pytest.mark.parametrize("forward", [None, "sign"])
def test_several_backwards_may_go_through_one_block(forward: str | None) -> None:
    """As in adversarial training: two forwards, then two backwards."""
    model, (a, b) = nn.Linear(4, 2, bias=False), torch.randn(2, 3, 4)
    table = fg.RuleTable([fg.on("params", forward=forward).backward("rectangular", a=-0.3, b=0.4)])
    gm = fg.transform(model, table)
    expected = [torch.autograd.grad(gm(x).sum(), model.weight)[0] for x in (a, b)]
    with fg.use(table, model=model):
        first, second = model(a).sum(), model(b).sum()
        found = [torch.autograd.grad(y, model.weight)[0] for y in (first, second)]
    assert all(map(torch.equal, found, expected))


def test_a_write_through_data_is_seen_by_the_next_call() -> None:
    model, x = nn.Linear(4, 2, bias=False), torch.randn(3, 4)
    table = fg.RuleTable([fg.on("params", forward="sign").backward("straight_through")])
    with fg.use(table, model=model):
        model(x)
        model.weight.data.neg_()
        y = model(x)
    assert torch.equal(y, x @ model.weight.detach().sign().t())


def test_a_parameter_that_its_rule_reads_must_not_change_before_the_backward() -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    with fg.use({"params": fg.rules.rectangular(a=-0.3, b=0.4)}, model=model):
        y = model(x)
        with torch.no_grad():
            model.weight.add_(1)
    with pytest.raises(RuntimeError, match="'weight' was changed after the forward"):
        y.sum().backward()


def test_transforms_of_functions_take_parameters_with_rules() -> None:
    model, x = nn.Linear(4, 2), torch.randn(4)
    with fg.use({"params": THREE}, model=model):
        jacobian = torch.func.jacrev(model)(x)
    assert torch.equal(jacobian, model.weight.detach())


def test_a_forward_of_weights_is_replaced_in_the_model_alone() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    before = model[0].weight.detach().clone()
    table = fg.RuleTable([fg.on(parameter="*.weight", forward="sign").backward("straight_through")])
    with fg.use(table, model=model):
        y = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), y)
        outside = model[0].weight * 1
    expected = F.linear(
        F.linear(x, model[0].weight.sign(), model[0].bias), model[1].weight.sign(), model[1].bias
    )
    assert torch.equal(y, expected)
    assert torch.equal(outside, before)
    y.sum().backward()
    assert model[0].weight.grad is not None
    assert torch.equal(model[0].weight.detach(), before)
