"""`isinstance` of what describes a shape, in a symbolic trace: it is a number, and no tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from side_by_side import NATIVE, Net, build, check_capture, sample

VALUES = {
    "an item of the shape": lambda x: x.shape[0],
    "an item of the size": lambda x: x.size()[-1],
    "one size": lambda x: x.size(0),
    "a size by its name": lambda x: x.size(dim=1),
    "unpacked": lambda x: x.shape[-2:][0],
    "computed": lambda x: -(x.shape[0] * 2 + 1) // x.size(1),
    "the rank": lambda x: x.ndim + x.dim(),
    "the number of entries": lambda x: x.numel() % 5,
    "the strides": lambda x: x.stride()[0],
    "a quotient": lambda x: x.shape[0] / 3,
}


def net(value: object, kinds: object) -> type[nn.Module]:
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            n = value(x)  # type: ignore[operator]
            h = self.act(self.f(x))
            return self.g(h * n) if isinstance(n, kinds) else self.g(h) * (n + 1)

    return Asks


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("kinds", [Tensor, int, float, (int, Tensor)], ids=str)
def test_a_number_is_no_tensor(name: str, kinds: object) -> None:
    model = build(net(VALUES[name], kinds))
    gm = fg.transform(model, NATIVE)
    for rows in (sample(), torch.randn(7, 6)):
        assert torch.equal(gm(rows), model(rows))


def test_a_shape_is_a_tuple() -> None:
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.f(x))
            return (
                h * 2 if isinstance(x.shape, tuple) and isinstance(x.size()[1:], torch.Size) else h
            )

    model = build(Asks)
    assert torch.equal(fg.transform(model, NATIVE)(sample()), model(sample()))


def test_what_is_computed_with_a_tensor_is_a_tensor() -> None:
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.f(x)) * x.shape[0]
            return h * 2 if isinstance(h, Tensor) and not isinstance(h, int) else h

    check_capture(Asks)
