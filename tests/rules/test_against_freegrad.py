"""FreeGrad's eleven rules mean here what they mean in FreeGrad.

Its package is part of the test extra: where it is missing, this file is to fail, not to be skipped.
"""

from __future__ import annotations

import freegrad
import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from built_in import BUILT_IN, EXAMPLES

NAMES = sorted(freegrad.registry._RULES)
CASES = [(name, values) for name, values in EXAMPLES if name in NAMES]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A gradient and an input, with entries exactly on the bounds."""
    grad, x = torch.randn(2, 6, 20, 5).to(dtype)
    marks = torch.tensor([0.0, -0.0, -0.5, 0.5, -1.0, 0.25, 1.0, -2.0, 2.5, -5.0, 5.0, 7.0])
    x.view(-1)[: len(marks)] = marks
    return grad, x * 1


def test_all_eleven_rules_are_compared() -> None:
    assert len(NAMES) == 11
    assert set(NAMES) <= set(BUILT_IN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "parameters"), CASES, ids=str)
def test_the_gradient_is_freegrad_s_on_the_same_input_and_seed(
    name: str, parameters: dict[str, float], dtype: torch.dtype
) -> None:
    grad, x = inputs(dtype)
    torch.manual_seed(5)
    theirs = freegrad.get(name)(None, grad, x, **parameters)
    torch.manual_seed(5)
    ours = fg.get(name)(**parameters).backward(grad, x=x)
    assert ours.dtype == theirs.dtype
    if name == "clip_norm" and dtype == torch.bfloat16:
        # their norm is rounded to bfloat16 before it divides
        torch.testing.assert_close(ours, theirs)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "parameters"), CASES, ids=str)
def test_a_model_has_the_gradients_of_freegrad_s_activation(
    name: str, parameters: dict[str, float]
) -> None:
    grad, x = inputs(torch.float32)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))
    theirs = nn.Sequential(model[0], freegrad.Activation(forward="Tanh"), model[2])
    ours = fg.transform(model, {"tanh": fg.get(name)(**parameters)})

    x.requires_grad_()
    torch.manual_seed(5)
    with freegrad.use(rule=name, params=parameters, scope="activations"):
        y = theirs(x)
        expected = torch.autograd.grad(y, [x, *theirs.parameters()], grad)
    torch.manual_seed(5)
    actual = torch.autograd.grad(ours(x), [x, *ours.parameters()], grad)
    assert torch.equal(ours(x), y)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_are_freegrad_s(name: str) -> None:
    declared = fg.get(name).parameters
    parameters = {n: p for n, p in declared.items() if n != "generator"}  # FreeGrad has none
    defaults = [p.default for p in parameters.values()]
    theirs = dict(zip(parameters, freegrad.get(name).__defaults__ or (), strict=False))
    assert theirs == dict(zip(parameters, defaults, strict=True))


def test_compositions_apply_the_rules_in_freegrad_s_order() -> None:
    grad, x = inputs(torch.float32)
    for names in (("clip_norm", "noise"), ("rectangular", "centralize", "full_jam")):
        torch.manual_seed(5)
        theirs = freegrad.compose(*names)(None, grad, x)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        fg.transform(nn.ReLU(), fg.compose(*names))(leaf).backward(grad)
        assert torch.equal(leaf.grad, theirs)
