"""The capture by `torch.export`, from example inputs: the same result as by symbolic tracing, of models that it opens.

The original is the oracle, under an interception where a rule is meant. Where both captures take a model, one table
gives the same sites and the same gradients through both.
"""

from __future__ import annotations

import copy
import functools
import io
import logging
import os
import pickle
import random
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim
from torchvision import models as vision

import freegrad_fx as fg
import runs
from models import Branching, Smooth
from places import IMPORTABLE
from runs import assert_same_forward, assert_same_gradients, call, run
from side_by_side import (
    BACKWARD,
    RULE,
    THRICE,
    Make,
    Net,
    build,
    check_capture,
    difference,
    nothing_is_left_behind,
    sample,
)
from sweep import NATIVE, Interception, check_invariants, wake


@pytest.fixture(autouse=True)
def _quiet_export() -> Iterator[None]:
    """torch.export logs what it specialises."""
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def rows(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def exported(model: nn.Module, rules: Any = RULE, **options: Any) -> fg.CapturedModule:
    return fg.transform(model, rules, **{"example_inputs": (sample(),), **options})


def marked(names: Any, slow: set[str], exhaustive: Container[str] = ()) -> list[Any]:
    marks = {
        n: [pytest.mark.slow] * (n in slow) + [pytest.mark.exhaustive] * (n in exhaustive)
        for n in names
    }
    return [pytest.param(n, marks=marks[n]) for n in names]


def sites(plan: Any) -> list[tuple[str, str, int]]:
    return [(d.site.path, d.site.op, d.site.call) for d in plan.decisions]


def site_names(model: nn.Module, *args: Any, rules: Any = RULE) -> list[str]:
    """Of the plan from these example inputs; of the symbolic one without any."""
    plan = fg.explain(model, rules, **({"example_inputs": args} if args else {}))
    return [decision.site.name for decision in plan.decisions]


# --- what example inputs are ---


class Plain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.g(self.act(self.f(x)))).tanh()


class Two(Net):
    """A dict of two tensors, and one more by keyword alone."""

    def forward(self, x: dict[str, Tensor], y: list[Tensor], *, z: Tensor) -> Tensor:
        return F.relu(self.f(x["a"]) + self.g(x["b"])) * torch.tanh(y[0] + z)


EXAMPLES = {
    "a tuple": (sample(),),
    "a tensor": sample(),
    "a dict": {"x": sample()},
    "an OrderedDict": OrderedDict(x=sample()),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", EXAMPLES)
def test_example_inputs_are_a_tuple_a_tensor_or_keyword_arguments(kind: str) -> None:
    check_capture(Plain, *THRICE, example_inputs=EXAMPLES[kind])


@pytest.mark.parametrize("wrong", [[sample()], 3, "x", {1, 2}], ids=["list", "int", "str", "set"])
def test_anything_else_is_a_type_error_that_shows_what_to_write(wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"example_inputs.*torch.randn.*got {type(wrong).__name__}"
    ):
        fg.transform(Plain(), RULE, example_inputs=wrong)


def test_examples_that_the_forward_does_not_take_are_an_error_with_the_reason() -> None:
    with pytest.raises(
        fg.CaptureError, match=r"Plain does not take the example inputs.*missing.*'x'"
    ):
        fg.transform(Plain(), RULE, example_inputs=())
    with pytest.raises(
        fg.CaptureError, match=r"Plain does not take the example inputs.*mat1 and mat2"
    ):
        fg.transform(Plain(), RULE, example_inputs=(torch.ones(4, 5),))


def test_a_condition_on_values_is_refused_with_a_way_in_that_takes_it() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)) + torch.relu(x)

    with pytest.raises(fg.CaptureError, match=r"freegrad_fx\.compile"):
        fg.transform(Branches(), RULE, example_inputs=sample())


def test_arguments_in_containers_and_by_keyword() -> None:
    arguments = {"x": {"a": rows(4, 1), "b": rows(4, 2)}, "y": [rows(4, 3)], "z": rows(4, 4)}
    check_capture(Two, call(**arguments), example_inputs=arguments)


def test_explain_takes_them_too() -> None:
    assert site_names(Plain(), sample()) == ["act:relu[0]", "<root>:relu[0]", "<root>:tanh[0]"]


def test_dynamic_shapes_need_example_inputs() -> None:
    for entry in (fg.transform, fg.explain):
        with pytest.raises(TypeError, match=r"dynamic_shapes.*example_inputs"):
            entry(Plain(), RULE, dynamic_shapes={"x": {0: Dim("batch")}})


# --- control flow that symbolic tracing cannot follow ---


class ByShape(Net):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(x.shape[1] // 3):
            x = F.relu(self.f(x))
        return x if x.dim() > 2 else self.act(self.g(x))


class ByValue(Net):
    """A list of Python numbers, and a module chosen by name."""

    def make(self) -> None:
        self.plan = ["f", "relu", "g", "tanh"]

    def forward(self, x: Tensor) -> Tensor:
        for name in self.plan:
            x = getattr(self, name)(x) if hasattr(self, name) else getattr(torch, name)(x)
        return x.view(*reversed(x.shape)) if len(x) == 2 else x


class Length(Net):
    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(self.f(x[:, i : i + 6])) for i in range(len(x[0]) - 5)]
        return torch.stack(parts).sum(0).tanh()


@pytest.mark.parametrize("make", [ByShape, ByValue, Length], ids=lambda m: m.__name__)
def test_control_flow_on_shapes_and_python_values(make: Make) -> None:
    with pytest.raises(fg.CaptureError, match="example_inputs"):
        fg.transform(make(), RULE)
    check_capture(make, *THRICE, example_inputs=(sample(),))


