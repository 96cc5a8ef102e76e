"""Running a model, and comparing what two runs show: the one harness that all tests of whole models share.

`run` calls a model forward and backward from a given random state, and keeps all that can be seen of it. A `Run` of a
transformed model is compared with one of the original, or of a reference that knows nothing of the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Compared: TypeAlias = Callable[[Tensor | None, Tensor | None], bool]


@dataclass(frozen=True)
class Call:
    """What a model is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def call(*args: Any, **kwargs: Any) -> Call:
    return Call(args, kwargs)


Inputs: TypeAlias = Tensor | tuple[Any, ...] | Mapping[str, Any] | Call
"""A tensor, the positional arguments, the keyword arguments, or both kinds of a forward."""


@dataclass
class Run:
    """All that can be seen of one call, and of a backward through what it returned.

    Attributes:
        outline: The types, the nesting and the plain values of what was returned.
        outputs: Its tensors.
        strides: Their strides.
        buffers: The model's buffers after the call.
        random_state: PyTorch's random state after the call.
        gradients: Of every input and parameter that requires one, by name.
        error: What was raised, where `run` was told to catch it.
    """

    outline: Any = None
    outputs: list[Tensor] = field(default_factory=list)
    strides: list[tuple[int, ...]] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    random_state: Tensor | None = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    error: Exception | None = None


def run(
    model: Callable[..., Any],
    inputs: Inputs,
    *,
    of: nn.Module | None = None,
    also: Mapping[str, Tensor] | None = None,
    seed: int = 1,
    restore: bool = True,
    backward: bool = True,
    keep_graph: bool = False,
    catch: type[Exception] | tuple[type[Exception], ...] = (),
    catch_backward: bool = False,
) -> Run:
    """Call a model forward and backward, and return all that can be seen of it.

    Args:
        model: The model, or a function.
        inputs: What it is called with. Its floating-point tensors are copied into leaves that require a gradient.
        of: The module whose parameters and buffers are looked at, where that is not `model`.
        also: Further leaves to differentiate with respect to.
        seed: The random seed before the call.
        restore: Whether the buffers are put back afterwards.
        backward: Whether there is a backward.
        keep_graph: Whether the graph is kept, which a later call may use again.
        catch: Errors of the call that are a part of the result.
        catch_backward: Whether these errors of the backward are too.
    """
    if of is None:
        of = model if isinstance(model, nn.Module) else nn.Module()
    given = as_call(inputs)
    found: list[Tensor] = []
    args, kwargs = _own(given.args, found), _own(dict(given.kwargs), found)
    leaves = {f"input {i}": t for i, t in enumerate(found) if t.requires_grad}
    leaves.update((name, p) for name, p in of.named_parameters() if p.requires_grad)
    leaves.update(also or {})
    before = {name: b.detach().clone() for name, b in of.named_buffers()} if restore else {}
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than a small model
    seen, tensors = Run(), list[Tensor]()
    try:
        output = model(*args, **kwargs)
        seen.random_state = torch.get_rng_state()
        seen.outline = outlined(output, tensors)
        seen.outputs = [t.detach().clone() for t in tensors]
        seen.strides = [t.stride() for t in tensors if t.layout is torch.strided]
        seen.buffers = {name: b.detach().clone() for name, b in of.named_buffers()}
    except catch as error:
        seen.error = error
    refusals = catch if catch_backward else ()
    if backward and seen.error is None:
        try:
            seen.gradients = _gradients(tensors, leaves, keep_graph)
        except refusals as error:
            seen.error = error
    with torch.no_grad():
        for name, buffer in of.named_buffers():
            if name in before:
                buffer.copy_(before[name])
    return seen


def as_call(inputs: Inputs) -> Call:
    if isinstance(inputs, Call):
        return inputs
    if isinstance(inputs, Mapping):
        return Call((), inputs)
    return Call(inputs if isinstance(inputs, tuple) else (inputs,))


