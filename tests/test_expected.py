"""What plans say of the bytes that are kept for the backward."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx import expected

TABLE = fg.RuleTable(
    [
        fg.on("max_pool").backward("exact_max_pool"),
        fg.on("relu", call=1).backward(None),
        fg.on("relu").backward("exact_relu"),
        fg.on("tanh").backward("d(Linear)"),
    ]
)


class Net(nn.Module):
    """It changes an attribute, a buffer and the random state when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.drop = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Dropout(0.3)
        self.norm = nn.BatchNorm2d(4)
        self.seen = [torch.zeros(())]

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.drop(self.pool(x.relu())) if self.training else self.pool(x).tanh()
        return x.relu().relu()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plan(x: Tensor) -> fg.Plan:
    torch.manual_seed(0)
    model = Net()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    found = fg.explain(model, TABLE, example_inputs=(x,))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    return found


def test_the_bytes_of_sites_are_those_that_memory_counts(plan: fg.Plan, x: Tensor) -> None:
    counted = fg.memory(fg.transform(Net(), TABLE, example_inputs=(x,), verify=False), x)
    assert plan.memory is not None
    assert (plan.memory.native, plan.memory.kept) == (counted.native, counted.kept)
    pool, outputs = 2 * 4 * 64 * 4, 2 * 4 * 16
    by_site = {d.site.name: d.memory for d in plan.decisions if d.memory is not None}
    rows = {row.site: row for row in counted.rows}
    kept = by_site["pool:max_pool[0]"]
    assert (kept.native, kept.kept) == (outputs * 8, outputs)
    relus = [m for name, m in by_site.items() if ":relu" in name]
    assert len(relus) == 3
    assert sum(m.kept for m in relus) == pool // 32 + 2 * (outputs // 8)
    assert rows["pool:max_pool"].kept == outputs


def test_the_report_shows_them_by_site_and_by_entry(plan: fg.Plan) -> None:
    text = plan.to_text(0)
    assert "  1.00 KiB → 128 B  " in text
    assert "Entry 1, 'max_pool': 1 site; keeps 1.00 KiB → 128 B." in text
    assert f"with the rules: {plan.memory} for the example inputs" in text
    assert "1.00 KiB → 128 B" in plan._repr_html_()
    data = json.loads(plan.to_json())
    assert data["entries"][0]["memory"] == {"native": 1024, "kept": 128}
    assert data["memory"]["native"] > data["memory"]["kept"]
    assert [s["memory"] for s in data["sites"] if s["op"] == "max_pool"] == [
        {"native": 1024, "kept": 128}
    ]


def test_nothing_is_said_without_example_inputs_or_for_sites_that_do_not_run(
    plan: fg.Plan, monkeypatch: pytest.MonkeyPatch, x: Tensor
) -> None:
    model = nn.Sequential(nn.ReLU())
    unknown = fg.explain(model, {"relu": "exact_relu"})
    assert unknown.memory is None
    assert "ept for the backward" not in str(unknown)
    (tanh,) = (d for d in plan.decisions if d.site.op == "tanh")  # in eval mode only
    assert (tanh.action, tanh.memory) == ("rewrite", None)

    def fails(*given: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(expected, "count", fails)
    failed = fg.explain(model, {"relu": "exact_relu"}, example_inputs=(x,))
    assert failed.memory is None
    assert "kept for the backward is not known: RuntimeError: out of memory." in str(failed)


def test_a_model_without_values_is_counted(x: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, device="meta"), nn.MaxPool2d(2))
    found = fg.explain(model, {"max_pool": "exact_max_pool"}, example_inputs=(x.to("meta"),))
    (decision,) = found.decisions
    assert (decision.memory.native, decision.memory.kept) == (2 * 4 * (64 * 4 + 16 * 8), 128)
