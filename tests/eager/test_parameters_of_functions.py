"""Parameters that an autograd.Function takes, in `use` blocks: the rule gets the whole gradient of the parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from parameter_models import whole

CLIP = fg.rules.clip_norm(max_norm=0.1)
CLIPPED = whole("clip_norm", max_norm=0.1)


class Scaled(torch.autograd.Function):
    """Its own gradient, so that only its backward tells it from a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return 2 * grad * w, (3 * grad * x).sum(0)


class ScaledWithSetup(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return 2 * grad * w, (3 * grad * x).sum(0)


class Overriding(Scaled):
    @classmethod
    def apply(cls, *args: Any) -> Any:  # type: ignore[override]
        return super().apply(*args)


class Layer(nn.Module):
    """A parameter that a Function takes, and one that functions of PyTorch take too."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.function.apply(x, self.w)
        return self.function.apply(x, self.v) + x * self.v


def gradients(call: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(call(x).square().sum(), [x, *model.parameters()]))


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(3)
    return torch.randn(5, 4).requires_grad_()


@pytest.mark.parametrize("function", [Scaled, ScaledWithSetup, Overriding])
@pytest.mark.parametrize("with_model", [False, True])
def test_the_whole_gradient_gets_the_rule(function: Any, with_model: bool, x: Tensor) -> None:
    model = Layer(function)
    native = gradients(model, model, x)
    with fg.use({"params": CLIP}, model=model) if with_model else fg.use(CLIP, scope="params"):
        found = gradients(model, model, x)
    assert torch.equal(found[0], native[0])
    for f, n, parameter in zip(found[1:], native[1:], model.parameters(), strict=True):
        torch.testing.assert_close(f, CLIPPED(n, parameter))
    assert torch.autograd.Function.apply.__qualname__.endswith("apply")
    assert all(map(torch.equal, gradients(model, model, x), native))


@pytest.mark.parametrize("function", [Scaled, ScaledWithSetup])
def test_a_replaced_forward_reaches_the_function(function: Any, x: Tensor) -> None:
    model = Layer(function)
    table = fg.RuleTable([fg.on("params", forward="sign").backward("straight_through")])
    with fg.use(table, model=model):
        y = model(x)
        with torch.no_grad():
            assert torch.equal(model(x), y)
    w, v = model.w.sign(), model.v.sign()
    assert torch.equal(y, x * w * v + x * w * v)


@pytest.mark.parametrize("function", [Scaled, ScaledWithSetup])
def test_an_apply_that_was_stored_before_is_refused(function: Any, x: Tensor) -> None:
    class Stores(Layer):
        stored = function.apply

        def forward(self, x: Tensor) -> Tensor:
            return type(self).stored(x, self.w) * self.v

    model = Stores(function)
    with (
        pytest.raises(
            fg.RuleError, match=r"'w' has a rule and is given to .*transform\(model, rules\)"
        ),
        fg.use({"params": CLIP}, model=model),
    ):
        model(x)
    table = fg.RuleTable([fg.on(parameter="v").backward(CLIP)])
    with fg.use(table, model=model):  # w has no rule
        model(x).sum().backward()
    with fg.use({"params": CLIP}, model=model), torch.no_grad():
        model(x)
    gm = fg.transform(model, {"params": CLIP})
    expected = CLIPPED(torch.autograd.grad(model(x).sum(), model.w)[0], model.w)
    torch.testing.assert_close(torch.autograd.grad(gm(x).sum(), model.w)[0], expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_given_the_parameter(reentrant: bool, x: Tensor) -> None:
    class Checkpointed(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(torch.mul, x, self.w, use_reentrant=reentrant)
            return y + checkpoint(torch.mul, x, self.v, use_reentrant=reentrant) * self.w

    def pulled(y: Tensor) -> list[Tensor]:
        model.zero_grad()
        y.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    model = Checkpointed(Scaled)
    native = pulled(model(x))
    with fg.use({"params": CLIP}, model=model):
        y = model(x)
    for f, n, parameter in zip(pulled(y), native, model.parameters(), strict=True):
        torch.testing.assert_close(f, CLIPPED(n, parameter))


def test_modules_that_do_not_run_do_not_warn(x: Tensor) -> None:
    """As the auxiliary classifiers of a network in evaluation, or experts that the data does not choose."""

    class Chooses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Chooses()
    with fg.use({"params": CLIP}, model=model) as block:
        model(x)
    assert [d.site.path for d in fg.report(block).decisions] == ["used", "used"]


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_parameter_that_only_a_script_takes_warns(x: Tensor) -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(4, 4, bias=False)), nn.Linear(4, 4))
    with (
        pytest.warns(fg.FreegradWarning, match="0.weight keeps its backward"),
        fg.use({"params": CLIP}, model=model),
    ):
        model(x)


def test_transforms_of_functions_give_the_rule_once(x: Tensor) -> None:
    model = Layer(ScaledWithSetup)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, x.detach()).square().sum()

    def row(x: Tensor) -> Tensor:
        return model(x[None]).square().sum()

    native = torch.func.grad(loss)(weights)
    rows = torch.func.vmap(torch.func.grad(row))(x.detach())
    with fg.use({"params": fg.rules.scale(s=3.0)}, model=model):
        found = torch.func.grad(loss)(weights)
        assert torch.equal(torch.func.vmap(torch.func.grad(row))(x.detach()), rows)
    for name, gradient in native.items():
        torch.testing.assert_close(found[name], 3.0 * gradient)


# Dynamo reads the gradients of its inputs after a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("door", ["plain", "compile", "transform"])
@pytest.mark.filterwarnings("ignore:scale.* got no site")
def test_compiled_code_gives_the_rule_once(door: str, x: Tensor) -> None:
    """That of the block in a plain model, and that of its own table in another one, also in one graph."""
    model = Layer(Scaled)
    table = {"params": fg.rules.scale(s=3.0)}
    native = gradients(model, model, x)
    torch._dynamo.reset()
    if door == "compile":
        compiled: Any = fg.compile(model, table, backend="eager", fullgraph=True)
    elif door == "transform":
        compiled = torch.compile(fg.transform(model, table), backend="eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="eager")
    factor = 10.0 if door == "plain" else 3.0
    for _ in range(2):
        with fg.use(fg.rules.scale(s=10.0), scope="params", model=model):
            found = gradients(compiled, model, x)
        for f, n, s in zip(found, native, (1.0, factor, factor), strict=True):
            torch.testing.assert_close(f, s * n)
