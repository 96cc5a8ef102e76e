"""`call_with`: a module that is called with other tensors for its parameters, whatever its attributes refer to."""

from __future__ import annotations

import collections
import enum
import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from freegrad_fx.ops.calls import _can_be_viewed, call_with


class Scaled(nn.Module):
    """Multiplies by its weight, which it gets from a function that an attribute holds."""

    def __init__(self, attribute: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.attribute = attribute(self)

    def forward(self, x: Tensor) -> Tensor:
        return x * find(self.attribute, self)


def find(value: Any, module: nn.Module) -> Tensor:
    if isinstance(value, collections.defaultdict):
        return value.default_factory(module)
    while isinstance(value, list | tuple | dict):
        value = next(iter(value))
    if isinstance(value, types.BuiltinFunctionType) and value.__name__ == "get":
        value = value(None)
    return value(module) if callable(value) else module.weight


@dataclass(eq=False)
class Helper:
    """Holds the module, as strategies and caches do."""

    owner: nn.Module

    def __call__(self, module: nn.Module) -> Tensor:
        return self.owner.weight


class Color(enum.Enum):
    RED = 1


def of_given(module: nn.Module) -> Tensor:
    return module.weight


def closure(owner: nn.Module) -> Callable[[nn.Module], Tensor]:
    return lambda _: owner.weight


def default(owner: nn.Module) -> Callable[..., Tensor]:
    def get(_: nn.Module, owner: nn.Module = owner) -> Tensor:
        return owner.weight

    return get


def keyword_default(owner: nn.Module) -> Callable[..., Tensor]:
    def get(_: nn.Module, *, owner: nn.Module = owner) -> Tensor:
        return owner.weight

    return get


def with_attribute(owner: nn.Module) -> Callable[..., Tensor]:
    def get(_: nn.Module) -> Tensor:
        return get_.owner.weight

    get_ = functools.wraps(of_given)(get)
    get_.owner = owner
    return get_


class Named(NamedTuple):
    helper: Helper


def of_itself(owner: nn.Module) -> Callable[..., Tensor]:
    def get(module: nn.Module) -> Tensor:
        return module.weight

    get.original = get
    return get


def list_of_itself(owner: nn.Module) -> list[Any]:
    found: list[Any] = [Helper(owner)]
    found.append(found)
    return found


REFERS = {
    "closure": closure,
    "default": default,
    "keyword default": keyword_default,
    "attribute of a function": with_attribute,
    "partial": lambda owner: functools.partial(lambda o, _: o.weight, owner),
    "method": lambda owner: Helper(owner).__call__,
    "object": Helper,
    "object in a list": lambda owner: [Helper(owner)],
    "object in a dict in a tuple": lambda owner: ({Helper(owner): 1},),
    "key of a dict": lambda owner: {Helper(owner): 1},
    "factory of a defaultdict": lambda owner: collections.defaultdict(Helper(owner).__call__),
    "method of a dict": lambda owner: {None: Helper(owner)}.get,
    "named tuple": lambda owner: Named(Helper(owner)),
    "function of itself": of_itself,
    "list of itself": list_of_itself,
    "a long list": lambda owner: [Helper(owner), *range(200)],
}
REFERS_TO_NOTHING = {
    "number": lambda _: 1.5,
    "text": lambda _: "mean",
    "enumeration": lambda _: Color.RED,
    "dtype": lambda _: torch.float32,
    "device": lambda _: torch.device("cpu"),
    "size": lambda _: torch.Size([2, 3]),
    "tensor": lambda _: torch.zeros(2),
    "nothing": lambda _: None,
    "function": lambda _: of_given,
    "built-in function": lambda _: (1.5, torch.relu, len),
    "nested": lambda _: {"a": [1, (2, "b")], "c": {3.0}},
}


@pytest.mark.parametrize("name", [*REFERS, *REFERS_TO_NOTHING])
def test_the_given_tensor_is_read_wherever_the_module_is_reached_from(name: str) -> None:
    module = Scaled({**REFERS, **REFERS_TO_NOTHING}[name])
    x, own = torch.arange(3.0), module.weight
    given = {"weight": module.weight.detach() * -2}
    actual = call_with(module, given, x)
    assert torch.equal(actual, functional_call(module, given, (x,)))
    assert torch.equal(actual, x * given["weight"])
    assert module.weight is own
    assert torch.equal(module(x), x * own)


@pytest.mark.parametrize("name", REFERS_TO_NOTHING)
def test_a_module_of_plain_attributes_is_called_through_a_view(name: str) -> None:
    """Which needs no lock: another thread may call the same module meanwhile."""
    assert _can_be_viewed(Scaled(REFERS_TO_NOTHING[name]), ["weight"])


@pytest.mark.parametrize("name", REFERS)
def test_a_module_that_is_referred_to_is_not_called_through_a_view(name: str) -> None:
    assert not _can_be_viewed(Scaled(REFERS[name]), ["weight"])


def test_what_a_view_assigns_is_assigned_to_the_module() -> None:
    class Counts(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x)

    module = Counts(lambda _: None)
    for count in (1, 2):
        call_with(module, {"weight": torch.ones(3)}, torch.ones(3))
        assert module.calls == count


def test_own_parameters_are_no_replacement() -> None:
    module = Scaled(lambda _: None)
    seen: list[nn.Module] = []
    module.register_forward_hook(lambda m, *_: seen.append(m))
    call_with(module, {"weight": module.weight}, torch.ones(3))
    assert seen == [module]
