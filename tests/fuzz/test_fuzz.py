"""Random programs with random tables, by every way in, against the oracle: see CONTRIBUTING for the options."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from fuzz_cases import Case, check, kind_of, random_case
from fuzz_doors import DOORS
from fuzz_shrink import shrink

# For each way in, the number of chunks and of cases in each: 200 cases. Exporting and compiling take long.
FAST = {"symbolic": (6, 32), "export": (1, 4), "compile": (1, 2), "backend": (1, 2), "use": (1, 32)}


def try_cases(door: str, seeds: range) -> Counter[str]:
    """Try cases; fail with the first failing one, made small.

    Returns:
        What the cases came to, counted.
    """
    kinds: Counter[str] = Counter()
    acted = 0
    for seed in seeds:
        case = random_case(seed, door)
        outcome = check(case)
        kinds[kind_of(outcome)] += 1
        acted += outcome.acted > 0
        if outcome.kind == "failure":
            small = shrink(case, functools.partial(_fails_like, outcome.detail))
            pytest.fail(f"seed {seed} by {door}:\n{small}\n\n{check(small).detail}", pytrace=False)
    kinds["a rule acted"] = acted
    return kinds


def _fails_like(detail: str, case: Case) -> bool:
    outcome = check(case)
    return outcome.kind == "failure" and outcome.detail[:8] == detail[:8]


def summary(kinds: Counter[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for kind, number in kinds.items():
        found[kind.partition(":")[0]] += number
    return found


@pytest.mark.parametrize(
    ("door", "chunk"),
    [(door, chunk) for door, (chunks, _) in FAST.items() for chunk in range(chunks)],
)
def test_random_programs(door: str, chunk: int) -> None:
    number = FAST[door][1]
    found = summary(try_cases(door, range(chunk * number, (chunk + 1) * number)))
    if number >= 30:  # else the test could be about nothing
        assert found["ok"] >= number / 2, found
        assert found["a rule acted"] >= number / 4, found


def test_more_random_programs(request: pytest.FixtureRequest) -> None:
    """As many as ``--fuzz=N`` says, from ``--fuzz-seed=S`` on, by ``--fuzz-door``."""
    number, seed, door = (request.config.getoption(f"--fuzz{o}") for o in ("", "-seed", "-door"))
    if not number:
        pytest.skip("--fuzz=N was not given")
    for each in [door] if door else DOORS:
        kinds = try_cases(each, range(seed, seed + number))
        print(f"\n{each}: {number} cases, of which")
        for kind, count in kinds.most_common():
            print(f"{count:7} {kind}")
