"""Step functions that are nearest to the derivative of a function. Does not know any rule."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._torch.dispatch import runs_alone
from .._torch.dynamo import is_compiling
from ..context import outside_of_blocks
from ..errors import RuleError
from .precision import wide

__all__ = ["Steps", "level_of", "nearest_steps", "segment"]

Steps: TypeAlias = tuple[tuple[float, ...], tuple[float, ...]]
"""The borders between the steps, ascending, and the values of the steps, one more."""


def segment(x: Tensor, borders: tuple[float, ...]) -> Tensor:
    """The number of borders that each entry is above, as bytes. NaN is above all."""
    x = wide(x)
    # a compiler joins operations on single entries; bucketize warns of the strides that vmap hides
    if is_compiling() or not runs_alone(x):
        code = torch.zeros_like(x, dtype=torch.uint8)
        for border in borders:
            code = code + ~(x <= border)  # NaN is above all borders, as in bucketize
        return code
    edges = torch.tensor(borders, dtype=x.dtype, device=x.device)
    return torch.bucketize(x.contiguous(), edges, out_int32=True).to(torch.uint8)


def level_of(code: Tensor, levels: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """The level of each segment, in at least single precision."""
    dtype = torch.promote_types(dtype, torch.float32)
    if is_compiling():
        value = torch.full_like(code, levels[0], dtype=dtype)
        for number, level in enumerate(levels[1:], 1):
            value = torch.where(code >= number, level, value)
        return value
    return torch.tensor(levels, dtype=dtype, device=code.device)[code.int()]


# --- the nearest steps ---

_FAR = 100.0
"""Functions are compared on [−100, 100], as the tables of the source are."""

_known: dict[tuple[bytes, int], Steps] = {}


def nearest_steps(function: Callable[[Tensor], Tensor], count: int) -> Steps:
    """Return the step function of at most `count` steps that is nearest to the derivative of a function.

    Formula: the minimum of ∫(f′ − step)² over [−100, 100]. Between two borders, the step is the mean of f′, which is
    (f(b₂) − f(b₁))/(b₂ − b₁).

    Args:
        function: A continuous function that acts on each entry of a tensor.
        count: The largest number of steps.

    Raises:
        RuleError: The function is random, not continuous or not finite, or cannot be computed from one tensor.
    """
    # In a thread of its own, no mode of PyTorch and no block acts on the numbers
    with outside_of_blocks(), ThreadPoolExecutor(1) as alone:
        return alone.submit(_nearest, function, count).result()


def _nearest(function: Callable[[Tensor], Tensor], count: int) -> Steps:
    grid = _grid()

    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            return function(x.clone())

    try:
        values, again = f(grid), f(grid)
    except (RuntimeError, TypeError, ValueError) as error:
        raise RuleError(f"it cannot be computed from one tensor ({error})") from error
    if not torch.equal(values, again):
        raise RuleError("it is random, or not finite")
    key = (values.numpy().tobytes(), count)
    if key not in _known:
        _require_continuous(function, grid, values)
        borders = _refined(f, grid, _best_on_grid(grid, values, count))
        ends = f(borders)
        levels = (ends[1:] - ends[:-1]) / (borders[1:] - borders[:-1])
        _known[key] = (_rounded(borders[1:-1]), _rounded(levels))
    return _known[key]


def _rounded(numbers: Tensor) -> tuple[float, ...]:
    """Six decimals, more than a step function needs, which a report can print."""
    return tuple(round(number, 6) + 0.0 for number in numbers.tolist())


def _grid() -> Tensor:
    """Points of [−100, 100], dense where activations bend."""
    how: Any = {"dtype": torch.float64, "device": "cpu"}
    near = torch.arange(-400, 401, **how) / 50  # with the places where activations have a kink
    far = torch.logspace(math.log10(8), math.log10(_FAR), 60, **how)[1:]
    return torch.cat([-far.flip(0), near, far])


def _require_continuous(function: Callable[[Tensor], Tensor], grid: Tensor, values: Tensor) -> None:
    """Raise `RuleError` if a function rises between two points by another slope than those that it has there."""
    points = torch.stack([grid[:-1].lerp(grid[1:], part) for part in (0.01, 0.5, 0.99)])
    points.requires_grad_()
    (slopes,) = torch.autograd.grad(function(points * 1).sum(), points)
    low, high = slopes.amin(0) - 1e-2, slopes.amax(0) + 1e-2
    rise = values.diff() / grid.diff()
    if not bool(((rise >= low) & (rise <= high)).all()):
        raise RuleError("it is not continuous, so that the mean of its derivative is not its rise")


def _best_on_grid(grid: Tensor, values: Tensor, count: int) -> list[int]:
    """The borders of the best step function among those whose borders are on the grid, by dynamic programming.

    A smaller error is a larger sum of (f(b₂) − f(b₁))²/(b₂ − b₁). No step is used that does not make it larger.
    """
    width = grid[None, :] - grid[:, None]
    gain = (values[None, :] - values[:, None]).square() / width
    gain = torch.where(width > 0, gain, -math.inf)
    best, before = gain[0], list[Tensor]()
    while len(before) < count - 1:
        more, start = (best[:, None] + gain).max(0)
        if more[-1] <= best[-1] * (1 + 1e-12):
            break
        best = more
        before.append(start)
    borders = [len(grid) - 1]
    for start in reversed(before):
        borders.append(int(start[borders[-1]]))
    return [0, *reversed(borders)]


def _refined(f: Callable[[Tensor], Tensor], grid: Tensor, borders: list[int]) -> Tensor:
    """Move the borders from the grid to their best places, every second one at a time."""
    places = grid[borders]
    cells = torch.stack([grid[[min(b + 1, len(grid) - 1) for b in borders]], places])
    reach = (cells[0] - cells[1]).clamp(min=1e-3)
    fractions = torch.linspace(-1, 1, 33, dtype=torch.float64, device="cpu")
    for _ in range(400):
        before = places.clone()
        for first in (1, 2) if len(places) > 3 else (1,) * (len(places) - 2):
            at = torch.arange(first, len(places) - 1, 2)
            left, place, right = places[at - 1], places[at], places[at + 1]
            radius = torch.minimum(reach[at], 0.9 * torch.minimum(place - left, right - place))
            for _ in range(5):
                tried = place[:, None] + radius[:, None] * fractions
                rises = (f(tried) - f(left)[:, None], f(right)[:, None] - f(tried))
                gain = rises[0].square() / (tried - left[:, None])
                gain += rises[1].square() / (right[:, None] - tried)
                place = tried.gather(1, gain.argmax(1, keepdim=True))[:, 0]
                radius = radius / 8
            places[at] = place
        moved = (places - before).abs().amax()
        if moved < 1e-8:
            break
        reach = reach.clamp(max=max(4 * float(moved), 1e-6))
    return places
