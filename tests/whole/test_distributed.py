"""Models with rules under DistributedDataParallel and fully_shard: two processes on this machine, over gloo.

The gradient that every process has to end up with is the mean of those that plain, single-process autograd gives for
the processes' samples; a rule sees the gradient of its own process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock  # which torch itself needs
from torch import Tensor

import distributed
import models

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this build of torch has no gloo",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found in the scenarios of the fast tests."""
    return found_in(tmp_path_factory)


@pytest.fixture(scope="module")
def found_slowly(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found in the scenarios of the slow tests."""
    return found_in(tmp_path_factory, "slow")


def found_in(tmp_path_factory: pytest.TempPathFactory, *which: str) -> list[dict[str, Any]]:
    """What each process found; the workers of pytest-xdist wait for the first of them, and share it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all of them have
    folder /= "-".join(("processes", *which))
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            run_processes(folder, *which)
    return [torch.load(folder / f"{rank}.pt") for rank in range(distributed.WORLD)]


def run_processes(folder: Path, *which: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, distributed.__file__, str(rank), str(folder), *which],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(distributed.WORLD)
    ]
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)


def expected(parameters: str = "", second_slope: float = 2.0) -> dict[str, Tensor]:
    """The mean of the gradients of the model edited by hand.

    Args:
        parameters: What the names of the parameters with a rule begin with.
        second_slope: That of the rule of the second ReLU.
    """
    model = distributed.make()
    first = models.naive(F.relu, models.fast_sigmoid(2.0))
    second = models.naive(F.relu, models.fast_sigmoid(second_slope))

    def by_hand(x: Tensor) -> Tensor:
        return model.third(second(model.second(first(model.first(x)))))

    each = [distributed.gradients(by_hand, model, rank) for rank in range(distributed.WORLD)]
    mean = {name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]}
    return {name: 3.0 * g if name.startswith(parameters) else g for name, g in mean.items()}


def assert_found(results: list[dict[str, Any]], scenario: str, **rules: Any) -> None:
    for result in results:
        assert "error" not in result[scenario], result[scenario]["error"]
        torch.testing.assert_close(result[scenario]["gradients"], expected(**rules))


def test_the_rules_make_a_difference_here() -> None:
    model = distributed.make()
    native = distributed.gradients(model, model, 0)
    assert not any(torch.allclose(native[name], g) for name, g in expected().items())


def scenarios(*names: str) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(n, marks=slow if n in distributed.SLOW else ()) for n in names]


def results_of(scenario: str, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = request.getfixturevalue(
        "found_slowly" if scenario in distributed.SLOW else "found"
    )
    return found


@pytest.mark.parametrize("scenario", scenarios("DDP", "DDP, eager back end", "DDP, compiled"))
def test_data_parallel_training_averages_the_gradients_of_the_rules(
    request: pytest.FixtureRequest, scenario: str
) -> None:
    """Case 31."""
    found = results_of(scenario, request)
    assert_found(found, scenario)
    for result in found:
        torch.testing.assert_close(result[scenario]["first"], result[scenario]["gradients"])


@pytest.mark.slow
def test_the_compiler_has_split_the_graph_into_the_buckets(
    found_slowly: list[dict[str, Any]],
) -> None:
    """Else the case above would prove nothing about the optimizer of compiled DDP."""
    assert all(result["DDP, compiled"]["graphs"] >= 2 for result in found_slowly)


@pytest.mark.slow
def test_the_pass_behind_the_compiler_counts_calls_over_the_buckets(
    found: list[dict[str, Any]],
) -> None:
    """Case 31, with one table whose entries are for different buckets."""
    scenario = "DDP, rules behind the compiler"
    assert_found(found, scenario, parameters="second.", second_slope=5.0)
    for result in (result[scenario] for result in found):
        torch.testing.assert_close(result["first"], result["gradients"])
        assert result["graphs"] >= 2
        names = {"<root>:relu[0]", "<root>:relu[1]", "second.weight", "second.bias"}
        assert set(result["sites"]) == names


@pytest.mark.parametrize("scenario", scenarios("FSDP", "FSDP, compiled"))
def test_a_sharded_model_keeps_the_rules_of_its_parameters(
    request: pytest.FixtureRequest, scenario: str
) -> None:
    """Case 32."""
    assert_found(results_of(scenario, request), scenario)


@pytest.mark.parametrize("scenario", scenarios("DDP, learnt", "FSDP, learnt"))
def test_what_a_rule_learns_gets_the_mean_of_the_gradients(
    request: pytest.FixtureRequest, scenario: str
) -> None:
    for result in results_of(scenario, request):
        assert "error" not in result[scenario], result[scenario]["error"]
        found, expected = result[scenario]["gradients"], result[scenario]["expected"]
        assert found["rule_parameter_0"].abs() > 1e-3
        torch.testing.assert_close(found, expected)


def test_parts_may_be_sharded_where_rules_are_on_activations(found: list[dict[str, Any]]) -> None:
    assert_found(found, "FSDP of parts, activations", parameters="none")


@pytest.mark.parametrize(
    ("scenario", "remedy"),
    [
        ("FSDP of parts", "RuntimeError: the rule for the parameter 'weight' .* would be ignored"),
        pytest.param(
            "FSDP of parts, compiled",
            "would be ignored, because fully_shard makes that module gather",
            marks=pytest.mark.slow,
        ),
        ("FSDP, then transform", "CaptureError: .* cannot be copied: .*FSDP"),
    ],
)
def test_what_sharding_would_let_learn_natively_is_refused(
    request: pytest.FixtureRequest, scenario: str, remedy: str
) -> None:
    for result in results_of(scenario, request):
        assert re.search(remedy, result[scenario]["error"])


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["DDP, together", "FSDP, together"])
def test_a_joint_norm_is_that_of_the_gradients_of_a_process(
    found_slowly: list[dict[str, Any]], scenario: str
) -> None:
    model = distributed.make()
    each = []
    for rank in range(distributed.WORLD):
        found = distributed.gradients(model, model, rank)
        norm = torch.cat([g.flatten() for g in found.values()]).norm()
        assert norm > 1
        each.append({name: g / norm for name, g in found.items()})
    mean = {name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]}
    for result in found_slowly:
        assert "error" not in result[scenario], result[scenario]["error"]
        torch.testing.assert_close(result[scenario]["gradients"], mean)
