"""Forwards that ask for the global state of PyTorch: the answer is that of each call, or the call raises."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn

import freegrad_fx as fg
from side_by_side import Net, build, nothing_is_left_behind, sample

Ask = Callable[[], Any]
Enter = Callable[[], AbstractContextManager[Any]]


@contextlib.contextmanager
def put(change: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    change(value)
    try:
        yield
    finally:
        change(before)


def flag(owner: Any, name: str, value: Any) -> AbstractContextManager[None]:
    return put(lambda now: setattr(owner, name, now), value, getattr(owner, name))


class Held:
    asks = staticmethod(torch.is_inference_mode_enabled)


STATES: dict[str, tuple[Ask, Enter]] = {
    "grad mode": (lambda: torch.is_grad_enabled(), torch.no_grad),
    "imported by name": (lambda: is_grad_enabled(), torch.no_grad),
    "in a closure": (torch.is_grad_enabled, torch.no_grad),
    "inference mode": (lambda: torch.is_inference_mode_enabled(), torch.inference_mode),
    "in a class": (lambda: Held.asks(), torch.inference_mode),
    "autocast": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda: torch.autocast("cpu", torch.bfloat16),
    ),
    "dtype of autocast": (
        lambda: torch.get_autocast_dtype("cpu") == torch.float16,
        lambda: torch.autocast("cpu", torch.float16),
    ),
    "deterministic": (
        lambda: torch.are_deterministic_algorithms_enabled(),
        lambda: put(torch.use_deterministic_algorithms, True, False),
    ),
    "default dtype": (
        lambda: torch.get_default_dtype() == torch.float64,
        lambda: put(torch.set_default_dtype, torch.float64, torch.float32),
    ),
    "default device": (
        lambda: torch.get_default_device().type == "meta",
        lambda: put(torch.set_default_device, "meta", None),
    ),
    "threads": (
        lambda: torch.get_num_threads() == 3,
        lambda: put(torch.set_num_threads, 3, torch.get_num_threads()),
    ),
    "a backend's flag": (
        lambda: torch.backends.cudnn.benchmark,
        lambda: flag(torch.backends.cudnn, "benchmark", True),
    ),
    "whether a backend is enabled": (
        lambda: not torch.backends.cudnn.enabled,
        lambda: flag(torch.backends.cudnn, "enabled", False),
    ),
    "TF32": (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: flag(torch.backends.cuda.matmul, "allow_tf32", True),
    ),
    "the fast path": (
        lambda: not torch.backends.mha.get_fastpath_enabled(),
        lambda: put(torch.backends.mha.set_fastpath_enabled, False, True),
    ),
}
WITH_MORE_ANSWERS = ("dtype of autocast", "default dtype", "default device", "threads")
DOORS: dict[str, dict[str, Any]] = {"symbolic": {}, "export": {"example_inputs": (sample(),)}}


def asking(ask: Ask) -> nn.Module:
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.f(x))
            return self.g(h) if ask() else h * 2

    return build(Asks)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("state", STATES)
def test_an_answer_is_that_of_the_call_or_the_call_raises(state: str, door: str) -> None:
    ask, enter = STATES[state]
    model = asking(ask)
    gm = fg.transform(model, {"relu": "straight_through"}, **DOORS[door])
    both = len(gm.variants) == 2
    assert both == (door == "symbolic" and state not in WITH_MORE_ANSWERS)
    for _ in range(2):
        assert torch.equal(gm(sample()), model(sample()))
        with enter():
            if both:
                assert gm(sample()).equal(model(sample()))
            else:
                with pytest.raises(
                    fg.CaptureError, match=r"was .* in the capture and is .* in this call"
                ):
                    gm(sample())


@pytest.mark.parametrize("door", DOORS)
def test_the_functions_are_put_back(door: str) -> None:
    with fg.native():  # what is replaced for good is replaced when the first block is entered
        pass
    before = is_grad_enabled, Held.asks, vars(torch.backends.ContextProp)["__get__"]
    states = ("imported by name", "in a class", "a backend's flag")
    models = [asking(STATES[state][0]) for state in states]
    with nothing_is_left_behind():
        for model in models:
            fg.transform(model, **DOORS[door])
    assert before == (is_grad_enabled, Held.asks, vars(torch.backends.ContextProp)["__get__"])


def test_a_graph_for_each_answer_to_a_question_with_two() -> None:
    gm = fg.transform(asking(lambda: torch.is_grad_enabled()))
    labels = [variant.label for variant in gm.variants]
    assert labels == ["torch.is_grad_enabled() = True", "torch.is_grad_enabled() = False"]
    assert [len(fg.transform(asking(ask)).variants) for ask in (bool, int)] == [1, 1]


class InAPart(Net):
    def make(self) -> None:
        self.part = asking(lambda: torch.is_grad_enabled())

    def forward(self, x: Tensor) -> Tensor:
        return F.tanh(self.part(x))


def test_a_part_that_asks_keeps_its_sites() -> None:
    model = build(InAPart)
    gm = fg.transform(model, {"relu": "straight_through"})
    assert [d.site.path for d in fg.report(gm).with_action("rewrite")] == ["part"]
    assert not fg.report(gm).opaque
    with torch.no_grad():
        assert gm(sample()).equal(model(sample()))


class SetsTheModeItself(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 1 if torch.is_grad_enabled() else 2
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        y = self.f(x) * (3 if torch.is_grad_enabled() else 5)
        torch.set_grad_enabled(before)
        return F.relu(self.g(x)) * scale + y


@pytest.mark.parametrize("door", DOORS)
def test_a_mode_that_the_forward_has_set_is_known(door: str) -> None:
    model = build(SetsTheModeItself)
    gm = fg.transform(model, {"relu": None}, **DOORS[door])
    got, want = gm(sample()), model(sample())
    assert torch.equal(got, want)
    assert got.requires_grad
    if door == "symbolic":
        with torch.no_grad():
            assert torch.equal(gm(sample()), model(sample()))
    assert torch.is_grad_enabled()


CAPTURES: dict[str, Ask] = {
    "compiling": lambda: torch.compiler.is_compiling(),
    "compiled by Dynamo": lambda: torch.compiler.is_dynamo_compiling(),
    "exporting": lambda: torch.compiler.is_exporting(),
    "traced": lambda: torch.jit.is_tracing(),
    "scripted": lambda: torch.jit.is_scripting(),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("question", CAPTURES)
def test_an_eager_call_is_not_taken_for_the_capture(question: str, door: str) -> None:
    model = asking(CAPTURES[question])
    gm = fg.transform(model, {"relu": "straight_through"}, **DOORS[door])
    assert torch.equal(gm(sample()), model(sample()))


@pytest.mark.parametrize("question", ["compiling", "exporting"])
def test_a_compiled_call_gets_the_graph_for_compiled_calls(question: str) -> None:
    torch._dynamo.reset()
    model = asking(CAPTURES[question])
    gm = fg.transform(model, {"relu": "straight_through"})
    compiled = [torch.compile(m, backend="eager", fullgraph=True)(sample()) for m in (model, gm)]
    assert torch.equal(*compiled)


class CannotBeTracedUnderAutocast(Net):
    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return F.relu(self.f(x.float()))
        return F.relu(self.f(x))


@pytest.mark.parametrize("door", DOORS)
def test_a_side_that_cannot_be_captured_is_refused_when_it_is_called(door: str) -> None:
    model = build(CannotBeTracedUnderAutocast)
    gm = fg.transform(model, {"relu": "straight_through"}, **DOORS[door])
    assert torch.equal(gm(sample()), model(sample()))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(fg.CaptureError, match="autocast"):
        gm(sample())


class AsksForNothing(Net):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_tracing():
            len("a check that no graph contains")
        return F.relu(self.f(x)) if self.training else F.relu(self.g(x))


def test_an_answer_that_changes_nothing_needs_no_graph() -> None:
    gm = fg.transform(build(AsksForNothing))
    assert sorted(variant.label for variant in gm.variants) == ["eval", "train"]


def test_the_modes_and_the_answers_are_combined() -> None:
    class Both(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.f(x)) if self.training else F.relu(self.g(x))
            return h * 2 if torch.is_grad_enabled() else h

    model = build(Both)
    gm = fg.transform(model, "straight_through")
    for training in (True, False):
        model.train(training), gm.train(training)
        for enabled in (True, False):
            with torch.set_grad_enabled(enabled):
                assert torch.equal(gm(sample()), model(sample()))


class Pickled(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x)).to(torch.get_default_dtype())
        return self.g(h) if torch.is_autocast_enabled("cpu") else h


def test_the_answers_are_saved() -> None:
    gm = pickle.loads(pickle.dumps(fg.transform(build(Pickled), "straight_through")))
    with torch.autocast("cpu", torch.bfloat16):
        assert gm(sample()).equal(build(Pickled)(sample()))
    with (
        put(torch.set_default_dtype, torch.float64, torch.float32),
        pytest.raises(fg.CaptureError, match=r"get_default_dtype"),
    ):
        gm(sample())
