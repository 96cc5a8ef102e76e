"""The operations that are sites only for tables that name them: every spelling, through every way in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.plan import Plan
from freegrad_fx.vocabulary import OPS


class Transposed(nn.Module):
    """The layer of GPT-2: its weight is stored transposed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Products(nn.Module):
    """Products with parameters, and products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(3, 3), Transposed(3, 3)])
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = layer(x)
        x = F.linear(x, self.weight)
        x = F.linear(input=x, weight=self.weight * 2, bias=self.inner[0].bias)
        x = x @ self.weight.t()
        x = torch.matmul(x, self.weight.T)
        x = x.mm(self.weight.transpose(0, 1))
        x = torch.mm(x, self.weight)
        x = x @ self.weight
        products = x @ x.t() @ x
        products = products + torch.matmul(input=self.weight[0], other=x.mT)[:, None]
        batch = x[None]
        return torch.baddbmm(batch, torch.bmm(batch, batch.mT), products[None])


class Convolutions(nn.Module):
    """Convolutions and pools of every kind, and norms over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv1d(2, 4, 3, padding="same")
        self.reflected = nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")
        self.transposed = nn.ConvTranspose1d(4, 2, 2, stride=2, groups=2)
        self.by_channel = nn.Parameter(torch.randn(2, 1, 3))
        self.plane = nn.Parameter(torch.randn(1, 1, 1, 3, 3))
        self.batch = nn.BatchNorm1d(2)
        self.group = nn.GroupNorm(2, 2)
        self.largest = nn.MaxPool1d(2)
        self.average = nn.AdaptiveAvgPool1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transposed(self.same(x))
        x = F.conv1d(x, self.by_channel, padding="same", groups=2)
        x = self.group(self.batch(x))
        norm = self.batch
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, bias=norm.bias)
        x = self.reflected(F.group_norm(x, 1)[:, None])[:, 0]
        x = F.conv3d(x[:, None, None], self.plane, None, 1, (0, 1, 1))[:, 0, 0]
        x = F.conv_transpose1d(x, self.by_channel, None, 1, 1, 0, 2)
        x = F.max_pool1d(self.largest(x), 3, 1, 1)
        return self.average(F.avg_pool1d(x, 3, 1, 1))


class Everything(nn.Module):
    """Every operation of the table, in its spellings."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.layer = nn.LayerNorm(4)
        self.rms = nn.RMSNorm(4)
        self.scale = nn.Parameter(torch.rand(4) + 1)
        self.drop = nn.Dropout(0.5)
        self.inner = Convolutions()
        self.products = Products()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        words = torch.tensor([[0, 1, 2], [3, 4, 5]])
        e = self.table(words) + F.embedding(words, self.table.weight)
        h = F.layer_norm(self.layer(x), (4,), self.scale, self.scale)
        h = F.rms_norm(self.rms(h), (4,), weight=self.scale)
        h = torch.add(h + e, e, alpha=2).add(1)
        h += e
        h = torch.sub(1 + h, e)
        h = torch.rsub(1 - h, e)
        h -= 1
        h = (2 * h).mul(self.scale) * e
        h *= 0.5
        h = torch.mul(h, other=e) / self.scale
        h = torch.true_divide(h.div(2), 2)
        h = h.softmax(-1) * torch.log_softmax(h, 0)
        h = (h**2).sqrt() + torch.rsqrt(h.pow(2)) + h.square() + torch.exp(h)
        h = h + h.mean(-1, keepdim=True) + torch.mean(h, (1, 2), True)
        q = F.scaled_dot_product_attention(h, h, h, is_causal=True)
        q = F.scaled_dot_product_attention(query=q, key=h, value=h)
        rows = x.shape[0] * x.shape[1]  # a product of numbers is no site
        q = F.dropout(self.drop(q.reshape(rows, 4).view_as(h)), 0.5, self.training)
        return self.inner(q.transpose(1, 2)[:, :2]), self.products(x[..., 0])


NUMBERS = {
    "": {
        "embedding": 1, "layer_norm": 1, "rms_norm": 1, "add": 11, "sub": 4, "mul": 6, "div": 3,
        "softmax": 1, "log_softmax": 1, "pow": 3, "sqrt": 1, "rsqrt": 1, "exp": 1, "mean": 2,
        "scaled_dot_product_attention": 2, "dropout": 1,
    },
    "inner": {
        "conv": 3, "batch_norm": 1, "group_norm": 1, "max_pool": 1, "avg_pool": 1,
    },
    "table": {"embedding": 1}, "layer": {"layer_norm": 1}, "rms": {"rms_norm": 1},
    "drop": {"dropout": 1}, "inner.same": {"conv": 1}, "inner.reflected": {"conv": 1},
    "inner.transposed": {"conv": 1}, "inner.batch": {"batch_norm": 1},
    "inner.group": {"group_norm": 1}, "inner.largest": {"max_pool": 1},
    "inner.average": {"avg_pool": 1},
    "products": {"linear": 7, "matmul": 5, "add": 1, "mul": 1},
    "products.inner.0": {"linear": 1}, "products.inner.1": {"linear": 1},
}  # fmt: skip


def transformed(model: nn.Module, table: dict[str, None], x: Tensor) -> Plan:
    return fg.explain(model, table)


def exported(model: nn.Module, table: dict[str, None], x: Tensor) -> Plan:
    return fg.explain(model, table, example_inputs=(x,))


def compiled(model: nn.Module, table: dict[str, None], x: Tensor) -> Plan:
    result = fg.compile(model, table, backend="eager")
    result(x)
    return fg.report(result)


def in_block(model: nn.Module, table: dict[str, None], x: Tensor) -> Plan:
    with fg.use(table, model=model) as block:
        model(x)
    return fg.report(block)


WAYS = (transformed, exported, compiled, in_block)


@pytest.mark.parametrize("way", [transformed, in_block])
def test_only_the_operations_that_a_table_names_are_sites(
    way: Callable[[nn.Module, dict[str, None], Tensor], Plan],
) -> None:
    plan = way(Products(), {"matmul": None}, torch.randn(2, 3))
    assert [d.site.name for d in plan.decisions] == [f"<root>:matmul[{i}]" for i in range(5)]


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_finds_every_spelling(
    way: Callable[[nn.Module, dict[str, None], Tensor], Plan],
) -> None:
    names = [name for name, op in OPS.items() if op.on_demand]
    table = dict.fromkeys([*names, "softmax", "log_softmax"])
    found: dict[str, Counter[str]] = {}
    for decision in way(Everything(), table, torch.randn(2, 3, 4)).decisions:
        found.setdefault(decision.site.path, Counter())[decision.site.op] += 1
    assert found == NUMBERS


def test_no_group_contains_them() -> None:
    assert not any(op.groups for op in OPS.values() if op.on_demand)
    sites = [decision.site for decision in fg.explain(Products(), None).decisions]
    assert {site.kind for site in sites} == {"parameter"}
