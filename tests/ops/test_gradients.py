"""`stop_gradient` and `decoupled` by themselves: what autograd, functorch and the compiler make of them."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
import reference
from built_in import BUILT_IN
from freegrad_fx.ops import apply_function, decoupled, function_key, stop_gradient

DETERMINISTIC = [name for name in BUILT_IN if name not in reference.RANDOM]


@pytest.fixture
def by_output() -> fg.Rule:
    """The derivative of the sigmoid, from its output."""
    return fg.register("by_output")(lambda grad, y: grad * y * (1 - y))


@pytest.fixture
def by_input() -> fg.Rule:
    """The derivative of the sigmoid, from its input."""
    return fg.register("by_input")(lambda grad, x: grad * x.sigmoid() * (1 - x.sigmoid()))


def around(
    function: Callable[[Tensor], Tensor], rule: str | fg.Rule, site: str = "", **parameters: Any
) -> Callable[[Tensor], Tensor]:
    """`function` with a decoupled backward, as a rewritten graph spells it."""
    return lambda x: decoupled(function(stop_gradient(x)), x, rule=rule, site=site, **parameters)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x, grad)[0]


# --- values, memory, and what may follow ---


def test_both_share_the_memory_of_their_argument() -> None:
    x, y = torch.randn(2, 5, requires_grad=True)
    assert stop_gradient(x).data_ptr() == x.data_ptr()
    assert not stop_gradient(x).requires_grad
    out = decoupled(y, x, rule="scale")
    assert out.data_ptr() == y.data_ptr()
    assert out.requires_grad


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(()),
        torch.randn(0),
        torch.randn(4, 3).t(),
        torch.randn(2, 8)[:, ::2],
        torch.randn(3, 1).expand(3, 4),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ],
    ids=["0-dim", "empty", "transposed", "sliced", "expanded", "channels-last"],
)
def test_the_result_is_the_output_itself_in_every_layout(x: Tensor) -> None:
    x = x.detach().requires_grad_()
    out = decoupled(x.detach(), x, rule="d(Linear)")
    assert torch.equal(out, x)
    assert (out.stride(), out.dtype, out.is_leaf) == (x.stride(), x.dtype, False)


def test_without_gradients_the_output_itself_comes_back() -> None:
    x, y = torch.randn(2, 5, requires_grad=True)
    with torch.no_grad():
        assert decoupled(y, x, rule="scale") is y
    with torch.inference_mode():
        z = torch.randn(5)
        assert decoupled(z, stop_gradient(z), rule="scale") is z


def test_what_needs_no_gradient_gets_none() -> None:
    x, y = torch.randn(2, 5)
    assert not decoupled(y, x, rule="rectangular").requires_grad


def test_the_rule_decides_the_gradient_of_x() -> None:
    x, grad = torch.randn(2, 50)
    actual = gradient(around(torch.tanh, "rectangular", a=-1.0, b=0.25), x, grad)
    assert torch.equal(actual, grad * ((x >= -1) & (x <= 0.25)))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_gradient_is_that_of_the_naive_operation(name: str) -> None:
    x, grad = torch.randn(2, 6, 7)
    rule = fg.get(name)
    naive = reference.oracle(torch.sigmoid, lambda g, x, y: rule.backward(g, x=x, y=y))
    assert torch.equal(gradient(around(torch.sigmoid, name), x, grad), gradient(naive, x, grad))


def test_the_output_keeps_its_own_gradient() -> None:
    weight = torch.tensor([0.25], requires_grad=True)
    x, grad = torch.randn(2, 50)
    decoupled_prelu = around(lambda x: F.prelu(x, weight), "scale", s=0.0)
    x.requires_grad_()
    natural = torch.autograd.grad(F.prelu(x, weight), weight, grad)
    actual = torch.autograd.grad(decoupled_prelu(x), [weight, x], grad)
    assert torch.equal(actual[0], natural[0])
    assert not actual[1].any()


def test_the_gradient_of_the_output_is_handed_on_untouched() -> None:
    y, x = torch.randn(2, 5, requires_grad=True)
    grad = torch.randn(5)
    to_y, to_x = torch.autograd.grad(decoupled(y, x, rule="scale", s=3.0), [y, x], grad)
    assert torch.equal(to_y, grad)
    assert torch.equal(to_x, 3 * grad)


def test_values_that_have_no_gradient_pass_through() -> None:
    x = torch.tensor([-2, 0, 3])
    out = around(torch.relu, "rectangular")(x)
    assert out.tolist() == [0, 0, 3]
    assert out.dtype == torch.int64
    leaf = torch.randn(3, requires_grad=True)
    y = decoupled(leaf * 2, x, rule="rectangular")  # an index, say, is no obstacle to the rest
    y.sum().backward()
    assert leaf.grad.tolist() == [2] * 3


@pytest.mark.parametrize("rule", ["scale", "rectangular", "by_output"])
@pytest.mark.parametrize(
    "write",
    [
        torch.relu_,
        lambda x: x.mul_(2.0),
        lambda x: x.__iadd__(1.0),
        nn.Dropout(0.5, inplace=True),
        nn.ReLU(inplace=True),
        lambda x: x[1:].zero_().new_zeros(()) + x,
        lambda x: x.view(-1).exp_().view_as(x),
    ],
    ids=["relu_", "mul_", "+=", "Dropout", "ReLU", "write into a view", "through a view"],
)
def test_the_result_may_be_overwritten(
    rule: str, write: Callable[[Tensor], Tensor], by_output: fg.Rule
) -> None:
    x, grad = torch.randn(2, 6, 7)

    def with_a_copy(x: Tensor) -> Tensor:
        return write(around(torch.sigmoid, rule)(x).clone())

    def without(x: Tensor) -> Tensor:
        return write(around(torch.sigmoid, rule)(x))

    if rule == "by_output":
        # The overwritten y is what the rule needs: autograd has to notice.
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(without, x, grad)
        return
    torch.manual_seed(1)
    expected = gradient(with_a_copy, x, grad)
    torch.manual_seed(1)
    assert torch.equal(gradient(without, x, grad), expected)


def test_an_input_that_is_overwritten_before_the_backward_is_noticed() -> None:
    leaf = torch.randn(5, requires_grad=True)
    x = leaf * 1
    out = around(torch.tanh, "rectangular")(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_two_rules_in_a_row_both_act() -> None:
    """The second node asks whether its input requires a gradient; it does, through the first."""
    x, grad = torch.randn(2, 50)

    def chained(x: Tensor) -> Tensor:
        first = around(torch.relu, "scale", s=2.0)(x)
        assert first.requires_grad
        return around(torch.tanh, "rectangular", a=0.0, b=1.0)(first)

    expected = 2.0 * (grad * (x.relu() <= 1))
    assert torch.equal(gradient(chained, x, grad), expected)


def test_rules_on_one_edge_chain() -> None:
    x, grad = torch.randn(2, 50)

    def edge(x: Tensor) -> Tensor:
        source = around(lambda x: x, "clip_value", max_value=0.5)(x)
        return decoupled(torch.relu(stop_gradient(x)), source, rule="scale", s=2.0)

    assert torch.equal(gradient(edge, x, grad), (2.0 * grad).clamp(-0.5, 0.5))


def test_a_graph_that_is_retained_gives_the_same_gradient_again() -> None:
    x = torch.randn(20, requires_grad=True)
    for rule in ("rectangular", "scale", "guided"):
        y = around(torch.relu, rule)(x).square().sum()
        first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


def test_parameters_come_from_the_call_and_then_from_the_rule() -> None:
    x, grad = torch.tensor([-2.0, 0.75, 2.0]), torch.ones(3)
    for rule, parameters, expected in (
        ("rectangular", {}, [0, 0, 0]),
        ("rectangular", {"b": 1.0}, [0, 1, 0]),
        (fg.rules.rectangular(a=-3.0), {}, [1, 0, 0]),
        (fg.rules.rectangular(a=-3.0), {"b": 1.0}, [1, 1, 0]),
        (fg.rules.rectangular(a=-3.0), {"a": 0.0, "b": 3.0}, [0, 1, 1]),
    ):
        assert gradient(around(torch.relu, rule, **parameters), x, grad).tolist() == expected


def test_a_parameter_may_be_a_tensor_that_changes() -> None:
    x, grad = torch.randn(2, 50)
    slope = torch.tensor(2.0)
    for value in (2.0, 5.0):
        slope.fill_(value)
        actual = gradient(around(torch.relu, "fast_sigmoid", slope=slope), x, grad)
        expected = gradient(around(torch.relu, "fast_sigmoid", slope=value), x, grad)
        torch.testing.assert_close(actual, expected)


# --- errors ---


def test_an_unknown_rule_is_an_error_in_the_forward() -> None:
    with pytest.raises(fg.RuleError, match=r"unknown rule 'rectangula'. Did you mean"):
        decoupled(torch.ones(2, requires_grad=True), torch.ones(2), rule="rectangula")


class Spoilt(nn.Module):
    """A module whose activation gets a wrong gradient."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.linear, self.rule = nn.Linear(3, 3), rule

    def forward(self, x: Tensor) -> Tensor:
        return around(torch.relu, self.rule, site="layer1.0:relu[2]")(self.linear(x))


