"""The time of `transform`, compared with a plain symbolic trace of the model; and the time to plan a long table."""

from __future__ import annotations

from typing import Any

import pytest

import freegrad_fx as fg
from freegrad_fx.capture import capture
from freegrad_fx.plan import make_plan

from . import _cases as cases


@pytest.mark.parametrize("way", ["native symbolic_trace", "transform"])
@pytest.mark.parametrize("name", cases.TRANSFORMED)
def bench_transform(benchmark: Any, name: str, way: str, quick: bool) -> None:
    """`transform` of both modes of a model, compared with a trace of one."""
    if quick and name != "resnet18":
        pytest.skip("--quick transforms the smallest model alone")
    benchmark.group = f"transform {name}"
    benchmark(cases.transform(name)[way])


@pytest.mark.parametrize("length", ["short", "long"])
def bench_chain(benchmark: Any, length: str, quick: bool) -> None:
    """A chain of activations, and one that is four times as long."""
    benchmark.group = "transform a chain"
    short, long = cases.transform_chain(quick).values()
    benchmark(short if length == "short" else long)


def long_table() -> fg.RuleTable:
    """Fifty entries of every kind. No early entry matches all sites."""
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
    model, table = cases.torchvision_models().resnet50(weights=None), long_table()
    assert len(table) == 50
    if stage == "capture":
        benchmark(capture, model)
        return
    plan, _ = benchmark(make_plan, capture(model), table)
    assert len(plan.decisions) == 49 + 161
