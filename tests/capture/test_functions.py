"""A user's `torch.autograd.Function` keeps its backward in the capture, can be a site, and is there in copies.

Case 8. Traced into, as `torch.fx.symbolic_trace` does, it would lose its backward without a word.
"""

from __future__ import annotations

import copy
import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable

import freegrad_fx as fg
import models
import runs
from freegrad_fx.ops import apply_function
from places import IMPORTABLE
from side_by_side import (
    BACKWARD,
    RULE,
    THRICE,
    Make,
    Net,
    build,
    difference,
    sample,
    traced_plainly,
    what_plain_tracing_gets_wrong,
)
from sweep import NATIVE, Interception

# --- functions as people write them ---


class Spike(torch.autograd.Function):
    """A step, with a surrogate for its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + x.abs()) ** 2


class StraightThroughRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int = 4) -> Tensor:
        return (x * levels).round() / levels

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Two(torch.autograd.Function):
    """Two inputs that learn, two that do not, two outputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, k: float, flag: bool = True) -> Any:
        ctx.save_for_backward(x, y)
        ctx.k = k
        return x * y * k, x + y if flag else x - y

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return 10 * g * y * ctx.k, 7 * h * x, None, None


class WithSetupContext(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, n: int) -> Any:
        return x**n, torch.tensor(3)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.n = inputs
        ctx.save_for_backward(x)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 5 * grad * x, None


class KeywordsAndContext(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, levels: int = 4) -> Tensor:
        return (x * levels).round() / levels

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.levels = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.levels, None


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 4 * grad


class Inherits(Spike):
    """Another class with the backward of the first."""


