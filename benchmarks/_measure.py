"""How things are measured: times in turns, the memory that a forward keeps for its backward, and on what machine.

A shared machine slows down for seconds at a time. Candidates that take turns are slowed down together, so their ratios
hold where their times do not. Knows nothing of rules or models.
"""

from __future__ import annotations

import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Comparison", "Spread", "compare", "machine", "saved_bytes"]


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise measurements; of a single one, all three are that."""
        values = [*values] if len(values) > 1 else [*values] * 2
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Comparison:
    """What each candidate took in each round; the first candidate is the native one.

    Attributes:
        times: Seconds by candidate, one number for each round.
    """

    times: Mapping[str, Sequence[float]]

    @property
    def rounds(self) -> int:
        """How often everything was measured."""
        return len(next(iter(self.times.values())))

    def seconds(self, name: str) -> float:
        """The median time of one call."""
        return statistics.median(self.times[name])

    def ratio(self, name: str, over: str) -> Spread:
        """How many times as long a candidate takes as another, both taken from the same round."""
        pairs = zip(self.times[name], self.times[over], strict=True)
        return Spread.of([mine / other for mine, other in pairs])


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 4.0,
    least: int = 15,
    most: int = 400,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time candidates in turns: each once per round, in an order that changes from round to round.

    Args:
        candidates: What to call, by name.
        seconds: About how long to measure in all.
        least: The least number of rounds.
        most: The greatest number of rounds.
        clock: What tells the time.
    """
    repeats, round_takes = {}, 0.0
    for name, call in candidates.items():
        call()  # what is compiled is compiled here
        call()
        start = clock()
        call()
        once = max(clock() - start, 1e-9)
        # one sample of a fast call is many of them
        repeats[name] = max(1, int(2e-3 / once))
        round_takes += once * repeats[name]
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(0).shuffle
    # Rubbish is collected between the rounds only; what is frozen is not searched for it, which would take long.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for _ in range(max(least, min(most, int(seconds / round_takes)))):
            shuffle(order)
            for name in order:
                call, repeat = candidates[name], repeats[name]
                start = clock()
                for _ in range(repeat):
                    call()
                times[name].append((clock() - start) / repeat)
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return Comparison(times)


def saved_bytes(forward: Callable[[], Any], known: Iterable[Tensor] = ()) -> int:
    """Count the bytes that a forward saves for its backward; a storage that is saved twice counts once.

    Args:
        forward: What to run. The graph of what it returns is kept while it is counted.
        known: Tensors that are there anyway, such as the input and the parameters: they cost nothing.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in known}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result  # not earlier: a storage that is freed may come back as another one
    return total


def machine() -> dict[str, Any]:
    """Describe what the measurements are made on."""
    info = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (info.read_text("utf-8").splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
