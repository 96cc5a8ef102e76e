"""The rule exact_dropout: the bits of the original model, whose backward it leaves alone, and the mask as bits."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from freegrad_fx.errors import RuleError
from kept import Between, images

TABLE = {"dropout": "exact_dropout"}
Run = Callable[[Tensor], Tensor]


def step(run: Run, x: Tensor) -> tuple[Tensor, ...]:
    """The output, two gradients from one graph, a second derivative by the gradient, and the random state."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = run(x)
    state = torch.get_rng_state()
    grad = torch.linspace(-1, 1.3, y.numel()).to(y.dtype).view(y.shape).requires_grad_()
    (first,) = torch.autograd.grad(y, x, grad, create_graph=True)
    (again,) = torch.autograd.grad(y, x, grad.detach(), retain_graph=True)
    (second,) = torch.autograd.grad(first.sum(), grad)
    return y.detach(), first.detach(), again, second, state


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    pairs = list(zip(found, expected, strict=True))
    return all(torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Between(nn.Dropout(0.3))


@pytest.fixture(scope="module")
def gm(model: nn.Module) -> nn.Module:
    return fg.transform(model, TABLE)


X = images(6, 33)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_bits_are_those_of_the_original(
    gm: nn.Module, model: nn.Module, dtype: torch.dtype
) -> None:
    for x in (X, images(2, 3, 4, 5, last=True), X.t(), images(), images(0, 3), images(1)):
        assert same(step(gm, x.to(dtype)), step(model, x.to(dtype)))
    found = fg.memory(gm, X.to(dtype, copy=True).requires_grad_())
    assert (found.native, found.kept) == (X.numel() * dtype.itemsize, -(-X.numel() // 8))


def test_what_the_node_keeps_is_replaced(gm: nn.Module, model: nn.Module) -> None:
    for run, again in ((gm, pytest.raises(RuntimeError, match="already been set")), (model, None)):
        node: Any = run(X.clone().requires_grad_()).grad_fn.next_functions[0][0]
        with again or contextlib.nullcontext():
            node._raw_saved_other.register_hooks(lambda t: t, lambda t: t)


@pytest.mark.parametrize(
    "dropout",
    [
        nn.Dropout(0.0),
        nn.Dropout(1.0),
        nn.Dropout(0.3).eval(),
        nn.Dropout(0.3, inplace=True),
        nn.Dropout(0.0, inplace=True),
        nn.Dropout(0.3, inplace=True).eval(),
    ],
)
def test_other_dropouts_are_left_alone(dropout: nn.Module) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = dropout

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = x * mask  # what this saves has the form of a mask
            return self.dropout(x).sin() + x

    mask = (X > 0).float()
    original = Model().train(dropout.training)

    def run(model: Any) -> Run:
        return lambda x: model(x, mask)

    expected = step(run(original), X)
    for examples in (None, (X, mask)):
        found = fg.transform(original, TABLE, example_inputs=examples)
        assert same(step(run(found), X), expected)
        count = fg.memory(found, X.clone().requires_grad_(), mask)
        assert count.native == count.kept
    with fg.use(TABLE, model=original):
        assert same(step(run(original), X), expected)


def test_every_way_in(model: nn.Module, gm: nn.Module) -> None:
    expected = step(model, X)
    exported = fg.transform(model, TABLE, example_inputs=(X,))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(gm)))
    for run in (exported, copied):
        assert same(step(run, X), expected)
        assert fg.memory(run, X.clone().requires_grad_()).ratio < 1 / 30
    with fg.use(TABLE, model=model):
        assert same(step(model, X), expected)
        assert fg.memory(model, X.clone().requires_grad_()).ratio < 1 / 30


def test_where_others_look_at_what_is_saved_the_call_is_native(
    model: nn.Module, gm: nn.Module
) -> None:
    expected = step(model, X)
    assert same(step(lambda x: checkpoint(gm, x, use_reentrant=False), X), expected)
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert same(step(gm, X), expected)
    assert any(tensor.shape == X.shape for tensor in seen)
    torch.manual_seed(3)
    y, pull = torch.func.vjp(gm, X)
    assert torch.equal(y, expected[0])
    assert torch.equal(pull(torch.ones_like(y))[0] != 0, y != 0)


def test_a_checkpoint_in_a_model_does_not_run_again_to_be_counted() -> None:
    class Checkpointed(Between):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(1)
            return checkpoint(super().forward, x, use_reentrant=False)

    calls: list[int] = []
    checkpointed = Checkpointed(nn.Dropout(0.3))
    with fg.use(TABLE, model=checkpointed):
        found = fg.memory(checkpointed, X.clone().requires_grad_())
    assert (found.kept, len(calls)) == (found.native, 2)


def test_compiled_code_is_native(model: nn.Module, gm: nn.Module) -> None:
    for run in (
        fg.compile(model, TABLE, backend="aot_eager"),
        torch.compile(gm, backend="aot_eager", fullgraph=True),
    ):
        x = X.clone().requires_grad_()
        y = run(x)
        y.sum().backward()
        assert torch.equal(x.grad != 0, y != 0)


def test_the_mask_of_booleans_that_a_gpu_saves() -> None:
    """On the CPU, `native_dropout` is what a dropout calls on a GPU."""
    found = []
    for rule in (None, "exact_dropout"):
        torch.manual_seed(0)
        x = X.clone().requires_grad_()
        y = torch.native_dropout(x, 0.3, True)[0]
        node: Any = y.grad_fn
        if rule:
            y = fg.ops.decoupled(y, x, rule=rule, native=True)
        assert y.grad_fn is node
        found.append((y.detach(), node._saved_result1, *torch.autograd.grad(y.sin().sum(), x)))
    assert same(*found)


def test_rules_around_a_dropout_act() -> None:
    table = fg.RuleTable(
        [
            fg.on("dropout").backward("exact_dropout"),
            fg.on("dropout", at="output").backward("scale", s=2.0),
            fg.on("dropout", at="x").backward("scale", s=3.0),
        ]
    )
    original = nn.Sequential(nn.Tanh(), nn.Dropout(0.3))
    expected = step(original, X)
    for run in (fg.transform(original, table), original):
        with fg.use(table, model=original) if run is original else fg.use({}):
            found = step(run, X)
        torch.testing.assert_close(found[1], 6 * expected[1])
        assert torch.equal(found[0], expected[0])


def test_a_mask_that_is_none_is_not_packed() -> None:
    pack, unpack = fg.rules.exact_dropout.declaration.packs
    for other in ([0.0, 2.0, 3.0], [0.0, -0.0, 2.0], [0.0, -2.0], [0.0, torch.inf], [torch.nan]):
        tensor = torch.tensor(other).repeat(8)
        assert pack(tensor) is NotImplemented
    assert pack(torch.zeros(2, 16)[0]) is NotImplemented  # a part of other memory
    for tensor in (torch.zeros(16), torch.full((16,), 3.0), torch.ones(4, 4).bool().t()):
        assert torch.equal(unpack(pack(tensor)), tensor)


def test_what_a_function_in_python_saves_is_left_alone() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(torch.zeros_like(x))
            return 2 * x

    x = X.clone().requires_grad_()
    y = Double.apply(x)
    assert fg.ops.decoupled(y, x, rule="exact_dropout", native=True) is y


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def test_where_it_cannot_act_is_an_error() -> None:
    with pytest.raises(fg.PlanError, match="packs what one call has saved"):
        fg.explain(nn.Sequential(Norm()), {"rms_norm": "exact_dropout"})
    with pytest.raises(fg.PlanError, match="a composition cannot contain it"):
        fg.explain(nn.Dropout(0.3), {"dropout": fg.compose("exact_dropout", "half")})


@pytest.mark.parametrize(
    ("packs", "message"), [((abs,), "two functions"), ((abs, abs), r"Add `\*, f`")]
)
def test_packs_has_to_be_usable(packs: Any, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        fg.register("wrongly_packed", packs=packs, overwrite=True)(lambda grad: grad)
