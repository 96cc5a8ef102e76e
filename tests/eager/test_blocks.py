"""Blocks around plain models: nesting, threads, checkpoints, transforms of torch.func, compiled code, and errors."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from freegrad_fx import context
from runs import loss
from sweep import Interception

THREE = fg.rules.scale(s=3.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x)) + 1
        return torch.tanh(self.second(self.relu(x)))


torch.manual_seed(4)
NET, X = Net(), torch.randn(5, 4)


def gradients(model: Callable[..., Tensor] = NET) -> list[Tensor]:
    return backward(model(X))


def backward(y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss([y]), list(NET.parameters())))


def by_hand(s: float = 3.0) -> list[Tensor]:
    with Interception(lambda grad, x: grad * s):
        return gradients()


NATIVE, TRIPLED = gradients(), by_hand()


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.allclose, a, b))


@pytest.fixture(autouse=True)
def _every_block_is_left() -> Any:
    yield
    assert all(map(torch.equal, gradients(), NATIVE))


def test_the_innermost_block_that_decides_a_site_wins() -> None:
    with fg.use(THREE):
        outer = fg.use({"relu": None, "tanh": THREE})  # decides nothing about silu
        with outer, fg.use(fg.rules.scale(s=1.0), scope="params"):
            found = gradients()
        with fg.native():
            assert all(map(torch.equal, gradients(), NATIVE))
            with fg.use(THREE):
                assert equal(gradients(), TRIPLED)
        assert equal(gradients(), TRIPLED)
    table = {"silu": THREE, "tanh": THREE}
    assert equal(found, gradients(fg.transform(NET, table)))


def test_blocks_are_left_in_any_order_and_reused() -> None:
    first, second = fg.use({"activations": THREE}), fg.use({"relu": None})
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert all(map(torch.equal, gradients(), NATIVE))
    with first, first:
        assert equal(gradients(), TRIPLED)
    second.__exit__(None, None, None)
    assert equal(fg.use(THREE)(gradients)(), TRIPLED)


def test_an_exception_leaves_the_block() -> None:
    with pytest.raises(ZeroDivisionError), fg.use(THREE):
        raise ZeroDivisionError


def test_a_backward_may_run_after_the_block_and_in_another_thread() -> None:
    with fg.use(THREE):
        y = NET(X)
    with ThreadPoolExecutor(1) as pool:
        assert equal(pool.submit(backward, y).result(), TRIPLED)


def test_a_backward_in_a_block_gets_no_rules() -> None:
    """The formula of a rule, and a hook, call activations that are no sites."""

    @fg.register("test: with an activation in it", overwrite=True)
    def formula(grad: Tensor, x: Tensor) -> Tensor:
        return torch.relu(grad) * torch.sigmoid(x)

    x = torch.randn(7, requires_grad=True)
    with fg.use("test: with an activation in it") as block:
        y = torch.tanh(x)
        y.register_hook(lambda grad: F.relu(grad))
        (found,) = torch.autograd.grad(y, x, torch.ones(7), create_graph=True)
        (second,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(found, torch.sigmoid(x))
    assert torch.allclose(second, torch.sigmoid(x) * (1 - torch.sigmoid(x)))
    assert len(fg.report(block).decisions) == 1


def test_another_asynchronous_task_is_refused() -> None:
    async def inside(event: asyncio.Event) -> None:
        with fg.use(THREE):
            event.set()
            await asyncio.sleep(0.01)

    async def both() -> None:
        event = asyncio.Event()
        task = asyncio.create_task(inside(event))
        await event.wait()
        with pytest.raises(RuntimeError, match="asynchronous task"):
            NET(X)
        await task

    asyncio.run(both())


@pytest.mark.filterwarnings("ignore:reverse.* got no site")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("with_model", [False, True])
def test_a_checkpoint_runs_again_in_its_block(reentrant: bool, with_model: bool) -> None:
    x = X.clone().requires_grad_()

    def pulled(y: Tensor) -> list[Tensor]:
        NET.zero_grad()
        loss([y]).backward()
        grads = [p.grad for p in NET.parameters()]
        NET.zero_grad()
        return grads  # type: ignore[return-value]

    options = {"model": NET} if with_model else {}
    with fg.use(THREE, **options):
        y = checkpoint(NET, x, use_reentrant=reentrant)
        inside = checkpoint(NET, x, use_reentrant=reentrant)
        assert equal(pulled(inside), TRIPLED)
    with fg.use("reverse"):
        assert equal(pulled(y), TRIPLED)


class Checkpointed(nn.Module):
    """Calls of a checkpointed function that is no module, with parameters of the model and repeated sites."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))
        self.reentrant = reentrant

    def part(self, x: Tensor) -> Tensor:
        return torch.tanh(F.relu(x @ self.w))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = checkpoint(self.part, x, use_reentrant=self.reentrant)
        return F.relu(x @ self.w)


