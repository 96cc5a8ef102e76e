"""Arguments and outputs: a transformed model is called as the original is, and returns what the original returns.

What a graph cannot leave open (an optional argument, keyword collections) is specialised, and a call that wants
another value is refused with the way out.
"""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import pickle
import typing
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from runs import Call, call
from side_by_side import (
    RULE,
    Asserts,
    Make,
    Net,
    build,
    check_capture,
    difference,
    sample,
    what_plain_tracing_gets_wrong,
)
from sweep import NATIVE

Pair = namedtuple("Pair", "a b")
OPEN = torch.fx.PH


class TypedPair(typing.NamedTuple):
    a: Tensor
    b: Any = None


@dataclass
class Record:
    a: Tensor
    b: Any = None


@dataclass(frozen=True)
class FrozenRecord:
    a: Any
    b: Any = None


class Kind(enum.Enum):
    ONE = 1
    TWO = 2


class Plain:
    v = 3


def net(forward: Callable[..., Any]) -> Make:
    """A model with that forward."""
    name = f"{forward.__name__}_model"
    kind = type(name, (Net,), {"forward": forward, "__module__": __name__})
    globals()[name] = kind  # where pickle looks for it
    return kind


X, Y = sample(2), sample(3)


# --- arguments ---


@dataclass(frozen=True)
class Case:
    make: Make
    calls: tuple[Call, ...]
    concrete: dict[str, Any] | None = None


ARGUMENTS: dict[str, Case] = {}


def arguments(*calls: Call, **concrete: Any) -> Callable[[Callable[..., Any]], None]:
    def add(forward: Callable[..., Any]) -> None:
        ARGUMENTS[forward.__name__] = Case(net(forward), calls, concrete or None)

    return add


