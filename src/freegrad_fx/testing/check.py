"""`check_rule`: it runs all checks of a rule, and raises one error that lists what they found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .._torch.generators import random_state_kept
from ..core.contract import SAVES
from ..core.rule import Composition, Rule, get
from ..errors import RuleCheckError, RuleError, unknown
from ..vocabulary import OPS
from .declared import check_joint, check_linear, check_reducing, check_sparse, check_texts
from .failure import Failure, first_line, listed
from .forms import check_compiled, check_fast, check_func, check_mask, check_pointwise
from .learnt import check_learnt, check_learnt_reference, check_primitive
from .numbers import check_reference, check_rounding, check_second_derivative, check_unbounded
from .results import (
    basics,
    check_device,
    check_purity,
    check_randomness,
    check_result,
    draws,
)
from .subject import Subject

__all__ = ["CHECKS", "check_rule"]

CHECKS = MappingProxyType(
    {
        "runs": "the formula returns a tensor, also for empty, 0-dim and non-contiguous inputs",
        "shape": "the result has the shape of x",
        "dtype": "the result has the dtype of grad, in half, single and double precision and under autocast",
        "layout": "the result is dense, and channels_last where grad and x are",
        "device": "the result is on the device of grad",
        "purity": "formula, fast form and mask do not write into their arguments, and do not return x or y",
        "random": "the same seed gives the same result; random numbers are drawn only if random=True is declared",
        "formula": "the docstring begins with the formula",
        "citation": "reference= names the source",
        "linear": "the result is linear in grad, or linear=False is declared",
        "reducing": "an entry depends only on the entries at its place, or reducing=True is declared",
        "joint": "with joint=True, the result does not depend on the shape of grad",
        "sparse": "with sparse=True, a sparse gradient gives what the dense one gives",
        "fast": "the fast form gives the bits of the formula",
        "pointwise": "with pointwise=True, the C++ extension, if it is in use, gives the bits of the formula",
        "mask": "save='mask' and save='bits' give the gradient of save='x', bit by bit",
        "compiled": "torch.compile takes the rule in one graph, and gives the gradient of the formula",
        "func": "torch.func.vjp and torch.vmap give the gradients of the formula",
        "second_derivative": "the derivative of the rule is its finite difference, also by create_graph=True",
        "half_precision": "float16 and bfloat16 give the values of double precision up to rounding",
        "extreme_values": "large, small and zero x give finite gradients, in single precision those of double",
        "non_finite": "an infinite x gives no NaN, and NaN and infinity raise no error",
        "learnt": "a parameter that is learnt gets a finite gradient, summed over the entries it is for",
        "reference": "the result is that of the given reference",
        "primitive": "the result is the derivative of the given primitive function, also by parameters",
    }
)
"""The checks of `check_rule` by name, each with what it asserts."""

_ORDER: tuple[tuple[tuple[str, ...], Callable[[list[Subject]], Iterator[Failure]]], ...] = (
    (("runs", "shape", "dtype", "layout"), check_result),
    (("device",), check_device),
    (("purity",), check_purity),
    (("random",), check_randomness),
    (("linear",), check_linear),
    (("reducing",), check_reducing),
    (("joint",), check_joint),
    (("sparse",), check_sparse),
    (("fast",), check_fast),
    (("pointwise",), check_pointwise),
    (("mask",), check_mask),
    (("compiled",), check_compiled),
    (("func",), check_func),
    (("second_derivative",), check_second_derivative),
    (("half_precision", "extreme_values"), check_rounding),
    (("extreme_values", "non_finite"), check_unbounded),
    (("learnt",), check_learnt),
)


def check_rule(
    rule: str | Rule,
    *,
    reference: Callable[..., Any] | None = None,
    primitive: Callable[..., Any] | None = None,
    op: str | Callable[[Tensor], Tensor] | None = None,
    skip: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
    backend: Any = "aot_eager",
    seed: int = 0,
) -> None:
    """Check that a rule does what a rule has to do, and what its `register` declares.

    The checks are those of `freegrad_fx.testing.CHECKS`. The rule runs with the values that it has; a rule that has its
    defaults runs also with each of its ``examples=``. Random numbers are drawn from a fixed seed, and the generators of
    PyTorch have their state again afterwards.

    Args:
        rule: The rule, or its name.
        reference: A function that computes the expected gradient, called as ``reference(grad, [x], [y])`` with the
            tensors that the rule reads, and, by keyword, the parameters of the rule that it takes. It returns a tensor
            or an array. To compute in NumPy, convert first: ``lambda grad, x: formula(grad.numpy(), x.numpy())``.
            For a rule that gives a gradient to its parameters, it can return a dict: the gradient of ``"x"``, and those
            of parameters by their names, which are summed.
        primitive: The function of which a surrogate is the derivative, called as ``primitive(x)`` with the parameters
            of the rule that it takes by keyword. Finite differences of it by x, and by the parameters that are learnt,
            are compared with the rule.
        op: The operation whose backward the rule replaces: a canonical name such as ``"relu"``, or a function of one
            tensor. It gives the ``y`` that the rule reads. Default: the rule's own forward, the first operation that
            the rule is meant for, or tanh.
        skip: Checks to leave out: the reason, by the name of the check.
        device: Where the tensors are. A rule is also run on the device "meta", in the check "device".
        backend: The backend of `torch.compile`. The default needs no C++ compiler.
        seed: The seed of the inputs and of the random numbers of the rule.

    Raises:
        RuleCheckError: Checks fail. The message lists each with its input, what was expected, what was found, and a
            remedy; the attribute `failures` has the same as data.
        RuleError: The rule, the operation, or a name in `skip` is unknown; or a parameter has no value.
        TypeError: `rule` is a composition, or needs other operands than ``x`` or the native operation; a parameter is a
            tensor with dimensions; or a reason is no text.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> @fg.register("doubled", reference="own work", overwrite=True)
        ... def doubled(grad):
        ...     \"\"\"2·grad\"\"\"
        ...     return 2 * grad
        >>> fg.testing.check_rule("doubled", reference=lambda grad: grad + grad)
    """
    left_out = _checked_skip(skip or {})
    where = torch.device(device)
    subjects = _subjects(rule, op, where, backend, seed)
    with random_state_kept(where):
        found = [f for f in basics(subjects) if f.check not in left_out]
        basic = bool(found)
        found += check_texts(subjects)
        if not basic:
            random = subjects[0].rule.declaration.random or any(map(draws, subjects))
            subjects = [replace(subject, random=random) for subject in subjects]
            found += _further(subjects, reference, primitive, left_out)
    found = listed([failure for failure in found if failure.check not in left_out])
    if found:
        message = _message(subjects[0].rule, found, left_out, basic)
        raise RuleCheckError(message, tuple(found))


def _checked_skip(skip: Mapping[str, str]) -> Mapping[str, str]:
    if not isinstance(skip, Mapping):
        raise TypeError(
            f"skip has to be a dict from the name of a check to the reason, such as {{'second': 'it rounds'}}, got "
            f"{skip!r}. The checks: {', '.join(CHECKS)}."
        )
    for name, reason in skip.items():
        if name not in CHECKS:
            raise RuleError(unknown("check in skip=", name, CHECKS))
        if not isinstance(reason, str) or not reason.strip():
            raise TypeError(
                f"skip={{{name!r}: {reason!r}}} gives no reason. Write a text: "
                f"skip={{{name!r}: 'why the check does not apply'}}."
            )
    return skip


def _subjects(
    rule: str | Rule,
    op: str | Callable[[Tensor], Tensor] | None,
    device: torch.device,
    backend: Any,
    seed: int,
) -> list[Subject]:
    """The rule with each set of values that it is checked with."""
    if isinstance(rule, Composition):
        parts = ", ".join(part.name for part in rule.parts)
        raise TypeError(
            f"check_rule checks one rule, got a composition. Check its parts one by one: {parts}."
        )
    given = get(rule)(save=SAVES[0], compile=False)
    if needed := given.declaration.needs_operation:
        raise TypeError(
            f"check_rule gives a rule the input and the output of an operation with one operand; rule {given.name!r} "
            f"needs {needed}. Compare it with your own formula at freegrad_fx.ops.decoupled(..., operation=...)."
        )
    for name, value in given.values:
        if isinstance(value, Tensor) and value.dim():
            raise TypeError(
                f"check_rule gives a rule inputs of many shapes, which the tensor {name!r} of shape "
                f"{tuple(value.shape)} does not fit. Bind a number, or a tensor without dimensions."
            )
    sets = [given]
    if dict(given.bound) == given.declaration.defaults:
        examples = [given(**values) for values in given.declaration.examples]
        sets = [r for r in (given, *examples) if r.parameters.keys() <= r.bound.keys()]
    for chosen in sets or [given]:
        chosen.require_bound()
    function, name = _operation(given, op)
    return [Subject(r, function, name, device, backend, seed) for r in sets]


def _operation(
    rule: Rule, op: str | Callable[[Tensor], Tensor] | None
) -> tuple[Callable[[Tensor], Tensor], str]:
    able = {name: o.function for name, o in OPS.items() if o.function is not None}
    if op is None:
        meant = [name for name in rule.declaration.meant_for if name in able]
        if not rule.keeps_shape and rule.forward is None:
            raise RuleError(
                f"rule {rule.name!r} is registered with keeps_shape=False, so it needs the operation that changes the "
                f"shape: check_rule({rule.name!r}, op=...)."
            )
        op = rule.forward or (meant[0] if meant else "tanh")
    if isinstance(op, str):
        if op not in able:
            raise RuleError(unknown("operation", op, able))
        return able[op], op
    return op, getattr(op, "__name__", repr(op))


def _further(
    subjects: list[Subject],
    reference: Callable[..., Any] | None,
    primitive: Callable[..., Any] | None,
    left_out: Mapping[str, str],
) -> Iterator[Failure]:
    for names, check in _ORDER:
        wanted = [name for name in names if name not in left_out]
        if wanted:
            yield from _guarded(wanted[0], check, subjects)
    if "reference" not in left_out:
        yield from check_reference(subjects, reference)
        yield from check_learnt_reference(subjects, reference)
    if "primitive" not in left_out:
        yield from check_primitive(subjects, primitive)


def _guarded(
    name: str,
    check: Callable[[list[Subject]], Iterator[Failure]],
    subjects: list[Subject],
) -> Iterator[Failure]:
    """The failures of a check. An error in it is one too: the rule raised it."""
    try:
        yield from check(subjects)
    except Exception as error:
        yield Failure(
            name,
            "one of its inputs",
            "a gradient",
            first_line(error),
            "call the rule with such inputs, rule.backward(grad, x=..., y=...), to see where the error comes from",
        )


def _message(rule: Rule, found: list[Failure], left_out: Mapping[str, str], basic: bool) -> str:
    failed = {failure.check for failure in found}
    count = "1 check" if len(failed) == 1 else f"{len(failed)} checks"
    parts = [f"rule {rule.name!r} fails {count}:"]
    parts += [f"{number}. {failure}" for number, failure in enumerate(found, 1)]
    if basic:
        parts.append(
            "The other checks were not run, as they rely on these. Mend these, and check again."
        )
    if left_out:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
        parts.append(f"Left out: {reasons}.")
    return "\n\n".join(parts)
