"""Which name an error suggests for an unknown one, and when it suggests none."""

from __future__ import annotations

import pytest
from torch import nn

import freegrad_fx as fg
from freegrad_fx.errors import close, unknown
from freegrad_fx.table.fields import OP_NAMES

# Without those that other tests register
RULES = tuple(
    name
    for name in fg.rules.available()
    if fg.get(name).function.__module__.startswith("freegrad_fx.")
)
FIELDS = ("op", "module", "type", "parameter", "call", "forward", "backward", "params")

RIGHT = {
    "rules": (
        RULES,
        {
            "atan": "arctan", "rect": "rectangular", "rectangle": "rectangular", "rectanguler": "rectangular",
            "triangle": "triangular", "reversal": "reverse", "scaled": "scale", "noize": "noise",
            "sigmoid": "sigmoid_derivative", "FastSigmoid": "fast_sigmoid", "clip_grad": "clip_norm",
            "clipvalue": "clip_value", "guided_backprop": "guided", "straight-through": "straight_through",
            "relu": "d(ReLU)", "linear": "d(Linear)", "centralise": "centralize", "quantize": "quantize_int8",
            "round": "stochastic_round", "topk": "top_k", "erf_gaussian": "gaussian",
        },
    ),
    "ops": (
        OP_NAMES,
        {
            "param": "params", "parameters": "params", "Relu": "relu", "ReLU6": "relu6", "LeakyReLU": "leaky_relu",
            "hard_swish": "hardswish", "swish": "hardswish", "gelu_new": "gelu", "logsoftmax": "log_softmax",
            "activation": "activations", "quantizer": "quantizers", "fake_quantize": "quantize", "sigmoid_": "sigmoid",
        },
    ),
    "fields": (
        FIELDS,
        {
            "modules": "module", "param": "params", "parameters": "parameter", "types": "type", "ops": "op",
            "backwards": "backward", "calls": "call",
        },
    ),
    "parameters": (("max_norm", "eps", "slope", "alpha"), {"maxnorm": "max_norm", "norm": "max_norm", "slop": "slope"}),
    "paths": (
        ("encoder.0.act", "encoder.1.act", "head.act"),
        {"encoder.0.akt": "encoder.0.act", "head_act": "head.act"},
    ),
}  # fmt: skip

NONE = [
    *((RULES, name) for name in ("lambda", "native", "none", "steps", "", "x")),
    *((OP_NAMES, name) for name in ("int4", "int8", "lstm", "fft", "act", "cumsum", "unfold", "steps", "layer4.*")),
    *((FIELDS, name) for name in ("rule", "layer", "weights", "where", "kind")),
    *((("a", "b"), name) for name in ("slope", "low")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("valid", "given", "meant"),
    [
        pytest.param(valid, given, meant, id=f"{kind}: {given}")
        for kind, (valid, cases) in RIGHT.items()
        for given, meant in cases.items()
    ],
)
def test_a_name_that_is_near_is_suggested(valid: tuple[str, ...], given: str, meant: str) -> None:
    assert close(given, sorted(valid))[:1] == [meant]
    assert f"unknown name {given!r}. Did you mean {meant!r}? Valid: {meant}" in unknown(
        "name", given, valid
    )


@pytest.mark.parametrize(("valid", "given"), NONE, ids=lambda v: v if isinstance(v, str) else "")
def test_where_nothing_is_near_nothing_is_suggested(valid: tuple[str, ...], given: str) -> None:
    assert close(given, sorted(valid)) == []
    assert f"unknown name {given!r}. Valid: " in unknown("name", given, valid)


@pytest.mark.parametrize(
    ("kind", "first"),
    [(nn.Conv1d, "torch.nn.modules.conv.Conv2d"), ("torch.nn.GELU", "torch.nn.modules")],
)
def test_an_entry_for_a_class_that_is_absent_names_the_classes_that_are_there(
    kind: type[nn.Module] | str, first: str
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1), nn.ReLU())
    table = fg.RuleTable([fg.on(type=kind).backward("scale")])
    with pytest.warns(fg.FreegradWarning, match=f"the classes of the model include: {first}"):
        fg.explain(model, table)


def test_a_misspelt_name_of_the_package_has_a_suggestion() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'rulse'. Did you mean 'rules'"):
        _ = fg.rulse
    with pytest.raises(AttributeError, match=r"no attribute 'zzz'$"):
        _ = fg.zzz
