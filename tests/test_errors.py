"""Which name an error suggests for an unknown one, and when it suggests none."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
import torch
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
    none = " No valid name is similar." if len(valid) > 12 else ""
    assert f"unknown name {given!r}.{none} Valid: " in unknown("name", given, valid)


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


def test_completion_shows_public_names_alone() -> None:
    assert set(dir(fg)) == {*fg.__all__, "__version__"}
    spaces = [getattr(fg, name) for name in fg.__all__ if inspect.ismodule(getattr(fg, name))]
    spaces.remove(fg.core)  # exports nothing of its own
    assert all(dir(space) == sorted(space.__all__) for space in spaces)


def test_of_many_names_some_are_listed_with_the_code_that_returns_all() -> None:
    names = [f"name{number:02}" for number in range(12)]
    assert f"Valid: {', '.join(names)}." in unknown("x", "y", names, everything="all_of_them()")
    text = unknown("x", "thing", [*names, "things", "nothing"], "Look.", everything="all_of_them()")
    assert text.startswith(
        "unknown x 'thing'. Did you mean 'things'? Valid: things, nothing, name00, "
    )
    assert text.endswith(", name07, and 4 more: all_of_them(). Look.")
    text = unknown("x", "oth", [*names, "others"])
    assert text.startswith("unknown x 'oth'. No valid name is similar. Valid: others, name00, ")
    assert text.endswith("name08, and 3 more.")


@pytest.mark.parametrize(
    "call",
    [
        lambda: fg.get("sprinkle"),
        lambda: fg.on("sprinkle"),
        lambda: fg.list_rules(op="sprinkle"),
        lambda: fg.RuleTable.of({"sprinkle": "scale"}),
        lambda: fg.on("relu", forward="sprinkle"),
        lambda: fg.on(type="torch.nn.Sprinkle"),
        lambda: fg.plot_rule("scale", op="sprinkle"),
    ],
)
def test_the_code_that_an_error_names_returns_all_names(call: Callable[[], object]) -> None:
    with pytest.raises((fg.RuleError, fg.TableError)) as caught:
        call()
    message = str(caught.value)
    assert len(message) < 900, message
    found = re.search(r"Valid: (.*), and (\d+) more: (.*?\))\.( |$)", message)
    assert found, message
    listed = found[1].split(", ")
    spaces = {"freegrad_fx": fg, "torch": torch}
    returned = [name for code in found[3].split(" and ") for name in eval(code, spaces)]
    assert {name.removeprefix("torch.nn.") for name in listed} <= {*returned, "params", "all"}
    assert int(found[2]) + len(listed) <= len(returned) + 2  # and these two
