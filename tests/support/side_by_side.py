"""A model beside what was made of it: the same calls to both, and the first thing that tells them apart.

The original is the oracle. For gradients under a rule it runs under `sweep.Interception`, which knows nothing of the
product. `traced_plainly` is what one has without the product: `torch.fx.symbolic_trace`, and every activation that
its graph shows exchanged for a naive one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import freegrad_fx as fg
from freegrad_fx._torch.replacing import replacements
from models import MODULES, naive
from runs import Call, Run, call, close, identical, run, tell_apart
from sweep import NATIVE, RULES, Interception

Make = Callable[[], nn.Module]
RULE, BACKWARD = RULES["rectangular"]


class Net(nn.Module):
    """Layers for a forward to use, and `make` for more of them."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.act = nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU()
        self.make()

    def make(self) -> None:
        """Nothing more here."""


class Asserts(Net):
    """Stands here because pytest writes the assertions of a test module anew."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == 4, "four rows"
        assert x.dim() == 2
        assert isinstance(x, Tensor)
        return F.relu(self.f(x))


def build(make: Make) -> nn.Module:
    """The same numbers at each call."""
    torch.manual_seed(0)
    return make()


def sample(seed: int = 2) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))


TWICE = (call(sample(2)), call(sample(3)))
THRICE = (*TWICE, call(sample(2)))


# --- two models ---


def look(model: nn.Module, given: Call, seed: int) -> Run:
    """A run that keeps the model's state, and the graph, which the next call may go through again."""
    return run(model, given, seed=seed, restore=False, keep_graph=True, catch=Exception)


def difference(
    original: nn.Module,
    other: nn.Module,
    calls: Sequence[Call] = TWICE,
    reference: TorchFunctionMode | None = None,
) -> str:
    """What tells two models apart, in words; ``""`` where nothing does.

    Between calls the parameters of both change, as an optimizer changes them.

    Args:
        original: The oracle.
        other: The model to try.
        calls: What both are called with, in turn; each keeps its state from call to call.
        reference: What the original runs under. Without one, gradients must agree bit for bit.
    """
    for number, given in enumerate(calls):
        with reference or contextlib.nullcontext():
            expected = look(original, given, number)
        actual = look(other, given, number)
        if found := tell_apart(actual, expected, close if reference else identical):
            return f"{found} (call {number})"
        if expected.error is not None:
            return ""
        for model in (original, other):
            for parameter in model.parameters():
                parameter.data.add_(
                    0.125
                )  # no new version: earlier graphs may be gone through again
    return ""


class InterceptionOutside(Interception):
    """Every activation has another backward, but for those that some modules compute."""

    def __init__(self, root: nn.Module, paths: Sequence[str]) -> None:
        super().__init__(BACKWARD)
        self.inside = 0
        for path in paths:
            module = root.get_submodule(path)
            module.register_forward_pre_hook(lambda *_: self._move(1))
            module.register_forward_hook(lambda *_: self._move(-1), always_call=True)

    def _move(self, by: int) -> None:
        self.inside += by

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self.inside:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


# --- what a model holds ---


def contents(model: nn.Module) -> dict[str, Any]:
    """Everything that a model holds, down to the values of its tensors; equal only where nothing was changed."""
    return {
        f"{path}.{name}": _content(value)
        for path, module in model.named_modules()
        for name, value in (*vars(module).items(), ("class", type(module)), ("id", id(module)))
    }


def _content(value: Any) -> Any:
    if isinstance(value, Tensor):
        grad = value.grad if value.is_leaf else None
        return id(value), value.requires_grad, id(grad), None if value.is_meta else value.tolist()
    if isinstance(value, Mapping):
        return id(value), [(key, _content(item)) for key, item in value.items()]
    if isinstance(value, tuple | list | set):
        return id(value), [_content(item) for item in value]
    if isinstance(value, bool | int | float | str | type | None):
        return value
    if isinstance(value, nn.Module):
        return id(value)
    return id(value), [(name, id(item)) for name, item in getattr(value, "__dict__", {}).items()]


# --- a transformed model beside its original ---


def transformed(
    model: nn.Module, rules: Any, warns: str | None = None, **options: Any
) -> fx.GraphModule:
    if warns is None:
        return fg.transform(model, rules, **options)
    with pytest.warns(fg.FreegradWarning, match=warns):
        return fg.transform(model, rules, **options)


def captured_or_refused(
    model: nn.Module, rules: Any = NATIVE, **options: Any
) -> tuple[fx.GraphModule | None, str]:
    """The transformed model, or what the refusal says."""
    try:
        return fg.transform(model, rules, **options), ""
    except fg.CaptureError as error:
        return None, str(error)