def test_control_flow_on_data_is_an_error_with_the_reason() -> None:
    class ByData(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x) if x.sum() > 0 else x

    with pytest.raises(fg.CaptureError, match=r"ByData cannot be captured.*[Dd]ata-dependent"):
        exported(ByData())


# --- other sizes ---


class Batched(Net):
    """Statistics, dropout and an operation in place."""

    def make(self) -> None:
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu_(self.norm(self.f(x))))
        x = F.dropout(self.act(self.g(x)), 0.3, self.training) + x
        return torch.tanh(x)


OTHER_BATCHES = [call(rows(count)) for count in (2, 4, 7, 33)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", [Plain, Batched, Smooth, Branching], ids=lambda m: m.__name__)
def test_another_batch_size_is_fine(make: Make) -> None:
    check_capture(make, *OTHER_BATCHES, example_inputs=(sample(),))


def test_more_than_the_batch_may_change() -> None:
    shapes = {"x": {0: Dim("batch", min=2), 1: Dim("steps", min=2)}}
    x = image(3, 5, 6)
    gm = check_capture(
        Plain,
        *[call(image(*shape)) for shape in ((3, 5, 6), (2, 9, 6), (8, 3, 6))],
        example_inputs=(x,),
        dynamic_shapes=shapes,
    )
    with pytest.raises(fg.CaptureError, match="dynamic_shapes"):
        gm(image(3, 5, 7))


def test_a_batch_kept_static_by_dynamic_shapes() -> None:
    gm = exported(Plain(), dynamic_shapes={"x": None})
    assert gm(sample()).shape == (4, 6)
    with pytest.raises(fg.CaptureError, match=r"x\.size\(\)\[0\] == 4.*dynamic_shapes"):
        gm(rows(5))


@functools.cache
def exported_once(make: Make) -> fx.GraphModule:
    return exported(make())


GUARDED = {
    "another number of features": ((4, 7), r"x\.size\(\)\[1\] == 6"),
    "fewer dimensions": ((6,), r"x\.dim\(\) == 2"),
    "more dimensions": ((4, 6, 1), r"x\.dim\(\) == 2"),
    "no dimensions": ((), r"x\.dim\(\) == 2"),
}


@pytest.mark.parametrize("make", [ByShape, Smooth, Branching], ids=lambda m: m.__name__)
@pytest.mark.parametrize("kind", GUARDED)
def test_a_call_that_breaks_an_assumption_names_it_and_the_remedy(make: Make, kind: str) -> None:
    shape, words = GUARDED[kind]
    gm = exported_once(make)
    for training in (True, False):
        gm.train(training)
        with pytest.raises(fg.CaptureError, match=rf"captured for.*{words}.*dynamic_shapes"):
            gm(torch.ones(shape))
        gm(sample())


class TwoInputs(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.f(x) + self.g(y))


def test_a_guard_names_the_argument_and_the_place_in_it() -> None:
    arguments = {"x": {"a": rows(4, 1), "b": rows(4, 2)}, "y": [rows(4, 3)], "z": rows(4, 4)}
    gm = fg.transform(Two(), RULE, example_inputs=arguments)
    with pytest.raises(fg.CaptureError, match=r"x\['b'\].*size\(\)\[1\] == 6"):
        gm(**{**arguments, "x": {"a": rows(4), "b": torch.ones(4, 7)}})


def test_sizes_that_belong_together_are_guarded_together() -> None:
    x, y = rows(4), rows(4, 5)
    gm = check_capture(TwoInputs, call(x, y), call(rows(7), rows(7)), example_inputs=(x, y))
    with pytest.raises(fg.CaptureError, match=r"dynamic_shapes"):
        gm(rows(7), rows(5))


def test_an_example_batch_of_one_makes_the_batch_fixed_and_a_call_says_so() -> None:
    gm = exported(Plain(), example_inputs=(rows(1),))
    assert gm(rows(1)).shape == (1, 6)
    with pytest.raises(fg.CaptureError, match=r"size\(\)\[0\] == 1.*use at least 2"):
        gm(rows(4))


def test_a_branch_on_the_batch_size_is_guarded() -> None:
    class Halves(Net):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.f(x)) if x.shape[0] > 5 else torch.tanh(self.g(x))

    gm = check_capture(Halves, call(rows(2)), call(rows(5)), example_inputs=(sample(),))
    with pytest.raises(fg.CaptureError, match="dynamic_shapes"):
        gm(rows(6))
    large = check_capture(Halves, call(rows(6)), call(rows(9)), example_inputs=(rows(8),))
    with pytest.raises(fg.CaptureError, match="dynamic_shapes"):
        large(sample())


def test_dynamic_shapes_that_export_refuses_are_an_error_with_its_words() -> None:
    with pytest.raises(fg.CaptureError, match=r"Plain cannot be captured.*export"):
        exported(Plain(), dynamic_shapes={"nonsense": {0: Dim("batch")}})


class Kept(nn.Module):
    """Its parameter reaches the forward by another way than its name."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(6))
        weight, self.way = self.weight, way
        self.list, self.function = [weight], lambda x: x @ weight
        self.views = [weight.view(36).view(6, 6)]
        object.__setattr__(self, "attribute", weight)

    def forward(self, x: Tensor) -> Tensor:
        ways = {
            "list": lambda: x @ self.list[0],
            "function": lambda: self.function(x),
            "view": lambda: x @ self.views[0],
            "attribute": lambda: x @ self.attribute,
        }
        return ways[self.way]() + x @ self.weight


@pytest.mark.parametrize("way", ["list", "function", "view", "attribute"])
def test_a_parameter_that_export_would_make_a_constant_is_refused(way: str) -> None:
    with pytest.raises(fg.CaptureError, match=r"shape \(6, 6\) that requires a gradient"):
        fg.transform(Kept(way), {}, example_inputs=(rows(4),))


def test_a_tensor_that_does_not_learn_may_be_kept_anywhere() -> None:
    model = Kept("list")
    model.list = [model.weight.detach()]
    model.views = []
    gm = fg.transform(model, {}, example_inputs=(rows(4),))
    assert torch.equal(gm(rows(4)), model(rows(4)))
    gm(rows(4)).sum().backward()
    assert torch.equal(model.weight.grad, rows(4).sum(0)[:, None].expand(6, 6))


class BakedBatch(Net):
    """It names its batch size, so that export cannot keep it open."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x.reshape(2, 2, 6))).flatten(0, 1)


