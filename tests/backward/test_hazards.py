"""Where PyTorch drops a custom backward, a model with rules warns, refuses or is right: it is never silently native."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
import models

RULES = {"relu": fg.rules.fast_sigmoid(slope=2.0), "tanh": fg.rules.scale(s=3.0)}
RELU = models.naive(F.relu, models.fast_sigmoid(2.0))
TANH = models.naive(torch.tanh, models.scale(3.0))
COMPILED = pytest.mark.parametrize("backend", ["eager", "aot_eager"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(torch.relu(self.first(x))))


class ByHand(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(TANH(RELU(self.first(x))))


@pytest.fixture
def model() -> Net:
    return Net()


@pytest.fixture
def gm(model: Net) -> fg.CapturedModule:
    return fg.transform(model, RULES)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(4, 5)


def expected(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    by_hand = ByHand()
    by_hand.load_state_dict(model.state_dict())
    return gradients(by_hand, x, by_hand)


def gradients(run: Callable[[Tensor], Tensor], x: Tensor, model: nn.Module) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss(run(x)), list(model.parameters()))
    return dict(zip(dict(model.named_parameters()), found, strict=True))


def loss(output: Tensor) -> Tensor:
    return output.square().sum()


def compiled(model: Any, backend: str) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


# --- transforms of torch.func ---


def transforms(gm: nn.Module, x: Tensor) -> dict[str, Callable[[dict[str, Tensor]], Any]]:
    """Ways to the gradients of the parameters, which are functions of them."""

    def total(parameters: dict[str, Tensor], x: Tensor = x) -> Tensor:
        return loss(functional_call(gm, parameters, (x,)))

    def each(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.vmap(torch.func.grad(total), (None, 0))(parameters, x[:, None])

    return {
        "grad": torch.func.grad(total),
        "grad_and_value": lambda p: torch.func.grad_and_value(total)(p)[0],
        "vmap(grad)": lambda p: {name: g.sum(0) for name, g in each(p).items()},
        "jacrev": torch.func.jacrev(total),
        "vjp": lambda p: torch.func.vjp(total, p)[1](torch.tensor(1.0))[0],
    }


NAMES = list(transforms(nn.Identity(), torch.zeros(1, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_transforms_of_functions_are_right_uncompiled(
    gm: fg.CapturedModule, x: Tensor, name: str
) -> None:
    actual = transforms(gm, x)[name](dict(gm.named_parameters()))
    torch.testing.assert_close(actual, expected(gm, x))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("disabled", [False, True])
@COMPILED
def test_compiled_transforms_are_refused_and_the_remedy_works(
    gm: fg.CapturedModule, x: Tensor, name: str, backend: str, disabled: bool
) -> None:
    """Cases 12 and 13: PyTorch compiles them without the custom backward."""
    transform = transforms(gm, x)[name]
    parameters = dict(gm.named_parameters())
    if not disabled:
        with pytest.raises(Exception, match=r"torch\.compile drops the backward") as caught:
            compiled(transform, backend)(parameters)
        assert "torch.compiler.disable" in str(caught.value)
        return
    transform = torch.compiler.disable(transform)
    actual = torch.compile(lambda p: transform(p), backend=backend)(parameters)
    torch.testing.assert_close(actual, expected(gm, x))


@COMPILED
def test_a_compiled_functional_call_keeps_the_rules(
    gm: fg.CapturedModule, x: Tensor, backend: str
) -> None:
    parameters = {n: p.detach().clone().requires_grad_() for n, p in gm.named_parameters()}
    run = compiled(lambda p, x: loss(functional_call(gm, p, (x,))), backend)
    found = torch.autograd.grad(run(parameters, x), list(parameters.values()))
    torch.testing.assert_close(dict(zip(parameters, found, strict=True)), expected(gm, x))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own, at the graph break
@pytest.mark.parametrize(
    "transform", [torch.func.jacfwd, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))]
)
def test_forward_mode_is_refused_compiled_and_not(
    gm: fg.CapturedModule, x: Tensor, transform: Any
) -> None:
    for run in (transform(gm), torch.compile(transform(gm), backend="aot_eager")):
        with pytest.raises(NotImplementedError, match="jvp"):
            run(x)


# --- programs that hold a forward alone ---

STAYS_BEHIND = "the backward rules of this model are not exported"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_exported_model_computes_the_same_and_warns(
    gm: fg.CapturedModule, x: Tensor, strict: bool, training: bool
) -> None:
    """Case 22."""
    gm.train(training)
    with pytest.warns(fg.FreegradWarning, match=STAYS_BEHIND):
        program = torch.export.export(gm, (x,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert torch.equal(loaded(x), gm(x))
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("freegrad" in target for target in targets)


def test_an_export_without_gradients_warns_too(gm: fg.CapturedModule, x: Tensor) -> None:
    with pytest.warns(fg.FreegradWarning, match=STAYS_BEHIND), torch.no_grad():
        torch.export.export(gm, (x,))


def test_an_exported_model_never_learns_natively_where_a_rule_stood(
    gm: fg.CapturedModule, x: Tensor
) -> None:
    """Where the warning was overlooked: what stands in front of a rule gets no gradient, not another one."""
    with pytest.warns(fg.FreegradWarning, match="for inference"):
        program = torch.export.export(gm, (x,)).module()
    loss(program(x)).backward()
    learnt = {name for name, p in program.named_parameters() if p.grad is not None}
    assert learnt == {"second.weight", "second.bias"}


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_model_with_rules_on_all_parameters_cannot_be_trained(
    model: Net, x: Tensor, strict: bool
) -> None:
    gm = fg.transform(model, {"params": "scale"})
    with pytest.warns(fg.FreegradWarning, match=STAYS_BEHIND):
        program = torch.export.export(gm, (x,), strict=strict).module()
    assert torch.equal(program(x), model(x))
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss(program(x)).backward()


def test_strict_warnings_refuse_an_export(gm: fg.CapturedModule, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", fg.FreegradWarning)
        with pytest.raises(fg.FreegradWarning, match=STAYS_BEHIND):
            torch.export.export(gm, (x,))


def test_a_model_without_a_rewritten_site_is_exported_without_a_warning(
    model: Net, x: Tensor
) -> None:
    gm = fg.transform(model, {"relu": None})
    assert torch.equal(torch.export.export(gm, (x,)).module()(x), model(x))


def test_the_rules_of_a_part_are_not_lost_in_a_capture_by_export(
    gm: fg.CapturedModule, x: Tensor
) -> None:
    whole = nn.Sequential(gm, nn.Sigmoid())
    with pytest.raises(fg.CaptureError, match="has backward rules already"):
        fg.transform(whole, {"sigmoid": "scale"}, example_inputs=(x,))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based")
def test_an_onnx_export_warns(gm: fg.CapturedModule, x: Tensor, dynamo: bool) -> None:
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    gm.eval()
    with pytest.warns(fg.FreegradWarning, match=STAYS_BEHIND):
        torch.onnx.export(gm, (x,), io.BytesIO(), dynamo=dynamo, verbose=False)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("rules", [RULES, {"params": "scale"}], ids=["activations", "parameters"])
def test_a_torchscript_trace_computes_the_same_and_warns(
    model: Net, x: Tensor, tmp_path: Path, rules: Any
) -> None:
    """PyTorch would put a call into this process's Python there, which no file can hold."""
    gm = fg.transform(model, rules)
    with pytest.warns(fg.FreegradWarning, match=STAYS_BEHIND):
        traced = torch.jit.trace(gm, x)
    traced.save(str(tmp_path / "traced.pt"))
    for run in (traced, torch.jit.load(str(tmp_path / "traced.pt"))):
        assert torch.equal(run(x), gm(x))
    assert "PythonOp" not in str(traced.inlined_graph)
    assert "^" not in str(traced.inlined_graph)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_refused_with_the_remedy(gm: fg.CapturedModule, model: Net) -> None:
    for whole in (gm, nn.Sequential(gm, nn.ReLU())):
        with pytest.raises(
            RuntimeError, match=r"torch\.jit\.script does not support Net.*original"
        ):
            torch.jit.script(whole)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_of_the_forward_warns(gm: fg.CapturedModule, x: Tensor, pre_dispatch: bool) -> None:
    with pytest.warns(fg.FreegradWarning, match="only if the gradients are also computed inside"):
        make_fx(gm, pre_dispatch=pre_dispatch)(x)


