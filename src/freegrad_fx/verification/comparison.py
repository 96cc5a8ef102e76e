"""What tells two observations of a call apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .observe import Case, Observation, State
from .values import difference

__all__ = ["Difference", "compare"]


@dataclass(frozen=True)
class Difference:
    """Something that the transformed model does otherwise than the original.

    Attributes:
        kind: ``"error"``, ``"output"``, ``"gradient"``, ``"state"``, ``"input"``, ``"memory"`` or ``"random"``.
        name: What differs: the place in the output, the parameter, the attribute.
        what: How it differs.
        case: The mode and the grad mode, as text.
        call: The number of the call in a row, 1 or 2.
        inputs: ``"given"`` or, in `transform`, ``"further"``.
        module: The path of the first submodule whose result differs; None if it is not known.
    """

    kind: str
    name: str
    what: str
    case: str
    call: int
    inputs: str = "given"
    module: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What differs, without how."""
        return self.kind, self.name

    def __str__(self) -> str:
        at = "" if self.module is None else f", first in {self.module or 'the root'}"
        inputs = "" if self.inputs == "given" else f", {self.inputs} inputs"
        return f"{self.name}: {self.what}{at} ({self.case}, call {self.call}{inputs})"


Tolerance = Mapping[torch.dtype, float]


def compare(
    expected: Observation,
    actual: Observation,
    before: tuple[State, State],
    tolerance: Tolerance,
    drawn: bool,
) -> Iterator[tuple[str, str, str]]:
    """What differs between a call of the original and a call of the other model: the kind, the name and how.

    Args:
        expected: The call of the original.
        actual: The call of the other model.
        before: The states of both before the first call.
        tolerance: See `values.difference`.
        drawn: Whether random states are compared.
    """
    if expected.error is not None or actual.error is not None:
        if expected.error is None:
            yield "error", "the call", f"raises {_short(actual.error)}; the original does not"
        elif actual.error is None:
            yield (
                "error",
                "the call",
                f"does not raise; the original raises {_short(expected.error)}",
            )
        return
    yield from _outputs(expected, actual, tolerance)
    for name in expected.inputs:
        if words := difference(expected.inputs[name], actual.inputs[name], tolerance):
            yield "input", name, f"after the call {words}"
    yield from _states(expected.state, actual.state, before, tolerance)
    if drawn:
        for name in expected.random.differences(actual.random):
            yield "random", f"the random state of {name}", "other numbers have been drawn"
    yield from _gradients(expected, actual, tolerance)


def _outputs(
    expected: Observation, actual: Observation, tolerance: Tolerance
) -> Iterator[tuple[str, str, str]]:
    if expected.outline != actual.outline or list(expected.outputs) != list(actual.outputs):
        # The first place in which they differ would be clearer, but nearly always the types do
        yield (
            "output",
            "the output",
            f"is {_text(actual.outline)} instead of {_text(expected.outline)}",
        )
        return
    for place, tensor in expected.outputs.items():
        if words := difference(tensor, actual.outputs[place], tolerance):
            yield "output", place, words
        elif expected.requires_grad[place] != actual.requires_grad[place]:
            has = "requires" if actual.requires_grad[place] else "does not require"
            yield "gradient", place, f"{has} a gradient, unlike the original's"
    if not tolerance:
        for place in expected.outputs:
            mine, other = expected.memory.get(place), actual.memory.get(place)
            if mine != other:
                yield (
                    "memory",
                    place,
                    f"is memory of {other or 'its own'} instead of {mine or 'its own'}",
                )


def _gradients(
    expected: Observation, actual: Observation, tolerance: Tolerance
) -> Iterator[tuple[str, str, str]]:
    errors = expected.backward_error, actual.backward_error
    if errors[0] is not None or errors[1] is not None:
        if errors[0] is None:
            yield "error", "the backward", f"raises {_short(errors[1])}; the original's does not"
        elif errors[1] is None:
            yield (
                "error",
                "the backward",
                f"does not raise; the original's raises {_short(errors[0])}",
            )
        return
    for name, gradient in expected.gradients.items():
        other = actual.gradients.get(name)
        place = f"the gradient of {name}"
        if gradient is None or other is None:
            # An optimizer leaves a parameter without a gradient alone, and changes one with zeros (weight decay)
            if gradient is not other:
                yield "gradient", place, f"is {_kind(other)} instead of {_kind(gradient)}"
        elif words := difference(gradient, other, tolerance):
            yield "gradient", place, words


def _states(
    expected: State, actual: State, before: tuple[State, State], tolerance: Tolerance
) -> Iterator[tuple[str, str, str]]:
    for place in dict.fromkeys((*expected.outlines, *actual.outlines, *before[0].outlines)):
        changed = _changed(expected, before[0], place), _changed(actual, before[1], place)
        if not any(changed) or (
            place not in expected.outlines and place in before[1].outlines and not changed[0]
        ):
            continue
        name = ".".join(filter(None, place))
        if (place in expected.outlines) != (place in actual.outlines):
            here = "is there, unlike in" if place in actual.outlines else "is not there, unlike in"
            yield "state", name, f"{here} the original"
        elif place in expected.outlines:
            mine, other = expected.outlines[place], actual.outlines[place]
            a, b = expected.tensors[place], actual.tensors[place]
            if mine != other or list(a) != list(b):
                yield "state", name, f"is {_text(other)} instead of {_text(mine)} after the call"
                continue
            for part, tensor in a.items():
                if words := difference(tensor, b[part], tolerance):
                    yield "state", name + part, f"after the call {words}"


def _changed(state: State, before: State, place: tuple[str, str]) -> bool:
    if (place in state.outlines) != (place in before.outlines):
        return True
    if place not in state.outlines:
        return False
    a, b = state.tensors[place], before.tensors[place]
    same = list(a) == list(b) and all(a[part] is b[part] for part in a)
    return not same or state.outlines[place] != before.outlines[place]


def _kind(gradient: Tensor | None) -> str:
    if gradient is None:
        return "None"
    return "zeros" if not gradient.any() else "a tensor"


def _text(outline: object) -> str:
    text = repr(_readable(outline))
    return text if len(text) <= 120 else f"{text[:117]}..."


def _readable(outline: object) -> object:
    """An outline with the names of classes, for messages."""
    if isinstance(outline, type):
        return _Name(outline.__name__)
    if isinstance(outline, tuple) and len(outline) == 2 and isinstance(outline[0], type):
        kind, value = outline
        if not isinstance(value, list):
            return _Name(repr(value) if not isinstance(value, bytes) else kind.__name__)
        return _Name(f"{kind.__name__}({', '.join(repr(_readable(v)) for v in value)})")
    if isinstance(outline, tuple) and len(outline) == 2:
        return _Name(f"{outline[0]}={_readable(outline[1])!r}")
    return outline


class _Name(str):
    def __repr__(self) -> str:
        return str(self)


def _short(error: Exception | None) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:200]}"


def describe(case: Case, call: int, found: tuple[str, str, str], inputs: str) -> Difference:
    """A `Difference` from what `compare` yields."""
    kind, name, what = found
    return Difference(kind, name, what, str(case), call, inputs)
