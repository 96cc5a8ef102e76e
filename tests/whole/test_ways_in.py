"""One table by the four ways in: the transform of a symbolic trace and of an export, `fg.compile`, and a block.

The table selects everything: each activation and each parameter. The reference knows nothing of the product: the model
under `sweep.Interception`, and the formula of the rule for the gradients of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from built_in import BUILT_IN, examples_of
from doors import DOORS
from models import VISION, Branching, Smooth, Spellings, Vision
from runs import Run, assert_same_forward, assert_same_gradients, close, differs, run
from sweep import RULES, Interception, wake

# Dynamo reads `.grad` of whatever goes from one graph into the next
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

# --- the zoo ---

# A parameter is masked where it is outside of the interval; of the weights of these models some are
RULE, NAIVE = RULES["rectangular"]
WIDTH = 0.1
TABLE = {"activations": RULE, "params": fg.rules.rectangular(a=-WIDTH, b=WIDTH)}


def reference(model: nn.Module, inputs: tuple[Tensor, ...]) -> Run:
    with Interception(NAIVE) as interception:
        expected = run(model, inputs)
    assert interception.calls
    for name, parameter in model.named_parameters():
        gradient = expected.gradients.get(name)
        if gradient is not None:
            expected.gradients[name] = gradient * (parameter.detach().abs() <= WIDTH)
    return expected


@dataclass(frozen=True)
class Model:
    """A model of the zoo.

    Attributes:
        make: Builds it.
        sample: Its input, which is large enough for both modes: an export takes both.
    """

    name: str
    make: Callable[[], nn.Module]
    sample: Callable[[], Tensor]


def of_torchvision(vision: Vision) -> Model:
    return Model(vision.name, lambda: wake(vision.make()), lambda: vision.sample(training=True))


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(2))


SMOOTH = Model("Smooth", Smooth, numbers(4, 6))
SMALL = [
    SMOOTH,
    Model("Branching", Branching, numbers(4, 6)),
    Model("Spellings", Spellings, numbers(4, 2, 8, 8)),
]
ZOO = [pytest.param(model, id=model.name) for model in SMALL] + [
    pytest.param(of_torchvision(vision), id=vision.name, marks=pytest.mark.slow)
    for vision in VISION
]


@pytest.mark.thinned(3)
@pytest.mark.sampled(2)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("known", ZOO)
def test_four_ways_in_give_the_same_gradients(known: Model, training: bool) -> None:
    torch.manual_seed(0)
    model = known.make().train(training)
    inputs = (known.sample(),)
    native, expected = run(model, inputs), reference(model, inputs)
    assert differs(expected, native)
    runs = {name: run(door(model, TABLE, inputs), inputs, of=model) for name, door in DOORS.items()}
    for actual in runs.values():
        assert_same_forward(actual, native)
        assert_same_gradients(actual, expected, close)
        assert_same_gradients(actual, runs["symbolic"])


@pytest.mark.thinned(4)
@pytest.mark.sampled(24)
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_rule_gives_the_same_gradients_by_four_ways(name: str) -> None:
    """Of the activations. Rules that draw random numbers draw the same ones."""
    rule = fg.get(name)
    torch.manual_seed(0)
    model, inputs = SMOOTH.make(), (SMOOTH.sample(),)
    if "operation" not in rule.kinds:
        pytest.skip("a rule for parameters")
    rule = rule(**examples_of(name)[-1])
    table = {"relu": rule, "tanh": rule}
    native = run(model, inputs)
    first, *others = (run(door(model, table, inputs), inputs, of=model) for door in DOORS.values())
    for actual in (first, *others):
        assert_same_forward(actual, native)
        assert_same_gradients(actual, first)
