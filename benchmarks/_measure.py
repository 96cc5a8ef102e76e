"""Interleaved measurements: every candidate once per round, the order changed from round to round, medians of ratios.

A shared machine slows down for seconds at a time. Candidates that take turns are slowed down together, so their ratios
hold where their times do not.
"""

from __future__ import annotations

import gc
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Comparison", "Row", "compare", "machine"]


@dataclass(frozen=True)
class Row:
    """One candidate.

    Attributes:
        name: What it is.
        seconds: The median time of a call.
        ratio: The median, over rounds, of its time over that of the baseline in the same round.
        low: The ratio's first quartile.
        high: The ratio's third quartile.
    """

    name: str
    seconds: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Candidates on one input, the baseline first.

    Attributes:
        title: What was measured.
        rows: The candidates.
        rounds: How many rounds there were.
    """

    title: str
    rows: tuple[Row, ...]
    rounds: int

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"  {row.name.ljust(width)}  {1e3 * row.seconds:10.3f} ms  {row.ratio:6.2f}  "
            f"[{row.low:.2f}, {row.high:.2f}]"
            for row in self.rows
        ]
        return "\n".join([f"{self.title} ({self.rounds} rounds)", *lines])


def compare(
    title: str,
    candidates: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 4.0,
    least: int = 15,
) -> Comparison:
    """Time candidates in turn.

    Args:
        title: What is measured.
        candidates: What to call, by name; the first is the baseline.
        seconds: About how long to measure in all.
        least: The least number of rounds.
    """
    once = {}
    for name, call in candidates.items():
        call()
        call()  # the first call may compile
        start = time.perf_counter()
        call()
        once[name] = time.perf_counter() - start
    # a sample of a fast call is many of them
    repeats = {name: max(1, int(2e-3 / t)) for name, t in once.items()}
    round_takes = sum(once[name] * repeats[name] for name in candidates)
    rounds = max(least, min(400, int(seconds / round_takes)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                call, repeat = candidates[name], repeats[name]
                start = time.perf_counter()
                for _ in range(repeat):
                    call()
                times[name].append((time.perf_counter() - start) / repeat)
    finally:
        gc.enable()
    base = times[next(iter(candidates))]
    rows = []
    for name, taken in times.items():
        ratios = [t / b for t, b in zip(taken, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(Row(name, statistics.median(taken), middle, low, high))
    return Comparison(title, tuple(rows), rounds)


def machine() -> dict[str, Any]:
    """What the measurements were made on."""
    info = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
