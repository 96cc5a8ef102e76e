"""Refusals say in few lines what stands in the way, and name a way that takes this model; none leads in a circle."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import freegrad_fx as fg
from side_by_side import Net, build, sample
from sweep import NATIVE


class Data(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.act(self.f(x))
        return h + 1 if h.sum() > 0 else h


class Shape(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.f(x)
        for _ in range(x.shape[1] // 3):
            h = self.act(h)
        return h


class Negate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Custom(Net):
    def forward(self, x: Tensor) -> Any:
        return Negate.apply(self.act(self.f(x)))


class CustomByData(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.act(Negate.apply(self.f(x)))
        return h + 1 if h.sum() > 0 else h


class CustomWithMask(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        h = Negate.apply(self.act(self.f(x)))
        return h if mask is None else h * mask


class Packed(Net):
    def forward(self, x: PackedSequence) -> Any:
        return self.act(self.f(x.data))


class GivesDefaults(Net):
    def forward(self, x: Tensor) -> Any:
        found: Any = collections.defaultdict(list)
        found["y"].append(self.act(self.f(x)))
        return found


@dataclasses.dataclass
class Output:
    y: Tensor
    n: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.n = self.y + 1


@dataclasses.dataclass
class PlainOutput:
    y: Tensor


class GivesDataclass(Net):
    def forward(self, x: Tensor) -> Any:
        return Output(self.act(self.f(x)))


class GivesPlainDataclass(Net):
    def forward(self, x: Tensor) -> Any:
        return PlainOutput(self.act(self.f(x)))


class Unregistered(Net):
    def make(self) -> None:
        self.scales = [nn.Parameter(torch.ones(6))]

    def forward(self, x: Tensor) -> Any:
        return self.act(self.f(x)) * self.scales[0]


class Counts(Net):
    def make(self) -> None:
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.act(self.f(x)) * self.calls


EXAMPLES: dict[type[nn.Module], tuple[Any, ...]] = {
    Packed: (pack_sequence([sample()[:3], sample()[:2]]),),
    CustomWithMask: (sample(), torch.ones(4, 6)),
}
PROGRAMS = (
    *(Data, Shape, Custom, CustomByData, CustomWithMask, Packed, GivesDefaults, GivesDataclass),
    *(GivesPlainDataclass, Unregistered, Counts),
)


def attempt(door: str, model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, str]:
    """What a way makes of a model, or what it says."""
    try:
        if door == "compile":
            torch._dynamo.reset()
            made = fg.compile(model, NATIVE, backend="eager")
        elif door == "export":
            made = fg.transform(model, NATIVE, example_inputs=args)
        else:
            opened = {"mask": torch.fx.PH} if door == "symbolic, opened" else None
            made = fg.transform(model, NATIVE, concrete_args=opened)
    except fg.CaptureError as error:
        return None, str(error)
    return made, ""


def ways_in(text: str) -> list[str]:
    """The ways that a refusal names."""
    named = {
        "symbolic, opened": "concrete_args={'mask': torch.fx.PH}",
        "symbolic": "without example_inputs",
        "export": "example_inputs=(",
        "compile": "freegrad_fx.compile(",
    }
    return [door for door, words in named.items() if words in text]


def first_tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    value = vars(value) if dataclasses.is_dataclass(value) else value
    return first_tensor(next(iter(value.values() if isinstance(value, dict) else value)))


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # from Dynamo
@pytest.mark.parametrize("make", PROGRAMS)
@pytest.mark.parametrize("door", ["symbolic", "export"])
def test_the_ways_that_refusals_name_lead_to_one_that_takes_the_model(
    make: type[nn.Module], door: str
) -> None:
    args = EXAMPLES.get(make, (sample(),))
    pending, tried = [door], set()
    while pending:
        now = pending.pop(0)
        assert now not in tried, "a circle"
        tried.add(now)
        made, text = attempt(now, build(make), args)
        if made is not None:
            break
        assert len(text.splitlines()) <= 4
        pending = [way for way in ways_in(text) if way not in tried]
        assert pending, f"no way in: {text}"
        if now == "export":  # it has tried the symbolic way before it names it
            way, _ = attempt(pending[0], build(make), args)
            assert way is not None
    if door == "symbolic" and make in (Custom, CustomWithMask) and now == "symbolic":
        args = args[:1]
    assert torch.equal(first_tensor(made(*args)), first_tensor(build(make)(*args)))


def test_a_failed_export_prints_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    with pytest.raises(fg.CaptureError, match=r"torch\.export raised Guard"):
        fg.transform(build(Data), NATIVE, example_inputs=(sample(),))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("wrapper", [nn.DataParallel, AveragedModel])
def test_wrappers_are_refused_with_the_order_that_works(wrapper: Any) -> None:
    model = build(Shape)
    for call in (fg.transform, fg.explain):
        for options in ({}, {"example_inputs": (sample(),)}):
            with pytest.raises(
                fg.CaptureError, match=r"Transform the module, then wrap .*\.module"
            ):
                call(wrapper(model), NATIVE, **options)
    gm = wrapper(fg.transform(model, NATIVE, example_inputs=(sample(),)))
    assert torch.equal(gm(sample()), model(sample()))


class DynamicCache:
    """Named as the class of Hugging Face."""


class GivesCache(Net):
    def forward(self, x: Tensor, use_cache: bool = True) -> Any:
        y = self.act(self.f(x))
        return (y, DynamicCache()) if use_cache else (y,)


def test_a_cache_in_the_output_names_the_argument_that_leaves_it_out() -> None:
    with pytest.raises(fg.CaptureError, match=r"returns a DynamicCache.*use_cache=False"):
        fg.transform(build(GivesCache), NATIVE, example_inputs=(sample(),))
    given = {"x": sample(), "use_cache": False}
    gm = fg.transform(build(GivesCache), NATIVE, example_inputs=given)
    assert torch.equal(gm(**given)[0], build(GivesCache)(**given)[0])


class Checkpoints(Net):
    """As Hugging Face's layers do."""

    def make(self) -> None:
        self.gradient_checkpointing, self.options = False, {}

    def forward(self, x: Tensor) -> Any:
        h = self.f(x)
        if self.gradient_checkpointing and self.training:
            return checkpoint(self.act, h, **self.options)
        return self.act(h)


