"""Transformed models whose graphs hold values that are hard to pickle, or whose inputs and outputs are nested."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import io
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

import freegrad_fx as fg

X = torch.linspace(-1.0, 1.0, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


class Mode(enum.Enum):
    WARM = "warm"
    COLD = "cold"


class Pair(NamedTuple):
    a: Any
    b: Any


Plain = collections.namedtuple("Plain", "first second")


@dataclasses.dataclass
class Registered:
    a: Any
    b: Any


pytree.register_dataclass(Registered)


def make() -> list[Any]:
    return []


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "torch.save": through_torch,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"protocol {number}": lambda model, number=number: pickle.loads(pickle.dumps(model, number))
        for number in range(2, 6)
    },
}


def results(model: Any, *args: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a model and the gradients of its inputs."""
    leaves = [torch.clone(X).requires_grad_() for _ in range(2)]
    output = model(*pytree.tree_map(lambda index: leaves[index], args))
    found = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
    grads = torch.autograd.grad(
        [t for t in found if t.requires_grad],
        leaves,
        [torch.ones_like(t) for t in found if t.requires_grad],
        allow_unused=True,
    )
    return [t.detach() for t in found], [g for g in grads if g is not None]


def check_copies(gm: Any, original: nn.Module, *args: Any) -> None:
    """`args` are nested indices of the input tensors."""
    expected = results(gm, *args)
    for one, other in zip(expected[0], results(original, *args)[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    structure = pytree.tree_structure(
        original(*pytree.tree_map(lambda index: torch.clone(X), args))
    )
    for name, made in COPIES.items():
        new = made(gm)
        output = new(*pytree.tree_map(lambda index: torch.clone(X), args))
        assert pytree.tree_structure(output) == structure, name
        for actual, wanted in zip(results(new, *args), expected, strict=True):
            for one, other in zip(actual, wanted, strict=True):
                assert torch.equal(one, other), name
                assert one.stride() == other.stride(), name


# --- values in a graph ---

BODIES: dict[str, Callable[[Tensor], Any]] = {
    "memory format": lambda x: torch.relu(x).contiguous(memory_format=torch.channels_last) * 2,
    "memory format of to": lambda x: torch.relu(x).to(memory_format=torch.channels_last),
    "preserved format": lambda x: torch.relu(x).clone(memory_format=torch.preserve_format),
    "memory format of a new tensor": lambda x: (
        torch.relu(x) + torch.zeros_like(x, memory_format=torch.contiguous_format)
    ),
    "dtype": lambda x: torch.relu(x).to(torch.float64),
    "device and dtype": lambda x: torch.relu(x).to(device=torch.device("cpu"), dtype=torch.float64),
    "layout": lambda x: torch.relu(x) + torch.ones(4, layout=torch.strided),
    "slices": lambda x: torch.relu(x)[..., 1:, None, ::2],
    "size": lambda x: torch.relu(x).reshape(torch.Size([6, 16])),
    "range": lambda x: torch.relu(x)[:, range(2)],
    "list of a slice and an ellipsis": lambda x: torch.relu(x)[(slice(None), Ellipsis, 0)],
    "complex": lambda x: torch.view_as_real(torch.relu(x) * (1 + 2j)),
    "infinity": lambda x: torch.relu(x).clamp(-math.inf, math.inf),
    "nan": lambda x: torch.relu(x).nan_to_num(nan=math.nan),
    "function chosen by a flag": lambda x: F.max_pool2d(torch.relu(x), 2),
}


class Body(nn.Module):
    def __init__(self, body: str) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return BODIES[self.body](x)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("exported", [False, True], ids=["symbolic", "export"])
@pytest.mark.parametrize("body", BODIES)
def test_a_graph_with_such_a_value_is_copied_and_saved(body: str, exported: bool) -> None:
    model = Body(body)
    how = {"example_inputs": (X,)} if exported else {}
    check_copies(fg.transform(model, {"relu": "straight_through"}, **how), model, 0)


# --- nested inputs and outputs ---

OUTPUTS: dict[str, Callable[[Any, Any], Any]] = {
    "namedtuple": Plain,
    "NamedTuple": Pair,
    "NamedTuple in a dict": lambda a, b: {"k": [Pair(a, Plain(b, a))]},
    "OrderedDict": lambda a, b: collections.OrderedDict(one=a, two=b),
    "defaultdict": lambda a, b: collections.defaultdict(list, one=a, two=b),
    "defaultdict of a function": lambda a, b: collections.defaultdict(make, one=a, two=b),
    "keys that are tuples": lambda a, b: {(1, "k"): a, (2, None): b},
    "keys of an enumeration": lambda a, b: {Mode.WARM: a, Mode.COLD: b},
    "keys that are numbers": lambda a, b: {1: a, 2.5: b},
    "dataclass": Registered,
    "dataclass in a namedtuple": lambda a, b: Pair(Registered(a, b), (a,)),
    "deque": lambda a, b: collections.deque([a, b]),
}


class Gives(nn.Module):
    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return OUTPUTS[self.output](torch.relu(x), x + 1)


class Takes(nn.Module):
    def forward(self, nested: Any) -> Tensor:
        one, other = pytree.tree_leaves(nested)[:2]
        return torch.relu(one) * 2 + other


@pytest.mark.sampled(4)
@pytest.mark.parametrize("output", OUTPUTS)
def test_an_exported_model_that_returns_such_a_structure_is_copied_and_saved(output: str) -> None:
    model = Gives(output)
    gm = fg.transform(model, {"relu": "straight_through"}, example_inputs=(X,))
    check_copies(gm, model, 0)


# `ExportedProgram.module` writes its guards as text, in which a member of an enumeration is no expression
@pytest.mark.sampled(4)
@pytest.mark.parametrize("output", [name for name in OUTPUTS if name != "keys of an enumeration"])
def test_an_exported_model_that_takes_such_a_structure_is_copied_and_saved(output: str) -> None:
    model = Takes()
    example = OUTPUTS[output](torch.clone(X), torch.clone(X))
    gm = fg.transform(model, {"relu": "straight_through"}, example_inputs=(example,))
    check_copies(gm, model, OUTPUTS[output](0, 1))


@pytest.mark.parametrize("output", ["namedtuple", "NamedTuple in a dict", "OrderedDict"])
def test_a_traced_model_that_returns_such_a_structure_is_copied_and_saved(output: str) -> None:
    model = Gives(output)
    check_copies(fg.transform(model, {"relu": "straight_through"}), model, 0)
