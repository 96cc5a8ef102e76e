"""The node of the C++ extension: the gradients of the formulas, and what PyTorch sees of it."""

from __future__ import annotations

import asyncio
import copy
import gc
import io
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from built_in import BUILT_IN, EXAMPLES
from freegrad_fx.backward.functions import gradient
from freegrad_fx.backward.observing import observed_by
from freegrad_fx.capture.direct import DIRECT, FUSED
from freegrad_fx.extension import library
from freegrad_fx.ops import decoupled, stop_gradient

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("extension")]

POINTWISE = [(name, values) for name, values in EXAMPLES if fg.get(name).declaration.pointwise]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.fc(x)).sigmoid())


TABLE = {"relu": fg.rules.rectangular(a=-1.0, b=0.5), "sigmoid": fg.rules.gaussian()}


@pytest.fixture
def gm() -> fg.CapturedModule:
    return fg.transform(Net(), TABLE)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 6)


def node_of(out: Tensor) -> Any:
    return out.grad_fn


def is_ours(node: Any) -> bool:
    return type(node) is library._Loaded.module.Node


def both(run: Callable[[], Any], gm: fg.CapturedModule | None = None) -> tuple[Any, Any]:
    """The result with the extension and without it, also in the generated code of a model."""
    torch.manual_seed(3)
    with_extension = run()
    library.switch(on=False)
    forwards = {} if gm is None else type(gm)._forwards
    before = dict(forwards)
    forwards.update(dict.fromkeys((DIRECT, FUSED), forwards[0]) if forwards else {})
    torch.manual_seed(3)
    try:
        return with_extension, run()
    finally:
        library.switch(on=True)
        forwards.update(before)


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    return [*torch.autograd.grad(module(x).square().sum(), [*module.parameters()])]


# --- the gradients ---