def test_gradient_checkpointing_is_lost_with_a_warning_or_refused() -> None:
    model = build(Checkpoints)
    model.gradient_checkpointing, model.options = True, {"use_reentrant": False}
    with pytest.warns(fg.FreegradWarning, match=r"gradient_checkpointing.*saves no memory"):
        gm = fg.transform(model, NATIVE, example_inputs=(sample(),))
    assert torch.equal(gm(sample()), model(sample()))
    model.options = {"use_reentrant": True}
    with pytest.raises(fg.CaptureError, match=r"use_reentrant=True.*use_reentrant=False"):
        fg.transform(model, NATIVE, example_inputs=(sample(),))


class TrainsOnMore(Net):
    """In training it takes only inputs of more than four rows, as a normalisation over rows may."""

    def forward(self, x: Tensor) -> Any:
        if self.training and x.shape[0] < 5:
            raise ValueError("too few rows")
        return self.act(self.f(x))


@pytest.mark.parametrize(
    ("make", "inputs", "text"),
    [
        (Net, (torch.randn(4, 5),), "RuntimeError in train mode: .*mat1 and mat2 shapes"),
        (Net, (sample(), sample()), "TypeError in train mode: .* positional arguments"),
        (Net, {"y": sample()}, "TypeError in train mode: .* 'y'"),
        (TrainsOnMore, (sample(),), "ValueError in train mode: too few rows"),
    ],
)
def test_inputs_that_the_model_does_not_take_are_named(make: Any, inputs: Any, text: str) -> None:
    class Plain(make):  # type: ignore[misc]
        if make is Net:

            def forward(self, x: Tensor) -> Tensor:
                return self.act(self.f(x))

    model, state = Plain(), torch.get_rng_state()
    with pytest.raises(fg.CaptureError, match=f"does not take the example inputs.*{text}") as error:
        fg.transform(model, {"relu": None}, example_inputs=inputs)
    assert "compile" not in str(error.value)
    assert torch.equal(torch.get_rng_state(), state)
