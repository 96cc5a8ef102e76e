"""Attributes that a forward reads: a graph has their values, and says so where one is changed later."""

from __future__ import annotations

import copy
import enum
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from side_by_side import NATIVE, Net, build, difference, sample


class Mode(enum.Enum):
    PLAIN = 1
    DOUBLE = 2


class Configured(Net):
    factor = 2.0

    def make(self) -> None:
        self.alpha, self.mode, self.name = 0.5, Mode.DOUBLE, "mean"
        self.fn: Callable[[Tensor], Tensor] = F.gelu
        self.scales, self.pair, self.dtype, self.bias = [1.0, 2.0], (1, 2), torch.float32, None
        self.drop, self.unused = nn.Dropout(0.5), 1

    @property
    def twice(self) -> float:
        return self.alpha * 2

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(F.relu(self.f(x))) * self.twice * self.factor + self.scales[1] * self.pair[0]
        if self.mode is Mode.DOUBLE:
            h = h * 2
        if self.name == "mean":
            h = h - h.mean()
        if self.bias is not None:
            h = h + self.bias
        if hasattr(self, "bonus"):
            h = h + self.bonus
        return self.fn(h.to(self.dtype))


class Holds(Net):
    def make(self) -> None:
        self.part = Configured()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.part(x))


CHANGES = {
    "alpha": 0.25, "mode": Mode.PLAIN, "name": "sum", "fn": torch.relu, "scales": [1.0, 3.0], "pair": (2, 2),
    "dtype": torch.float64, "bias": 1.0, "factor": 3.0, "bonus": 1.0,
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {"symbolic": {}, "export": {"example_inputs": (sample(),)}}


@functools.cache
def made(way: str) -> Any:
    return fg.transform(build(Holds), "straight_through", **WAYS[way])


def transformed(way: str) -> Any:
    return copy.deepcopy(made(way))


@pytest.mark.parametrize("way", WAYS)
def test_a_change_of_an_attribute_that_the_forward_read_raises(way: str) -> None:
    gm = transformed(way)
    for model in (gm, pickle.loads(pickle.dumps(gm))):
        part = model.part
        for name, value in CHANGES.items():
            before = dict(part.__dict__)
            model(sample())
            setattr(part, name, value)
            with pytest.raises(fg.CaptureError, match=rf"part\.{name} .*transform the model again"):
                model(sample())
            part.__dict__.clear()
            part.__dict__.update(before)
            model(sample())


@pytest.mark.parametrize("way", WAYS)
def test_a_change_in_a_list_raises(way: str) -> None:
    gm = transformed(way)
    gm.part.scales[0] = 5.0
    with pytest.raises(fg.CaptureError, match=r"part\.scales"):
        gm(sample())


@pytest.mark.parametrize("way", WAYS)
def test_what_the_forward_did_not_read_can_be_changed(way: str) -> None:
    gm = transformed(way)
    gm.part.unused, gm.anything, gm.part.more = 2, 3, 4
    gm.part.alpha = 0.5  # the same value
    gm(sample())


def test_the_attributes_of_the_original_are_its_own() -> None:
    model = build(Holds)
    gm = fg.transform(model, "straight_through")
    expected = gm.eval()(sample())
    model.part.alpha = 7.0
    assert torch.equal(gm(sample()), expected)


def test_attributes_of_leaves_act_as_they_are_called() -> None:
    model, gm = build(Holds), fg.transform(build(Holds), {"relu": None})
    model.part.drop.p = gm.part.drop.p = 0.125
    assert difference(model, gm) == ""


class BranchesOnData(Net):
    def make(self) -> None:
        self.alpha = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.alpha
        return F.relu(x) if x.sum() > 0 else x


class HoldsOpaque(Net):
    def make(self) -> None:
        self.part = BranchesOnData()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.part(self.f(x)))


def test_attributes_of_opaque_calls_act() -> None:
    model, gm = build(HoldsOpaque), fg.transform(build(HoldsOpaque), {"relu": None})
    model.part.alpha = gm.part.alpha = 2.0
    assert difference(model, gm) == ""


class ReadsALeaf(Net):
    def make(self) -> None:
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.conv1d(x, self.conv.weight, stride=self.conv.stride))


def test_attributes_of_leaves_that_the_forward_reads_are_constants() -> None:
    gm = fg.transform(build(ReadsALeaf), "straight_through")
    gm.conv.stride = (2,)
    with pytest.raises(fg.CaptureError, match=r"conv\.stride"):
        gm(sample())


def test_attributes_of_the_leaves_that_an_export_opens_are_constants() -> None:
    gm = transformed("export")
    gm.part.drop.p = 0.25
    with pytest.raises(fg.CaptureError, match=r"part\.drop\.p"):
        gm(sample())


class Assigns(Net):
    def make(self) -> None:
        self.alpha = 2.0

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.f(x)
        self.times = 3
        return F.relu(self.last) * self.alpha * self.times


def test_attributes_that_an_exported_forward_assigns_before_it_reads_them_are_no_constants() -> (
    None
):
    model = build(Assigns)
    with pytest.warns(fg.FreegradWarning, match="times"):
        gm = fg.transform(model, NATIVE, example_inputs=(sample(),))
    gm.last, gm.times = None, 7
    assert torch.equal(gm(sample()), model(sample()))
    assert torch.equal(gm.last, model.last)
    gm.alpha = 3.0
    with pytest.raises(fg.CaptureError, match="alpha"):
        gm(sample())


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_does_not_leave_the_check_out(way: str) -> None:
    gm = transformed(way)
    gm.register_forward_hook(lambda *_: None)
    gm.part.fn = F.silu
    with pytest.raises(fg.CaptureError, match=r"part\.fn"):
        gm(sample())


def test_a_model_that_reads_no_attribute_is_not_checked() -> None:
    gm = fg.transform(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), "straight_through")
    assert "_require_constants" not in gm.forward.__code__.co_names


@pytest.mark.slow
def test_compiled_code_does_not_ignore_a_change() -> None:
    gm = transformed("symbolic").eval()
    compiled = torch.compile(gm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(sample()), gm(sample()))
    gm.part.alpha = 2.0
    with pytest.raises(Exception, match="alpha"):
        compiled(sample())
