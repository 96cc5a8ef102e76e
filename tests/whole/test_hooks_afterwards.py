"""Hooks that come after the transform, on layers with rules and on modules that the graph has opened.

The oracle is the untransformed model with the same hooks on the same modules.
"""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules import module as torch_module

import freegrad_fx as fg
from runs import Call, call
from side_by_side import BACKWARD, RULE, THRICE, Net, build, difference, sample
from sweep import Interception

NATIVE: dict[str, Any] = {"activations": None}
Hook = Callable[[nn.Module, list[Any]], Any]


def times(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else g * 5 for g in grads)


def doubled(value: Any) -> Any:
    if isinstance(value, list):
        return [doubled(v) for v in value]
    if isinstance(value, tuple):
        return (
            type(value)(*map(doubled, value))
            if hasattr(value, "_fields")
            else tuple(map(doubled, value))
        )
    return {k: doubled(v) for k, v in value.items()} if isinstance(value, dict) else value * 2


def first(args: tuple[Any, ...], kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (tuple(a * 3 if isinstance(a, Tensor) else a for a in args), kwargs)


HOOKS: dict[str, Hook] = {
    "looks": lambda m, log: m.register_forward_hook(lambda m, args, y: log.append("looks")),
    "forward": lambda m, log: m.register_forward_hook(
        lambda m, args, y: (log.append("forward"), doubled(y))[1]
    ),
    "forward, with keywords": lambda m, log: m.register_forward_hook(
        lambda m, args, kwargs, y: (log.append(sorted(kwargs)), doubled(y))[1], with_kwargs=True
    ),
    "forward, always": lambda m, log: m.register_forward_hook(
        lambda m, args, y: log.append("always"), always_call=True
    ),
    "reads the arguments": lambda m, log: m.register_forward_hook(
        lambda m, args, y: y + args[0].sin() if isinstance(y, Tensor) else None
    ),
    "before": lambda m, log: m.register_forward_pre_hook(
        lambda m, args: (log.append("before"), first(args, {})[0])[1]
    ),
    "before, with keywords": lambda m, log: m.register_forward_pre_hook(
        lambda m, args, kwargs: (log.append("before"), first(args, kwargs))[1], with_kwargs=True
    ),
    "backward": lambda m, log: m.register_full_backward_hook(
        lambda m, into, out: (log.append([len(into), len(out)]), times(into))[1]
    ),
    "before backward": lambda m, log: m.register_full_backward_pre_hook(
        lambda m, out: (log.append("before backward"), times(out))[1]
    ),
}  # fmt: skip


# --- models: `part` is opened by the graph, `part.act` is a layer with a rule ---


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.g(self.act(self.f(x))) + x


class Branches(Plain):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.f(x)) if self.training else torch.tanh(self.act(self.f(x)))
        return self.g(y)


class Pair(NamedTuple):
    y: Tensor
    x: Tensor


