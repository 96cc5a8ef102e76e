"""The operations that are sites only for tables that name them: every spelling, through every way in."""

from __future__ import annotations

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


LINEAR = ("inner.0:linear[0]", "inner.1:linear[0]", *(f"<root>:linear[{i}]" for i in range(7)))
MATMUL = tuple(f"<root>:matmul[{i}]" for i in range(5))


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


@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_finds_the_products(
    way: Callable[[nn.Module, dict[str, None], Tensor], Plan],
) -> None:
    plan = way(Products(), {"linear": None, "matmul": None}, torch.randn(2, 3))
    assert {d.site.name for d in plan.decisions} == {*LINEAR, *MATMUL}


@pytest.mark.parametrize("way", WAYS)
def test_only_the_operations_that_a_table_names_are_sites(
    way: Callable[[nn.Module, dict[str, None], Tensor], Plan],
) -> None:
    plan = way(Products(), {"matmul": None}, torch.randn(2, 3))
    assert {d.site.name for d in plan.decisions} == {*MATMUL}


def test_no_group_contains_them() -> None:
    assert not any(op.groups for op in OPS.values() if op.on_demand)
    sites = [decision.site for decision in fg.explain(Products(), None).decisions]
    assert {site.kind for site in sites} == {"parameter"}