@pytest.mark.filterwarnings("ignore:make_fx records the forward")
def test_make_fx_of_a_whole_step_holds_the_rules(gm: fg.CapturedModule, x: Tensor) -> None:
    def step(x: Tensor) -> list[Tensor]:
        return list(gradients(gm, x, gm).values())

    other = torch.randn(4, 5)
    actual = make_fx(step)(x)(other)
    torch.testing.assert_close(
        dict(zip(dict(gm.named_parameters()), actual, strict=True)), expected(gm, other)
    )


def test_a_joint_graph_of_aotautograd_holds_the_rules(gm: fg.CapturedModule, x: Tensor) -> None:
    from torch._functorch.aot_autograd import aot_module, make_boxed_func

    run = aot_module(gm, fw_compiler=lambda graph, _: make_boxed_func(graph.forward))
    torch.testing.assert_close(gradients(run, x, gm), expected(gm, x))


# --- second derivatives ---


def second_derivatives(run: Any, x: Tensor, model: nn.Module) -> list[Tensor]:
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss(run(x)), parameters, create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), parameters))


def test_second_derivatives_are_right_uncompiled(gm: fg.CapturedModule, x: Tensor) -> None:
    by_hand = ByHand()
    by_hand.load_state_dict(gm.state_dict())
    actual, wanted = second_derivatives(gm, x, gm), second_derivatives(by_hand, x, by_hand)
    torch.testing.assert_close(actual, wanted)