def test_a_checkpointed_function_has_its_places_again() -> None:
    model, plain = Checkpointed(False), Checkpointed(False)
    plain.load_state_dict(model.state_dict())
    table = fg.RuleTable(
        [
            fg.on("relu", call=1).backward("scale", s=3.0),
            fg.on("tanh", call=2).backward("reverse"),
            fg.on("params").backward("clip_norm", max_norm=0.1),
        ]
    )
    x = X.clone().requires_grad_()
    with fg.use(table, model=model):
        y = model(x)
    found = torch.autograd.grad(y.sum(), [x, model.w])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.checkpoint", lambda f, x, use_reentrant: f(x))
        gm = fg.transform(plain, table)
    expected = torch.autograd.grad(gm(x).sum(), [x, plain.w])
    assert all(map(torch.equal, found, expected))


def test_gradients_of_gradients_and_transforms_of_functions() -> None:
    x = torch.randn(5, dtype=torch.float64)

    def ruled(x: Tensor) -> Tensor:
        with fg.use("triangular"):
            return torch.tanh(x).square().sum()

    expected_graph = fg.transform(nn.Sequential(nn.Tanh()), "triangular")

    def expected(x: Tensor) -> Tensor:
        return expected_graph(x).square().sum()

    for derive in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))):
        sample = x if derive is torch.func.grad else x[None].repeat(3, 1)
        assert torch.equal(derive(ruled)(sample), derive(expected)(sample))
    leaf = x.clone().requires_grad_()
    twice = [
        torch.autograd.grad(torch.autograd.grad(f(leaf), leaf, create_graph=True)[0].sum(), leaf)[0]
        for f in (ruled, expected)
    ]
    assert torch.equal(*twice)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_nothing_changes_where_no_gradient_is_recorded(without: Callable[[], Any]) -> None:
    with without():
        expected = NET(X)
        with fg.use("reverse"):
            y = NET(X)
    assert torch.equal(y, expected)
    assert y.is_inference() == expected.is_inference()


def test_autocast_is_followed() -> None:
    x = X.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        native = NET(x)
        with fg.use(THREE):
            y = NET(x)
    assert torch.equal(y, native)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == x.dtype


