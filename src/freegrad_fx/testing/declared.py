"""Checks of what a rule declares: its formula and source, and whether it is linear, reducing and sparse."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .failure import Failure, apart, first_line
from .subject import Inputs, Subject, named, pairs

__all__ = ["check_joint", "check_linear", "check_reducing", "check_sparse", "check_texts"]


def check_texts(subjects: list[Subject]) -> Iterator[Failure]:
    """The formula and the source are stated."""
    rule = subjects[0].rule
    if not rule.formula.strip():
        yield Failure(
            "formula",
            "the docstring",
            "the formula as its first line",
            "no text",
            'begin the docstring with the formula, for example """grad·1[|x| ≤ bound]"""',
        )
    if not rule.reference.strip():
        yield Failure(
            "citation",
            "register",
            "the source of the formula",
            "no reference=",
            f"register({rule.name!r}, reference='the paper, the library, or own work')",
        )


def check_linear(subjects: list[Subject]) -> Iterator[Failure]:
    """The result for a sum of gradients is the sum of the results, unless the rule declares linear=False."""
    declared = subjects[0].rule.declaration.linear
    found = None
    for subject, inputs in pairs(subjects, lambda s: [s.usual(torch.float64)]):
        for size in (1.0, 1e-3, 1e3, 1e9):
            found = _not_additive(subject, inputs, size)
            if found is not None and declared:
                yield Failure(
                    "linear",
                    named(subject, f"gradients a and b of size {size:g}"),
                    f"rule(a − 3·b) = rule(a) − 3·rule(b), as the rule is not registered with linear=False: {found[0]}",
                    found[1],
                    "register the rule with linear=False",
                )
            if found is not None:
                break
        if found is not None and not declared:
            return
    if not declared:
        yield Failure(
            "linear",
            "all inputs and values",
            "a result that is not linear in grad, as the rule is registered with linear=False",
            "rule(a − 3·b) = rule(a) − 3·rule(b) for gradients of sizes from 1e-3 to 1e9",
            "register the rule without linear=False; fg.functional.jvp then works with it",
        )


def _not_additive(subject: Subject, inputs: Inputs, size: float) -> tuple[str, str] | None:
    def result(grad: Tensor) -> Tensor:
        return subject.run(Inputs("", grad, inputs.x, inputs.y))

    a = size * inputs.grad
    b = size * inputs.grad.flip(-1) if a.dim() else size * 0.3 * inputs.grad
    together, apart_a, apart_b = result(a - 3 * b), result(a), result(b)
    largest = torch.stack([t.abs().max() for t in (together, apart_a, apart_b)]).max()
    return apart(together, apart_a - 3 * apart_b, 1e-9 * largest.expand_as(together))


def check_reducing(subjects: list[Subject]) -> Iterator[Failure]:
    """An entry of the result depends only on the same entry, unless the rule declares reducing=True."""
    declared = subjects[0].rule.declaration.reducing
    if not subjects[0].rule.keeps_shape:
        return
    seen = False
    for subject, inputs in pairs(subjects, lambda s: [s.usual(torch.float64)]):
        if inputs.grad.shape != inputs.x.shape:
            continue  # the operation changes the shape, so that there is no same entry
        for found in _neighbours(subject, inputs):
            seen = True
            if not declared:
                yield found
                break
    if declared and not seen:
        yield Failure(
            "reducing",
            "all inputs and values",
            "entries that depend on other entries, as the rule is registered with reducing=True",
            "each entry depends only on the entries of grad, x and y at its place",
            "register the rule without reducing=True",
        )


def _neighbours(subject: Subject, inputs: Inputs) -> Iterator[Failure]:
    """Whether an entry of the result changes with the other entries, or with their number."""
    random = subject.random
    remedy = "register the rule with reducing=True; or compute each entry from the entries at its place alone"
    before = subject.run(inputs)
    for place in ((0, 0), (1, 2), (2, 3)):
        kept = torch.zeros_like(inputs.x, dtype=torch.bool)
        kept[place] = True
        for name, other in (("30 times as large", 30.0), ("0", 0.0), ("NaN", math.nan)):
            changed = [
                torch.where(kept, t, t * other if other else 0.0)
                for t in (inputs.grad, inputs.x, inputs.y)
            ]
            try:
                after = subject.run(Inputs("", *changed))
            except Exception:
                continue  # that inputs with NaN raise is what another check finds
            if (found := apart(after[place], before[place])) is not None:
                yield Failure(
                    "reducing",
                    named(subject, inputs),
                    f"the same result at index {place} when all other entries become {name}: {found[0]}",
                    found[1],
                    remedy,
                )
        if not (random or subject.rule.declaration.reducing):
            alone = [t[place].reshape(1) for t in (inputs.grad, inputs.x, inputs.y)]
            after = subject.run(Inputs("", *alone))
            same = after.shape != (1,)  # another check finds that
            if not same and (found := apart(after[0], before[place])) is not None:
                yield Failure(
                    "reducing",
                    named(subject, inputs),
                    f"the same result for the entry at index {place} alone: {found[0]}",
                    found[1],
                    remedy,
                )


def check_joint(subjects: list[Subject]) -> Iterator[Failure]:
    """A rule that declares joint=True does not depend on the shape of the gradient."""
    if not subjects[0].rule.declaration.joint:
        return
    for subject, inputs in pairs(subjects, lambda s: [s.usual(torch.float64)]):
        parts = (t.reshape(-1) for t in (inputs.grad, inputs.x, inputs.y))
        flat = Inputs(f"{inputs.label}, flattened", *parts)
        found = apart(subject.run(flat), subject.run(inputs).reshape(-1))
        if found is not None:
            yield Failure(
                "joint",
                named(subject, flat),
                f"what the gradient with its dimensions gives: {found[0]}",
                found[1],
                "register the rule without joint=True; or let the formula regard all entries alike, whatever the shape",
            )


def check_sparse(subjects: list[Subject]) -> Iterator[Failure]:
    """A rule that declares sparse=True maps a sparse gradient as it maps the dense one."""
    if not subjects[0].rule.sparse:
        return
    remedy = (
        "register the rule without sparse=True; or make it elementwise, with 0 for a gradient of 0, of functions that "
        "take sparse tensors"
    )
    for subject, inputs in pairs(subjects, lambda s: [s.usual(), s.usual(torch.float64)]):
        if inputs.grad.dim() != 2:
            continue
        at = named(subject, f"a sparse gradient, rows 0 and 2 of {inputs.label}")
        grad = inputs.grad.clone()
        grad[1] = 0
        dense = Inputs(inputs.label, grad, inputs.x, inputs.y)
        sparse = Inputs(inputs.label, grad.to_sparse(1).coalesce(), inputs.x, inputs.y)
        expected = subject.run(dense)
        try:
            result = subject.run(sparse)
        except Exception as error:
            yield Failure("sparse", at, "a gradient", first_line(error), remedy)
            continue
        if result.layout is not torch.sparse_coo:
            yield Failure("sparse", at, "a sparse gradient", f"one of {result.layout}", remedy)
        elif (found := apart(result.to_dense(), expected)) is not None:
            yield Failure(
                "sparse", at, f"what the dense gradient gives: {found[0]}", found[1], remedy
            )
