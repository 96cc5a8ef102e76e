"""Forward and backward of one activation: native, with each rule, and with the peers. Compare within a group."""

from __future__ import annotations

from typing import Any

import pytest

from . import _cases as cases
from . import _peers as peers

SIDES = {"1000x1000": 1000, "64x64": 64}

CANDIDATES = [
    (rule, candidate)
    for rule in cases.MEASURED
    for candidate in (*cases.operator_makers(rule), *peers.OPERATORS.get(rule, {}))
]


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize(("rule", "candidate"), dict.fromkeys(CANDIDATES), ids=lambda name: name)
def bench_operator(benchmark: Any, rule: str, candidate: str, size: str, quick: bool) -> None:
    """In eager mode."""
    if peers.peer_of(candidate) in peers.missing():
        pytest.skip(f"{peers.peer_of(candidate)} is not installed: pip install -e '.[peers]'")
    benchmark.group = f"{rule}, {size}"
    side = min(SIDES[size], 100) if quick else SIDES[size]
    module = cases.made(candidate, cases.operator_makers(rule)[candidate])
    benchmark(cases.operator_step(module, (side, side)))


@pytest.mark.parametrize("candidate", ["native relu", "native relu, compiled", "ours"])
@pytest.mark.parametrize("rule", cases.ELEMENTWISE)
@pytest.mark.usefixtures("compiler")
def bench_compiled_operator(benchmark: Any, rule: str, candidate: str, quick: bool) -> None:
    """With torch.compile; a quick run compiles one rule."""
    if quick and rule != "rectangular":
        pytest.skip("--quick compiles the operator under one rule alone")
    benchmark.group = f"{rule}, compiled"
    module = cases.compiled_operator(rule)[rule if candidate == "ours" else candidate]
    step = cases.operator_step(module, (100, 100) if quick else (1000, 1000))
    step()
    benchmark(step)


@pytest.mark.parametrize("candidate", ["native relu", "eager", "fuse"])
@pytest.mark.parametrize("rule", cases.FUSED)
@pytest.mark.usefixtures("compiler")
def bench_fused_operator(benchmark: Any, rule: str, candidate: str, quick: bool) -> None:
    """In eager mode, with the backward as one compiled kernel."""
    if quick and rule != "arctan":
        pytest.skip("--quick compiles the backward of one rule alone")
    benchmark.group = f"{rule}, fuse"
    name = {"native relu": candidate, "eager": rule, "fuse": f"{rule}, fuse"}[candidate]
    step = cases.operator_step(
        cases.fused_operator(rule)[name], (100, 100) if quick else (1000, 1000)
    )
    step()
    benchmark(step)
