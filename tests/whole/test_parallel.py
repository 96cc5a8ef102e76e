"""Every way to give rules with every way to distribute a model: data, shards, tensors, stages of a pipeline.

The expected gradients are those of a model edited by hand in one process. A rule sees the gradient of its process, and
the results are averaged; a rule at a DTensor sees the gradient of the whole parameter.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
import parallel
import ranks
from processes import WORLD, found_in, gloo

pytestmark = [gloo, pytest.mark.slow]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    return found_in(tmp_path_factory, ranks.__file__, "slow")


def by_hand(net: parallel.Net, number: int) -> dict[str, Tensor | None]:
    """The gradients for a sample, with the rules written out."""
    relu = models.naive(F.relu, models.fast_sigmoid(2.0))
    x = parallel.sample(number)
    for block in net.blocks:
        assert isinstance(block, parallel.Block)
        x = x + block.down(relu(block.up(x)))
    named = dict(net.named_parameters())
    grads = torch.autograd.grad(parallel.loss_of(x), list(named.values()), allow_unused=True)
    found: dict[str, Tensor | None] = {}
    for name, g in zip(named, grads, strict=True):
        factor = 3.0
        if g is not None and name.endswith("up.weight"):
            factor = min(1.0, parallel.MAX_NORM / float(g.norm()))
        found[name] = None if g is None else factor * g
    return found


def combined(net: parallel.Net, numbers: range, divided_by: int) -> dict[str, Tensor | None]:
    """The sum of the gradients for some samples, divided by a number."""
    each = [by_hand(net, number) for number in numbers]
    found: dict[str, Tensor | None] = {}
    for name in each[0]:
        present = [g for one in each if (g := one[name]) is not None]
        found[name] = torch.stack(present).sum(0) / divided_by if present else None
    return found


def expected(scenario: str) -> dict[str, Tensor | None]:
    blocks = 1 if "compile" in scenario and "pipeline" not in scenario else parallel.BLOCKS
    net = parallel.make(blocks)
    if "pipeline" in scenario:
        return combined(net, range(parallel.MICRO), 1)
    if "tensor parallel" in scenario:
        return combined(net, range(1), 1)
    if "accumulated" in scenario:
        return combined(net, range(2 * WORLD), WORLD)
    if "steps" not in scenario:
        return combined(net, range(WORLD), WORLD)
    for step in range(2):
        mean = combined(net, range(WORLD * step, WORLD * (step + 1)), WORLD)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if (g := mean[name]) is not None:
                    parameter -= 1e-3 * g
    return {name: parameter.detach() for name, parameter in net.named_parameters()}


REFUSED = {
    "transform, layers sharded": "'weight' of FSDPLinear would be ignored, .* Shard a module around it",
    "example_inputs, blocks sharded": "fully_shard was applied to blocks.0 .* use[(]rules, model=",
    "transform, blocks sharded, joint": "does not support DTensors",
    "use, blocks sharded, joint": "does not support DTensors",
    "use, tensor parallel, joint": "does not support DTensors",
    "blocks sharded, transform": "cannot be copied: .*FSDP",
    "tensor parallel, example_inputs": "CaptureError.* without example_inputs",
}


@pytest.mark.parametrize("scenario", [name for name in parallel.SCENARIOS if name not in REFUSED])
def test_the_gradients_are_those_of_the_model_edited_by_hand(
    found: list[dict[str, Any]], scenario: str
) -> None:
    wanted = expected(scenario)
    seen: set[str] = set()
    for result in (one[scenario] for one in found):
        assert "error" not in result, result["error"]
        for name, gradient in result.items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
        seen.update(result)
    assert seen >= {name for name in wanted if "spare" not in name}


@pytest.mark.parametrize(("scenario", "message"), REFUSED.items())
def test_what_does_not_work_is_refused_with_a_remedy(
    found: list[dict[str, Any]], scenario: str, message: str
) -> None:
    for result in found:
        assert re.search(message, result[scenario]["error"], re.DOTALL)
