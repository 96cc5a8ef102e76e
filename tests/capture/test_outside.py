"""What a forward stores outside of its model is as before after a capture, and no graph loses it silently.

The original, called before and after the capture, is the oracle.
"""

from __future__ import annotations

import functools
import gc
import threading
import time
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.proxy import Attribute, Proxy

import freegrad_fx as fg
from side_by_side import RULE, THRICE, Net, build, captured_or_refused, check_capture, sample
from sweep import NATIVE


@functools.lru_cache
def mask(n: int, device: Any) -> Tensor:
    return torch.ones(n, device=device)


@functools.cache
def doubled(n: int) -> Tensor:
    return mask(n, "cpu") * 2


elsewhere = types.ModuleType("elsewhere")
elsewhere.mask = mask  # type: ignore[attr-defined]
REMEMBERED: dict[str, Any] = {}
CALLS: list[Any] = []
LAST: Any = None


class Helper:
    last: Any = None


HELPER = Helper()


# --- caches: recomputed at each call ---


class Cached(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) + mask(6, x.device) + mask(x.shape[1], x.device)


class CachedTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x) + doubled(6)) * doubled(6)


class CachedInBothModes(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.f(x)) if self.training else torch.tanh(self.g(x))
        return y + mask(6, x.device)


class CachedInAModule(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) + elsewhere.mask(6, x.device)


class CachedMethod(Net):
    @functools.lru_cache  # noqa: B019
    def offsets(self, n: int) -> Tensor:
        return torch.ones(n)

    @staticmethod
    @functools.cache
    def more(n: int) -> Tensor:
        return torch.ones(n)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) + self.offsets(6) + self.more(6)


class CachedInAList(Net):
    def make(self) -> None:
        self.functions = [mask]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) + self.functions[0](6, x.device)


CACHED = [Cached, CachedTwice, CachedInBothModes, CachedInAModule, CachedMethod, CachedInAList]


@pytest.fixture(autouse=True)
def _nothing_stored() -> Iterator[None]:
    yield
    for cache in (mask, doubled, CachedMethod.offsets, CachedMethod.more):
        cache.cache_clear()
    for stored in (REMEMBERED, CALLS, StoresInADefault.forward.__defaults__[0]):
        stored.clear()
    globals()["LAST"] = HELPER.last = StoresOnItsClass.last = None
    vars(StoresOnAFunction.forward).clear()
    for cell in StoresInAClosure.forward.__closure__:
        cell.cell_contents = None if isinstance(cell.cell_contents, Tensor) else cell.cell_contents


@pytest.mark.parametrize("kind", CACHED)
def test_a_function_with_a_cache_is_recorded_and_its_cache_is_the_user_s(kind: type[Net]) -> None:
    check_capture(kind, *THRICE)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", [k for k in CACHED if k is not CachedInAList])
def test_an_export_leaves_caches_alone(kind: type[Net]) -> None:
    gm = fg.transform(build(kind), NATIVE, example_inputs=(sample(),))
    assert torch.equal(gm(sample(3)), build(kind)(sample(3)))


@pytest.mark.parametrize("way", [{}, {"example_inputs": (sample(),)}])
def test_what_a_cache_held_before_is_there_and_no_constant(way: dict[str, Any]) -> None:
    held = mask(6, sample().device)
    gm = fg.transform(build(Cached), NATIVE, **way)
    assert mask(6, sample().device) is held
    with torch.no_grad():
        held.add_(1)
    mask.cache_clear()
    assert torch.equal(gm(sample()), build(Cached)(sample()))


def test_a_cache_can_be_used_in_another_thread_during_a_capture() -> None:
    stop, seen = threading.Event(), set()

    def call() -> None:
        while not stop.is_set():
            seen.add(type(mask(6, sample().device)))
            time.sleep(0)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        for _ in range(20):
            fg.transform(build(Cached), NATIVE)
    finally:
        stop.set()
        thread.join()
    assert seen == {Tensor}


# --- all else: refused, and as before ---


class StoresInADict(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x))
        if "h" not in REMEMBERED:
            REMEMBERED["h"] = h.detach()
        return h + REMEMBERED["h"]


class StoresInAList(Net):
    def forward(self, x: Tensor) -> Tensor:
        CALLS.append([F.relu(self.f(x)).detach()])
        return self.g(CALLS[0][0])


