"""How long `transform` takes, beside a bare symbolic trace of the same model; and how long the plan of a long table."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx

import freegrad_fx as fg
from _torchvision import torchvision
from freegrad_fx.capture import capture
from freegrad_fx.plan import make_plan

MODELS = ("resnet18", "densenet121", "vit_b_16", "googlenet")


@pytest.mark.parametrize("way", ["symbolic_trace", "transform"])
@pytest.mark.parametrize("name", MODELS)
def bench_transform(benchmark: Any, name: str, way: str) -> None:
    """Both modes of the model, against one."""
    benchmark.group = name
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    if way == "symbolic_trace":
        benchmark(fx.symbolic_trace, model)
    else:
        benchmark(fg.transform, model, "rectangular")


def long_table() -> fg.RuleTable:
    """Fifty entries of every kind, of which no early one takes all sites."""
    blocks = [f"layer{layer}.{block}.*" for layer in (1, 2, 3, 4) for block in range(4)]
    return fg.RuleTable(
        [
            *(fg.on("relu", module=block, call=1).backward("rectangular") for block in blocks),
            *(
                fg.on("all", module=f"re:layer[12].{n}.*", call=2).backward("scale")
                for n in range(8)
            ),
            *(fg.on(parameter=f"{block}.bias").backward("noise") for block in blocks),
            *(
                fg.on("params", type="torch.nn.Conv2d", module=b).backward("reverse")
                for b in blocks[:9]
            ),
            fg.on("all").backward("clip_norm"),
        ]
    )


@pytest.mark.parametrize("stage", ["capture", "plan"])
def bench_long_table(benchmark: Any, stage: str) -> None:
    """A table of 50 entries on resnet50: its 49 activations and 161 parameters, in both modes."""
    benchmark.group = "50 entries on resnet50"
    model, table = torchvision.models.resnet50(weights=None), long_table()
    assert len(table) == 50
    if stage == "capture":
        benchmark(capture, model)
        return
    plan, _ = benchmark(make_plan, capture(model), table)
    assert len(plan.decisions) == 49 + 161