def test_a_batch_that_the_model_fixes_is_captured_as_it_is() -> None:
    check_capture(BakedBatch, *THRICE, example_inputs=(sample(),))


# --- both modes ---


class Modes(Net):
    """A frozen backbone's statistics, dropout as module and as function."""

    def make(self) -> None:
        self.backbone, self.head = Batched(), Batched()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.drop(self.head(self.backbone(x)))) + x


def modes_of_parts(model: nn.Module) -> Iterator[tuple[str, bool]]:
    for path, _ in model.named_modules():
        yield path, False
        yield path, True


@pytest.mark.parametrize("rules", [NATIVE, RULE], ids=["native", "rule"])
def test_every_part_can_be_in_another_mode_than_the_rest(rules: Any) -> None:
    original, gm = build(Modes), exported(build(Modes), rules)
    assert len(gm.variants) == 1
    for path, inside in modes_of_parts(original):
        for model in (original, gm):
            model.train(not inside)
            model.get_submodule(path).train(inside)
        reference = None if rules is NATIVE else Interception(BACKWARD)
        found = difference(original, gm, THRICE, reference)
        assert not found, f"{path or 'the root'} alone in {'train' if inside else 'eval'}: {found}"


def test_a_part_in_eval_mode_keeps_its_statistics() -> None:
    gm = exported(build(Modes)).train()
    gm.backbone.eval()
    gm(sample())
    gm(sample())
    assert gm.backbone.norm.num_batches_tracked == 0
    assert torch.equal(gm.backbone.norm.running_mean, torch.zeros(6))
    assert gm.head.norm.num_batches_tracked == 2
    assert not torch.equal(gm.head.norm.running_mean, torch.zeros(6))


def test_captured_in_a_mixed_mode_it_starts_in_it() -> None:
    original, model = build(Modes).train(), build(Modes).train()
    for each in (original, model):
        each.backbone.eval()
    gm = exported(model)
    for path, module in original.named_modules():
        assert gm.get_submodule(path).training == module.training, path
    assert not difference(original, gm, THRICE, Interception(BACKWARD))
    for each in (original, gm):
        each.train()
    assert not difference(original, gm, THRICE, Interception(BACKWARD))


class StructuralPart(Net):
    """One part branches on its flag; another one does not, and has statistics."""

    def make(self) -> None:
        self.backbone, self.branch = Batched(), Branching()

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.branch(self.backbone(x)))


