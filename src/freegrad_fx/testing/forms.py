"""Checks that all ways to run a rule give one gradient: fast form, saved mask, compiled, torch.func."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._torch.generators import seed
from ..core.contract import OF_MASK
from ..extension import library
from .failure import Failure, apart, first_line
from .subject import FLOATS, Inputs, Subject, named, pairs

__all__ = ["check_compiled", "check_fast", "check_func", "check_mask", "check_pointwise"]


def check_fast(subjects: list[Subject]) -> Iterator[Failure]:
    """The fast form gives the bits of the formula, wherever it applies."""
    fast = subjects[0].rule.declaration.fast
    if fast is None:
        return
    remedy = "mend the fast form; or let it return NotImplemented for such inputs, and the formula is used instead"
    served = False
    with torch.no_grad():
        for subject, inputs in pairs(subjects, _everything):
            at, expected = named(subject, inputs), subject.run(inputs)
            try:
                result = subject.call(fast, inputs)
            except Exception as error:
                served = True
                yield Failure("fast", at, "the gradient of the formula", first_line(error), remedy)
                continue
            if result is NotImplemented:
                continue
            served = True
            if result.dtype != expected.dtype:
                yield Failure("fast", at, f"{expected.dtype}", f"{result.dtype}", remedy)
            elif (found := apart(result, expected)) is not None:
                yield Failure(
                    "fast", at, f"the gradient of the formula: {found[0]}", found[1], remedy
                )
        if not served:
            yield Failure(
                "fast",
                named(subjects[0], subjects[0].usual()),
                "a gradient from the fast form",
                "NotImplemented for all inputs and values",
                "leave out fast=, or let it serve the usual case",
            )


def check_pointwise(subjects: list[Subject]) -> Iterator[Failure]:
    """The C++ extension, if it is in use, gives the bits of the formula."""
    if not subjects[0].rule.declaration.pointwise or library.current() is None:
        return
    remedy = (
        "leave out pointwise=True: the formula does not do the same for every entry and every shape"
    )
    for subject, inputs in pairs(subjects, _everything):
        if inputs.grad.shape != inputs.y.shape:
            continue
        expected, result = subject.run(inputs).to(inputs.x.dtype), subject.gradient(inputs)
        if (found := apart(result, expected)) is not None:
            at = named(subject, inputs)
            yield Failure(
                "pointwise", at, f"the gradient of the formula: {found[0]}", found[1], remedy
            )


def _everything(subject: Subject) -> Iterator[Inputs]:
    yield from subject.laid_out()
    for dtype in FLOATS:
        found = subject.extreme(dtype, math.inf, -math.inf, math.nan)
        if found is not None:
            yield found


def check_mask(subjects: list[Subject]) -> Iterator[Failure]:
    """The mask is boolean, and a rule that saves it gives the gradient of the rule that saves x."""
    declaration = subjects[0].rule.declaration
    if declaration.mask is None:
        return
    for subject, inputs in pairs(subjects, _everything):
        at = named(subject, inputs)
        if inputs.grad.shape != inputs.y.shape:
            continue
        for save in OF_MASK:
            try:
                expected = subject.run(inputs)
                result = subject.gradient(inputs, subject.rule(save=save))
            except Exception as error:
                remedy = "let mask= return a boolean tensor of the shape of x, for example x > 0"
                yield Failure("mask", at, "a gradient from the mask", first_line(error), remedy)
                break
            if (found := apart(result, expected)) is not None:
                yield Failure(
                    "mask",
                    at,
                    f"with save={save!r} the gradient of the formula: {found[0]}",
                    found[1],
                    "let the formula read only the values True and False of the mask",
                )
                break
        if declaration.reads_sign:
            found = apart(declaration.mask_of(inputs.x, subject.rule.bound), inputs.x > 0)
            if found is not None:
                yield Failure(
                    "mask",
                    at,
                    f"x > 0, as the mask is marked to tell the sign: {found[0]}",
                    found[1],
                    "leave out the mark",
                )


# --- compiled ---


def check_compiled(subjects: list[Subject]) -> Iterator[Failure]:
    """torch.compile takes the rule without a graph break, and gives the gradient of the formula."""
    # one program for all values of the parameters takes the least time; but each would draw after the one before it
    random = subjects[0].random
    for group in [[s] for s in subjects] if random else [subjects]:
        yield from _compiled_alike(group)


def _compiled_alike(subjects: list[Subject]) -> Iterator[Failure]:
    first = subjects[0]
    inputs = first.usual()
    seed(first.device, first.seed)
    try:
        results = _run_compiled(subjects, inputs)
    except Exception as error:
        if len(subjects) > 1:
            for subject in subjects:
                yield from _compiled_alike([subject])
            return
        yield Failure(
            "compiled",
            _compiled_at(first, inputs),
            "a gradient without a graph break",
            first_line(error),
            "compute with functions of tensors: no .item(), no `if` on entries, no numpy; torch.where chooses "
            "between entries",
        )
        return
    if first.random and first.backend not in _DRAWING_ALIKE:
        return  # compiled code draws other numbers
    for subject, result in zip(subjects, results, strict=True):
        expected = subject.run(inputs)
        if (found := apart(result, expected, _roundings(inputs, expected))) is not None:
            yield Failure(
                "compiled",
                _compiled_at(subject, inputs),
                f"the gradient of the formula: {found[0]}",
                found[1],
                "let the formula depend on its arguments alone: what it reads from elsewhere, a compiler computes once",
            )


_DRAWING_ALIKE = ("aot_eager", "eager")


def _compiled_at(subject: Subject, inputs: Inputs) -> str:
    backend = subject.backend
    name = repr(backend) if isinstance(backend, str) else getattr(backend, "__name__", "a backend")
    return named(subject, f"{inputs.label}, compiled with {name}")


def _run_compiled(subjects: list[Subject], inputs: Inputs) -> tuple[Tensor, ...]:
    sites = [(subject.site, subject.rule) for subject in subjects]

    def forward(*xs: Tensor) -> list[Tensor]:
        return [site(x, rule) for (site, rule), x in zip(sites, xs, strict=True)]

    # code of its own for each call: PyTorch limits how often one function is compiled
    own: Any = types.FunctionType(
        forward.__code__.replace(), forward.__globals__, closure=forward.__closure__
    )
    compiled: Any = torch.compile(own, fullgraph=True, backend=subjects[0].backend, dynamic=False)
    xs = [inputs.x.detach().clone().requires_grad_() for _ in subjects]
    return torch.autograd.grad(compiled(*xs), xs, [inputs.grad] * len(xs))


def _roundings(inputs: Inputs, expected: Tensor) -> Tensor:
    """A few roundings of a number of the size of the result or of the largest gradient."""
    largest = inputs.grad.abs().max().expand_as(expected)
    return 16 * torch.finfo(expected.dtype).eps * torch.maximum(largest, expected.abs())


# --- torch.func ---


def check_func(subjects: list[Subject]) -> Iterator[Failure]:
    """torch.func.vjp, and vmap of it over a batch, give the gradients of the formula."""
    for subject, inputs in pairs(subjects, lambda s: [s.usual(torch.float64)]):
        yield from _func(subject, inputs, "torch.func.vjp", _vjp, [inputs])
        rows = [
            Inputs(
                inputs.label,
                grad,
                inputs.x * scale,
                subject.op(inputs.x * scale),
            )
            for grad, scale in ((inputs.grad, 1.0), (0.5 - inputs.grad, -1.5))
        ]
        yield from _func(subject, inputs, "torch.vmap of torch.func.vjp", _batched, rows)


def _vjp(subject: Subject, rows: list[Inputs]) -> list[Tensor]:
    (inputs,) = rows
    pull: Any = torch.func.vjp(subject.site, inputs.x)[1]
    return list(pull(inputs.grad))


def _batched(subject: Subject, rows: list[Inputs]) -> list[Tensor]:
    def gradient(x: Tensor, grad: Tensor) -> Tensor:
        pull: Any = torch.func.vjp(subject.site, x)[1]
        result: Tensor = pull(grad)[0]
        return result

    x, grad = (torch.stack([getattr(row, name) for row in rows]) for name in ("x", "grad"))
    return list(torch.vmap(gradient, randomness="different")(x, grad))


def _func(
    subject: Subject,
    inputs: Inputs,
    way: str,
    run: Callable[[Subject, list[Inputs]], list[Tensor]],
    rows: list[Inputs],
) -> Iterator[Failure]:
    at = named(subject, f"{inputs.label}, by {way}")
    expected = [subject.run(row) for row in rows]
    seed(subject.device, subject.seed)
    try:
        with warnings.catch_warnings():
            # of operations that vmap runs entry by entry, which only takes longer
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            results = run(subject, rows)
    except Exception as error:
        yield Failure(
            "func",
            at,
            "a gradient",
            first_line(error),
            "compute with functions of tensors that torch.vmap takes: no .item(), no `if` on entries, no writes with "
            "out=; torch.where chooses between entries",
        )
        return
    if subject.random and len(rows) > 1:
        return  # the entries of a batch draw numbers of their own
    for number, (result, wanted, row) in enumerate(zip(results, expected, rows, strict=True)):
        if (found := apart(result, wanted, 1e3 * _roundings(row, wanted))) is not None:
            which = f" of entry {number} of the batch" if len(rows) > 1 else ""
            yield Failure(
                "func",
                at,
                f"the gradient of the formula{which}: {found[0]}",
                found[1],
                "let the formula depend on its arguments alone, and reduce over dimensions counted from the last",
            )
