"""The operations that are sites only for tables that name them: every spelling, through every way in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.core import rule as registry
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
        batch = torch.einsum("bij,jk->bik", [batch, self.inner[0].weight])
        batch = torch.einsum("bij,kj->bik", batch, self.inner[1].weight)
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
        h = h.tanh()
        h = h.softmax(-1) * torch.log_softmax(h, 0)
        h = (h**2).sqrt() + torch.rsqrt(h.pow(2)) + h.square() + torch.exp(h)
        h = h + h.mean(-1, keepdim=True) + torch.mean(h, (1, 2), True)
        q = F.scaled_dot_product_attention(h, h, h, is_causal=True)
        q = F.scaled_dot_product_attention(query=q, key=h, value=h)
        rows = x.shape[0] * x.shape[1]  # a product of numbers is no site
        q = F.dropout(q, 0.5, self.training)
        q = self.drop(q.reshape(rows, 4)).view_as(h)
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
    "products": {"linear": 7, "matmul": 7, "add": 1, "mul": 1},
    "products.inner.0": {"linear": 1}, "products.inner.1": {"linear": 1},
}  # fmt: skip


WAYS = ("transform", "export", "compile", "use")


def in_way(way: str, model: nn.Module, table: dict[str, Any], x: Tensor) -> tuple[Any, Any]:
    """A function that runs the model with the table, and what `report` takes after it ran."""
    if way == "use":
        block = fg.use(table, model=model)

        def run(x: Tensor) -> Any:
            with block:
                return model(x)

        return run, block
    if way == "compile":
        result: Any = fg.compile(model, table, backend="aot_eager")
    else:
        result = fg.transform(model, table, example_inputs=(x,) if way == "export" else None)
    return result, result


def natively(*operands: str) -> fg.Rule:
    """A rule that gives all operands their native gradients."""
    named: dict[str, Any] = {}
    answers = ", ".join(f"{name!r}: lambda: f.gradient({name!r}, grad)" for name in operands)
    exec(f"def rule(grad, {', '.join(operands)}, *, f): return {{{answers}}}", named)
    return fg.register(f"natively_{'_'.join(operands)}", answers=operands)(named["rule"])


@pytest.fixture
def own_rules() -> Iterator[None]:
    before = dict(registry._registry)
    yield
    registry._registry.clear()
    registry._registry.update(before)


def gradients(run: Callable[[Tensor], Any], model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs, and the gradients of the input and of all parameters, in train mode."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    outputs = run(leaf)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((out * torch.linspace(1, 2, out.numel()).view(out.shape)).sum() for out in outputs)
    found = torch.autograd.grad(loss, [leaf, *model.parameters()], allow_unused=True)
    for name, buffer in model.named_buffers():
        buffer.data.copy_(buffers[name])
    return [*outputs, *(g for g in found if g is not None)]


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize("way", WAYS)
def test_every_spelling_is_found_and_its_native_gradients_are_bit_identical(way: str) -> None:
    pairs = ("conv_bn", "linear_bn")  # they are no single layer in train mode
    names = [n for n, op in OPS.items() if op.on_demand and not op.groups and n not in pairs]
    table: dict[str, Any] = dict.fromkeys([*names, "softmax", "log_softmax"])
    rules = {operands: natively(*operands) for operands in {OPS[name].operands for name in table}}
    for name in table:
        # A dropout draws again, a batch norm counts again, and an embedding takes integers
        if name not in ("dropout", "batch_norm", "embedding"):
            table[name] = rules[OPS[name].operands]
    torch.manual_seed(0)
    model, x = Everything(), torch.randn(2, 3, 4)
    expected = gradients(model, model, x)
    run, reported = in_way(way, model, table, x)
    found = gradients(run, model, x)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    numbers: dict[str, Counter[str]] = {}
    for decision in fg.report(reported).decisions:
        if decision.site.op not in table:  # an activation
            continue
        numbers.setdefault(decision.site.path, Counter())[decision.site.op] += 1
        assert decision.action == ("native" if table[decision.site.op] is None else "rewrite")
    assert numbers == NUMBERS


@pytest.mark.parametrize("way", ["transform", "use"])
def test_only_the_operations_that_a_table_names_are_sites(way: str) -> None:
    model, x = Products(), torch.randn(2, 3)
    run, reported = in_way(way, model, {"matmul": None}, x)
    run(x)
    sites = [decision.site.name for decision in fg.report(reported).decisions]
    assert sites == [f"<root>:matmul[{i}]" for i in range(7)]


def test_no_group_contains_them() -> None:
    grouped = {op.name: op.groups for op in OPS.values() if op.on_demand and op.groups}
    assert grouped == {"comparison": {"heaviside"}}
    sites = [decision.site for decision in fg.explain(Products(), None).decisions]
    assert {site.kind for site in sites} == {"parameter"}