@arguments(call(X, Y), call(X, y=Y), call(y=Y, x=X))
def two_tensors(self: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.relu(self.f(x) + y)


@arguments(call(X, y=Y))
def keyword_only(self: Any, x: Tensor, *, y: Tensor) -> Tensor:
    return F.relu(self.f(x) + y)


@arguments(call(X, Y))
def positional_only(self: Any, x: Tensor, y: Tensor, /) -> Tensor:
    return F.relu(self.f(x) + y)


@arguments(call(X), call(X, scale=2.0), call(X, mask=None))
def keyword_only_with_defaults(
    self: Any, x: Tensor, *, mask: Tensor | None = None, scale: float = 2.0
) -> Tensor:
    return F.relu(self.f(x)) * scale if mask is None else x * mask


@arguments(call(X), call(X, None), call(X, mask=None))
def optional_left_out(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    y = F.relu(self.f(x))
    if mask is not None:
        y = y * mask
    return y


@arguments(call(X, Y), call(X, mask=Y), mask=OPEN)
def optional_given(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    y = F.relu(self.f(x))
    if mask is not None:
        y = y * mask
    return y


@arguments(call(X, 2.5), call(X, k=3), call(X, Y))
def number_or_tensor(self: Any, x: Tensor, k: Any) -> Tensor:
    return F.relu(self.f(x)) * k


@arguments(call(X, 3.0), call(X, k=3.0), k=3.0)
def pinned_where_required(self: Any, x: Tensor, k: float) -> Tensor:
    return F.relu(self.f(x)) * (k if k > 1 else 0)


@arguments(call(X, 3.0), call(X, k=3.0), k=3.0)
def pinned_where_optional(self: Any, x: Tensor, k: float = 1.0) -> Tensor:
    return F.relu(self.f(x)) * k


@arguments(call(X), call(X, True, 1.5), call(X, c="sum", d=(1, 2), e=[1, 2], f={"q": 3}, g=None))
def defaults_of_every_plain_kind(
    self: Any,
    x: Tensor,
    a: bool = True,
    b: float = 1.5,
    c: str = "sum",
    d: tuple[int, int] = (1, 2),
    e: Any = [1, 2],  # noqa: B006
    f: Any = {"q": 3},  # noqa: B006
    g: None = None,
    h: Any = slice(0, 2),
    i: torch.dtype = torch.float32,
    j: Any = torch.Size([1]),  # noqa: B008
    k: Any = float("nan"),
    m: Any = float("inf"),
    n: Any = (),
) -> Tensor:
    y = F.relu(self.f(x)) * b * d[1] * e[0] * f["q"]
    y = y.to(i).clamp(max=m) + (0 if k != k else k)
    if a and not n and g is None:
        y = y + j[0]
    return getattr(y, c)(0)[h]


@arguments(call(X))
def default_enum(self: Any, x: Tensor, kind: Kind = Kind.ONE) -> Tensor:
    return F.relu(self.f(x)) * (2 if kind is Kind.ONE else 3)


@arguments(call(X))
def default_function(self: Any, x: Tensor, act: Any = F.relu) -> Tensor:
    return act(self.f(x))


@arguments(call(X))
def default_lambda(self: Any, x: Tensor, act: Any = lambda t: F.relu(t)) -> Tensor:
    return act(self.f(x))


@arguments(call(X))
def default_tensor(self: Any, x: Tensor, t: Any = torch.full((6,), 0.5)) -> Tensor:  # noqa: B008
    return F.relu(self.f(x) * t)


@arguments(call(X))
def default_object(self: Any, x: Tensor, o: Any = Plain()) -> Tensor:  # noqa: B008
    return F.relu(self.f(x)) * o.v


@arguments(call(X))
def default_dataclass(self: Any, x: Tensor, o: Any = FrozenRecord(1.5, 2)) -> Tensor:
    return F.relu(self.f(x)) * o.a


@arguments(call(X))
def default_named_tuple(self: Any, x: Tensor, o: Any = Pair(1.5, 2)) -> Tensor:  # noqa: B008
    return F.relu(self.f(x)) * o.a


@arguments(call(X), call(X, torch.device("cpu")))
def default_device(self: Any, x: Tensor, d: Any = torch.device("cpu")) -> Tensor:  # noqa: B008
    return F.relu(self.f(x)).to(d)


@arguments(call(X))
def default_set(self: Any, x: Tensor, t: Any = frozenset({1, 2})) -> Tensor:
    return F.relu(self.f(x)) * len(t)


@arguments(call((X, Y)))
def a_tuple(self: Any, pair: Any) -> Tensor:
    a, b = pair
    return F.relu(self.f(a) + b)


@arguments(call([X, Y]), call((X, Y)))
def a_list(self: Any, pair: Any) -> Tensor:
    return F.relu(self.f(pair[0]) + pair[1])


@arguments(call({"a": X, "b": [Y, 2.0]}))
def a_dict(self: Any, d: Any) -> Tensor:
    return F.relu(self.f(d["a"]) + d["b"][0] * d["b"][1])


@arguments(call(Record(X, Y)), call(FrozenRecord(X, Y)))
def a_dataclass(self: Any, d: Any) -> Tensor:
    return F.relu(self.f(d.a) + d.b)


@arguments(call(Pair(X, Y)), call(TypedPair(X, Y)))
def a_named_tuple(self: Any, d: Any) -> Tensor:
    return F.relu(self.f(d.a) + d[1])


@arguments(call(X), call(X, Y))
def collections_unused(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.relu(self.f(x))


@arguments(call(X, Y))
def positional_collection(self: Any, *xs: Tensor) -> Tensor:
    return F.relu(self.f(xs[0]) + xs[1])


@arguments(call(X, y=Y), kw=OPEN)
def keyword_collection(self: Any, x: Tensor, **kw: Any) -> Tensor:
    return F.relu(self.f(x) + kw["y"])


@arguments(call(X))
def keyword_collection_left_out(self: Any, x: Tensor, **kw: Any) -> Tensor:
    return F.relu(self.f(x)) * (2 if "y" in kw else 1)


@arguments(call(X))
def a_tensor_asked_for_its_class(self: Any, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return F.relu(self.f(x))
    return F.relu(self.f(x["x"])) * 2


ARGUMENTS["asserts"] = Case(Asserts, (call(X),))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_way_of_calling_is_the_original_s(name: str) -> None:
    case = ARGUMENTS[name]
    check_capture(case.make, *case.calls, concrete_args=case.concrete)


def test_the_default_of_an_enum_may_be_given() -> None:
    make = ARGUMENTS["default_enum"].make
    check_capture(make, call(X, Kind.ONE), call(X, kind=Kind.ONE))


@pytest.mark.parametrize("name", ["optional_left_out", "keyword_only_with_defaults", "two_tensors"])
def test_what_does_not_fit_is_a_type_error_as_with_the_original(name: str) -> None:
    case = ARGUMENTS[name]
    model = build(case.make)
    gm = fg.transform(model, RULE)
    for bad in (call(), call(X, unknown=1), call(X, X, X, X, X)):
        for m in (model, gm):
            with pytest.raises(TypeError):
                m(*bad.args, **bad.kwargs)


def test_an_assertion_that_fails_fails() -> None:
    gm = fg.transform(build(ARGUMENTS["asserts"].make), RULE)
    with pytest.raises(AssertionError):
        gm(sample()[:3])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("optional_left_out", "refuses|raises"),
        ("pinned_where_required", "refuses"),
        ("a_tensor_asked_for_its_class", "refuses|raises|output"),
        ("keyword_collection_left_out", "refuses|raises|output"),
        ("asserts", "refuses"),
    ],
)
def test_a_plain_trace_is_wrong_about_arguments(name: str, says: str) -> None:
    found = what_plain_tracing_gets_wrong(ARGUMENTS[name].make, *ARGUMENTS[name].calls)
    assert found.startswith(tuple(says.split("|"))), found


# --- what was specialised ---


class Optional_(Net):
    """Says which of its branches it took."""

    def forward(
        self, x: Tensor, mask: Tensor | None = None, mode: str = "mean", k: int = 2
    ) -> Tensor:
        y = F.relu(self.f(x)) * k
        if mask is not None:
            y = F.relu(y * mask)
        return y.mean(0) if mode == "mean" else y.sum(0)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (call(X, Y), "mask"),
        (call(X, mask=Y), "mask"),
        (call(X, mode="sum"), "mode"),
        (call(X, None, "sum"), "mode"),
        (call(X, k=3), "k"),
        (call(X, k=2.0), "k"),  # equal to the default, and gives another dtype to an integer input
    ],
)
def test_another_value_is_refused_with_a_remedy_that_works(given: Call, name: str) -> None:
    model = build(Optional_)
    with pytest.raises(fg.CaptureError) as caught:
        fg.transform(model, RULE)(*given.args, **given.kwargs)
    assert f"concrete_args={{{name!r}:" in str(caught.value)
    asked = dict(zip(("x", "mask", "mode", "k"), given.args, strict=False)) | dict(given.kwargs)
    value = OPEN if isinstance(asked[name], Tensor) else asked[name]
    gm = fg.transform(build(Optional_), NATIVE, concrete_args={name: value})
    assert difference(build(Optional_), gm, [given, given]) == ""


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_refuse_too(way: Callable[[Any], Any]) -> None:
    gm = way(fg.transform(build(Optional_), RULE))
    with pytest.raises(fg.CaptureError, match="mask"):
        gm(X, Y)
    assert torch.equal(gm(X), build(Optional_)(X))


def test_a_value_that_was_pinned_is_the_one_that_counts() -> None:
    """`concrete_args` wins over the default, with and without the argument."""
    original = build(Optional_)
    gm = fg.transform(build(Optional_), NATIVE, concrete_args={"k": 3, "mode": "sum"})
    assert torch.equal(gm(X), original(X, k=3, mode="sum"))
    assert torch.equal(gm(X, k=3), original(X, k=3, mode="sum"))
    with pytest.raises(fg.CaptureError, match="'k'"):
        gm(X, k=2)


def test_two_models_of_one_with_other_values() -> None:
    model = build(Optional_)
    first = fg.transform(model, NATIVE)
    second = fg.transform(model, NATIVE, concrete_args={"mask": OPEN, "mode": "sum"})
    assert torch.equal(first(X), model(X))
    assert torch.equal(second(X, Y), model(X, Y, "sum"))


@pytest.mark.parametrize("name", ["default_tensor", "default_object", "default_lambda"])
def test_what_no_graph_can_hold_is_specialised_to_the_default(name: str) -> None:
    """Given explicitly it is refused, in words: whether it is the default, a graph cannot know."""
    make = ARGUMENTS[name].make
    parameter, default = list(inspect.signature(make.forward).parameters.items())[-1]  # type: ignore[attr-defined]
    gm = fg.transform(build(make), NATIVE)
    other = torch.zeros(6) if name == "default_tensor" else Plain()
    assert torch.equal(gm(X), build(make)(X))
    for value in (default.default, other):
        with pytest.raises(fg.CaptureError, match=f"the default of {parameter} and") as caught:
            gm(X, value)
        assert "Ellipsis" not in str(caught.value)


def test_a_default_tensor_is_read_anew() -> None:
    """The default belongs to the function: what is written into it, the original sees."""
    default = torch.ones(6)

    class Scaled(Net):
        def forward(self, x: Tensor, t: Tensor = default) -> Tensor:
            return F.relu(self.f(x) * t)

    model = build(Scaled)
    gm = fg.transform(model, NATIVE)
    default.mul_(3)
    assert torch.equal(gm(X), model(X))


class WantsKeywords(Net):
    def forward(self, x: Tensor, **kw: Tensor) -> Tensor:
        return F.relu(self.f(x) + kw["y"])


def test_keyword_collections_say_how_to_keep_them_open() -> None:
    with pytest.raises(fg.CaptureError, match="concrete_args") as caught:
        fg.transform(WantsKeywords(), RULE)
    assert "kw" in str(caught.value)


class HandsItsArgumentsOn(Net):
    def forward(self, *xs: Tensor) -> Tensor:
        return F.relu(torch.add(*xs))


def test_a_collection_of_unknown_length_is_refused_with_the_way_out() -> None:
    with pytest.raises(fg.CaptureError, match="example_inputs") as caught:
        fg.transform(HandsItsArgumentsOn(), RULE)
    assert "torch.add(*xs)" in str(caught.value)
    gm = fg.transform(build(HandsItsArgumentsOn), NATIVE, example_inputs=(X, Y))
    assert torch.equal(gm(X, Y), build(HandsItsArgumentsOn)(X, Y))


class IgnoresKeywords(Net):
    def forward(self, x: Tensor, **kw: Any) -> Tensor:
        return F.relu(self.f(x)) * (2 if "y" in kw else 1)


def test_keywords_given_to_a_model_captured_without_are_refused() -> None:
    gm = fg.transform(IgnoresKeywords(), RULE)
    with pytest.raises(fg.CaptureError, match="kw"):
        gm(X, y=Y)


def test_unknown_names_in_concrete_args_are_refused_with_the_valid_ones() -> None:
    with pytest.raises(fg.CaptureError, match=r"'maks'.*Did you mean 'mask'"):
        fg.transform(build(Optional_), RULE, concrete_args={"maks": OPEN})
    with pytest.raises(fg.CaptureError, match="'self'"):
        fg.transform(build(Optional_), RULE, concrete_args={"self": 1})


class AskedForItsClass(Net):
    def forward(self, x: Any) -> Tensor:
        if isinstance(x, Tensor):
            return F.relu(self.f(x))
        return F.relu(self.f(x["x"])) * 2


def test_an_argument_taken_for_a_tensor_has_to_be_one() -> None:
    """`isinstance(x, Tensor)` is taken for true, and looked at again in each call."""
    model = build(AskedForItsClass)
    gm = fg.transform(model, NATIVE)
    assert torch.equal(gm(X), model(X))
    with pytest.raises((fg.CaptureError, TypeError, AssertionError)):
        gm({"x": X})


# --- outputs ---

OUTPUTS: dict[str, Make] = {}


def returns(forward: Callable[..., Any]) -> None:
    OUTPUTS[forward.__name__] = net(forward)


@returns
def nothing(self: Any, x: Tensor) -> None:
    F.relu(self.f(x))


@returns
def nested(self: Any, x: Tensor) -> Any:
    a = F.relu(self.f(x))
    return a, None, (a * 2, [a + 1, {"k": a}]), 3, "s"


@returns
def a_named_tuple_(self: Any, x: Tensor) -> Any:
    a = F.relu(self.f(x))
    return Pair(a, a * 2)


@returns
def a_typed_named_tuple(self: Any, x: Tensor) -> Any:
    a = F.relu(self.f(x))
    return TypedPair(a, {"twice": a * 2})


@returns
def a_named_tuple_of_torch(self: Any, x: Tensor) -> Any:
    return torch.max(F.relu(self.f(x)), 1)


@returns
def a_dataclass_(self: Any, x: Tensor) -> Any:
    a = F.relu(self.f(x))
    return Record(a, a * 2)


@returns
def a_frozen_dataclass(self: Any, x: Tensor) -> Any:
    a = F.relu(self.f(x))
    return FrozenRecord(a, (a * 2, {"k": a}))


@returns
def an_ordered_dict(self: Any, x: Tensor) -> Any:
    a = F.relu(self.f(x))
    return OrderedDict(z=a, a=a * 2)


@returns
def a_dict_with_other_keys(self: Any, x: Tensor) -> Any:
    a = F.relu(self.f(x))
    return {"a": a, 1: [a], (2, 3): ()}


@returns
def its_input(self: Any, x: Tensor) -> Any:
    F.relu(self.f(x))
    return x


@returns
def constants(self: Any, x: Tensor) -> Any:
    F.relu(self.f(x))
    return torch.ones(3), 2.5


@returns
def shapes(self: Any, x: Tensor) -> Any:
    a = F.relu(self.f(x))
    return a, x.shape, x.shape[0], a.dtype


@returns
def a_list_(self: Any, x: Tensor) -> Any:
    a = F.relu(self.f(x))
    return [a + i for i in range(3)]


@returns
def a_parameter(self: Any, x: Tensor) -> Any:
    return F.relu(self.f(x)), self.g.weight


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", OUTPUTS)
def test_every_output_is_made_of_what_the_original_s_is_made_of(name: str) -> None:
    check_capture(OUTPUTS[name])


@pytest.mark.parametrize(
    "name", ["a_named_tuple_", "a_typed_named_tuple", "a_dataclass_", "an_ordered_dict"]
)
def test_the_class_of_an_output_is_no_code_that_was_not_looked_into(name: str) -> None:
    gm = fg.transform(build(OUTPUTS[name]), RULE, strict=True)
    assert fg.report(gm).opaque == ()


def test_a_plain_trace_is_wrong_about_outputs() -> None:
    wrong = {name: what_plain_tracing_gets_wrong(make) for name, make in OUTPUTS.items()}
    assert wrong["a_dataclass_"] or wrong["an_ordered_dict"], wrong


@pytest.mark.parametrize("name", ["nested", "a_typed_named_tuple", "an_ordered_dict"])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_return_the_same_structures(name: str, way: Callable[[Any], Any]) -> None:
    gm = way(fg.transform(build(OUTPUTS[name]), NATIVE))
    assert difference(build(OUTPUTS[name]), gm) == ""


# --- a forward that is not written in the class ---


class Decorated(Net):
    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.g(x))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.f(x)) + self.features(y)


class Inherited(Decorated):
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return F.relu(super().forward(x, x if y is None else y))


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs) * 2

    return wrapped


class Wrapped(Net):
    @_twice
    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return F.relu(self.f(x if y is None else y))


@pytest.mark.parametrize(
    ("kind", "calls"),
    [(Decorated, (call(X, Y), call(X, y=X))), (Inherited, (call(X),)), (Wrapped, (call(X),))],
)
def test_decorated_and_inherited_forwards(kind: type[nn.Module], calls: tuple[Call, ...]) -> None:
    check_capture(kind, *calls)