def inputs() -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients and inputs of many dtypes, layouts and sizes, with special numbers."""
    special = torch.tensor(
        [0.0, -0.0, 0.5, -0.5, 1.0, 1e-45, 1e38, torch.inf, -torch.inf, torch.nan]
    )
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        numbers = torch.cat([special, torch.randn(291)])
        yield torch.randn(301).to(dtype), numbers.to(dtype)
        yield special.flip(0).to(dtype), special.to(dtype)
    yield torch.randn(()), torch.randn(())
    yield torch.randn(0, 3), torch.randn(0, 3)
    yield torch.randn(3, 70).t(), torch.randn(3, 70).t()
    yield torch.randn(3, 70).t(), torch.randn(70, 3)
    yield torch.ones(()).expand(7, 9), torch.randn(7, 9)
    yield torch.randn(9).expand(7, 9), torch.randn(7, 9)
    yield torch.randn(7, 18)[:, ::2], torch.randn(7, 9)
    images = torch.randn(2, 2, 3, 5, 5)
    yield (
        images[0].to(memory_format=torch.channels_last),
        images[1].to(memory_format=torch.channels_last),
    )
    yield images[0], images[1].to(memory_format=torch.channels_last)


def test_pointwise_rules_give_the_bits_of_the_formula() -> None:
    for (name, values), (grad, x) in itertools.product(POINTWISE, inputs()):
        assert_bits_of_the_formula(fg.get(name)(**values), grad, x)


@pytest.mark.parametrize("threads", [1, 2])
def test_large_tensors_are_left_to_kernels_of_several_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        assert_bits_of_the_formula(fg.rules.arctan(), torch.randn(40_000), torch.randn(40_000))
    finally:
        torch.set_num_threads(1)


def assert_bits_of_the_formula(rule: fg.Rule, grad: Tensor, x: Tensor) -> None:
    leaf, y = x.clone(memory_format=torch.preserve_format), torch.relu(x)
    given = {"x": x, "y": y}
    expected = rule.backward(grad, **{name: given[name] for name in rule.inputs})
    out = decoupled(y, leaf.requires_grad_(), rule=rule)
    assert is_ours(out.grad_fn)
    (actual,) = torch.autograd.grad(out, leaf, grad)
    alike = (actual == expected) & (actual.signbit() == expected.signbit())
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert (alike | (actual.isnan() & expected.isnan())).all(), rule
    if grad.stride() == x.stride():
        assert actual.stride() == expected.stride()


MASKED = [
    name
    for name in BUILT_IN
    if fg.get(name).declaration.mask and not fg.get(name).declaration.random
]


def test_the_node_saves_masks_and_reads_them() -> None:
    nodes = set()
    for name, (grad, x) in itertools.product(MASKED, inputs()):
        rule = fg.get(name)(save="mask")
        if "operation" not in rule.kinds or rule.declaration.several:
            continue
        found = []
        for on in (True, False):
            library.switch(on=on)
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            out = decoupled(torch.relu(leaf.detach()), leaf, rule=rule)
            nodes |= {name} if is_ours(out.grad_fn) else set()
            saved = [*node_of(out).saved_tensors]
            found.append([*saved, *torch.autograd.grad(out, leaf, grad)])
        library.switch(on=True)
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True, msg=name)
        assert all(a.signbit().equal(b.signbit()) for a, b in zip(*found, strict=True)), name
    assert {"d(ReLU)", "rectangular", "clipped_straight_through"} <= nodes


@pytest.mark.parametrize("threads", [1, 2])
def test_masks_of_large_tensors(threads: int) -> None:
    rule, x, grad = fg.rules.rectangular(save="mask"), torch.randn(70_001), torch.randn(70_001)
    leaf = x.requires_grad_()
    torch.set_num_threads(threads)
    try:
        found = torch.autograd.grad(decoupled(x.detach(), leaf, rule=rule), leaf, grad)[0]
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found, torch.where((x >= -0.5) & (x <= 0.5), grad, 0))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_autograd_compiles_masks(x: Tensor) -> None:
    gm = fg.transform(Net(), {"relu": fg.rules.rectangular(save="mask")})
    expected = gradients(gm, x)
    loss = gm(x).square().sum()
    compiled = torch.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(compiled):
        loss.backward()
    torch.testing.assert_close([p.grad for p in gm.parameters()], expected)


def test_all_rules_give_the_gradients_of_the_function() -> None:
    for name in BUILT_IN:
        if "operation" not in fg.get(name).kinds:
            continue
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        for options in ({}, {"save": "bits"}) if fg.get(name).declaration.mask else ({},):
            gm, x = fg.transform(model, {"relu": fg.get(name)(**options)}), torch.randn(4, 6)
            a, b = both(lambda gm=gm, x=x: gradients(gm, x), gm)
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=name)


def calls_of_gradient(run: Callable[[], Any]) -> int:
    seen: list[bool] = []
    sys.setprofile(
        lambda frame, event, _: (
            seen.append(True) if frame.f_code is gradient.__code__ and event == "call" else None
        )
    )
    try:
        run()
    finally:
        sys.setprofile(None)
    return len(seen)


def test_both_ways_are_what_they_are_called(gm: fg.CapturedModule, x: Tensor) -> None:
    def nodes() -> list[bool]:
        node, found = gm(x).grad_fn, []
        while node is not None:
            found += [is_ours(node)] if node.name() == "_DecoupledBackward" else []
            node = next(
                (n for n, _ in node.next_functions if n and "Accumulate" not in n.name()), None
            )
        return found

    assert both(nodes, gm) == ([True, True], [False, False])


def test_python_runs_only_for_rules_without_a_program(gm: fg.CapturedModule, x: Tensor) -> None:
    gradients(gm, x)
    assert calls_of_gradient(lambda: gradients(gm, x)) == 1  # gaussian
    loss = gm(x).square().sum()
    second = lambda: torch.autograd.grad(loss, [*gm.parameters()], create_graph=True)  # noqa: E731
    assert calls_of_gradient(second) == 2


# --- what others see ---


def test_the_node_shows_what_that_of_the_function_shows(x: Tensor) -> None:
    def look() -> list[Any]:
        leaf, rule = x.clone().requires_grad_(), fg.rules.fast_sigmoid()
        out = decoupled(torch.relu(leaf.detach()), leaf, rule=rule, site="here")
        node = node_of(out)
        hooked: list[Tensor] = []
        node.register_prehook(lambda grads: hooked.extend(grads))
        node.register_hook(
            lambda new, old: hooked.extend([*[g for g in new if g is not None], *old])
        )
        out.backward(torch.ones_like(x))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            out.backward(torch.ones_like(x))
        words = [
            type(node).__name__, node.name(), isinstance(node, torch.autograd.graph.Node), node.call,
            node.needs_input_grad[:2], [f is None for f, _ in node.next_functions[:2]], node.metadata,
            out.is_leaf, out.requires_grad, out.grad_fn is node,
        ]  # fmt: skip
        return [words, [*hooked, leaf.grad]]

    a, b = both(look)
    assert a[0] == b[0]
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=0)


def test_functional_finds_the_rules(gm: fg.CapturedModule, x: Tensor) -> None:
    a, b = both(lambda: fg.functional.jvp(gm, x, torch.ones_like(x)), gm)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_changes_in_place_are_noticed(x: Tensor) -> None:
    def change() -> list[str]:
        found = []
        for rule, which in (("fast_sigmoid", "x"), ("d(ReLU)", "x"), ("rectangular", "out")):
            start = x.clone().requires_grad_() * 1
            out = decoupled(torch.relu(start.detach()), start, rule=rule)
            (start if which == "x" else out).mul_(2)
            try:
                out.sum().backward()
            except RuntimeError as error:
                found.append(str(error).partition(";")[0])
            else:
                found.append("fine")
        return found

    a, b = both(change)
    assert a == b
    assert "modified by an inplace operation" in a[0]
    assert a[2] == "fine"


def test_saved_tensors_pass_through_hooks_and_checkpoints(gm: fg.CapturedModule, x: Tensor) -> None:
    def run() -> list[Any]:
        packed: list[Any] = []
        pack = lambda t: (packed.append(tuple(t.shape)), t)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = gm(x).sum()
        found = [packed, *torch.autograd.grad(loss, [*gm.parameters()])]
        for reentrant in (False, True):
            inner = x.clone().requires_grad_()
            checkpoint(gm, inner, use_reentrant=reentrant).square().sum().backward()
            found.append(inner.grad)
        return found

    a, b = both(run, gm)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_transforms_and_second_derivatives(gm: fg.CapturedModule, x: Tensor) -> None:
    def run() -> list[Any]:
        inner = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(gm(inner).square().sum(), inner, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), inner)
        out = gm(inner)
        eye = torch.eye(3)[:, None].expand(3, 5, 3)
        batched = torch.autograd.grad(out, inner, eye, is_grads_batched=True, retain_graph=True)
        looped = [torch.autograd.grad(out, inner, e, retain_graph=True)[0] for e in eye]
        torch.testing.assert_close(batched[0], torch.stack(looped))
        of_one = torch.func.vmap(torch.func.grad(lambda one: gm(one).square().sum()))(x)
        jacobian = torch.func.jacrev(gm)(x[0])
        return [first, second, batched[0], of_one, jacobian]

    torch.testing.assert_close(*both(run, gm), rtol=0, atol=0)


def test_forward_mode_is_refused(x: Tensor) -> None:
    def message() -> str:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.clone().requires_grad_(), x)
            y = torch.relu(dual.detach())
            with pytest.raises(RuntimeError) as caught:
                decoupled(y, dual, rule="rectangular")
        return str(caught.value)

    a, b = both(message)
    assert a == b


def test_blocks_and_modes_act(gm: fg.CapturedModule, x: Tensor) -> None:
    class Noted(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []

    def run() -> list[Any]:
        names.clear()
        plain = Net()
        ambient = fg.transform(plain)
        with fg.native():
            found = [gradients(gm, x)]
        with fg.use("scale", {"s": 3.0}):
            found += [gradients(gm, x), gradients(ambient, x)]
        with fg.use(TABLE, model=plain):
            found.append(gradients(plain, x))
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(gm, x))
        with Noted():
            found.append(gradients(gm, x))
        with torch.no_grad():
            found.append([gm(x)])
        with torch.inference_mode():
            found.append([gm(x.clone())])
        with torch.autograd.detect_anomaly(check_nan=False):
            found.append(gradients(gm, x))
        return [found, list(names)]

    with pytest.warns(UserWarning, match="Anomaly Detection"):
        (a, ops_a), (b, ops_b) = both(run, gm)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert ops_a == ops_b


def test_observers_see_the_gradients(gm: fg.CapturedModule, x: Tensor) -> None:
    def run() -> list[Any]:
        seen: list[Any] = []
        with observed_by(seen, lambda site, gradient: seen.append((site, gradient))):
            loss = gm(x).square().sum()
        loss.backward()
        gradients(gm, x)
        return [[site for site, _ in seen], [gradient for _, gradient in seen]]

    a, b = both(run, gm)
    assert a[0] == b[0]
    assert len(a[0]) == 2
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=0)


def test_blocks_of_another_task_are_noticed(gm: fg.CapturedModule, x: Tensor) -> None:
    async def outer() -> None:
        with fg.native():
            await asyncio.create_task(inner())

    async def inner() -> None:
        await asyncio.sleep(0)
        gradients(gm, x)

    async def main() -> None:
        task = asyncio.create_task(inner())
        with fg.native():
            await task

    with pytest.raises(RuntimeError, match="asynchronous task"):
        asyncio.run(main())


def test_a_rule_that_is_registered_again_or_set_replaces_the_one_before(x: Tensor) -> None:
    @fg.register("mine", overwrite=True)
    def mine(grad: Tensor) -> Tensor:
        return grad * 2

    gm, native = fg.transform(nn.Sequential(nn.ReLU()), {"relu": "mine"}), torch.ones(5, 6)
    leaf = x.requires_grad_()
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(gm(leaf).sum(), leaf)[0], native * 2)

    @fg.register("mine", overwrite=True)
    def again(grad: Tensor) -> Tensor:
        return grad * 3

    assert torch.equal(torch.autograd.grad(gm(leaf).sum(), leaf)[0], native * 3)
    scaled = fg.transform(nn.Sequential(nn.ReLU()), {"relu": fg.rules.scale(s=2.0)})
    scaled.set_rule_parameter("relu", s=5.0)
    assert torch.equal(torch.autograd.grad(scaled(leaf).sum(), leaf)[0], native * 5)


def test_errors_of_formulas_name_the_site(x: Tensor) -> None:
    @fg.register("wrong", overwrite=True)
    def wrong(grad: Tensor) -> Tensor:
        return grad.sum()

    @fg.register("raises", overwrite=True)
    def raises(grad: Tensor) -> Tensor:
        raise ArithmeticError("no")

    for rule, error, text in (("wrong", fg.RuleError, "relu"), ("raises", ArithmeticError, "no")):
        gm, leaf = (
            fg.transform(nn.Sequential(nn.ReLU()), {"relu": rule}),
            x.clone().requires_grad_(),
        )
        with pytest.raises(error, match=text):
            gm(leaf).sum().backward()


def test_it_is_compiled_copied_saved_and_traced(gm: fg.CapturedModule, x: Tensor) -> None:
    def run() -> list[Any]:
        stored = io.BytesIO()
        torch.save(gm, stored)
        stored.seek(0)
        loaded = torch.load(stored, weights_only=False)
        made = [copy.deepcopy(gm), loaded, torch.fx.symbolic_trace(gm)]
        made += [torch.compile(gm, backend=b, fullgraph=True) for b in ("eager", "aot_eager")]
        return [gradients(m, x) for m in made]

    a, b = both(run, gm)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_autograd_compiles_the_rules(gm: fg.CapturedModule, x: Tensor) -> None:
    expected = gradients(gm, x)
    loss = gm(x).square().sum()
    with torch._dynamo.compiled_autograd._enable(
        torch.compile(backend="aot_eager", fullgraph=True)
    ):
        loss.backward()
    torch.testing.assert_close([p.grad for p in gm.parameters()], expected)


def test_threads_share_a_model(gm: fg.CapturedModule, x: Tensor) -> None:
    expected, found = gradients(gm, x), {}

    def work(number: int) -> None:
        for _ in range(20):
            found[number] = gradients(gm, x)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        torch.testing.assert_close(found[number], expected, rtol=0, atol=0)


def test_nothing_is_kept_alive(x: Tensor) -> None:
    gm = fg.transform(Net(), TABLE)
    leaf = x.clone().requires_grad_()
    saved = leaf * 1
    gone = [weakref.ref(saved), weakref.ref(gm)]
    out = decoupled(torch.relu(stop_gradient(saved)), saved, rule="fast_sigmoid")
    (gm(x).sum() + out.sum()).backward()
    del gm, saved, out
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_check_rule_finds_a_formula_that_is_not_pointwise() -> None:
    @fg.register("by shape", pointwise=True, reference="none")
    def by_shape(grad: Tensor) -> Tensor:
        """grad, or 2·grad in images"""
        return grad * 2.0 if grad.dim() == 4 else grad * 1.0

    with pytest.raises(fg.RuleCheckError, match=r"leave out pointwise=True"):
        fg.testing.check_rule(by_shape)
