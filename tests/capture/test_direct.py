"""The version of a forward that calls each site once: it gives what the three calls of a site give, in every case."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import freegrad_fx as fg
from built_in import BUILT_IN, EXAMPLES
from freegrad_fx.backward.observing import observed_by
from freegrad_fx.capture.direct import DIRECT, FUSED
from freegrad_fx.vocabulary.activations import TABLE


@pytest.fixture(params=["python", pytest.param("extension", marks=pytest.mark.slow)])
def _way(request: pytest.FixtureRequest) -> None:
    if request.param == "extension":
        request.getfixturevalue("extension")


pytestmark = pytest.mark.usefixtures("_way")


class Net(nn.Module):
    """Sites that are calls of a module, of a function and of a method, and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(4, 4), nn.LeakyReLU(0.2), nn.Linear(4, 3)
        self.size = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.act(self.fc(x))).sigmoid()) * self.size  # type: ignore[no-any-return]


RULES = fg.RuleTable(
    [
        fg.on("leaky_relu").backward("rectangular", a=-0.5, b=0.5),
        fg.on("tanh").backward("fast_sigmoid", slope=2.0),
        fg.on("sigmoid").backward("gaussian"),
        fg.on(parameter="size").backward("scale", s=0.5),
    ]
)


def transformed(model: nn.Module | None = None, rules: Any = RULES) -> fg.CapturedModule:
    """A model whose sites are one call each, after two calls."""
    torch.manual_seed(1)
    gm = fg.transform(Net() if model is None else model, rules)
    for _ in range(2):
        gm(torch.randn(2, 4, requires_grad=True))
    return gm


def sites(gm: nn.Module) -> list[Any]:
    """The functions that stand for a site in the version of now."""
    names = type(gm)._forwards[FUSED][0].__globals__  # type: ignore[attr-defined]
    return [value for name, value in names.items() if getattr(value, "__name__", "") == "site"]


@contextlib.contextmanager
def three_calls(gm: nn.Module) -> Iterator[None]:
    """A context in which a model runs the code that its readers see."""
    kind: Any = type(gm)
    before = kind._forwards
    kind._forwards = {**before, FUSED: before[0], DIRECT: before[0]}
    try:
        yield
    finally:
        kind._forwards = before


def gradients(gm: nn.Module, x: Tensor) -> list[Tensor]:
    """The result and all gradients."""
    leaf = x.clone().requires_grad_()
    out = gm(leaf)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *gm.parameters()])]


def assert_same(gm: nn.Module, run: Callable[[], Any]) -> Any:
    """Compare what a function returns with what it returns for the three calls."""
    torch.manual_seed(2)
    found = run()
    with three_calls(gm):
        torch.manual_seed(2)
        expected = run()
    assert_alike(found, expected)
    return found


def assert_alike(a: Any, b: Any) -> None:
    if isinstance(a, list | tuple):
        assert len(a) == len(b), (a, b)
        for one, other in zip(a, b, strict=True):
            assert_alike(one, other)
    elif isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    else:
        assert a == b


X = torch.linspace(-2, 2, 20).view(5, 4)


def test_each_site_is_one_call_with_the_same_bits() -> None:
    gm = transformed()
    assert len(sites(gm)) == 4
    assert_same(gm, lambda: gradients(gm, X))


OPERATIONS = [
    op.name for op in TABLE if op.elementwise and op.operands == ("x",) and op.name != "identity"
]


NEED_MORE = {"prelu", "threshold", "clamp", "clamp_min", "clamp_max", "pow", "comparison"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.sampled(3)
def test_all_pointwise_operations(dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, 1e-3, -1e-3, 1e4, -torch.inf, torch.nan, 0.5])
    fused = set()
    for name in OPERATIONS:
        op = fg.vocabulary.OPS[name]
        calls: list[Any] = [kind() for kind in op.modules if name not in ("prelu", "threshold")]
        calls += [op.function] if op.function is not None else []
        for call in calls:
            gm = fg.transform(_Calls(call), {name: fg.rules.scale(s=2.0)})
            for _ in range(2):
                gm(torch.randn(3, requires_grad=True))
            fused |= {name} if sites(gm) else set()
            x = torch.cat([special, torch.randn(40)]).to(dtype)
            assert_same(gm, lambda gm=gm, x=x: gradients(gm, x))
    assert set(OPERATIONS) - fused <= NEED_MORE


class _Calls(nn.Module):
    def __init__(self, call: Any) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x) * 2  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.sampled(12)