def _own(value: Any, found: list[Tensor]) -> Any:
    """The same value with tensors of its own, of which gradients can be asked."""
    if isinstance(value, Tensor):
        found.append(value.detach().clone().requires_grad_(value.is_floating_point()))
        return found[-1]
    if isinstance(value, dict):
        items = [(key, _own(item, found)) for key, item in value.items()]
        return type(value)(items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_own(item, found) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_own(item, found) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [part.name for part in dataclasses.fields(value)]
        return dataclasses.replace(value, **{n: _own(getattr(value, n), found) for n in names})
    return value


def outlined(value: Any, tensors: list[Tensor]) -> Any:
    """The types and plain values that a value is made of; its tensors are appended to a list."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return ("tensor", type(value))
    if isinstance(value, Mapping):
        return type(value), [(key, outlined(item, tensors)) for key, item in value.items()]
    if isinstance(value, tuple | list):
        return type(value), [outlined(item, tensors) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, part.name) for part in dataclasses.fields(value)]
        return type(value), [outlined(item, tensors) for item in items]
    return type(value), value


def _gradients(
    tensors: list[Tensor], leaves: dict[str, Tensor], keep_graph: bool
) -> dict[str, Tensor | None]:
    learning = [t for t in tensors if t.requires_grad]
    if not learning or not leaves:
        return dict.fromkeys(leaves)
    found = torch.autograd.grad(
        loss(learning), list(leaves.values()), allow_unused=True, retain_graph=keep_graph
    )
    return dict(zip(leaves, found, strict=True))


def loss(outputs: list[Tensor]) -> Tensor:
    """A number that depends on every entry of every output in another way."""
    return sum(((o * weights(o)).sum() for o in outputs), start=torch.zeros(()))


def weights(like: Tensor) -> Tensor:
    return torch.arange(1.0, like.numel() + 1).sin().reshape(like.shape).to(like)


# --- two runs ---


def identical(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal without rounding, dtypes and NaNs included; 0 and −0 are equal."""
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def close(a: Tensor | None, b: Tensor | None, rtol: float = 1e-4, atol: float = 1e-5) -> bool:
    """Whether two tensors are equal but for rounding: a reference may add gradients up in another order."""
    if a is None or b is None:
        return a is b
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.allclose(a, b, rtol, atol, equal_nan=True)
    )


def tell_apart(actual: Run, expected: Run, compared: Compared = identical) -> str:
    """What tells two runs apart, in words; ``""`` where nothing does.

    Args:
        actual: The run to judge.
        expected: The run of the original or the reference.
        compared: How gradients are compared. All else must agree bit for bit.
    """
    return difference_in_forward(actual, expected) or difference_in_gradients(
        actual, expected, compared
    )


def difference_in_forward(actual: Run, expected: Run) -> str:
    if type(actual.error) is not type(expected.error):
        return f"raises: {actual.error!r} instead of {expected.error!r}"
    if actual.outline != expected.outline:
        return f"outputs are made of {actual.outline}, and not of {expected.outline}"
    named = {
        f"output {i}": pair
        for i, pair in enumerate(zip(actual.outputs, expected.outputs, strict=True))
    }
    if actual.strides != expected.strides:
        return f"outputs have the strides {actual.strides}, and not {expected.strides}"
    if list(actual.buffers) != list(expected.buffers):
        return f"buffers are {list(actual.buffers)}, and not {list(expected.buffers)}"
    named |= {f"buffer {n}": (actual.buffers[n], b) for n, b in expected.buffers.items()}
    for name, (a, e) in named.items():
        if not identical(a, e):
            return f"{name} differs{_by_how_much(a, e)}"
    if not identical(actual.random_state, expected.random_state):
        return "other random numbers were drawn"
    return ""


def difference_in_gradients(actual: Run, expected: Run, compared: Compared = identical) -> str:
    if list(actual.gradients) != list(expected.gradients):
        return f"gradients are of {list(actual.gradients)}, and not of {list(expected.gradients)}"
    for name, gradient in expected.gradients.items():
        if not compared(actual.gradients[name], gradient):
            return f"gradient of {name} differs{_by_how_much(actual.gradients[name], gradient)}"
    return ""


def _by_how_much(a: Tensor | None, b: Tensor | None) -> str:
    if a is None or b is None:
        return f": {a} instead of {b}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f": {a.dtype} {tuple(a.shape)} instead of {b.dtype} {tuple(b.shape)}"
    return f" by up to {(a - b).abs().max()}" if a.dtype != torch.bool else ""


def assert_same_forward(actual: Run, expected: Run) -> None:
    """Bit for bit, with the same random numbers drawn and the same statistics kept."""
    assert not (found := difference_in_forward(actual, expected)), found


def assert_same_gradients(actual: Run, expected: Run, compared: Compared = identical) -> None:
    assert not (found := difference_in_gradients(actual, expected, compared)), found


def assert_identical(actual: Tensor | None, expected: Tensor | None, name: str = "") -> None:
    assert identical(actual, expected), f"{name} differs{_by_how_much(actual, expected)}"


def differs(a: Run, b: Run) -> bool:
    """Whether the gradients of two runs differ somewhere: without this, a test of a rule proves nothing."""
    return any(
        g is not None and not identical(g, b.gradients[name]) for name, g in a.gradients.items()
    )