def test_second_derivatives_of_compiled_models_are_refused_by_pytorch(
    gm: fg.CapturedModule, x: Tensor
) -> None:
    """Case 33."""
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        second_derivatives(compiled(gm, "aot_eager"), x, gm)


def test_second_derivatives_under_the_debugging_back_end(gm: fg.CapturedModule, x: Tensor) -> None:
    """Where PyTorch differentiates no autograd.Function of the user's twice."""
    by_hand = ByHand()
    by_hand.load_state_dict(gm.state_dict())
    wanted = second_derivatives(by_hand, x, by_hand)
    actual = second_derivatives(torch.compile(gm, backend="eager"), x, gm)
    torch.testing.assert_close(actual, wanted)


# --- hooks ---


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own, at the graph break
@pytest.mark.parametrize("rules", [None, RULES, {"params": "scale"}], ids=["no", "relu", "params"])
@pytest.mark.parametrize("early", [True, False])
def test_backward_hooks_of_parts_fire_compiled_as_without_rules(
    model: Net, x: Tensor, rules: Any, early: bool
) -> None:
    """Case 39: PyTorch sees no hook that comes after the first call, and none with `fullgraph=True`."""
    run = model if rules is None else fg.transform(model, rules)
    part = run.get_submodule("first")
    x.requires_grad_()  # without which the hook warns
    compiled = torch.compile(run, backend="aot_eager")
    if not early:
        loss(compiled(x)).backward()
    fired: list[Any] = []
    part.register_full_backward_hook(lambda *gradients: fired.append(gradients))
    loss(compiled(x)).backward()
    assert len(fired) == early


# --- checkpoints, compiled autograd ---