def test_all_rules(name: str) -> None:
    rule = fg.get(name)
    if "operation" not in rule.kinds:
        return
    settings = [dict(values) for of, values in EXAMPLES if of == name] or [{}]
    options: list[dict[str, Any]] = [{}]
    options += [{"save": "mask"}, {"save": "bits"}] if rule.declaration.mask else []
    for values in [*settings, *options]:
        gm = transformed(rules={"tanh": rule(**values), "leaky_relu": rule(**values)})
        assert_same(gm, lambda gm=gm: gradients(gm, X))
        x = torch.cat([X[0], torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])]).view(2, 4)
        assert_same(gm, lambda gm=gm, x=x: gradients(gm, x))


def test_layouts() -> None:
    gm = transformed(_Calls(fg.vocabulary.heaviside), {"heaviside": "gaussian"})
    numbers = torch.tensor([0.0, -0.0, 1e-45, -1e-45, torch.inf, -torch.inf, torch.nan, 2.0])
    square = numbers.expand(8, 8)
    large = numbers.repeat(5000)
    channels = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    for x in (
        square,
        square.clone().t(),
        square.clone()[:, ::2],
        numbers[0],
        numbers[:0],
        large,
        channels,
    ):
        leaf = x.detach().requires_grad_()

        def run(leaf: Tensor = leaf) -> list[Any]:
            out = gm(leaf)
            return [out, out.signbit(), out.stride(), *torch.autograd.grad(out.sum(), leaf)]

        assert_same(gm, run)


# --- the calls that are not usual ---


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Own(Tensor):
    """A subclass that records which functions it is given to."""

    names: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.names.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def _without_gradients(gm: nn.Module) -> Any:
    with torch.no_grad():
        out = gm(X.clone().requires_grad_())
    with torch.inference_mode():
        inferred = gm(X)
    return [out.requires_grad, inferred.is_inference(), out, inferred.clone()]


def _in_modes(gm: nn.Module) -> Any:
    operations, functions = _Operations(), _Functions()
    with operations:
        found = gradients(gm, X)
    with functions:
        found += gradients(gm, X)
    return [found, operations.names, functions.names]


def _subclass(gm: nn.Module) -> Any:
    _Own.names = []
    out = gm(X.as_subclass(_Own).requires_grad_())
    out.sum().backward()
    return [type(out).__name__, _Own.names[:-1]]


def _in_blocks(gm: nn.Module) -> Any:
    with fg.native():
        found = gradients(gm, X)
    with fg.use("scale", {"s": 3.0}):
        return [*found, *gradients(gm, X)]


def _observed(gm: nn.Module) -> Any:
    seen: list[Any] = []
    with observed_by(seen, lambda site, gradient: seen.append((site, gradient.clone()))):
        loss = gm(X).square().sum()
    loss.backward()
    return [[site for site, _ in seen], [gradient for _, gradient in seen]]


def _transforms(gm: nn.Module) -> Any:
    one = torch.func.vmap(torch.func.grad(lambda x: gm(x).square().sum()))(X)
    return [one, torch.func.jacrev(gm)(X[0])]


def _of_a_dead_transform(gm: nn.Module) -> Any:
    kept: list[Tensor] = []
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(X[0].clone())
    out = gm(kept[0])
    return [out.requires_grad, out.sum()]


def _forward_mode(gm: nn.Module) -> Any:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X.clone().requires_grad_(), torch.ones(5, 4))
        with pytest.raises(RuntimeError) as caught:
            gm(dual)
    return str(caught.value)


def _traced(gm: nn.Module) -> Any:
    traced = torch.fx.symbolic_trace(gm)
    with pytest.warns((fg.FreegradWarning, DeprecationWarning)):
        scripted = torch.jit.trace(gm, X)
    names = [str(n.target) for n in traced.graph.nodes]
    return [[n.partition(" at ")[0] for n in names], *gradients(traced, X), scripted(X)]


def _compiled(gm: nn.Module) -> Any:
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    return gradients(compiled, X)


def _differentiated_twice(gm: nn.Module) -> Any:
    leaf = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(gm(leaf).square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    batch = torch.eye(3)[:, None].expand(3, 5, 3)
    each = torch.autograd.grad(gm(leaf), leaf, batch, is_grads_batched=True)
    return [first, second, *each]


def _rules_are_found(gm: nn.Module) -> Any:
    return list(fg.functional.jvp(gm, X, torch.ones_like(X)))


def _saved(gm: nn.Module) -> Any:
    packed: list[Any] = []
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda t: (packed.append([*t.shape]), t)[1], lambda t: t):
        loss = gm(X).sum()
    checkpointed = torch.utils.checkpoint.checkpoint(gm, X, use_reentrant=False)
    parameters = [*gm.parameters()]
    return [
        packed,
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(checkpointed.sum(), parameters),
    ]


def _in_autocast(gm: nn.Module) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return gradients(gm, X)