class Outer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Spike.apply(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 9


class OddOutputs(torch.autograd.Function):
    """None and a number among the outputs; a tuple and a dict among the inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pair: Any, options: Any) -> Any:
        return x * 2 + options["a"], None, 3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * 9, None, None


class OwnApply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, k: float) -> Tensor:
        ctx.k = k
        return x * k

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.k * 2, None

    @classmethod
    def call(cls, x: Tensor) -> Tensor:
        return cls.apply(x, 2.0)


def made(k: float) -> type[torch.autograd.Function]:
    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * k

    return Made


Threefold, Fivefold = made(3.0), made(5.0)
stored = Spike.apply


def helper(x: Tensor, k: float = 1.0) -> Tensor:
    return Spike.apply(x) * k


# --- and models that call them ---

USES: dict[str, Make] = {}


def uses(forward: Callable[..., Any]) -> None:
    name = f"{forward.__name__}_model"
    kind = type(name, (Net,), {"forward": forward, "__module__": __name__})
    USES[forward.__name__] = globals()[name] = kind


@uses
def a_spike(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.f(Spike.apply(self.g(x))))


@uses
def a_rounding_of_a_weight(self: Any, x: Tensor) -> Tensor:
    return F.relu(F.linear(x, StraightThroughRound.apply(self.f.weight, 8), self.f.bias))


@uses
def a_parameter_found_by_parameters(self: Any, x: Tensor) -> Tensor:
    return F.relu(F.linear(x, StraightThroughRound.apply(next(iter(self.parameters())))))


@uses
def several_inputs_and_outputs(self: Any, x: Tensor) -> Tensor:
    a, b = Two.apply(self.f(x), x, 3.0, False)
    return F.relu(a) + b


@uses
def outputs_by_index(self: Any, x: Tensor) -> Tensor:
    pair = Two.apply(self.f(x), x, 3.0)
    return F.relu(pair[0]) + pair[1]


@uses
def with_setup_context(self: Any, x: Tensor) -> Tensor:
    y, n = WithSetupContext.apply(self.f(x), 2)
    return F.relu(y) * n


@uses
def in_place(self: Any, x: Tensor) -> Tensor:
    y = self.f(x) * 1
    z = InPlace.apply(y)
    return F.relu(z) + y


@uses
def in_place_with_the_result_thrown_away(self: Any, x: Tensor) -> Tensor:
    y = self.f(x) * 1
    InPlace.apply(y)
    return F.relu(y)


@uses
def through_a_helper(self: Any, x: Tensor) -> Tensor:
    return F.relu(helper(self.f(x), 2.0))


@uses
def an_inherited_backward(self: Any, x: Tensor) -> Tensor:
    return F.relu(Inherits.apply(self.f(x)))


@uses
def a_function_in_a_function(self: Any, x: Tensor) -> Tensor:
    return F.relu(Outer.apply(self.f(x)))


@uses
def once_differentiable_(self: Any, x: Tensor) -> Tensor:
    return F.relu(Once.apply(self.f(x)))


@uses
def odd_inputs_and_outputs(self: Any, x: Tensor) -> Tensor:
    y, _, n = OddOutputs.apply(self.f(x), (x, 1), {"a": 2})
    return F.relu(y) * n


@uses
def through_a_classmethod(self: Any, x: Tensor) -> Tensor:
    return F.relu(OwnApply.call(self.f(x)))


@uses
def two_made_by_one_factory(self: Any, x: Tensor) -> Tensor:
    return F.relu(Threefold.apply(self.f(x))) + F.relu(Fivefold.apply(self.g(x)))


@uses
def of_a_part_of_a_tensor(self: Any, x: Tensor) -> Tensor:
    return F.relu(Spike.apply(self.f(x)[0:2]))


@uses
def of_a_constant(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.f(x) * Spike.apply(torch.ones(6)))


@uses
def of_a_detached_parameter(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.f(x) * Spike.apply(self.f.bias.detach()))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", USES)
def test_a_function_keeps_its_backward(name: str) -> None:
    gm = captured(name)
    for training in (True, False):
        original = build(USES[name]).train(training)
        assert difference(original, build_captured(name, NATIVE).train(training), THRICE) == ""
        ruled = build_captured(name, RULE).train(training)
        original = build(USES[name]).train(training)
        assert difference(original, ruled, THRICE, Interception(BACKWARD)) == ""
    opaque = [str(o) for o in fg.report(gm).opaque]
    assert len(opaque) == (2 if name == "two_made_by_one_factory" else 1)
    assert all("autograd.Function" in o for o in opaque)


def captured(name: str) -> fx.GraphModule:
    return fg.transform(build(USES[name]), RULE)


def build_captured(name: str, rules: Any) -> fx.GraphModule:
    return fg.transform(build(USES[name]), rules)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", sorted(USES))
def test_copies_and_second_traces_keep_it_too(name: str) -> None:
    original, gm = build(USES[name]), build_captured(name, NATIVE)
    ways: dict[str, Callable[[Any], Any]] = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "a second trace": fx.symbolic_trace,
        "a second transform": lambda m: fg.transform(m, NATIVE),
    }
    for way, change in ways.items():
        x = sample()
        changed = change(gm)
        expected, actual = gradients(original, x), gradients(changed, x)
        for a, e in zip(actual, expected, strict=True):
            runs.assert_identical(a, e, way)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    x = x.clone().requires_grad_()
    leaves = [x, model.f.weight]  # a plain second trace drops what it does not use
    return list(torch.autograd.grad(runs.loss([model(x)]), leaves, allow_unused=True))


WRONG_ABOUT = [
    "a_spike", "a_rounding_of_a_weight", "several_inputs_and_outputs", "in_place", "through_a_helper",
    "two_made_by_one_factory", "a_function_in_a_function",
]  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ABOUT)
def test_a_plain_trace_loses_the_backward(name: str) -> None:
    assert what_plain_tracing_gets_wrong(USES[name])


def test_a_plain_trace_loses_it_without_a_word() -> None:
    make = USES["two_made_by_one_factory"]
    original, gm = build(make), traced_plainly(build(make), exchange=False)
    assert torch.equal(gm(sample()), original(sample()))
    actual, expected = (gradients(m, sample())[1] for m in (gm, original))
    assert not torch.allclose(actual, expected)


# --- an `apply` that was stored before ---


class StoredGlobally(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(stored(self.f(x)))


class StoredInAnAttribute(Net):
    def make(self) -> None:
        self.spike = Spike.apply

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.spike(self.f(x)))


class StoredAsAClass(Net):
    def make(self) -> None:
        self.spike = Spike

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.spike.apply(self.f(x)))


class StoredWithSetupContext(Net):
    def forward(self, x: Tensor) -> Tensor:
        y, n = stored_with_setup_context(self.f(x), 2)
        return F.relu(y * n)


class StoredAndGivenAParameter(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.linear(x, stored_round(self.f.weight, 8), self.f.bias))


class StoredAndGivenBoth(Net):
    """A traced value and a parameter, and two results."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = stored_two(x[:, :6], self.f.weight[:4], 3.0)
        return F.relu(self.f(a)) + b


class StoredFromAnInheritingClass(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(stored_inherits(self.f(x)))


class StoredInAPartial(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(rounding(self.f(x)))


class MadeInsideOfTheForward(Net):
    def forward(self, x: Tensor) -> Tensor:
        class Late(Spike):
            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad * 3

        return F.relu(Late.apply(self.f(x)))


class HasAnApplyOfItsOwn(torch.autograd.Function):
    """Python code around `apply`, which a trace goes through once."""

    @classmethod
    def apply(cls, x: Tensor, factor: float = 2.0) -> Tensor:
        return super().apply(x * 5, factor * 2) + 1  # type: ignore[misc]

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 7 * ctx.factor, None


class WithAnApplyOfItsOwn(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(HasAnApplyOfItsOwn.apply(self.f(x)) + stored_own(self.g(x)))


class CallsTheForwardItself(Net):
    """Not an `apply`: the operations of the forward have their own derivatives."""

    def forward(self, x: Tensor) -> Tensor:
        y, n = WithSetupContext.forward(self.f(x), 2)
        return F.relu(StraightThroughRound.forward(None, self.g(y)) * y * n)


stored_with_setup_context = WithSetupContext.apply
stored_round = StraightThroughRound.apply
stored_two = Two.apply
stored_inherits = Inherits.apply
stored_own = HasAnApplyOfItsOwn.apply
rounding = functools.partial(stored_round)

STORED = [
    StoredGlobally, StoredInAnAttribute, StoredAsAClass, StoredWithSetupContext, StoredAndGivenAParameter,
    StoredAndGivenBoth, StoredFromAnInheritingClass, StoredInAPartial, MadeInsideOfTheForward, WithAnApplyOfItsOwn,
]  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", [*STORED, CallsTheForwardItself])
def test_a_stored_apply_keeps_the_functions_backward(kind: type[nn.Module]) -> None:
    for rules, reference in ((NATIVE, None), (RULE, Interception(BACKWARD))):
        gm = fg.transform(build(kind), rules)
        assert difference(build(kind), gm, THRICE, reference) == ""
    assert all(not o.what.endswith("kept as one opaque call") for o in fg.report(gm).opaque)


@pytest.mark.parametrize("kind", STORED)
def test_a_stored_apply_in_a_part_is_one_node(kind: type[nn.Module]) -> None:
    class Whole(Net):
        def make(self) -> None:
            self.part = kind()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.part(x))

    gm = fg.transform(build(Whole), NATIVE)
    assert difference(build(Whole), gm) == ""
    assert any(node.target is apply_function for node in gm.graph.nodes)
    assert any(d.site.path == "part" for d in fg.report(gm).decisions)


def test_a_call_of_the_forward_itself_is_traced_into() -> None:
    gm = fg.transform(build(CallsTheForwardItself), NATIVE)
    assert all(node.target is not apply_function for node in gm.graph.nodes)


def test_a_stored_apply_is_a_site_of_its_class() -> None:
    gm = fg.transform(build(StoredGlobally), {Spike: fg.rules.scale(s=3.0)})
    assert [d.site.name for d in fg.report(gm).with_action("rewrite")] == ["<root>:Spike[0]"]
    model, x = build(StoredGlobally), sample().requires_grad_()
    (grad,) = torch.autograd.grad(gm(x).sum(), x)
    spikes = (model.f(x) > 0).to(x.dtype)  # where relu passes the gradient
    torch.testing.assert_close(grad, (spikes * 3) @ model.f.weight)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.slow), "aot_eager"])
