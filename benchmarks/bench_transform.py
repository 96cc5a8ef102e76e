"""How long `transform` takes, beside a bare symbolic trace of the same model."""

from __future__ import annotations

from typing import Any

import pytest
from torch import fx

import freegrad_fx as fg
from _torchvision import torchvision

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