WRONG: dict[str, tuple[Callable[..., Any], str]] = {
    "sums": (lambda grad: grad.sum(), r"shape \(\) for an input of shape \(2, 3\)"),
    "flattens": (lambda grad: grad.flatten(), r"shape \(6,\) for an input of shape \(2, 3\)"),
    "broadcasts": (lambda grad, x: grad[None], r"shape \(1, 2, 3\) for an input"),
    "widens": (lambda grad: grad.double(), "dtype torch.float64 for an input of dtype torch.flo"),
    "masks": (lambda grad, x: x > 0, "dtype torch.bool for an input of dtype torch.float32"),
    "counts": (lambda grad: grad.long(), "dtype torch.int64 for an input"),
    "forgets": (lambda grad: None, "NoneType, not a tensor"),
    "reads": (lambda grad: 0.0, "float, not a tensor"),
    "pairs": (lambda grad: (grad, grad), "tuple, not a tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_gradient_is_named_with_its_rule_and_site_at_the_first_backward(
    name: str,
) -> None:
    function, what = WRONG[name]
    fg.register(name)(function)
    y = Spoilt(name)(torch.randn(2, 3))
    with pytest.raises(
        fg.RuleError, match=rf"rule '{name}' at site 'layer1\.0:relu\[2\]' returned.*{what}"
    ):
        y.sum().backward()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_gradient_is_named_by_the_compiler_too(name: str) -> None:
    fg.register(name)(WRONG[name][0])
    compiled = torch.compile(Spoilt(name), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=rf"rule '{name}' at site 'layer1\.0:relu\[2\]'"):
        compiled(torch.randn(2, 3)).sum().backward()


IMPURE: dict[str, tuple[Callable[..., Tensor], str]] = {
    "grad": (lambda grad, x: grad.mul_(2), ""),
    "grad, saved as x": (lambda grad, x: grad.mul_(2), "x"),
    "x": (lambda grad, x: grad * x.clamp_(0), ""),
    "x, saved as x": (lambda grad, x: grad * x.clamp_(0), "x"),
    "y": (lambda grad, y: grad * y.add_(1), ""),
    "the second of both": (lambda grad, x, y: grad * x + y.neg_(), ""),
}


@pytest.mark.parametrize("name", IMPURE)
def test_a_rule_that_changes_what_it_is_given_is_named_with_its_site(name: str) -> None:
    function, save = IMPURE[name]
    fg.register("impure")(function)
    grad, x = torch.randn(2, 3)
    with pytest.raises(
        fg.RuleError, match="rule 'impure' at site 'here' changes its arguments in place"
    ):
        gradient(lambda x: around(torch.relu, "impure", "here", save=save)(x * 1), x, grad)


def test_a_rule_that_changes_the_mask_that_was_saved_is_named_with_its_site() -> None:
    def gate(grad: Tensor, mask: Tensor) -> Tensor:
        return grad * mask.logical_not_()

    fg.register("impure", mask=lambda x: x > 0)(gate)
    grad, x = torch.randn(2, 3)
    with pytest.raises(
        fg.RuleError, match="rule 'impure' at site 'here' changes its arguments in place"
    ):
        gradient(around(torch.relu, "impure", "here", save="mask"), x, grad)


def test_a_transformed_model_names_the_site() -> None:
    fg.register("sums")(lambda grad: grad.sum())
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU()))
    y = fg.transform(model, "sums")(torch.randn(2, 3))
    with pytest.raises(fg.RuleError, match=r"rule 'sums' at site '1\.0:relu\[0\]' returned"):
        y.sum().backward()


