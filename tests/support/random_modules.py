"""Random small modules, as data: hypothesis makes a program, and a program makes a module.

A program is a tuple of steps; a step is a tuple of a name, which says what it does, and its arguments. `Program` does
its steps one after the other in `forward`, which a symbolic trace unrolls as it unrolls any Python. Nothing here knows
the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH = 4

# --- activations: out of place, by module and in place ---

ACTIVATIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "F.relu(x)": lambda m, x: F.relu(x),
    "torch.relu(x)": lambda m, x: torch.relu(x),
    "x.relu()": lambda m, x: x.relu(),
    "self.act(x)": lambda m, x: m.act(x),
    "self.gelu(x)": lambda m, x: m.gelu(x),
    "self.prelu(x)": lambda m, x: m.prelu(x),
    "F.silu(x)": lambda m, x: F.silu(x),
    "torch.tanh(x)": lambda m, x: torch.tanh(x),
    "x.sigmoid()": lambda m, x: x.sigmoid(),
    "F.leaky_relu(x, 0.2)": lambda m, x: F.leaky_relu(x, 0.2),
    "nn.ELU()(x)": lambda m, x: nn.ELU()(x),
}
INPLACE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "self.act_(x)": lambda m, x: m.act_(x),
    "F.relu(x, inplace=True)": lambda m, x: F.relu(x, inplace=True),
    "F.relu_(x)": lambda m, x: F.relu_(x),
    "x.relu_()": lambda m, x: x.relu_(),
    "torch.tanh_(x)": lambda m, x: torch.tanh_(x),
    "F.silu(x, True)": lambda m, x: F.silu(x, True),
}

# --- the rest of a step ---

LAYERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "self.f(x)": lambda m, x: m.f(x),
    "self.g(x)": lambda m, x: m.g(x),
    "self.norm(x)": lambda m, x: m.norm(x),
    "F.linear(x, self.f.weight)": lambda m, x: F.linear(x, m.f.weight),
}
RANDOM: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "self.dropout(x)": lambda m, x: m.dropout(x),
    "F.dropout(x, 0.4, self.training)": lambda m, x: F.dropout(x, 0.4, m.training),
    "F.dropout(x, training=self.norm.training)": lambda m, x: F.dropout(
        x, training=m.norm.training
    ),
    "x + torch.rand(x.shape[0], 1)": lambda m, x: x + torch.rand(x.shape[0], 1),
}


def _count(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return x + 0.1 * m.count


def _average(m: Any, x: Tensor) -> Tensor:
    if m.training:
        m.mean = 0.9 * m.mean + 0.1 * x.detach().mean(0)
    return x - m.mean


class Spike(torch.autograd.Function):
    """A user's own, with a backward that is not its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


class Kept(nn.Module):
    """Has to be kept whole: it branches on its data."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) if x.sum() > 0 else F.silu(x) * 2


STATE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "counted": _count,
    "averaged": _average,
    "x * self.scale": lambda m, x: x * m.scale,
    "x + Spike.apply(x)": lambda m, x: x + Spike.apply(x),
    "self.kept(x)": lambda m, x: m.kept(x),
}
SIMPLE = {**ACTIVATIONS, **INPLACE, **LAYERS, **RANDOM, **STATE}


class Program(nn.Module):
    """A module whose forward does the steps of a program."""

    def __init__(self, steps: tuple[Any, ...]) -> None:
        super().__init__()
        found: list[tuple[Any, ...]] = []
        self.steps = _numbered(steps, found)
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.dropout = nn.BatchNorm1d(WIDTH), nn.Dropout(0.3)
        self.act, self.act_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.gelu, self.prelu = nn.GELU(), nn.PReLU()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.75))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=False)
        self.kept = Kept()
        self.parts = nn.ModuleList(Program(part) for part in found)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.steps, x)

    def run(self, steps: tuple[Any, ...], x: Tensor) -> Tensor:
        for name, *args in steps:
            x = self.step(name, args, x)
        return x

    def step(self, name: str, args: list[Any], x: Tensor) -> Tensor:
        if name in SIMPLE:
            if name in INPLACE or name == "counted":
                x = x + 0  # as after any operation whose result autograd does not keep
            return SIMPLE[name](self, x)
        if name == "thrown away":  # an in-place activation, its result not used
            x = x * 1.5
            INPLACE[args[0]](self, x)
            return x
        if name == "on a view":
            x = x * 1.5
            INPLACE[args[0]](self, x[:, 1:3])
            return x
        if name == "residual":
            return x + self.run(args[0], x)
        if name == "residual in place":
            y = self.run(args[0], x) * 1
            y += x
            return y
        if name == "both":  # two branches that meet
            return torch.cat([self.run(s, x) for s in args], 1)[:, ::2]
        if name == "if training":
            if self.training:
                return self.run(args[0], x)
            return self.run(args[1], x)
        if name == "without grad":
            with torch.no_grad():
                y = self.run(args[0], x)
            return x + y
        part = self.parts[args[0]]
        return part(x) if name == "part" else part(part(x) - 0.1)


def _numbered(steps: tuple[Any, ...], found: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The steps with a number for the program of each submodule; the programs are appended to a list."""
    numbered: list[Any] = []
    for name, *args in steps:
        if name.startswith("part"):
            numbered.append((name, len(found)))
            found.append(args[0])
        else:
            numbered.append(
                (name, *(_numbered(a, found) if isinstance(a, tuple) else a for a in args))
            )
    return tuple(numbered)


# --- making them ---

activation = st.sampled_from([*ACTIVATIONS, *INPLACE]).map(lambda name: (name,))
layer = st.sampled_from([*LAYERS]).map(lambda name: (name,))
other = st.sampled_from([*RANDOM, *STATE]).map(lambda name: (name,))
discarded = st.tuples(st.sampled_from(["thrown away", "on a view"]), st.sampled_from([*INPLACE]))


def _nested(step: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    steps = st.lists(step, min_size=1, max_size=3).map(tuple)
    return st.one_of(
        st.tuples(st.sampled_from(["residual", "residual in place", "without grad"]), steps),
        st.tuples(st.sampled_from(["both", "if training"]), steps, steps),
        st.tuples(st.sampled_from(["part", "part, twice"]), steps),
    )


steps = st.recursive(
    st.one_of(activation, layer, activation, other, discarded), _nested, max_leaves=6
)
programs = st.lists(steps, min_size=2, max_size=5).map(
    # a layer first, so that there is a parameter behind every rule, and an activation last, so that there is a rule
    lambda found: (("self.f(x)",), *found, ("self.g(x)",), ("F.relu(x)",))
)
