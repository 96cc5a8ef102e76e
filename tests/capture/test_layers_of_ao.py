"""Layers for quantisation (torch.ao.nn), which PyTorch's tracer keeps whole: those with activations are traced into.

What cannot be traced into is listed as opaque. The model without rules is the oracle.
"""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import pkgutil
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import intrinsic, quantizable
from torch.ao.nn.intrinsic import qat as fused
from torch.ao.nn.qat import Linear as QatLinear
from torch.ao.quantization import get_default_qat_qconfig

import freegrad_fx as fg
from freegrad_fx.sites.opaque import find_opaque
from freegrad_fx.vocabulary.activations import OPS
from runs import identical, run, tell_apart
from side_by_side import sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def config() -> Any:
    return get_default_qat_qconfig("x86")


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], list[str]]] = {
    "LinearReLU": (
        lambda: intrinsic.LinearReLU(nn.Linear(6, 6), nn.ReLU()),
        sample,
        ["0.1:relu[0]", "1:relu[0]"],
    ),
    "ConvReLU2d": (
        lambda: intrinsic.ConvReLU2d(nn.Conv2d(3, 4, 3), nn.ReLU()),
        images,
        ["0.1:relu[0]", "1:relu[0]"],
    ),
    "ConvBnReLU2d": (
        lambda: intrinsic.ConvBnReLU2d(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        images,
        ["0.2:relu[0]", "1:relu[0]"],
    ),
    "BNReLU2d": (
        lambda: intrinsic.BNReLU2d(nn.BatchNorm2d(3), nn.ReLU()),
        images,
        ["0.1:relu[0]", "1:relu[0]"],
    ),
    "qat LinearReLU": (
        lambda: fused.LinearReLU(6, 6, qconfig=config()),
        sample,
        ["0:relu[0]", "1:relu[0]"],
    ),
    "qat ConvReLU2d": (
        lambda: fused.ConvReLU2d(3, 4, 3, qconfig=config()),
        images,
        ["0:relu[0]", "1:relu[0]"],
    ),
    "qat ConvBnReLU2d": (
        lambda: fused.ConvBnReLU2d(3, 4, 3, qconfig=config()),
        images,
        ["0:relu[0]", "1:relu[0]"],
    ),
    "qat Linear": (lambda: QatLinear(6, 6, qconfig=config()), sample, ["1:relu[0]"]),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", LAYERS)
def test_activations_in_fused_layers_are_sites(name: str) -> None:
    make, inputs, sites = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.ReLU())
    native = fg.transform(copy.deepcopy(model), {"activations": None})
    x = inputs()
    for train in (True, False):
        original = copy.deepcopy(model).train(train)
        gm = copy.deepcopy(native).train(train)
        found = tell_apart(run(gm, x, restore=False), run(original, x, restore=False), identical)
        assert not found, found
    ruled = fg.transform(model, {"relu": fg.rules.scale(s=0.0)})
    assert [d.site.name for d in fg.report(ruled).decisions if d.action == "rewrite"] == sites
    leaf = x.clone().requires_grad_()
    ruled(leaf).sum().backward()
    assert leaf.grad is not None
    assert not leaf.grad.any()


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = quantizable.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "path"),
    [(lambda: quantizable.LSTM(6, 6), "0"), (Attends, "0.attention")],
    ids=["LSTM", "MultiheadAttention"],
)
def test_recurrence_and_attention_are_traced_into_or_listed(
    make: Callable[[], nn.Module], path: str
) -> None:
    model = nn.Sequential(make())
    plan = fg.explain(model, "straight_through")
    assert [note.path for note in plan.opaque] == [path]
    with pytest.raises(fg.PlanError, match=f"strict: .*not traced: {path}"):
        fg.explain(model, "straight_through", strict=True)


@pytest.mark.slow
def test_an_export_opens_them() -> None:
    for layer in (quantizable.LSTM(6, 6), Attends()):
        plan = fg.explain(
            nn.Sequential(layer), "straight_through", example_inputs=(torch.randn(3, 2, 6),)
        )
        assert {d.site.op for d in plan.decisions} & {"sigmoid", "softmax"}
        assert not plan.opaque


# --- all module classes of PyTorch ---


def module_classes() -> Iterator[type[nn.Module]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in (torch.nn, torch.ao.nn):
            for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
                try:
                    importlib.import_module(found.name)
                except ImportError:
                    continue
    pending, seen = [nn.Module], set[Any]()
    while pending:
        for kind in pending.pop().__subclasses__():
            if kind not in seen:
                seen.add(kind)
                pending.append(kind)
                if kind.__module__.startswith(("torch.nn.", "torch.ao.nn.")):
                    yield kind


def calls_an_activation(kind: type[nn.Module]) -> bool:
    """Whether the source of the `forward` of a class, or of what it calls on itself, names an activation."""
    names = {op.name for op in OPS.values() if op.groups} | {"_VF", "gates"}
    pending, seen = ["forward"], set[str]()
    while pending:
        name = pending.pop()
        function = inspect.unwrap(getattr(kind, name, None) or (lambda: None))
        if name in seen or not inspect.isfunction(function):
            continue
        seen.add(name)
        try:
            source = textwrap.dedent(inspect.getsource(function))
        except OSError:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Name | ast.Attribute):
                called = node.attr if isinstance(node, ast.Attribute) else node.id
                of_itself = (
                    isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self"
                )
                if called in names and not of_itself:
                    return True
                if of_itself:
                    pending.append(called)
    return False


SITELESS = {
    "_Orthogonal",  # a parametrization: the sign that it takes is of a decomposition
    "FloatFunctional",  # has no forward: its methods are traced
    "FXFloatFunctional",
    "QFunctional",
}


def test_every_class_of_pytorch_that_computes_activations_is_a_site_traced_or_listed() -> None:
    of_vocabulary = {kind for op in OPS.values() for kind in op.modules}
    wanted = [
        kind
        for kind in module_classes()
        if kind not in of_vocabulary and calls_an_activation(kind) and kind.__name__ not in SITELESS
    ]
    assert {"LSTM", "AdaptiveLogSoftmaxWithLoss", "ConvReLU2d", "MultiheadAttention"} <= {
        kind.__name__ for kind in wanted
    }
    unlisted = []
    for kind in wanted:
        root = nn.Module()
        root.part = object.__new__(kind)
        nn.Module.__init__(root.part)
        graph = torch.fx.Graph()
        graph.call_module("part", (graph.placeholder("x"),))
        if not find_opaque(graph, root):
            unlisted.append(kind)
    assert not unlisted
