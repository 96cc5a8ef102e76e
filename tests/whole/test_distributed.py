"""Models with rules under DistributedDataParallel and fully_shard: two processes on this machine, over gloo.

The gradient that every process has to end up with is the mean of those that plain, single-process autograd gives for
the processes' samples; a rule sees the gradient of its own process.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
import ranks
from processes import found_in, gloo

pytestmark = gloo


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found in the scenarios of the fast tests."""
    return found_in(tmp_path_factory, ranks.__file__)


@pytest.fixture(scope="module")
def found_slowly(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found in the scenarios of the slow tests."""
    return found_in(tmp_path_factory, ranks.__file__, "slow")


def expected(parameters: str = "", second_slope: float = 2.0) -> dict[str, Tensor]:
    """The mean of the gradients of the model edited by hand.

    Args:
        parameters: What the names of the parameters with a rule begin with.
        second_slope: That of the rule of the second ReLU.
    """
    model = ranks.make()
    first = models.naive(F.relu, models.fast_sigmoid(2.0))
    second = models.naive(F.relu, models.fast_sigmoid(second_slope))

    def by_hand(x: Tensor) -> Tensor:
        return model.third(second(model.second(first(model.first(x)))))

    each = [ranks.gradients(by_hand, model, rank) for rank in range(ranks.WORLD)]
    mean = {name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]}
    return {name: 3.0 * g if name.startswith(parameters) else g for name, g in mean.items()}


def assert_found(results: list[dict[str, Any]], scenario: str, **rules: Any) -> None:
    for result in results:
        assert "error" not in result[scenario], result[scenario]["error"]
        torch.testing.assert_close(result[scenario]["gradients"], expected(**rules))


def test_the_rules_make_a_difference_here() -> None:
    model = ranks.make()
    native = ranks.gradients(model, model, 0)
    assert not any(torch.allclose(native[name], g) for name, g in expected().items())


def scenarios(*names: str) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(n, marks=slow if n in ranks.SLOW else ()) for n in names]


def results_of(scenario: str, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = request.getfixturevalue(
        "found_slowly" if scenario in ranks.SLOW else "found"
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


@pytest.mark.slow
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
    model = ranks.make()
    each = []
    for rank in range(ranks.WORLD):
        found = ranks.gradients(model, model, rank)
        norm = torch.cat([g.flatten() for g in found.values()]).norm()
        assert norm > 1
        each.append({name: g / norm for name, g in found.items()})
    mean = {name: torch.stack([g[name] for g in each]).mean(0) for name in each[0]}
    for result in found_slowly:
        assert "error" not in result[scenario], result[scenario]["error"]
        torch.testing.assert_close(result[scenario]["gradients"], mean)
