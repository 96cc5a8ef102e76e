"""The check of a capture from example inputs: with these inputs, and with others of the same shapes."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .._torch import exporting
from ..capture import structural_copy
from ..capture.examples import map_tensors, twin
from ..sites.remarks import Lost
from .observe import Case, Inputs
from .report import Verification
from .values import take_apart
from .verify import Pair

__all__ = ["do_the_same", "lacks_values", "other_values", "verify_examples"]

# In this order, until the time is up. The other values show what is specialised, two calls in a row show state. The
# parameters need no changes: an export has no values of theirs that it could keep.
_CASES = (
    ("given", Case(training=True, gradients=True, calls=1, thorough=False)),
    ("further", Case(training=False, gradients=True, calls=1, thorough=False)),
    ("given", Case(training=True, gradients=False, calls=2, thorough=False)),
    ("given", Case(training=False, gradients=False, calls=2, thorough=False)),
    ("further", Case(training=True, gradients=True, calls=1, thorough=False)),
)


def lacks_values(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a model cannot be run, because it or its inputs are on the meta device or fake."""
    held = (*model.parameters(), *model.buffers())
    given = take_apart((inputs.args, dict(inputs.kwargs))).tensors.values()
    return any(tensor.is_meta or exporting.is_symbolic(tensor) for tensor in (*held, *given))


def verify_examples(
    model: nn.Module, result: nn.Module, inputs: Inputs, lost: Collection[Lost], seconds: float
) -> Verification:
    """Compare a captured model with its original, for example inputs and for others of the same shapes.

    Args:
        model: The original. A copy of it is run, which shares its tensors.
        result: The captured model.
        inputs: The example inputs.
        lost: What the report already says is lost; it is not a difference.
        seconds: The time after which no further case is begun. The first one is always compared.
    """
    pair = Pair(structural_copy(model), result, lost)
    began = time.perf_counter()
    spent, longest, left = 0.0, 0.0, []
    with pair.kept():
        other = Inputs(*other_values((inputs.args, dict(inputs.kwargs))))
        for which, case in _CASES:
            if spent and spent + longest * case.calls > seconds:
                left.append(f"{case}, {which} inputs")
                continue
            pair.compare(case, inputs if which == "given" else other, which)
            now = time.perf_counter() - began
            longest, spent = max(longest, (now - spent) / case.calls), now
            pair.differences = [d for d in pair.differences if not _expected(d, lost)]
            if pair.differences:
                break
        if left:
            pair.notes.append(f"to take no longer than the export, not compared: {'; '.join(left)}")
        return pair.result()


def do_the_same(model: nn.Module, result: nn.Module, inputs: Inputs) -> bool:
    """Whether two models do the same for some inputs, in train and in eval mode."""
    pair = Pair(structural_copy(model), result)
    with pair.kept():
        for case in (Case(True, True), Case(False, True)):
            pair.compare(case, inputs)
        return bool(pair.result())


def _expected(difference: Any, lost: Collection[Lost]) -> bool:
    """Whether a difference is one that is accepted: it is loud, or the report states it."""
    if difference.inputs == "further" and difference.kind == "error":
        return True  # a guard of the graph, or a check of the original, for values that it does not take
    if difference.kind == "error" and difference.what.startswith("raises CaptureError"):
        return True  # the graph says at the call for which flags and settings it was captured
    return difference.kind == "state" and any(
        difference.name.startswith(f"{remark.path}.".lstrip("."))
        and _about(remark, difference.name)
        for remark in lost
    )


def _about(remark: Lost, name: str) -> bool:
    own = name.removeprefix(f"{remark.path}.") if remark.path else name
    return remark.what.startswith("the hooks") or any(
        own == text or own.startswith((f"{text}[", f"{text}.")) for text in _quoted(remark.what)
    )


def _quoted(text: str) -> Iterator[str]:
    yield from text.split("'")[1::2]


def other_values(inputs: Any) -> Any:
    """Inputs of the same kinds and shapes with other values, and every tensor in memory of its own.

    Floating-point values are drawn between the smallest and the largest one. Integers, booleans and floating-point
    tensors with at most two values (masks) are permuted, so that no value is out of range.
    """
    generator = torch.Generator().manual_seed(0)
    return map_tensors(inputs, lambda tensor: _other(tensor, generator))


def _other(tensor: Tensor, generator: torch.Generator) -> Tensor:
    new = twin(tensor)
    plain = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_quantized
    if not plain or type(tensor) not in (Tensor, nn.Parameter) or not tensor.numel():
        return new
    with torch.no_grad():
        values = tensor.detach().to("cpu").flatten()
        if values.is_complex():
            both = torch.view_as_real(values.resolve_conj())
            drawn = torch.view_as_complex(_drawn(both.flatten(), generator).view_as(both))
        elif values.is_floating_point() and not _is_mask(values):
            drawn = _drawn(values, generator)
        else:
            drawn = values[torch.randperm(values.numel(), generator=generator)]
        target = new.detach()
        if 0 in target.stride() and target.numel() > 1:  # an expanded tensor has fewer values
            target = target.as_strided(
                [
                    1 if step == 0 else size
                    for size, step in zip(target.size(), target.stride(), strict=True)
                ],
                target.stride(),
            )
        target.copy_(drawn[: target.numel()].view(target.shape).to(target.device))
    return new


def _is_mask(values: Tensor) -> bool:
    few = values[:4096]
    return values.numel() > 2 and 1 < len(torch.unique(few)) <= 2


def _drawn(values: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers between the smallest and the largest finite value. Other values stay where they are."""
    finite = values.isfinite()
    if not finite.any():
        return values
    wide = values.double()
    low, high = wide[finite].min().item(), wide[finite].max().item()
    if low == high:  # zeros, ones: also other values between
        low, high = min(0.0, low), max(0.0, high) or (1.0 if low == 0 else 0.0)
    numbers = torch.rand(values.shape, generator=generator, dtype=torch.double)
    drawn: Tensor = torch.where(finite, low + numbers * (high - low), wide).to(values.dtype)
    return drawn
