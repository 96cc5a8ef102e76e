"""The properties of tensors in a forward: each is read where the forward reads it, and is written into where it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from side_by_side import THRICE, Make, Net, captured_or_refused, check_capture

CASES: dict[str, Make] = {}


def case(kind: type[Net]) -> type[Net]:
    CASES[kind.__name__] = kind
    return kind


@case
class ReadBeforeNoGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        w = self.f.weight.T
        with torch.no_grad():
            norm = w.norm()
        return F.relu(x @ w / norm)


@case
class ReadInNoGrad(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            w = self.f.weight.mT
        return F.relu(self.g(x @ w))


@case
class ScalesTheDataOfAParameter(Net):
    def forward(self, x: Tensor) -> Tensor:
        w = self.f.weight.data
        w *= 0.5
        return F.relu(self.f(x))


@case
class AddsToATranspose(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        t = h.T
        t += 1
        return F.relu(h)


@case
class WritesIntoData(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        h.data[0] = 0.5
        return F.relu(h)


@case
class AddsToARealPart(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.complex(self.f(x), x)
        r = h.real
        r += 1
        i = h.imag
        i -= self.g(x)
        return F.relu(h.real) * h.imag


@case
class AsksForTheShapeFirst(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x).clone()
        shape, dims = h.shape, h.ndim
        h.unsqueeze_(0)
        return F.relu(h).reshape(shape) + dims


@case
class AsksForRequiresGradFirst(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(4, 6)
        asked = h.requires_grad
        h += self.f(x)
        return F.relu(h) + torch.ones(4, 6) * asked


@case
class KeepsTheDataOfABuffer(Net):
    def make(self) -> None:
        self.register_buffer("scale", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        before = self.scale.data
        self.scale = self.scale * 2
        return F.relu(self.f(x)) * before


@case
class AddsToAField(Net):
    def forward(self, x: Tensor) -> Tensor:
        top = self.f(x).max(1)
        values = top.values
        values += 1
        return F.relu(top.values) + top[0]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CASES)
def test_a_property_is_read_where_the_forward_reads_it(name: str) -> None:
    check_capture(CASES[name], *THRICE)


class AssignsTheData(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.f.weight.data *= 0.5
        return F.relu(self.f(x))


def test_an_assignment_to_data_is_refused() -> None:
    gm, refusal = captured_or_refused(AssignsTheData())
    assert gm is None
    assert "an assignment to the attribute 'data' of a tensor cannot be traced" in refusal
    assert "freegrad_fx.compile(model, rules)" in refusal
