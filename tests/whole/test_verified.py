"""`verify` over one model of each of timm's families: symbolic, and from example inputs where that is needed."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from sweep import verified

pytestmark = pytest.mark.slow


def families() -> list[str]:
    """One model of each module of timm: the one whose name is the shortest among the small ones."""
    try:
        import timm
    except ImportError:
        return []
    small = ("tiny", "small", "nano", "pico", "atto", "_b0", "_xs", "_s", "18", "050")
    found = []
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        found += sorted(names, key=lambda n: (not any(s in n for s in small), len(n), n))[:1]
    return found


# Built for images of this and larger sizes, whose attention takes more memory than there is
LARGE_IMAGES = {"samvit_base_patch16"}


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """Free what is in reference cycles: garbage is collected by the number of objects, not by their size."""
    yield
    gc.collect()


def timm_model(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    import timm

    sizes = {"img_size": 256} if name in LARGE_IMAGES else {}
    model: Any = timm.create_model(name, pretrained=False, num_classes=5, **sizes)
    if sizes:
        return model, (2, 3, 256, 256)
    size = model.default_cfg["input_size"]
    if not model.default_cfg.get("fixed_input_size"):
        size = (size[0], *(min(128, s) for s in size[1:]))
    return model, (2, *size)


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    "name", families() or [pytest.param("", marks=pytest.mark.skip("no timm"))]
)
def test_a_model_of_each_family_of_timm_is_verified(name: str) -> None:
    model, shape = timm_model(name)
    if sum(p.numel() for p in model.parameters()) > 120e6:
        pytest.skip("its gradients do not fit beside those of other tests")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    try:
        model(x)
    except (RuntimeError, AssertionError) as error:
        pytest.skip(f"it takes no image of this size: {error}")
    found = verified(model, x)
    assert found.ok, str(found)
