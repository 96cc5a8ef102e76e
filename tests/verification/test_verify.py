"""`verify`: models that do the same, models that were broken by hand, and a state that is as before.

Each broken model is a transformed model with one change, so that it is known what differs and where.
"""

from __future__ import annotations

import copy
import dataclasses
import html
import itertools
import random
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from side_by_side import Make, Net, build, contents, nothing_is_left_behind, sample

RULE = "straight_through"


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.g(self.act(self.f(x)))


class Noisy(Net):
    def make(self) -> None:
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.norm(F.relu(self.f(x), inplace=True)))


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(F.relu_(x.mul_(2)))


class Remembers(Net):
    def make(self) -> None:
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return torch.relu(self.f(x - self.mean))


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.f, x, use_reentrant=True) if self.training else self.f(x)
        return h * 2


Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass
class Result:
    value: Tensor
    count: int
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


class Nested(Net):
    def forward(self, x: Tensor) -> Any:
        h = torch.relu(self.f(x))
        return {"a": [h, Pair(h + 1, (self.g(h), None))], "b": OrderedDict(c=h.detach() > 0)}


def gradients_kept(model: nn.Module) -> None:
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(number))


@pytest.mark.parametrize(
    "make", [Plain, Noisy, InPlace, Remembers, Nested], ids=lambda m: m.__name__
)
def test_a_transformed_model_does_the_same(make: Make) -> None:
    model = build(make)
    gradients_kept(model)
    gm = fg.transform(model, RULE)
    gm.f.eval()
    model.g.eval()
    before = contents(model), contents(gm)
    with nothing_is_left_behind():
        found = fg.verify(model, gm, sample())
    assert found.ok, str(found)
    assert bool(found)
    assert found.exact
    assert found.checks == 8
    assert (contents(model), contents(gm)) == before


def test_the_keywords_and_the_mode_of_the_caller_do_not_matter() -> None:
    model = build(Plain)
    gm = fg.transform(model, RULE)
    with torch.no_grad():
        assert fg.verify(model, gm, x=sample())
    assert not gm.f.weight.requires_grad or gm.f.weight.grad is None


# --- what is broken, where, and what it is said to come from ---


def broken(change: Callable[[fg.CapturedModule], None], make: Make = Plain) -> fg.Verification:
    model = build(make)
    gm = fg.transform(model, ambient=False)
    change(gm)
    return fg.verify(model, gm, sample())


def node(gm: fg.CapturedModule, name: str) -> Any:
    return next(n for n in gm.graph.nodes if n.name == name)


def twice(gm: fg.CapturedModule) -> None:
    node(gm, "g").args = (node(gm, "f"),)
    gm.recompile()


def without_gradient(gm: fg.CapturedModule) -> None:
    output = node(gm, "g")
    with gm.graph.inserting_before(output):
        output.args = (gm.graph.call_method("detach", (node(gm, "act"),)),)
    gm.recompile()


def draws(gm: fg.CapturedModule) -> None:
    with gm.graph.inserting_before(node(gm, "g")):
        gm.graph.call_function(torch.rand, (1,))
    gm.recompile()


def writes(gm: fg.CapturedModule) -> None:
    with gm.graph.inserting_after(node(gm, "g")):
        gm.graph.call_method("zero_", (node(gm, "x"),))
    gm.recompile()


