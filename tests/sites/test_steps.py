"""What the report says of a step that the model computes as a comparison, and that its remedy gives a gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from models import VISION, Vision

RULES = {"heaviside": fg.rules.arctan()}
THRESHOLD = 0.1
QUIET = ("resnet18", "VisionTransformer", "swin_t")


class Neuron(nn.Module):
    """Three steps of a neuron whose spike is computed by a function."""

    def __init__(self, spike: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.spike = nn.Linear(3, 4), spike

    def forward(self, x: Tensor) -> Tensor:
        potential, count = torch.zeros(()), torch.zeros(())
        for _ in range(3):
            potential = 0.9 * potential + self.fc(x)
            spikes = self.spike(potential)
            potential = potential - spikes * THRESHOLD
            count = count + spikes
        return count


def transformed(model: nn.Module, rules: Any) -> nn.Module:
    return fg.transform(model, rules)


def exported(model: nn.Module, rules: Any) -> nn.Module:
    return fg.transform(model, rules, example_inputs=(torch.ones(2, 3),))


def compiled(model: nn.Module, rules: Any) -> Any:
    torch.compiler.reset()
    made = fg.compile(model, rules, backend="eager")
    made(torch.ones(2, 3))
    return made


WAYS: list[Callable[[nn.Module, Any], Any]] = [transformed, exported, compiled]


def notes(made: Any) -> list[str]:
    return [line for line in fg.report(made).to_text(0).splitlines() if line.startswith("Note")]


# for each spelling, what is compared, and what the note says to write instead
WRITTEN: dict[str, tuple[Callable[[Tensor], Tensor], str, Callable[[Tensor], Tensor]]] = {
    "(a > b).float()": (
        lambda v: (v > THRESHOLD).float(),
        "heaviside(a - b)",
        lambda v: fg.vocabulary.heaviside(v - THRESHOLD),
    ),
    "torch.ge(a, b).to(dtype)": (
        lambda v: torch.ge(v, THRESHOLD).to(v.dtype),
        "heaviside(a - b, 1.0)",
        lambda v: fg.vocabulary.heaviside(v - THRESHOLD, 1.0),
    ),
    "a.lt(b).type_as(a)": (
        lambda v: v.lt(THRESHOLD).type_as(v),
        "heaviside(b - a)",
        lambda v: fg.vocabulary.heaviside(THRESHOLD - v),
    ),
    "(a <= b).to(torch.float32)": (
        lambda v: (v <= THRESHOLD).to(torch.float32),
        "heaviside(b - a, 1.0)",
        lambda v: fg.vocabulary.heaviside(THRESHOLD - v, 1.0),
    ),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("written", WRITTEN)
def test_a_comparison_converted_to_numbers_is_noted_with_its_line(written: str, way: Any) -> None:
    spike, remedy, _ = WRITTEN[written]
    (note,) = notes(way(Neuron(spike), {}))
    assert note.partition(" (/")[0].endswith(f"freegrad_fx.vocabulary.{remedy}")
    # torch.export names the line of the forward that calls the function
    code = Neuron.forward.__code__ if way is exported else spike.__code__
    line = code.co_firstlineno + (4 if way is exported else 0)
    assert f"({__file__}:{line})" in note


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("written", WRITTEN)
def test_the_remedy_keeps_the_forward_and_gives_a_gradient(written: str, way: Any) -> None:
    spike, _, remedy = WRITTEN[written]
    model, x = Neuron(remedy), torch.randn(5, 3)
    made = way(model, RULES)
    assert not notes(made)
    before = Neuron(spike)
    before.load_state_dict(model.state_dict())
    assert torch.equal(made(x), before(x))
    made(x).sum().backward()
    assert model.fc.weight.grad is not None
    assert model.fc.weight.grad.abs().sum() > 0


def test_a_neuron_without_parameters_is_noted() -> None:
    class Step(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0.5).float()

    assert len(fg.explain(Step()).steps) == 1


SILENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a mask of lengths": lambda v, x: v * (torch.arange(3) < x.long()[:, :3])[:, :1].float(),
    "a mask of the input": lambda v, x: v * (x > 0).float()[:, :1],
    "a mask of the shape": lambda v, x: v * (torch.arange(v.shape[1]) > 1).float(),
    "a mask of random numbers": lambda v, x: v * (torch.rand_like(v) > 0.5).float(),
    "detached": lambda v, x: v * (v > 0).float().detach(),
    "of a detached tensor": lambda v, x: v * (v.detach() > 0).float(),
    "a tensor with its own mask": lambda v, x: v * (v > 0).float(),
    "straight-through": lambda v, x: (v > 0).float() - v.detach() + v,
    "straight-through, the other way": lambda v, x: v + ((v > 0).float() - v).detach(),
    "an index": lambda v, x: v[(v > 0).long()].sum(1),
    "a choice": lambda v, x: torch.where(v > 0, v, 0.0),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", SILENT)
def test_what_expects_no_gradient_is_not_noted(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return SILENT[name](self.fc(x), x)

    assert not fg.explain(Model()).steps
    assert not fg.explain(Model(), example_inputs=(torch.ones(2, 3),)).steps


def test_without_gradients_it_is_not_noted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            v = self.fc(x)
            with torch.no_grad():
                mask = (v > 0.0).float()
            return v * mask  # type: ignore[no-any-return]

    assert not fg.explain(Model()).steps


@pytest.mark.parametrize("vision", [v for v in VISION if v.name in QUIET], ids=lambda v: v.name)
def test_classifiers_have_no_notes(vision: Vision) -> None:
    assert not fg.explain(vision.make()).steps


@pytest.mark.slow
@pytest.mark.parametrize("vision", [v for v in VISION if v.name in QUIET], ids=lambda v: v.name)
def test_exported_classifiers_have_no_notes(vision: Vision) -> None:
    assert not fg.explain(vision.make(), example_inputs=(vision.sample(False),)).steps
