"""Checks of the gradients that a rule gives to its own parameters, and of its primitive function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .._torch.generators import seed
from ..core.rule import Rule
from .failure import Failure, apart, first_line
from .subject import Inputs, Subject, named

__all__ = ["check_learnt", "check_learnt_reference", "check_primitive"]


def check_learnt(subjects: list[Subject]) -> Iterator[Failure]:
    """A parameter that is learnt gets a finite gradient, by torch.func too, and leaves that of x as it is."""
    for subject in subjects:
        for name in _learnt(subject):
            yield from _learns(subject, subject.usual(torch.float64), name)


def _learns(subject: Subject, inputs: Inputs, name: str) -> Iterator[Failure]:
    at = named(subject, f"{inputs.label}, where {name!r} requires a gradient")
    try:
        of_x, found = _gradients(subject, inputs, name)
        by_row = _gradients(subject, inputs, name, rows=True)[1]
        by_func = torch.func.grad(
            lambda value: (subject.site(inputs.x, _bound(subject, name, value)) * inputs.grad).sum()
        )(_value(subject, name))
    except Exception as error:
        yield Failure(
            "learnt",
            at,
            "a gradient",
            first_line(error),
            f"compute the gradient of {name!r} with functions of tensors, for a number and for a tensor that is "
            f"broadcast against x",
        )
        return
    expected = subject.run(inputs)
    limit = 1e-12 * (expected.abs() + inputs.grad.abs().max())
    if (different := apart(of_x, expected, limit)) is not None:
        yield Failure(
            "learnt",
            at,
            f"the gradient of x as for a number: {different[0]}",
            different[1],
            f"compute with {name!r} as with a number",
        )
    if not bool(found.isfinite().all()):
        remedy = f"compute the gradient of {name!r} without overflow, and without 0/0"
        yield Failure("learnt", at, "a finite gradient of the parameter", f"{found.item()}", remedy)
        return
    limit = 1e-9 * (1 + found.abs() + inputs.grad.abs().sum())
    for other, what, remedy in (
        (by_row.sum(), "one parameter for each row gets its part of the sum", "reduce nothing"),
        (by_func, "torch.func.grad gives the same gradient", "depend on the arguments alone"),
    ):
        if (different := apart(other, found, limit)) is not None:
            remedy = (
                f"return the gradient of {name!r} for each entry of grad, which is summed: {remedy}"
            )
            yield Failure("learnt", at, f"{what}: {different[0]}", different[1], remedy)


def check_learnt_reference(
    subjects: list[Subject], reference: Callable[..., Any] | None
) -> Iterator[Failure]:
    """The gradients of parameters are those of a reference that returns a dict."""
    if reference is None:
        return
    for subject in subjects:
        inputs = subject.usual(torch.float64)
        copy = inputs.copy()
        keywords = _taken(reference, subject.rule.bound)
        try:
            answer = reference(copy.grad, *subject.read(copy), **keywords)
        except Exception:
            return  # the check of the gradient of x says so
        if not isinstance(answer, Mapping):
            return
        for name in _learnt(subject):
            if name in answer:
                expected = torch.as_tensor(answer[name], dtype=torch.float64).sum()
                yield from _compared(subject, inputs, name, expected, "reference", "the reference")


def check_primitive(
    subjects: list[Subject], primitive: Callable[..., Any] | None
) -> Iterator[Failure]:
    """The rule is the derivative of a function by x, and the gradient of a parameter is that by the parameter."""
    if primitive is None:
        return
    for subject in subjects:
        inputs = subject.usual(torch.float64)
        bound = subject.rule.bound
        keywords = _taken(primitive, bound)
        grad, x = inputs.grad, inputs.x
        slope, known = _difference(lambda h: primitive(x + h, **keywords))  # noqa: B023
        actual = subject.run(inputs)
        expected = torch.where(known, grad * slope, actual)
        limit = 1e-5 * (1 + grad.abs() * slope.abs())
        if (found := apart(actual, expected, limit)) is not None:
            yield Failure(
                "primitive",
                named(subject, inputs),
                f"the derivative of the primitive by x, times grad: {found[0]}",
                found[1],
                "mend the formula or the primitive; compare them at this entry",
            )
        for name in _learnt(subject):
            if name in keywords:
                value = keywords[name]
                slope, known = _difference(
                    lambda h: primitive(x, **{**keywords, name: value + h})  # noqa: B023
                )
                if bool(known.all()):
                    total = (grad * slope).sum()
                    yield from _compared(
                        subject, inputs, name, total, "primitive", "the primitive", 1e-5
                    )


def _compared(
    subject: Subject,
    inputs: Inputs,
    name: str,
    expected: Tensor,
    check: str,
    of: str,
    tolerance: float = 1e-9,
) -> Iterator[Failure]:
    actual = _gradients(subject, inputs, name)[1]
    limit = tolerance * (1 + expected.abs() + inputs.grad.abs().sum())
    if (found := apart(actual, expected, limit)) is not None:
        at = named(subject, f"{inputs.label}, for the parameter {name!r}")
        remedy = f"mend the gradient of {name!r}, or {of}"
        yield Failure(check, at, f"what {of} gives: {found[0]}", found[1], remedy)


def _gradients(
    subject: Subject, inputs: Inputs, name: str, *, rows: bool = False
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of a parameter: one for all entries, or one for each row."""
    value = _value(subject, name)
    value = value.expand(inputs.x.shape[0], 1).clone() if rows else value
    value.requires_grad_()
    x = inputs.x.detach().requires_grad_()
    seed(subject.device, subject.seed)
    out = subject.site(x, _bound(subject, name, value))
    of_x, of_value = torch.autograd.grad(out, (x, value), inputs.grad)
    return of_x, of_value


def _bound(subject: Subject, name: str, value: Tensor) -> Rule:
    values: dict[str, Any] = {name: value}
    return subject.rule(**values)


def _value(subject: Subject, name: str) -> Tensor:
    return torch.as_tensor(subject.rule.bound[name], dtype=torch.float64, device=subject.device)


def _learnt(subject: Subject) -> list[str]:
    """The parameters that the rule gives a gradient to, and that have a value."""
    return [name for name in subject.rule.declaration.learns if name in subject.rule.bound]


def _taken(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a function takes by keyword."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin, whose signature Python cannot read
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(values)
    names = {p.name for p in parameters}
    return {name: value for name, value in values.items() if name in names}


def _difference(of: Callable[[float], Any]) -> tuple[Tensor, Tensor]:
    """The derivative at 0 by central differences, and where it exists: where two widths agree."""
    wide, narrow = (
        (torch.as_tensor(of(h)) - torch.as_tensor(of(-h))) / (2 * h) for h in (1e-5, 4e-6)
    )
    return wide, (wide - narrow).abs() <= 1e-5 * (1 + wide.abs().max())
