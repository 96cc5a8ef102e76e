"""What must hold of every transformed model, checked against the original and against a reference by interception.

The reference is the original itself, run while torch hands every activation to a naive `autograd.Function`; it knows
nothing of the product. A comparison is with the original or with that reference, never of the product with itself.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import freegrad_fx as fg
from runs import Inputs, assert_same_forward, assert_same_gradients, differs, run

Backward: TypeAlias = Callable[[Tensor, Tensor], Tensor]

A, B = -0.8, 1.2
RULES: dict[str, tuple[fg.Rule, Backward]] = {
    "rectangular": (
        fg.rules.rectangular(a=A, b=B),
        lambda grad, x: grad * ((x >= A) & (x <= B)),
    ),
    "d(Linear)": (fg.rules.d_linear, lambda grad, x: grad),
}
NATIVE: dict[str, None] = {"activations": None}


# --- the reference ---

# The group "activations", stated anew.
_NAMES = {
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
    "hardsigmoid", "hardtanh", "hardshrink", "softshrink", "tanhshrink", "threshold", "softplus", "softsign",
    "sigmoid", "logsigmoid", "log_sigmoid", "tanh",
}  # fmt: skip


class _Decouple(torch.autograd.Function):
    """Hands out `y`; the gradient of `x` is the rule's, that of `y` its own."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, backward: Backward) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rule = backward
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad, ctx.rule(grad, x), None


class Interception(TorchFunctionMode):
    """While it is entered, every activation that Python code calls has another backward.

    It is no reference for checkpoints: what they run again in a backward runs without it, and the gradients are wrong.

    Attributes:
        calls: The names of the activations called.
    """

    def __init__(self, backward: Backward) -> None:
        super().__init__()
        self.backward = backward
        self.calls: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.removesuffix("_") not in _NAMES:
            return func(*args, **kwargs)
        self.calls.append(name.removesuffix("_"))
        if args:
            x, args = args[0], args[1:]
        else:
            x = kwargs.pop("input")
        if not _inplace(func, args, kwargs):
            return _Decouple.apply(func(x.detach(), *args, **kwargs), x, self.backward)
        copy = x.clone()
        y = func(copy.detach().clone(), *args, **kwargs)
        return x.copy_(_Decouple.apply(y, copy, self.backward))


@contextmanager
def by_hand(model: nn.Module, backward: Backward) -> Iterator[None]:
    """Every activation of a model has another backward, also a GELU of transformers in separate operations."""
    gelus = [m for m in model.modules() if type(m).__name__ == "NewGELUActivation"]
    for module in gelus:
        module.forward = _with_backward(module.forward, backward)  # type: ignore[method-assign]
    try:
        with Interception(backward):
            yield
    finally:
        for module in gelus:
            del module.forward


def _with_backward(function: Callable[[Tensor], Tensor], backward: Backward) -> Any:
    return lambda x: _Decouple.apply(function(x.detach()).detach(), x, backward)


def _inplace(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if func.__name__.endswith("_") or kwargs.get("inplace", False):
        return True
    if not inspect.isfunction(func) or "inplace" not in inspect.signature(func).parameters:
        return False
    position = list(inspect.signature(func).parameters).index("inplace") - 1  # without the input
    return len(args) > position and bool(args[position])


# --- a model before it is run ---


def wake(model: nn.Module) -> nn.Module:
    """Give weights that begin as zeros other values: behind them every gradient would be zero."""
    for name, parameter in model.named_parameters():
        if (parameter.ndim > 1 or name.endswith("weight")) and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


# --- verify ---


def verified(model: nn.Module, x: Tensor) -> fg.Verification:
    """What `verify` says of the symbolic way in; of the way from example inputs, where the model needs it."""
    logger = logging.getLogger("torch.export")  # which logs what it specialises
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fg.FreegradWarning)
            try:
                gm = fg.transform(model, NATIVE)
            except fg.CaptureError:
                gm = fg.transform(model, NATIVE, example_inputs=(x,))
                assert "Verified" in fg.report(gm).verified
    finally:
        logger.setLevel(level)
    return fg.verify(model, gm, x)


