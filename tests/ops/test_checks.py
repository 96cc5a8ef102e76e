"""The checks that a graph runs at each call: what they let through, and what they refuse with which words."""

from __future__ import annotations

import pytest
import torch

import freegrad_fx as fg
from freegrad_fx.ops.checks import require_open, require_specialised, require_tensor

T = torch.zeros(2)


@pytest.mark.parametrize("value", [None, True, False], ids=str)
def test_an_argument_that_an_is_test_may_single_out_is_refused(value: bool | None) -> None:
    with pytest.raises(fg.CaptureError, match=rf"concrete_args={{'flag': {value}}}"):
        require_open(value, "flag")


@pytest.mark.parametrize("value", [0, 1, 0.0, "", (), T], ids=str)
def test_an_argument_that_no_is_test_singles_out_is_let_through(value: object) -> None:
    require_open(value, "flag")


@pytest.mark.parametrize(
    ("value", "captured"), [(1, 1), ("a", "a"), (None, None), ((1, 2), (1, 2)), (1.5, 1.5)], ids=str
)
def test_the_value_of_the_capture_is_let_through(value: object, captured: object) -> None:
    require_specialised(value, captured, "n")


# equal numbers of other types may take other branches
@pytest.mark.parametrize(
    ("value", "captured"),
    [(2, 1), (True, 1), (1.0, 1), (None, False), ([1], (1,)), (1, ...)],
    ids=str,
)
def test_another_value_or_type_than_that_of_the_capture_is_refused(
    value: object, captured: object
) -> None:
    with pytest.raises(fg.CaptureError, match="called with another value") as refused:
        require_specialised(value, captured, "n")
    assert "concrete_args={'n': ...}" in str(refused.value)
    with pytest.raises(fg.CaptureError, match=r"Do that instead\.$"):
        require_specialised(value, captured, "n", "Do that instead.")


def test_only_tensors_are_let_through_where_the_forward_tests_for_a_tensor() -> None:
    require_tensor(T, "model.py:3")
    for value in (None, 1.0, [T]):
        with pytest.raises(fg.CaptureError, match=r"model\.py:3"):
            require_tensor(value, "model.py:3")
