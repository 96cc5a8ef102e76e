"""Measures compilation times, in separate processes with their own caches.

``python -m benchmarks._compiling MODEL RULE`` is such a process; it prints seconds. They do not include the
one-time costs of a process, for imports and for probing the C++ compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

import freegrad_fx as fg

from . import _cases as cases
from ._measure import Comparison

ROOT = Path(__file__).resolve().parent.parent

MODELS = ("MLP 8×256", "resnet18")
RULES = ("rectangular",)


def measure(model: str, rule: str, quick: bool) -> float:
    """The time of the first training step of a compiled model, minus that of the second."""
    warm_up = torch.compile(lambda x: (x + 1).cos())
    warm_up(torch.ones(16, requires_grad=True)).sum().backward()
    case = cases.MODELS[model]
    torch.manual_seed(0)
    module = case.make(quick)
    if rule != cases.NATIVE:
        module = fg.transform(module, {case.op: cases.rule_of(rule)})
    step = cases.training_step(cases.compiled(module), case.input(quick))
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return taken[0] - taken[1]


def cold_and_warm(model: str, rule: str, quick: bool) -> tuple[float, float]:
    """The times in two processes; the second uses the caches that the first has filled."""
    with tempfile.TemporaryDirectory() as caches:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(Path(caches, "inductor")),
            "TRITON_CACHE_DIR": str(Path(caches, "triton")),
        }
        cold = _in_a_process(model, rule, quick, environment)
        return cold, _in_a_process(model, rule, quick, environment)


def _in_a_process(model: str, rule: str, quick: bool, environment: Mapping[str, str]) -> float:
    command = [sys.executable, "-m", "benchmarks._compiling", model, rule, *["--quick"] * quick]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def compile_times(model: str, quick: bool) -> dict[str, Comparison]:
    """Cold and warm times, native and with rules, measured in alternation."""
    rules = (cases.NATIVE, *RULES[: 1 if quick else None])
    cold: dict[str, list[float]] = {rule: [] for rule in rules}
    warm: dict[str, list[float]] = {rule: [] for rule in rules}
    for turn in range(1 if quick else 3):
        for rule in rules if turn % 2 == 0 else reversed(rules):
            first, second = cold_and_warm(model, rule, quick)
            cold[rule].append(first)
            warm[rule].append(second)
    return {"cold": Comparison(cold), "warm": Comparison(warm)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(measure(sys.argv[1], sys.argv[2], "--quick" in sys.argv))
