"""``python -m benchmarks.small``: the cost of rules on small tensors, with and without the C++ extension.

Times are those that the processor spends on the thread. All candidates are measured in alternation. Printed are the
median of the ratios of the rounds with its quartiles, and the ratio of the fastest rounds, which other programs disturb
least. `--build` builds the extension first.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.extension import library

from . import _cases as cases
from ._measure import compare, machine

RULES = (
    *("d(Linear)", "scale", "clip_value", "d(ReLU)", "rectangular"),
    *("triangular", "fast_sigmoid", "arctan", "gaussian"),
)
LAYERS, STEPS = 20, 10
WITH, WITHOUT = "with the extension", "without"


class Layers(nn.Module):
    """Linear layers with activations."""

    def __init__(self, count: int = LAYERS) -> None:
        super().__init__()
        layers = ([nn.Linear(64, 64), nn.ReLU()] for _ in range(count))
        self.layers = nn.Sequential(*itertools.chain.from_iterable(layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class Step(torch.autograd.Function):
    """A spike, with a surrogate written by hand: what a spiking network has without this package."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] / (1 + 25 * x.abs()).square()


class Spiking(nn.Module):
    """Two layers of leaky neurons over time steps."""

    def __init__(self, spike: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)
        self.spike = nn.ReLU() if spike is None else spike

    def forward(self, x: Tensor) -> Tensor:
        a, b, total = torch.zeros(64, 128), torch.zeros(64, 64), torch.zeros(64, 64)
        for _ in range(STEPS):
            a = 0.9 * a + self.first(x)
            fired = self.spike(a - 1)
            a = a - fired
            b = 0.9 * b + self.second(fired)
            last = self.spike(b - 1)
            b, total = b - last, total + last
        return total


def with_extension(step: Callable[[], Any], on: bool) -> Callable[[], Any]:
    """A step with the extension, or without it."""

    def run() -> None:
        library.switch(on=on)
        step()

    return run


def transformed(make: Callable[[], nn.Module], rules: Any, on: bool) -> nn.Module:
    """A model that was transformed while the extension was in use, or while it was not."""
    library.switch(on=on)
    torch.manual_seed(0)
    return fg.transform(make(), rules)


def groups() -> Iterator[tuple[str, dict[str, Callable[[], Any]]]]:
    """Each group with its candidates, the native one first."""
    ways = {WITH: True, WITHOUT: False} if library.current() is not None else {WITHOUT: False}
    for name in RULES:
        steps = {cases.NATIVE_RELU: cases.operator_step(nn.ReLU(), (64, 64))}
        for way, on in ways.items():
            gm = transformed(lambda: nn.Sequential(nn.ReLU()), {"relu": cases.rule_of(name)}, on)
            steps[way] = with_extension(cases.operator_step(gm, (64, 64)), on)
        yield f"one activation of 64×64: {name}", steps
    for name in ("rectangular", "fast_sigmoid"):
        steps = {"native": cases.operator_step(Layers(), (64, 64))}
        for way, on in ways.items():
            gm = transformed(Layers, {"relu": cases.rule_of(name)}, on)
            steps[way] = with_extension(cases.operator_step(gm, (64, 64)), on)
        yield f"{LAYERS} layers of 64×64: {name}", steps
    spikes = fg.rules.fast_sigmoid(forward="heaviside")
    steps = {
        "native": cases.operator_step(Spiking(), (64, 64)),
        "a Function by hand": cases.operator_step(Spiking(Step.apply), (64, 64)),
    }
    for way, on in ways.items():
        gm = transformed(Spiking, {"relu": spikes}, on)
        steps[way] = with_extension(cases.operator_step(gm, (64, 64)), on)
    yield f"a spiking MLP, {STEPS} steps", steps


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="about how long a group takes")
    parser.add_argument("--build", action="store_true", help="build the C++ extension first")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.build:
        fg.extension.build()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    print(f"C++ extension: {fg.extension.status()}")
    for group, steps in groups():
        found = compare(steps, seconds=options.seconds, clock=time.thread_time)
        native, *others = steps
        print(f"\n{group}: {native} {found.seconds(native) * 1e6:.1f} µs")
        for name in others:
            ratio = found.ratio(name, native)
            fastest = min(found.times[name]) / min(found.times[native])
            quartiles = f"({ratio.low:.2f} to {ratio.high:.2f})"
            print(f"  {name:<22}{ratio.median:6.2f}  {quartiles}, fastest {fastest:.2f}")
    library.switch(on=True)


if __name__ == "__main__":
    main()
