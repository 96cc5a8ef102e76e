"""Replacements of attributes: for a time, for one thread, in any order, and never left behind."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import freegrad_fx as fg
from freegrad_fx._torch.replacing import all_replaced, replaced, replacements


class Owner:
    """A stand-in for a class of PyTorch."""

    def method(self, x: int) -> int:
        """Add one."""
        return x + 1

    @staticmethod
    def static(x: int) -> int:
        return x + 1

    @classmethod
    def of_class(cls, x: int) -> tuple[type, int]:
        return cls, x


class Derived(Owner):
    pass


def times_ten(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: original(*args) * 10


def in_another_thread(function: Callable[[], Any]) -> Any:
    """What a function returns or raises in another thread."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result()


def temporary() -> list[tuple[Any, str]]:
    return [(r.owner, r.name) for r in replacements() if r.thread is not None]


def test_a_method_is_replaced_and_restored() -> None:
    before = vars(Owner)["method"]
    with replaced(Owner, "method", times_ten):
        assert Owner().method(1) == 20
        assert Derived().method(1) == 20
        assert Owner.method.__doc__ == "Add one."
    assert vars(Owner)["method"] is before
    assert Owner().method(1) == 2


def test_a_static_method_stays_one() -> None:
    with replaced(Owner, "static", times_ten):
        assert Owner.static(1) == Owner().static(1) == 20
    assert isinstance(vars(Owner)["static"], staticmethod)


def test_a_class_method_is_given_its_class() -> None:
    with replaced(Owner, "of_class", lambda original: lambda x: original(x * 10)):
        assert Owner.of_class(1) == (Owner, 10)
    assert isinstance(vars(Owner)["of_class"], classmethod)


def test_what_a_class_inherits_is_replaced_for_it_alone() -> None:
    with replaced(Derived, "static", times_ten):
        assert (Owner.static(1), Derived.static(1)) == (2, 20)
    assert "static" not in vars(Derived)


def test_a_function_of_a_module_is_replaced() -> None:
    module = types.ModuleType("module")
    module.function = len  # type: ignore[attr-defined]
    with replaced(module, "function", times_ten):
        assert module.function("ab") == 20
    assert module.function is len


def test_an_attribute_of_instances_is_replaced_by_a_property() -> None:
    model = nn.Linear(1, 1)
    with replaced(nn.Module, "training", lambda _: property(lambda module: "asked")):
        assert model.training == "asked"
        assert in_another_thread(lambda: model.training) is True
        model.eval()  # written as ever
        with pytest.raises(AttributeError, match="training"):
            in_another_thread(lambda: object.__new__(nn.Linear).training)
    assert model.training is False
    assert "training" not in vars(nn.Module)


def test_other_threads_find_what_was_there_before() -> None:
    with replaced(Owner, "method", times_ten):
        assert in_another_thread(lambda: Owner().method(1)) == 2


def test_each_thread_has_its_own_replacement() -> None:
    def inside() -> int:
        with replaced(Owner, "method", lambda original: lambda *args: original(*args) + 100):
            return Owner().method(1)

    with replaced(Owner, "method", times_ten):
        assert in_another_thread(inside) == 102
        assert Owner().method(1) == 20


def test_replacements_nest() -> None:
    with replaced(Owner, "method", times_ten):
        with replaced(Owner, "method", lambda original: lambda *args: original(*args) + 1):
            assert Owner().method(1) == 21
        assert Owner().method(1) == 20
    assert Owner().method(1) == 2