@pytest.mark.parametrize("kind", [k for k in STORED if k is not MadeInsideOfTheForward])
def test_dynamo_keeps_a_stored_apply(kind: type[nn.Module], backend: str) -> None:
    if kind is WithAnApplyOfItsOwn:
        pytest.skip("torch.compile itself raises on an apply of the class's own")
    compiled = build(kind)
    compiled.compile(backend=fg.backend(NATIVE, backend))
    assert difference(build(kind), compiled) == ""


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_function_with_an_apply_of_its_own_compiles(backend: str) -> None:
    compiled = fg.transform(build(WithAnApplyOfItsOwn), NATIVE)
    compiled.compile(backend=backend, fullgraph=True)
    assert difference(build(WithAnApplyOfItsOwn), compiled) == ""


TAKES_KEYWORDS = torch.__version__.split(".")[:2] >= ["2", "13"]


@pytest.mark.skipif(not TAKES_KEYWORDS, reason="apply takes no keywords in torch 2.12")
@pytest.mark.parametrize("function", [StraightThroughRound, KeywordsAndContext])
def test_keywords_of_apply_are_arguments_in_every_thread(function: Any) -> None:
    class Keywords(Net):
        def forward(self, x: Tensor) -> Tensor:
            result = function.apply(x, levels=8)
            found.append(threads.submit(lambda: function.apply(sample(), levels=8)).result())
            return F.relu(self.f(result))

    found: list[Tensor] = []
    with ThreadPoolExecutor(1) as threads:
        gm = fg.transform(build(Keywords), NATIVE)
        assert torch.equal(found[0], (sample() * 8).round() / 8)
        assert difference(build(Keywords), gm) == ""


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", STORED)
def test_export_refuses_it_and_names_what_takes_it(kind: type[nn.Module]) -> None:
    with pytest.raises(fg.CaptureError, match=r"autograd\.Function .* whose backward") as caught:
        fg.transform(build(kind), NATIVE, example_inputs=(sample(),))
    assert "without example_inputs" in str(caught.value)
    assert "freegrad_fx.compile(model, rules)" in str(caught.value)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # Dynamo asks, at graph breaks