def test_an_error_without_a_site_says_nothing_of_one() -> None:
    fg.register("sums")(lambda grad: grad.sum())
    with pytest.raises(fg.RuleError, match=r"^rule 'sums' returned"):
        gradient(around(torch.relu, "sums"), torch.randn(3), torch.randn(3))


def test_a_rule_may_answer_in_the_dtype_of_the_gradient_where_the_input_has_another() -> None:
    """As under autocast, where a softmax of bfloat16 is float32."""
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    for rule in ("scale", "rectangular", "d(Linear)"):
        actual = gradient(
            lambda x, rule=rule: decoupled(stop_gradient(x).float().softmax(1), x, rule=rule),
            x,
            torch.ones(3, 4),
        )
        assert actual.dtype == torch.bfloat16


def test_a_rule_may_answer_in_the_dtype_that_gradient_and_input_have_together() -> None:
    """The product of a half and a bfloat16 is a float32; the input receives its own dtype."""
    fg.register("product")(lambda grad, x: grad * x)
    x, grad = torch.randn(3, dtype=torch.bfloat16), torch.randn(3, dtype=torch.float16)
    actual = gradient(lambda x: decoupled(stop_gradient(x).half(), x, rule="product"), x, grad)
    assert torch.equal(actual, (grad.float() * x.float()).bfloat16())


