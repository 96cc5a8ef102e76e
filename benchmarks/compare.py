"""``python -m benchmarks.compare``: us, native PyTorch and the installed peers, in turn, in one process.

Prints the ratio of each to the first of its group, with the quartiles, and writes everything as JSON. Run it with
nothing else running.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # for torchvision

from . import _cases as cases
from ._measure import Comparison, compare, machine

SECTIONS = (
    "operators",
    "small",
    "compiled",
    "steps",
    "compiled-steps",
    "transform",
    "memory",
    "compile",
)


def sections(chosen: list[str], seconds: float, quick: bool) -> Iterator[tuple[str, Any]]:
    """Measure one group after the other."""

    def timed(section: str, groups: Iterator[Any], least: int = 15) -> Iterator[tuple[str, Any]]:
        for title, steps in groups:
            yield section, compare(f"{section}: {title}", steps, seconds=seconds, least=least)

    side = 250 if quick else 1000
    if "operators" in chosen:
        yield from timed("operators", cases.operators((side, side)))
    if "small" in chosen:
        yield from timed("small", cases.operators((64, 64)))
    if "compiled" in chosen:
        yield from timed("compiled", cases.compiled_operators((side, side)))
    if "steps" in chosen:
        yield from timed("steps", cases.steps(quick, compiled=False))
    if "compiled-steps" in chosen:
        yield from timed("compiled-steps", cases.steps(quick, compiled=True))
    if "transform" in chosen:
        yield from timed("transform", cases.transforms(), least=7)
    if "memory" in chosen:
        yield "memory", dict(cases.memory())
    if "compile" in chosen:
        yield "compile", compile_times(quick)


def compile_times(quick: bool) -> dict[str, Any]:
    """Cold compile times, in seconds, native and with a rule, in turn."""
    found = {}
    for name in ("MLP 8×256", "resnet18"):
        make, shape, op = cases.models(quick)[name]
        native, ruled = [], []
        for _ in range(1 if quick else 3):
            native.append(cases.compile_seconds(make(), shape))
            ruled.append(
                cases.compile_seconds(cases.fg.transform(make(), {op: "rectangular"}), shape)
            )
        a, b = statistics.median(native), statistics.median(ruled)
        found[name] = {"native": a, "rectangular": b, "ratio": b / a}
    return found


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long a group takes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="small inputs and few rounds")
    parser.add_argument("--out", type=Path, default=Path("out/compare.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # a cache would hide what compiling costs
    os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    on = machine()
    print(", ".join(f"{key}: {value}" for key, value in on.items()))
    if absent := cases.missing():
        print(f"Not installed, and so not measured: {', '.join(absent)}. pip install -e '.[peers]'")
    results: list[dict[str, Any]] = []
    for section, found in sections(
        options.only, 0.5 if options.quick else options.seconds, options.quick
    ):
        if isinstance(found, Comparison):
            print(f"\n{found}", flush=True)
            results.append({"section": section, **dataclasses.asdict(found)})
        else:
            print(f"\n{section}")
            for name, value in found.items():
                print(
                    f"  {name}: {value if isinstance(value, dict) else f'{value:.2f}'}", flush=True
                )
            results.append({"section": section, "values": found})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"machine": on, "missing": cases.missing(), "results": results}, indent=1)
    )
    print(f"\nWritten to {options.out}.")


if __name__ == "__main__":
    main()
