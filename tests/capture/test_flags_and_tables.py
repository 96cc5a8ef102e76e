"""Flags that `is` asks about or that decide what is in place, and buffers reached by the dict that holds them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from side_by_side import THRICE, Make, Net, build, captured_or_refused, check_capture, sample

CASES: dict[str, Make] = {}


def case(kind: type[Net]) -> type[Net]:
    CASES[kind.__name__] = kind
    return kind


# --- flags ---


@case
class IsFalse(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x)
        return self.f(h) if self.training is False else self.g(h)


@case
class IsTrue(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x)
        return self.f(h) if self.training is True else self.g(h)


@case
class IsNotFalse(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x)
        return self.f(h) if self.training is not False else self.g(h)


def by_mode(h: Tensor, training: Any) -> Tensor:
    return h * 2 if training is False else h


@case
class IsFalseInAFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return by_mode(F.relu(self.f(x)), self.training)


@case
class Matches(Net):
    def forward(self, x: Tensor) -> Tensor:
        match self.training:
            case False:
                return F.relu(self.f(x))
            case _:
                return F.relu(self.g(x))


@case
class EqualsFalse(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x)
        return self.f(h) if self.training == False else self.g(h)  # noqa: E712


@case
class Not(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x)
        return self.f(h) if not self.training else self.g(h)


@case
class InPlaceInTraining(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return F.relu(h, inplace=self.training) + h


@case
class InPlaceByPosition(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return F.relu(h, self.training) + h


@case
class InPlaceInEval(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x)).clone()
        return F.dropout(h, 0.5, self.training, inplace=not self.training) + h


# --- tables ---


class HasABuffer(Net):
    def make(self) -> None:
        self.register_buffer("n", torch.zeros(6))


@case
class AddsByTheDict(HasABuffer):
    def forward(self, x: Tensor) -> Tensor:
        self._buffers["n"] += 1
        return F.relu(self.f(x)) * self.n


@case
class StoresByTheDict(HasABuffer):
    def forward(self, x: Tensor) -> Tensor:
        self._buffers["n"] = self.n + x.detach().mean(0)
        return F.relu(self.f(x)) * self.n


@case
class RegistersAgain(HasABuffer):
    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("n", self.n * 0.5 + x.detach().mean(0))
        return F.relu(self.f(x)) * self.n


@case
class PartAddsByTheDict(Net):
    def make(self) -> None:
        self.part = AddsByTheDict()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.part(self.g(x)))


@case
class ScalesAParameterByTheDict(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.f._parameters["weight"] *= 0.5
        return F.relu(self.f(x))


@case
class WritesARowOfEachParameter(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for p in self.f.parameters():
                p[0] = 0.5
        return F.relu(self.f(x))


@case
class AddsToEachParameter(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for p in self.f.parameters():
                p += 1
        return F.relu(self.f(x))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CASES)
def test_flags_and_tables_are_the_original_s(name: str) -> None:
    check_capture(CASES[name], *THRICE)


def test_a_part_that_cannot_be_traced_keeps_its_buffers() -> None:
    class AddsThenBranches(HasABuffer):
        def forward(self, x: Tensor) -> Tensor:
            self._buffers["n"] += 1
            return x * self.n if x.sum() > 0 else x - self.n

    class Outside(Net):
        def make(self) -> None:
            self.part = AddsThenBranches()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.f(self.part(x)))

    check_capture(Outside, *THRICE, whole=["part"])


def test_a_parameter_that_is_written_to_can_have_a_rule() -> None:
    model, original = build(WritesARowOfEachParameter), build(WritesARowOfEachParameter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.FreegradWarning)  # the parameters of `g` are not used
        gm = fg.transform(model, {"params": fg.rules.scale(s=2.0)})
    gm(sample()).sum().backward()
    original(sample()).sum().backward()
    for name in ("weight", "bias"):
        expected = 2 * getattr(original.f, name).grad
        assert torch.equal(getattr(gm.f, name).grad, expected)


class RegistersABuffer(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.register_buffer("seen", x.detach())
        return F.relu(self.f(x)) + self.seen


class ReplacesAParameter(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.f._parameters["weight"] = self.f.weight * 0.5
        return F.relu(self.f(x))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (RegistersABuffer, "registers the buffer 'seen'"),
        (ReplacesAParameter, "replaces the parameter 'weight'"),
    ],
)
def test_a_table_that_a_graph_cannot_change_is_refused(kind: type[nn.Module], says: str) -> None:
    gm, refusal = captured_or_refused(build(kind))
    assert gm is None
    assert says in refusal
    assert "freegrad_fx.compile(model, rules)" in refusal