def test_forward_mode_is_refused() -> None:
    """A custom jvp would make the compiler refuse the operation, and its absence must not mean a zero."""
    function = around(torch.relu, "rectangular")
    x, tangent = torch.randn(2, 5)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(function, (x,), (tangent,))
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.hessian(lambda x: function(x).sum())(x)


# --- derivatives of the rule ---


def second(function: Callable[[Tensor], Tensor], x: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """∂/∂x of w·(the gradient that `function` hands on for v)."""
    x, v = x.detach().requires_grad_(), v.detach().requires_grad_()
    (first,) = torch.autograd.grad(function(x), x, v, create_graph=True)
    return torch.autograd.grad(first, x, w, allow_unused=True, materialize_grads=True)[0]


def test_a_second_backward_differentiates_a_rule_of_the_input() -> None:
    x, v, w = torch.randn(3, 20, dtype=torch.float64)
    k, alpha = 5.0, 2.0
    for rule, expected in (
        (fg.rules.fast_sigmoid(slope=k), -2 * k * x.sign() / (1 + k * x.abs()) ** 3),
        (
            fg.rules.arctan(alpha=alpha),
            -(alpha**3) * math.pi**2 * x / 4 / (1 + (math.pi * alpha * x / 2) ** 2) ** 2,
        ),
        (fg.rules.triangular(width=1.0), -x.sign() * (x.abs() < 1)),
        (fg.rules.rectangular, torch.zeros_like(x)),
        (fg.rules.scale(s=3.0), torch.zeros_like(x)),
    ):
        actual = second(around(torch.relu, rule), x, v, w)
        torch.testing.assert_close(actual, v * w * expected)


def test_a_second_backward_reaches_the_incoming_gradient() -> None:
    x, w = torch.randn(2, 20)
    v = torch.randn(20, requires_grad=True)
    x.requires_grad_()
    (first,) = torch.autograd.grad(around(torch.relu, "rectangular")(x), x, v, create_graph=True)
    assert torch.equal(torch.autograd.grad(first, v, w)[0], w * (x.abs() <= 0.5))


def test_the_derivative_of_the_sigmoid_as_a_rule_is_the_sigmoid(
    by_output: fg.Rule, by_input: fg.Rule
) -> None:
    """In the first backward, the second and the third; from the output and from the input."""
    x, v, w, u = torch.randn(4, 20, dtype=torch.float64)

    def third(function: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf), leaf, v, create_graph=True)
        (again,) = torch.autograd.grad(first, leaf, w, create_graph=True)
        return torch.autograd.grad(again, leaf, u)[0]

    for rule in (by_output, by_input):
        function = around(torch.sigmoid, rule)
        for order in (gradient, second):
            more = (v,) if order is gradient else (v, w)
            torch.testing.assert_close(order(function, x, *more), order(torch.sigmoid, x, *more))
        torch.testing.assert_close(third(function), third(torch.sigmoid))


def test_the_derivatives_agree_with_finite_differences(
    by_output: fg.Rule, by_input: fg.Rule
) -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    for rule in (by_output, by_input):
        function = around(torch.sigmoid, rule)
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)
        chained = lambda x, f=function: f(f(x) * x)  # noqa: E731
        assert torch.autograd.gradcheck(chained, x)
        assert torch.autograd.gradgradcheck(chained, x)


