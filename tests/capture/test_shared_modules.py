"""Modules under two names, reached through their tables, compared by `is`, or keys of dicts: both captures are right.

The original is the oracle; where the symbolic capture cannot be right, it refuses.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from side_by_side import TWICE, Make, Net, build, captured_or_refused, difference, sample
from sweep import NATIVE

CASES: dict[str, Make] = {}


def case(kind: type[Net]) -> type[Net]:
    CASES[kind.__name__] = kind
    return kind


class Inner(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.f(x))


class Shared(Net):
    def make(self) -> None:
        inner = Inner()
        self.one, self.tanh, self.two = inner, nn.Tanh(), inner
        self.weights = {inner: 2.0, self.tanh: 3.0}


@case
class ThroughChildren(Shared):
    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return self.two(self.one(x))


@case
class ThroughNamedModules(Shared):
    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.named_modules():
            if isinstance(module, Inner):
                x = module(x) * len(name)
        return F.relu(x)


@case
class ThroughTheTable(Shared):
    def forward(self, x: Tensor) -> Tensor:
        for module in self._modules.values():
            x = module(x)
        return self._modules["two"](x)


@case
class ByName(Shared):
    def forward(self, x: Tensor) -> Tensor:
        for name in ("one", "tanh", "two"):
            x = getattr(self, name)(x)
        return x


@case
class ComparedByIs(Shared):
    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x) + 1 if self.one is self.two else self.one(x)
        return self.two(x) * (2 if self.tanh in list(self.children()) else 1)


@case
class KeyOfADict(Shared):
    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x) * self.weights.get(child, 5.0)
        return x


@case
class CountedByIdentity(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x)) * len({id(module) for module in self.modules()})


@case
class KeyOfItsIdentity(Shared):
    def make(self) -> None:
        super().make()
        self.ids = {id(self.one): 2.0}

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.one(x)) * self.ids.get(id(self.two), 7.0)


@case
class ParametersInAList(Net):
    def forward(self, x: Tensor) -> Tensor:
        known = [p for p in self.g.parameters() if any(p is q for q in self.f.parameters())]
        return F.relu(self.f(x)) * (1 + len(known))


@case
class HeldByAGlobal(Net):
    def make(self) -> None:
        HELD[:] = [self.f]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * (2 if self.f is HELD[0] else 3)


@case
class KeyOfAGlobal(Net):
    def make(self) -> None:
        TABLE.clear()
        TABLE[self.f] = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * TABLE.get(self.f, 3.0)


HELD: list[nn.Module] = []
TABLE: dict[nn.Module, float] = {}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", ["symbolic", "export"])
@pytest.mark.parametrize("name", CASES)
def test_modules_are_who_they_are(name: str, way: str) -> None:
    original = build(CASES[name])
    options = {"example_inputs": (sample(),)} if way == "export" else {}
    gm, refusal = captured_or_refused(original, NATIVE, **options)
    if gm is None:
        assert "cannot be captured" in refusal
        assert "freegrad_fx.compile" in refusal
    else:
        # The original itself, as another one would not be the one that a global holds
        for given in TWICE:
            assert torch.equal(gm(*given.args), original(*given.args))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["ThroughChildren", "ThroughTheTable", "ByName", "ComparedByIs"])
def test_both_captures_find_the_same_sites(name: str) -> None:
    def sites(**options: object) -> list[str]:
        plan = fg.explain(build(CASES[name]), "straight_through", **options)
        return [decision.site.name for decision in plan.decisions]

    assert sites(example_inputs=(sample(),)) == sites()


def test_gradients_through_a_shared_module_are_native() -> None:
    make = CASES["ThroughChildren"]
    gm = fg.transform(build(make), NATIVE, example_inputs=(sample(),))
    assert difference(build(make), gm) == ""