# --- what a model holds ---


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Modules, modes, hooks and attributes of a model by identity; tensors by identity and gradient."""
    seen: dict[str, Any] = {"modules": [(p, id(m), type(m)) for p, m in model.named_modules()]}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, dict):
                seen[f"{path}:{name}"] = [(key, id(item)) for key, item in value.items()]
            else:
                plain = isinstance(value, bool | int | float | str | tuple | type(None))
                seen[f"{path}:{name}"] = value if plain else id(value)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        seen[name] = (tensor.data_ptr(), tensor.requires_grad, id(tensor.grad), tensor.grad_fn)
    return seen


def assert_same_state(gm: nn.Module, model: nn.Module) -> None:
    """The same keys in the same order, persistent or not, and behind each of them the very same tensor."""
    assert list(gm.state_dict()) == list(model.state_dict())
    for mine, own in (
        (gm.named_parameters(), model.named_parameters()),
        (gm.named_buffers(), model.named_buffers()),
    ):
        actual, expected = dict(mine), dict(own)
        assert list(actual) == list(expected)
        for name, tensor in expected.items():
            assert actual[name] is tensor, name
    for path, module in model.named_modules():
        assert (
            gm.get_submodule(path)._non_persistent_buffers_set == module._non_persistent_buffers_set
        )


def assert_modes(gm: nn.Module, model: nn.Module) -> None:
    for path, module in model.named_modules():
        assert gm.get_submodule(path).training == module.training, path


# --- all of it ---


def check_invariants(
    model: nn.Module,
    inputs: Inputs,
    transform_kwargs: Mapping[str, Any] | None = None,
    *,
    training_inputs: Inputs | None = None,
    rule: str | None = "rectangular",
    modes: tuple[bool, ...] = (True, False),
) -> list[fg.CapturedModule]:
    """Check invariants 1 to 5 of a model; raise AssertionError at the first that does not hold.

    Args:
        model: The model. It may be in any mode, and is left in it.
        inputs: A tensor, the positional arguments, or the keyword arguments of its forward.
        transform_kwargs: What `transform` is to be given besides model and rules.
        training_inputs: Inputs for train mode, where they differ.
        rule: A name in `RULES`; None leaves out the comparison with a reference.
        modes: The modes to try.

    Returns:
        The transformed models: with native rules, and with the rule.
    """
    options = dict(transform_kwargs or {})
    before, random_state = fingerprint(model), torch.get_rng_state()
    tables: list[Any] = [NATIVE] if rule is None else [NATIVE, RULES[rule][0]]
    transformed = [fg.transform(model, table, **options) for table in tables]
    assert fingerprint(model) == before
    assert torch.equal(torch.get_rng_state(), random_state), "the capture drew random numbers"
    assert "training" not in vars(nn.Module), "the capture left a patch behind"
    for gm in transformed:
        assert isinstance(gm, fx.GraphModule)
        gm.graph.lint()
        assert_same_state(gm, model)
        assert_modes(gm, model)
        assert not set(gm.modules()) & set(model.modules())
    flags = {module: module.training for module in model.modules()}
    try:
        for training in modes:
            given = training_inputs if training and training_inputs is not None else inputs
            _check_mode(model, training, given, transformed, rule)
    finally:
        for module, flag in flags.items():
            module.training = flag
    return transformed


def _check_mode(
    model: nn.Module,
    training: bool,
    inputs: Inputs,
    transformed: list[fg.CapturedModule],
    rule: str | None,
) -> None:
    model.train(training)
    native = run(model, inputs)
    assert all(o.isfinite().all() for o in native.outputs if o.is_floating_point())
    assert any(g is not None for g in native.gradients.values())
    before = fingerprint(model)
    for gm in transformed:
        gm.train(not training)
        gm.train(training)
        assert_modes(gm, model)
    actual = run(transformed[0], inputs)
    assert_same_forward(actual, native)
    assert_same_gradients(actual, native)
    del actual
    if rule is None:
        return
    ruled = run(transformed[1], inputs)
    assert_same_forward(ruled, native)
    assert differs(ruled, native)
    assert fingerprint(model) == before, "running the transformed model changes the original"
    del native
    model.train(training)  # some models forget here what they keep from one call to the next
    with Interception(RULES[rule][1]) as reference:
        expected = run(model, inputs)
    assert_same_gradients(ruled, expected)
    assert _sites(transformed[1]) == len(reference.calls), "an activation is not a site"


def _sites(gm: fg.CapturedModule) -> int:
    """How many sites the graph has that a call runs now."""
    return sum(node.target is fg.ops.decoupled for node in gm.graph.nodes)
