"""Records the formula of a pointwise rule as a program: a list of steps that the C++ extension runs in blocks.

The recording runs the formula once, on a few numbers, and notes the operations of PyTorch that it reaches. The program
is then compared with the formula on numbers of all kinds, so it is used only if it gives the same bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .._torch.dispatch import DispatchMode
from ..core.declaration import Declaration

__all__ = ["Program", "program_of"]

# In the order of the C++ source
_OPERATIONS = (
    *("add", "sub", "mul", "div", "neg", "abs", "lt", "le", "gt", "ge", "eq", "ne"),
    *("and", "or", "not", "where", "least", "most"),
)
_MOST_PLACES = 24

Place: TypeAlias = tuple[str, int]
"""What a step reads: an input, a constant or the result of a step, by its number."""


class Program(NamedTuple):
    """A formula in steps.

    Attributes:
        constants: The numbers that it contains.
        steps: For each the operation, the place of its result and those of three operands. Places count the inputs
            (the gradient, ``x``, ``y``), the constants and the results.
        result: The place of the gradient of ``x``.
    """

    constants: list[float]
    steps: list[tuple[int, int, int, int, int]]
    result: int


Part: TypeAlias = Literal["function", "mask", "gate"]
"""What is recorded of a rule: its formula; the mask that it reads ``x`` through; or its formula of that mask."""

Evaluate: TypeAlias = Callable[[Program, Tensor, Tensor, Tensor], Tensor]
"""Runs a program on a gradient, ``x`` and ``y``."""


def program_of(
    declaration: Declaration,
    parameters: Mapping[str, Any],
    dtype: torch.dtype,
    evaluate: Evaluate,
    part: Part = "function",
) -> Program | None:
    """The program of a rule; None if the formula is not pointwise, or does something that no step does.

    Args:
        declaration: The declaration of the rule.
        parameters: All parameters of the rule.
        dtype: The dtype of the gradient and of the inputs.
        evaluate: Runs a program, in order to compare it with the formula.
        part: What is recorded. A mask is 0 or 1 in the dtype.
    """
    if not (declaration.pointwise and declaration.token):
        return None
    if any(type(value) not in (float, int, bool, type(None)) for value in parameters.values()):
        return None
    # 0.0 and -0.0 are equal, but not alike
    key = tuple((name, repr(value)) for name, value in parameters.items())
    return _program_of(_Asked(declaration, parameters, evaluate), key, dtype, part)


class _Asked:
    """A rule with parameters, which a cache tells apart by the rule alone."""

    def __init__(
        self, declaration: Declaration, parameters: Mapping[str, Any], evaluate: Evaluate
    ) -> None:
        self.declaration, self.parameters, self.evaluate = declaration, parameters, evaluate

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Asked) and self.declaration is other.declaration

    def __hash__(self) -> int:
        return hash(self.declaration)


@functools.lru_cache(maxsize=1024)
def _program_of(
    asked: _Asked, key: tuple[tuple[str, str], ...], dtype: torch.dtype, part: Part
) -> Program | None:
    declaration, parameters = asked.declaration, asked.parameters
    values = [torch.full((2, 3), number, dtype=dtype) for number in (1.5, 0.75, 0.25)]
    if part == "gate":
        values[1] = values[1] > 0
    recorder = _Recorder(values)

    def formula(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
        given = {"x": x, "y": y}
        if part == "mask":
            return declaration.mask_of(x, parameters)
        inputs = [given[name] for name in declaration.inputs]
        function = declaration.gate if part == "gate" else declaration.function
        assert function is not None
        return function(grad, *inputs, **parameters)

    try:
        with torch.no_grad(), recorder:
            result = formula(*values)
        program = recorder.program(result, torch.bool if part == "mask" else dtype)
    except Exception:  # the formula itself reports its errors
        return None
    if program is None:
        return None
    with torch.no_grad():
        probes = _probes(dtype, [v for v in parameters.values() if isinstance(v, float | int)])
        grad, x, y = probes
        of_x = x > 0 if part == "gate" else x
        expected = formula(grad, of_x, y)
        if part == "mask" and isinstance(expected, Tensor) and expected.dtype is torch.bool:
            expected = expected.to(dtype)
        same = _same_bits(asked.evaluate(program, grad, of_x.to(dtype), y), expected)
    return program if same else None


class _Unsupported(Exception):
    """The formula uses an operation that no step does."""


class _Recorder(DispatchMode):  # type: ignore[misc]
    """Notes each operation of PyTorch as a step."""

    def __init__(self, inputs: list[Tensor]) -> None:
        super().__init__()
        self.like = inputs[0]
        self.places: dict[int, Place] = {id(t): ("input", i) for i, t in enumerate(inputs)}
        self.kept: list[Any] = [*inputs]  # an id is that of one object only while this exists
        self.constants: list[float] = []
        self.steps: list[tuple[str, list[Place]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        write, kwargs = _WRITERS.get(str(func)), kwargs or {}
        if func is torch.ops.aten.promote_types.default:
            return func(*args, **kwargs)  # of dtypes, which are those of the program
        if write is None:
            raise _Unsupported(str(func))
        result = func(*args, **kwargs)
        place = write(self, *args, **kwargs)
        known = result.dtype in (self.like.dtype, torch.bool) and result.device == self.like.device
        if not known or (result.dim() and result.shape != self.like.shape):
            raise _Unsupported(f"{func} of {result.dtype}")
        self.places[id(result)] = place
        self.kept.append(result)
        return result

    def place(self, value: Any) -> Place:
        """The place of a tensor or of a number."""
        if isinstance(value, Tensor):
            return self.places[id(value)]
        number = float(value)
        if number != value and not math.isnan(number):
            raise _Unsupported("an integer that is no float")
        if abs(number) > torch.finfo(self.like.dtype).max and not math.isinf(number):
            raise _Unsupported("a number that is too large")
        self.constants.append(number)
        return "constant", len(self.constants) - 1

    def step(self, operation: str, *values: Any) -> Place:
        """Add a step."""
        places = [v if isinstance(v, tuple) else self.place(v) for v in values]
        self.steps.append((operation, places))
        return "step", len(self.steps) - 1

    def program(self, result: Any, dtype: torch.dtype) -> Program | None:
        """The program that computes a result of a dtype."""
        first = {"input": 0, "constant": 3, "step": 3 + len(self.constants)}
        if id(result) not in self.places or first["step"] + len(self.steps) > _MOST_PLACES:
            return None
        if result.dtype != dtype:
            return None

        def number(place: Place) -> int:
            return first[place[0]] + place[1]

        steps = []
        for index, (operation, places) in enumerate(self.steps):
            a, b, c = (*map(number, places), *[number(places[0])] * (3 - len(places)))
            steps.append((_OPERATIONS.index(operation), first["step"] + index, a, b, c))
        return Program(self.constants, steps, number(self.places[id(result)]))


def _plain(operation: str) -> Callable[..., Place]:
    return lambda recorder, *values: recorder.step(operation, *values)


def _scaled(operation: str) -> Callable[..., Place]:
    def write(recorder: _Recorder, a: Any, b: Any, *, alpha: float = 1) -> Place:
        return recorder.step(operation, a, b if alpha == 1 else recorder.step("mul", b, alpha))

    return write


def _reversed_sub(recorder: _Recorder, a: Any, b: Any, alpha: float = 1) -> Place:
    if alpha != 1:
        raise _Unsupported("alpha")
    return recorder.step("sub", b, a)


def _clamp(recorder: _Recorder, x: Any, low: Any = None, high: Any = None) -> Place:
    place = recorder.place(x)
    if low is not None:
        place = recorder.step("least", place, low)
    return place if high is None else recorder.step("most", place, high)


def _clamp_max(recorder: _Recorder, x: Any, high: Any) -> Place:
    return recorder.step("most", x, high)


def _power(recorder: _Recorder, x: Any, exponent: Any) -> Place:
    if exponent != 2:
        raise _Unsupported("a power")
    return recorder.step("mul", x, x)


def _reciprocal(recorder: _Recorder, x: Any) -> Place:
    return recorder.step("div", 1.0, x)


def _not_itself(recorder: _Recorder, x: Any) -> Place:
    return recorder.step("ne", x, x)


def _copy(recorder: _Recorder, x: Any, *_: Any, **options: Any) -> Place:
    if set(options) - {"dtype"}:
        raise _Unsupported("a copy")
    return recorder.place(x)


def _filled(number: float) -> Callable[..., Place]:
    return lambda recorder, *_, **__: recorder.place(number)


def _constant(recorder: _Recorder, value: Any, **_: Any) -> Place:
    return recorder.place(value)


_WRITERS: dict[str, Callable[..., Place]] = {
    "aten.add.Tensor": _scaled("add"),
    "aten.sub.Tensor": _scaled("sub"),
    "aten.rsub.Scalar": _reversed_sub,
    "aten.mul.Tensor": _plain("mul"),
    "aten.div.Tensor": _plain("div"),
    "aten.neg.default": _plain("neg"),
    "aten.abs.default": _plain("abs"),
    "aten.logical_not.default": _plain("not"),
    "aten.bitwise_not.default": _plain("not"),
    "aten.bitwise_and.Tensor": _plain("and"),
    "aten.logical_and.default": _plain("and"),
    "aten.bitwise_or.Tensor": _plain("or"),
    "aten.logical_or.default": _plain("or"),
    "aten.where.self": _plain("where"),
    "aten.clamp.default": _clamp,
    "aten.clamp_min.default": _clamp,
    "aten.clamp_max.default": _clamp_max,
    "aten.pow.Tensor_Scalar": _power,
    "aten.reciprocal.default": _reciprocal,
    "aten.isnan.default": _not_itself,
    "aten.detach.default": _copy,
    "aten._to_copy.default": _copy,
    "aten.clone.default": _copy,
    "aten.scalar_tensor.default": _constant,
    "aten.zeros_like.default": _filled(0.0),
    "aten.ones_like.default": _filled(1.0),
    **{
        f"aten.{name}.{kind}": _plain(name)
        for name in ("lt", "le", "gt", "ge", "eq", "ne")
        for kind in ("Scalar", "Tensor")
    },
}


def _probes(dtype: torch.dtype, numbers: Iterable[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, inputs and outputs: all pairs of special numbers, with those around the parameters."""
    limits = torch.finfo(dtype)
    special = [0.0, -0.0, 1.0, -1.0, 0.3, -2.7, 1e4, -1e-3, limits.tiny / 8, limits.tiny]
    special += [limits.max, limits.min, math.inf, -math.inf, math.nan]
    around = torch.tensor([float(n) for n in numbers], dtype=dtype)
    around = torch.cat([around, -around, 1 / around, *(
        torch.nextafter(sign * around, torch.full_like(around, end))
        for sign in (1, -1)
        for end in (math.inf, -math.inf)
    )])  # fmt: skip
    values = torch.cat([torch.tensor(special, dtype=dtype), around])
    spread = torch.linspace(-3.1, 3.3, 41, dtype=dtype)
    x = torch.cat([values, spread])
    grad = torch.cat([values[: len(special)], spread[::7]])
    grads, xs = torch.meshgrid(grad, x, indexing="ij")
    return grads.reshape(-1), xs.reshape(-1), xs.flip(0).reshape(-1)


def _same_bits(a: Tensor, b: Any) -> bool:
    """Whether two tensors have the same bits, where all NaN are alike."""
    if not isinstance(b, Tensor) or a.dtype != b.dtype or a.shape != b.shape:
        return False
    alike = (a == b) & (a.signbit() == b.signbit())
    return bool((alike | (a.isnan() & b.isnan())).all())
