"""Measures times in alternation, the memory that a forward saves for its backward, and describes the machine.

A shared machine slows down for seconds at a time. Candidates that are measured in alternation are slowed down together,
so their ratios are more reliable than their times. This module does not depend on rules or models.
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
        """Summarise measurements. For a single one, all three values are equal."""
        values = [*values] if len(values) > 1 else [*values] * 2
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Comparison:
    """The time of each candidate in each round; the first candidate is the native one.

    Attributes:
        times: Seconds for each candidate, one number for each round.
    """

    times: Mapping[str, Sequence[float]]

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return len(next(iter(self.times.values())))

    def seconds(self, name: str) -> float:
        """The median time of one call."""
        return statistics.median(self.times[name])

    def ratio(self, name: str, over: str) -> Spread:
        """The ratio of the times of two candidates, computed for each round."""
        pairs = zip(self.times[name], self.times[over], strict=True)
        return Spread.of([mine / other for mine, other in pairs])


def compare(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 4.0,
    least: int = 15,
    most: int = 400,
    longest: float = 60.0,
    before: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time candidates in alternation: each once per round, in an order that changes from round to round.

    Args:
        candidates: The functions to call, by name.
        seconds: The approximate total time.
        least: The minimum number of rounds, if they take at most `longest` seconds.
        most: The maximum number of rounds.
        longest: How many seconds the minimum number of rounds may take. Three rounds are always measured.
        before: Called with the name of a candidate before it is timed, outside of the measured time.
        clock: The clock.
    """
    repeats, round_takes = {}, 0.0
    for name, call in candidates.items():
        before(name)
        call()  # compilation happens here
        call()
        start = clock()
        call()
        once = max(clock() - start, 1e-9)
        # a sample of a fast function consists of many calls
        repeats[name] = max(1, int(2e-3 / once))
        round_takes += once * repeats[name]
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(0).shuffle
    # Garbage is collected only between the rounds; frozen objects are excluded, because searching them takes long.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        least = min(least, max(3, int(longest / round_takes)))
        for _ in range(max(least, min(most, int(seconds / round_takes)))):
            shuffle(order)
            for name in order:
                call, repeat = candidates[name], repeats[name]
                before(name)
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
    """Count the bytes that a forward saves for its backward; a storage that is saved twice is counted once.

    Args:
        forward: The function to run. The graph of its result is kept alive during the count.
        known: Tensors that exist anyway, such as the input and the parameters. They are not counted.
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
    del result  # not earlier: a freed storage can be reused for another one
    return total


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of the packages."""
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
