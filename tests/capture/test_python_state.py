"""State of a forward outside of buffers: right call after call, or refused with a way in that takes the model.

The original, called as often, is the oracle. A part that keeps such state is one opaque call.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from side_by_side import (
    RULE,
    THRICE,
    Net,
    build,
    captured_or_refused,
    check_capture,
    contents,
    difference,
)

# --- attributes that come into being, or whose shape changes ---


class HasAttr(Net):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "mem"):
            self.mem = torch.zeros(4, 6)
        self.mem = 0.5 * self.mem + self.f(x)
        return F.relu(self.mem)


class GetAttrWithDefault(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        before = getattr(self, "mem", None)
        self.mem = h.detach()
        return F.relu(h if before is None else h + before)


class TriesToRead(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        with contextlib.suppress(AttributeError):
            h = h + self.mem
        self.mem = h.detach()
        return F.relu(h)


class CatchesEverything(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        try:
            h = h + self.mem
        except Exception:
            h = h - 1
        self.mem = h.detach()
        return F.relu(h)


class AsksItsDict(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        if "mem" in self.__dict__:
            h = h + self.__dict__["mem"]
        self.mem = h.detach()
        return F.relu(h)


class AsksVars(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x) + (1 if vars(self).get("mem") is None else 0)
        self.mem = h.detach()
        return F.relu(h)


class PlainValueComesIntoBeing(Net):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "steps"):
            self.steps = 0
        self.steps += 1
        return F.relu(self.f(x)) * self.steps


class BufferIsNoneAtFirst(Net):
    def make(self) -> None:
        self.register_buffer("mem", None)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        if self.mem is not None:
            h = h + self.mem
        self.mem = h.detach()
        return F.relu(h + self.mem)


class DeletesAnAttribute(Net):
    def make(self) -> None:
        self.first = 2.0

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x))
        if hasattr(self, "first"):
            del self.first
            h = h * 2
        return h


class ForgetsABuffer(Net):
    def make(self) -> None:
        self.register_buffer("mem", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x) + (0 if self.mem is None else self.mem))
        self.mem = None
        return h


class ForgetsATensor(Net):
    def make(self) -> None:
        self.mem: Tensor | None = torch.ones(6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x) if self.mem is None else self.f(x) + self.mem)
        self.mem = None
        return h


class ReadsTheStateOfAPart(Net):
    def make(self) -> None:
        self.part = PlainValueComesIntoBeing()
        self.part.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.part(x)) * self.part.steps


class AddsASubmodule(Net):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "late"):
            self.late = nn.Tanh()
        return F.relu(self.late(self.f(x))) * len(list(self.children()))


NO_GRAPH = [
    HasAttr, GetAttrWithDefault, TriesToRead, CatchesEverything, AsksItsDict, AsksVars, PlainValueComesIntoBeing,
    BufferIsNoneAtFirst, DeletesAnAttribute, ForgetsABuffer, ForgetsATensor, AddsASubmodule,
]  # fmt: skip


class LengthOfACache(Net):
    def make(self) -> None:
        self.register_buffer("cache", torch.zeros(4, 0, 6))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x) + self.cache.shape[1])
        self.cache = torch.cat([self.cache, h.detach().unsqueeze(1)], 1)
        return h * self.cache.size(1) + self.cache.numel()


class LengthOfATensorAttribute(Net):
    def make(self) -> None:
        self.cache = torch.zeros(4, 0, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x) + self.cache.shape[1] + self.cache.size(1) + self.cache.dim())
        self.cache = torch.cat([self.cache, h.detach().unsqueeze(1)], 1)
        return h + self.cache.numel()


class DtypeOfATensorAttribute(Net):
    def make(self) -> None:
        self.mem = torch.zeros(6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x).to(self.mem.dtype) + self.mem).float()
        self.mem = h.detach().mean(0)
        return h


class LengthOfWhatIsReshapedInPlace(Net):
    def make(self) -> None:
        self.register_buffer("t", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x)) + self.t.dim()
        self.t.unsqueeze_(0)
        return h


class ShapeOfWhatIsNeverAssigned(Net):
    def forward(self, x: Tensor) -> Tensor:
        rows = self.f.weight.shape[0]
        return F.relu(self.f(x)).repeat(1, rows) if rows == 6 else x


RIGHT = [
    LengthOfACache, LengthOfATensorAttribute, DtypeOfATensorAttribute, LengthOfWhatIsReshapedInPlace,
    ShapeOfWhatIsNeverAssigned,
]  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_the_shape_of_what_the_forward_assigns_is_read_at_each_call(kind: type[Net]) -> None:
    check_capture(kind, *THRICE)


# --- helper objects ---


class Count:
    def __init__(self) -> None:
        self.n = 0


class CountInASlot:
    __slots__ = ("n",)

    def __init__(self) -> None:
        self.n = 0


@dataclasses.dataclass
class Settings:
    steps: list[int] = dataclasses.field(default_factory=list)
    inner: Count = dataclasses.field(default_factory=Count)


class CountsInAHelper(Net):
    def make(self) -> None:
        self.helper: Any = Count()

    def forward(self, x: Tensor) -> Tensor:
        self.helper.n += 1
        return F.relu(self.f(x)) * self.helper.n


class CountsInASlot(CountsInAHelper):
    def make(self) -> None:
        self.helper = CountInASlot()


class CountsInAListOfHelpers(Net):
    def make(self) -> None:
        self.helpers = [{"a": Count()}]

    def forward(self, x: Tensor) -> Tensor:
        self.helpers[0]["a"].n += 1
        return F.relu(self.f(x)) * self.helpers[0]["a"].n


class AppendsInADataclass(Net):
    def make(self) -> None:
        self.settings = Settings()

    def forward(self, x: Tensor) -> Tensor:
        self.settings.steps.append(1)
        self.settings.inner.n += len(self.settings.steps)
        return F.relu(self.f(x)) * self.settings.inner.n


class AppendsToADeque(Net):
    def make(self) -> None:
        self.seen: collections.deque[int] = collections.deque(maxlen=2)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return F.relu(self.f(x)) * len(self.seen)


class CountsInACounter(Net):
    def make(self) -> None:
        self.seen: collections.Counter[str] = collections.Counter()

    def forward(self, x: Tensor) -> Tensor:
        self.seen["a"] += 1
        return F.relu(self.f(x)) * self.seen["a"]


class DrawsFromItsOwnGenerator(Net):
    def make(self) -> None:
        self.rng = random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * self.rng.random()


class DrawsFromNumpy(Net):
    def make(self) -> None:
        self.rng = numpy.random.default_rng(0)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * float(self.rng.random())


class CountsInAnUnregisteredModule(Net):
    def make(self) -> None:
        self.hidden = [PlainValueComesIntoBeing()]

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden[0](F.relu(x))


class StoresATensorInAHelper(Net):
    def make(self) -> None:
        self.helper: Any = Count()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x)) + self.helper.n
        self.helper.n = h.detach()
        return h


IN_OBJECTS = [
    CountsInAHelper, CountsInASlot, CountsInAListOfHelpers, AppendsInADataclass, AppendsToADeque, CountsInACounter,
    DrawsFromItsOwnGenerator, DrawsFromNumpy, CountsInAnUnregisteredModule, StoresATensorInAHelper,
]  # fmt: skip


class IteratesOverAList(Net):
    """An iterator cannot be set back after a trace, so that also a part with one is refused."""

    def make(self) -> None:
        self.numbers = iter([1, 2, 3, 4, 5, 6, 7])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * next(self.numbers)


# --- outside of the model ---

STEPS = 0
STATE = {"steps": 0}
CALLS: list[int] = []
COUNT = Count()


class CountsInAGlobal(Net):
    def forward(self, x: Tensor) -> Tensor:
        global STEPS
        STEPS += 1
        return F.relu(self.f(x)) * STEPS


class CountsInAGlobalDict(Net):
    def forward(self, x: Tensor) -> Tensor:
        STATE["steps"] += 1
        return F.relu(self.f(x)) * STATE["steps"]


class AppendsToAGlobalList(Net):
    def forward(self, x: Tensor) -> Tensor:
        CALLS.append(1)
        return F.relu(self.f(x)) * len(CALLS)


class CountsInAGlobalObject(Net):
    def forward(self, x: Tensor) -> Tensor:
        COUNT.n += 1
        return F.relu(self.f(x)) * COUNT.n


class CountsOnItsClass(Net):
    n = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).n += 1
        return F.relu(self.f(x)) * self.n


class CountsOnItsNamedClass(Net):
    n = 0

    def forward(self, x: Tensor) -> Tensor:
        CountsOnItsNamedClass.n += 1
        return F.relu(self.f(x)) * CountsOnItsNamedClass.n


class CountsOnAFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        step.n += 1
        return F.relu(self.f(x)) * step.n


def step() -> None: ...


def _counter() -> Any:
    n = 0

    def count() -> int:
        nonlocal n
        n += 1
        return n

    return count


count = _counter()


class CountsInAClosure(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * count()


OUTSIDE = [
    CountsInAGlobal, CountsInAGlobalDict, AppendsToAGlobalList, CountsInAGlobalObject, CountsOnItsClass,
    CountsOnItsNamedClass, CountsOnAFunction, CountsInAClosure,
]  # fmt: skip


def set_back() -> None:
    globals()["STEPS"] = COUNT.n = step.n = STATE["steps"] = 0
    CountsOnItsClass.n = CountsOnItsNamedClass.n = 0
    CALLS.clear()
    count.__closure__[0].cell_contents = 0


@pytest.fixture(autouse=True)
def _set_back() -> Iterator[None]:
    set_back()
    yield
    set_back()


def now() -> tuple[Any, ...]:
    n = count.__closure__[0].cell_contents
    return STEPS, COUNT.n, step.n, dict(STATE), list(CALLS), CountsOnItsClass.n, n


# --- the checks ---


def inside(kind: type[Net]) -> type[Net]:
    class Whole(Net):
        def make(self) -> None:
            self.part = kind()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.g(self.part(F.relu(x))))

    return Whole


def outputs(model: nn.Module) -> list[Tensor]:
    set_back()
    return [model(*given.args) for given in THRICE]


REFUSED = [*NO_GRAPH, ReadsTheStateOfAPart, *IN_OBJECTS, IteratesOverAList, *OUTSIDE]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", REFUSED)
def test_a_root_that_keeps_state_is_refused_and_left_as_it_was(kind: type[Net]) -> None:
    model = build(kind)
    before, outside = contents(model), now()
    gm, refusal = captured_or_refused(model)
    assert gm is None
    assert kind.__name__ in refusal
    assert "freegrad_fx.compile" in refusal
    assert contents(model) == before
    assert now() == outside
    assert all(map(torch.equal, outputs(model), outputs(build(kind))))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "kind", [k for k in (*NO_GRAPH, *IN_OBJECTS, *OUTSIDE) if k is not AddsASubmodule]
)
def test_a_part_that_keeps_state_is_one_opaque_call(kind: type[Net]) -> None:
    model = build(inside(kind))
    outside = now()
    gm = fg.transform(model, {"relu": None})
    assert now() == outside
    assert {opaque.path for opaque in fg.report(gm).opaque} == {"part"}
    assert all(map(torch.equal, outputs(gm), outputs(build(inside(kind)))))


@pytest.mark.parametrize("kind", [HasAttr, CountsInAHelper, CountsInAGlobal])
def test_rules_act_around_a_part_that_keeps_state(kind: type[Net]) -> None:
    original, gm = build(inside(kind)), fg.transform(build(inside(kind)), RULE)
    assert len(fg.report(gm).decisions) == 2
    assert difference(original, gm.train(), []) == ""
