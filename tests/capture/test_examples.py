"""Example inputs are told apart, whatever memory they share: the graph has one input for each of them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.capture.examples import distinct, map_tensors, twin
from side_by_side import Net, build, sample

RULE = "straight_through"
Pair = namedtuple("Pair", "first second")


class Two(Net):
    def make(self) -> None:
        self.register_buffer("table", sample(5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.f(torch.relu(x)) - 2 * self.g(torch.relu(y)) + self.table


class InADict(Two):
    def forward(self, batch: dict[str, Any]) -> Tensor:  # type: ignore[override]
        return super().forward(batch["x"], batch["rest"][0])


class InAPair(Two):
    def forward(self, pair: Any, y: Tensor) -> Tensor:
        return super().forward(pair.first, pair.second) + y


X, Y, Z = sample(2), sample(3), sample(4)

CASES: dict[str, tuple[type[Two], Callable[[Any], Any], Any]] = {
    "twice": (Two, lambda m: (X, X), (Y, Z)),
    "by name": (Two, lambda m: {"x": X, "y": X}, {"x": Y, "y": Z}),
    "in a dict": (InADict, lambda m: ({"x": X, "rest": [X]},), ({"x": Y, "rest": [Z]},)),
    "in a namedtuple": (InAPair, lambda m: (Pair(X, X), X), (Pair(Y, Z), X)),
    "a buffer": (Two, lambda m: (m.table, X), (Y, Z)),
    "a parameter": (Two, lambda m: (X[:, :1] * m.f.bias, X), (Y, Z)),
    "the parameter itself": (Two, lambda m: (m.weight, m.weight), (Y, Z)),
    "a view": (Two, lambda m: (X, X.view(4, 6)), (Y, Z)),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CASES)
def test_the_graph_has_an_input_for_each(name: str) -> None:
    make, example, call = CASES[name]
    model = build(make)
    if name == "the parameter itself":
        model.weight = nn.Parameter(X.clone())
    gm = fg.transform(model, RULE, example_inputs=example(model))
    args, kwargs = ((), call) if isinstance(call, dict) else (call, {})
    assert torch.equal(gm(*args, **kwargs), model(*args, **kwargs))


@dataclasses.dataclass
class Batch:
    x: Tensor
    size: int = dataclasses.field(init=False, default=3)


class Cache:
    def __init__(self) -> None:
        self.layers = [X, X]


class Keywords(Two):
    def forward(self, x: Tensor, y: Tensor | None = None, **others: Any) -> Tensor:  # type: ignore[override]
        result = super().forward(x, x if y is None else y)
        return result / others.get("items", 1)


def test_keywords_that_the_examples_lack_are_refused_and_those_that_they_give_are_inputs() -> None:
    """A trainer gives such a keyword to a model whose forward has ``**others``."""
    model, three = build(Keywords), torch.tensor(3)
    without = fg.transform(model, {"relu": RULE}, example_inputs=(X,))
    assert [*inspect.signature(without.forward).parameters] == ["x", "y", "others"]
    assert torch.equal(without(Y), model(Y))
    for again in (without, copy.deepcopy(without), torch.compile(without, backend="eager")):
        with pytest.raises(fg.CaptureError, match=r"captured without items.*example_inputs"):
            again(Y, items=three)
    given = fg.transform(model, {"relu": RULE}, example_inputs={"x": X, "items": torch.tensor(2)})
    assert [*inspect.signature(given.forward).parameters] == ["x", "items", "y", "others"]
    assert torch.equal(given(Y, items=three), model(Y, items=three))
    with pytest.raises(fg.CaptureError, match="captured without more,"):
        given(Y, items=three, more=1)


def test_every_nesting_is_copied_with_tensors_of_its_own() -> None:
    made = defaultdict(list, a=[X])
    given = (
        X,
        [X],
        (X,),
        {"x": X},
        Pair(X, X),
        Batch(X),
        Cache(),
        OrderedDict(x=X),
        made,
        None,
        "s",
    )
    other = distinct(given)
    found: list[Tensor] = []
    map_tensors(other, lambda t: found.append(t) or t)
    assert len(found) == 11
    assert len({t.data_ptr() for t in found} | {X.data_ptr()}) == 12
    assert all(torch.equal(t, X) for t in found)
    assert [type(v) for v in other] == [Tensor, *map(type, given[1:])]
    assert given[6].layers[0] is X
    assert other[8].default_factory is list
    assert other[5].size == 3


def test_a_copy_has_the_properties_of_the_tensor() -> None:
    parameter = twin(nn.Parameter(torch.ones(2), requires_grad=False))
    assert isinstance(parameter, nn.Parameter)
    assert not parameter.requires_grad
    computed = twin(torch.ones(2, requires_grad=True) * 2)
    assert computed.is_leaf
    assert computed.requires_grad
    window = torch.arange(6.0).unfold(0, 3, 1)
    for tensor in (
        X.t(),
        X[:, ::2],
        X[0].expand(3, 6),
        window,
        torch.empty(0, 3),
        X.to("meta").t(),
    ):
        other = twin(tensor)
        assert (other.stride(), other.shape, other.dtype) == (
            tensor.stride(),
            tensor.shape,
            tensor.dtype,
        )
        assert tensor.is_meta or torch.equal(other, tensor)
    sparse = twin(torch.eye(3).to_sparse())
    assert sparse.is_sparse


def test_objects_that_refer_to_themselves_end() -> None:
    given: list[Any] = [X]
    given.append(given)
    assert distinct(given)[1] is given
