"""Parameters of rules after the transform: which value acts, which is reported, and how to set it.

The expected gradients are computed by hand: at x > 0, `scale(s)` multiplies the gradient by s.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.errors import PlanError, RuleError


def gradient(model: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    x = torch.ones(1, dtype=dtype, requires_grad=True)
    model(x).backward()
    assert x.grad is not None
    return x.grad.item()


def reported(model: nn.Module) -> list[Any]:
    return [float(d.rules[0].bound["s"]) for d in fg.report(model).decisions]


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def scaled(s: Any, **options: Any) -> Any:
    return fg.transform(nn.Sequential(nn.ReLU()), {"relu": fg.rules.scale(s=s)}, **options)


EXPORTED: dict[str, Any] = {"symbolic": {}, "export": {"example_inputs": (torch.ones(1),)}}


# --- the caller's tensor ---


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", EXPORTED)
@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda gm: gm.double(), torch.double),
        (lambda gm: gm.to(torch.bfloat16), torch.bfloat16),
        (lambda gm: gm.to("cpu", torch.double), torch.double),
        (lambda gm: gm.to_empty(device="cpu"), torch.float32),
        (lambda gm: nn.Sequential(gm).double(), torch.double),
        (lambda gm: gm.load_state_dict({}), torch.float32),
        (lambda gm: gm.share_memory(), torch.float32),
    ],
)
def test_it_stays_in_force_if_the_model_is_converted(
    way: str, convert: Callable[[Any], Any], dtype: torch.dtype
) -> None:
    s = torch.tensor(2.0)
    gm = scaled(s, **EXPORTED[way])
    convert(gm)
    assert gradient(gm, dtype) == 2.0
    s.fill_(5.0)
    assert gradient(gm, dtype) == 5.0
    assert reported(gm) == [5.0]
    assert gm.rule_parameter_0 is s


def test_a_tensor_with_dimensions_follows_the_dtype() -> None:
    s = torch.tensor([2.0, 3.0])
    gm = scaled(s).half()
    x = torch.ones(2, dtype=torch.half, requires_grad=True)
    gm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 3.0]


def test_a_copy_refuses_where_the_original_tensor_has_changed() -> None:
    s = torch.tensor(2.0)
    gm = scaled(s)
    copied = copy.deepcopy(gm)
    again = copy.deepcopy({"model": copied})["model"].double()
    assert gradient(copied) == gradient(gm) == 2.0
    s.fill_(5.0)
    assert gradient(gm) == 5.0
    with pytest.raises(RuleError, match=r"'s' of rule 'scale' at site '0:relu\[0\]' has changed"):
        gradient(copied)
    with torch.no_grad():
        copied(torch.ones(1))  # no rule acts
    assert gradient(again, torch.double) == 2.0  # a copy of the copy, whose tensor has not changed
    assert reported(copied) == [2.0]
    copied.set_rule_parameter(s=5.0)
    assert gradient(copied) == 5.0
    assert reported(copied) == [5.0]
    with pytest.raises(RuleError, match="since this model was copied"):
        gradient(again, torch.double)


def test_a_tensor_of_the_model_is_copied_with_the_model() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("slope", torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x)

    model = Model()
    gm: Any = fg.transform(model, {"relu": fg.rules.scale(s=model.slope)})
    copied = copy.deepcopy(gm)
    model.slope.fill_(3.0)
    assert (gradient(gm), gradient(copied)) == (3.0, 2.0)
    gm.load_state_dict({"slope": torch.tensor(7.0)}, assign=True)
    assert gradient(gm) == 7.0
    assert reported(gm) == [7.0]


@pytest.mark.parametrize("compose", [False, True])
def test_a_change_between_forward_and_backward_names_the_parameter(compose: bool) -> None:
    s = torch.tensor(2.0)
    rule: Any = fg.rules.scale(s=s)
    rule = fg.compose("straight_through", rule) if compose else rule
    gm = fg.transform(nn.Sequential(nn.ReLU()), {"relu": rule})
    x = torch.ones(1, requires_grad=True)
    y = gm(x)
    s.fill_(3.0)
    with pytest.raises(RuleError, match=r"'s' of rule 'scale' at site '0:relu\[0\]' was changed"):
        y.backward()


def test_another_change_keeps_pytorch_s_error() -> None:
    gm = fg.transform(
        nn.Sequential(nn.ReLU()), {"relu": fg.rules.fast_sigmoid(slope=torch.tensor(1.0))}
    )
    leaf = torch.ones(1, requires_grad=True)
    x = leaf * 1
    y = gm(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --- a tensor that requires a gradient ---


def test_a_parameter_is_warned_of() -> None:
    rule = fg.rules.scale(s=nn.Parameter(torch.tensor(2.0)))
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    with pytest.warns(fg.FreegradWarning, match="'s' of rule 'scale' requires a gradient") as found:
        fg.transform(model, {"relu": rule})
    assert len(found) == 1
    with pytest.raises(PlanError, match="requires a gradient"):
        fg.transform(model, {"relu": rule}, strict=True)
    with pytest.warns(fg.FreegradWarning, match="requires a gradient"):
        fg.use(rule)
    with pytest.warns(fg.FreegradWarning, match="requires a gradient"):
        fg.compile(model, {"relu": rule}, backend="eager")(torch.ones(1, requires_grad=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fg.transform(model, {"relu": fg.rules.scale(s=torch.tensor(2.0))})


def test_a_parameter_that_the_model_learns_is_not_warned_of() -> None:
    class Sloped(nn.Module):
        def __init__(self, uses: bool) -> None:
            super().__init__()
            self.slope, self.uses = nn.Parameter(torch.tensor(2.0)), uses

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x) * (self.slope if self.uses else 2.0)

    def build(model: Sloped) -> None:
        table = {"relu": fg.rules.scale(s=model.slope)}
        fg.transform(model, table)
        fg.transform(model, table, example_inputs=(torch.ones(2),))
        fg.compile(model, table, backend="eager")(torch.ones(2, requires_grad=True))

    with warnings.catch_warnings():
        warnings.simplefilter("error", fg.FreegradWarning)
        build(Sloped(uses=True))
    with pytest.warns(fg.FreegradWarning, match="requires a gradient") as found:
        build(Sloped(uses=False))
    assert sum(issubclass(w.category, fg.FreegradWarning) for w in found) == 3


# --- set_rule_parameter ---

KINDS: dict[str, Callable[[], Any]] = {
    "a number": lambda: 2.0,
    "a tensor": lambda: torch.tensor(2.0),
}
STAGES: dict[str, Callable[[Any], Any]] = {
    "transformed": lambda gm: gm,
    "copied": copy.deepcopy,
    "shallow": copy.copy,
    "loaded": saved_and_loaded,
    "loaded and copied": lambda gm: copy.deepcopy(saved_and_loaded(gm)),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", EXPORTED)
def test_it_acts_at_every_stage(kind: str, stage: str, way: str) -> None:
    gm = STAGES[stage](scaled(KINDS[kind](), **EXPORTED[way]))
    assert gm.set_rule_parameter(s=3.0) is gm
    assert gradient(gm) == 3.0
    assert reported(gm) == [3.0]
    gm.set_rule_parameter("0:relu[0]", s=torch.tensor(4.0))
    assert gradient(gm) == 4.0
    later = saved_and_loaded(copy.deepcopy(gm))
    assert gradient(later) == 4.0
    assert reported(later) == [4.0]


def test_a_copy_is_set_alone() -> None:
    gm = scaled(torch.tensor(2.0))
    copied = copy.deepcopy(gm)
    copied.set_rule_parameter(s=3.0)
    assert (gradient(gm), gradient(copied)) == (2.0, 3.0)


@pytest.mark.parametrize(("kind", "expected"), [("a tensor", 1), ("a number", 2)])
def test_a_tensor_is_set_without_recompilation(kind: str, expected: int) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    gm = scaled(KINDS[kind]())
    compiled = torch.compile(gm, backend=backend, fullgraph=True)
    assert gradient(compiled) == 2.0
    gm.set_rule_parameter(s=3.0)
    assert gradient(compiled) == 3.0
    assert len(graphs) == expected


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.act = nn.Linear(1, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.act(self.f(x)) + self.act(x))


def values(gm: nn.Module) -> dict[str, Any]:
    return {
        d.site.name: [dict(rule.bound) for rule in d.rules]
        for d in fg.report(gm).decisions
        if d.action == "rewrite"
    }


def test_sites_are_selected_by_name_pattern_op_entry_and_rule() -> None:
    chain = fg.compose(fg.rules.scale(s=1.0), fg.rules.clip_value(max_value=1.0))
    rules = {"relu": fg.rules.scale(s=1.0), "tanh": chain, "params": fg.rules.scale(s=1.0)}

    def changed(*sites: str, **given: Any) -> set[str]:
        gm = fg.transform(Net(), rules)
        before = values(gm)
        after = values(gm.set_rule_parameter(*sites, **given))
        return {name for name, bound in after.items() if bound != before[name]}

    relus, tanh, params = {"act:relu[0]", "act:relu[1]"}, {"<root>:tanh[0]"}, {"f.weight", "f.bias"}
    assert changed(s=2.0) == relus | tanh | params
    assert changed("act:relu[1]", s=2.0) == {"act:relu[1]"}
    assert changed("act:*", s=2.0) == changed("relu", s=2.0) == relus
    assert changed("*.weight", s=2.0) == {"f.weight"}
    assert changed("params", s=2.0) == params
    assert changed(max_value=0.5) == changed("tanh", rule="clip_value", max_value=0.5) == tanh
    gm = fg.transform(Net(), rules).set_rule_parameter("tanh", s=3.0, max_value=0.25)
    assert values(gm)["<root>:tanh[0]"] == [{"s": 3.0}, {"max_value": 0.25}]


class TwoModes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) if self.training else torch.relu(x * 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_graphs_of_all_modes_are_set(kind: str) -> None:
    gm = fg.transform(TwoModes(), {"relu": fg.rules.scale(s=KINDS[kind]())})
    assert len(gm.variants) == 2
    gm.set_rule_parameter(s=3.0)
    assert gradient(gm.train()) == gradient(gm.eval()) == 3.0


def test_what_cannot_be_set_is_refused_and_nothing_is_changed() -> None:
    shared = torch.tensor(2.0)
    gm = fg.transform(
        nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Sigmoid()),
        {
            "relu": fg.rules.scale(s=shared),
            "tanh": fg.rules.scale(s=shared),
            "sigmoid": fg.rules.rectangular(a=-1.0, b=1.0),
        },
    )
    before = str(fg.report(gm))
    for sites, given, error, text in (
        ("gelu", {"s": 1.0}, PlanError, r"no site matches 'gelu'; .* 0:relu\[0\] \(scale\)"),
        ("sigmoid", {"s": 1.0}, RuleError, "unknown parameter .* 'sigmoid': 's'"),
        ("relu", {"s": 1.0}, RuleError, r"also used at '1:tanh\[0\]'"),
        ("*", {"s": torch.ones(3)}, RuleError, r"of shape \[\], got one of shape \[3\]"),
        ("*", {"s": "large"}, TypeError, "must be float"),
        ("*", {"s": torch.tensor(float("nan"))}, RuleError, "for parameter 's' .* holds NaN"),
        ("*", {"s": torch.tensor(1j)}, TypeError, "must be real, got a tensor of torch.complex64"),
        ("sigmoid", {"a": torch.tensor([0.0, float("nan")])}, RuleError, "holds NaN"),
        ("sigmoid", {"a": 2.0}, RuleError, "requires a <= b"),
    ):
        with pytest.raises(error, match=text):
            gm.set_rule_parameter(sites, **given)  # type: ignore[arg-type]
    assert str(fg.report(gm)) == before
    gm.set_rule_parameter(rule="scale", s=3.0)
    assert shared.item() == 3.0


def test_an_outer_model_sets_what_is_inside() -> None:
    inner = scaled(torch.tensor(2.0))
    outer: Any = fg.transform(nn.Sequential(inner), {"relu": None})
    outer.set_rule_parameter("*relu*", s=3.0)
    assert gradient(outer) == 3.0


def test_sites_are_text() -> None:
    gm = fg.transform(nn.Sequential(nn.ReLU()), {"relu": fg.rules.scale(s=2.0)})
    for sites in (["relu"], None, 3):
        with pytest.raises(TypeError, match="takes the sites as text"):
            gm.set_rule_parameter(sites, s=3.0)  # type: ignore[arg-type]