def test_no_two_errors_send_from_one_to_the_other() -> None:
    """A model that neither can take is told by both of the way in that takes it."""

    class Both(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = stored(self.f(x))
            return F.relu(self.g(y)) if y.sum() > -1 else y

    with pytest.raises(fg.CaptureError) as symbolic:
        fg.transform(build(Both), NATIVE)
    with pytest.raises(fg.CaptureError) as exported:
        fg.transform(build(Both), NATIVE, example_inputs=(sample(),))
    assert "example_inputs" not in str(symbolic.value)
    for error in (symbolic, exported):
        assert "freegrad_fx.compile(model, rules)" in str(error.value)
    original = build(Both)
    compiled = fg.compile(original, NATIVE, backend="eager")
    expected, actual = (
        torch.autograd.grad(model(sample()).sum(), [*original.parameters()])
        for model in (original, compiled)
    )
    assert all(map(torch.equal, actual, expected))


@pytest.mark.slow
def test_a_script_as_the_tutorial_writes_it() -> None:
    """In a process of its own: nothing but the script has touched PyTorch."""
    script = """
import torch, freegrad_fx as fg

class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x ** 3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 100 * grad * x

cube = Cube.apply

class Model(torch.nn.Module):
    def forward(self, x):
        return torch.relu(cube(x))

x = torch.tensor([1.0, 2.0], requires_grad=True)
for model in (
    Model(),
    fg.transform(Model(), {"relu": "straight_through"}),
    fg.compile(Model(), {"relu": "straight_through"}, backend="eager"),
    torch.compile(fg.transform(Model(), {"relu": "straight_through"}), backend="eager"),
):
    print(torch.autograd.grad(model(x).sum(), x)[0].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines() == ["[100.0, 200.0]"] * 4, done.stderr


# --- neurons: state and a Function ---


class Leaky(nn.Module):
    """As snnTorch writes it: the state is handed in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.beta, self.threshold = nn.Parameter(torch.tensor(0.9)), 1.0

    def forward(self, x: Tensor, mem: Tensor) -> tuple[Tensor, Tensor]:
        mem = self.beta * mem + x
        spike = Spike.apply(mem - self.threshold)
        return spike, mem - spike.detach() * self.threshold


class Spiking(Net):
    def make(self) -> None:
        self.a, self.b = Leaky(), Leaky()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mem_a, mem_b, spikes = torch.zeros_like(x), torch.zeros_like(x), []
        for _ in range(3):
            spike, mem_a = self.a(F.relu(self.f(x)), mem_a)
            spike, mem_b = self.b(self.g(spike), mem_b)
            spikes.append(spike)
        return torch.stack(spikes), mem_b


class KeepsItsMembrane(nn.Module):
    """As SpikingJelly writes it: the state is kept, a number at first."""

    def __init__(self) -> None:
        super().__init__()
        self.mem: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.mem = 0.9 * self.mem + x
        spike = Spike.apply(self.mem - 1.0)
        self.mem = self.mem - spike.detach()
        return spike


class NoneAtFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mem: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mem is None:
            self.mem = torch.zeros_like(x)
        self.mem = 0.9 * self.mem + x
        spike = Spike.apply(self.mem - 1.0)
        self.mem = self.mem - spike.detach()
        return spike


class MembraneInABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mem", torch.zeros(4, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.mem = 0.9 * self.mem.detach() + x
        spike = Spike.apply(self.mem - 1.0)
        self.mem = self.mem - spike.detach()
        return spike


def network(neuron: Callable[[], nn.Module]) -> Make:
    class Network(Net):
        def make(self) -> None:
            self.neuron = neuron()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.g(self.neuron(self.f(x))))

    return Network


