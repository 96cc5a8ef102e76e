"""Forward and backward of one activation: native, and with each rule. Ratios within one run are what counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import freegrad_fx as fg

SIZES = {"1M": (1_000_000,), "64x64": (64, 64)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rule", [None, *fg.rules.available()])
def bench_relu(benchmark: Any, rule: str | None, size: str) -> None:
    """relu, in eager mode."""
    benchmark.group = f"relu {size}, forward and backward"
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Identity(), nn.ReLU())
    step = model if rule is None else fg.transform(model, {"relu": rule})
    x = torch.randn(SIZES[size], requires_grad=True)
    grad = torch.randn(SIZES[size])

    def run() -> None:
        x.grad = None
        step(x).backward(grad)

    benchmark(run)
