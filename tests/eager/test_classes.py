"""Classes of modules and of autograd.Functions that a table selects, in `use` blocks around plain models."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg

THREE = fg.rules.scale(s=3.0)


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Any) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype) * slope

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * 0.5, (grad * (x > 0)).sum() if ctx.needs_input_grad[1] else None


class SpikeWithSetup(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.relu(x).sign()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.25


class Derived(Spike):
    pass


stored = Spike.apply


class Neuron(nn.Module):
    """A neuron with a surrogate of its own, called over time."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.slope = nn.Linear(4, 4).double(), nn.Parameter(torch.tensor(1.5).double())

    def forward(self, x: Tensor) -> Tensor:
        mem = torch.zeros_like(x)
        for step in range(x.shape[0]):
            mem = 0.9 * mem + self.f(x[step])
            mem = mem - stored(mem, self.slope) * 0.5 + SpikeWithSetup.apply(mem)
        return mem


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))


def sample() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_()


class ByHand(nn.Module):
    """`Neuron` with other backwards written into it."""

    def __init__(self, of: Neuron, spike: Any, with_setup: Any) -> None:
        super().__init__()
        self.f, self.slope = of.f, of.slope
        self.spike, self.with_setup = spike, with_setup

    def forward(self, x: Tensor) -> Tensor:
        mem = torch.zeros_like(x)
        for step in range(x.shape[0]):
            mem = 0.9 * mem + self.f(x[step])
            mem = mem - self.spike(mem, self.slope) * 0.5 + self.with_setup(mem)
        return mem


def with_surrogate(x: Tensor, y: Tensor, derivative: Tensor) -> Tensor:
    """The values of `y`, with the gradient of `x` given by a derivative."""
    return y + (x - x.detach()) * derivative.detach()


def triangular(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def test_a_surrogate_is_exchanged_in_a_time_loop_also_if_its_apply_is_stored() -> None:
    model, x = Neuron(), sample()

    def spike(x: Tensor, slope: Tensor) -> Tensor:
        return with_surrogate(x, (x > 0).to(x.dtype).detach() * slope, triangular(x))

    expected = gradients(ByHand(model, spike, SpikeWithSetup.apply), x)
    with fg.use({Spike: "triangular"}) as block:
        found = gradients(model, x)
    assert all(map(torch.allclose, found, expected))
    assert [d.site.spelling for d in fg.report(block).with_action("rewrite")] == ["Spike.apply"]
    native = gradients(model, x)
    assert not torch.allclose(native[0], found[0])


def test_a_function_with_a_context_set_up_apart() -> None:
    model, x = Neuron(), sample()

    def with_setup(x: Tensor) -> Tensor:
        return with_surrogate(x, (x > 0).to(x.dtype), 3.0 * triangular(x))

    expected = gradients(ByHand(model, Spike.apply, with_setup), x)
    table = {SpikeWithSetup: fg.compose("triangular", THREE)}
    with fg.use(table, model=model):
        found = gradients(model, x)
    assert all(map(torch.allclose, found, expected))


def test_sites_and_gradients_are_those_of_the_transform() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            return Derived.apply(self.f(Spike.apply(x, 1.0)), 2.0)

    model, x = Twice(), sample()
    for table in (
        fg.RuleTable([fg.on(type=Spike).backward("triangular")]),
        fg.RuleTable([fg.on(type=Derived).backward("triangular")]),
        fg.RuleTable([fg.on(type=nn.Linear).backward("straight_through")]),
    ):
        gm = fg.transform(model, table)
        with fg.use(table, model=model) as block:
            found = gradients(model, x)
        expected = torch.autograd.grad(
            gm(x).square().sum(), [x, *gm.parameters()], allow_unused=True
        )
        assert all(map(torch.equal, found, expected))
        seen, captured = (
            {d.site for d in plan.with_action("rewrite")}
            for plan in (fg.report(block), fg.report(gm))
        )
        assert seen == captured


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Spike.apply(x, 1.0).square().sum() + x.square().sum()


def test_second_derivatives_of_a_function() -> None:
    x, model, table = sample(), Squared(), {Spike: "arctan"}

    def twice(f: Any) -> Tensor:
        (first,) = torch.autograd.grad(f(x), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    with fg.use(table):
        found = twice(model)
    assert torch.allclose(found, twice(fg.transform(model, table)))
    assert not torch.allclose(found, torch.full_like(x, 2.0))


def test_an_input_changed_before_the_backward_is_refused() -> None:
    x = sample()
    with fg.use({Spike: "triangular"}):
        z = x * 1
        y = Spike.apply(z, 1.0)
        z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_input_that_no_rule_reads_may_change_and_is_not_kept() -> None:
    x = sample()
    with fg.use({Spike: "straight_through"}):
        z = x * 1
        y = Spike.apply(z, 1.0)
        kept = weakref.ref(z)
        z.sub_(y.detach())
        del z
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
    gc.collect()
    assert kept() is None


def test_a_checkpoint_recomputes_what_a_rule_reads() -> None:
    """The input of the Function lives as long as natively, and every saved tensor passes the hooks."""
    saved: list[Tensor] = []
    x = sample()
    with fg.use({Spike: "triangular"}), saved_tensors_hooks(_noting(saved), lambda t: t):
        h = x * 2
        y = Spike.apply(h, 1.0)
    assert any(t.shape == h.shape and torch.equal(t, h) for t in saved)
    expected = torch.autograd.grad(y.sum(), x)
    with fg.use({Spike: "triangular"}):
        z = checkpoint(lambda x: Spike.apply(x * 2, 1.0), x, use_reentrant=False)
    assert torch.equal(*torch.autograd.grad(z.sum(), x), *expected)


def _noting(saved: list[Tensor]) -> Any:
    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    return pack


def test_the_first_tensor_that_can_have_a_gradient_gets_the_rule() -> None:
    class Chosen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, mask: Tensor, x: Tensor) -> Tensor:
            ctx.save_for_backward(mask)
            return x * mask

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            (mask,) = ctx.saved_tensors
            return None, grad * mask

    x = sample()
    with fg.use({Chosen: THREE}):
        y = Chosen.apply(x > 0, x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 3.0))