class StoresInAGlobal(Net):
    def forward(self, x: Tensor) -> Tensor:
        global LAST
        h = F.relu(self.f(x))
        LAST = h.detach() if LAST is None else LAST
        return h + LAST


class StoresOnItsClass(Net):
    last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.f(x))
        if type(self).last is None:
            type(self).last = h.detach()
        return h + type(self).last


class StoresOnAFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        StoresOnAFunction.forward.last = F.relu(self.f(x))  # type: ignore[attr-defined]
        return self.g(StoresOnAFunction.forward.last)  # type: ignore[attr-defined]


class StoresInADefault(Net):
    def forward(self, x: Tensor, kept: list[Tensor] = []) -> Tensor:  # noqa: B006
        kept.append(F.relu(self.f(x)).detach())
        return self.g(kept[0])


class StoresOnAHelper(Net):
    def forward(self, x: Tensor) -> Tensor:
        if HELPER.last is None:
            HELPER.last = F.relu(self.f(x)).detach()
        return F.relu(self.f(x)) + HELPER.last


def closure() -> type[Net]:
    first: Tensor | None = None

    class Stores(Net):
        def forward(self, x: Tensor) -> Tensor:
            nonlocal first
            h = F.relu(self.f(x))
            first = h.detach() if first is None else first
            return h + first

    return Stores


StoresInAClosure = closure()


class StoresWhereNothingLeads(Net):
    """What `make` stores is found by the proxies that are alive."""

    def make(self) -> None:
        kept: list[Tensor] = []

        class Keeper:
            __slots__ = ()

            def __call__(self, x: Tensor) -> Tensor:
                kept.append(x.detach())
                return kept[0]

            def __deepcopy__(self, memo: Any) -> Any:
                return self

        self.keeper = Keeper()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) + self.keeper(x)


STORES = [
    StoresInADict, StoresInAList, StoresInAGlobal, StoresOnItsClass, StoresOnAFunction, StoresInADefault,
    StoresOnAHelper, StoresInAClosure, StoresWhereNothingLeads,
]  # fmt: skip


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Whether no proxy is alive that was made in the test."""
    made: list[weakref.ref[Any]] = []

    def noted(init: Callable[..., None]) -> Callable[..., None]:
        def note(proxy: Any, *args: Any, **kwargs: Any) -> None:
            made.append(weakref.ref(proxy))
            init(proxy, *args, **kwargs)

        return note

    for kind in (Proxy, Attribute):
        monkeypatch.setattr(kind, "__init__", noted(kind.__init__))

    def all_gone() -> bool:
        assert made
        for generation in range(3):
            if any(proxy() is not None for proxy in made):
                gc.collect(generation)
        return all(proxy() is None for proxy in made)

    return all_gone


@pytest.mark.sampled(20)
@pytest.mark.parametrize("kind", STORES)
def test_a_tensor_stored_outside_is_refused_and_the_original_is_as_before(
    no_proxies: Callable[[], bool], kind: type[Net]
) -> None:
    model = build(kind)
    gm, refusal = captured_or_refused(model)
    assert gm is None
    assert "freegrad_fx.compile(model, rules)" in refusal
    assert "stores a tensor in" in refusal
    assert no_proxies()
    first = model(sample())
    assert type(first) is Tensor
    captured_or_refused(model)  # what is stored by now stays
    assert torch.equal(model(sample()), first)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", [k for k in STORES if k is not StoresWhereNothingLeads])
def test_an_export_leaves_no_fake_tensor(kind: type[Net]) -> None:
    model = build(kind)
    gm, refusal = captured_or_refused(model, example_inputs=(sample(),))
    assert gm is None
    assert refusal
    assert type(model(sample())) is Tensor


class Untraceable(Net):
    def forward(self, x: Tensor) -> Tensor:
        REMEMBERED["x"] = x
        y = F.relu(self.f(x)) + mask(6, x.device)
        return y if y.sum() > -1e9 else x


def test_a_refused_capture_leaves_nothing(no_proxies: Callable[[], bool]) -> None:
    with pytest.raises(fg.CaptureError, match="control flow") as caught:
        fg.transform(build(Untraceable), RULE)
    assert not REMEMBERED
    assert no_proxies()
    assert caught.value.__cause__ is not None
    assert type(mask(6, sample().device)) is Tensor


@pytest.mark.parametrize("kind", [Untraceable, StoresInADict, StoresOnAHelper])
def test_a_part_that_stores_a_tensor_outside_is_kept_whole(
    no_proxies: Callable[[], bool], kind: type[Net]
) -> None:
    class Outside(Net):
        def make(self) -> None:
            self.part = kind()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.g(self.part(F.relu(x))))

    model = build(Outside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fg.FreegradWarning)
        gm = fg.transform(model, NATIVE)
    assert [o.path for o in fg.report(gm).opaque] == ["part"]
    assert no_proxies()
    assert torch.equal(gm(sample()), model(sample()))


# --- other packages than the model's ---

KEEPS_STATE = """
import torch

