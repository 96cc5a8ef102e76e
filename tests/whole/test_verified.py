"""`verify` over torchvision's classifiers and timm's families: symbolic, and from examples where that is needed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_sweep import CLASSIFICATION, HUGE, SHAPES, TRAINING_SHAPES, make
from torch import Tensor, nn

import freegrad_fx as fg
from sweep import NATIVE

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quiet_export() -> Iterator[None]:
    """torch.export logs what it specialises."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def image(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def verified(model: nn.Module, x: Tensor) -> fg.Verification:
    """The report for the symbolic way in; for the way from example inputs, where the model needs it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.FreegradWarning)
        try:
            gm = fg.transform(model, NATIVE)
        except fg.CaptureError:
            gm = fg.transform(model, NATIVE, example_inputs=(x,))
            assert "Verified" in fg.report(gm).verified
    return fg.verify(model, gm, x)


@pytest.mark.parametrize("name", [name for name in CLASSIFICATION if name not in HUGE])
def test_a_classifier_of_torchvision_is_verified(name: str) -> None:
    shape = TRAINING_SHAPES.get(name, SHAPES.get(name, (2, 3, 32, 32)))
    found = verified(make(name), image(shape))
    assert found.ok, str(found)
    assert found.checks == 8


# --- timm ---


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


def timm_model(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    import timm

    model: Any = timm.create_model(name, pretrained=False, num_classes=5)
    size = model.default_cfg["input_size"]
    if not model.default_cfg.get("fixed_input_size"):
        size = (size[0], *(min(128, s) for s in size[1:]))
    return model, (2, *size)


@pytest.mark.parametrize(
    "name", families() or [pytest.param("", marks=pytest.mark.skip("no timm"))]
)
def test_a_model_of_each_family_of_timm_is_verified(name: str) -> None:
    model, shape = timm_model(name)
    if sum(p.numel() for p in model.parameters()) > 120e6:
        pytest.skip("its gradients do not fit beside those of other tests")
    x = image(shape)
    try:
        model(x)
    except (RuntimeError, AssertionError) as error:
        pytest.skip(f"it takes no image of this size: {error}")
    found = verified(model, x)
    assert found.ok, str(found)
