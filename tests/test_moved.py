"""Models that were saved before modules moved load, and have the same forward and the same gradients."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

import freegrad_fx as fg
from freegrad_fx._moved import MOVED

SAVED = Path(__file__).parent / "data" / "saved-before-the-moves.pt"


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(SAVED, weights_only=False)
    return loaded


@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_a_model_saved_before_the_moves_loads(saved: dict[str, Any], capture: str) -> None:
    found = saved[capture]
    model, x = found["model"].train(), saved["x"].clone().requires_grad_()
    y = model(x)
    gradients = torch.autograd.grad((y**2).sum(), [x, *model.parameters()])
    torch.testing.assert_close(y, found["y"])
    torch.testing.assert_close(list(gradients), found["gradients"])
    assert fg.report(model).with_action("rewrite")[0].site.name == "1:relu[0]"


@pytest.mark.parametrize("name", MOVED)
def test_an_old_name_has_what_the_new_one_has(name: str) -> None:
    old = importlib.import_module(f"freegrad_fx.{name}")
    new = importlib.import_module(f"freegrad_fx.{MOVED[name]}")
    for exported in new.__all__:
        assert getattr(old, exported) is getattr(new, exported)
    with pytest.raises(AttributeError):
        _ = old.nothing


def test_other_names_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("freegrad_fx.nothing")