class Looking(Batched):
    """Looks at its flag, and does the same in both modes."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        return super().forward(x)


class Numbered(Net):
    """A part that branches on its flag, and one whose path begins with the same letters."""

    def make(self) -> None:
        self.layer1, self.layer10 = Looking(), Branching()

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.layer10(self.layer1(x)))


def test_a_part_is_in_its_own_mode_beside_one_that_branches_and_begins_with_its_name() -> None:
    original, gm = build(Numbered).train(), exported(build(Numbered)).train()
    assert [sorted(variant.flags) for variant in gm.variants] == [["layer10"]] * 2
    for model in (original, gm):
        model.get_submodule("layer1").eval()
    assert not difference(original, gm, THRICE, Interception(BACKWARD))


def test_two_graphs_where_the_structure_differs() -> None:
    gm = check_capture(StructuralPart, *OTHER_BATCHES, example_inputs=(sample(),))
    assert len(gm.variants) == 2
    plan = fg.report(gm)
    # a place is another one where the code is: each mode has rows of its own, where the lines differ
    assert ("branch:tanh[1]", "eval") in {(d.site.name, d.modes) for d in plan.decisions}
    assert {d.modes for d in plan.decisions if d.site.path != "branch"} == {""}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_does_not_branch_can_be_in_another_mode_beside_what_does(training: bool) -> None:
    original, gm = build(StructuralPart).train(training), exported(build(StructuralPart))
    gm.train(training)
    assert not difference(original, gm, THRICE, Interception(BACKWARD))
    for path in ("backbone", "backbone.norm", "backbone.drop", "act", "branch.a"):
        for model in (original, gm):
            model.train(training)
            model.get_submodule(path).train(not training)
        found = difference(original, gm, THRICE, Interception(BACKWARD))
        assert not found, f"{path}: {found}"


def test_parts_that_branch_have_to_be_in_one_mode_together() -> None:
    class TwoBranch(Net):
        def make(self) -> None:
            self.one, self.drop, self.other = Branching(), nn.Linear(3, 6), Branching()

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.drop(self.one(x)))

    gm = check_capture(TwoBranch, *THRICE, example_inputs=(sample(),))
    gm.train()
    gm.one.eval()
    with pytest.raises(fg.CaptureError, match=r"training flags.*same mode"):
        gm(sample())
    gm.other.eval()
    original = build(TwoBranch).eval()
    gm.load_state_dict(original.state_dict())
    assert not difference(original, gm, THRICE, Interception(BACKWARD))


# --- in place ---


class InPlaceSpellings(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        F.relu_(y)
        y = self.g(y)
        y.tanh_()
        y = F.silu(self.f(y), inplace=True) + x
        return F.hardtanh_(y, -0.5, 0.5)


class OnAView(Net):
    def make(self) -> None:
        self.inplace = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        early = y[:, 3:]
        y[:, :4].sigmoid_()
        z = self.g(y)
        self.inplace(z.view(-1, 2, 3))
        z = z + y
        return (z.tanh_() * y).sum(1, keepdim=True) + early


class OnTheInput(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = x
        F.relu_(x)
        return self.f(y) + x


class Residual(Net):
    """An in-place activation on the shortcut, read before and after."""

    def make(self) -> None:
        self.inplace = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        kept = h * 2
        h = self.g(self.inplace(h))
        h += kept
        return self.inplace(self.f(self.inplace(h)) + h)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "make", [InPlaceSpellings, OnAView, OnTheInput, Residual], ids=lambda m: m.__name__
)
def test_activations_in_place(make: Make) -> None:
    check_capture(make, *THRICE, example_inputs=(sample(),))


def test_an_activation_in_place_on_the_callers_tensor() -> None:
    class OnTheCallers(Net):
        def forward(self, x: Tensor) -> Tensor:
            F.relu_(x)
            return self.f(x)

    original = build(OnTheCallers)
    gm = exported(build(OnTheCallers))
    for count in (4, 6):
        mine, its = rows(count), rows(count)
        with Interception(BACKWARD):
            expected = original(mine)
        assert torch.equal(gm(its), expected)
        assert torch.equal(mine, its)
        assert torch.equal(its, rows(count).relu())


# --- one site for what export takes apart ---


class Composites(Net):
    def make(self) -> None:
        self.sign, self.shrink = nn.Softsign(), nn.Tanhshrink()

    def forward(self, x: Tensor) -> Tensor:
        x = self.sign(self.f(x)) + F.softsign(x)
        x = self.sign(self.shrink(self.g(x)) * 3) + F.tanhshrink(x)
        return F.softsign(F.tanhshrink(x))


def test_softsign_and_tanhshrink_are_one_site_each_however_often_they_are_called() -> None:
    gm = check_capture(Composites, *OTHER_BATCHES, example_inputs=(sample(),))
    assert sorted(sites(fg.report(gm))) == sorted(
        [
            ("sign", "softsign", 0),
            ("sign", "softsign", 1),
            ("", "softsign", 0),
            ("", "softsign", 1),
            ("shrink", "tanhshrink", 0),
            ("", "tanhshrink", 0),
            ("", "tanhshrink", 1),
        ]
    )


class Softmin(Net):
    def make(self) -> None:
        self.soft = nn.Softmin(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.soft(self.f(x)) + F.softmin(x, 1)
        return F.softmin(self.soft(self.g(x)) * 4, dim=-1) + F.softmax(x, 1)


def test_softmin_is_one_site_and_no_softmax() -> None:
    x, table = sample(), {"softmin": fg.rules.scale(s=3.0)}
    model = build(Softmin)
    gm, traced = exported(model, table), fg.transform(model, table)
    changed = [
        (d.site.path, d.site.call) for d in fg.report(gm).decisions if d.site.op == "softmin"
    ]
    assert changed == [("soft", 0), ("", 0), ("soft", 1), ("", 1)]
    actual, expected, native = run(gm, x), run(traced, x), run(model, x)
    assert_same_forward(actual, native)
    assert_same_gradients(actual, expected)
    assert runs.differs(actual, native)


# --- what comes out ---


class Dictionary(Net):
    def forward(self, x: Tensor) -> Any:
        return {"out": F.relu(self.f(x)), "aux": (torch.tanh(x), [x * 2, None, 3, "text"])}


class Ordered(Net):
    def forward(self, x: Tensor) -> Any:
        return OrderedDict(out=F.relu(self.f(x)), aux=torch.tanh(self.g(x)))


class ATuple(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.f(x)), torch.tanh(self.g(x)), x.shape[1]


class AList(Net):
    def forward(self, x: Tensor) -> Any:
        return [F.relu(self.f(x)), (torch.tanh(self.g(x)),)]


class MoreInTraining(Net):
    """Another kind of output in each mode, as with auxiliary classifiers."""

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.f(x))
        return (y, torch.tanh(self.g(y))) if self.training else y


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "make", [Dictionary, Ordered, ATuple, AList, MoreInTraining], ids=lambda m: m.__name__
)
def test_outputs_of_any_nesting(make: Make) -> None:
    check_capture(make, call(sample()), call(rows(7)), example_inputs=(sample(),))


# --- refused ---


class Ste(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class WithAFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.g(Ste.apply(self.f(x))))


class InAPart(Net):
    def make(self) -> None:
        self.part = WithAFunction()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + x


@pytest.mark.parametrize("make", [WithAFunction, InAPart], ids=lambda m: m.__name__)
def test_a_custom_function_is_refused_by_name(make: Make) -> None:
    model = make()
    with nothing_is_left_behind(), pytest.raises(fg.CaptureError, match=r"autograd.Function Ste,"):
        exported(model)
    assert ("part:Ste[0]" if make is InAPart else "<root>:Ste[0]") in site_names(
        make(), rules={Ste: RULE, "relu": RULE}
    )


@pytest.mark.parametrize("key", [nn.ReLU, Ste], ids=["module", "function"])
def test_a_class_as_a_key_is_refused(key: type) -> None:
    with pytest.raises(
        fg.CaptureError, match=rf"torch\.export.*\({key.__name__}\).*example_inputs"
    ):
        exported(Plain(), {key: RULE})


def test_leaf_modules_are_refused() -> None:
    with pytest.raises(fg.CaptureError, match=r"Linear, ReLU.*example_inputs"):
        exported(Plain(), leaf_modules=[nn.Linear, nn.ReLU])


def test_concrete_args_are_refused() -> None:
    with pytest.raises(fg.CaptureError, match="concrete_args"):
        exported(Plain(), concrete_args={"x": fx.PH})


def test_a_refusal_leaves_the_model_and_the_process_as_they_were() -> None:
    class Fails(Batched):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else x.nonsense()

    model = build(Fails).train()
    model.norm.eval()
    flags = [m.training for m in model.modules()]
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with nothing_is_left_behind(), pytest.raises(fg.CaptureError, match="nonsense"):
        exported(model)
    assert [m.training for m in model.modules()] == flags
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert type(tensor) is Tensor


# --- state ---


class OwnCounter(Net):
    def make(self) -> None:
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(6), persistent=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.g.weight = self.f.weight

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = F.relu(self.f(x)) * self.frozen
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.act(self.g(x) - self.mean)


class Parametrized(Net):
    def make(self) -> None:
        self.f = nn.utils.parametrizations.weight_norm(self.f)
        self.g = nn.utils.parametrizations.spectral_norm(self.g)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.g(self.act(self.f(x))))


@pytest.mark.parametrize("make", [OwnCounter, Parametrized], ids=lambda m: m.__name__)
def test_state_is_kept_and_updated(make: Make) -> None:
    gm = check_capture(make, *THRICE, example_inputs=(sample(),))
    original = build(make)
    assert list(gm.state_dict()) == list(original.state_dict())
    assert [n for n, p in gm.named_parameters() if p.requires_grad] == [
        n for n, p in original.named_parameters() if p.requires_grad
    ]


class Noisy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x) + torch.randn_like(x)) + torch.rand(6) + torch.zeros(x.shape[0], 1)


def test_torchs_random_numbers_are_drawn_anew() -> None:
    check_capture(Noisy, *OTHER_BATCHES, example_inputs=(sample(),))


# --- regions without gradients ---


class Frozen(Net):
    """Activations before, in and after a region without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x - 0.1)
        with torch.no_grad():
            y = F.relu(self.f(x))
        return F.relu(self.g(x) + y)


