"""Parameters and buffers that a forward compares by `is` or `id` with those that it finds in another way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from side_by_side import TWICE, Make, Net, check_capture, sample

CASES: list[Make] = []


def case(kind: type[Net]) -> type[Net]:
    CASES.append(kind)
    return kind


@case
class FirstOfItsParameters(Net):
    def forward(self, x: Tensor) -> Tensor:
        own = next(self.parameters()) is self.f.weight
        other = next(self.parameters()) is self.g.weight
        return F.relu(self.f(x)) * (2 if own else 3) * (5 if other else 7)


@case
class LeavesOneOut(Net):
    """Weight decay on all parameters except one."""

    def forward(self, x: Tensor) -> Tensor:
        penalty = sum(p.square().sum() for p in self.parameters() if p is not self.f.bias)
        return F.relu(self.f(x)) + penalty


@case
class InTheTables(Net):
    def make(self) -> None:
        self.register_buffer("mean", torch.ones(6))
        self.g.weight = self.f.weight

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.f(x)) * (2 if self.mean is self._buffers["mean"] else 3)
        x = x * (2 if self.g.weight is self.f._parameters["weight"] else 3)
        return x * (2 if self.f.get_parameter("bias") is self.f.bias else 3)


@case
class ByTheirNames(Net):
    def forward(self, x: Tensor) -> Tensor:
        named = [n for n, p in self.named_parameters() if p is self.g.weight]
        return F.relu(self.f(x)) * len(named[0])


@case
class ByTheirIdentity(Net):
    def forward(self, x: Tensor) -> Tensor:
        known = {id(p) for p in self.parameters()}
        return F.relu(self.f(x)) * (2 if id(self.g.bias) in known else 3)


@case
class ComparesAndChangesABuffer(Net):
    """What the forward assigned is what it reads afterwards; the tensor before is another."""

    def make(self) -> None:
        self.register_buffer("mean", torch.ones(6))
        self.scale = nn.Parameter(torch.tensor([0.5, -0.7, 1.1, 0.9, 0.3, -1.2]))

    def forward(self, x: Tensor) -> Tensor:
        before = self.mean
        with torch.no_grad():
            self.scale.mul_(0.9)
            self.scale[0] += 0.1
        x = F.relu(self.f(x)) * self.scale + self.mean
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        x = torch.tanh(x * self.scale) + torch.stack([self.mean, self.scale]).sum(0)
        return x * (2 if self.mean is before else 3) * self.scale.shape[0]


@pytest.mark.parametrize("make", CASES, ids=lambda m: m.__name__)
@pytest.mark.parametrize("exported", [False, True])
def test_tensors_of_the_model_are_compared_as_in_the_model(make: Make, exported: bool) -> None:
    options = {"example_inputs": (sample(),)} if exported else {}
    check_capture(make, *TWICE, **options)