@pytest.mark.sampled(4)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("where", ["inside", "outside", "uncompiled"])
@COMPILED
def test_checkpoints_change_nothing(
    gm: fg.CapturedModule, x: Tensor, use_reentrant: bool, where: str, backend: str
) -> None:
    """Case 29."""
    x.requires_grad_()  # without which a reentrant checkpoint computes no gradient at all

    def run(part: Any, x: Tensor) -> Tensor:
        return checkpoint(part, x, use_reentrant=use_reentrant)

    if where == "inside":
        step = compiled(lambda x: run(gm, x), backend)
    elif where == "outside":
        part = compiled(gm, backend)
        step = lambda x: run(part, x)  # noqa: E731
    else:
        step = lambda x: run(gm, x)  # noqa: E731
    loss(step(x)).backward()
    actual = {name: p.grad for name, p in gm.named_parameters()}
    torch.testing.assert_close(actual, expected(gm, x.detach()))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("run", ["eager", "aot_eager"])
def test_a_checkpoint_of_a_random_rule_is_reproducible(
    model: Net, x: Tensor, use_reentrant: bool, run: str
) -> None:
    gm = fg.transform(model, "full_jam")
    x.requires_grad_()

    def step(x: Tensor) -> Tensor:
        return checkpoint(gm, x, use_reentrant=use_reentrant)

    run_it = step if run == "eager" else compiled(step, run)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        x.grad = None
        loss(run_it(x)).backward()
        found.append(x.grad)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo's own
@pytest.mark.parametrize("forward", ["eager", "aot_eager"])
def test_compiled_autograd_compiles_the_rules(
    gm: fg.CapturedModule, x: Tensor, forward: str
) -> None:
    run = gm if forward == "eager" else compiled(gm, forward)
    output = loss(run(x))
    with torch._dynamo.compiled_autograd._enable(
        torch.compile(backend="aot_eager", fullgraph=True)
    ):
        output.backward()
    actual = {name: p.grad for name, p in gm.named_parameters()}
    torch.testing.assert_close(actual, expected(gm, x))


def test_a_whole_step_may_be_compiled(gm: fg.CapturedModule, x: Tensor) -> None:
    """The compiler breaks off at the backward, and what is in front of it keeps its rules."""
    step = torch.compile(lambda x: loss(gm(x)).backward(), backend="aot_eager")
    step(x)
    actual = {name: p.grad for name, p in gm.named_parameters()}
    torch.testing.assert_close(actual, expected(gm, x))


# --- models compiled before the rules came ---


def test_a_model_compiled_in_place_is_transformed_and_loses_nothing_but_the_compiling(
    model: Net, x: Tensor
) -> None:
    """Case 36."""
    native = gradients(model, x, model)
    model.compile(backend="aot_eager")
    torch.testing.assert_close(gradients(model, x, model), native)
    gm = fg.transform(model, RULES)
    torch.testing.assert_close(gradients(gm, x, model), expected(model, x))
    torch.testing.assert_close(gradients(model, x, model), native)


class Holder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def test_a_part_compiled_in_place_before_gets_its_rules(model: Net, x: Tensor) -> None:
    model.compile(backend="aot_eager")
    whole = Holder(model)
    whole(x)
    gm = fg.transform(whole, RULES)
    actual = list(gradients(gm, x, gm).values())
    torch.testing.assert_close(actual, list(expected(model, x).values()))


def test_a_compiled_part_that_cannot_get_its_rules_is_reported(model: Net) -> None:
    whole = Holder(torch.compile(model, backend="aot_eager"))
    with pytest.warns(fg.FreegradWarning, match="'(relu|tanh)' matches nothing"):
        gm = fg.transform(whole, RULES)
    assert [note.path for note in fg.report(gm).opaque] == ["part"]
    with pytest.raises(fg.PlanError, match="part"):
        fg.transform(whole, RULES, strict=True)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        copy.copy,
        lambda gm: pickle.loads(pickle.dumps(gm)),
        lambda gm: fg.transform(gm, {}),
    ],
    ids=["deepcopy", "copy", "pickle", "transform"],
)
def test_a_copy_of_a_model_compiled_in_place_runs_itself(
    gm: fg.CapturedModule, x: Tensor, copied: Callable[[Any], nn.Module]
) -> None:
    gm.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(gm, x, gm), expected(gm, x))
    survivor = copied(gm)
    with torch.no_grad():
        survivor.first.weight = nn.Parameter(2 * survivor.first.weight)
    torch.testing.assert_close(gradients(survivor, x, survivor), expected(survivor, x))