class Functions(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.act(x)
        return F.relu(self.f(x))


class InPlace(Net):
    def make(self) -> None:
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        y = self.act(h)
        return self.g(y) + h


class Nested(Net):
    def make(self) -> None:
        self.inner = nn.Sequential(Plain())
        self.act = self.inner[0].act

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class OfTwo(Net):
    def forward(self, x: Tensor, other: Tensor, by: float = 1.0, *, add: Any = 0.0) -> Any:
        y = self.act(self.f(x)) * by + add
        return y, {"other": self.g(other)}, [y * 2]


class Returns(Net):
    def forward(self, x: Tensor) -> Pair:
        return Pair(self.act(self.f(x)), x)


class SecondCall(Net):
    def make(self) -> None:
        self.part = Plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


class Once(SecondCall):
    kind: type[nn.Module] = Plain

    def make(self) -> None:
        self.part = self.kind()


def around(kind: type[nn.Module]) -> type[nn.Module]:
    return type("Once", (Once,), {"kind": kind})


class Twice(SecondCall):
    def forward(self, x: Tensor) -> Tensor:
        return self.part(torch.sin(self.part(x))) + x


class CallsOfTwo(Once):
    kind = OfTwo

    def forward(self, x: Tensor) -> Tensor:
        y, more, (z,) = self.part(x, x.cos(), by=2.0, add=x.sin())
        return y + more["other"] + z


class Pairs(Once):
    """The part returns its argument too, which the model reads by itself as well."""

    kind = Returns

    def forward(self, x: Tensor) -> Tensor:
        h = self.g(x)
        pair = self.part(h)
        return pair.y + pair.x.sin() + h.cos()


class ReturnsItsArgument(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Nothing(Once):
    kind = ReturnsItsArgument

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.f(x))
        return self.part(h) + h.sin()


MODELS: dict[str, type[nn.Module]] = {
    "plain": around(Plain),
    "branches on its mode": around(Branches),
    "functions": around(Functions),
    "in place": around(InPlace),
    "nested": around(Nested),
    "twice": Twice,
    "several arguments and results": CallsOfTwo,
    "returns its argument": Pairs,
    "does nothing": Nothing,
}
PATHS = ["part", "part.act"]
INNER = ["part.inner", "part.inner.0"]


def hooked(make: type[nn.Module], path: str, kind: str, table: Any = None) -> tuple[Any, list[Any]]:
    """A model, transformed if there is a table, that gets hooks afterwards."""
    model: nn.Module = build(make)
    model = model if table is None else fg.transform(model, table)
    log: list[Any] = []
    HOOKS[kind](model.get_submodule(path), log)
    return model, log


def cases() -> Iterator[tuple[str, str]]:
    for name in MODELS:
        yield from ((name, path) for path in (INNER if name == "nested" else PATHS))


@pytest.mark.thinned(2)
@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(("name", "path"), list(cases()))
def test_hooks_act_as_on_the_original(name: str, path: str, kind: str) -> None:
    for training in (True, False)[: 2 if name == "branches on its mode" else 1]:
        for table, reference in ((NATIVE, None), (RULE, Interception(BACKWARD)))[
            path == PATHS[1] :
        ]:
            original, expected = hooked(MODELS[name], path, kind)
            gm, log = hooked(MODELS[name], path, kind, table)
            found = difference(original.train(training), gm.train(training), THRICE[:1], reference)
            if "also read in other ways" in found:
                assert (name, path, table) == ("in place", "part.act", RULE)
                assert "before" in kind or "backward" in kind
                continue
            assert found == ""
            assert log == expected


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", MODELS)
def test_several_hooks_at_once_that_come_and_go(name: str) -> None:
    original, gm = build(MODELS[name]), fg.transform(build(MODELS[name]), RULE)
    nodes = len(gm.graph.nodes)
    code, reference = gm.code, Interception(BACKWARD)
    kinds = [k for k in HOOKS if name != "in place" or not ("backward" in k or "before" in k)]
    handles: list[list[Any]] = []
    for path in ("part", "part.act", "part.f", "part"):
        for kind in kinds:
            handles.append([HOOKS[kind](m.get_submodule(path), []) for m in (original, gm)])
        assert difference(original, gm, THRICE[:1], reference) == ""
    for pair in handles:
        for handle in pair:
            handle.remove()
    assert difference(original, gm, THRICE[:1], reference) == ""
    assert (len(gm.graph.nodes), gm.code) == (nodes, code)


def test_hooks_get_the_modules_and_tensors_of_the_call() -> None:
    gm = fg.transform(build(MODELS["plain"]), RULE)
    seen: list[Any] = []
    gm.part.register_forward_pre_hook(lambda m, args: seen.append((m, args)))
    gm.part.register_forward_hook(lambda m, args, y: seen.append((m, args, y)))
    x = sample()
    y = gm(x)
    assert [entry[0] for entry in seen] == [gm.part] * 2
    assert seen[0][1][0] is seen[1][1][0] is x
    assert seen[1][2] is y


def test_what_a_hook_keeps_has_the_gradient_of_the_block() -> None:
    """As tools for class activation maps use it: a hook keeps the output, and a tensor hook on it the gradient."""
    kept: list[list[Tensor]] = []
    for model in (build(Twice), fg.transform(build(Twice), RULE)):
        found: list[Tensor] = []

        def keep(module: nn.Module, args: Any, y: Tensor, found: list[Tensor] = found) -> None:
            found.append(y)
            y.register_hook(found.append)

        model.get_submodule("part").register_forward_hook(keep)
        with Interception(BACKWARD) if not kept else warnings.catch_warnings():
            model(sample()).sin().sum().backward()
        kept.append(found)
    assert len(kept[0]) == len(kept[1]) == 4
    for a, b in zip(*kept, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["plain", "twice", "nested", "several arguments and results"])
def test_hooks_for_all_modules(name: str) -> None:
    def hook(log: list[Any]) -> Any:
        return lambda m, args, y: (log.append(type(m).__name__), doubled(y))[1]

    original, gm = build(MODELS[name]), fg.transform(build(MODELS[name]), RULE)
    logs: list[list[Any]] = []
    for model in (original, gm):
        logs.append([])
        handles = [
            torch_module.register_module_forward_hook(hook(logs[-1])),
            torch_module.register_module_forward_pre_hook(lambda m, args: first(args, {})[0]),
            torch_module.register_module_full_backward_hook(lambda m, into, out: times(into)),
        ]
        try:
            x = sample().requires_grad_()
            with Interception(BACKWARD) if model is original else warnings.catch_warnings():
                y = model(x)
                y.sin().sum().backward()
            logs[-1] += [y, x.grad, *(p.grad for p in model.parameters())]
        finally:
            for handle in handles:
                handle.remove()
    for a, b in zip(*logs, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b)
        else:
            assert a == b or (b == type(gm).__name__)
    assert difference(original, gm, THRICE[:1], Interception(BACKWARD)) == ""


# --- copies, threads, compilers ---


def times_three(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return y * 3


class SavedOnce(Once):
    kind = Branches


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copied": copy.deepcopy,
    "pickled": lambda gm: pickle.loads(pickle.dumps(gm)),
    "shallow": copy.copy,
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_copies_keep_hooks_and_can_get_them(way: str, before: bool) -> None:
    original, gm = build(SavedOnce), fg.transform(build(SavedOnce), RULE)
    for path in PATHS:
        original.get_submodule(path).register_forward_hook(times_three)
        if before:
            gm.get_submodule(path).register_forward_hook(times_three)
    made = WAYS[way](gm)
    if not before:
        for path in PATHS:
            made.get_submodule(path).register_forward_hook(times_three)
    for training in (True, False):
        found = difference(
            original.train(training), made.train(training), THRICE[:1], Interception(BACKWARD)
        )
        assert found == ""


@pytest.mark.parametrize("path", ["part.act", pytest.param("part", marks=pytest.mark.slow)])
def test_compiled_models_follow_hooks(path: str) -> None:
    original, gm = build(MODELS["plain"]), fg.transform(build(MODELS["plain"]), RULE)
    compiled = torch.compile(gm, backend="aot_eager", fullgraph=True)
    for added in (False, True, False):
        handles = [
            m.get_submodule(path).register_forward_hook(times_three)
            for m in (original, gm)
            if added
        ]
        x = sample().requires_grad_()
        with Interception(BACKWARD):
            y = original(x)
            (wanted,) = torch.autograd.grad(y.sin().sum(), x)
        z = compiled(x)
        torch.testing.assert_close(z, y)
        torch.testing.assert_close(torch.autograd.grad(z.sin().sum(), x)[0], wanted)
        for handle in handles:
            handle.remove()


def test_threads_make_the_version_together() -> None:
    gm, original = fg.transform(build(Twice), RULE), build(Twice)
    for model in (gm, original):
        model.get_submodule("part").register_forward_hook(times_three)
    results: list[Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(gm(sample()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for y in results:
        assert torch.equal(y, original(sample()))


def test_ambient_rules_and_hooks() -> None:
    original, gm = build(MODELS["plain"]), fg.transform(build(MODELS["plain"]))
    for path in PATHS:
        for model in (original, gm):
            model.get_submodule(path).register_forward_hook(times_three)
            model.get_submodule(path).register_full_backward_hook(lambda m, into, out: times(into))
    assert difference(original, gm, THRICE[:2]) == ""


def test_hooks_for_errors_run_if_the_forward_fails() -> None:
    found = []
    for transformed in (False, True):
        model: nn.Module = build(MODELS["nested"])
        model = fg.transform(model, RULE) if transformed else model
        log: list[Any] = []
        for path in ("part", "part.inner", "part.inner.0.act"):
            module = model.get_submodule(path)
            module.register_forward_hook(
                lambda m, args, y, log=log, path=path: log.append((path, y is None)),
                always_call=True,
            )

        def fail(*_: Any) -> None:
            raise ZeroDivisionError

        handle = model.get_submodule("part.inner.0").register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(sample())
        handle.remove()
        model(sample())
        found.append(log)
    assert found[0] == found[1]


# --- hooks that are there when the model is transformed ---


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", ["twice", "branches on its mode"])
def test_hooks_of_blocks_at_the_time_of_the_transform(name: str, kind: str) -> None:
    logs: list[list[Any]] = [[], []]
    models = [build(MODELS[name]) for _ in range(2)]
    for model, log in zip(models, logs, strict=True):
        HOOKS[kind](model.get_submodule("part"), log)
    original, gm = models[0], fg.transform(models[1], RULE, strict=True)
    assert not logs[1], "the capture called a hook"
    assert difference(original, gm, THRICE[:2], Interception(BACKWARD)) == ""
    assert logs[0] == logs[1]


class Stub(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_block_with_hooks_and_without_a_site_stays_one_call() -> None:
    """As observers for quantization are attached: the hook calls a submodule."""
    model = nn.Sequential(Stub(), nn.Linear(6, 6), nn.ReLU(), Stub())
    for part in (model[0], model[3]):
        part.add_module("observer", nn.BatchNorm1d(6, affine=False))
        part.register_forward_hook(lambda m, args, y: m.observer(y) * 0 + y)
    gm = fg.transform(model, NATIVE, strict=True)
    called = [node.target for node in gm.graph.nodes if node.op == "call_module"]
    assert called == ["0", "1", "2", "3"]
    copied = copy.deepcopy(model)
    assert torch.equal(gm(sample()), copied(sample()))
    assert torch.equal(gm[3].observer.running_mean, copied[3].observer.running_mean)


def test_observers_of_quantization() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")

    def make() -> nn.Module:
        torch.manual_seed(0)
        parts = (nn.Linear(6, 6), nn.ReLU(), quantization.DeQuantStub())
        model = nn.Sequential(quantization.QuantStub(), *parts)
        model.qconfig = quantization.get_default_qconfig("fbgemm")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return quantization.prepare(model)

    original, model = make().eval(), make().eval()
    gm = fg.transform(model, {"relu": None})
    for _ in range(2):
        assert torch.equal(gm(sample()), original(sample()))
    for (name, a), b in zip(original.named_buffers(), gm.buffers(), strict=True):
        assert torch.equal(a, b), name


# --- hooks that cannot act ---


def test_hooks_on_a_model_from_an_export_are_named_once() -> None:
    gm = fg.transform(build(MODELS["plain"]), NATIVE, example_inputs=(sample(),))
    gm.part.register_forward_hook(lambda *_: None)
    with pytest.warns(fg.FreegradWarning, match=r"the hooks of part \(Plain\) do not run"):
        y = gm(sample())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(gm(sample()), y)


def test_hooks_on_a_graph_that_was_changed_are_named() -> None:
    gm = fg.transform(build(MODELS["plain"]), NATIVE)
    node = next(n for n in gm.graph.nodes if n.target == "part.g")
    with gm.graph.inserting_after(node):
        new = gm.graph.call_function(torch.neg, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    gm.recompile()
    gm.part.register_forward_hook(lambda *_: None)
    with pytest.warns(fg.FreegradWarning, match="do not run"):
        gm(sample())


class TakesAnObject(Net):
    def forward(self, x: Tensor, given: Any) -> Tensor:
        return self.act(self.f(x)) + given.number


class GivesAnObject(Once):
    kind = TakesAnObject

    def forward(self, x: Tensor) -> Tensor:
        given = threading.local()
        given.number = 2.0
        return self.part(x, given)


def test_hooks_on_a_call_that_a_graph_cannot_hold_are_named() -> None:
    model = build(GivesAnObject)
    gm = fg.transform(model, NATIVE)
    gm.part.register_forward_hook(lambda m, args, y: y * 3)
    with pytest.warns(fg.FreegradWarning, match="do not run"):
        assert torch.equal(gm(sample()), model(sample()))
    model.part.register_forward_hook(lambda m, args, y: y * 3)
    with pytest.warns(fg.FreegradWarning, match="the hooks of TakesAnObject"):
        fg.transform(model, NATIVE)


def changes_a_number(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "by": 4.0}


CANNOT: dict[str, tuple[Any, str]] = {
    "structure": (lambda m: m.register_forward_hook(lambda m, args, y: y[0]), "structure"),
    "number": (lambda m: m.register_forward_pre_hook(changes_a_number, with_kwargs=True), "tensor"),
}


@pytest.mark.parametrize("name", CANNOT)
def test_hooks_that_change_a_constant_of_the_graph_are_errors(name: str) -> None:
    register, message = CANNOT[name]
    gm = fg.transform(build(CallsOfTwo), NATIVE)
    register(gm.part)
    with pytest.raises(RuntimeError, match=f"the hooks of OfTwo .*{message}.*leaf_modules"):
        gm(sample())


def test_a_call_that_gets_a_tensor_twice() -> None:
    class TakesTwo(Net):
        def forward(self, x: Tensor, other: Tensor) -> Tensor:
            return self.act(self.f(x)) + other

    class GivesTwice(Once):
        kind = TakesTwo

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x, x)

    original, gm = build(GivesTwice), fg.transform(build(GivesTwice), NATIVE)
    for model in (original, gm):
        model.part.register_forward_hook(times_three)
    assert difference(original, gm, THRICE[:1]) == ""
    gm.part.register_forward_pre_hook(lambda m, args: (args[0] * 2, args[1]))
    with pytest.raises(RuntimeError, match="also read in other ways"):
        gm(sample())


def test_a_model_that_is_called_with_keywords() -> None:
    given: Call = call(x=sample())
    original, gm = build(MODELS["plain"]), fg.transform(build(MODELS["plain"]), NATIVE)
    for model in (original, gm):
        model.part.register_forward_hook(times_three)
    assert difference(original, gm, [given]) == ""


# --- tools that select outputs by the paths of modules ---


class ScopeTracer(fx.Tracer):
    """Names nodes by the modules that they are in, as the tracer of torchvision's feature extraction does."""

    def __init__(self) -> None:
        super().__init__()
        self.current_module_qualname = ""
        self.node_to_qualname: dict[fx.Node, str] = {}

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before, self.current_module_qualname = self.current_module_qualname, self.path_of_module(m)
        try:
            if self.is_leaf_module(m, self.current_module_qualname):
                return self.create_proxy("call_module", self.current_module_qualname, args, kwargs)
            return forward(*args, **kwargs)
        finally:
            self.current_module_qualname = before

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, *args, **kwargs)
        name = self.current_module_qualname
        whole = name if kind == "call_module" else f"{name}.{proxy.node}".strip(".")
        self.node_to_qualname[proxy.node] = whole
        return proxy


def feature(model: nn.Module, path: str) -> nn.Module:
    """The last operation in a module, or of a name."""
    tracer = ScopeTracer()
    graph = tracer.trace(model)
    steps = path.split(".")
    for node in reversed(graph.nodes):
        if tracer.node_to_qualname.get(node, "").split(".")[: len(steps)] == steps:
            (output,) = [n for n in graph.nodes if n.op == "output"]
            output.args = (node,)
            return fx.GraphModule(tracer.root, graph)
    raise AssertionError(path)


@pytest.mark.parametrize("ruled", [False, True])
@pytest.mark.parametrize("path", ["part", "part.act", "part.f"])
def test_features_have_the_gradient_of_the_transformed_model(path: str, ruled: bool) -> None:
    model = build(MODELS["plain"])
    found = []
    for transformed in (False, True):
        made = fg.transform(model, RULE if ruled else NATIVE) if transformed else model
        extractor, x = feature(made, path), sample().requires_grad_()
        with Interception(BACKWARD) if ruled and not transformed else warnings.catch_warnings():
            y = extractor(x)
            found.append((y, torch.autograd.grad(y.sin().sum(), x)[0]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


RESNET_TOOLS: dict[str, Callable[[Any, nn.Module, Tensor], Any]] = {
    "class activation map": lambda c, m, x: c.LayerGradCam(m, m.layer4).attribute(x, target=1),
    "activation": lambda c, m, x: c.LayerActivation(m, m.layer3).attribute(x),
    "activation of a layer": lambda c, m, x: c.LayerActivation(m, m.relu).attribute(x),
    "integrated": lambda c, m, x: c.LayerIntegratedGradients(m, m.layer2).attribute(
        x, target=1, n_steps=2
    ),
    "guided": lambda c, m, x: c.GuidedBackprop(m).attribute(x.requires_grad_(), target=1),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ruled", [False, True])
@pytest.mark.parametrize("tool", RESNET_TOOLS)
def test_tools_of_captum(tool: str, ruled: bool) -> None:
    attr, models = pytest.importorskip("captum.attr"), pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.resnet18().eval()
    x = torch.randn(2, 3, 64, 64)
    gm = fg.transform(model, RULE if ruled else NATIVE)
    with Interception(BACKWARD) if ruled else warnings.catch_warnings():
        wanted = RESNET_TOOLS[tool](attr, model, x.clone())
    torch.testing.assert_close(
        RESNET_TOOLS[tool](attr, gm, x.clone()), wanted, rtol=1e-3, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_deep_lift_of_captum_replaces_the_gradient_of_a_rule() -> None:
    attr = pytest.importorskip("captum.attr")
    model = build(MODELS["plain"])
    for table in (NATIVE, RULE):
        gm = fg.transform(model, table)
        found = attr.DeepLift(gm).attribute(sample(), target=1)
        torch.testing.assert_close(found, attr.DeepLift(model).attribute(sample(), target=1))
        assert torch.equal(gm(sample()), model(sample()))


@pytest.mark.slow
@pytest.mark.parametrize("ruled", [False, True])
def test_feature_extractors_of_torchvision(ruled: bool) -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.resnet18().eval()
    gm = fg.transform(model, RULE if ruled else NATIVE)
    found = []
    for made in (model, gm):
        paths = {"layer2": "block", "layer3.0.relu_1": "layer"}
        extractor = extraction.create_feature_extractor(made, paths).eval()
        x = torch.linspace(-1, 1, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64).requires_grad_()
        with Interception(BACKWARD) if ruled and made is model else warnings.catch_warnings():
            out = extractor(x)
            (grad,) = torch.autograd.grad(out["block"].sum() + out["layer"].sin().sum(), x)
        found.append((out["block"], out["layer"], grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
