"""A dict that a forward fills with what it makes from its parameters: the graph makes it at each call.

Models of timm keep the biases of their attention so, in eval mode, until `train` empties the dict.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from side_by_side import NATIVE, Net, build, sample


class Biased(Net):
    """Keeps what it computes in eval mode, by the device, and forgets it in `train`."""

    def make(self) -> None:
        self.table = nn.Parameter(torch.arange(12.0).reshape(2, 6))
        self.index: Tensor
        self.register_buffer("index", torch.tensor([1, 3, 5, 0, 2, 4]))
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Biased:
        super().train(mode)
        if mode and self.cache:
            self.cache = {}
        return self

    def made(self, h: Tensor) -> Tensor:
        return self.table[:, self.index].sum(0)

    def biases(self, h: Tensor) -> Tensor:
        if self.training:
            return self.made(h)
        key = self.key(h)
        if key not in self.cache:
            self.cache[key] = self.made(h)
        return self.cache[key]

    def key(self, h: Tensor) -> str:
        return str(h.device)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.act(self.f(x))
        return self.g(h + self.biases(h))


class OfTheInput(Biased):
    def made(self, h: Tensor) -> Tensor:
        return h.mean(0)


class Drawn(Biased):
    def made(self, h: Tensor) -> Tensor:
        return torch.rand_like(self.table)[0]


class ByName(Biased):
    """A key that a symbolic trace knows."""

    def key(self, h: Tensor) -> str:
        return "h"


class Holds(Net):
    def make(self) -> None:
        self.part = Biased()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.part(self.act(x))
        return out


EXAMPLES: dict[str, Any] = {"example_inputs": (sample(3),)}
DOORS: dict[str, dict[str, Any]] = {"symbolic": {}, "export": EXAMPLES}
doors = pytest.mark.parametrize("door", DOORS)


def change_table(*models: nn.Module) -> None:
    """A step of training: in train mode, so that the caches are emptied."""
    for model in models:
        model.train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("table"):
                    parameter.add_(torch.arange(12.0).reshape(2, 6).cos())
        model.eval()


@pytest.mark.sampled(4)
@doors
@pytest.mark.parametrize("make", [Biased, ByName, Holds])
@pytest.mark.parametrize("training", [True, False])
def test_the_graph_makes_the_tensors_at_each_call(
    door: str, make: Callable[[], nn.Module], training: bool
) -> None:
    model = build(make).train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm = fg.transform(model, NATIVE, strict=True, **DOORS[door])
    name = "part" if make is Holds else "the root"
    assert f"{name}: the cache 'cache': the forward fills it" in str(fg.report(gm))
    model.eval(), gm.eval()
    for _ in range(3):
        x, y = sample(5).requires_grad_(), sample(5).requires_grad_()
        expected, found = model(x), gm(y)
        assert torch.equal(found, expected)
        expected.sum().backward()
        found.sum().backward()
        assert torch.equal(x.grad, y.grad)
        for one, other in zip(model.parameters(), gm.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)
        change_table(model, gm)


@doors
def test_verify_empties_the_caches_and_says_so(door: str) -> None:
    model = build(Holds).eval()
    gm = fg.transform(model, NATIVE, **DOORS[door])
    with torch.no_grad():
        model(sample(4))
    held = model.part.cache
    found = fg.verify(model, gm, sample(4))
    assert found.ok, str(found)
    assert "1 caches were emptied before each call" in str(found)
    assert "part.cache" in str(found)
    assert model.part.cache is held
    assert len(held) == 1


@pytest.mark.parametrize("make", [OfTheInput, Drawn])
def test_what_is_not_made_from_parameters_is_no_cache(make: Callable[[], nn.Module]) -> None:
    model = build(make).eval()
    with pytest.raises(
        fg.CaptureError, match=r"changes Python state .*'cache'.*fg|freegrad_fx\.compile"
    ):
        fg.transform(model, NATIVE, **EXAMPLES)
    assert model.cache == {}
    with pytest.warns(fg.FreegradWarning, match="lost: the root: attribute 'cache'"):
        gm = fg.transform(build(make).eval(), NATIVE)
    assert "LOST: the root: attribute 'cache'" in str(fg.report(gm))
    assert "Note: the root: the cache" not in str(fg.report(gm))


def test_a_dict_that_had_entries_is_a_constant_that_must_not_change() -> None:
    model = build(Biased).eval()
    with torch.no_grad():
        model(sample(4))
    gm = fg.transform(model, NATIVE, **EXAMPLES)
    assert torch.equal(gm(sample(4)), model(sample(4)))
    change_table(model, gm)
    with pytest.raises(
        fg.CaptureError, match=r"attribute cache .* set to \{\}.*transform the model again"
    ):
        gm(sample(4))


@pytest.mark.parametrize("container", [list, tuple, dict])
def test_a_tensor_in_a_container_must_not_be_replaced(container: type[Any]) -> None:
    class Reads(Net):
        def make(self) -> None:
            entries = {0: torch.ones(6), 1: torch.arange(6.0)}
            self.tables = entries if container is dict else container(entries.values())

        def forward(self, x: Tensor) -> Tensor:
            return self.g(self.act(self.f(x)) * self.tables[1])

    model = build(Reads)
    for options in DOORS.values():
        gm: Any = fg.transform(model, NATIVE, **options)
        assert torch.equal(gm(sample(4)), model(sample(4)))
        kept = gm.tables
        entries = {0: torch.ones(6), 1: torch.arange(6.0) * 2}
        gm.tables = entries if container is dict else container(entries.values())
        with pytest.raises(fg.CaptureError, match=r"attribute tables of the transformed model"):
            gm(sample(4))
        gm.tables = kept
        assert torch.equal(gm(sample(4)), model(sample(4)))
