"""``python -m benchmarks.compare``: compare this package, native PyTorch and the installed peers.

The candidates of a group are measured in alternation, in one process. Prints the ratio of each candidate to native
PyTorch and to the candidates that its targets refer to, and whether the targets are met. Run it with nothing else
running: on a busy machine, the ratios have a larger spread.

All sections take about an hour. A run of some of them (--only, --groups) keeps the other results of the file, so that
all of it can be measured in parts, also on several machines. --docs writes the results into the documentation.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

import freegrad_fx as fg
from freegrad_fx.extension import library

from . import _cases as cases
from . import _compiling as compiling
from . import _networks as networks
from . import _pages as pages
from . import _peers as peers
from . import memory
from ._measure import compare, machine
from ._results import Results
from ._tables import SECTIONS, Row, as_text, memory_rows, timed_rows

Group = Callable[[], list[Row]]


Clock = Callable[[], float]


def groups(
    section: str, quick: bool, seconds: float, clock: Clock = time.perf_counter
) -> Iterator[tuple[str, Group]]:
    """The groups of a section, each with the function that measures it."""

    def timed(
        group: str, steps: Mapping[str, Callable[[], Any]], notes: Mapping[str, str] | None = None
    ) -> list[Row]:
        least = 3 if quick else 15
        times = compare(steps, seconds=seconds, least=least, before=cases.choose, clock=clock)
        return timed_rows(section, group, times, notes)

    def each(
        names: tuple[str, ...], steps: Callable[[str], Mapping[str, Callable[[], Any]]]
    ) -> Iterator[tuple[str, Group]]:
        for name in names:
            yield name, lambda name=name: timed(name, steps(name))  # type: ignore[misc]

    if section in OPERATORS:
        yield from _operators(section, quick, timed)
    elif section == "small-steps":
        yield from each(networks.SMALL, networks.small_steps)
    elif section == "steps":
        yield from each((*cases.MODELS,), partial(cases.steps, quick=quick))
    elif section == "compiled-steps":
        models = (*cases.MODELS,)[: 1 if quick else None]
        yield from each(models, partial(cases.compiled_steps, quick=quick))
    elif section == "blocks":
        yield from each(networks.BLOCKS, partial(networks.block_steps, quick=quick))
    elif section == "spiking":
        for name in networks.LIBRARIES:
            if name not in peers.missing():
                yield name, lambda name=name: timed(name, *networks.library_steps(name))  # type: ignore[misc]
    elif section == "attribution":
        yield "guided", lambda: timed("guided", *_attributions(quick))
    elif section == "transform":
        yield from each(cases.TRANSFORMED[: 1 if quick else None], cases.transform)
        yield cases.CHAIN, lambda: timed(cases.CHAIN, cases.transform_chain(quick))
    elif section == "memory":
        yield ONE, lambda: memory_rows(section, ONE, cases.operator_memory())
        for name in cases.MEMORY_MODELS:
            group = f"a step of {name}"
            yield (
                group,
                lambda name=name, group=group: memory_rows(  # type: ignore[misc]
                    section, group, cases.step_memory(name, quick)
                ),
            )
    elif section == "model-memory":
        for name in dict.fromkeys(case.name for case in memory.CASES):
            yield (
                name,
                lambda name=name: memory_rows(  # type: ignore[misc]
                    section, name, memory.counts(name, quick), ratio=True
                ),
            )
    elif section == "compile":
        for name in compiling.MODELS[: 1 if quick else None]:
            yield (
                name,
                lambda name=name: [  # type: ignore[misc]
                    row
                    for state, times in compiling.compile_times(name, quick).items()
                    for row in timed_rows(section, f"{name}, {state}", times)
                ],
            )


ONE = "one activation"
# By section: the rules, and the function that makes the candidates of a rule.
OPERATORS = {
    "operators": (cases.MEASURED, cases.operator),
    "small": (cases.MEASURED, cases.operator),
    "compiled": (cases.ELEMENTWISE, cases.compiled_operator),
    "fuse": (cases.FUSED, cases.fused_operator),
}


def _operators(
    section: str, quick: bool, timed: Callable[..., list[Row]]
) -> Iterator[tuple[str, Group]]:
    """One group for each rule. Before the timing, the gradients of the peers are compared with ours."""
    side = 64 if section == "small" else 250 if quick else 1000
    rules, make = OPERATORS[section]
    if quick and section in ("compiled", "fuse"):
        rules = rules[:2]

    def measure(rule: str) -> list[Row]:
        torch._dynamo.reset()
        modules = make(rule)
        notes = {} if section == "compiled" else cases.differences(cases.gradients(modules))
        steps = {name: cases.operator_step(m, (side, side)) for name, m in modules.items()}
        return timed(rule, steps, notes)

    for rule in rules:
        yield rule, partial(measure, rule)


def _attributions(quick: bool) -> tuple[Mapping[str, Callable[[], Any]], Mapping[str, str]]:
    """The candidates, and what differs in their maps."""
    found = cases.attributions(quick)
    return found, cases.differences({name: make() for name, make in found.items()})


def measure(
    section: str,
    quick: bool,
    seconds: float,
    only: list[str] | None = None,
    clock: Clock = time.perf_counter,
) -> Iterator[list[Row]]:
    """The rows of a section, one group after the other; of the groups whose names have one of these texts in them."""
    for name, group in groups(section, quick, seconds, clock):
        if not only or any(text in name for text in only):
            cases.choose(cases.NATIVE)  # what does not say otherwise is made without the extension
            yield group()


def about() -> dict[str, Any]:
    """The machine, and the versions of what is compared."""
    extension = "in use" if fg.extension.status().active else "not built"
    versions = {"freegrad_fx": fg.__version__, "C++ extension": extension} | peers.versions()
    return machine() | versions


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure, print and write."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    # Captum warns at every attribution that it adds hooks to the model
    warnings.filterwarnings("ignore", "Setting backward hooks on ReLU activations")
    if options.build:
        fg.extension.build()
    here = about()
    print(", ".join(f"{key} {value}" for key, value in here.items()))
    if absent := peers.missing():
        print(
            f"Not installed, and so not measured: {', '.join(absent)}. pip install -e '.[bench,peers]'"
        )
    if not fg.extension.status().active:
        print(f"The C++ extension is not measured: {fg.extension.status()} Or give --build.")
    if options.quick:
        print("Quick: the inputs are smaller than those that the targets are for.")
    run = here | {
        "date": datetime.date.today().isoformat(),
        "quick": options.quick,
        "missing": absent,
    }
    clock = time.thread_time if options.processor_time else time.perf_counter
    if options.processor_time:
        run["clock"] = "processor time of the thread"
    results, rows = Results.read(options.out), list[Row]()
    try:
        for section in options.only:
            start = time.perf_counter()
            found: list[Row] = []
            for group in measure(section, options.quick, options.seconds, options.groups, clock):
                for _, part in itertools.groupby(group, lambda row: row.group):
                    print(f"\n{as_text([*part])}", flush=True)
                found += group
            rows += found
            print(f"\n{section}: {time.perf_counter() - start:.0f} s")
            # after every section, so that a run that is stopped leaves its results
            results = results.with_run(run, found)
            results.write(options.out)
    finally:
        library.switch(on=True)
    missed = [
        f"{row.section}: {row.group}: {row.name}, over {row.over}"
        for row in rows
        if row.verdict == "missed"
    ]
    print(f"\n{len(missed)} targets missed{':' if missed else '.'}", *missed, sep="\n  ")
    print(f"Written to {options.out}.")
    if options.docs:
        for path, text in pages.files(results).items():
            path.write_text(text, "utf-8")
            print(f"Written to {path}.")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="*", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
        help=f"the sections to measure; none to write the pages alone: {', '.join(SECTIONS)}",
    )  # fmt: skip
    parser.add_argument(
        "--groups", nargs="+", metavar="TEXT",
        help="measure only groups with one of these texts in their names",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, help="about how long a group takes (4)")
    parser.add_argument("--threads", type=int, default=1, help="that PyTorch may use")
    parser.add_argument(
        "--processor-time", action="store_true",
        help="count the time that the processor spends on the thread, for small tensors on a busy machine",
    )  # fmt: skip
    parser.add_argument("--build", action="store_true", help="build the C++ extension first")
    parser.add_argument("--quick", action="store_true", help="small inputs and few rounds")
    parser.add_argument(
        "--out", type=Path,
        help="the file of the results (out/compare.json, quick out/compare-quick.json); delete it to begin anew",
    )  # fmt: skip
    parser.add_argument(
        "--docs", action="store_true",
        help="add the results to those of the documentation, and write its tables and the numbers of the README",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.docs and options.quick:
        parser.error("the documentation shows no quick results: omit --quick or --docs")
    if options.seconds is None:
        options.seconds = 0.2 if options.quick else 4.0
    if options.out is None:
        quick = Path("out/compare-quick.json" if options.quick else "out/compare.json")
        options.out = pages.DATA if options.docs else quick
    return options


if __name__ == "__main__":
    main()
