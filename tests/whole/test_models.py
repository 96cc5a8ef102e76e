"""Models that people use: the forward stays, every activation is a site, and the gradients are the ones asked for."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import freegrad_fx as fg
import models
import runs
import sweep
from models import MODULES, VISION, Spellings, SpellingsByHand, Vision, edited_by_hand
from runs import Run, assert_same_forward, assert_same_gradients, differs, loss, run

NATIVE: dict[str, None] = {"activations": None}
RECTANGULAR = fg.rules.rectangular(a=-0.8, b=1.2)
BY_HAND = models.rectangular(-0.8, 1.2)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


class Subject:
    """A model with random weights, and what it does natively in each mode (computed once)."""

    def __init__(self, vision: Vision) -> None:
        torch.manual_seed(0)
        self.vision = vision
        self.model = vision.make()
        self._native: dict[bool, Run] = {}

    def sample(self, training: bool) -> Tensor:
        return self.vision.sample(training)

    def native(self, training: bool) -> Run:
        if training not in self._native:
            self._native[training] = run(self.model.train(training), self.sample(training))
        return self._native[training]


LARGE = {"vgg16_bn", "inception_v3"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(v, id=v.name, marks=pytest.mark.slow if v.name in LARGE else ())
        for v in VISION
    ],
)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    # Many small kernels: threads only get into each other's way.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Subject(request.param)
    torch.set_num_threads(threads)


# --- forward and backward ---


@pytest.mark.sampled(12)
@MODES
def test_native_rules_change_nothing(subject: Subject, training: bool) -> None:
    gm = fg.transform(subject.model.train(training), NATIVE)
    actual = run(gm, subject.sample(training))
    assert_same_forward(actual, subject.native(training))
    assert_same_gradients(actual, subject.native(training))


@pytest.mark.sampled(12)
@MODES
def test_a_rule_equals_the_model_edited_by_hand(subject: Subject, training: bool) -> None:
    x = subject.sample(training)
    # captured in the other mode: the mode of a call counts, not the mode of the capture
    gm = fg.transform(subject.model.train(not training), RECTANGULAR).train(training)
    actual = run(gm, x)
    assert_same_forward(actual, subject.native(training))
    with edited_by_hand(subject.model.train(training), BY_HAND) as reference:
        expected = run(reference, x)
    assert_same_gradients(actual, expected)
    assert differs(expected, subject.native(training))


# --- sites ---


class Executed(TorchDispatchMode):
    """Counts the activations that reach the kernels, however the model spells them."""

    NAMES = frozenset({"relu", "gelu", "silu", "sigmoid", "hardswish", "hardsigmoid"})

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in self.NAMES:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.sampled(12)
@MODES
def test_every_activation_is_a_site(subject: Subject, training: bool) -> None:
    model = copy.deepcopy(subject.model).train(training)
    calls: Counter[str] = Counter()
    for path, module in model.named_modules():
        if type(module) in MODULES:
            module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    with torch.no_grad(), Executed() as executed:
        model(subject.sample(training))

    plan = fg.report(fg.transform(subject.model, RECTANGULAR))
    modes = ("", "train" if training else "eval")
    decisions = [decision for decision in plan.decisions if decision.modes in modes]
    assert [decision.site.op for decision in decisions] == executed.names
    called = [d.site.path for d in decisions if d.site.spelling.startswith("nn.")]
    assert Counter(called) == calls
    assert {decision.action for decision in plan.decisions} == {"rewrite"}
    assert len({decision.site.name for decision in plan.decisions}) == len(plan.decisions)


# --- the original ---


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What `sweep.fingerprint` holds, and the versions of tensors and gradients besides: nothing is written either."""
    versions = {
        f"{name}: versions": (t._version, None if t.grad is None else t.grad._version)
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    return {**sweep.fingerprint(model), **versions}


@pytest.mark.sampled(3)
def test_the_original_is_left_as_it_was(subject: Subject) -> None:
    model = subject.model.train()
    children = list(model.children())
    children[0].eval()  # a mode that is not the root's
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    handle = model.register_forward_hook(lambda *_: None)
    before = fingerprint(model)
    random_state = torch.get_rng_state()
    gm = fg.transform(model, RECTANGULAR)
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    modes = [module.training for module in model.modules()]
    assert [gm.get_submodule(p).training for p, _ in model.named_modules()] == modes
    for mode in (True, False):
        gm.train(mode)
        assert fingerprint(model) == before
    assert len(gm._forward_hooks) == 1
    handle.remove()
    next(model.parameters()).grad = None
    assert "training" not in vars(nn.Module)
    assert not any(m in set(model.modules()) for m in gm.modules())


@pytest.mark.sampled(3)
def test_state_is_shared_and_keeps_its_names(subject: Subject) -> None:
    model = subject.model
    gm = fg.transform(model, RECTANGULAR)
    assert list(gm.state_dict()) == list(model.state_dict())
    assert [n for n, _ in gm.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in gm.named_buffers()] == [n for n, _ in model.named_buffers()]
    for (name, a), b in zip(
        (*gm.named_parameters(), *gm.named_buffers()),
        (*model.parameters(), *model.buffers()),
        strict=True,
    ):
        assert a is b, name
    model.load_state_dict(gm.state_dict(), strict=True)
    gm.load_state_dict(model.state_dict(), strict=True)


# --- what follows from shared tensors, on a model whose every spelling is another one ---


def by_hand(model: Spellings) -> nn.Module:
    reference = SpellingsByHand(models.naive(F.relu, BY_HAND))
    reference.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return reference.train(model.training)


@MODES
def test_a_model_that_mixes_all_spellings(training: bool) -> None:
    """Cases 1 and 2: one module used three times is three sites."""
    model, x = Spellings().train(training), torch.randn(5, 2, 8, 8)
    native = run(model, x)
    gm = fg.transform(model, RECTANGULAR)
    spellings = [d.site.spelling for d in fg.report(gm).decisions]
    assert spellings == [
        "nn.ReLU(inplace=True)",
        "F.relu",
        "torch.relu",
        "Tensor.relu",
        *["nn.ReLU()"] * 3,
        "torch.relu_",  # which is F.relu_
        "Tensor.relu_",
    ]
    assert [d.site.call for d in fg.report(gm).decisions if d.site.path == "act"] == [0, 1, 2]
    actual, expected = run(gm, x), run(by_hand(model), x)
    assert_same_forward(actual, native)
    assert_same_gradients(actual, expected)
    assert differs(expected, native)
    untouched = run(fg.transform(model, NATIVE), x)
    assert_same_forward(untouched, native)
    assert_same_gradients(untouched, native)


class MakesItsActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.ReLU(inplace=True)(self.linear(x)) * 2


def test_a_module_made_inside_forward_is_a_site() -> None:
    """Case 3."""
    model, x = MakesItsActivation(), torch.randn(6, 3)
    gm = fg.transform(model, RECTANGULAR)
    assert [d.site.op for d in fg.report(gm).decisions] == ["relu"]
    h = model.linear(x)
    expected = torch.autograd.grad(
        loss([models.naive(F.relu, BY_HAND)(h) * 2]), list(model.parameters())
    )
    actual = run(gm, x).gradients
    assert differs(run(gm, x), run(model, x))
    for name, gradient in zip(("linear.weight", "linear.bias"), expected, strict=True):
        runs.assert_identical(actual[name], gradient, name)


def test_an_optimizer_made_before_trains_both() -> None:
    model, x = Spellings(), torch.randn(5, 2, 8, 8)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in (model, twin)]
    gm, reference = fg.transform(model, RECTANGULAR), by_hand(twin)
    for _ in range(3):
        for m, optimizer in zip((gm, reference), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().sum().backward()
            optimizer.step()
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        runs.assert_identical(a, b, name)
    assert torch.equal(gm.eval()(x), model.eval()(x))


def test_the_modes_of_both_are_apart() -> None:
    model = Spellings()
    gm = fg.transform(model, RECTANGULAR)
    gm.eval()
    assert all(module.training for module in model.modules())
    model.eval()
    gm.train()
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in gm.modules())


def test_hooks_and_attributes_of_both_are_apart() -> None:
    model = Spellings()
    gm = fg.transform(model, RECTANGULAR)
    seen: list[str] = []
    gm.conv.register_forward_hook(lambda *_: seen.append("rewritten"))
    model(torch.randn(2, 2, 8, 8))
    assert seen == []
    gm(torch.randn(2, 2, 8, 8))
    assert seen == ["rewritten"]
    gm.conv.padding = (1, 1)
    gm.note = "mine"
    assert model.conv.padding == (0, 0)
    assert not hasattr(model, "note")