# --- functorch ---


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gradients_of_samples_are_those_of_each_sample(name: str) -> None:
    x, grad = torch.randn(2, 5, 3, 4)

    def loss(x: Tensor, grad: Tensor) -> Tensor:
        return (around(torch.sigmoid, name)(x) * grad).sum()

    each = [gradient(around(torch.sigmoid, name), *pair) for pair in zip(x, grad, strict=True)]
    one = torch.func.grad(loss)(x[0], grad[0])
    # A lean form rounds in another way than the formula, which acts under torch.func
    lean = fg.get(name).declaration.lean is not None
    torch.testing.assert_close(one, each[0], **({} if lean else {"rtol": 0, "atol": 0}))
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x, grad), torch.stack(each))
    columns = torch.vmap(torch.func.grad(loss), in_dims=(1, None))(x.movedim(0, 1), grad[0])
    torch.testing.assert_close(columns[0], each[0])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_jacobian_is_the_rule_of_every_unit_gradient(name: str) -> None:
    x = torch.randn(4)
    function = around(torch.sigmoid, name)
    jacobian = torch.stack([gradient(function, x, unit) for unit in torch.eye(4)])
    torch.testing.assert_close(torch.func.jacrev(function)(x), jacobian)
    torch.testing.assert_close(torch.autograd.functional.jacobian(function, x), jacobian)
    together = torch.autograd.functional.jacobian(function, x, vectorize=True)
    torch.testing.assert_close(together, jacobian)


def test_vmap_in_the_backward_alone() -> None:
    x = torch.randn(4, requires_grad=True)
    y = around(torch.relu, "rectangular")(x)
    (batched,) = torch.autograd.grad(y, x, torch.eye(4), is_grads_batched=True)
    assert torch.equal(batched, torch.diag((x.abs() <= 0.5).float()))


def test_gradients_of_gradients_nest() -> None:
    x = torch.randn(6, dtype=torch.float64)
    function = around(torch.relu, "fast_sigmoid", slope=5.0)

    def once(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: function(x).sum())(x).sum()

    ones = torch.ones_like(x)
    torch.testing.assert_close(torch.func.grad(once)(x), second(function, x, ones, ones))
    rows = torch.vmap(torch.func.grad(once))(x.reshape(3, 2))
    torch.testing.assert_close(rows.flatten(), second(function, x, ones, ones))


def test_random_rules_under_vmap_ask_what_randomness_is_meant() -> None:
    x = torch.randn(200, 3)

    def loss(x: Tensor) -> Tensor:
        return around(torch.relu, "full_jam")(x).sum()

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(torch.func.grad(loss))(x)
    different = torch.vmap(torch.func.grad(loss), randomness="different")(x)
    assert different.unique().numel() > 500
    same = torch.vmap(torch.func.grad(loss), randomness="same")(x)
    assert torch.equal(same, same[:1].expand_as(same))


class Net(nn.Module):
    """Two sites between linear layers, written by hand."""

    def __init__(self, rule: str = "rectangular") -> None:
        super().__init__()
        self.first, self.second, self.rule = nn.Linear(4, 8), nn.Linear(8, 3), rule

    def forward(self, x: Tensor) -> Tensor:
        hidden = around(torch.relu, self.rule, site="hidden")(self.first(x))
        return around(torch.tanh, self.rule, site="out")(self.second(hidden))


def gradients(model: Callable[[Tensor], Tensor], x: Tensor, parameters: Any) -> list[Tensor]:
    """Of a loss, with respect to all parameters, with the same random numbers every time."""
    torch.manual_seed(7)
    return list(torch.autograd.grad(model(x).square().sum(), list(parameters)))


def test_functional_call_with_other_parameters() -> None:
    net, x = Net(), torch.randn(5, 4)
    parameters = {name: torch.randn_like(p) for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (x,)).square().sum()

    actual = torch.func.grad(loss)(parameters, x)
    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    net.load_state_dict(parameters)
    expected = gradients(net, x, net.parameters())
    for a, sample, e in zip(actual.values(), per_sample.values(), expected, strict=True):
        assert torch.equal(a, e)
        torch.testing.assert_close(sample.sum(0), e)


# --- mixed precision, checkpoints, threads ---


