"""Ambient rules: which blocks act on which sites, when, in which thread, and in compiled code.

References: the original model; the original under `sweep.Interception`, which exchanges activations for naive ones; its
native gradients put through a rule's formula by hand; and cases written by hand in `test_inplace`.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
import inplace_cases as inplace
import runs
from freegrad_fx.context import outside_of_blocks
from models import naive
from places import IMPORTABLE
from sweep import Interception

RECTANGULAR = fg.rules.rectangular(a=-0.4, b=0.6)


def rectangular(grad: Tensor, x: Tensor) -> Tensor:
    return grad * ((x >= -0.4) & (x <= 0.6))


# `tests/eager/test_threads.py` tests the warning
NO_RULES_IN_A_THREAD = pytest.mark.filterwarnings("ignore:the thread .* was started in a use")


@pytest.fixture(autouse=True)
def _every_block_is_left() -> Iterator[None]:
    yield
    assert gradients(fg.transform(NET), X) == gradients(NET, X)


class Net(nn.Module):
    """Activations as modules and as functions, in place and not, and parameters in several kinds of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 2, 3, padding=1), nn.BatchNorm1d(2)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(8, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        x = self.relu(self.norm(self.conv(x[:, None]))).flatten(1)
        return torch.tanh(self.second(x))


torch.manual_seed(4)
NET, X = Net(), torch.randn(5, 4)


class Gradients(list[Tensor]):
    """Equal if they are so bit for bit."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, list) and all(map(torch.equal, self, other))

    __hash__ = None  # type: ignore[assignment]


def gradients(model: Callable[[Tensor], Tensor], x: Tensor, of: nn.Module = NET) -> Gradients:
    """The gradients of a model; those of the original are the reference, on which no block acts."""
    with outside_of_blocks() if model is NET else nullcontext():
        return backward(model(x), of)


def backward(y: Tensor, of: nn.Module = NET) -> Gradients:
    return Gradients(torch.autograd.grad(runs.loss([y]), list(of.parameters())))


def intercepted(formula: Callable[[Tensor, Tensor], Tensor] = rectangular) -> Gradients:
    with Interception(formula):
        return gradients(NET, X)


def scaled(s: float, of: Gradients | None = None) -> Gradients:
    """What a rule for all parameters makes of the native gradients."""
    return Gradients(g * s for g in (gradients(NET, X) if of is None else of))


def close(a: Gradients, b: Gradients) -> bool:
    return all(torch.allclose(g, h, rtol=1e-4, atol=1e-5) for g, h in zip(a, b, strict=True))


def three(grad: Tensor, x: Tensor) -> Tensor:
    return grad * 3.0


# --- what acts where ---

# A block acts on every activation, and these cases written by hand put a rule on their relus alone.
ONLY_RELU = [case for case in inplace.CASES if case.name != "other_activations_in_place"]


@pytest.mark.sampled(6)
@inplace.CASE
def test_outside_of_blocks_nothing_changes(case: inplace.Case) -> None:
    model = inplace.Written(case.original)
    expected = inplace.observe(model, inplace.with_x(model))
    actual = inplace.observe(model, inplace.with_x(fg.transform(model)))
    inplace.assert_same_values(actual, expected)
    if not expected.error:  # a copy may save what autograd refuses of the original
        inplace.assert_same_backward(actual, expected)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("rule", inplace.RULES)
@pytest.mark.parametrize("case", ONLY_RELU, ids=lambda case: case.name)
def test_in_a_block_the_rule_acts_as_in_the_case_written_by_hand(
    case: inplace.Case, rule: str
) -> None:
    given, formula = inplace.RULES[rule]
    model = inplace.Written(case.original)
    gm = fg.transform(model)
    native = inplace.observe(model, inplace.with_x(model))
    with fg.use(given):
        actual = inplace.observe(model, inplace.with_x(gm))
    expected = inplace.observe(model, lambda x: case.by_hand(model, x, naive(F.relu, formula)))
    inplace.assert_same_values(actual, native)
    if not (native.error and actual.error):
        inplace.assert_same_backward(actual, expected, inplace.rounded)


@pytest.mark.sampled(4)
@inplace.CASE
def test_native_switches_the_rules_of_a_table_off(case: inplace.Case) -> None:
    model = inplace.Written(case.original)
    gm = fg.transform(model, {"activations": RECTANGULAR})
    expected = inplace.observe(model, inplace.with_x(model))
    with fg.native():
        actual = inplace.observe(model, inplace.with_x(gm))
    inplace.assert_same_values(actual, expected)
    if not expected.error:
        inplace.assert_same_backward(actual, expected)


def test_a_block_acts_on_its_scope_alone() -> None:
    gm = fg.transform(NET)
    with fg.use("scale", {"s": 3.0}):
        assert close(gradients(gm, X), intercepted(three))
    with fg.use("scale", {"s": 3.0}, scope="params"):
        assert close(gradients(gm, X), scaled(3.0))
    for both in ("all", ("activations", "params"), ("params", "activations"), ["all"]):
        with fg.use("scale", {"s": 3.0}, scope=both):  # type: ignore[arg-type]
            assert close(gradients(gm, X), scaled(3.0, intercepted(three)))


def test_the_innermost_block_of_each_scope_wins() -> None:
    gm = fg.transform(NET)
    with fg.use("scale", {"s": 3.0}, scope="all"):
        with fg.use(RECTANGULAR):
            assert close(gradients(gm, X), scaled(3.0, intercepted()))
            with fg.use("scale", {"s": 5.0}, scope="params"):
                assert close(gradients(gm, X), scaled(5.0, intercepted()))
            with fg.native():
                assert gradients(gm, X) == gradients(NET, X)
                with fg.use(RECTANGULAR):
                    assert close(gradients(gm, X), intercepted())
            assert close(gradients(gm, X), scaled(3.0, intercepted()))
        assert close(gradients(gm, X), scaled(3.0, intercepted(three)))
    assert gradients(gm, X) == gradients(NET, X)


def test_of_a_block_that_is_entered_twice_the_inner_entry_is_left_first() -> None:
    gm = fg.transform(NET)
    outer, inner = fg.use(RECTANGULAR), fg.use("scale", {"s": 3.0})
    with outer:
        with inner:
            with outer:
                assert close(gradients(gm, X), intercepted())
            assert close(gradients(gm, X), intercepted(three))
        assert close(gradients(gm, X), intercepted())
    assert gradients(gm, X) == gradients(NET, X)


class WritesOut(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        torch.sigmoid(x, out=out)
        return out


def test_a_site_that_no_rule_can_be_given_to_follows_no_block() -> None:
    model = WritesOut()
    gm = fg.transform(model)
    (decision,) = [d for d in fg.report(gm).decisions if d.site.kind == "operation"]
    assert decision.action == "native"
    assert decision.reason.startswith("it writes its result into an out= tensor")
    x = torch.linspace(-1, 1, 5)
    with fg.use("scale", {"s": 3.0}, scope="all"):
        assert torch.equal(gm(x.clone()), model(x.clone()))


def test_backward_hooks_of_a_module_that_follows_blocks_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[1].register_full_backward_hook(lambda module, into, out: (out[0] * 2,))
    gm = fg.transform(model, strict=True)
    with fg.use("straight_through"):
        gm(torch.ones(3, 4)).sum().backward()
    assert model[0].bias.grad is not None
    assert model[0].bias.grad.tolist() == [6] * 4


def test_the_rules_of_a_table_win() -> None:
    gm = fg.transform(NET, {"relu": RECTANGULAR, "silu": None}, ambient=True)

    def mixed(grad: Tensor, x: Tensor) -> Tensor:
        return rectangular(grad, x) if x.dim() == 3 else three(grad, x)  # relu, then tanh

    with fg.use("scale", {"s": 3.0}):
        actual = gradients(gm, X)
    plain = F.silu
    with pytest.MonkeyPatch.context() as patch, Interception(mixed):
        # Interception does not know this name
        patch.setattr(F, "silu", lambda x: x * (1 / (1 + (-x).exp())))
        expected = gradients(NET, X)
    assert F.silu is plain
    assert close(actual, expected)


def test_a_table_without_ambient_sites_does_not_follow_blocks() -> None:
    gm = fg.transform(NET, {"relu": RECTANGULAR})
    expected = gradients(gm, X)
    with fg.use("scale", {"s": 3.0}, scope="all"):
        assert gradients(gm, X) == expected


def test_a_forward_that_was_replaced_stays_so_and_has_its_own_derivative_in_native() -> None:
    gm = fg.transform(nn.Sequential(nn.ReLU()), fg.rules.scale(s=2.0, forward="tanh"))
    x = torch.randn(4, requires_grad=True)
    with fg.native(), pytest.warns(fg.FreegradWarning, match="stays replaced"):
        y = gm(x)
    assert torch.equal(y, x.tanh())
    assert torch.equal(*(torch.autograd.grad(t.sum(), x)[0] for t in (y, x.tanh())))


def test_a_composition_acts_in_its_order() -> None:
    gm = fg.transform(NET)
    with fg.use(fg.compose(fg.rules.clip_value(max_value=0.1), RECTANGULAR, "reverse")):
        actual = gradients(gm, X)
    assert close(actual, intercepted(lambda g, x: -rectangular(g.clamp(-0.1, 0.1), x)))


@pytest.mark.filterwarnings("ignore:scale.* got no site")
def test_the_rule_is_bound_when_the_forward_runs() -> None:
    gm = fg.transform(NET)
    with fg.use(RECTANGULAR):
        inside = gm(X)
    outside = gm(X)
    assert close(backward(inside), intercepted())
    with fg.use("scale", {"s": 3.0}, scope="all"):
        assert backward(outside) == gradients(NET, X)
    with fg.use(RECTANGULAR):
        inside = gm(X)
    with ThreadPoolExecutor(1) as pool:
        assert close(pool.submit(backward, inside).result(), intercepted())


def test_a_rule_that_is_registered_anew_leaves_what_has_been_bound() -> None:
    gm = fg.transform(NET)
    fg.register("test: anew")(lambda grad: grad * 3.0)
    block = fg.use("test: anew")
    fg.register("test: anew", overwrite=True)(lambda grad: grad * 5.0)
    with block:
        assert close(gradients(gm, X), intercepted(three))
    with fg.use("test: anew"):
        assert close(gradients(gm, X), intercepted(lambda g, x: g * 5.0))


def test_a_rules_parameter_may_be_a_tensor_that_changes() -> None:
    gm, s = fg.transform(NET), torch.tensor(3.0)
    with fg.use("scale", {"s": s}):
        assert close(gradients(gm, X), intercepted(three))
        s.fill_(2.0)
        assert close(gradients(gm, X), intercepted(lambda g, x: g * 2.0))


def test_without_gradients_a_block_changes_nothing() -> None:
    gm = fg.transform(NET)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), fg.use(RECTANGULAR, scope="all"):
            assert torch.equal(gm(X), NET(X))


# --- what is refused at once ---


def test_what_cannot_serve_is_refused_when_the_block_is_made() -> None:
    with pytest.raises(fg.RuleError, match="Did you mean 'rectangular'"):
        fg.use("rectanglar")
    with pytest.raises(fg.RuleError, match="Valid: a, b"):
        fg.use("rectangular", {"c": 1.0})
    with pytest.raises(fg.RuleError, match="Did you mean 'activations'"):
        fg.use("scale", scope="activation")
    with pytest.raises(fg.RuleError, match="Valid: params, activations, all"):
        fg.use("scale", scope=("params", "parameters"))
    with pytest.raises(fg.RuleError, match=r"transform\(\)"):
        fg.use(fg.rules.fast_sigmoid(forward="heaviside"))
    with pytest.raises(TypeError, match="Bind the parameters of its parts"):
        fg.use(fg.compose("scale", "rectangular"), {"s": 2.0})
    unbound = fg.register("test: unbound")(unbound_rule)
    with pytest.raises(fg.RuleError, match="no value for factor"):
        fg.use(unbound)
    fg.register("test: activations", kinds="operation")(lambda grad: grad)
    fg.register("test: y")(lambda grad, y: grad * y)
    fg.register("test: shape", keeps_shape=False)(lambda grad: grad)
    for scope in ("params", "all"):
        with pytest.raises(fg.RuleError, match="supports only operation sites"):
            fg.use("test: activations", scope=scope)
        with pytest.raises(fg.RuleError, match="a parameter does not have one"):
            fg.use("test: y", scope=scope)
    with pytest.raises(fg.RuleError, match="come first in a composition"):
        fg.use(fg.compose("scale", "test: y"))
    with pytest.raises(fg.RuleError, match="single sites"):
        fg.use("test: shape")


def unbound_rule(grad: Tensor, *, factor: float) -> Tensor:
    return grad * factor


# --- threads, exceptions, generators, tasks, decorators ---


@NO_RULES_IN_A_THREAD
def test_a_thread_has_no_blocks_of_another() -> None:
    gm = fg.transform(NET)
    native = gradients(NET, X)
    inside, go_on = threading.Event(), threading.Event()

    def in_a_block() -> Gradients:
        with fg.use(RECTANGULAR):
            inside.set()
            assert go_on.wait(60)
            return gradients(gm, X)

    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(in_a_block)
        assert inside.wait(60)
        assert gradients(gm, X) == native
        with fg.use("scale", {"s": 3.0}, scope="params"):
            assert pool.submit(gradients, gm, X).result() == native
            go_on.set()
            assert close(other.result(), intercepted())
            assert close(gradients(gm, X), scaled(3.0))


def test_one_block_can_be_entered_in_several_threads_and_again() -> None:
    gm, block = fg.transform(NET), fg.use(RECTANGULAR)
    both = threading.Barrier(2, timeout=60)

    def run(first: bool) -> bool:
        with block:
            both.wait()
            found = gradients(gm, X)
            if first:
                both.wait()  # the other leaves later, and enters again
            else:
                with block:
                    both.wait()
                    found = gradients(gm, X)
            both.wait()
        return close(found, intercepted()) and gradients(gm, X) == gradients(NET, X)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, (True, False)))


def test_an_exception_leaves_the_block() -> None:
    gm = fg.transform(NET)
    with fg.use("scale", {"s": 3.0}, scope="params"):
        with pytest.raises(ZeroDivisionError), fg.use(RECTANGULAR), fg.native():
            _ = 1 / 0
        assert close(gradients(gm, X), scaled(3.0))
    assert gradients(gm, X) == gradients(NET, X)


def test_a_block_returns_itself_and_decorates() -> None:
    gm, depth = fg.transform(NET), [2]

    @fg.use(RECTANGULAR)
    def decorated() -> Gradients:
        depth[0] -= 1
        return decorated() if depth[0] else gradients(gm, X)

    assert close(decorated(), intercepted())
    assert gradients(gm, X) == gradients(NET, X)
    with fg.use(RECTANGULAR) as block:
        assert isinstance(block, fg.use)


def test_what_runs_later_than_it_is_called_is_not_decorated() -> None:
    async def later() -> None: ...

    async def generator_too() -> Any:
        yield

    def generator() -> Any:
        yield

    for function in (later, generator_too, generator, Net):
        with pytest.raises(TypeError, match="Enter the block inside of the function"):
            fg.native()(function)


def test_a_suspended_generator_keeps_its_block_in_force_and_leaves_no_trace() -> None:
    gm = fg.transform(NET)

    def generator() -> Iterator[None]:
        with fg.use(RECTANGULAR):
            yield

    first, second = generator(), generator()
    next(first)
    assert close(gradients(gm, X), intercepted())  # as with torch.no_grad
    next(second)
    first.close()  # not in the order in which they were entered
    assert close(gradients(gm, X), intercepted())
    del second
    gc.collect()
    assert gradients(gm, X) == gradients(NET, X)


def test_a_block_is_left_in_the_thread_that_entered_it() -> None:
    block = fg.use(RECTANGULAR)
    with (
        block,
        ThreadPoolExecutor(1) as pool,
        pytest.raises(RuntimeError, match="has not entered it"),
    ):
        pool.submit(block.__exit__).result()


def test_a_task_never_gets_the_blocks_of_another() -> None:
    gm = fg.transform(NET)

    async def in_a_block(inside: asyncio.Event, go_on: asyncio.Event) -> None:
        with fg.use(RECTANGULAR):
            assert close(gradients(gm, X), intercepted())
            inside.set()
            await go_on.wait()
            assert close(gradients(gm, X), intercepted())

    async def main() -> None:
        inside, go_on = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(in_a_block(inside, go_on))
        await inside.wait()
        with pytest.raises(RuntimeError, match="do not await inside of it"):
            gradients(gm, X)
        with pytest.raises(RuntimeError, match="do not await inside of it"):
            fg.use("scale").__enter__()
        with pytest.raises(RuntimeError, match="do not await inside of it"):
            gradients(fg.transform(NET, "scale"), X)
        go_on.set()
        await task
        assert gradients(gm, X) == gradients(NET, X)

    asyncio.run(main())


def test_a_task_that_inherits_a_block_is_told_where_it_is_not_in_force() -> None:
    gm = fg.transform(NET)

    async def main() -> None:
        with fg.use(RECTANGULAR):
            assert close(await asyncio.create_task(run()), intercepted())
            with pytest.raises(RuntimeError, match="applies to one thread"):
                await asyncio.to_thread(gradients, gm, X)
            late = asyncio.create_task(run())
        with pytest.raises(RuntimeError, match="applies to one thread"):
            await late

    async def run() -> Gradients:
        return gradients(gm, X)

    asyncio.run(main())
    assert contextvars.Context().run(gradients, gm, X) == gradients(NET, X)


@pytest.mark.slow
def test_a_thread_and_the_program_may_end_inside_of_a_block() -> None:
    program = """
        import threading, freegrad_fx as fg
        enter = lambda: fg.use("scale").__enter__()
        thread = threading.Thread(target=enter)
        thread.start(), thread.join(), enter()
    """
    root = os.pathsep.join(IMPORTABLE)
    command = [sys.executable, "-c", textwrap.dedent(program)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": root})


# --- what runs the forward elsewhere, or once more ---


@NO_RULES_IN_A_THREAD
@pytest.mark.sampled(6)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "how", ["eager", "aot_eager", pytest.param("eager backend", marks=pytest.mark.slow)]
)
def test_a_checkpoint_runs_again_in_the_blocks_of_its_first_time(how: str, reentrant: bool) -> None:
    gm = fg.transform(NET)
    part = gm if how == "eager" else torch.compile(gm, backend=how.partition(" ")[0])
    x = X.clone().requires_grad_()

    def run() -> Gradients:
        y = checkpoint(part, x, use_reentrant=reentrant)
        return y

    def pulled(y: Tensor) -> Gradients:
        NET.zero_grad()
        runs.loss([y]).backward()
        return Gradients([p.grad for p in NET.parameters()])

    with fg.use(RECTANGULAR):
        inside = run()
    outside = run()
    with fg.use("scale", {"s": 3.0}, scope="all"):
        assert close(pulled(outside), gradients(NET, X))
        with ThreadPoolExecutor(1) as pool:  # the backward of a GPU has a thread of its own
            assert close(pool.submit(pulled, run()).result(), scaled(3.0, intercepted(three)))
    assert close(pulled(inside), intercepted())
    table = fg.transform(NET, RECTANGULAR)
    with fg.native():
        y = checkpoint(table, x, use_reentrant=reentrant)
    assert close(pulled(y), gradients(NET, X))
    NET.zero_grad()


def test_checkpoints_in_checkpoints() -> None:
    gm = fg.transform(NET)

    def inner(x: Tensor) -> Tensor:
        with fg.use(RECTANGULAR):
            return checkpoint(gm, x, use_reentrant=False)

    with fg.use("scale", {"s": 3.0}, scope="params"):
        y = checkpoint(lambda x: gm(x) * inner(x), X, use_reentrant=False)
    found = backward(y)
    with fg.use("scale", {"s": 3.0}, scope="params"):
        a = gm(X)
        with fg.use(RECTANGULAR):
            b = gm(X)
    assert close(found, backward(a * b))


@pytest.mark.filterwarnings("ignore:scale.* got no site")
def test_a_compiled_function_with_a_checkpoint_in_it() -> None:
    gm = fg.transform(NET)
    compiled = torch.compile(
        lambda x: checkpoint(gm, x, use_reentrant=False), backend="aot_eager", fullgraph=True
    )
    with fg.use(RECTANGULAR):
        inside = compiled(X)
    assert close(backward(inside), intercepted())
    outside = compiled(X)
    with fg.use("scale", scope="all"):
        assert close(backward(outside), gradients(NET, X))


@pytest.mark.filterwarnings("ignore:scale.* got no site")
@pytest.mark.parametrize("wrap", [lambda m: m, nn.Sequential], ids=["itself", "in a container"])
def test_a_replica_follows_the_blocks_of_the_thread_that_made_it(wrap: Any) -> None:
    for model in (nn.Sequential(nn.ReLU()), fg.Activation("ReLU")):
        whole = wrap(model if isinstance(model, fg.Activation) else fg.transform(model))

        def run(replica: nn.Module) -> Tensor:  # what torch.nn.parallel.parallel_apply does
            x = X.clone().requires_grad_()
            return torch.autograd.grad(replica(x).sum(), x)[0]

        with fg.use("scale", {"s": 3.0}):
            replica = replicated(whole)
        table = replicated(wrap(fg.transform(nn.Sequential(nn.ReLU()), RECTANGULAR)))
        with fg.native():
            native = replicated(wrap(fg.transform(nn.Sequential(nn.ReLU()), RECTANGULAR)))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(run, replica).result().eq(3.0).all()
            assert torch.equal(pool.submit(run, table).result(), rectangular(torch.ones(5, 4), X))
            assert torch.equal(pool.submit(run, native).result(), (X > 0).float())
        with fg.use("scale", {"s": 5.0}):
            assert run(replica).eq(3.0).all()
        assert torch.equal(run(whole), (X > 0).float())


def replicated(module: nn.Module) -> nn.Module:
    """What `torch.nn.parallel.replicate` does for one device, without moving a parameter to it."""
    new = {name: m._replicate_for_data_parallel() for name, m in module.named_modules()}
    for name, replica in new.items():
        for child in replica._modules:
            replica._modules[child] = new[f"{name}.{child}".lstrip(".")]
    return new[""]


def test_transforms_of_torch_func() -> None:
    gm, native = fg.transform(nn.Sequential(nn.Tanh())), nn.Tanh()

    def value(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x).sum()

    with fg.use("scale", {"s": 3.0}):
        assert torch.func.grad(value(gm))(X).eq(3.0).all()
        assert torch.func.vmap(torch.func.grad(value(gm)))(X).eq(3.0).all()
        assert torch.equal(torch.func.vmap(gm)(X), native(X))
        assert torch.equal(torch.func.jacrev(gm)(X[0]), 3 * torch.eye(4))
        with fg.native():
            assert torch.equal(torch.func.grad(value(gm))(X), torch.func.grad(value(native))(X))
    linear = fg.transform(nn.Sequential(nn.Linear(4, 2)))
    weights = {n: p.detach() for n, p in linear.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(linear, weights, (X,)).sum()

    plain = torch.func.grad(loss)(weights)
    with fg.use("scale", {"s": 3.0}, scope="params"):
        for name, found in torch.func.grad(loss)(weights).items():
            torch.testing.assert_close(found, 3 * plain[name])


# --- compiled code ---


class Compiled:
    """A model compiled into one graph, and how often it was."""

    def __init__(self, model: nn.Module, backend: str = "eager") -> None:
        self.graphs = 0
        compile_with = torch._dynamo.lookup_backend(backend)

        def counting(graph: Any, inputs: Any) -> Any:
            self.graphs += 1
            return compile_with(graph, inputs)

        self.model = torch.compile(model, fullgraph=True, backend=counting)

    def __call__(self, x: Tensor) -> Tensor:
        return self.model(x)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "backend",
    [
        "eager",
        "aot_eager",
        pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow]),
    ],
)
def test_compiled_code_follows_the_blocks_and_is_compiled_once_for_each(backend: str) -> None:
    gm = fg.transform(NET)
    compiled = Compiled(gm, backend)

    def right() -> bool:
        return close(gradients(compiled, X), gradients(gm, X))

    native = gradients(NET, X)
    seen = []
    for _ in range(2):  # the second time nothing is compiled
        assert right()  # first outside of any block
        for block in (
            fg.use(RECTANGULAR),
            fg.use(fg.rules.rectangular(a=-0.4, b=0.7)),
            fg.use("scale", {"s": 3.0}, scope="params"),
            fg.native(),
        ):
            with block:
                assert right()
                same = gradients(compiled, X) == native
                seen.append(not same)
        assert right()
        assert compiled.graphs == 4  # native is what it is outside
    assert seen == [True, True, True, backend == "inductor" and seen[3]] * 2


@NO_RULES_IN_A_THREAD
def test_compiled_code_follows_the_blocks_of_the_thread_that_calls_it() -> None:
    gm = fg.transform(NET)
    compiled = Compiled(gm)
    with fg.use(RECTANGULAR):
        assert close(gradients(compiled, X), intercepted())
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(gradients, compiled, X).result() == gradients(NET, X)
            with_a_block = fg.use("scale", {"s": 3.0})(gradients)
            assert close(pool.submit(with_a_block, compiled, X).result(), intercepted(three))
        assert close(gradients(compiled, X), intercepted())
    assert compiled.graphs == 3


@pytest.mark.slow
def test_compiled_code_sees_a_rule_that_is_registered_anew_and_tensors_that_change() -> None:
    gm, s = fg.transform(NET), torch.tensor(3.0)
    compiled = Compiled(gm)
    fg.register("test: anew")(lambda grad: grad * 3.0)
    with fg.use("test: anew"):
        assert close(gradients(compiled, X), intercepted(three))
    fg.register("test: anew", overwrite=True)(lambda grad: grad * 5.0)
    with fg.use("test: anew"):
        assert close(gradients(compiled, X), intercepted(lambda g, x: g * 5.0))
    for value in (3.0, 2.0):
        s.fill_(value)
        with fg.use("scale", {"s": s}):
            assert close(gradients(compiled, X), intercepted(lambda g, x, v=value: g * v))
    with fg.use("scale", {"s": torch.tensor(7.0)}):
        assert close(gradients(compiled, X), intercepted(lambda g, x: g * 7.0))
    assert compiled.graphs == 3


@pytest.mark.slow
def test_rules_of_freegrads_signature_are_told_apart_in_compiled_code() -> None:
    gm = fg.transform(NET)
    compiled = Compiled(gm)
    first = fg.register("test: 1")(lambda ctx, g, t, **_: g * 3.0)
    second = fg.register("test: 2")(lambda ctx, g, t, **params: g * params["s"])
    for rule, s in [(first, 3.0), (second(s=5.0), 5.0), (second(s=2.0), 2.0), (first, 3.0)]:
        with fg.use(rule):
            assert close(gradients(compiled, X), intercepted(lambda g, x, s=s: g * s))


def test_native_reaches_compiled_code_with_a_table() -> None:
    compiled = Compiled(fg.transform(NET, RECTANGULAR))
    assert close(gradients(compiled, X), intercepted())
    with fg.native():
        assert gradients(compiled, X) == gradients(NET, X)
    assert close(gradients(compiled, X), intercepted())
    assert compiled.graphs == 2


def test_a_block_inside_of_a_compiled_function() -> None:
    gm = fg.transform(NET)

    def step(x: Tensor) -> Tensor:
        with fg.use(RECTANGULAR):
            return gm(x)

    assert close(gradients(torch.compile(step, backend="eager"), X), intercepted())


# --- captures of models with blocks and ambient parts in them ---


@pytest.mark.filterwarnings("ignore:scale.* got no site")
@pytest.mark.parametrize("examples", [None, (X,)], ids=["traced", "exported"])
def test_an_exported_model_is_ambient_like_a_traced_one(examples: Any) -> None:
    with fg.use("scale", {"s": 7.0}, scope="all"):  # no matter where it is transformed
        gm = fg.transform(NET, example_inputs=examples)
    assert gradients(gm, X) == gradients(NET, X)
    with fg.use(RECTANGULAR):
        assert close(gradients(gm, X), intercepted())
    with fg.use("scale", {"s": 3.0}, scope="params"):
        assert close(gradients(gm, X), scaled(3.0))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "transformed again", "in eval mode"])
def test_a_copy_is_ambient_too(how: str) -> None:
    net = copy.deepcopy(NET)
    gm = fg.transform(net)
    if how == "deepcopy":
        gm = copy.deepcopy(gm)
    elif how == "pickle":
        gm = pickle.loads(pickle.dumps(gm))
    elif how == "transformed again":
        gm = fg.transform(gm)
        assert {d.action for d in fg.report(gm).decisions} == {"ambient"}
    else:
        gm.eval(), net.eval()
    assert gradients(gm, X, gm) == gradients(net, X, net)
    with fg.use(RECTANGULAR), Interception(rectangular):
        expected = gradients(net, X, net)
    with fg.use(RECTANGULAR):
        assert close(gradients(gm, X, gm), expected)


@pytest.mark.parametrize("form", ["whole", "part"])
def test_a_table_decides_ambient_sites_and_leaves_the_others_so(form: str) -> None:
    ambient = fg.transform(NET)
    model = ambient if form == "whole" else nn.Sequential(ambient)
    gm = fg.transform(model, {"relu": RECTANGULAR, "params": None})
    actions = {
        d.site.name.removeprefix("0.").removeprefix("0:"): d.action for d in fg.report(gm).decisions
    }
    assert [a for n, a in actions.items() if "relu" in n] == ["rewrite"]
    assert [a for n, a in actions.items() if "silu" in n or "tanh" in n] == ["ambient"] * 2
    assert [a for n, a in actions.items() if "weight" in n] == ["native"] * 4

    def mixed(grad: Tensor, x: Tensor) -> Tensor:
        return rectangular(grad, x) if x.dim() == 3 else three(grad, x)

    with fg.use("scale", {"s": 3.0}, scope="all"):
        assert close(gradients(gm, X), intercepted(mixed))
    with fg.native():
        assert gradients(gm, X) == gradients(NET, X)
    assert gradients(ambient, X) == gradients(NET, X)  # which is not changed


@pytest.mark.parametrize("examples", [None, (X,)], ids=["traced", "exported"])
@pytest.mark.parametrize("decorated", [False, True])
def test_a_block_in_a_forward_is_not_lost_in_a_capture(examples: Any, decorated: bool) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = fg.Activation("ReLU")

        def forward(self, x: Tensor) -> Tensor:
            if decorated:
                return fg.use("scale", {"s": 3.0})(self.act)(x)
            with fg.use("scale", {"s": 3.0}):
                return self.act(x)

    model = nn.Sequential(Part(), nn.Tanh())
    if examples:
        with pytest.raises(fg.CaptureError, match=r"freegrad_fx\.use inside a forward"):
            fg.transform(model, example_inputs=examples)
        return
    gm = fg.transform(model)
    assert [o.path for o in fg.report(gm).opaque] == ["0"]  # kept whole, and so right
    x = X.clone().requires_grad_()
    with fg.use("d(Linear)"):
        (found,) = torch.autograd.grad(gm(x).sum(), x)
    assert found.eq(3.0).all()


# --- layers whose parameters follow blocks ---

LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "Linear": (nn.Linear(4, 2), X),
    "Conv2d": (nn.Conv2d(1, 2, 3), torch.randn(2, 1, 5, 5)),
    "BatchNorm1d": (nn.BatchNorm1d(4), X),
    "LayerNorm": (nn.LayerNorm(4), X),
    "PReLU": (nn.PReLU(), X),
    "Embedding": (nn.Embedding(5, 4), torch.tensor([0, 3, 3])),
    "LSTM": (nn.LSTM(4, 3, 2), X[None]),
    "GRU": (nn.GRU(4, 3), X[None]),
    "TransformerEncoderLayer": (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0), X[None]),
    "weight_norm": (nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), X),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_parameters_of_a_layer_follow_blocks(name: str) -> None:
    layer, x = LAYERS[name]
    gm = fg.transform(nn.Sequential(layer))

    def found(model: nn.Module) -> Gradients:
        y = model(x)
        return backward(y[0] if isinstance(y, tuple) else y, layer)

    native = found(layer)
    assert found(gm) == native
    with fg.use("scale", {"s": 2.0}, scope="params"):
        assert found(gm) == Gradients(2 * g for g in native)
    with fg.use("scale", {"s": 2.0}, scope="params"), fg.native():
        assert found(gm) == native


def test_a_frozen_parameter_follows_once_it_learns() -> None:
    layer = nn.Linear(4, 2)
    layer.weight.requires_grad_(False)
    gm = fg.transform(nn.Sequential(layer))
    with fg.use("scale", {"s": 2.0}, scope="params"):
        assert torch.autograd.grad(gm(X).sum(), layer.bias)[0].eq(10.0).all()
        layer.weight.requires_grad_(True)
        found = torch.autograd.grad(gm(X).sum(), layer.weight)[0]
    torch.testing.assert_close(found, 2 * X.sum(0).expand(2, 4))


def test_a_sparse_gradient_is_refused_by_name_where_the_rule_cannot_take_it() -> None:
    layer = nn.Embedding(5, 4, sparse=True)
    gm = fg.transform(nn.Sequential(layer))
    x = torch.tensor([1, 1, 3])
    with fg.use("scale", {"s": 2.0}, scope="params"):
        (found,) = torch.autograd.grad(gm(x).sum(), layer.weight)
    assert found.to_dense().sum() == 2 * 3 * 4
    with fg.use("clip_value", scope="params"):
        y = gm(x).sum()
    with pytest.raises(fg.RuleError, match="sparse"):
        y.backward()


def test_where_no_rule_acts_a_layer_is_called_itself() -> None:
    calls = []
    layer = nn.Linear(4, 2)
    gm = fg.transform(nn.Sequential(layer))
    own = gm.get_submodule("0")
    own.forward = lambda x: calls.append("itself") or F.linear(x, own.weight, own.bias)
    gm(X)
    with warnings.catch_warnings(), fg.use("scale", scope="params"):
        gm(X)
    assert calls[0] == "itself"
