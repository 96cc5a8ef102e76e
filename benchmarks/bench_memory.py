"""The bytes that are saved for the backward, in `extra_info`. The time that is shown has no meaning."""

from __future__ import annotations

from typing import Any

import pytest

from . import _cases as cases


def bench_operators(benchmark: Any) -> None:
    """One activation with each rule, and with each peer."""
    benchmark.group = "memory"
    found = benchmark.pedantic(lambda: dict(cases.operator_memory()), rounds=1)
    benchmark.extra_info["bytes_per_element"] = found


@pytest.mark.parametrize("name", cases.MEMORY_MODELS)
def bench_step(benchmark: Any, name: str, quick: bool) -> None:
    """A training step of a whole model."""
    benchmark.group = "memory"
    found = benchmark.pedantic(lambda: dict(cases.step_memory(name, quick)), rounds=1)
    benchmark.extra_info["bytes_per_element"] = found