class FrozenPart(Net):
    """A region that calls modules twice, and draws random numbers."""

    def make(self) -> None:
        self.part = Batched()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.part(self.act(self.f(x)))
            z = self.act(y - 0.2)
        return self.act(self.part(x) + y) * z


class GradientsInside(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = F.relu(self.f(x))
            with torch.enable_grad():
                z = F.relu(self.g(x) + y)
            y = F.relu(y + z)
        return torch.tanh(z + y)


class Decorated(Net):
    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        return torch.tanh(self.g(x))

    def forward(self, x: Tensor) -> Any:
        return F.relu(self.f(x)), self.target(x)


REGIONS = [Frozen, FrozenPart, GradientsInside, Decorated]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", REGIONS, ids=lambda m: m.__name__)
def test_a_region_without_gradients_stays_one_and_its_activations_are_sites(make: Make) -> None:
    check_capture(make, call(sample()), call(rows(7)), example_inputs=(sample(),))
    assert sorted(site_names(make(), sample())) == sorted(site_names(make()))


def test_the_grad_mode_is_restored_where_a_region_raises() -> None:
    gm = exported(Frozen())
    gm.f.weight = nn.Parameter(torch.ones(6, 5))
    with pytest.raises(RuntimeError):
        gm(sample())
    assert torch.is_grad_enabled()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", REGIONS, ids=lambda m: m.__name__)
def test_a_region_without_gradients_in_a_call_without_gradients(make: Make) -> None:
    original, gm = build(make).eval(), exported(build(make)).eval()
    with torch.no_grad():
        actual, expected = gm(sample()), original(sample())
    for a, e in zip(
        torch.utils._pytree.tree_leaves(actual),
        torch.utils._pytree.tree_leaves(expected),
        strict=True,
    ):
        assert torch.equal(a, e)
        assert not a.requires_grad


@pytest.mark.parametrize(
    "op", ["activations", "params"]
)  # a rule for a parameter sets the grad mode, too
def test_a_model_with_a_region_without_gradients_is_pickled(op: str) -> None:
    gm = fg.transform(build(Frozen), {op: fg.rules.scale(s=0.5)}, example_inputs=(sample(),))
    loaded = pickle.loads(pickle.dumps(gm))
    assert torch.equal(loaded(sample()), gm(sample()))


# --- hooks ---


def doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2


def shifted(module: nn.Module, args: Any) -> Any:
    return (args[0] + 1,)


class Hooked(Plain):
    def make(self) -> None:
        self.register_forward_hook(doubled)
        self.register_forward_pre_hook(shifted)


def test_hooks_of_the_root_run_once() -> None:
    gm = check_capture(Hooked, *THRICE, example_inputs=(sample(),))
    assert len(gm._forward_hooks) == len(gm._forward_pre_hooks) == 1
    bare, plain = exported(build(Hooked)), exported(build(Plain))
    bare._forward_hooks.clear()
    bare._forward_pre_hooks.clear()
    assert torch.equal(bare(sample()), plain(sample()))


def test_hooks_of_parts_are_a_warning_that_names_them() -> None:
    model = build(Plain)
    model.f.register_full_backward_hook(lambda module, grads, outs: None)
    with pytest.warns(fg.FreegradWarning, match=r"lost: f: .*hooks of Linear"):
        gm = exported(model)
    assert [lost.path for lost in fg.report(gm).lost] == ["f"]
    with pytest.raises(fg.PlanError, match="lost: f: "):
        exported(model, strict=True)


# --- arguments with a default ---


class Masked(Net):
    def forward(
        self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0, *, flip: bool = False
    ) -> Tensor:
        x = F.relu(self.f(x)) * scale
        x = -x if flip else x
        return x if mask is None else torch.tanh(x * mask)


def test_arguments_that_the_examples_leave_out_have_their_defaults() -> None:
    gm = check_capture(
        Masked,
        call(sample()),
        call(rows(5), None, 2.0, flip=False),
        call(rows(5), scale=2.0),
        example_inputs=(sample(),),
    )
    for arguments, name in (
        ({"mask": sample()}, "mask"),
        ({"scale": 3.0}, "scale"),
        ({"flip": True}, "flip"),
    ):
        with pytest.raises(fg.CaptureError, match=rf"captured for {name}=.*another value"):
            gm(sample(), **arguments)


def test_arguments_that_the_examples_give_are_open() -> None:
    x, mask = sample(), rows(4, 9)
    check_capture(Masked, call(x, mask), call(rows(7), rows(7, 9)), example_inputs=(x, mask))
    gm = check_capture(
        Masked,
        call(x=x, mask=mask),
        call(x=rows(7), mask=rows(7, 9)),
        example_inputs={"x": x, "mask": mask},
    )
    with pytest.raises(fg.CaptureError):
        gm(x=x, mask=mask, flip=True)


# --- what a graph would do once and for ever ---


class DrawsInPython(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * random.random()


class DrawsInNumpy(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.f(x)) * float(np.random.rand())


class Counts(Net):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.f(x)) * self.calls


class CountsInAPart(Net):
    def make(self) -> None:
        self.part = Counts()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) + x


