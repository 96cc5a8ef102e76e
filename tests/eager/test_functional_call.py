"""`torch.func.functional_call` in `use` blocks: the tensors that it swaps in take the roles of the parameters."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import freegrad_fx as fg
from freegrad_fx.eager.names import ParameterNames
from parameter_models import whole

CLIP, CLIPPED = fg.rules.clip_norm(max_norm=0.1), whole("clip_norm", max_norm=0.1)
THREE = fg.rules.scale(s=3.0)


class Net(nn.Module):
    """A weight with two names, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.second(self.tied(self.second(x)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(2)
    return Net()


def other_weights(model: nn.Module, kind: Any = Tensor) -> dict[str, Tensor]:
    new = {name: torch.randn_like(p).requires_grad_() for name, p in model.named_parameters()}
    return {name: kind(tensor) for name, tensor in new.items()} if kind is nn.Parameter else new


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
    y = functional_call(model, weights, X)
    return torch.autograd.grad(y.square().sum(), list(weights.values()))


@pytest.mark.parametrize("kind", [Tensor, nn.Parameter])
@pytest.mark.parametrize("with_model", [False, True])
def test_tensors_get_the_rules_of_the_parameters(net: Net, kind: Any, with_model: bool) -> None:
    weights = other_weights(net, kind)
    native = gradients(net, weights)
    with fg.use({"params": CLIP}, model=net) if with_model else fg.use(CLIP, scope="params"):
        found = gradients(net, weights)
    for f, n, weight in zip(found, native, weights.values(), strict=True):
        torch.testing.assert_close(f, CLIPPED(n, weight))
    assert all(map(torch.equal, gradients(net, weights), native))


def test_a_table_selects_them_by_the_names_of_the_parameters(net: Net) -> None:
    weights = other_weights(net)
    native = dict(zip(weights, gradients(net, weights), strict=True))
    table = fg.RuleTable([fg.on(parameter="tied.weight").backward(THREE)])
    with fg.use(table, model=net) as block:
        found = gradients(net, weights)
    for name, gradient in zip(weights, found, strict=True):
        factor = 3.0 if name == "first.weight" else 1.0
        torch.testing.assert_close(gradient, factor * native[name])
    (decision,) = fg.report(block).with_action("rewrite")
    assert decision.site.names == ("first.weight", "tied.weight")


def test_a_part_of_a_model_can_be_called_with_other_weights(net: Net) -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    given = {"weight": weight, "bias": torch.zeros(4)}
    with fg.use({"params": THREE}, model=net):
        y = functional_call(net.second, given, X)
    (found,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(found, 3.0 * X.sum(0).expand(4, 4))


def test_a_replaced_forward_gets_the_tensor(net: Net) -> None:
    weights = other_weights(net)
    table = fg.RuleTable([fg.on("params", forward="sign").backward("straight_through")])
    with fg.use(table, model=net):
        y = functional_call(net, weights, X)
    signs = {name: weight.detach().sign() for name, weight in weights.items()}
    assert torch.equal(y, functional_call(net, signs, X))


def test_transforms_of_functions_give_them_the_rules(net: Net) -> None:
    """Of a gradient, and of one gradient for each model of an ensemble."""
    weights = {name: w.detach() for name, w in other_weights(net).items()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(net, weights, X).square().sum()

    native = grad(loss)(weights)
    with fg.use({"params": THREE}, model=net):
        found = grad(loss)(weights)
    for name in weights:
        torch.testing.assert_close(found[name], 3.0 * native[name])
    models = [nn.Linear(4, 3), nn.Linear(4, 3)]
    stacked, _ = stack_module_state(models)
    base = nn.Linear(4, 3)

    def each(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return grad(lambda w: functional_call(base, w, X).square().sum())(weights)

    expected = vmap(each)(stacked)
    with fg.use({"params": THREE}, model=base):
        found = vmap(each)(stacked)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], 3.0 * gradient)


def test_an_inner_step_is_differentiated_through(net: Net) -> None:
    """As in meta-learning: the weights of the second call have a graph of their own, and are not kept."""
    start = dict(net.named_parameters())

    def adapted(factor: float) -> tuple[list[Tensor], list[Any]]:
        loss = functional_call(net, start, X).square().sum()
        steps = torch.autograd.grad(loss, list(start.values()), create_graph=True)
        fast = {n: p - 0.1 * factor * s for (n, p), s in zip(start.items(), steps, strict=True)}
        outer = functional_call(net, fast, X).sin().sum()
        found = torch.autograd.grad(outer, list(fast.values()))
        return [s.detach() for s in steps] + list(found), [weakref.ref(t) for t in fast.values()]

    native, _ = adapted(3.0)
    with fg.use({"params": THREE}, model=net):
        found, alive = adapted(1.0)
        net(X)  # a block knows the last call of its model
        gc.collect()
        assert not any(ref() is not None for ref in alive)
    for f, n in zip(found, native, strict=True):
        torch.testing.assert_close(f, 3.0 * n, rtol=1e-4, atol=1e-4)


def test_a_compiled_call_acts_too(net: Net) -> None:
    weights = other_weights(net)
    native = gradients(net, weights)
    compiled = torch.compile(lambda w: functional_call(net, w, X), backend="eager")
    with fg.use({"params": THREE}, model=net):
        y = compiled(weights)
    found = torch.autograd.grad(y.square().sum(), list(weights.values()))
    for f, n in zip(found, native, strict=True):
        torch.testing.assert_close(f, 3.0 * n)


def test_a_parameter_that_is_exchanged_later_has_the_rule_of_the_other(net: Net) -> None:
    block = fg.use({"params": THREE}, model=net)
    with block:
        net(X)
    new = {name: torch.randn_like(p) for name, p in net.state_dict().items()}
    new["tied.weight"] = new["first.weight"]
    net.load_state_dict(new, assign=True)
    weights = list(net.parameters())
    with block:
        y = net(X)
    found = torch.autograd.grad(y.square().sum(), weights)
    native = torch.autograd.grad(net(X).square().sum(), weights)
    torch.testing.assert_close(found, tuple(3.0 * g for g in native))
    assert {d.action for d in fg.report(block).decisions if d.site.kind == "parameter"} == {
        "rewrite"
    }


def test_tensors_of_earlier_calls_are_not_remembered() -> None:
    model = nn.Linear(2, 2)
    names = ParameterNames(model)
    for _ in range(3):
        model.weight = nn.Parameter(torch.ones(2, 2))
        names.new_call()
        assert names.of(model.weight) == ("weight",)
    assert len(names._known) == 2