UNUSUAL = (
    *(_without_gradients, _in_modes, _subclass, _in_blocks, _observed, _transforms),
    *(_of_a_dead_transform, _forward_mode, _traced, _differentiated_twice),
    *(_rules_are_found, _saved, _in_autocast),
    pytest.param(_compiled, marks=pytest.mark.slow),
)


@pytest.mark.parametrize("run", UNUSUAL, ids=lambda run: run.__name__.strip("_"))
def test_unusual_calls(run: Callable[[nn.Module], Any]) -> None:
    gm = transformed()
    assert_same(gm, lambda: run(gm))
    assert_same(gm, lambda: gradients(gm, X))


# --- models that change ---


def _hooked_leaf(gm: Any) -> Any:
    seen: list[bool] = []
    handle = gm.act.register_forward_pre_hook(lambda m, args: seen.append(args[0].requires_grad))
    after = gm.act.register_forward_hook(lambda m, args, out: out * 2)
    found = gradients(gm, X)
    handle.remove()
    after.remove()
    return [seen, *found, *gradients(gm, X)]


def _hooks_of_all(gm: Any) -> Any:
    kinds: list[str] = []
    register = nn.modules.module.register_module_forward_hook
    handle = register(
        lambda m, args, out: kinds.append(f"{type(m).__name__} {args[0].requires_grad}")
    )
    found = gradients(gm, X)
    handle.remove()
    return [kinds, *found]


def _exchanged_leaf(gm: Any) -> Any:
    before = gm.act
    gm.act = nn.LeakyReLU(0.6)
    found = gradients(gm, X)
    gm.act = before
    return [*found, *gradients(gm, X)]


def _forward_of_an_instance(gm: Any) -> Any:
    weight = torch.full((), 0.3, requires_grad=True)
    gm.act.forward = lambda x: x * weight
    try:
        return torch.autograd.grad(gm(X).sum(), [weight, gm.fc.weight])
    finally:
        del gm.act.forward


def _forward_of_a_class(gm: Any) -> Any:
    weight, kind = torch.full((), 0.3, requires_grad=True), nn.LeakyReLU
    before = kind.forward
    kind.forward = lambda self, x: x * weight  # type: ignore[method-assign, assignment]
    try:
        return torch.autograd.grad(gm(X).sum(), [weight, gm.fc.weight])
    finally:
        kind.forward = before  # type: ignore[method-assign]


def _functions(gm: Any) -> Any:
    weight, found = torch.full((), 0.3, requires_grad=True), list[Any]()
    for owner, name in ((nn.functional, "leaky_relu"), (torch, "tanh"), (Tensor, "sigmoid")):
        before = getattr(owner, name)
        setattr(owner, name, lambda x, *args: x * weight)
        try:
            found.append(torch.autograd.grad(gm(X).sum(), [weight, gm.fc.weight]))
        finally:
            setattr(owner, name, before)
    return found


def _class_of_a_leaf(gm: Any) -> Any:
    class Doubled(nn.LeakyReLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    gm.act.__class__ = Doubled
    found = gradients(gm, X)
    gm.act.__class__ = nn.LeakyReLU
    return found


def _hook_that_hooks(gm: Any) -> Any:
    hooks: list[Any] = []

    def hook(*_: Any) -> None:
        hooks.append(gm.act.register_forward_hook(lambda module, args, out: out * 2))

    hooks.append(gm.fc.register_forward_hook(hook))
    found = gradients(gm, X)
    for one in hooks:
        one.remove()
    return found


def _block_between_hooks(gm: Any) -> Any:
    block = fg.native()
    first = gm.fc.register_forward_hook(lambda *_: block.__enter__() and None)
    last = gm.out.register_forward_pre_hook(lambda *_: block.__exit__(None, None, None))
    found = gradients(gm, X)
    first.remove()
    last.remove()
    return found


def _exchanged_layer(gm: Any) -> Any:
    before, gm.fc = gm.fc, nn.Linear(4, 4)
    found = gradients(gm, X)
    gm.fc = before
    return [*found, *gradients(gm, X)]


def _in_place(gm: Any) -> Any:
    gm.act.inplace = True
    found = gradients(gm, X)
    gm.act.inplace = False
    return found


def _compiled_leaf(gm: Any) -> Any:
    gm.act.compile(backend="eager")
    found = gradients(gm, X)
    gm.act._compiled_call_impl = None
    return found


def _written_output(gm: Any) -> Any:
    gm = transformed(_Calls(nn.ReLU()), {"relu": fg.rules.gaussian()})
    leaf = X.clone().requires_grad_()
    (out := gm(leaf)).mul_(3).add_(1)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)
    return [gradient, out.is_leaf, out.grad_fn.name()]


def _parameters_of_rules(gm: Any) -> Any:
    first = gradients(gm, X)
    gm.set_rule_parameter("act:leaky_relu[0]", b=0.1)
    return [*first, *gradients(gm, X), *gradients(gm, X), *gradients(gm, X)]


