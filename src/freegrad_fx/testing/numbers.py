"""Checks of the numbers that a rule computes: derivatives, rounding, large and infinite inputs, and a reference."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._torch.generators import seed
from .failure import Failure, apart, first_line
from .subject import Inputs, Subject, named, of_input, pairs

__all__ = ["check_reference", "check_rounding", "check_second_derivative", "check_unbounded"]


# --- the second derivative ---


def check_second_derivative(subjects: list[Subject]) -> Iterator[Failure]:
    """The derivative of the rule, which a second derivative of the model uses, is that of its values."""
    for subject, inputs in pairs(subjects, lambda s: [s.usual(torch.float64)]):
        at = named(subject, inputs)
        names = ("grad", *subject.rule.inputs)
        v = inputs.x.flip(-1).abs() + 0.5
        try:
            direct = _differentiated(subject, inputs, v)
        except Exception as error:
            yield Failure(
                "second_derivative",
                at,
                "a derivative of the rule",
                first_line(error),
                "compute with differentiable functions of tensors: no numpy, no write into a tensor that a "
                "derivative needs",
            )
            continue
        wrong = False
        for name in names:
            expected, known = _finite_differences(subject, inputs, v, name)
            limit = 1e-5 * (1 + expected.abs().max())
            found = apart(
                torch.where(known, direct[name], expected), expected, limit.expand_as(expected)
            )
            if found is not None:
                wrong = True
                yield Failure(
                    "second_derivative",
                    at,
                    f"∂/∂{name} of the rule by finite differences: {found[0]}",
                    found[1],
                    "compute with differentiable functions of tensors; .detach(), .data, torch.no_grad() and numpy cut "
                    "the derivative off, and a custom autograd.Function needs a backward that can be differentiated",
                )
        if not wrong:
            yield from _through_the_site(subject, inputs, v, direct, at)


def _differentiated(subject: Subject, inputs: Inputs, v: Tensor) -> dict[str, Tensor]:
    """The derivatives of (v·rule).sum() by each argument of the formula, by autograd."""
    leaves = Inputs("", *(t.detach().requires_grad_() for t in (inputs.grad, inputs.x, inputs.y)))
    result = subject.run(leaves)
    given = {"grad": leaves.grad, "x": leaves.x, "y": leaves.y}
    read = {name: given[name] for name in ("grad", *subject.rule.inputs)}
    if not result.requires_grad:
        return {name: torch.zeros_like(t) for name, t in read.items()}
    grads = torch.autograd.grad((v * result).sum(), list(read.values()), materialize_grads=True)
    return dict(zip(read, grads, strict=True))


def _finite_differences(
    subject: Subject, inputs: Inputs, v: Tensor, name: str
) -> tuple[Tensor, Tensor]:
    """The derivatives of (v·rule).sum() by the entries of one argument, and where they exist.

    There is none where differences with two widths disagree, next to a jump or a kink.
    """
    given = {n: getattr(inputs, n) for n in ("grad", "x", "y")}
    start: Tensor = given[name]
    slopes = []
    for width in (1e-6, 4e-7):
        slope = torch.zeros_like(start)
        for place in itertools.product(*map(range, start.shape)):
            ends = []
            for sign in (1, -1):
                moved = start.clone()
                moved[place] += sign * width
                ends.append((v * subject.run(Inputs("", **{**given, name: moved}))).sum())
            slope[place] = (ends[0] - ends[1]) / (2 * width)
        slopes.append(slope)
    wide, narrow = slopes
    return wide, (wide - narrow).abs() <= 1e-5 * (1 + wide.abs().max())


def _through_the_site(
    subject: Subject, inputs: Inputs, v: Tensor, direct: dict[str, Tensor], at: str
) -> Iterator[Failure]:
    """A double backward through the operation differentiates the rule, and y by the rule."""
    grad, x = inputs.grad.clone().requires_grad_(), inputs.x.clone().requires_grad_()
    seed(subject.device, subject.seed)
    (result,) = torch.autograd.grad(subject.site(x), x, grad, create_graph=True)
    zero = torch.zeros_like(x)
    expected = {"grad": direct["grad"], "x": direct.get("x", zero)}
    if "y" in direct:
        if subject.random:
            return  # the rule draws once more for the derivative of y
        expected["x"] = expected["x"] + subject.run(Inputs("", direct["y"], inputs.x, inputs.y))
    found = {name: torch.zeros_like(t) for name, t in expected.items()}
    if result.requires_grad:
        grads = torch.autograd.grad((v * result).sum(), (grad, x), materialize_grads=True)
        found = dict(zip(found, grads, strict=True))
    for name, wanted in expected.items():
        limit = 1e-9 * (1 + wanted.abs().max())
        if (different := apart(found[name], wanted, limit.expand_as(wanted))) is not None:
            yield Failure(
                "second_derivative",
                at,
                f"∂/∂{name} of the backward with create_graph=True, as of the formula: {different[0]}",
                different[1],
                "let the formula compute the same with and without torch.enable_grad",
            )


# --- rounding, large and infinite inputs ---


def check_rounding(subjects: list[Subject]) -> Iterator[Failure]:
    """The result in each dtype is that in double precision, up to rounding, also for large and small x."""
    if subjects[0].random:
        return  # the numbers that are drawn differ from dtype to dtype
    for subject in subjects:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for inputs in (subject.ordinary(8, 16, dtype=dtype), subject.extreme(dtype)):
                if inputs is not None:
                    yield from _rounded(subject, inputs, dtype)


def _rounded(subject: Subject, inputs: Inputs, dtype: torch.dtype) -> Iterator[Failure]:
    half = dtype in (torch.float16, torch.bfloat16)
    try:
        actual = subject.run(inputs)
    except Exception as error:
        yield Failure(
            "half_precision" if half else "extreme_values",
            named(subject, inputs),
            "a gradient",
            first_line(error),
            "use functions that take this dtype, or compute in grad.float() and return result.to(grad.dtype)",
        )
        return
    info = torch.finfo(dtype)
    low, high = _range(subject, inputs, 2 * info.eps)
    size = torch.maximum(low.abs(), high.abs())
    largest = inputs.grad.double().abs()
    if subject.rule.declaration.reducing or largest.shape != size.shape:
        largest = largest.max()
    allowed = 8 * info.eps * (size + largest) + info.tiny
    values = actual.double()
    # a bound of the range that exceeds the dtype is infinite there
    inside = (values >= low - allowed) & (values <= high + allowed)
    beyond = ~size.isfinite() | (size > info.max)
    right = inside | beyond
    if right.all():
        return
    place = tuple((~right).nonzero()[0].tolist())
    name = "half_precision" if half else "extreme_values"
    at = f"{inputs.label}, where x = {inputs.x[place].item():g}"
    if inputs.grad.shape == inputs.x.shape:
        at += f" and grad = {inputs.grad[place].item():g}"
    expected = ((low + high) / 2)[place].item()
    yield Failure(
        name,
        named(subject, at),
        f"the value of double precision, {expected:.6g}",
        f"{values[place].item():.6g}; {int((~right).sum())} of {right.numel()} entries differ",
        "compute the factor of grad in single precision, x.float(), and return (grad * factor).to(grad.dtype)"
        if half
        else "write the formula so that no intermediate overflows, for example with torch.sigmoid instead of exp",
    )


def _range(subject: Subject, inputs: Inputs, width: float) -> tuple[Tensor, Tensor]:
    """The smallest and the largest result in double precision for inputs that are rounded differently.

    A formula can jump, and a half-precision number can be on either side of the jump.
    """
    found = []
    for a, b in itertools.product((0, width, -width), repeat=2):
        grad, x = inputs.grad.double() * (1 + a), inputs.x.double() * (1 + b)
        found.append(subject.run(Inputs("", grad, x, inputs.y.double() * (1 + b))))
    # the parameters as numbers of the dtype, as which it compares them with x
    bound = {name: _rounded_to(inputs.x.dtype, value) for name, value in subject.rule.values}
    exact = Inputs("", inputs.grad.double(), inputs.x.double(), inputs.y.double())
    found.append(of_input(subject.rule.function(exact.grad, *subject.read(exact), **bound)))
    stacked = torch.stack(found)
    return stacked.amin(0), stacked.amax(0)


def _rounded_to(dtype: torch.dtype, value: Any) -> Any:
    return torch.tensor(value, dtype=dtype).item() if isinstance(value, float) else value


def check_unbounded(subjects: list[Subject]) -> Iterator[Failure]:
    """No NaN or infinity from finite inputs, and no NaN from an infinite x."""
    for subject in subjects:
        for dtype in (torch.float32, torch.float64):
            finite = subject.extreme(dtype)
            if finite is not None:
                yield from _finite(subject, finite)
            infinite = subject.extreme(dtype, math.inf, -math.inf)
            # an infinite x times a parameter that is 0 is NaN in every formula
            if infinite is not None and 0 not in subject.rule.bound.values():
                yield from _no_nan(subject, infinite)
            yield from _runs_on_nan(subject, dtype)


def _finite(subject: Subject, inputs: Inputs) -> Iterator[Failure]:
    result = subject.run(inputs)
    wrong = ~result.isfinite() & inputs.y.isfinite()
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        yield Failure(
            "extreme_values",
            named(subject, f"{inputs.label}, where x = {inputs.x[place].item():g}"),
            "a finite gradient",
            f"{result[place].item():g}; {int(wrong.sum())} of {wrong.numel()} entries are infinite or NaN",
            "write the formula so that no intermediate overflows, for example with torch.sigmoid instead of exp, and "
            "replace a quotient by its limit where the divisor is 0",
        )


def _no_nan(subject: Subject, inputs: Inputs) -> Iterator[Failure]:
    wrong = subject.run(inputs).isnan() & inputs.x.isinf() & ~inputs.y.isnan()
    if wrong.any():
        x = inputs.x[tuple(wrong.nonzero()[0].tolist())].item()
        yield Failure(
            "non_finite",
            named(subject, f"x = {x}, with a finite gradient"),
            "the limit of the formula for large x",
            "nan",
            "avoid 0·∞ and ∞ − ∞: choose the limit with torch.where, or clamp x first where the result is constant",
        )


def _runs_on_nan(subject: Subject, dtype: torch.dtype) -> Iterator[Failure]:
    usual = subject.usual(dtype)
    for name, value in itertools.product(("grad", "x", "y"), (math.nan, math.inf)):
        given = {n: getattr(usual, n).clone() for n in ("grad", "x", "y")}
        given[name].view(-1)[:1] = value
        try:
            subject.run(Inputs("", **given))
        except Exception as error:
            yield Failure(
                "non_finite",
                named(subject, f"an entry of {name} that is {value}"),
                "a gradient",
                first_line(error),
                "do not convert entries to integers or indices where they can be infinite or NaN",
            )


# --- the reference ---


def check_reference(
    subjects: list[Subject], reference: Callable[..., Any] | None
) -> Iterator[Failure]:
    """The result is that of a function that the caller gave."""
    if reference is None:
        return
    accepted = _accepted(reference)
    own = subjects[0].rule.bound
    for subject in subjects:
        bound = subject.rule.bound
        if any(bound[name] != own.get(name) for name in bound if not accepted(name)):
            continue  # the reference is for other values of a parameter that it does not take
        keywords = {name: value for name, value in bound.items() if accepted(name)}
        for inputs in _compared(subject):
            yield from _referred(subject, inputs, reference, keywords)


def _accepted(reference: Callable[..., Any]) -> Callable[[str], bool]:
    try:
        parameters = inspect.signature(reference).parameters
    except (TypeError, ValueError):  # a builtin, whose signature Python cannot read
        return lambda name: False
    every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return lambda name: every or name in parameters


def _compared(subject: Subject) -> Iterator[Inputs]:
    # a reference may compute in double precision, in which it would meet other borders than a rule in a lower one
    yield subject.usual(torch.float64)
    found = subject.extreme(torch.float64)
    if found is not None:
        yield found


def _referred(
    subject: Subject, inputs: Inputs, reference: Callable[..., Any], keywords: dict[str, Any]
) -> Iterator[Failure]:
    at, actual, copy = named(subject, inputs), subject.run(inputs), inputs.copy()
    seed(subject.device, subject.seed)
    try:
        answer = of_input(reference(copy.grad, *subject.read(copy), **keywords))
        expected = torch.as_tensor(answer, dtype=actual.dtype, device=actual.device)
    except Exception as error:
        yield Failure(
            "reference",
            at,
            "a gradient from the reference",
            first_line(error),
            f"the reference is called as reference({', '.join(('grad', *subject.rule.inputs))}, parameters by keyword) "
            f"with tensors, and returns a tensor or an array",
        )
        return
    largest = inputs.grad.abs().max()
    allowed = 64 * torch.finfo(actual.dtype).eps * (expected.abs() + largest)
    if (found := apart(actual, expected.detach(), allowed)) is not None:
        yield Failure(
            "reference",
            at,
            f"what the reference gives: {found[0]}",
            found[1],
            "mend the formula or the reference; compare them at this entry",
        )
