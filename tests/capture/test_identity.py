"""Tensors that a forward compares by `is`, by `id`, or by the hash that sets and dicts ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
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


# --- results that are an argument ---

RESULTS: list[Make] = []


def result(kind: type[Net]) -> type[Net]:
    RESULTS.append(kind)
    return kind


@result
class WritesInPlace(Net):
    def make(self) -> None:
        self.inplace = nn.Hardtanh(-0.5, 0.5, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        first, second = h.add_(0.1), F.relu(h, inplace=True)
        x = h * (2 if first is h else 3) * (5 if second is first else 7)
        return x * (2 if self.inplace(x) is x else 3)


@result
class CountsObjects(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        seen = [h, h.mul_(2), h.relu_(), self.g(h)]
        return torch.tanh(h) * len({id(tensor) for tensor in seen})


@result
class HashesTensors(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        known = {h: 2, self.g(x): 3}
        scale = known[h.add_(1)] * len({*known, h})
        return torch.tanh(h) * scale


@result
class ParametersAreKeys(Net):
    def make(self) -> None:
        self.scales = {self.f.weight: 2, self.g.bias: 3}
        self.frozen = {self.g.weight}

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.f(x)) * self.scales[self.f.weight]
        return torch.tanh(self.g(y)) * (5 if self.g.weight in self.frozen else 7)


@result
class ComparesOtherThings(Net):
    """That `float` may return its argument makes no difference."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = self.f(x).float().contiguous()
        x += 1
        return F.relu(x) * (2 if self.act is self.act and dtype is not self else 3)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", RESULTS, ids=lambda m: m.__name__)
def test_a_result_is_the_argument_if_the_call_works_in_place(make: Make) -> None:
    check_capture(make, *TWICE)


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = x.mul_(2)
        return h * 2 if x.sum() > 0 and h is x else h * 3


class HasAPartThatCannotBeTraced(Net):
    def make(self) -> None:
        self.part = Branches()

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        y = self.part(h)
        return torch.tanh(h + y) * (2 if h.add_(1) is h else 3)


def test_a_part_that_cannot_be_traced_leaves_the_objects_as_they_were() -> None:
    check_capture(HasAPartThatCannotBeTraced, *TWICE, whole=["part"])


@pytest.mark.parametrize(
    "convert",
    [
        lambda h: h.contiguous(),
        lambda h: h.to(torch.float32),
        lambda h: F.dropout(h, 0.5, training=False),
        nn.Flatten(),
    ],
)
@pytest.mark.parametrize("how", ["is", "hash"])
def test_whether_a_call_returns_its_argument_is_not_guessed(convert: Any, how: str) -> None:
    class Converts(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.f(x)
            c = convert(h)
            same = c is h if how == "is" else len({c, h}) == 1
            return F.relu(c) * (2 if same else 3)

    model = Converts()
    with pytest.raises(fg.CaptureError, match="returns x itself or a new tensor"):
        fg.transform(model, {"relu": "reverse"})
    x = sample()
    with fg.use({"relu": "reverse"}, model=model):
        y = model(x)
    assert torch.equal(y, model(x))
