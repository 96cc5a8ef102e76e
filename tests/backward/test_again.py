"""Inputs of convolutions that the backward computes again: the gradients of the original, from fewer bytes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from freegrad_fx.errors import RuleError
from kept import Run, gradients, images


class Block(nn.Module):
    """A residual block."""

    def __init__(self, inplace: bool, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2, self.relu = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.ReLU(inplace)
        self.inplace, self.change = inplace, change

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.inplace:
            y += x
        else:
            y = self.change(torch.add(y, x, alpha=0.5), x)
        return self.relu(y)


def unchanged(y: Tensor, x: Tensor) -> Tensor:
    return y


class Net(nn.Module):
    def __init__(
        self, inplace: bool = False, change: Callable[[Tensor, Tensor], Tensor] = unchanged
    ) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(*(Block(inplace, change) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2))  # type: ignore[no-any-return]


X = images(2, 3, 10, 10)
MAP = 2 * 6 * 4 * 4 * 4  # the bytes of an input of a block


def made(**given: Any) -> Net:
    torch.manual_seed(0)
    return Net(**given)


def table(recompute: int) -> fg.RuleTable:
    return fg.tables.save_memory(recompute=recompute, gates=[])


def by(way: str, model: nn.Module, rules: fg.RuleTable) -> Run:
    if way == "transform":
        return fg.transform(model, rules)
    if way == "export":
        return fg.transform(model, rules, example_inputs=(X,))
    if way == "compile":
        return fg.compile(model, rules, backend="aot_eager")

    def in_block(x: Tensor) -> Tensor:
        with fg.use(rules, model=model):
            return model(x)  # type: ignore[no-any-return]

    return in_block


def same(model: nn.Module, run: Run, x: Tensor = X) -> tuple[int, int]:
    """Assert that the output and the gradients are those of a model; return the bytes that both keep."""
    state = copy.deepcopy(model.state_dict())
    y, expected, before = gradients(model, model, x)
    buffers = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    found, grads, after = gradients(run, model, x)
    assert torch.equal(found, y)
    assert all(map(torch.equal, grads, expected))
    assert all(torch.equal(buffers[name], t) for name, t in model.state_dict().items())
    model.load_state_dict(state)
    return before, after


SLOW = [pytest.param(way, marks=pytest.mark.slow) for way in ("export", "compile")]


@pytest.mark.parametrize("way", ["transform", "use", *SLOW])
def test_every_way_in_gives_the_native_gradients(way: str) -> None:
    cases = ((True, True), (False, True), (True, False))
    for inplace, training in cases[:1] if way == "compile" else cases:
        model = made(inplace=inplace).train(training)
        before, after = same(model, by(way, model, table(8)))
        # the inputs of ReLUs and of convolutions; compiled code keeps what the compiler chooses
        assert before - after > 5 * MAP or way == "compile"


def test_the_number_of_operations_is_limited() -> None:
    model = made()
    kept = [same(model, fg.transform(model, table(count)))[1] for count in (1, 2, 3, 30)]
    # relu(norm(z)); with the pool, and with the sum of a block whose input is kept; with that of every block
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == 4
    assert kept[0] - kept[1] == 3 * MAP
    assert kept[1] - kept[2] >= MAP


@pytest.mark.parametrize(
    "change",
    [
        lambda y, x: y.mul_(1.5),
        lambda y, x: y * 1.5,
        lambda y, x: torch.cat([y[:, :3], x[:, 3:]], 1),
        lambda y, x: y.index_fill_(1, torch.tensor(2), 0.5),
    ],
)
def test_what_is_changed_on_the_way_is_kept(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = made(change=change)
    for way in ("transform", "use"):
        same(model, by(way, model, table(30)))


def test_hooks_that_change_an_output() -> None:
    model = made()
    gm = fg.transform(model, table(30))
    for where in (model, gm):
        where.blocks[0].relu.register_forward_hook(lambda module, given, output: output * 2)  # type: ignore[union-attr]
    same(model, gm)


def test_batch_norms_without_running_statistics() -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False))
    net[0].bias = None
    before, after = same(net, fg.transform(net, table(2)))
    assert before - after == 2 * 4 * 8 * 8 * 4 * 31 // 32


@pytest.mark.parametrize("op", ["relu", "gelu"])
def test_an_output_of_another_operation_is_kept(op: str) -> None:
    """The rule is not at its operation, or the operation has another forward."""
    act = nn.ReLU() if op == "relu" else nn.GELU()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 3))
    forward = "heaviside" if op == "relu" else None
    first = fg.RuleTable([fg.on(op).backward("exact_relu", forward=forward)])
    x = images(2, 3, 8, 8)
    expected, found = (
        gradients(fg.transform(net, rules), net, x)[1] for rules in (first, first + table(8))
    )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def test_second_derivatives_are_native() -> None:
    model = made().double()

    def second(run: Run) -> Tensor:
        x = X.double().requires_grad_()
        (grad,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    expected = second(model)
    found = second(fg.transform(model, table(8)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    model = made()

    def run(net: nn.Module) -> list[Tensor]:
        x = X.clone().requires_grad_()
        model.zero_grad()
        checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
        return [x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    state = copy.deepcopy(model.state_dict())
    expected = run(model)
    model.load_state_dict(state)
    assert all(map(torch.equal, run(fg.transform(model, table(8))), expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_channels_last(dtype: torch.dtype) -> None:
    last = torch.channels_last
    model = made().to(dtype).to(memory_format=last)
    same(model, fg.transform(model, table(8)), X.to(dtype).to(memory_format=last))


def test_a_write_into_a_parameter_before_the_backward_is_an_error() -> None:
    model = made()
    loss = fg.transform(model, table(8))(X).sum()
    with torch.no_grad():
        model.blocks[0].bn1.bias.add_(1)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_running_statistics_that_a_later_forward_writes() -> None:
    def run(model: nn.Module) -> list[Tensor]:
        out = model.eval()(X)
        model.train()(X)
        return [*torch.autograd.grad(out.square().sum(), [*model.parameters()])]

    model = made()
    gm = fg.transform(copy.deepcopy(model), table(8))
    for found, expected in zip(run(gm), run(model), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("way", ["python", pytest.param("extension", marks=pytest.mark.slow)])
def test_nothing_is_held_after_the_backward(way: str, request: pytest.FixtureRequest) -> None:
    if way == "extension":
        request.getfixturevalue("extension")

    def held(run: Run) -> int:
        for _ in range(3):
            out = run(X)
            out.sum().backward()
        return sum(type(o) is Tensor and o.shape[:2] == (2, 6) for o in gc.get_objects())

    model = made()
    model.blocks = model.blocks[:1]
    gms = [fg.transform(model, table(recompute)) for recompute in (0, 8)]
    for gm in gms:
        gm(X).sum().backward()
    gc.collect()
    gc.freeze()  # what is there already is not listed
    gc.disable()
    try:
        assert [held(run) for run in (model, *gms)] == [1, 1, 1]
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_parameter_without_memory_is_an_error() -> None:
    """As with FSDP, which frees the parameters of a block after its forward."""
    model = made()
    loss = fg.transform(model, table(8))(X).sum()
    model.blocks[2].bn1.weight.untyped_storage().resize_(0)  # type: ignore[union-attr]
    with pytest.raises(RuleError, match=r"of batch_norm has no memory.*leave out recompute="):
        loss.backward()


def test_the_count_of_what_is_kept_leaves_out_what_is_computed_again() -> None:
    """The count saves aliases, so that no backward keeps the operands themselves."""
    parts = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    gm = fg.transform(nn.Sequential(*parts), fg.tables.save_memory(recompute=4))
    found = fg.memory(gm, torch.randn(2, 3, 9, 9))
    assert [site.site for site in found.rows if "conv" in site.site] == []
    assert found.kept < 0.6 * found.native