def plus_one(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: original(*args) + 1


def test_the_innermost_of_several_is_what_a_further_one_is_given() -> None:
    with replaced(Owner, "method", times_ten), replaced(Owner, "method", plus_one):
        with replaced(Owner, "method", times_ten):
            assert Owner().method(1) == 210
        assert Owner().method(1) == 21


def test_the_innermost_of_a_thread_is_in_force_while_another_thread_has_one_of_its_own() -> None:
    def here_and_there() -> tuple[int, int]:
        with replaced(Owner, "method", times_ten):
            return Owner().method(1), threads.submit(Owner().method, 1).result()

    with ThreadPoolExecutor(1) as threads, ExitStack() as stack:
        for make in (times_ten, plus_one):
            threads.submit(stack.enter_context, replaced(Owner, "method", make)).result()
        assert here_and_there() == (20, 21)
        threads.submit(stack.close).result()
    assert Owner().method(1) == 2


def test_they_may_end_in_any_order() -> None:
    before = vars(Owner)["method"]
    first, second = ExitStack(), ExitStack()
    first.enter_context(replaced(Owner, "method", times_ten))
    second.enter_context(replaced(Owner, "method", lambda _: lambda self, x: -x))
    first.close()
    assert Owner().method(1) == -1
    second.close()
    assert vars(Owner)["method"] is before


def test_threads_may_end_in_any_order() -> None:
    before = vars(Owner)["method"]
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with replaced(Owner, "method", lambda _: lambda self, x: -x):
            entered.set()
            leave.wait(10)

    with replaced(Owner, "method", times_ten):
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(10)
    assert Owner().method(1) == 2  # while the other thread's is in force
    leave.set()
    thread.join()
    assert vars(Owner)["method"] is before


def test_a_thread_finds_its_own_while_others_come_and_go() -> None:
    over = threading.Event()

    def others() -> None:
        while not over.is_set():
            with replaced(Owner, "method", lambda _: lambda self, x: -x):
                pass

    with ThreadPoolExecutor(3) as threads, replaced(Owner, "method", times_ten):
        found = [threads.submit(others) for _ in range(3)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            assert {Owner().method(1) for _ in range(20_000)} == {20}
        finally:
            sys.setswitchinterval(interval)
            over.set()
    assert [one.result() for one in found] == [None] * 3


def for_this_thread(change: int) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A replacement that itself hands on what other threads call."""

    def make(before: Callable[..., int]) -> Callable[..., int]:
        thread = threading.get_ident()

        def method(self: Owner, x: int) -> int:
            return before(self, x) + (change if threading.get_ident() == thread else 0)

        return method

    return make


def test_a_replacement_may_ask_for_the_thread_itself() -> None:
    before = vars(Owner)["method"]

    def inside() -> int:
        with replaced(Owner, "method", for_this_thread(1000), asks_for_thread=True):
            return Owner().method(1)

    first, second = ExitStack(), ExitStack()
    first.enter_context(replaced(Owner, "method", for_this_thread(10), asks_for_thread=True))
    assert in_another_thread(lambda: Owner().method(1)) == 2
    assert in_another_thread(inside) == 1002
    second.enter_context(replaced(Owner, "method", for_this_thread(100), asks_for_thread=True))
    assert Owner().method(1) == 112
    assert temporary() == [(Owner, "method")] * 2
    second.close()
    assert Owner().method(1) == 12
    first.close()
    assert vars(Owner)["method"] is before


def test_an_error_undoes_it() -> None:
    before = vars(Owner)["method"]
    with pytest.raises(ZeroDivisionError), replaced(Owner, "method", times_ten):
        _ = 1 / 0
    assert vars(Owner)["method"] is before


def test_an_error_while_it_is_made_replaces_nothing() -> None:
    def fails(_: Any) -> Any:
        raise ZeroDivisionError

    before = vars(Owner)["method"]
    with pytest.raises(ZeroDivisionError), replaced(Owner, "method", fails):
        pass
    with pytest.raises(TypeError), replaced(int, "bit_length", times_ten):
        pass
    assert vars(Owner)["method"] is before
    assert temporary() == []


def test_what_is_replaced_can_be_listed() -> None:
    assert temporary() == []
    with replaced(Owner, "method", times_ten), replaced(Owner, "static", times_ten):
        assert temporary() == [(Owner, "method"), (Owner, "static")]
    assert temporary() == []


# --- the traces of the package ---


class Lists(nn.Module):
    """Notes what is replaced while it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        SEEN.append(temporary())
        return self.act(x)


SEEN: list[list[tuple[Any, str]]] = []


@contextmanager
def snapshot() -> Iterator[None]:
    """What a trace replaces is afterwards what it was."""
    owners = (torch, nn.Module, torch.autocast, torch.inference_mode, fg.use.__mro__[1])
    owners += (torch.utils.checkpoint.CheckpointFunction,)
    before = [dict(vars(owner)) for owner in owners]
    yield
    for owner, was in zip(owners, before, strict=True):
        now = dict(vars(owner))
        assert {k for k in was.keys() | now.keys() if was.get(k) is not now.get(k)} == set()


@pytest.mark.parametrize("example", [None, (torch.ones(2, 3),)], ids=["symbolic", "export"])
def test_a_trace_lists_what_it_replaces_and_leaves_nothing(example: Any) -> None:
    with fg.native():  # what is for good is so now
        pass
    SEEN.clear()
    with snapshot():
        fg.transform(Lists(), "straight_through", example_inputs=example)
    names = {name for seen in SEEN for _, name in seen}
    assert {"is_grad_enabled", "__enter__", "forward", "training"} <= names
    assert temporary() == []


def test_a_trace_that_fails_leaves_nothing() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no")

    with snapshot():
        with pytest.raises(fg.CaptureError):
            fg.transform(Fails(), "straight_through")
        with pytest.raises(fg.CaptureError):
            fg.transform(Fails(), "straight_through", example_inputs=(torch.ones(2),))
    assert temporary() == []


# --- many at once ---


def test_many_attributes_are_replaced_and_restored() -> None:
    before = dict(vars(Owner))
    with all_replaced((Owner, name, times_ten) for name in ("method", "static")):
        assert (Owner().method(1), Owner.static(1)) == (20, 20)
        assert in_another_thread(lambda: (Owner().method(1), Owner.static(1))) == (2, 2)
        with replaced(Owner, "static", times_ten):
            assert Owner.static(1) == 200
        assert Owner.static(1) == 20
    assert dict(vars(Owner)) == before
    assert not temporary()


def test_what_was_replaced_before_an_error_is_restored() -> None:
    before = dict(vars(Owner))

    def fails(original: Any) -> Any:
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        all_replaced([(Owner, "method", times_ten), (Owner, "static", fails)]),
    ):
        raise AssertionError("the block is not entered")
    assert dict(vars(Owner)) == before
    assert not temporary()