def test_the_modes_of_others_see_what_they_saw() -> None:
    class Names(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    plain, inner, outer = Names(), Names(), Names()
    with plain:
        NET(X)
    with fg.use(THREE), inner:
        assert equal(gradients(), TRIPLED)
    with outer, fg.use(THREE):
        assert equal(gradients(), TRIPLED)
    assert {*plain.seen} <= {*inner.seen}
    assert {*plain.seen} <= {*outer.seen}


def test_nothing_of_a_call_is_kept() -> None:
    """Not the input, the output or the graph, while the block goes on or after it."""
    with fg.use({"activations": THREE, "params": THREE}, model=NET):
        x = torch.randn(5, 4, requires_grad=True)
        y = NET(x)
        alive = [weakref.ref(x), weakref.ref(y)]
        del x, y
    gc.collect()
    assert not any(ref() is not None for ref in alive)


# --- transformed and compiled models ---


def test_the_table_of_a_transformed_model_decides_in_it() -> None:
    gm = fg.transform(NET, {"relu": None, "silu": THREE})
    expected = gradients(gm)
    with fg.use("reverse"):
        assert all(map(torch.equal, gradients(gm), expected))
        assert equal(gradients(), by_hand(-1.0))


class WithItsOwnBlock(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with fg.use(THREE):
            y = checkpoint(torch.tanh, x, use_reentrant=True)
        return y + F.relu(x)


def test_a_block_in_an_opaque_part_acts_there_and_one_around_the_model_does_not() -> None:
    gm = fg.transform(nn.Sequential(nn.Identity(), WithItsOwnBlock()), {"identity": None})
    assert [call.path for call in fg.report(gm).opaque] == ["1"]
    x = torch.randn(7, requires_grad=True)
    with fg.use("reverse"):
        y = gm(x)
    y.sum().backward()
    assert torch.equal(x.grad, 3.0 + (x > 0).float())


def test_ambient_sites_follow_the_block_once() -> None:
    gm = fg.transform(NET)
    with fg.use(THREE):
        assert equal(gradients(gm), TRIPLED)
        x = torch.randn(3, requires_grad=True)
        y = fg.Activation("Tanh")(x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 3.0))


def test_a_block_for_a_model_leaves_other_models_alone() -> None:
    teacher, student = fg.transform(NET), nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    for rules in (THREE, {"relu": THREE}):
        with fg.use(rules, model=student):
            found = gradients(teacher)
            student(X)
        assert all(map(torch.equal, found, NATIVE))
    with fg.use(THREE, model=teacher):
        assert equal(gradients(teacher), TRIPLED)


def test_a_table_that_matches_nothing_warns_also_if_no_activation_ran() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for options in ({}, {"model": model}):
        with (
            pytest.warns(fg.FreegradWarning, match="'relu' matched nothing"),
            fg.use({"relu": THREE}, **options),
        ):
            model(X)


@pytest.mark.sampled(2)
# Dynamo reads the gradients of its inputs after a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_acts_in_a_block(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(NET, backend=backend)
    inside = torch.compile(lambda x: fg.use(THREE)(NET)(x), backend=backend)
    for _ in range(2):
        assert equal(gradients(compiled), NATIVE)
        with fg.use(THREE):
            assert equal(gradients(compiled), TRIPLED)
        with fg.use("reverse"):
            assert equal(gradients(compiled), by_hand(-1.0))
        assert equal(gradients(inside), TRIPLED)
    with fg.use({"params": THREE}, model=NET):
        assert equal(gradients(compiled), [3 * g for g in NATIVE])


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore:reverse.* got no site")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_table_of_a_compiled_model_decides_in_it(backend: str) -> None:
    torch._dynamo.reset()
    ruled = fg.compile(NET, THREE, backend=backend, fullgraph=True)
    graph = torch.compile(fg.transform(NET, THREE), backend=backend, fullgraph=True)
    for _ in range(2):
        for compiled in (ruled, graph):
            assert equal(gradients(compiled), TRIPLED)
            with fg.use("reverse"):
                assert equal(gradients(compiled), TRIPLED)


def test_transformed_parts_of_a_compiled_model_stay_in_its_graph() -> None:
    torch._dynamo.reset()
    tabled, ambient = fg.transform(NET, {"relu": None}), fg.transform(NET)
    whole = torch.compile(lambda x: tabled(x) + ambient(x), backend="aot_eager", fullgraph=True)
    with fg.use(THREE):
        found = gradients(whole)
    assert equal(found, [a + b for a, b in zip(NATIVE, TRIPLED, strict=True)])


def test_one_graph_refuses_a_block() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(NET, backend="eager", fullgraph=True)
    with fg.use(THREE), pytest.raises(Exception, match="_outside_of_the_graph"):
        compiled(X)


def test_a_capture_in_a_block_is_not_intercepted() -> None:
    expected = str(fg.transform(NET, {"relu": THREE}).graph)
    with fg.use("reverse"):
        for options in ({}, {"example_inputs": (X,)}):
            gm = fg.transform(NET, {"relu": THREE, "silu": THREE, "tanh": THREE}, **options)
            assert equal(gradients(gm), TRIPLED)
        assert str(fg.transform(NET, {"relu": THREE}).graph) == expected


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((), {}, TypeError, "takes the rules once"),
        (("scale",), {"rule": "scale"}, TypeError, "takes the rules once"),
        (({"relu": "reverse"}, {"s": 1.0}), {}, TypeError, "belong to a single rule"),
        (({"relu": "reverse"},), {"scope": "params"}, TypeError, "belong to a single rule"),
        (("reverse",), {"model": "resnet"}, TypeError, "nn.Module"),
        (("revers",), {}, fg.RuleError, "reverse"),
        (({"relo": "reverse"},), {}, fg.TableError, "relu"),
        (({"params": "reverse"},), {}, fg.TableError, "model=model"),
        ((fg.RuleTable([fg.on("relu", module="a.*").backward("reverse")]),), {}, fg.TableError, "model=model"),
        ((fg.RuleTable([fg.on("relu", call=0).backward("reverse")]),), {}, fg.TableError, "model=model"),
        ((fg.RuleTable([fg.on("relu", type=Net).backward("reverse")]),), {}, fg.TableError, "model=model"),
        ((fg.RuleTable([fg.on(parameter="a").backward("reverse")]),), {}, fg.TableError, "model=model"),
    ],
)  # fmt: skip
def test_bad_input_names_the_remedy(
    arguments: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fg.use(*arguments, **options)


# --- the report ---


def test_the_report_lists_what_was_seen() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LSTM(4, 4))
    table = fg.RuleTable(
        [
            fg.on("relu", module="1").backward("reverse"),
            fg.on("gelu").backward("straight_through"),
            fg.on(parameter="*.bias").backward("scale", s=2.0),
        ]
    )
    with (
        pytest.warns(fg.FreegradWarning, match="'gelu' matched nothing"),
        fg.use(table, model=model) as block,
    ):
        model(X)
    plan = fg.report(block)
    assert [d.site.name for d in plan.with_action("rewrite")] == ["1:relu[0]", "0.bias"]
    assert plan.hits == (1, 0, 1)
    assert [(o.path, "lstm" in o.what) for o in plan.opaque] == [("2", True)]


