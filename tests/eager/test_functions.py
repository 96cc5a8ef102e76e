"""The inside of autograd.Functions: no call there is a site, and a Function that a table names has its own meaning."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg

HEAVISIDE = fg.rules.fast_sigmoid(slope=2.0, forward="heaviside")


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.relu(x) * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(x)


class SetUpApart(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x) * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    backward = Doubled.backward


class Decorated(Doubled):
    @staticmethod
    @torch.no_grad()
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return Doubled.forward(ctx, x.detach()).detach()


def sample() -> Tensor:
    return torch.tensor([-1.0, 0.5, 2.0], requires_grad=True)


def both(call: Callable[[Tensor], Tensor], create_graph: bool = False) -> tuple[Tensor, Tensor]:
    x = sample()
    y = call(x)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=create_graph)
    return y.detach(), grad.detach()


FUNCTIONS = pytest.mark.parametrize("function", [Doubled, SetUpApart, Decorated])


@FUNCTIONS
@pytest.mark.parametrize("create_graph", [False, True])
def test_activations_in_a_function_are_no_sites(function: Any, create_graph: bool) -> None:
    expected = both(function.apply, create_graph)
    with fg.use({"activations": HEAVISIDE}) as block:
        actual = both(lambda x: function.apply(x) + torch.zeros(()), create_graph)
        torch.tanh(sample())
    assert all(map(torch.equal, actual, expected))
    assert [d.site.op for d in fg.report(block).decisions] == ["tanh"]


@FUNCTIONS
def test_a_function_that_the_table_names_runs_its_own_forward(function: Any) -> None:
    y, _ = both(function.apply)
    with fg.use({function: "straight_through", "relu": HEAVISIDE}) as block:
        actual = both(function.apply)
        torch.relu(sample())
    assert torch.equal(actual[0], y)
    assert torch.equal(actual[1], torch.ones(3))
    assert sorted(d.site.op for d in fg.report(block).decisions) == sorted(
        [function.__name__, "relu"]
    )


@FUNCTIONS
def test_the_forward_of_a_function_is_replaced(function: Any) -> None:
    with fg.use({function: HEAVISIDE}):
        y, grad = both(function.apply)
        with torch.no_grad():
            assert torch.equal(function.apply(sample()), y)
    x = sample().detach()
    assert torch.equal(y, (x >= 0).to(x.dtype))
    torch.testing.assert_close(grad, 1 / (1 + 2 * x.abs()) ** 2)


def test_a_forward_that_is_called_by_hand_holds_sites() -> None:
    with fg.use({"relu": "reverse"}):
        x = sample()
        (grad,) = torch.autograd.grad(SetUpApart.forward(x).sum(), x)
    assert torch.equal(grad, torch.full((3,), -2.0))


def test_a_reentrant_checkpoint_counts_the_sites_of_its_forward() -> None:
    """PyTorch's own Function runs the model; what follows has the call indices that it has without a checkpoint."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.run: Callable[..., Any] = lambda block, x: block(x)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = self.run(torch.tanh, x + 0.1)
            return torch.tanh(x)

    model = Net()
    table = fg.RuleTable(
        [fg.on("tanh", call=call).backward("scale", s=float(call + 2)) for call in range(3)]
    )
    found = []
    for run in (model.run, functools.partial(checkpoint, use_reentrant=True)):
        model.run, x = run, sample()
        with fg.use(table, model=model) as block:
            model(x).sum().backward()
        found.append(x.grad)
        names = [d.site.name for d in fg.report(block).with_action("rewrite")]
        assert names == [f"<root>:tanh[{call}]" for call in range(3)]
    assert torch.equal(found[0], torch.full((3,), 24.0))
    assert torch.equal(*found)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 2 * grads[0]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return Double.apply(self.linear(Double.apply(x)).tanh())


