"""Every built-in rule passes `check_rule`, with the formulas of `reference` as what it is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

import freegrad_fx as fg
import reference
from built_in import BUILT_IN

_PERIODIC = {"non_finite": "a periodic function has no limit"}
# A sampled forward would give another y in each run
_SOFTMAX = {"non_finite": "a softmax of infinite numbers is no number"}

GIVEN: dict[str, dict[str, Any]] = {
    "centralize": {"skip": {"runs": "it takes a mean over dim 1, which not every tensor has"}},
    "identity_rule": {"skip": {"non_finite": "the limit of y/x depends on the operation"}},
    "periodic_exponential": {"skip": _PERIODIC},
    "squarewave_fourier": {"skip": _PERIODIC},
    "reinmax": {"op": "sigmoid", "skip": _SOFTMAX},
    "gumbel_straight_through": {"op": "sigmoid", "skip": _SOFTMAX},
    "exact_silu": {"skip": {"non_finite": "PyTorch's own gradient is NaN at infinity"}},
    "rotation_trick": {"skip": {"non_finite": "an infinite vector has no direction"}},
}
"""What `check_rule` is given for a rule besides its formula. A new rule needs no line."""


def formula_of(name: str) -> Callable[..., Tensor]:
    read = reference.inputs_of(name)

    def formula(grad: Tensor, *others: Tensor, **values: Any) -> Tensor:
        draw = reference.DRAWS[name](grad) if name in reference.RANDOM else None
        inputs = dict(zip(read, others, strict=True))
        return reference.expected_of(name, grad, draw, **inputs, **values)

    return formula


@pytest.mark.sampled(16)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_rule_passes_all_checks(name: str) -> None:
    fg.testing.check_rule(name, reference=formula_of(name), **GIVEN.get(name, {}))


def test_every_line_of_the_table_is_of_a_built_in_rule() -> None:
    assert set(BUILT_IN) >= GIVEN.keys()