def negative_zero(gm: fg.CapturedModule) -> None:
    output = next(n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(output):
        zeros = gm.graph.call_function(torch.mul, (node(gm, "act"), -0.0))
        output.args = (zeros,)
    gm.recompile()


class Zeros(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.f(x)) * 0.0


@pytest.mark.parametrize(
    ("change", "kind", "module", "cause"),
    [
        (twice, "output", "g", "something else"),
        (without_gradient, "gradient", "f", "Only gradients differ"),
        (draws, "random", None, "random numbers"),
        (writes, "input", None, "Memory"),
    ],
    ids=["output", "gradient", "random", "input"],
)
def test_the_first_difference_has_a_place_and_a_cause(
    change: Any, kind: str, module: str | None, cause: str
) -> None:
    found = broken(change)
    assert not found.ok
    assert found.first is not None
    assert (found.first.kind, found.first.module) == (kind, module), found
    assert cause in found.cause
    assert cause in str(found)
    shown = html.unescape(found._repr_html_())
    assert found.cause in shown
    assert f"<td>{found.first.name}</td>" in shown.replace(' style="text-align: left"', "")


def test_a_negative_zero_differs() -> None:
    found = broken(negative_zero, Zeros)
    assert found.first is not None
    assert "only the bits" in found.first.what


def test_no_gradient_differs_from_zeros() -> None:
    class Unused(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return self.f(x) + 0.0 * self.g(x)

    def forget(gm: fg.CapturedModule) -> None:
        node(gm, "mul").args = (0.0, node(gm, "f"))
        gm.recompile()

    found = broken(forget, Unused)
    names = {d.name: d.what for d in found.differences}
    assert names["the gradient of g.weight"] == "is None instead of zeros"


def test_a_difference_is_raised_on_request() -> None:
    model = build(Plain)
    gm = fg.transform(model, {"activations": None})
    twice(gm)
    before = contents(model)
    with pytest.raises(fg.VerificationError, match="first in g") as raised:
        fg.verify(model, gm, sample(), raise_on_difference=True)
    assert isinstance(raised.value, fg.CaptureError)
    assert not raised.value.report
    assert contents(model) == before


# --- the original against something that was captured of another one ---


class Counts(Plain):
    def make(self) -> None:
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Scaled(Counts):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.calls


class Box:
    value = 0


class InAnObject(Plain):
    def make(self) -> None:
        self.box = Box()

    def forward(self, x: Tensor) -> Tensor:
        self.box.value += 1
        return super().forward(x)


SEEN = [1]


class InAGlobal(Plain):
    def forward(self, x: Tensor) -> Tensor:
        SEEN[0] += 1
        return super().forward(x) * (1 if SEEN[0] == 2 else 2)


class DrawsElsewhere(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * (random.random() + np.random.rand())


class ByMode(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 if self.training else 2)


@pytest.mark.parametrize(
    ("make", "kind", "name", "call", "cause"),
    [
        (Counts, "state", "calls", 1, "state"),
        (Scaled, "state", "calls", 1, "state"),
        (InAnObject, "state", "box", 1, "state"),
        (InAGlobal, "output", "output", 2, "keeps between calls"),
        (DrawsElsewhere, "random", "the random state of random", 1, "numpy.random"),
        (ByMode, "output", "output", 1, "branches on a training flag"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_state_outside_of_the_graph_shows(
    make: Make, kind: str, name: str, call: int, cause: str
) -> None:
    model, gm = build(make), fg.transform(build(Plain), RULE)
    if hasattr(model, "calls"):
        gm.calls = 0
    if hasattr(model, "box"):
        gm.box = Box()
    before, state = contents(model), (random.getstate(), np.random.get_state()[1].tolist())
    found = fg.verify(model, gm, sample())
    assert found.first is not None, found
    assert (found.first.kind, found.first.name, found.first.call) == (kind, name, call), found
    assert cause in found.cause, found
    assert contents(model) == before
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state
    assert SEEN == [1]
    assert not hasattr(model, "box") or vars(model.box) == {}


class _Rounds(torch.autograd.Function):
    """Its gradient differs from call to call, as that of a sum does that several threads compute."""

    calls = itertools.count()  # cannot be put back

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        turn = next(_Rounds.calls) % 3
        return grad * (1 + 2**-20 * turn) if torch.get_num_threads() > 1 else grad


class Rounds(Plain):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_Rounds.apply(x) * self.factor)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_kernels_that_do_not_repeat_with_several_threads_are_compared_in_one() -> None:
    model = build(Rounds)
    gm = fg.transform(model, RULE)
    found = fg.verify(model, gm, sample())
    assert found.ok, str(found)
    assert found.repeatable
    assert "train mode, with gradients: compared in one thread" in str(found)

    other = build(Rounds)
    other.factor = 1.0 + 2**-20
    found = fg.verify(model, fg.transform(other, RULE), sample())
    assert not found.ok


def test_an_original_that_does_not_repeat_itself_is_said_to() -> None:
    class Own(Plain):
        def make(self) -> None:
            self.generator = torch.Generator()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(1, generator=self.generator)

    model = build(Own)
    found = fg.verify(model, fg.transform(build(Plain), RULE), sample())
    assert not found.repeatable
    assert "does not repeat itself" in found.cause


def test_everything_is_put_back_when_a_run_raises() -> None:
    class Raises(Plain):
        def make(self) -> None:
            self.register_buffer("count", torch.zeros(()))
            self.list: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            self.list.append(1)
            self.count = self.count + 1
            if self.training:
                raise ValueError("not in train mode")
            return super().forward(x)

    model = build(Raises)
    other = copy.deepcopy(model)
    before = contents(model), contents(other)
    found = fg.verify(model, other, sample())
    assert found.ok, str(found)
    assert found.cases == ("eval mode, with gradients", "eval mode, under no_grad")
    assert (contents(model), contents(other)) == before


def test_a_reentrant_checkpoint_can_be_compared() -> None:
    model = build(Checkpointed)
    assert fg.verify(model, copy.deepcopy(model), sample())


def test_the_values_of_a_model_that_was_trained_further_are_put_back() -> None:
    model = build(Plain)
    gm = copy.deepcopy(fg.transform(model, RULE))
    with torch.no_grad():
        gm.f.weight.add_(1.0)
    trained = gm.f.weight.clone()
    found = fg.verify(model, gm, sample())
    assert found.ok, str(found)
    assert "other values in 1 of 4" in found.notes[0]
    assert torch.equal(gm.f.weight, trained)


def test_a_replaced_forward_stays_replaced() -> None:
    model = build(Plain)
    rule = fg.rules.rectangular(a=-1.0, b=1.0, forward="heaviside")
    gm = fg.transform(model, {"relu": rule}, example_inputs=(sample(),))
    found = fg.verify(model, gm, sample())
    assert not found
    assert "changed on request (forward=) at 1 site" in found.notes[0]
    assert "Verified: the same bits" in fg.report(gm).verified


# --- wrong arguments ---


def test_wrong_arguments_are_named() -> None:
    model = build(Plain)
    gm = fg.transform(model, RULE)
    with pytest.raises(TypeError, match="transformed is a str"):
        fg.verify(model, "gm", sample())
    with pytest.raises(TypeError, match="original is a type"):
        fg.verify(Plain, gm, sample())
    with pytest.raises(ValueError, match="same model twice"):
        fg.verify(model, model, sample())
    with pytest.raises(ValueError, match=r"no parameter or buffer 'f\.weight'"):
        fg.verify(model, nn.Linear(6, 6), sample())
    with pytest.raises(ValueError, match=r"float32\[6, 6\] on cpu in the original and float64"):
        fg.verify(model, copy.deepcopy(gm).double(), sample())
    with pytest.raises(ValueError, match="nothing to compare"):
        fg.verify(model, gm, torch.randn(4, 7))
    with pytest.raises(ValueError, match="meta or fake"):
        fg.verify(model, gm, sample().to("meta"))


# --- compiled code ---


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_is_compared(backend: str) -> None:
    model = build(Noisy)
    compiled = fg.compile(model, RULE, backend=backend)
    before = contents(model)
    found = fg.verify(model, compiled, sample())
    assert found.ok, str(found)
    assert found.exact == (backend == "eager")
    assert contents(model) == before


def test_a_model_that_is_compiled_in_place_is_compared_with_itself_in_python() -> None:
    model = build(Plain)
    model.compile(backend=fg.backend(RULE, inner="eager"))
    assert fg.verify(model, model, sample())


def test_compiled_code_that_differs_is_found() -> None:
    def wrong(gm: Any, inputs: Any) -> Any:
        return lambda *args: tuple(2 * x for x in gm(*args))

    model = build(Plain)
    found = fg.verify(model, torch.compile(model, backend=wrong), sample())
    assert not found.ok
    assert not found.exact


def test_a_forward_may_have_any_names_of_arguments() -> None:
    class Named(nn.Module):
        def forward(self, original: Tensor) -> Tensor:
            return torch.relu(original)

    model = Named()
    assert fg.verify(model, fg.transform(model, "straight_through"), original=torch.randn(3)).ok
