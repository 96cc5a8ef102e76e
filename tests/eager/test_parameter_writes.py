"""A model that writes into a parameter whose forward is replaced: refused, as a graph keeps such a parameter native.

What the model writes would come from the replacement, so that the weights would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg

TABLE = fg.RuleTable(
    [fg.on(parameter="layer.weight").backward("straight_through", forward="binarize")]
)


def copied(weight: Tensor) -> None:
    weight.copy_(weight.neg())


def added(weight: Tensor) -> None:
    weight += 1


def set_item(weight: Tensor) -> None:
    weight[0] = 0.0


def with_out(weight: Tensor) -> None:
    torch.neg(weight, out=weight)


WRITES = [copied, added, set_item, with_out, nn.init.zeros_]


class Writes(nn.Module):
    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.write = nn.Linear(3, 3, bias=False), write

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.change()
        out: Tensor = self.layer(x)
        return out

    @torch.compiler.disable
    def change(self) -> None:
        self.write(self.layer.weight)


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("door", ["use", "compile"])
def test_a_write_in_the_forward_is_refused_and_the_weight_is_as_before(
    door: str, write: Callable[[Tensor], Any]
) -> None:
    model = Writes(write)
    before = model.layer.weight.detach().clone()
    if door == "use":
        writes = pytest.raises(fg.RuleError, match=r"writes into .*weight.* in its forward")
        with writes, fg.use(TABLE, model=model):
            model(torch.ones(2, 3))
    else:
        compiled = fg.compile(model, TABLE, backend="eager")
        with pytest.raises(fg.RuleError, match=r"writes into .*weight.* in its forward"):
            compiled(torch.ones(2, 3))
    assert torch.equal(model.layer.weight, before)


def test_a_write_outside_of_the_forward_is_none() -> None:
    model = Writes(lambda weight: weight.data.neg_())
    before = model.layer.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fg.use(TABLE, model=model):
        out = model(torch.ones(2, 3))
        assert torch.equal(out, torch.ones(2, 3) @ torch.where(-before >= 0, 1.0, -1.0).t())
        out.sum().backward()
        optimizer.step()
        with torch.no_grad():
            model.layer.weight.mul_(2.0)
    torch.testing.assert_close(model.layer.weight, (-before - 0.1 * 2.0) * 2.0)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.change()
        out: Tensor = self.layer(h)
        return out

    @torch.compiler.disable
    def change(self) -> None:
        self.layer.weight.data.neg_()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("door", ["use", "compile"])
def test_a_write_through_data_between_two_reads_is_seen(door: str) -> None:
    model, x = Twice(), torch.randn(2, 3)
    sign = torch.where(model.layer.weight.detach() >= 0, 1.0, -1.0)
    if door == "use":
        with fg.use(TABLE, model=model):
            out = model(x)
    else:
        out = fg.compile(model, TABLE, backend="eager")(x)
    assert torch.equal(out, x @ sign.t() @ (-sign).t())


def test_a_rule_without_a_forward_acts_once_although_data_is_read() -> None:
    model, x = Twice(), torch.randn(2, 3, dtype=torch.float64)
    model.double().change = lambda: model.layer.weight.data.norm()
    (native,) = torch.autograd.grad(model(x).square().sum(), model.layer.weight)
    with fg.use({"params": fg.rules.clip_norm(max_norm=0.5)}, model=model):
        loss = model(x).square().sum()
    loss.backward()
    torch.testing.assert_close(model.layer.weight.grad, native * (0.5 / native.norm()))


def test_a_rule_without_a_forward_leaves_writes_alone() -> None:
    model = Writes(copied)
    before = model.layer.weight.detach().clone()
    with fg.use({"params": "reverse"}, model=model):
        model(torch.ones(2, 3)).sum().backward()
    assert torch.equal(model.layer.weight, -before)
    assert torch.equal(model.layer.weight.grad, torch.full((3, 3), -2.0))
