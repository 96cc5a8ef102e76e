"""`graph/state.py`: tensors that modules hold beside their parameters and buffers, and plain values."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from freegrad_fx.graph.state import (
    ATTRIBUTES_OF_EVERY_MODULE,
    collect_tensors,
    is_python_state,
    tensors_in,
)

A, B = torch.zeros(1), torch.ones(1)


class Holder(nn.Module):
    """A parameter, a buffer, a plain attribute, and a submodule with an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.register_buffer("mean", torch.zeros(1))
        self.plain = [torch.ones(1)]
        self.part = nn.Module()
        self.part.cache = {"last": torch.ones(1)}


def closing_over(value: Any) -> Callable[[], Any]:
    return lambda: value


def with_empty_cell() -> Callable[[], Any]:
    def function() -> Any:
        return never, A

    if False:
        never = None
    return function


def with_defaults(a: Any = A, *, b: Any = (B,)) -> None: ...


TENSORS: dict[str, tuple[Any, list[Tensor]]] = {
    "tensor": (A, [A]),
    "list": ([A, [B]], [A, B]),
    "tuple": ((A, 1, "text", None), [A]),
    "set": ({A}, [A]),
    "dict": ({"a": A, "b": {"c": B}}, [A, B]),
    "key": ({A: "keys are not searched"}, []),
    "closure": (closing_over([A]), [A]),
    "closure over a closure": (closing_over(closing_over(B)), [B]),
    "defaults": (with_defaults, [A, B]),
    "function": (lambda x: x, []),
    "empty cell": (with_empty_cell(), []),
    "twice": ([A, A], [A]),
    "builtin": (torch.relu, []),
    "number": (1.0, []),
    "None": (None, []),
    "object": (object(), []),
}


@pytest.mark.parametrize(("value", "expected"), TENSORS.values(), ids=TENSORS)
def test_tensors_in_values(value: Any, expected: list[Tensor]) -> None:
    found = tensors_in(value)
    assert found.keys() == {id(tensor) for tensor in expected}
    for tensor in expected:
        assert found[id(tensor)] is tensor


def test_tensors_in_a_module_are_all_that_it_and_its_parts_hold() -> None:
    holder = Holder()
    expected = [holder.weight, holder.mean, holder.plain[0], holder.part.cache["last"]]
    assert tensors_in([holder]).keys() == {id(tensor) for tensor in expected}


@pytest.mark.filterwarnings("ignore:.torch.jit.script. :DeprecationWarning")
def test_torchscript_is_not_looked_into() -> None:
    assert tensors_in(torch.jit.script(nn.Linear(2, 2))) == {}


def test_containers_that_hold_themselves() -> None:
    values: list[Any] = [A]
    values.append(values)
    table = {"values": values}
    values.append(table)
    assert tensors_in(table) == {id(A): A}


def test_collect_tensors_adds_to_what_is_found_and_leaves_out_what_was_seen() -> None:
    first, second = [A], [B]
    found: dict[int, Any] = {}
    seen: set[int] = set()
    collect_tensors(first, found, seen)
    collect_tensors(second, found, seen)
    assert found == {id(A): A, id(B): B}
    assert seen == {id(first), id(second)}
    found.clear()
    collect_tensors(first, found, seen)
    assert found == {}


def test_attributes_of_every_module() -> None:
    assert "training" in ATTRIBUTES_OF_EVERY_MODULE
    module = Holder()
    assert {"plain"} == module.__dict__.keys() - ATTRIBUTES_OF_EVERY_MODULE


class Number(int): ...


PLAIN: list[Any] = [
    None,
    True,
    1,
    1.5,
    math.nan,
    1j,
    "text",
    b"bytes",
    [],
    [1, (2, "3"), {4}, frozenset({5})],
    {"a": [1], 2: None},
    {(1, 2): {"b": ()}},
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_python_values(value: Any) -> None:
    assert is_python_state(value)


OTHERS: dict[str, Any] = {
    "tensor": A,
    "tensor in a list": [1, A],
    "tensor in a dict": {"a": A},
    "tensor as a key": {A: 1},
    "object inside": {"a": {"b": [object()]}},
    "object": object(),
    "function": len,
    "module": nn.ReLU(),
    "dtype": torch.float32,
    "subclass of int": Number(1),  # it can have state of its own
    "subclass of dict": OrderedDict(a=1),
    "subclass inside": [Number(1)],
}


@pytest.mark.parametrize("value", OTHERS.values(), ids=OTHERS)
def test_other_values(value: Any) -> None:
    assert not is_python_state(value)