def test_hooks_of_a_class_run_around_the_rule() -> None:
    class Power(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x**3

    class Further(Power):
        pass

    x = sample()
    for kind in (Power, Further):
        layer = kind()
        layer.register_forward_pre_hook(lambda m, args: (args[0] * 5,))
        layer.register_forward_hook(lambda m, args, out: out * 2)
        before = kind.__dict__.get("forward")
        with fg.use({Power: "straight_through"}) as block:
            y = layer(x)
        assert kind.__dict__.get("forward") is before
        assert torch.equal(y, (x * 5) ** 3 * 2)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(grad, torch.full_like(x, 10.0))
        assert [d.site.op for d in fg.report(block).decisions] == [kind.__name__]


def test_a_replaced_forward_of_an_in_place_class_writes_back_with_and_without_gradients() -> None:
    class InPlace(nn.Module):
        inplace = True

        def forward(self, x: Tensor) -> Tensor:
            return x.exp_()

    table = fg.RuleTable([fg.on(type=InPlace, forward="sign").backward("straight_through")])
    for mode in (torch.enable_grad, torch.no_grad):
        x = sample().detach()
        expected = x.sign()
        with mode(), fg.use(table):
            y = InPlace()(x)
        assert torch.equal(y, expected)
        assert torch.equal(x, expected)


class ComputesTanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


class ComputesTanhWithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return helper(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


def helper(x: Tensor) -> Tensor:
    return torch.tanh(x)


@pytest.mark.parametrize("function", [ComputesTanh, ComputesTanhWithSetup])
@pytest.mark.parametrize("learns", [True, False])
def test_the_operations_in_a_function_are_no_sites_and_are_not_counted(
    function: type[torch.autograd.Function], learns: bool
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(4, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                a = torch.tanh(x)  # a site, although gradients are disabled
            return torch.tanh(self.f(x) + function.apply(x) + a)

    model, x = Net(), sample().detach().requires_grad_(learns)
    table = fg.RuleTable([fg.on("tanh", call=1).backward(THREE)])
    with fg.use(table, model=model) as block:
        output = model(x)
    gm = fg.transform(model, table)
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), model.f.weight)[0] for y in (output, gm(x))
    )
    assert torch.equal(ours, theirs)
    assert [d.site.name for d in fg.report(block).decisions] == ["<root>:tanh[0]", "<root>:tanh[1]"]
    (opaque,) = fg.report(block).opaque
    assert function.__name__ in opaque.what
    assert opaque.reason == "keeps its own backward"