def check_capture(
    make: Make,
    *calls: Call,
    whole: Sequence[str] = (),
    modes: Sequence[bool] = (True, False),
    warns: str | None = None,
    **options: Any,
) -> fx.GraphModule:
    """Hold a transformed model against its original: natively, with a rule, in both modes, call after call.

    Args:
        make: Makes the model.
        calls: What it is called with.
        whole: The paths of the submodules that are kept whole, and keep their backward.
        modes: The modes to try, one after the other: in this order natively, and in the other order with the rule.
            The capture is made in another mode than the first.
        warns: The warning that the transform gives.
        **options: For `transform`.

    Returns:
        The transformed model with the rule, in the last of the modes.
    """
    calls = calls or TWICE
    for table, order in ((NATIVE, modes), (RULE, modes[::-1])):
        original, model = build(make), build(make).train(not order[0])
        before, random_state = contents(model), torch.get_rng_state()
        gm = transformed(model, table, warns, **options)
        assert contents(model) == before, "the original was changed"
        assert torch.equal(torch.get_rng_state(), random_state), "the capture drew numbers"
        reference = None if table is NATIVE else InterceptionOutside(original, whole)
        for training in order:
            original.train(training)
            gm.train(training)
            assert contents(model) == before, "a mode reaches back"
            found = difference(original, gm, calls, reference)
            assert not found, f"{'train' if training else 'eval'}, {table}: {found}"
            if reference is not None:
                sites = sum(node.target is fg.ops.decoupled for node in gm.graph.nodes)
                assert reference.calls
                assert sites * len(calls) == len(reference.calls), "an activation is not a site"
                reference.calls.clear()
            before = contents(model)  # shares its parameters, which an optimizer has changed
    gm.train(modes[-1])
    said_otherwise = ("constant of the graph", "parametrization")
    kept = [o for o in fg.report(gm).opaque if not any(s in o.reason for s in said_otherwise)]
    assert {opaque.path for opaque in kept} == set(whole)
    return gm


# --- without the product ---


def traced_plainly(model: nn.Module, exchange: bool = True) -> fx.GraphModule:
    """`torch.fx.symbolic_trace`, and each activation in the graph exchanged for a naive one."""
    gm = fx.symbolic_trace(model)
    for node in gm.graph.nodes if exchange else ():
        module = gm.get_submodule(node.target) if node.op == "call_module" else None
        name = getattr(node.target, "__name__", node.target)
        if type(module) in MODULES:
            function = MODULES[type(module)]
        elif node.op in ("call_function", "call_method") and name in ("relu", "tanh"):
            function = {"relu": F.relu, "tanh": torch.tanh}[name]
        else:
            continue
        node.op, node.target = "call_function", naive(function, BACKWARD)
        node.args, node.kwargs = (node.args or tuple(node.kwargs.values()))[:1], {}
    gm.recompile()
    return gm


def what_plain_tracing_gets_wrong(
    make: Make, *calls: Call, modes: Sequence[bool] = (True, False)
) -> str:
    """The first difference between a model and its plain trace, natively or with a rule; ``""`` where there is none."""
    for training in modes:
        for exchange in (False, True):
            original, model = build(make).train(training), build(make).train(not training)
            before = contents(model)
            try:
                gm = traced_plainly(model, exchange)
            except Exception as error:
                return f"refuses: {type(error).__name__}"
            if contents(model) != before:
                return "the original was changed"
            gm.train(training)
            reference = Interception(BACKWARD) if exchange else None
            if found := difference(original, gm, calls or TWICE, reference):
                return found
    return ""


@contextlib.contextmanager
def nothing_is_left_behind() -> Iterator[None]:
    """What a capture patches, and the state of the process, are as before."""
    with fg.native():  # the first block replaces parts of checkpoints for good
        pass

    def state() -> list[Any]:
        import random

        return [
            dict(vars(nn.Module)),
            dict(vars(torch)),
            dict(vars(torch.autograd.Function)),
            dict(vars(torch.utils.checkpoint.CheckpointFunction)),
            [r for r in replacements() if r.thread is not None],
            torch.autocast.__enter__,
            torch.inference_mode.__enter__,
            torch.is_grad_enabled(),
            torch.overrides._get_current_function_mode_stack(),
            torch.get_rng_state().tolist(),
            random.getstate(),
        ]

    before = state()
    try:
        yield
    finally:
        after = state()
        torch.set_grad_enabled(before[7])
    for old, new in zip(before, after, strict=True):
        if isinstance(old, dict):
            changed = {key for key, value in old.items() if new.get(key) is not value}
            assert not changed, f"left behind: {changed}"
        else:
            assert old == new, "something of the process is not as before"
