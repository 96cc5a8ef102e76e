"""The time that torch.compile takes for a model, native and with rules, cold and warm.

The time that pytest-benchmark shows includes the start of the process. The compilation time is in `extra_info`.
"""

from __future__ import annotations

from typing import Any

import pytest

from . import _cases as cases
from . import _compiling as compiling


@pytest.mark.parametrize("rule", [cases.NATIVE, *compiling.RULES])
@pytest.mark.parametrize("name", compiling.MODELS)
@pytest.mark.usefixtures("compiler")
def bench_compile(benchmark: Any, name: str, rule: str, quick: bool) -> None:
    """Two processes that share their own caches: the second uses those of the first."""
    if quick and (name, rule) not in (("MLP 8×256", cases.NATIVE), ("MLP 8×256", "rectangular")):
        pytest.skip("--quick compiles the MLP under one rule alone")
    benchmark.group = f"compile {name}"
    cold, warm = benchmark.pedantic(compiling.cold_and_warm, args=(name, rule, quick), rounds=1)
    benchmark.extra_info.update(cold_seconds=cold, warm_seconds=warm)