@pytest.mark.sampled(4)
@pytest.mark.parametrize("rule", BUILT_IN)
def test_under_autocast_a_gradient_has_the_dtype_of_its_input(rule: str) -> None:
    net, x = Net(rule), torch.randn(5, 4, requires_grad=True)
    seen = []
    net.first.register_full_backward_hook(lambda m, to_x, to_y: seen.append(to_y[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        y = net(x)
        assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert seen == [torch.bfloat16]
    assert {x.grad.dtype, *(p.grad.dtype for p in net.parameters())} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("rule", BUILT_IN)
def test_checkpoints_change_nothing(rule: str, use_reentrant: bool) -> None:
    net, x = Net(rule), torch.randn(5, 4, requires_grad=True)
    wanted = [x, *net.parameters()]

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(net, x, use_reentrant=use_reentrant)

    plain = gradients_by_backward(net, x, wanted)
    assert all(map(torch.equal, gradients_by_backward(checkpointed, x, wanted), plain))


def gradients_by_backward(
    model: Callable[[Tensor], Tensor], x: Tensor, wanted: list[Tensor]
) -> list[Tensor]:
    """With `backward()`, since reentrant checkpoints refuse `autograd.grad`."""
    torch.manual_seed(7)
    model(x).square().sum().backward()
    found = [tensor.grad for tensor in wanted]
    for tensor in wanted:
        tensor.grad = None
    return found


def test_the_backward_may_run_in_another_thread() -> None:
    net, x = Net(), torch.randn(5, 4)
    expected = gradients(net, x, net.parameters())
    loss = net(x).square().sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert all(map(torch.equal, [p.grad for p in net.parameters()], expected))


def test_several_threads_may_use_different_rules_at_a_time() -> None:
    x, grad = torch.randn(2, 1000)
    found: dict[float, list[Tensor]] = {}

    def work(s: float) -> None:
        found[s] = [gradient(around(torch.relu, "scale", s=s), x, grad) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(s,)) for s in (1.0, 2.0, 3.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for s in (1.0, 2.0, 3.0):
        assert all(torch.equal(g, s * grad) for g in found[s])


# --- the compiler ---


def compiled_as_a_whole(model: Any, backend: str, **options: Any) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True, **options)


# Dynamo traces the same graphs for both
EAGER = [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"]


@pytest.mark.thinned(2)
@pytest.mark.sampled(4)
@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("rule", BUILT_IN)
def test_a_compiled_rule_gives_the_same_gradients(rule: str, backend: str) -> None:
    net, x = Net(rule), torch.randn(5, 4)
    expected = gradients(net, x, net.parameters())
    actual = gradients(compiled_as_a_whole(net, backend), x, net.parameters())
    assert all(map(torch.equal, actual, expected))


@pytest.mark.sampled(3)
@pytest.mark.inductor
@pytest.mark.parametrize("rule", ["rectangular", "fast_sigmoid", "clip_norm", "d(Linear)"])
def test_inductor_gives_the_same_gradients(rule: str) -> None:
    net, x = Net(rule), torch.randn(5, 4)
    compiled = compiled_as_a_whole(net, "inductor")
    torch.testing.assert_close(
        gradients(compiled, x, net.parameters()), gradients(net, x, net.parameters())
    )


@pytest.mark.inductor
def test_inductor_jams_uniformly() -> None:
    """Its random numbers are not eager's: what can be compared is how they are distributed."""
    compiled = compiled_as_a_whole(around(torch.relu, "full_jam"), "inductor")
    x = torch.randn(100, 300)
    factors = gradient(compiled, x, torch.full_like(x, 2.0)) / 2
    n = factors.numel()
    steps = (torch.arange(n) + 0.5) / n
    assert (factors.flatten().sort().values - steps).abs().max() < 1.6 / math.sqrt(n)
    assert not torch.equal(gradient(compiled, x, torch.full_like(x, 2.0)) / 2, factors)


def transforms(rule: str) -> dict[str, tuple[Callable[..., Tensor], Tensor]]:
    function = around(torch.sigmoid, rule)

    def loss(x: Tensor) -> Tensor:
        return function(x).sum()

    x = torch.randn(3, 4)
    return {
        "grad": (torch.func.grad(loss), x),
        "vmap": (torch.vmap(function), x),
        "vmap(grad)": (torch.vmap(torch.func.grad(loss)), x),
        "jacrev": (torch.func.jacrev(function), x[0]),
        "vjp": (lambda x: torch.func.vjp(function, x)[1](torch.ones(3, 4))[0], x),
    }


@pytest.mark.sampled(3)
@pytest.mark.parametrize("backend", EAGER)
@pytest.mark.parametrize("name", transforms("scale"))
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own, at the graph break
def test_where_the_compiler_would_drop_the_rule_it_is_refused(name: str, backend: str) -> None:
    """PyTorch itself compiles these with a zero or with the native gradient, and says nothing."""
    function, x = transforms("rectangular")[name]
    with pytest.raises(
        Exception, match=r"torch\.compile drops the backward .* torch\.func transforms"
    ):
        compiled_as_a_whole(function, backend)(x)
    broken_off = torch.compile(function, backend=backend)
    assert torch.equal(broken_off(x), function(x))


def test_a_transform_of_compiled_code_is_refused() -> None:
    compiled = compiled_as_a_whole(around(torch.relu, "rectangular"), "aot_eager")
    with pytest.raises(Exception, match="functorch"):
        torch.func.grad(lambda x: compiled(x).sum())(torch.randn(3))


def test_a_second_backward_of_compiled_code_is_an_error_or_right() -> None:
    x, v, w = torch.randn(3, 20)
    function = around(torch.sigmoid, "fast_sigmoid", slope=5.0)
    for backend in ("eager", "aot_eager"):
        try:
            actual = second(compiled_as_a_whole(function, backend), x, v, w)
        except RuntimeError:
            continue
        torch.testing.assert_close(actual, second(function, x, v, w))


def test_a_rule_of_the_output_compiles(by_output: fg.Rule) -> None:
    x, grad = torch.randn(2, 20)
    function = around(torch.sigmoid, "by_output")
    for backend in ("eager", "aot_eager"):
        actual = gradient(compiled_as_a_whole(function, backend), x, grad)
        assert torch.equal(actual, gradient(function, x, grad))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_compilation_serves_every_shape(backend: str) -> None:
    compilations = []

    def counted(graph_module: fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        compilations.append(graph_module)
        return torch._dynamo.lookup_backend(backend)(graph_module, example_inputs)

    function = around(torch.relu, "rectangular")
    compiled = torch.compile(function, backend=counted, fullgraph=True, dynamic=True)
    for shape in ((3, 4), (5, 6), (7, 2)):
        x, grad = torch.randn(2, *shape)
        assert torch.equal(gradient(compiled, x, grad), gradient(function, x, grad))
    assert len(compilations) == 1


def test_a_parameter_that_changes_is_never_ignored_by_compiled_code() -> None:
    x, grad = torch.randn(2, 50)
    slope = torch.tensor(1.0)
    parameters: dict[str, Any] = {"slope": slope}
    compilations = []

    def counted(graph_module: fx.GraphModule, example_inputs: list[Tensor]) -> Any:
        compilations.append(graph_module)
        return torch._dynamo.lookup_backend("aot_eager")(graph_module, example_inputs)

    def function(x: Tensor) -> Tensor:
        return around(torch.relu, "fast_sigmoid", **parameters)(x)

    compiled = torch.compile(function, backend=counted, fullgraph=True)
    for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        slope.fill_(value)
        torch.testing.assert_close(gradient(compiled, x, grad), gradient(function, x, grad))
    assert len(compilations) == 1
    for value in (7.0, 8.0):
        parameters["slope"] = value
        torch.testing.assert_close(gradient(compiled, x, grad), gradient(function, x, grad))


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda grad: factor * grad


def test_rules_of_one_formula_with_other_constants_stay_apart_when_compiled() -> None:
    for factor in (2.0, 3.0):
        fg.register(f"times_{factor:.0f}")(times(factor))
    x, grad = torch.randn(2, 50)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        for factor in (2.0, 3.0):
            compiled = compiled_as_a_whole(around(torch.relu, f"times_{factor:.0f}"), backend)
            assert torch.equal(gradient(compiled, x, grad), factor * grad)


def test_a_rule_that_is_registered_anew_is_not_ignored_by_compiled_code() -> None:
    x, grad = torch.randn(2, 50)
    function = around(torch.relu, "replaced")
    compiled = compiled_as_a_whole(function, "aot_eager")
    for factor in (2.0, 3.0):
        fg.register("replaced", overwrite=True)(times(factor))
        assert torch.equal(gradient(compiled, x, grad), factor * grad)


def test_compiled_code_without_gradients_gives_the_values() -> None:
    net, x = Net(), torch.randn(5, 4)
    compiled = compiled_as_a_whole(net, "aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), net(x))
    assert all(
        map(
            torch.equal,
            gradients(compiled, x, net.parameters()),
            gradients(net, x, net.parameters()),
        )
    )


# --- the functions as nodes of a graph ---


class Traced(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return decoupled(stop_gradient(x).relu(), x, rule="scale", site="here", s=3.0)


def test_a_symbolic_trace_keeps_each_as_one_node() -> None:
    first = fx.symbolic_trace(Traced())
    for graph_module in (first, fx.symbolic_trace(first)):
        calls = [n for n in graph_module.graph.nodes if n.op == "call_function"]
        assert [n.target for n in calls] == [stop_gradient, decoupled]
        assert dict(calls[1].kwargs) == {"rule": "scale", "site": "here", "s": 3.0}
        x, grad = torch.randn(2, 5)
        assert torch.equal(gradient(graph_module, x, grad), 3.0 * grad)


def test_a_trace_of_one_argument_alone_keeps_the_node_too() -> None:
    x = torch.randn(3, requires_grad=True)
    for function in (
        lambda y: decoupled(y, x, rule="scale", s=3.0),
        lambda z: decoupled(x, z, rule="scale", s=3.0),
    ):
        targets = [n.target for n in fx.symbolic_trace(function).graph.nodes]
        assert targets.count(decoupled) == 1


class Noted(torch.Tensor):
    """A subclass with a `__torch_function__` of its own."""

    calls: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Noted.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclasses_and_modes_of_tensors_are_asked_first() -> None:
    Noted.calls.clear()
    x = torch.randn(5).as_subclass(Noted).requires_grad_()
    y = around(torch.relu, "scale", s=3.0)(x)
    assert {stop_gradient, decoupled} <= set(Noted.calls)
    y.sum().backward()
    assert x.grad.tolist() == [3] * 5


# --- functions of the user's own ---


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, times: float = 1.0) -> Tensor:
        return x * times

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return 3 * grad, None


def made(factor: float) -> type[torch.autograd.Function]:
    class Local(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return factor * grad

    return Local


def test_a_function_is_called_by_its_key() -> None:
    key = function_key(Tripled)
    assert key == f"{__name__}:Tripled"
    assert function_key(Tripled) == key
    x = torch.randn(3, requires_grad=True)
    y = apply_function(key, x, 2.0)
    assert torch.equal(y, x * 2)
    y.sum().backward()
    assert x.grad.tolist() == [3] * 3


def test_functions_of_one_name_have_keys_of_their_own() -> None:
    classes = [made(2.0), made(5.0), made(7.0)]
    keys = [function_key(c) for c in classes]
    base = f"{__name__}:made.<locals>.Local"
    assert keys[0].startswith(base)
    assert len(set(keys)) == 3
    assert [function_key(c) for c in classes] == keys
    for factor, key in zip((2.0, 5.0, 7.0), keys, strict=True):
        x = torch.randn(3, requires_grad=True)
        apply_function(key, x).sum().backward()
        assert x.grad.tolist() == [factor] * 3


def test_the_call_of_a_function_stays_one_node_and_keeps_its_backward() -> None:
    key = function_key(Tripled)
    first = fx.symbolic_trace(lambda x: apply_function(key, x, 2.0))
    for graph_module in (first, fx.symbolic_trace(first)):
        (call,) = (n for n in graph_module.graph.nodes if n.op == "call_function")
        assert (call.target, call.args[0], call.args[2]) == (apply_function, key, 2.0)
        x, grad = torch.randn(2, 5)
        assert torch.equal(gradient(graph_module, x, grad), 3 * grad)
        compiled = compiled_as_a_whole(graph_module, "aot_eager")
        assert torch.equal(gradient(compiled, x, grad), 3 * grad)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module of the user's, imported by nobody yet."""
    source = """
import torch
class Outer:
    class Quadrupled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1
        @staticmethod
        def backward(ctx, grad):
            return 4 * grad
"""
    (tmp_path / "users_functions.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("users_functions", None)


def test_a_function_is_imported_where_it_is_not_known(elsewhere: Path) -> None:
    key = "users_functions:Outer.Quadrupled"
    x = torch.randn(3, requires_grad=True)
    apply_function(key, x).sum().backward()
    assert x.grad.tolist() == [4] * 3
    from users_functions import Outer

    assert function_key(Outer.Quadrupled) == key


@pytest.mark.slow
def test_a_function_is_found_in_another_process(elsewhere: Path) -> None:
    program = (
        "import torch; from freegrad_fx.ops import apply_function;"
        "x = torch.ones(2, requires_grad=True);"
        "apply_function('users_functions:Outer.Quadrupled', x).sum().backward();"
        "assert x.grad.tolist() == [4, 4]"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=elsewhere)


@pytest.mark.parametrize(
    "key",
    ["no_such_module:Function", f"{__name__}:NoSuchFunction", f"{__name__}:made.<locals>.Other"],
)
def test_a_function_that_cannot_be_found_is_an_error_with_the_remedy(key: str) -> None:
    with pytest.raises(
        RuntimeError, match=r"cannot be imported .*at the top level of an importable"
    ):
        apply_function(key, torch.ones(2))


def test_a_tensor_that_escaped_from_a_transform_learns() -> None:
    w = torch.randn(3, requires_grad=True)
    escaped = []

    def loss(v: Tensor) -> Tensor:
        escaped.append(v + w)
        return v.sum()

    torch.func.grad(loss)(torch.randn(3))
    (grad,) = torch.autograd.grad(around(torch.relu, "scale", s=3.0)(escaped[0]).sum(), w)
    assert torch.equal(grad, torch.full((3,), 3.0))