STORED = Ste.apply


class Stored(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(STORED(self.f(x)))


class Autocast(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = F.relu(self.f(x))
        return F.relu(self.g(y.float()))


REFUSED: dict[Make, str] = {
    DrawsInPython: "DrawsInPython draws random numbers",
    DrawsInNumpy: "DrawsInNumpy draws random numbers",
    Counts: r"Python state.*calls",
    CountsInAPart: r"Python state.*calls",
    Stored: r"autograd.Function Ste,",
    Autocast: "torch.autocast",
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", REFUSED, ids=lambda m: m.__name__)
def test_what_a_graph_would_bake_is_refused_with_the_reason(make: Make) -> None:
    model = build(make)
    with nothing_is_left_behind(), pytest.raises(fg.CaptureError, match=REFUSED[make]):
        exported(model)
    assert "calls" not in model.__dict__


def test_a_name_that_is_a_keyword() -> None:
    class Keyword(Net):
        def make(self) -> None:
            self.register_parameter("lambda", nn.Parameter(torch.ones(6)))
            self.add_module("in", nn.ReLU())
            self.register_buffer("class", torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            x = getattr(self, "in")(self.f(x) * getattr(self, "lambda"))
            return torch.tanh(self.g(x) + getattr(self, "class"))

    gm = check_capture(Keyword, *THRICE, example_inputs=(sample(),))
    assert sites(fg.report(gm)) == [("in", "relu", 0), ("", "tanh", 0)]


# --- files, copies, compilers ---


PAIRS = {"one graph": Smooth, "two graphs": Branching, "statistics": Batched}


def in_a_file(gm: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(gm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], nn.Module]] = {
    "copy": copy.copy,
    "torch.save": in_a_file,
    "pickle of a deepcopy": lambda gm: pickle.loads(pickle.dumps(copy.deepcopy(gm))),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_copies_keep_rules_modes_guards_and_the_report(make: Make, way: str) -> None:
    gm = exported(build(make))
    survivor = WAYS[way](gm)
    assert str(fg.report(survivor)) == str(fg.report(gm))
    assert list(survivor.state_dict()) == list(gm.state_dict())
    for training in (True, False):
        original = build(make).train(training)
        found = difference(
            original, survivor.train(training), [call(rows(5))], Interception(BACKWARD)
        )
        assert not found, found
        survivor.load_state_dict(build(make).state_dict())
    with pytest.raises(fg.CaptureError, match="dynamic_shapes"):
        survivor(torch.ones(4, 7))


IN_ANOTHER_PROCESS = """
import sys, torch
gm = torch.load(sys.argv[1], weights_only=False)
results = []
for training in (True, False):
    gm.train(training)
    x = torch.load(sys.argv[2]).requires_grad_()
    leaves = [x, *gm.parameters()]
    output = gm(x)
    results.append([output.detach(), *torch.autograd.grad(output.sum(), leaves, allow_unused=True)])
try:
    gm(torch.ones(4, 7))
except Exception as error:
    results.append(str(error))
torch.save(results, sys.argv[3])
"""


@pytest.mark.slow
@pytest.mark.parametrize("make", [Branching], ids=lambda m: m.__name__)
def test_torch_load_in_another_process(make: Make, tmp_path: Path) -> None:
    original = build(make)
    files = [str(tmp_path / name) for name in ("model", "input", "results")]
    torch.save(exported(build(make)), files[0])
    torch.save(rows(9), files[1])
    # Nothing there imports freegrad_fx but what was saved.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(IMPORTABLE)}
    subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, *files], check=True, env=environment, timeout=120
    )
    *results, refusal = torch.load(files[2])
    for training, actual in zip((True, False), results, strict=True):
        x = rows(9).requires_grad_()
        with Interception(BACKWARD):
            output = original.train(training)(x)
        gradients = torch.autograd.grad(
            output.sum(), [x, *original.parameters()], allow_unused=True
        )
        for a, e in zip(actual, (output.detach(), *gradients), strict=True):
            torch.testing.assert_close(a, e)
    assert "dynamic_shapes" in refusal


@pytest.mark.parametrize("make", [Smooth, Branching, ByShape], ids=lambda m: m.__name__)
def test_compiled_in_one_piece(make: Make) -> None:
    original, gm = build(make), exported(build(make))
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        compiled.train(training)
        original.train(training)
        x, y = rows(5).requires_grad_(), rows(5).requires_grad_()
        with Interception(BACKWARD):
            expected = original(x)
        actual = compiled(y)
        torch.testing.assert_close(actual, expected)
        mine = torch.autograd.grad(actual.sum(), [y, *gm.parameters()], allow_unused=True)
        its = torch.autograd.grad(expected.sum(), [x, *original.parameters()], allow_unused=True)
        for a, e in zip(mine, its, strict=True):
            torch.testing.assert_close(a, e)


def test_a_second_transform_changes_nothing() -> None:
    gm = exported(build(Smooth))
    with pytest.warns(fg.FreegradWarning, match="already decoupled"):
        again = fg.transform(gm, "reverse")
    assert again.code == gm.code
    assert not difference(gm, again, THRICE)


# --- what symbolic tracing keeps whole is opened ---


class Encoder(nn.Module):
    def __init__(self, activation: Any = "relu") -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, 0.2, activation, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("activation", [F.silu], ids=["silu"])
def test_the_activation_of_a_transformer_layer_is_a_site(activation: Any) -> None:
    x = image(3, 5, 6)
    gm = check_capture(
        lambda: Encoder(activation),
        call(x),
        call(image(7, 5, 6)),
        whole=["layer.self_attn"],  # of its softmax
        example_inputs=(x,),
    )
    name = activation if isinstance(activation, str) else activation.__name__
    assert [site for site in sites(fg.report(gm)) if site[1] == name] == [("layer", name, 0)]
    assert ["scaled_dot_product_attention" in o.what for o in fg.report(gm).opaque] == [True]
    assert [opaque.path for opaque in fg.explain(Encoder(), RULE).opaque] == ["layer"]


class Recurrent(Net):
    def make(self) -> None:
        self.cell = nn.GRUCell(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 6)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return F.relu(self.f(h))


def test_a_loop_over_time() -> None:
    x = image(3, 4, 6)
    check_capture(Recurrent, call(x), call(image(5, 4, 6)), example_inputs=(x,))


# --- both captures ---


class Reused(Net):
    """Modules and functions called again and again, in containers, and under two names."""

    def make(self) -> None:
        self.items = nn.ModuleList([nn.Linear(6, 6), nn.ReLU(), nn.Tanh()])
        self.named = nn.ModuleDict({"act": nn.SiLU(), "with-dash": nn.GELU()})
        self.again = self.act

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            for item in self.items:
                x = item(x)
        x = self.act(self.f(self.act(x))) + F.relu(x)
        x = self.named["act"](x) + self.named["with-dash"](F.relu(self.g(x)))
        return F.leaky_relu(torch.sigmoid(x) - 0.5, 0.3)


class Nested(Net):
    def make(self) -> None:
        self.a, self.b = Plain(), nn.Sequential(Plain(), nn.ELU(), Plain())

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.b(self.a(x)))


class Groups(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = F.softmax(self.f(x), 1) + F.log_softmax(x, dim=-1)
        return torch.round(F.relu(self.g(x)) * 4) / 4 + torch.sign(x) + F.relu(x)


BY_HAND = [
    Plain, Batched, Modes, InPlaceSpellings, Residual, OnAView, Composites, OwnCounter, Dictionary,
    Reused, Nested, Groups, MoreInTraining, Smooth, Branching,
]  # fmt: skip

TABLES: dict[str, Any] = {
    "everything": {
        "activations": RULE,
        "softmax": fg.rules.scale(s=2.0),
        "quantizers": "straight_through",
    },
    "one op": {"relu": fg.rules.d_linear, "activations": None},
}


def within(path: str, parts: tuple[str, ...]) -> bool:
    return any(path == part or path.startswith(f"{part}.") for part in parts)


def check_both(make: Make, x: Tensor, table: Any) -> None:
    """One table, two captures: the same sites in the same order, and the same forward and gradients."""
    original = build(make)
    traced = fg.transform(build(make), table)
    opened = fg.transform(build(make), table, example_inputs=(x,))
    a, b = fg.report(traced), fg.report(opened)
    whole = tuple(opaque.path for opaque in a.opaque)  # these, export may open
    seen = [
        [(d.site.key, d.action, d.modes) for d in p.decisions if not within(d.site.path, whole)]
        for p in (a, b)
    ]
    assert seen[0] == seen[1]
    assert seen[0]
    assert [entry.selector for entry in a.unmatched] == [entry.selector for entry in b.unmatched]
    for training in (True, False):
        native = run(original.train(training), x)
        expected, actual = run(traced.train(training), x), run(opened.train(training), x)
        assert_same_forward(expected, native)
        assert_same_forward(actual, native)
        assert_same_gradients(actual, expected)
        assert runs.differs(actual, native) or not b.with_action("rewrite")


@pytest.mark.sampled(4)
@pytest.mark.parametrize("table", marked(TABLES, {"one op"}))
@pytest.mark.parametrize("make", BY_HAND, ids=lambda m: m.__name__)
@pytest.mark.filterwarnings("ignore:the entry")
def test_both_captures_give_the_same_sites_and_gradients(make: Make, table: str) -> None:
    check_both(make, sample(), TABLES[table])


VISION: dict[str, Make] = {
    "resnet18": lambda: vision.resnet18(num_classes=10),
    "squeezenet1_1": vision.squeezenet1_1,
    "vit": lambda: vision.VisionTransformer(64, 32, 2, 2, 12, 24, num_classes=10),
    "swin": lambda: vision.SwinTransformer([4, 4], 12, [1, 1], [2, 2], [4, 4], num_classes=10),
    "mobilenet_v3_small": vision.mobilenet_v3_small,
    "shufflenet_v2_x0_5": vision.shufflenet_v2_x0_5,
    "regnet_y_400mf": vision.regnet_y_400mf,
    "googlenet": lambda: vision.googlenet(init_weights=False),
}
QUICK_VISION = {"squeezenet1_1", "swin"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", marked(VISION, {*VISION} - QUICK_VISION))
def test_both_captures_agree_on_torchvisions_models(name: str) -> None:
    check_both(lambda: wake(VISION[name]()), image(2, 3, 64, 64), RULE)


# --- models that symbolic tracing cannot take ---

# Their options, the side of the images, and what makes them small.
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "naflexvit_base_patch16_gap": (64, {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "vit_tiny_r_s16_p8_224": (64, {"img_size": 64, "depth": 2}),
    "test_vit": (32, {}),
    "convit_tiny": (32, {"img_size": 32, "depth": 2, "local_up_to_layer": 1}),
    "cpubone_nano": (32, {}),
    "samvit_base_patch16": (
        64,
        {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3, "global_attn_indexes": (1,)},
    ),
    "hiera_tiny_224": (64, {"img_size": 64, "embed_dim": 24, "stages": (1, 1, 2, 1)}),
    "mobilevit_xxs": (32, {}),
    "twins_svt_small": (64, {"img_size": 64, "depths": (1, 1, 1, 1)}),
    "crossvit_tiny_240": (240, {"depth": ((1, 1, 0),) * 3}),
    "vgg11": (32, {"num_classes": 10}),
    "nest_tiny": (64, {"img_size": 64}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "nasnetalarge": (32, {"num_features": 384, "channel_multiplier": 2, "stem_size": 8}),
    "efficientvit_m0": (64, {"img_size": 64, "depth": (1, 1, 1)}),
    "tiny_vit_5m_224": (64, {"depths": (1, 1, 1, 1)}),
    "pnasnet5large": (64, {}),
}
# Each takes a minute, and has cells like those of other models here and in test_verified.py
LONG_TIMM = {"nasnetalarge", "pnasnet5large"}
# It makes a table of positions in the first call, and keeps it as a buffer.
CALLED_BEFORE = {"convit_tiny"}


@pytest.mark.parametrize("name", marked(TIMM, {*TIMM}, exhaustive=LONG_TIMM))
def test_models_that_symbolic_tracing_cannot_take_keep_every_invariant(name: str) -> None:
    import timm

    side, options = TIMM[name]
    model, x = wake(timm.create_model(name, **options)), image(2, 3, side, side)
    if name in CALLED_BEFORE:
        model(x)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it stumbles over
        fx.symbolic_trace(model)
    check_invariants(model, x, {"example_inputs": (x,)})


@pytest.mark.slow
def test_a_model_with_autocast_inside_is_refused() -> None:
    import timm

    model = timm.create_model("efficientvit_b0", depths=(1, 1, 1, 1))
    with pytest.raises(fg.CaptureError, match=r"torch\.autocast"):
        fg.transform(model, RULE, example_inputs=(image(2, 3, 32, 32),))


class SharedPart(Net):
    """One part under two names: symbolic tracing calls both by the first."""

    def make(self) -> None:
        self.a = Plain()
        self.c = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x))


def test_a_part_with_two_names_has_the_sites_of_the_first() -> None:
    check_both(SharedPart, sample(), RULE)


class SoftminInDouble(Net):
    def forward(self, x: Tensor) -> Tensor:
        return F.softmin(self.f(x), -1, dtype=torch.float64)


def test_softmin_keeps_its_dtype() -> None:
    model = build(SoftminInDouble)
    gm = exported(model, {"softmin": fg.rules.scale(s=3.0)})
    assert_same_forward(run(gm, sample()), run(model, sample()))


class Appends(Net):
    def make(self) -> None:
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return F.relu(self.f(x)) * len(self.seen)


def test_a_list_that_the_forward_changes_is_refused() -> None:
    with pytest.raises(fg.CaptureError, match=r"Python state.*seen"):
        exported(build(Appends))


def test_the_remedy_for_another_value_can_be_followed() -> None:
    gm = exported(Masked())
    with pytest.raises(fg.CaptureError, match=r"mask.*example_inputs"):
        gm(sample(), sample())


class DropsRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty([x.shape[0], 1]).bernoulli_(0.5)


class KnowsItsBatch(Net):
    def make(self) -> None:
        self.drops = DropsRows()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.g(self.drops(self.act(self.f(x)))))


def test_what_torch_export_adds_to_a_graph_belongs_to_no_module() -> None:
    """It reads the size of the batch in a node of its own, for which it makes up a module."""
    check_capture(KnowsItsBatch, example_inputs=(sample(),))


# --- one export where no code asks for the mode ---


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if self.training else x


class Asks(Net):
    """Relu, after an operation that depends on the mode."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.doubling, self.hidden = how, Doubling(), [Doubling()]

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.how == "by its dict":
            y = y * 2 if vars(self)["training"] else y
        elif self.how == "by a copy of a module":
            y = copy.copy(self.doubling)(y)
        elif self.how == "by a module that is not registered":
            y = self.hidden[0](y)
        elif self.how == "by a module":
            y = self.doubling(y)
        return F.relu(y)


@pytest.mark.parametrize(
    ("how", "exports"),
    [
        ("not at all", 1),
        ("by its dict", 2),
        ("by a copy of a module", 2),
        ("by a module that is not registered", 2),
        ("by a module", 2),
    ],
)
def test_a_model_that_asks_for_no_mode_is_exported_once(
    how: str, exports: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, made = torch.export.export, []

    def export(*args: Any, **kwargs: Any) -> Any:
        made.append(None)
        return usual(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", export)
    model, x = Asks(how), sample()
    gm = fg.transform(model, RULE, example_inputs=(x,), verify=False)
    assert len(made) == exports
    for mode in (True, False):
        assert torch.equal(gm.train(mode)(x), model.train(mode)(x))