COUNT, TABLE, SEEN = 0, {"calls": 0}, []


class Counter:
    calls = 0


def make():
    calls = 0

    def count():
        nonlocal calls
        calls += 1

    return count


in_a_closure = make()


def in_a_global(x):
    global COUNT
    COUNT += 1
    return torch.relu(x)


def in_a_dict(x):
    TABLE["calls"] += 1
    return torch.relu(x)


def in_a_list(x):
    SEEN.append(1)
    return torch.relu(x)


def in_a_class(x):
    Counter.calls += 1
    return torch.relu(x)


def in_a_variable(x):
    in_a_closure()
    return torch.relu(x)


def on_a_function(x):
    on_a_function.calls = getattr(on_a_function, "calls", 0) + 1
    return torch.relu(x)
"""
STATES = ("in_a_global", "in_a_dict", "in_a_list", "in_a_class", "in_a_variable", "on_a_function")
CALLS_A_HELPER = """
from torch import nn

class Model(nn.Module):
    def forward(self, x):
        return helper(x) * 2
"""


def in_packages(state: str, package: str) -> tuple[torch.nn.Module, types.ModuleType]:
    """A model of the package `models`, whose forward calls a function that counts its calls, and its module."""
    other, own = types.ModuleType(f"{package}.helpers"), types.ModuleType("models.own")
    exec(compile(KEEPS_STATE, f"/{package}/helpers.py", "exec"), vars(other))
    own.helper = getattr(other, state)  # type: ignore[attr-defined]
    exec(compile(CALLS_A_HELPER, "/models/own.py", "exec"), vars(own))
    return own.Model(), other


def counted(helpers: Any) -> list[Any]:
    variable = helpers.in_a_closure.__closure__[0].cell_contents
    numbers = [helpers.COUNT, helpers.TABLE["calls"], helpers.Counter.calls, variable]
    return [*numbers, list(helpers.SEEN), dict(vars(helpers.on_a_function))]


@pytest.mark.parametrize("state", STATES)
def test_what_another_package_counts_is_no_state_of_the_model(state: str) -> None:
    model, _ = in_packages(state, "profilers")
    gm = fg.transform(model, {"relu": fg.rules.scale(s=3.0)})
    x = sample().requires_grad_()
    assert torch.equal(gm(x), model(x))
    assert torch.autograd.grad(gm(x).sum(), x)[0].eq(6).all()


@pytest.mark.parametrize("state", STATES)
def test_what_the_model_s_own_package_counts_is_refused_and_restored(state: str) -> None:
    model, helpers = in_packages(state, "models")
    before = counted(helpers)
    with pytest.raises(fg.CaptureError, match=r"changes .*freegrad_fx\.compile"):
        fg.transform(model, {"relu": "scale"})
    assert counted(helpers) == before
    model(sample())
    assert counted(helpers) != before


# --- mappings that compute their entries ---


class Lazy(OrderedDict[str, Any]):
    """Imports an entry when it is asked for it, as those of Hugging Face's transformers."""

    def __iter__(self) -> Any:
        raise AssertionError("a capture asks for the names of all entries")

    def values(self) -> Any:
        raise AssertionError("a capture asks for all entries")

    keys = items = values


LAZY = Lazy()
OrderedDict.__setitem__(LAZY, "slope", 2.0)


class Looks(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * LAZY.get("slope")


@pytest.mark.parametrize("way", [{}, {"example_inputs": (sample(),)}], ids=["symbolic", "export"])
def test_a_mapping_that_computes_its_entries_is_not_asked_for_them(way: dict[str, Any]) -> None:
    check_capture(Looks, **way)
