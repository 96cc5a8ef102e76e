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


def test_a_replaced_forward_and_a_renamed_option_are_understood(saved: dict[str, Any]) -> None:
    model = saved["heaviside"]["model"]
    assert set(model(saved["x"]).unique().tolist()) <= {0.0, 1.0}
    (decision,) = fg.report(model).with_action("rewrite")
    assert decision.rules[0].compile
    assert "compile = True" in model.code
    assert saved["rule"] == fg.rules.fast_sigmoid(forward=fg.vocabulary.heaviside, compile=True)


def test_a_plan_saved_before_is_the_plan_of_now(saved: dict[str, Any]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    assert not saved["plan"].diff(fg.explain(model, {"relu": "rectangular"}))


@pytest.mark.parametrize("name", MOVED)
def test_an_old_name_has_what_the_new_one_has(name: str) -> None:
    old = importlib.import_module(f"freegrad_fx.{name}")
    for place in MOVED[name]:
        new = importlib.import_module(f"freegrad_fx.{place}")
        for exported in new.__all__:
            assert getattr(old, exported) is getattr(new, exported)
    with pytest.raises(AttributeError):
        _ = old.nothing


def test_other_names_are_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("freegrad_fx.nothing")
