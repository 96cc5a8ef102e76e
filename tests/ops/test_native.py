"""A model whose forward is replaced, in a `native` block: a warning says that its gradients are no baseline."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import freegrad_fx as fg

RULES: dict[str, Any] = {
    "activations": {"relu": fg.rules.arctan(forward="heaviside")},
    "parameters": {"params": fg.rules.straight_through(forward="sign")},
}
WAYS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "symbolic": lambda m, rules: fg.transform(m, rules),
    "export": lambda m, rules: fg.transform(m, rules, example_inputs=(torch.ones(2, 3),)),
    "transformed twice": lambda m, rules: fg.transform(fg.transform(m, rules), {"sigmoid": None}),
    "copied": lambda m, rules: copy.deepcopy(fg.transform(m, rules)),
    "saved": lambda m, rules: pickle.loads(pickle.dumps(fg.transform(m, rules))),
    "torch.compile": lambda m, rules: torch.compile(fg.transform(m, rules), backend="aot_eager"),
    "fg.compile": lambda m, rules: fg.compile(m, rules, backend="aot_eager"),
}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Sigmoid())


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        call()
    return [str(w.message) for w in found if "stays replaced" in str(w.message)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_said_once(way: str, rules: str) -> None:
    torch.compiler.reset()
    original, x = model(), torch.randn(2, 3)
    made = WAYS[way](original, RULES[rules])

    def in_native() -> None:
        with fg.native():
            for _ in range(3):
                made(x)

    assert not warned(lambda: made(x))
    # a compiler may trace a graph more than once
    (text,) = set(warned(in_native))
    assert "call the original model" in text


def test_no_gradients_are_asked_for() -> None:
    made, x = fg.transform(model(), RULES["activations"]), torch.randn(2, 3)

    def without() -> None:
        with fg.native(), torch.no_grad():
            made(x)

    assert not warned(without)


def test_the_sites_are_named() -> None:
    made, x = fg.transform(model(), RULES["activations"]), torch.randn(2, 3)

    def run() -> None:
        with fg.native():
            made(x)

    (text,) = warned(run)
    assert "at 2 sites, of which 1:relu[0] is the first," in text


def test_a_model_without_replaced_forwards_has_no_such_node() -> None:
    graph = fg.transform(model(), {"relu": "scale", "params": "scale"}).graph
    assert not graph.find_nodes(op="call_function", target=fg.ops.warn_if_native)


def test_verify_has_a_note_of_its_own() -> None:
    original, x = model(), torch.randn(2, 3)
    made = fg.transform(original, RULES["activations"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "forward=" in str(fg.verify(original, made, x))
