"""Rules at the output and the operands of an operation, where operations work in place or share memory.

The reference is each case written by hand, out of place, with naive edges around the activation.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

import freegrad_fx as fg
import models
from inplace_cases import (
    CASE,
    RULES,
    Case,
    Written,
    assert_same_backward,
    assert_same_values,
    observe,
    with_x,
)
from models import Activation, Backward, naive
from runs import close, difference_in_gradients

RECTANGULAR, BY_HAND = RULES["rectangular"]
CHAIN, CHAIN_BY_HAND = RULES["rectangular, then fast_sigmoid"]

# By placement: the rule of the table, and the same by hand. A rule at an edge reads the tensor there
PLACES: dict[str, dict[str, tuple[Any, Backward]]] = {
    "x": {"x": (CHAIN, CHAIN_BY_HAND)},
    "output": {"output": (CHAIN, CHAIN_BY_HAND)},
    "x and output": {"x": (RECTANGULAR, BY_HAND), "output": RULES["scale"]},
    "everywhere": {
        "x": RULES["scale"],
        "replace": (fg.rules.fast_sigmoid(slope=2.0), models.fast_sigmoid(2.0)),
        "output": (RECTANGULAR, BY_HAND),
    },
}


def table_of(places: dict[str, tuple[Any, Backward]]) -> fg.RuleTable:
    return fg.RuleTable(
        fg.on("relu", at=at).backward(rule) for at, (rule, _) in reversed(places.items())
    )


def by_hand(places: dict[str, tuple[Any, Backward]]) -> Activation:
    def edge(at: str, x: Tensor) -> Tensor:
        return naive(lambda v: v.clone(), places[at][1])(x) if at in places else x

    def relu(x: Tensor) -> Tensor:
        x = edge("x", x)
        y = naive(F.relu, places["replace"][1])(x) if "replace" in places else F.relu(x)
        return edge("output", y)

    return relu


@pytest.mark.sampled(4)
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@CASE
def test_rules_at_places_equal_the_case_written_by_hand(case: Case, places: Any) -> None:
    table = table_of(places)
    model = Written(case.original)
    native = observe(model, with_x(model))
    expected = observe(model, lambda x: case.by_hand(model, x, by_hand(places)))
    gm = fg.transform(model, table)
    actual = observe(model, with_x(gm))
    assert_same_values(actual, native)
    if not (native.error and actual.error):
        assert_same_backward(actual, expected, close)
        assert native.error or difference_in_gradients(expected, native, close)
    with fg.native():
        off = observe(model, with_x(gm))
    assert_same_values(off, native)
    assert_same_backward(off, native)
    with fg.use(table, model=model):
        in_block = observe(model, with_x(model))
    assert_same_values(in_block, native)
    if not in_block.error:  # autograd refuses what a block cannot foresee
        assert_same_backward(in_block, expected, close)
