"""``python -m benchmarks.compare``: compare this package, native PyTorch and the installed peers.

The candidates are measured in alternation, in one process. Prints the ratio of each candidate to native PyTorch and to
the candidates that its targets refer to, and whether the targets are met. Run it with nothing else running: on a busy
machine, the ratios have a larger spread.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

import freegrad_fx as fg

from . import _cases as cases
from . import _compiling as compiling
from . import _peers as peers
from ._measure import compare, machine
from ._tables import SECTIONS, Row, as_data, as_markdown, as_text, memory_rows, timed_rows


def measure(section: str, quick: bool, seconds: float) -> Iterator[list[Row]]:
    """The rows of a section, one group after the other."""

    def timed(
        group: str, steps: Mapping[str, Callable[[], Any]], notes: Mapping[str, str] | None = None
    ) -> list[Row]:
        least = 3 if quick else 15
        return timed_rows(section, group, compare(steps, seconds=seconds, least=least), notes)

    if section in ("operators", "small", "compiled", "fuse"):
        yield from operator_groups(section, quick, timed)
    elif section == "steps":
        for name in cases.MODELS:
            yield timed(name, cases.steps(name, quick))
    elif section == "compiled-steps":
        for name in list(cases.MODELS)[: 1 if quick else None]:
            yield timed(name, cases.compiled_steps(name, quick))
    elif section == "attribution":
        found = cases.attributions(quick)
        notes = cases.differences({name: make() for name, make in found.items()})
        yield timed("guided", found, notes)
    elif section == "transform":
        for name in cases.TRANSFORMED[: 1 if quick else None]:
            yield timed(name, cases.transform(name))
        yield timed(cases.CHAIN, cases.transform_chain(quick))
    elif section == "memory":
        yield memory_rows("one activation", cases.operator_memory())
        for name in cases.MEMORY_MODELS:
            yield memory_rows(f"a step of {name}", cases.step_memory(name, quick))
    elif section == "compile":
        for name in compiling.MODELS[: 1 if quick else None]:
            for state, times in compiling.compile_times(name, quick).items():
                yield timed_rows(section, f"{name}, {state}", times)


def operator_groups(
    section: str, quick: bool, timed: Callable[..., list[Row]]
) -> Iterator[list[Row]]:
    """One group for each rule. Before the timing, the gradients of the peers are compared with ours."""
    side = 64 if section == "small" else 250 if quick else 1000
    rules, make = {
        "operators": (cases.RULES, cases.operator),
        "small": (cases.RULES, cases.operator),
        "compiled": (cases.ELEMENTWISE, cases.compiled_operator),
        "fuse": (cases.FUSED, cases.fused_operator),
    }[section]
    if quick and section in ("compiled", "fuse"):
        rules = rules[:2]
    for rule in rules:
        torch._dynamo.reset()
        modules = make(rule)
        gradients = {
            name: cases.gradient(m) for name, m in modules.items() if section != "compiled"
        }
        notes = cases.differences(gradients) if gradients else {}
        steps = {name: cases.operator_step(m, (side, side)) for name, m in modules.items()}
        yield timed(rule, steps, notes)


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=4.0, help="about how long a group takes")
    parser.add_argument("--threads", type=int, default=1, help="that PyTorch may use")
    parser.add_argument("--quick", action="store_true", help="small inputs and few rounds")
    parser.add_argument("--out", type=Path, default=Path("out/compare.json"))
    parser.add_argument("--markdown", type=Path, help="where to write the tables of the docs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    # Captum warns at every attribution that it adds hooks to the model
    warnings.filterwarnings("ignore", "Setting backward hooks on ReLU activations")

    about = machine() | {"freegrad_fx": fg.__version__} | peers.versions()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if absent := peers.missing():
        print(
            f"Not installed, and so not measured: {', '.join(absent)}. pip install -e '.[bench,peers]'"
        )
    if options.quick:
        print("Quick: the inputs are smaller than those that the targets are for.")

    rows: list[Row] = []
    for section in SECTIONS:
        if section not in options.only:
            continue
        seconds = 0.2 if options.quick else options.seconds
        for found in measure(section, options.quick, seconds):
            print(f"\n{as_text(found)}", flush=True)
            rows += found
        results = {
            "machine": about,
            "missing": peers.missing(),
            "quick": options.quick,
            "rows": as_data(rows),
        }
        # after every section, so that a run that is stopped leaves its results
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False), "utf-8")
        if options.markdown:
            options.markdown.parent.mkdir(parents=True, exist_ok=True)
            options.markdown.write_text(as_markdown(rows, about), "utf-8")
    missed = [f"{row.section}: {row.group}: {row.name}" for row in rows if row.verdict == "missed"]
    print(f"\n{len(missed)} targets missed{':' if missed else '.'}", *missed, sep="\n  ")
    print(f"Written to {options.out}.")


if __name__ == "__main__":
    main()
