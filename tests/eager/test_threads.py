"""Threads that are started in a block: they have no rules, and say so where the block would give some."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg

THREE = fg.rules.scale(s=3.0)


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(4, 4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x)) + Step.apply(x)


torch.manual_seed(0)
NET, X = Net(), torch.randn(3, 4, requires_grad=True)


def gradient(model: nn.Module = NET) -> Tensor:
    (found,) = torch.autograd.grad(model(X).sum(), X)
    return found


NATIVE = gradient()


def in_a_thread(run: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    return results[0]


def replica() -> nn.Module:
    """What `torch.nn.parallel.replicate` makes for one device."""
    new: Any = NET._replicate_for_data_parallel()
    for name, child in NET.named_children():
        new._modules[name] = child._replicate_for_data_parallel()
        for parameter, tensor in child.named_parameters():
            setattr(new._modules[name], parameter, tensor * 1)
    return new  # type: ignore[no-any-return]


IN_THREE = fg.transform(NET, {"relu": THREE})
AMBIENT = fg.transform(NET)


@pytest.mark.parametrize(
    ("rules", "options", "model"),
    [
        (THREE, {}, NET),
        ({"relu": "reverse"}, {"model": NET}, replica()),
        ({nn.ReLU: THREE}, {}, NET),
        ({Step: THREE}, {}, NET),
        ({"params": THREE}, {"model": NET}, NET),
        (THREE, {}, AMBIENT),
    ],
    ids=["one rule", "replica", "class", "Function", "parameters", "ambient"],
)
def test_a_thread_without_the_rules_of_the_block_says_so_once(
    rules: Any, options: dict[str, Any], model: nn.Module
) -> None:
    block = fg.use(rules, **options)
    with warnings.catch_warnings(record=True) as found, block:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(in_a_thread(lambda: gradient(model)), NATIVE)
        gradient()
    assert len([w for w in found if "acts only in the thread" in str(w.message)]) == 1


def test_a_thread_is_silent_where_the_block_has_no_meaning() -> None:
    def without_gradients() -> Tensor:
        with torch.no_grad():
            return NET(X)

    def in_its_own_block() -> Tensor:
        with fg.use("reverse"):
            return gradient()

    def native() -> Tensor:
        with fg.native():
            return gradient()

    with fg.use(THREE):
        for run in (without_gradients, in_its_own_block, native, lambda: gradient(IN_THREE)):
            in_a_thread(run)
    with fg.use({"relu": THREE}, model=NET):
        NET(X)
        in_a_thread(lambda: gradient(nn.Sequential(nn.ReLU())))


def test_a_pool_that_outlives_the_block_is_silent_afterwards() -> None:
    with ThreadPoolExecutor(1) as pool:
        with fg.use(THREE):
            pool.submit(torch.ones, 1).result()
        assert torch.equal(pool.submit(gradient).result(), NATIVE)


def test_a_thread_of_an_asynchronous_task_is_refused() -> None:
    async def run() -> None:
        with fg.use(THREE):
            await asyncio.to_thread(gradient)

    with pytest.raises(RuntimeError, match="applies to one thread"):
        asyncio.run(run())
