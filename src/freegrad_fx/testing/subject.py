"""What is checked: a rule with values of its parameters, at an operation; and the inputs that it is given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch.generators import seed
from ..core.rule import Rule
from ..ops import decoupled, stop_gradient

__all__ = ["FLOATS", "Inputs", "Subject", "named", "of_input", "pairs"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

SHAPES = ((), (1,), (0,), (2, 0, 3), (3, 4))


@dataclass(frozen=True)
class Inputs:
    """The arguments of a rule.

    Attributes:
        label: What they are, in words.
        grad: The incoming gradient.
        x: The input of the operation.
        y: Its output.
    """

    label: str
    grad: Tensor
    x: Tensor
    y: Tensor

    def copy(self, device: torch.device | str | None = None) -> Inputs:
        """The same inputs in other memory with the same strides, or on another device."""
        return Inputs(self.label, *(_copied(t, device) for t in (self.grad, self.x, self.y)))


def _copied(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    if device is not None:
        return tensor.detach().to(device)
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return copy.copy_(tensor) if 0 not in tensor.stride() else tensor.detach().clone()


@dataclass(frozen=True)
class Subject:
    """A rule with values of its parameters, at an operation.

    Attributes:
        rule: The rule, with its values.
        op: The operation whose backward it replaces.
        op_name: The name of the operation, for texts.
        device: The device of the inputs.
        backend: The backend of `torch.compile`.
        seed: What the inputs and the random numbers of the rule are drawn from.
        random: Whether the rule draws random numbers, declared or not.
    """

    rule: Rule
    op: Callable[[Tensor], Tensor]
    op_name: str
    device: torch.device
    backend: Any
    seed: int
    random: bool = False

    # -- running the rule

    def run(self, inputs: Inputs, *, seeded: int | None = None) -> Tensor:
        """The result of the formula."""
        result: Tensor = of_input(self.call(self.rule.function, inputs, seeded=seeded))
        return result

    def call(
        self, function: Callable[..., Any], inputs: Inputs, *, seeded: int | None = None
    ) -> Any:
        """Call a function that has the arguments of the formula."""
        seed(self.device, self.seed if seeded is None else seeded)
        return function(inputs.grad, *self.read(inputs), **self.rule.bound)

    def read(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What the formula reads besides the gradient."""
        return tuple(inputs.x if name == "x" else inputs.y for name in self.rule.inputs)

    def site(self, x: Tensor, rule: Rule | None = None) -> Tensor:
        """The operation with its rule, as in a transformed model."""
        return decoupled(self.op(stop_gradient(x)), x, rule=self.rule if rule is None else rule)

    def gradient(self, inputs: Inputs, rule: Rule | None = None) -> Tensor:
        """The gradient that autograd computes through the operation with its rule."""
        x = inputs.x.detach().requires_grad_()
        seed(self.device, self.seed)
        (grad,) = torch.autograd.grad(self.site(x, rule), x, inputs.grad)
        return grad

    # -- inputs

    def ordinary(self, *shape: int, dtype: torch.dtype = torch.float32) -> Inputs | None:
        """Inputs with normal entries; None if the operation does not take such an input."""
        x = self._normal(shape, dtype, 1)
        return self._inputs(f"{dtype} of shape {shape}".removeprefix("torch."), x)

    def usual(self, dtype: torch.dtype = torch.float32) -> Inputs:
        """Ordinary inputs of shape (3, 4)."""
        found = self.ordinary(3, 4, dtype=dtype)
        if found is None:
            raise ValueError(
                f"the operation {self.op_name} does not take a {dtype} tensor of shape (3, 4). Give check_rule an "
                f"operation that does, or a function that prepares its input."
            )
        return found

    def laid_out(self) -> Iterator[Inputs]:
        """Ordinary inputs of every dtype, of many shapes and memory layouts."""
        for dtype in FLOATS:
            for shape in SHAPES:
                yield from self._given(self.ordinary(*shape, dtype=dtype))
        dtype = torch.float32
        x = self._normal((4, 3), dtype, 1).t()
        yield from self._given(self._inputs("a transposed float32 of shape (3, 4)", x))
        x = self._normal((3, 8), dtype, 1)[:, ::2]
        yield from self._given(
            self._inputs("a float32 of shape (3, 4), every second column of a wider one", x)
        )
        x = self._normal((2, 3, 4, 5), dtype, 1).to(memory_format=torch.channels_last)
        yield from self._given(self._inputs("a channels_last float32 of shape (2, 3, 4, 5)", x))
        usual = self.usual()
        one = torch.ones((), device=self.device).expand(usual.grad.shape)
        yield Inputs("an expanded gradient, as sum() gives it", one, usual.x, usual.y)

    def mixed(self) -> Iterator[Inputs]:
        """Inputs whose dtypes differ, as under autocast."""
        for dtypes in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
            usual = self.usual(dtypes[1])
            names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
            label = f"a gradient of {names[0]} at an input of {names[1]}, as under autocast"
            yield Inputs(label, usual.grad.to(dtypes[0]), usual.x, usual.y)

    def extreme(self, dtype: torch.dtype, *special: float) -> Inputs | None:
        """Entries at and around the values of the parameters, large and small ones, and `special`.

        Each entry of ``x`` meets a positive and a negative gradient. The entries that exceed the dtype are left out,
        and for a rule that reduces also those whose squares overflow in single precision, as a norm is infinite then.
        """
        info = torch.finfo(dtype)
        largest = min(info.max, 1e15) if self.rule.declaration.reducing else info.max
        marks = {v for v in self.rule.bound.values() if isinstance(v, float) and math.isfinite(v)}
        borders = torch.tensor([m * s for m in sorted(marks) for s in (1, -1)], dtype=torch.float64)
        around = [b * s for b in borders.tolist() for s in (1, 1.125, 0.875)]
        if dtype is not torch.float16:  # torch has no nextafter of it
            ends = borders.to(dtype)
            around += [v for s in (1, -1) for v in ends.nextafter(ends + s).tolist()]
        sizes = [info.tiny, 1e-4, 0.1, 0.5, 1.0, 2.5, 4.0, 20.0, 100.0, 1e3, 6e4, 1e10, 1e30]
        signed = [s * v for v in sizes for s in (1, -1)]
        entries = [v for v in [0.0, -0.0, *around, *signed] if abs(v) <= largest]
        x = torch.tensor([*entries, *special], dtype=torch.float64, device=self.device).to(dtype)
        x = torch.stack([x, x])
        name = str(dtype).removeprefix("torch.")
        found = self._inputs(f"{name} with small, large and border values of x", x)
        if found is None or found.y.shape != x.shape:
            return None
        signs = torch.tensor([[1.0], [-0.75]], dtype=dtype, device=self.device)
        return Inputs(found.label, signs.expand(x.shape).contiguous(), x, found.y)

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype, stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn.to(self.device, dtype)

    def _inputs(self, label: str, x: Tensor) -> Inputs | None:
        try:
            with torch.no_grad():
                y = self.op(x)
        except (RuntimeError, IndexError, ValueError):
            return None
        grad = self._normal(tuple(y.shape), x.dtype, 2)
        if y.shape == x.shape and x.numel():
            grad = torch.empty_like(x).copy_(grad)
        return Inputs(label, grad, x, y)

    @staticmethod
    def _given(inputs: Inputs | None) -> Iterator[Inputs]:
        if inputs is not None:
            yield inputs


def of_input(result: Any) -> Any:
    """The gradient of the input, of what a formula returned: a tensor, or a dict of gradients by name."""
    if not isinstance(result, Mapping):
        return result
    found = result.get("x")
    return found() if callable(found) else found


def named(subject: Subject, inputs: Inputs | str) -> str:
    """The inputs and the values of the rule, in words."""
    label = inputs if isinstance(inputs, str) else inputs.label
    values = ", ".join(f"{name}={value!r}" for name, value in subject.rule.values)
    return f"{label}, with {values}" if values else label


def pairs(subjects: list[Subject], inputs: Callable[[Subject], Any]) -> Iterator[Any]:
    """Each subject with each of its inputs."""
    return itertools.chain.from_iterable(((s, i) for i in inputs(s)) for s in subjects)
