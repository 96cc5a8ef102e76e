"""What goes wrong while a model with rules trains: nothing is half-changed, and the next step is right."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
import models
from freegrad_fx import context
from freegrad_fx._torch.replacing import replacements

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def make(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def transformed(net: nn.Module, rules: Any) -> Callable[[Tensor], Tensor]:
    return fg.transform(net, rules)


def exported(net: nn.Module, rules: Any) -> Callable[[Tensor], Tensor]:
    return fg.transform(net, rules, example_inputs=(X,))


def compiled(net: nn.Module, rules: Any) -> Callable[[Tensor], Tensor]:
    return fg.compile(net, rules, backend="aot_eager")


def in_block(net: nn.Module, rules: Any) -> Callable[[Tensor], Tensor]:
    block = fg.use(rules, model=net)

    def run(x: Tensor) -> Tensor:
        with block:
            return net(x)

    return run


WAYS = [
    transformed,
    in_block,
    pytest.param(exported, marks=pytest.mark.slow),
    pytest.param(compiled, marks=pytest.mark.slow),
]


def step(net: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor = X) -> dict[str, Tensor]:
    net.zero_grad()
    run(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def global_state() -> tuple[Any, ...]:
    return (
        *(context._state.blocks, context._entered.get(), torch.is_grad_enabled()),
        *(torch.overrides._get_current_function_mode_stack(), len(replacements())),
    )


# ---- Rules that raise ----------------------------------------------------------------------------

FAILS: list[BaseException] = []


@fg.register("fails_at_times")
def fails_at_times(grad: Tensor, *, s: float | Tensor = 3.0) -> Tensor:
    if FAILS:
        raise FAILS[0]
    return grad * s


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["relu", "params"])
def test_after_a_rule_that_raises_the_next_backward_is_right(way: Any, where: str) -> None:
    net = make()
    expected = step(net, transformed(net, {where: fg.rules.scale(s=3.0)}))
    before = global_state()
    run = way(net, {where: fails_at_times})
    FAILS.append(ValueError("this time"))
    try:
        with pytest.raises(Exception, match="this time"):
            step(net, run)
    finally:
        FAILS.clear()
    assert global_state()[:4] == before[:4]
    torch.testing.assert_close(step(net, run), expected)


def test_a_graph_whose_backward_raised_can_be_walked_again() -> None:
    net = make()
    expected = step(net, transformed(net, {"relu": fg.rules.scale(s=3.0)}))
    loss = transformed(net, {"relu": fails_at_times})(X).square().sum()
    FAILS.append(ValueError("this time"))
    with pytest.raises(ValueError, match="this time"):
        loss.backward(retain_graph=True)
    FAILS.clear()
    net.zero_grad()
    loss.backward()
    torch.testing.assert_close({n: p.grad for n, p in net.named_parameters()}, expected)


@pytest.mark.parametrize("way", [transformed, in_block])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
    ],
)
def test_an_error_that_is_caught_by_its_class_keeps_it(way: Any, error: BaseException) -> None:
    """Also where the rule has a tensor for a parameter, whose shape other errors are put down to."""
    net = make()
    run = way(net, {"relu": fails_at_times(s=torch.full((6,), 3.0))})
    FAILS.append(error)
    try:
        with pytest.raises(type(error)) as raised:
            step(net, run)
    finally:
        FAILS.clear()
    assert type(raised.value) is type(error)
    torch.testing.assert_close(
        step(net, run), step(net, transformed(net, {"relu": fg.rules.scale(s=3.0)}))
    )


# ---- Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [transformed, in_block])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_stay_what_they_are(way: Any, value: float) -> None:
    net = make()
    x = X.clone()
    x[0, 0] = value
    relu = models.naive(F.relu, models.fast_sigmoid(2.0))
    by_hand = step(net, lambda x: net.second(relu(net.first(x))), x)
    found = step(net, way(net, {"relu": fg.rules.fast_sigmoid(slope=2.0)}), x)
    torch.testing.assert_close(found, by_hand, equal_nan=True)


def test_an_overflow_in_half_precision_reaches_the_scaler() -> None:
    net = make()
    gm = fg.transform(net, {"relu": fg.rules.fast_sigmoid(slope=2.0), "params": "straight_through"})
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**17, growth_interval=10**6)
    skipped, before = 0, copy.deepcopy(net.state_dict())
    while scaler.get_scale() > 2.0**8:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = gm(X).square().sum()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == scale:
            break
        skipped += 1
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert skipped > 0
    assert all(p.isfinite().all() for p in net.parameters())
    assert not torch.equal(net.first.weight, before["first.weight"])


# ---- Interrupts ----------------------------------------------------------------------------------


def interrupted(action: Callable[[], Any], chosen: Callable[[str], bool]) -> bool:
    """Raise `KeyboardInterrupt` at the first chosen call of a function of the package, and tell if there was one."""

    def watch(frame: Any, event: str, argument: Any) -> None:
        code = frame.f_code
        if "freegrad_fx" in code.co_filename and chosen(code.co_qualname):
            sys.settrace(None)
            raise KeyboardInterrupt

    sys.settrace(watch)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


RULES: dict[str, Any] = {"relu": fg.rules.scale(s=3.0), "params": fg.rules.scale(s=2.0)}


def enter_block(net: nn.Module) -> None:
    with fg.use(RULES | {nn.Linear: None}, model=net):
        net(X)


ACTIONS: dict[str, tuple[Callable[[nn.Module], Any], list[str]]] = {
    "transform": (
        lambda net: fg.transform(net, RULES),
        [
            "Tracer.trace",
            "make_plan",
            "Surgery.decoupled",
            "insert_marks",
        ],
    ),
    "example_inputs": (
        lambda net: fg.transform(net, RULES, example_inputs=(X,)),
        ["make_plan"],
    ),
    "use": (
        enter_block,
        ["Observed.classes", "_wanted", "parameters_swapped_in", "_decisions", "run"],
    ),
}


@pytest.mark.parametrize(
    ("way", "where"),
    [
        pytest.param(way, where, marks=pytest.mark.slow if way == "example_inputs" else ())
        for way, (_, places) in ACTIONS.items()
        for where in places
    ],
)
def test_an_interrupt_leaves_nothing_half_changed(way: str, where: str) -> None:
    net = make()
    action, _ = ACTIONS[way]
    action(net)  # what lasts for the process is installed once
    state, attributes = copy.deepcopy(net.state_dict()), [vars(m).copy() for m in net.modules()]
    before, random = global_state(), torch.random.get_rng_state()
    assert interrupted(lambda: action(net), lambda name: name.endswith(where)), where
    assert global_state() == before
    assert torch.equal(torch.random.get_rng_state(), random)
    torch.testing.assert_close(net.state_dict(), state, rtol=0, atol=0)
    assert [vars(m).keys() for m in net.modules()] == [a.keys() for a in attributes]
    expected = step(net, transformed(net, RULES))
    torch.testing.assert_close(step(net, in_block(net, RULES)), expected)


def test_an_interrupt_in_a_forward_ends_its_block() -> None:
    def interrupts(*_: Any) -> None:
        raise KeyboardInterrupt

    net = make()
    before = global_state()
    handle = net.second.register_forward_pre_hook(interrupts)
    with pytest.raises(KeyboardInterrupt):
        in_block(net, RULES)(X)
    handle.remove()
    assert global_state() == before
    native = step(net, net)
    torch.testing.assert_close(
        step(net, in_block(net, {"params": fg.rules.scale(s=2.0)})),
        {name: 2.0 * g for name, g in native.items()},
    )


# ---- Threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [transformed, in_block])
def test_two_threads_train_two_models_with_different_rules(way: Any) -> None:
    def train(seed: int) -> dict[str, Tensor]:
        net = make_of[seed]
        rules = {
            "relu": fg.rules.fast_sigmoid(slope=1.0 + seed),
            "params": fg.rules.scale(s=1.0 + seed),
        }
        run = way(net, rules)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(8):
            step(net, run)
            optimizer.step()
        return {name: p.detach().clone() for name, p in net.named_parameters()}

    make_of = {seed: make(seed) for seed in range(2)}
    alone = {seed: train(seed) for seed in range(2)}
    make_of = {seed: make(seed) for seed in range(2)}
    found: dict[int, dict[str, Tensor]] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: train(seed)}))
        for seed in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, alone, rtol=0, atol=0)


# ---- Size ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_deeper_than_the_recursion_limit() -> None:
    depth = sys.getrecursionlimit() + 200
    net = nn.Sequential(*(nn.ReLU() for _ in range(depth)))
    gm = fg.transform(net, {"relu": fg.rules.scale(s=-1.0)})
    assert f"0-{depth - 1}:relu[0] ×{depth} " in str(fg.report(gm))
    assert fg.report(gm).to_text(fold=False).count("relu[0]") == depth
    assert len(fg.explain(net, {"relu": "straight_through"}).decisions) == depth
    block = fg.use({"relu": fg.rules.scale(s=-1.0)}, model=net)

    def in_the_block(x: Tensor) -> Tensor:
        with block:
            return net(x)

    for run in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), in_the_block):
        x = torch.tensor([2.0, 3.0], requires_grad=True)
        (g,) = torch.autograd.grad(run(x).sum(), x)
        assert g.tolist() == [1.0, 1.0]  # an even number of signs
