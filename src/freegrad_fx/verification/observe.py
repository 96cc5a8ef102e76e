"""Calls of a model, and everything of them that can be seen from outside."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.examples import map_tensors, twin
from ..capture.python_state import Attribute
from ..graph.state import ATTRIBUTES_OF_EVERY_MODULE
from .snapshot import RandomNumbers, Snapshot
from .values import copied, take_apart

__all__ = [
    "Case",
    "Inputs",
    "Observation",
    "State",
    "empty",
    "observe",
    "state_of",
    "without_fast_path",
]


@dataclasses.dataclass(frozen=True)
class Case:
    """What a comparison is made in.

    Attributes:
        training: Train mode or eval mode, for every submodule.
        gradients: With gradients, or under `no_grad`.
        calls: The number of calls in a row.
        thorough: Change every parameter a little between two calls, and compare all parameters after each.
    """

    training: bool
    gradients: bool
    calls: int = 2
    thorough: bool = True

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        return f"{mode} mode, {'with gradients' if self.gradients else 'under no_grad'}"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arguments of a call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class State:
    """The state of a model, by the path and the name in it: what `take_apart` makes of it."""

    outlines: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict)
    tensors: dict[tuple[str, str], dict[str, Tensor]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Observation:
    """What a call, and a backward through its result, show.

    Attributes:
        error: What the call raised.
        outline: The structure of the result, see `Parts`.
        outputs: The tensors of the result, by their place.
        requires_grad: Whether they require a gradient.
        memory: What they share memory with: inputs, parameters, buffers, other outputs.
        inputs: The inputs after the call.
        gradients: The gradients of inputs and parameters.
        backward_error: What the backward raised.
        state: The state after the call.
        random: The random state after the call.
        opaque: The number of objects in the result that are not compared.
    """

    error: Exception | None = None
    outline: Any = None
    outputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    requires_grad: dict[str, bool] = dataclasses.field(default_factory=dict)
    memory: dict[str, str] = dataclasses.field(default_factory=dict)
    inputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    gradients: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)
    backward_error: Exception | None = None
    state: State = dataclasses.field(default_factory=State)
    random: RandomNumbers = dataclasses.field(default_factory=RandomNumbers)
    opaque: int = 0


def observe(
    run: Any,
    model: nn.Module,
    inputs: Inputs,
    case: Case,
    before: Snapshot,
    learning: bool,
    caches: Iterable[Attribute] = (),
) -> list[Observation]:
    """Call a model several times in a row. The state of the model changes as the calls change it.

    Args:
        run: What is called: the model, or compiled code for it.
        model: The module with the state.
        inputs: The arguments. The calls get copies of them.
        case: The mode, the grad mode and the number of calls.
        before: The state of the model before the calls.
        learning: Whether gradients of all floating-point inputs are compared, or only of those that require one.
        caches: Dicts that are emptied after each call.
    """
    for module in model.modules():
        module.__dict__["training"] = case.training  # not model.train(), which a model can override
    seen = []
    for number in range(case.calls):
        if number and case.thorough:
            _change_parameters(model)
        seen.append(_call(run, model, inputs, case, learning))
        empty(model, caches)
        if seen[-1].error is None:
            seen[-1].state = state_of(model, before, number, case.thorough)
        if seen[-1].error is not None:
            break
    return seen


def empty(model: nn.Module, caches: Iterable[Attribute]) -> bool:
    """Empty dicts that modules hold, and return whether one had entries."""
    found = [model.get_submodule(path).__dict__.get(name) for path, name in caches]
    filled = [cache for cache in found if isinstance(cache, dict) and cache]
    for cache in filled:
        cache.clear()
    return bool(filled)


def _call(run: Any, model: nn.Module, inputs: Inputs, case: Case, learning: bool) -> Observation:
    seen = Observation()
    leaves: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.set_grad_enabled(case.gradients):
        args, kwargs = _prepared(inputs, leaves, given, learning and case.gradients)
        before = {id(t): t for t in model.parameters()}
        try:
            with warnings.catch_warnings():
                # Dynamo reads it for every input
                warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a")
                output = run(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            seen.error = error
            return seen
        seen.random = RandomNumbers()
        parts = take_apart(output, "output")
        seen.outline, seen.opaque = parts.outline, parts.opaque
        seen.outputs = {place: copied(t) for place, t in parts.tensors.items()}
        seen.requires_grad = {place: t.requires_grad for place, t in parts.tensors.items()}
        seen.memory = _memory(parts.tensors, given, model)
        seen.inputs = {name: copied(t) for name, t in given.items()}
        if case.gradients:
            leaves.update((n, p) for n, p in model.named_parameters() if id(p) in before)
            _differentiate(seen, parts.tensors, leaves)
    return seen


def _prepared(
    inputs: Inputs, leaves: dict[str, Tensor], given: dict[str, Tensor], learning: bool
) -> tuple[Any, Any]:
    """Copies of the arguments. A tensor that is given twice is one copy, as for the caller.

    A call gets a result of `clone`, and not the leaf: a forward can write into it.
    """
    made: dict[int, Tensor] = {}
    kept = []  # so that no id is used again

    def own(tensor: Tensor) -> Tensor:
        if id(tensor) in made:
            return made[id(tensor)]
        name = f"input {len(given)}"
        leaf = new = twin(tensor)
        if leaf.is_floating_point() or leaf.is_complex():
            leaf.requires_grad_((learning or tensor.requires_grad) and torch.is_grad_enabled())
            if leaf.requires_grad:
                leaves[name] = leaf
                new = leaf if isinstance(leaf, nn.Parameter) else _through(leaf)
        kept.append(tensor)
        made[id(tensor)] = given[name] = new
        return new

    return map_tensors(inputs.args, own), map_tensors(dict(inputs.kwargs), own)


def _through(leaf: Tensor) -> Tensor:
    """A tensor that is not a leaf, with the memory layout and the gradient of a leaf."""
    new: Tensor = _Through.apply(leaf)  # type: ignore[no-untyped-call]
    return new


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return copied(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _memory(
    outputs: Mapping[str, Tensor], given: Mapping[str, Tensor], model: nn.Module
) -> dict[str, str]:
    owners: dict[int, str] = {}
    for name, tensor in (*given.items(), *model.named_parameters(), *model.named_buffers()):
        if key := _address(tensor):
            owners.setdefault(key, name)
    found = {}
    for place, tensor in outputs.items():
        if key := _address(tensor):
            found[place] = owners.setdefault(key, place)
    return found


def _address(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
        return 0


def _differentiate(
    seen: Observation, outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
) -> None:
    """Compute the gradients for one fixed cotangent of each output."""
    learning = list({id(t): t for t in outputs.values() if t.requires_grad}.values())
    for leaf in leaves.values():
        leaf.grad = None
    try:
        if learning:
            # Not autograd.grad, which reentrant checkpoints refuse
            torch.autograd.backward(
                learning, [_cotangent(t, n) for n, t in enumerate(learning)], retain_graph=True
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        seen.backward_error = error
        return
    for name, leaf in leaves.items():
        seen.gradients[name], leaf.grad = leaf.grad, None


def _cotangent(like: Tensor, number: int) -> Tensor:
    """Pseudo-random numbers that depend only on the shape and on the number of the output."""
    generator = torch.Generator().manual_seed(number)
    numbers = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    return numbers.to(device=like.device, dtype=like.dtype)


_FACTOR = 1.0625


def _change_parameters(model: nn.Module) -> None:
    """Change parameters as an optimizer does, so that a graph that holds the values of the first call shows."""
    for parameter in {id(p): p for p in model.parameters()}.values():
        if parameter.is_floating_point():
            # Not a write that autograd counts: the graph of the last call may still be needed
            parameter.data.mul_(_FACTOR)


def state_of(model: nn.Module, before: Snapshot, number: int = 0, thorough: bool = True) -> State:
    """The buffers, the parameters and the other attributes of a model.

    Args:
        model: The model.
        before: The state before the first call.
        number: The number of the call; before every call but the first, the parameters change if `thorough`.
        thorough: See `Case`.
    """
    state = State()
    known: dict[int, tuple[Any, Any, dict[str, Tensor]]] = {}  # helper objects are often shared
    for path, module in model.named_modules():
        for name, value in _attributes(module):
            if id(value) not in known:
                parts = take_apart(value)
                learns = isinstance(value, nn.Parameter)
                changed = learns and thorough and value.is_floating_point()
                times = _FACTOR**number if changed else 1.0
                whole = thorough or not learns
                tensors = {p: before.contents(t, times, whole) for p, t in parts.tensors.items()}
                known[id(value)] = (value, parts.outline, tensors)
            _, state.outlines[path, name], state.tensors[path, name] = known[id(value)]
    return state


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)
    for name, value in list(module.__dict__.items()):
        if name == "training" or name not in ATTRIBUTES_OF_EVERY_MODULE:
            yield name, value


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Let attention layers compute what they compute in training: `torch.export` cannot record their fast path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
