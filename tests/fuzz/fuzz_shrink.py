"""Makes a failing case smaller, while it fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import fuzz_programs
import fuzz_tables
from fuzz_cases import Case


def size(case: Case) -> tuple[int, int, int]:
    options = (case.flipped is not None) + bool(case.carried) + case.second + len(case.steps)
    return case.program.size, case.table.size, options


def smaller(case: Case) -> Iterator[Case]:
    """Cases with one thing less each."""
    if len(case.steps) > 1:
        yield replace(case, steps=case.steps[:1])
        yield replace(case, steps=case.steps[1:])
        yield replace(case, steps=case.steps[:-1])
    for name, off in (("flipped", None), ("carried", ""), ("second", False)):
        if getattr(case, name) != off:
            yield replace(case, **{name: off})
    for table in fuzz_tables.smaller(case.table):
        yield replace(case, table=table)
    for program in fuzz_programs.smaller(case.program):
        yield replace(case, program=program)


def shrink(case: Case, fails: Callable[[Case], bool], attempts: int = 600) -> Case:
    """The smallest case found that still fails: always the first smaller one that does, from where the last was found.

    Args:
        case: A failing case.
        fails: Whether a case fails. It must not raise.
        attempts: How many cases are tried at most.
    """
    found = True
    while found and attempts > 0:
        found = False
        skip = 0
        while attempts > 0:
            candidates = list(smaller(case))[skip:]
            for index, candidate in enumerate(candidates):
                attempts -= 1
                if attempts < 0:
                    break
                if fails(candidate):
                    case, found, skip = candidate, True, skip + index
                    break
            else:
                break
    return case