def test_a_plain_block_has_sites_without_paths() -> None:
    with fg.use("reverse") as block:
        NET(X)
        torch.sigmoid(X)
    plan = fg.report(block)
    assert [d.site.op for d in plan.decisions] == ["silu", "relu", "tanh", "sigmoid"]
    assert all(d.site.source.startswith(__file__) for d in plan.decisions)


def test_the_report_names_transformed_models_that_ran() -> None:
    """Their sites are in reports of their own."""
    ambient = fg.transform(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    outer = nn.Sequential(nn.Linear(4, 4), ambient)
    for options, path in (({}, ""), ({"model": outer}, "1")):
        with fg.use(THREE, **options) as block:
            outer(X)
            fg.Activation("Tanh")  # whose constructor tries the function
        plan = fg.report(block)
        assert not plan.decisions
        assert [o.path for o in plan.opaque] == [path]
        assert "ambient sites follow the block; report(model) lists them" in str(plan)


# --- a single rule without a site ---


@pytest.mark.parametrize("scope", ["activations", "params", "all"])
def test_a_rule_that_gets_no_site_warns_once(scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_compiled", [])  # as if no test before had compiled ambient sites
    model = nn.Sequential(nn.Flatten())
    block = fg.use("straight_through", scope=scope, model=model)
    with pytest.warns(fg.FreegradWarning, match="straight_through got no site"), block:
        model(torch.ones(2, 2))
    with block:
        model(torch.ones(2, 2))


def test_a_rule_that_gets_a_site_in_any_of_its_scopes_does_not_warn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(context, "_compiled", [])
    with fg.use("straight_through", scope="all"):
        torch.relu(torch.ones(2, 2))
    with fg.use("straight_through"):
        fg.transform(nn.Sequential(nn.ReLU()))(torch.ones(2))  # its ambient sites follow the block
    with fg.use("straight_through"):
        fg.Activation("relu")(torch.ones(2))
    with fg.use("scale", {"s": 2.0}), fg.use("straight_through"):
        torch.relu(torch.ones(2))  # the inner rule decides


def test_ambient_sites_in_compiled_code_count_as_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "_compiled", [])
    compiled = torch.compile(fg.transform(nn.Sequential(nn.ReLU())), backend="eager")
    with fg.use("straight_through"):
        compiled(torch.ones(2, requires_grad=True)).sum().backward()
        torch.ones(2) + 1