def _copied(gm: Any) -> Any:
    other = copy.deepcopy(gm)
    with torch.no_grad():
        other.fc.weight.mul_(2)
    other.act.negative_slope = 0.7
    return [t for _ in range(3) for t in gradients(other, X)] + gradients(gm, X)


CHANGES = (
    *(_hooked_leaf, _hooks_of_all, _exchanged_leaf, _forward_of_an_instance, _in_place),
    *(_forward_of_a_class, _exchanged_layer, _compiled_leaf, _written_output, _copied),
    *(_functions, _class_of_a_leaf, _hook_that_hooks, _block_between_hooks),
)


@pytest.mark.parametrize("run", CHANGES, ids=lambda run: run.__name__.strip("_"))
def test_changed_models(run: Callable[[Any], Any]) -> None:
    gm = transformed()
    assert_same(gm, lambda: run(gm))


def test_parameters_of_rules_are_followed() -> None:
    first, second = transformed(), transformed()
    found = _parameters_of_rules(first)
    with three_calls(second):
        before = gradients(second, X)
    second.set_rule_parameter("act:leaky_relu[0]", b=0.1)
    with three_calls(second):
        after = gradients(second, X)
    assert_alike(found, [*before, *after, *after, *after])


def test_a_rule_that_is_registered_again_is_followed() -> None:
    leaf = X.clone().requires_grad_()

    @fg.register("again", overwrite=True)
    def first(grad: Tensor) -> Tensor:
        return grad * 2

    gm = transformed(_Calls(torch.tanh), {"tanh": "again"})
    assert torch.equal(torch.autograd.grad(gm(leaf).sum(), leaf)[0], torch.full((5, 4), 4.0))

    @fg.register("again", overwrite=True)
    def second(grad: Tensor) -> Tensor:
        return grad * 3

    assert torch.equal(torch.autograd.grad(gm(leaf).sum(), leaf)[0], torch.full((5, 4), 6.0))


def test_a_module_that_disables_gradients_is_noticed() -> None:
    class Disables(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch.set_grad_enabled(False)
            return x * 1

    gm = fg.transform(
        nn.Sequential(Disables(), nn.Tanh()), {"tanh": "scale"}, leaf_modules=[Disables]
    )
    for _ in range(3):
        with torch.enable_grad():
            assert not gm(X.clone().requires_grad_()).requires_grad


def test_sites_after_code_of_the_user_are_three_calls() -> None:
    class Enters(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            block.__enter__()
            return x * 1

    block = fg.native()
    model = nn.Sequential(nn.Sigmoid(), Enters(), nn.Tanh())
    gm = fg.transform(model, {"tanh": "stop", "sigmoid": "scale"}, leaf_modules=[Enters])
    for _ in range(3):
        leaf = X.clone().requires_grad_()
        try:
            out = gm(leaf)
        finally:
            block.__exit__(None, None, None)
        assert torch.autograd.grad(out.sum(), leaf)[0].any()
    assert len(sites(gm)) == 1


def test_an_edited_graph_runs_once_it_is_recompiled() -> None:
    gm = fg.transform(_Calls(torch.tanh), {"tanh": "scale"})
    for _ in range(2):
        before = gm(X.clone().requires_grad_())
        (node,) = (n for n in gm.graph.nodes if n.target in (torch.tanh, torch.sigmoid))
        node.target = torch.sigmoid
        assert torch.equal(before, X.tanh() * 2)
    gm.recompile()
    for _ in range(3):
        assert torch.equal(gm(X.clone().requires_grad_()), X.sigmoid() * 2)


def test_what_readers_see_stays() -> None:
    gm = transformed()
    code, nodes = gm.code, len(gm.graph.nodes)
    gradients(gm, X)
    assert (gm.code, len(gm.graph.nodes)) == (code, nodes)
    assert "stop_gradient" in gm.code
    interpreted = torch.fx.Interpreter(gm).run(X.clone().requires_grad_())
    assert torch.equal(interpreted, gm(X.clone().requires_grad_()))


def test_errors_of_formulas_name_the_site() -> None:
    @fg.register("wrong", overwrite=True)
    def wrong(grad: Tensor, x: Tensor) -> Tensor:
        return grad.sum()

    @fg.register("writes", overwrite=True)
    def writes(grad: Tensor, x: Tensor) -> Tensor:
        return grad.mul_(2)

    for rule, text in (("wrong", "returned a gradient of shape"), ("writes", "in place")):
        gm = transformed(_Calls(torch.tanh), {"tanh": rule})
        with pytest.raises(fg.RuleError, match=text):
            gm(X.clone().requires_grad_()).sum().backward()