NEURONS: dict[str, Make] = {
    "state handed in and out": Spiking,
    "a number at first": network(KeepsItsMembrane),
    "None at first": network(NoneAtFirst),
    "a buffer": network(MembraneInABuffer),
}


@pytest.mark.parametrize("name", NEURONS)
def test_spiking_neurons_keep_state_and_surrogate(name: str) -> None:
    make = NEURONS[name]
    for rules, reference in ((NATIVE, None), (RULE, Interception(BACKWARD))):
        gm = fg.transform(build(make), rules)
        assert difference(build(make), gm, THRICE, reference) == ""


@pytest.mark.parametrize("name", ["a number at first", "None at first"])
def test_neurons_are_reset_as_the_original_s(name: str) -> None:
    original, gm = build(NEURONS[name]), fg.transform(build(NEURONS[name]), NATIVE)
    for _ in range(2):
        for model in (original, gm):
            model.neuron.mem = 0.0 if name == "a number at first" else None
        assert difference(original, gm, THRICE) == ""


def test_a_plain_trace_of_a_spiking_network_has_no_gradient() -> None:
    assert what_plain_tracing_gets_wrong(Spiking)
    gm = traced_plainly(build(Spiking), exchange=False)
    assert not any(g is not None and g.any() for g in gradients_of_spikes(gm))
    assert any(g is not None and g.any() for g in gradients_of_spikes(build(Spiking)))


def gradients_of_spikes(model: nn.Module) -> list[Tensor | None]:
    spikes, _ = model(sample() * 5)
    if not spikes.requires_grad:
        return []
    return list(torch.autograd.grad(spikes.sum(), list(model.f.parameters()), allow_unused=True))


