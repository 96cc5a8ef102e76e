"""What a rule declares of itself is what it does: random, linear in the gradient, reducing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import freegrad_fx as fg
from built_in import BUILT_IN, examples_of


def result(rule: fg.Rule, grad: Tensor, x: Tensor, seed: int = 3) -> Tensor:
    torch.manual_seed(seed)
    return rule.backward(grad, x=x, y=x.tanh())


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    first, second, x = torch.randn(3, 4, 6, dtype=torch.float64)
    return 2 * first, 2 * second, x


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rule_is_linear_if_it_says_so(name: str) -> None:
    first, second, x = inputs()
    for values in examples_of(name):
        rule = fg.get(name)(**values)
        together = result(rule, first - 3 * second, x)
        apart = result(rule, first, x) - 3 * result(rule, second, x)
        if rule.declaration.linear:
            torch.testing.assert_close(together, apart)
        elif not values:
            assert not torch.allclose(together, apart)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rule_reads_only_the_same_entry_unless_it_reduces(name: str) -> None:
    grad, _, x = inputs()
    reduced = False
    for values in examples_of(name):
        rule = fg.get(name)(**values)
        before = result(rule, grad, x)
        for row in range(4):
            other_grad, other_x = grad.clone(), x.clone()
            other_grad[row, 1:] *= 30.0
            other_x[row, 1:] *= 0.25
            reduced |= not torch.equal(before[:, 0], result(rule, other_grad, other_x)[:, 0])
    assert reduced is fg.get(name).declaration.reducing


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rule_is_random_if_it_says_so(name: str) -> None:
    grad, _, x = inputs()
    rule = fg.get(name)
    same = torch.equal(result(rule, grad, x, seed=1), result(rule, grad, x, seed=2))
    assert same is not rule.declaration.random
    assert torch.equal(result(rule, grad, x), result(rule, grad, x))


def test_an_unbiased_compression_has_the_gradient_as_its_mean() -> None:
    grad = torch.tensor([[0.3, -1.0, 0.0, 0.71], [2.0, -0.1, 0.05, 1.9]], dtype=torch.float64)
    torch.manual_seed(3)
    for rule, mean in (
        (fg.rules.stochastic_round(bits=2), grad),
        (fg.rules.dropout_gradient(p=0.25), grad),
        (fg.rules.stochastic_sign, grad / 2.0),
    ):
        draws = torch.stack([rule.backward(grad) for _ in range(4000)])
        error = draws.std(0) / len(draws) ** 0.5
        assert ((draws.mean(0) - mean).abs() <= 5 * error + 1e-12).all(), rule


def test_top_k_passes_exactly_k_of_equal_values() -> None:
    kept = fg.rules.top_k(fraction=0.5).backward(torch.ones(3, 6))
    assert kept.tolist() == [[1, 1, 1, 0, 0, 0]] * 3
    grad = torch.tensor([[0.1, -3.0, 2.0, 0.0]])
    assert fg.rules.top_k.backward(grad).tolist() == [[0, -3, 0, 0]]


def test_the_identity_rule_conserves_relevance() -> None:
    """The sum of value times gradient is the same before and after an activation."""
    x, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    x[0, 0] = 0.0
    x.requires_grad_()
    gm = fg.transform(torch.nn.GELU(), fg.rules.identity_rule)
    output = gm(x) @ weight
    (grad,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close((x * grad).sum(), output.sum())
    torch.testing.assert_close(grad[0, 0], weight[0].sum() / 2)


def test_a_gradient_can_be_routed_by_a_mask_that_changes_with_each_batch() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    gm = fg.transform(model, {"params": None, "relu": fg.rules.scale(s=torch.ones(5, 1))})
    for _ in range(2):
        x, mask = torch.randn(5, 3), torch.randint(0, 2, (5, 1)).float()
        gm.set_rule_parameter("1:relu[0]", s=mask)
        (actual,) = torch.autograd.grad(gm(x).square().sum(), gm.get_parameter("0.weight"))
        h = model[0](x)
        routed = mask * h + (1 - mask) * h.detach()
        # the rule replaces the derivative of the ReLU, so its own is not in the expected gradient
        y = model[2](torch.relu(h).detach() + routed - routed.detach())
        (expected,) = torch.autograd.grad(y.square().sum(), model[0].weight)
        torch.testing.assert_close(actual, expected)
