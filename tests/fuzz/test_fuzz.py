"""Random programs with random tables, by every way in, against the oracle: see CONTRIBUTING for the options."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import pytest

from fuzz_cases import Case, check, kind_of, random_case
from fuzz_shrink import shrink

# For each way in, the number of chunks and of cases in each: 200 cases, half of them slow tests. Exporting and
# compiling take long.
FAST = {"symbolic": (6, 32), "export": (1, 4), "compile": (1, 2), "backend": (1, 2), "use": (1, 32)}


# Of the cases that `--fuzz` asks for, the share of each way in
SHARES = {"symbolic": 0.5, "use": 0.3, "export": 0.08, "compile": 0.06, "backend": 0.06}


def try_cases(
    door: str, seeds: range, told: Callable[[str], None] = lambda line: None
) -> tuple[Counter[str], list[str]]:
    """Try cases.

    Args:
        door: The way in.
        seeds: The seeds of the cases.
        told: Called with a line for each failure, and for every 100 cases.

    Returns:
        What the cases came to, counted; and the failing cases, made small.
    """
    kinds: Counter[str] = Counter()
    failures: list[str] = []
    acted = 0
    for number, seed in enumerate(seeds, 1):
        case = random_case(seed, door)
        outcome = check(case)
        kinds[kind_of(outcome)] += 1
        acted += outcome.acted > 0
        if outcome.kind == "failure":
            told(f"{door}: seed {seed} fails: {outcome.detail[:100]!r}")
            small = shrink(case, functools.partial(_fails_like, outcome.detail))
            failures.append(f"seed {seed} by {door}:\n{small}\n\n{check(small).detail}")
        if number % 100 == 0:
            told(f"{door}: {number} cases up to seed {seed}: {dict(summary(kinds))}")
    kinds["a rule acted"] = acted
    return kinds, failures


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
    [
        pytest.param(door, chunk, marks=pytest.mark.slow if chunk else ())
        for door, (chunks, _) in FAST.items()
        for chunk in range(chunks)
    ],
)
def test_random_programs(door: str, chunk: int) -> None:
    number = FAST[door][1]
    kinds, failures = try_cases(door, range(chunk * number, (chunk + 1) * number))
    if failures:
        pytest.fail("\n\n".join(failures), pytrace=False)
    found = summary(kinds)
    if number >= 30:  # else the test could be about nothing
        assert found["ok"] >= number / 2, found
        assert found["a rule acted"] >= number / 4, found


def test_more_random_programs(request: pytest.FixtureRequest) -> None:
    """As many as ``--fuzz=N`` says, from ``--fuzz-seed=S`` on, by ``--fuzz-door`` or shared among all."""
    number, seed, only = (request.config.getoption(f"--fuzz{o}") for o in ("", "-seed", "-door"))
    if not number:
        pytest.skip("--fuzz=N was not given")
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def tell(line: str) -> None:
        with capture.global_and_fixture_disabled():
            print(
                line, flush=True
            )  # at once, so that a run that is stopped has said how far it came

    shares = {only: 1.0} if only else SHARES
    failures = []
    for door, share in shares.items():
        cases = round(number * share)
        kinds, failing = try_cases(door, range(seed, seed + cases), tell)
        failures += failing
        counts = "\n".join(f"{count:7} {kind}" for kind, count in kinds.most_common())
        tell(f"{door}: {cases} cases, seeds {seed} to {seed + cases - 1}, of which\n{counts}")
    if failures:
        pytest.fail("\n\n".join(failures), pytrace=False)