# --- caches on disk ---


@pytest.fixture
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.usefixtures("fresh_cache")
def test_caches_never_serve_another_rule(model: Net, x: Tensor) -> None:
    formulas: dict[str, Callable[..., Tensor]] = {
        "cosine": lambda grad, x: grad * x.cos(),
        "twice": lambda grad, x: grad * 2,
    }
    settings: list[tuple[str, Any]] = [("s", 2.0), ("s", 3.0)]
    settings += [("formula", name) for name in ("cosine", "twice", "cosine")]
    hits = []
    for kind, value in settings:
        if kind == "s":
            rule, by_hand = fg.rules.scale(s=value), models.scale(value)
        else:
            rule = fg.register("changed", overwrite=True)(formulas[value])
            by_hand = formulas[value]
        torch._dynamo.reset()
        counters.clear()
        actual = gradients(compiled(fg.transform(model, {"tanh": rule}), "inductor"), x, model)
        tanh = models.naive(torch.tanh, by_hand)
        wanted = gradients(lambda x, f=tanh: model.second(f(model.first(x).relu())), x, model)
        torch.testing.assert_close(actual, wanted)
        hits.append(counters["aot_autograd"]["autograd_cache_hit"])
    assert hits == [0, 0, 0, 0, 1]


PROGRAM = """
import sys, torch
import freegrad_fx as fg
from torch import nn
from torch._dynamo.utils import counters

factor = float(sys.argv[1])
model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
fg.register("mine")(eval(sys.argv[2]))
x = torch.ones(2, 4)
for p in model.parameters():
    nn.init.ones_(p)
run = torch.compile(fg.transform(model, {"relu": "mine"}), fullgraph=True)
run(x).sum().backward()
print(model[0].bias.grad.tolist(), counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize(
    ("formula", "switch"), [("lambda grad: grad * {}", "0"), ("lambda grad: grad * factor", "1")]
)
def test_another_process_finds_its_own_rule_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, formula: str, switch: str
) -> None:
    """A formula that reads a variable is cached with PyTorch's switch for custom Functions alone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", switch)
    printed = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, factor, formula.format(factor)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for factor in ("2", "3", "2")
    ]
    assert printed == [f"{[2 * f] * 4} {hit}" for f, hit in ((2.0, 0), (3.0, 0), (2.0, 1))]


FACTOR = 2.0


def helper(grad: Tensor) -> Tensor:
    return grad * 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_variable_that_a_formula_reads_is_never_ignored_by_compiled_code(
    monkeypatch: pytest.MonkeyPatch, model: Net, x: Tensor, backend: str
) -> None:
    def factory(factor: float) -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
        def change(new: float) -> None:
            nonlocal factor
            factor = new

        return lambda grad: grad * factor, change

    formula, change = factory(2.0)
    fg.register("by a global")(lambda grad: grad * FACTOR)
    fg.register("by a function")(lambda grad: helper(grad))
    fg.register("by a closure")(formula)
    for rule in ("by a global", "by a function", "by a closure"):
        run = compiled(fg.transform(model, {"tanh": rule}), backend)
        for factor in (2.0, 3.0, 2.0):
            monkeypatch.setattr(sys.modules[__name__], "FACTOR", factor)
            monkeypatch.setattr(sys.modules[__name__], "helper", times(factor))
            change(factor)
            wanted = fg.transform(model, {"tanh": fg.rules.scale(s=factor)})
            torch.testing.assert_close(gradients(run, x, model), gradients(wanted, x, model))


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda grad: grad * factor