@pytest.mark.parametrize("order", ["parameters in the same table", "in a block inside", "outside"])
def test_functions_and_parameters_have_rules_together(order: str) -> None:
    model, x = Twice(), torch.randn(2, 3, requires_grad=True)
    functions: Any = {Double: fg.rules.scale(s=5.0)}
    parameters: Any = {"params": fg.rules.scale(s=-1.0)}
    blocks = [fg.use(functions, model=model), fg.use(parameters, model=model)]
    if order == "parameters in the same table":
        blocks = [fg.use({**functions, **parameters}, model=model)]
    elif order == "outside":
        blocks.reverse()
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block)
        y = model(x)
    found = torch.autograd.grad(y.sum(), [x, *model.parameters()])
    g = torch.ones(2, 3) * 5 * (1 - (y / 2) ** 2)
    inner = 2 * x
    expected = [5 * g @ model.linear.weight, -(g.T @ inner), -g.sum(0)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.detach())
    assert torch.equal(model(x), y)  # nothing is left behind
    (native,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(native, (4 * (1 - (y / 2) ** 2) @ model.linear.weight).detach())


@pytest.mark.parametrize("inside", [True, False], ids=["in the block", "after the block"])
def test_the_calls_of_a_checkpoint_that_runs_again_have_the_same_numbers(inside: bool) -> None:
    model, x = Twice(), torch.randn(2, 3, requires_grad=True)
    table = fg.RuleTable([fg.on(type=Double, call=1).backward("scale", s=5.0)])

    def gradients(run: Any) -> list[Tensor]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(fg.use(table, model=model))
            y = run(x)
            if not inside:
                stack.close()
            return list(torch.autograd.grad(y.sum(), [x, *model.parameters()]))

    again = functools.partial(checkpoint, model, use_reentrant=False)
    assert all(map(torch.equal, gradients(again), gradients(model)))


def test_blocks_in_several_threads_do_not_pile_up() -> None:
    table = fg.RuleTable([fg.on(parameter="*weight").backward(fg.rules.scale(s=2.0))])
    before = torch.autograd.Function.__dict__["apply"]
    wrong: list[Any] = []

    def work() -> None:
        model, x = nn.Linear(3, 3), torch.randn(2, 3)
        for _ in range(120):
            with fg.use(table, model=model):
                y = Double.apply(model(x)).sum()
            (found,) = torch.autograd.grad(y, model.weight)
            if not torch.allclose(found, 4 * x.sum(0).expand(3, 3), atol=1e-5):
                wrong.append(found)

    def caught() -> None:
        try:
            work()
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=caught) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.autograd.Function.__dict__["apply"] is before


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(-3)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -3 * grads[0]


def test_a_function_that_writes_into_its_input_is_refused() -> None:
    x = torch.tensor([0.5, 2.0], requires_grad=True)
    with (
        pytest.raises(fg.RuleError, match="InPlace writes into its input"),
        fg.use({InPlace: fg.rules.rectangular(a=-1.0, b=1.0)}),
    ):
        InPlace.apply(x.clone())


# ---- Which input a rule is for, and either name of the backward ----------------------------------


class Gated(torch.autograd.Function):
    """A gate, which gets no gradient, and a value."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, x: Tensor) -> Tensor:
        return gate * torch.relu(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, 7.0 * grad


class Named(torch.autograd.Function):
    """A product, with the other name of its backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def vjp(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        return grad * b, grad * a


class Holds(nn.Module):
    def __init__(self, function: Any, held: Tensor) -> None:
        super().__init__()
        self.function = function
        if isinstance(held, nn.Parameter):
            self.held: Any = held
        else:
            self.register_buffer("held", held)

    def forward(self, x: Tensor) -> Tensor:
        inputs = (self.held, x) if self.function is Gated else (x, self.held)
        return self.function.apply(*inputs)  # type: ignore[no-any-return]


def ruled(way: str, model: nn.Module, rules: Any) -> tuple[Callable[[Tensor], Tensor], Any]:
    if way == "transform":
        gm = fg.transform(model, rules)
        return gm, gm
    block = fg.use(rules, model=model)
    return block(lambda x: model(x)), block


@pytest.mark.parametrize("way", ["transform", "use"])
def test_the_rule_is_for_the_first_tensor_that_is_no_buffer(way: str) -> None:
    model = Holds(Gated, torch.ones(3))
    run, reported = ruled(way, model, {Gated: fg.rules.scale(s=2.0)})
    x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
    (g,) = torch.autograd.grad(run(x).sum(), x)
    assert g.tolist() == [2.0, 2.0, 2.0]
    assert "keeps its own backward" not in str(fg.report(reported))


@pytest.mark.parametrize("way", ["transform", "use"])
def test_the_backward_of_a_function_can_have_its_other_name(way: str) -> None:
    model = Holds(Named, nn.Parameter(torch.tensor([2.0, 3.0, 4.0])))
    run, _ = ruled(way, model, {Named: fg.rules.scale(s=5.0), "params": fg.rules.scale(s=10.0)})
    x = torch.tensor([-1.0, 2.0, 3.0], requires_grad=True)
    found = torch.autograd.grad(run(x).sum(), [x, model.held])
    assert [g.tolist() for g in found] == [[5.0, 5.0, 5.0], [-10.0, 20.0, 30.0]]
