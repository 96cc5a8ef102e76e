"""Checks of the result of a rule as a tensor, and of what the rule does besides: writes and random draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._torch.generators import generators, seed
from .._torch.tensors import version
from .failure import Failure, apart, first_line
from .subject import Inputs, Subject, named, pairs

__all__ = ["basics", "check_device", "check_purity", "check_randomness", "check_result", "draws"]


def basics(subjects: list[Subject]) -> Iterator[Failure]:
    """Whether a rule runs on ordinary inputs at all, and leaves them as they are. All other checks rely on it."""
    for subject, inputs in pairs(subjects, lambda s: [s.usual()]):
        yield from _result(subject, inputs)
        yield from _purity(subject, inputs)


def check_result(subjects: list[Subject]) -> Iterator[Failure]:
    """Shape, dtype and memory format of the result, for inputs of every shape, dtype and layout."""
    for subject, inputs in pairs(subjects, Subject.laid_out):
        yield from _result(subject, inputs)
    for subject, inputs in pairs(subjects, Subject.mixed):
        yield from _result(subject, inputs)


def _result(subject: Subject, inputs: Inputs) -> Iterator[Failure]:
    at = named(subject, inputs)
    try:
        result: Any = subject.run(inputs)
    except Exception as error:
        remedy = (
            "let the formula take a tensor of any shape, also an empty one and one without dimensions, of any "
            "floating-point dtype"
        )
        yield Failure("runs", at, "a gradient", first_line(error), remedy)
        return
    if not isinstance(result, Tensor):
        remedy = "return the gradient for x; for a zero gradient, torch.zeros_like(grad)"
        yield Failure("runs", at, "a tensor", f"{type(result).__name__} {result!r}", remedy)
        return
    if result.shape != inputs.x.shape:
        yield Failure(
            "shape",
            at,
            f"the shape of x, {tuple(inputs.x.shape)}",
            f"{tuple(result.shape)}",
            "return one gradient for each entry of x; a reduction needs keepdim=True and a product with grad",
        )
    allowed = {inputs.grad.dtype, torch.promote_types(inputs.grad.dtype, inputs.x.dtype)}
    if result.dtype not in allowed:
        yield Failure(
            "dtype",
            at,
            " or ".join(sorted(str(dtype) for dtype in allowed)),
            str(result.dtype),
            "end with result.to(grad.dtype); torch.tensor(...) and torch.zeros(...) have the default dtype, "
            "grad.new_tensor(...) has that of grad",
        )
    yield from _layout(at, result, inputs)


def _layout(at: str, result: Tensor, inputs: Inputs) -> Iterator[Failure]:
    remedy = (
        "compute with elementwise functions and torch.zeros_like(grad), which keep the layout; view, reshape and "
        "torch.zeros(grad.shape) do not"
    )
    if result.layout is not torch.strided:
        yield Failure("layout", at, "a dense tensor", f"{result.layout}", remedy)
        return
    wanted = torch.channels_last
    if result.shape != inputs.x.shape or inputs.x.dim() != 4:
        return
    given, kept = (
        all(t.is_contiguous(memory_format=wanted) for t in some)
        for some in ((inputs.grad, inputs.x), (result,))
    )
    if given and not kept:
        yield Failure("layout", at, "channels_last", f"strides {result.stride()}", remedy)


def check_device(subjects: list[Subject]) -> Iterator[Failure]:
    """The device of the result. Tensors on the device "meta" have no entries to read, which shows reads too."""
    for subject, inputs in pairs(subjects, lambda s: [s.usual()]):
        result: Any
        for where in {subject.device, torch.device("meta")}:
            try:
                result = subject.run(inputs.copy(where))
            except Exception as error:
                result = first_line(error)
            found = result.device if isinstance(result, Tensor) else result
            if found == where or (isinstance(found, torch.device) and found.type == where.type):
                continue
            yield Failure(
                "device",
                named(subject, f"tensors on the device {where.type!r}, as on any accelerator"),
                f"a result on {where.type!r}",
                str(found),
                "create tensors on the device of grad, for example with torch.zeros_like(grad) or "
                "grad.new_tensor(...), and do not read entries in Python (.item(), if, numpy)",
            )


# --- what the rule does besides ---


def check_purity(subjects: list[Subject]) -> Iterator[Failure]:
    """The arguments are the same after the call, also after that of the fast form and of the mask."""
    for subject, inputs in pairs(subjects, Subject.laid_out):
        yield from _purity(subject, inputs)


def _purity(subject: Subject, inputs: Inputs) -> Iterator[Failure]:
    declaration = subject.rule.declaration
    if declaration.mask is not None:

        def mask(grad: Tensor, x: Tensor, *others: Tensor, **bound: Any) -> Tensor:
            return declaration.mask_of(x, bound)

        found = list(_changed(subject, inputs, "the mask", mask))
        yield from found
        if found:
            return  # the formula calls the mask
    yield from _changed(subject, inputs, "the formula", subject.rule.function)
    if declaration.fast is not None:
        yield from _changed(subject, inputs, "the fast form", declaration.fast)


def _changed(
    subject: Subject, inputs: Inputs, part: str, function: Callable[..., Any]
) -> Iterator[Failure]:
    copy = inputs.copy()
    tensors = {"grad": copy.grad}
    tensors |= dict(zip(subject.rule.inputs, subject.read(copy), strict=True))
    tensors |= {n: v for n, v in subject.rule.bound.items() if isinstance(v, Tensor)}
    before = {name: (version(t), t.detach().clone()) for name, t in tensors.items()}
    try:
        result = subject.call(function, copy)
    except Exception:
        return  # another check says so
    for name, tensor in tensors.items():
        written, values = before[name]
        if version(tensor) != written or apart(tensor, values):
            yield Failure(
                "purity",
                named(subject, inputs),
                f"that {part} leaves {name} as it is, because other gradients are computed from it",
                f"{part} writes into {name}",
                "compute a new tensor: grad * 2 instead of grad.mul_(2), and grad.clone() before a write",
            )
        elif name != "grad" and isinstance(result, Tensor) and _shares(result, tensor):
            yield Failure(
                "purity",
                named(subject, inputs),
                "a result in memory of its own: it can become the .grad that an optimizer writes into",
                f"{part} returns the memory of {name}",
                f"return {name}.clone()",
            )


def _shares(first: Tensor, second: Tensor) -> bool:
    if first.layout is not torch.strided or not first.numel() or first.device.type == "meta":
        return False
    return first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


def check_randomness(subjects: list[Subject]) -> Iterator[Failure]:
    """The same seed gives the same result; and another seed does only if the rule declares random numbers."""
    declared = subjects[0].rule.declaration.random
    seen = False
    for subject in subjects:
        inputs = subject.ordinary(8, 16) or subject.usual()
        at = named(subject, inputs)
        first, again, other = (subject.run(inputs, seeded=subject.seed + s) for s in (0, 0, 1))
        drawn = draws(subject)
        seen |= drawn
        if (found := apart(again, first)) is not None:
            yield Failure(
                "random",
                at,
                f"the same result from the same seed: {found[0]}",
                found[1],
                "draw from PyTorch's generator, for example with torch.rand_like(grad), and keep no state between "
                "calls",
            )
        elif not declared and (drawn or apart(other, first) is not None):
            yield Failure(
                "random",
                at,
                "no random numbers, as the rule declares none",
                "the rule draws from PyTorch's generator",
                "register the rule with random=True",
            )
    if declared and not seen:
        yield Failure(
            "random",
            "all inputs and values",
            "random numbers, as the rule is registered with random=True",
            "the rule draws none from PyTorch's generator",
            "draw from PyTorch's generator, or register the rule without random=True",
        )


def draws(subject: Subject) -> bool:
    """Whether the rule draws from a generator of PyTorch."""
    inputs = subject.usual()
    seed(subject.device, subject.seed)
    before = [g.get_state() for g in generators(subject.device)]
    subject.rule.function(inputs.grad, *subject.read(inputs), **subject.rule.bound)
    after = [g.get_state() for g in generators(subject.device)]
    return not all(map(torch.equal, before, after))