# --- a Function as a site ---


class SpikesTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = Spike.apply(self.f(x))
        x = F.relu(StraightThroughRound.apply(self.g(x)))
        return Spike.apply(x - 0.1)


class Triangle(Spike):
    """`Spike` with the backward of a rule, by hand."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return BACKWARD(grad, x)


class SpikesTwiceByHand(SpikesTwice):
    def forward(self, x: Tensor) -> Tensor:
        x = Triangle.apply(self.f(x))
        x = F.relu(StraightThroughRound.apply(self.g(x)))
        return Triangle.apply(x - 0.1)


def test_the_calls_of_a_class_are_sites_with_the_rule_s_gradient() -> None:
    gm = fg.transform(build(SpikesTwice), {Spike: RULE})
    plan = fg.report(gm)
    by_rule = [d.site.name for d in plan.decisions if d.action == "rewrite"]
    assert by_rule == ["<root>:Spike[0]", "<root>:Spike[1]"]
    assert [o.what for o in plan.opaque] == [
        f"autograd.Function {__name__}:{StraightThroughRound.__name__}"
    ]
    x = sample()
    native = gradients(build(SpikesTwice), x)
    for copied in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), fx.symbolic_trace(gm)):
        expected = gradients(build(SpikesTwiceByHand), x)
        assert not torch.allclose(expected[0], native[0])
        for a, e in zip(gradients(copied, x), expected, strict=True):
            torch.testing.assert_close(a, e)


def test_every_function_as_a_site_leaves_nothing_unseen() -> None:
    gm = fg.transform(
        build(SpikesTwice), {Spike: RULE, StraightThroughRound: None, "relu": RULE}, strict=True
    )
    assert fg.report(gm).opaque == ()
    with pytest.raises(fg.PlanError, match="StraightThroughRound"):
        fg.transform(build(SpikesTwice), {Spike: RULE, "relu": RULE}, strict=True)


def test_two_classes_of_one_name_are_told_apart() -> None:
    make = USES["two_made_by_one_factory"]
    gm = fg.transform(build(make), {Threefold: RULE})
    x = sample()

    class ByHand(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = models.naive(lambda t: t * 1, BACKWARD)(self.f(x))
            return F.relu(y) + F.relu(Fivefold.apply(self.g(x)))

    for a, e in zip(gradients(gm, x), gradients(build(ByHand), x), strict=True):
        torch.testing.assert_close(a, e)


# --- saved, and loaded elsewhere ---

SCRIPT = """
import sys, torch
gm = torch.load(sys.argv[1], weights_only=False)
x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
gradient, = torch.autograd.grad(gm(x).square().sum(), [gm.f.weight])
torch.save(gradient, sys.argv[1] + ".gradient")
"""


@pytest.mark.slow
def test_another_process_loads_it_with_its_backward(tmp_path: Path) -> None:
    file = str(tmp_path / "model.pt")
    model = build(USES["a_spike"])
    torch.save(fg.transform(model, NATIVE), file)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(IMPORTABLE)}
    subprocess.run(
        [sys.executable, "-c", SCRIPT, file],
        check=True,
        env=environment,
    )
    (expected,) = torch.autograd.grad(model(sample()).square().sum(), [model.f.weight])
    actual = torch.load(file + ".gradient")
    assert actual.any()
    runs.assert_identical(actual, expected)


# --- custom operators ---


@torch.library.custom_op("freegrad_fx_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


doubled.register_autograd(lambda ctx, grad: grad * 11)


class CallsAnOperator(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(doubled(self.f(x))) + F.relu(torch.ops.freegrad_fx_tests.doubled(self.g(x)))


def test_a_custom_operator_keeps_its_backward() -> None:
    for rules, reference in ((NATIVE, None), (RULE, Interception(BACKWARD))):
        gm = fg.transform(build(CallsAnOperator), rules)
        assert difference(build(CallsAnOperator), gm, THRICE, reference) == ""
