"""What a user may ask for, what takes precedence, what the report says, and what is refused with which words."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.vocabulary import GROUPS


class Swish(nn.Module):
    """An activation of the user's own; inside it is one of the vocabulary."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Net(nn.Module):
    """Every kind of site: modules and functions of three groups, of none, and a custom class."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.relu, self.gelu, self.swish = nn.ReLU(inplace=True), nn.GELU(), Swish()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = F.relu(self.second(x)) + self.gelu(x)
        x = self.swish(x).clamp(min=-1.0)
        return torch.round(x) + F.softmax(x, dim=-1)


SITES = [
    "relu:relu[0]",
    "<root>:relu[0]",
    "gelu:gelu[0]",
    "swish:sigmoid[0]",
    "<root>:clamp[0]",
    "<root>:round[0]",
    "<root>:softmax[0]",
]


def decided(model: nn.Module, rules: Any) -> dict[str, str]:
    """For every site the rules that it gets."""
    return {
        d.site.name: "native" if d.action == "native" else " → ".join(r.name for r in d.rules)
        for d in fg.explain(model, rules).decisions
    }


# --- what selects what ---


def test_sites_are_named_by_path_op_and_call_in_execution_order() -> None:
    assert list(decided(Net(), "scale")) == SITES


def test_every_use_of_a_module_is_a_site_of_its_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.act(x) + 1).relu() + F.relu(x)

    assert list(decided(Twice(), "scale")) == [
        "act:relu[0]",
        "act:relu[1]",
        "<root>:relu[0]",
        "<root>:relu[1]",
    ]


ACTIVATIONS = {"relu:relu[0]", "<root>:relu[0]", "gelu:gelu[0]", "swish:sigmoid[0]"}


@pytest.mark.parametrize(
    "rules", ["scale", fg.rules.scale, fg.compose("scale"), {"activations": "scale"}], ids=repr
)
def test_one_rule_is_for_the_group_of_activations(rules: Any) -> None:
    got = {site for site, rule in decided(Net(), rules).items() if rule == "scale"}
    assert got == ACTIVATIONS


@pytest.mark.parametrize(
    ("key", "sites"),
    [
        ("activations", ACTIVATIONS),
        ("softmax", {"<root>:softmax[0]"}),
        ("quantizers", {"<root>:round[0]"}),
        ("relu", {"relu:relu[0]", "<root>:relu[0]"}),
        ("clamp", {"<root>:clamp[0]"}),
        ("sigmoid", {"swish:sigmoid[0]"}),
        (nn.ReLU, {"relu:relu[0]"}),
        (nn.GELU, {"gelu:gelu[0]"}),
        (Swish, {"swish:Swish[0]"}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_key_selects(key: Any, sites: set[str]) -> None:
    got = {site for site, rule in decided(Net(), {key: "scale"}).items() if rule == "scale"}
    assert got == sites


class Family(nn.Module):
    """One call of each op of a group."""

    def __init__(self, ops: list[str]) -> None:
        super().__init__()
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        calls = {
            "softmax": lambda x: x.softmax(-1),
            "log_softmax": lambda x: x.log_softmax(-1),
            "softmin": lambda x: F.softmin(x, -1),
            "binarize": fg.vocabulary.binarize,
            "ternarize": fg.vocabulary.ternarize,
            "quantize": fg.vocabulary.quantize,
            "dorefa": fg.vocabulary.dorefa,
        }
        return sum(calls.get(op, lambda x, op=op: getattr(torch, op)(x))(x) for op in self.ops)


@pytest.mark.parametrize("group", ["softmax", "quantizers"])
def test_a_group_gives_its_rule_to_each_of_its_ops(group: str) -> None:
    ops = sorted(GROUPS[group])
    model = Family(ops)
    gm = fg.transform(model, {group: "straight_through"})
    x = torch.randn(3, 5, requires_grad=True)
    y = gm(x)
    assert torch.equal(y, model(x))
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 5), float(len(ops))))
    with pytest.warns(fg.FreegradWarning, match="'activations' matches nothing"):
        gm = fg.transform(model, "scale")
    assert {d.action for d in fg.report(gm).decisions} == {"native"}


def test_an_op_of_a_group_that_has_its_name_can_be_excepted() -> None:
    model = Family(["softmax", "log_softmax", "softmin"])
    got = decided(model, {"softmax": "scale", "log_softmax": "reverse", "softmin": None})
    assert got == {
        "<root>:softmax[0]": "scale",
        "<root>:log_softmax[0]": "reverse",
        "<root>:softmin[0]": "native",
    }


# --- precedence: a class before an op, an op before a group, whatever the order of the dict ---


def in_both_orders(rules: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
    yield rules
    yield dict(reversed(rules.items()))


@pytest.mark.parametrize(
    ("rules", "module", "function"),
    [
        ({nn.ReLU: "reverse", "relu": "scale"}, "reverse", "scale"),
        ({nn.ReLU: "reverse", "activations": "scale"}, "reverse", "scale"),
        ({"relu": "reverse", "activations": "scale"}, "reverse", "reverse"),
        ({nn.ReLU: "guided", "relu": "reverse", "activations": "scale"}, "guided", "reverse"),
        ({nn.ReLU: None, "relu": "scale"}, "native", "scale"),
        ({nn.ReLU: None, "activations": "scale"}, "native", "scale"),
        ({"relu": None, "activations": "scale"}, "native", "native"),
        ({nn.ReLU: "scale", "relu": None}, "scale", "native"),
        ({"relu": "scale", "activations": None}, "scale", "scale"),
    ],
    ids=repr,
)
def test_the_more_specific_entry_decides(rules: dict[Any, Any], module: str, function: str) -> None:
    for ordered in in_both_orders(rules):
        got = decided(Net(), ordered)
        assert (got["relu:relu[0]"], got["<root>:relu[0]"]) == (module, function)


def test_of_two_classes_the_first_in_the_dict_decides() -> None:
    class Special(nn.ReLU):
        pass

    model = nn.Sequential(nn.ReLU(), Special())
    got = decided(model, {Special: "scale", nn.ReLU: "reverse"})
    assert got == {"0:relu[0]": "reverse", "1:Special[0]": "scale"}
    with pytest.warns(fg.FreegradWarning, match="'Special' has no effect: the entry 'ReLU' comes"):
        plan = fg.explain(model, {nn.ReLU: "reverse", Special: "scale"})
    assert [d.rules[0].name for d in plan.decisions] == ["reverse", "reverse"]
    assert "Entry 2, 'Special': no site; 1 matched, all decided by entry 1." in str(plan)


def test_none_keeps_the_native_backward_bit_for_bit() -> None:
    model = Net()
    gm = fg.transform(model, {"activations": None})
    x, grads = torch.randn(3, 4), []
    for module in (model, gm):
        loss = module(x).square().sum()
        grads.append(torch.autograd.grad(loss, list(module.parameters())))
    assert all(map(torch.equal, *grads))
    assert all("decoupled" not in node.name for node in gm.graph.nodes)


def test_a_table_can_be_made_once_and_used_again() -> None:
    table = fg.RuleTable.of({"relu": "scale"})
    assert fg.RuleTable.of(table) is table
    assert fg.explain(Net(), table) == fg.explain(Net(), {"relu": "scale"})
    assert table == fg.RuleTable.of({"relu": fg.rules.scale(s=1.0)})


def test_an_empty_dict_asks_for_nothing() -> None:
    assert set(decided(Net(), {}).values()) == {"native"}


# --- a class of the user's ---


class Spike(nn.Module):
    """Has control flow that no trace follows, two arguments and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        if x.sum() > 1e9:
            return x
        return torch.relu(x - self.threshold) * scale


class Spiking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.spike = nn.Linear(4, 4), Spike()

    def forward(self, x: Tensor) -> Tensor:
        return self.spike(self.linear(x), 2.0) + self.spike(x=x)


def test_a_class_of_the_user_s_is_a_site_as_a_whole() -> None:
    model = Spiking()
    gm = fg.transform(model, {Spike: fg.rules.scale(s=3.0)})
    decisions = fg.report(gm).decisions
    assert [d.site.name for d in decisions] == ["spike:Spike[0]", "spike:Spike[1]"]
    assert not fg.report(gm).opaque
    x, grad = torch.randn(2, 5, 4)
    x.requires_grad_()
    y = gm(x)
    assert torch.equal(y, model(x))
    natural = torch.autograd.grad(model(x), model.spike.threshold, grad)
    to_x, to_bias, to_threshold = torch.autograd.grad(
        y, [x, gm.linear.bias, gm.spike.threshold], grad
    )
    assert torch.equal(to_threshold, natural[0])
    torch.testing.assert_close(to_x, (3 * grad) @ model.linear.weight + 3 * grad)
    torch.testing.assert_close(to_bias, (3 * grad).sum(0))


def test_without_its_class_named_it_is_kept_whole_and_reported() -> None:
    with pytest.warns(fg.FreegradWarning, match="'activations' matches nothing"):
        gm = fg.transform(Spiking(), "scale")
    (opaque,) = fg.report(gm).opaque
    assert opaque.path == "spike"
    assert "Spike, kept as one opaque call" in opaque.what
    assert source_of(Spike, "if x.sum()") == opaque.source
    assert f"Opaque: {opaque}" in str(fg.report(gm))
    with pytest.raises(
        fg.PlanError, match=r"strict: .*not traced: spike: Spike, kept as one opaque call"
    ):
        fg.transform(Spiking(), "scale", strict=True)


def test_a_class_that_is_named_is_not_looked_into() -> None:
    with pytest.warns(fg.FreegradWarning, match="'sigmoid' matches nothing"):
        got = decided(Net(), {Swish: "scale", "sigmoid": "reverse", "relu": None})
    assert got["swish:Swish[0]"] == "scale"
    assert "swish:sigmoid[0]" not in got


# --- another forward ---


def test_a_forward_can_be_replaced_and_the_report_says_so_loudly() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2), nn.Sigmoid())
    rule = fg.rules.fast_sigmoid(slope=5.0, forward="heaviside")
    gm = fg.transform(model, {"relu": rule})
    x = torch.randn(6, 4)
    hidden = model[0](x)
    expected = model[3](model[2]((hidden > 0).float()))
    assert torch.equal(gm(x), expected)
    assert not torch.equal(gm(x), model(x))

    grad = torch.randn(6, 2)
    (actual,) = torch.autograd.grad(gm(x), gm.get_parameter("0.bias"), grad)
    inner = (grad * expected * (1 - expected)) @ model[2].weight
    torch.testing.assert_close(actual, (inner / (1 + 5 * hidden.abs()) ** 2).sum(0))

    plan = fg.report(gm)
    text = str(plan)
    assert "THE FORWARD IS CHANGED at 1 site, to heaviside." in text
    assert "fast_sigmoid(slope=5.0), FORWARD heaviside" in text
    assert "THE FORWARD IS CHANGED" in plan._repr_html_()
    assert [d.forward for d in plan.decisions] == ["heaviside", None]
    assert [s["forward"] for s in plan.to_dict()["sites"]] == ["heaviside", None]


def test_without_a_replacement_nothing_is_loud() -> None:
    assert "FORWARD" not in str(fg.explain(Net(), "scale"))


@pytest.mark.parametrize(
    "module", [nn.ReLU(True), nn.PReLU(), nn.Softmax(-1), Swish()], ids=lambda m: type(m).__name__
)
def test_a_replacement_forward_needs_the_input_alone(module: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(3, 3), module)
    gm = fg.transform(model, {type(module): fg.rules.d_linear(forward="tanh")})
    x = torch.randn(5, 3)
    assert torch.equal(gm(x), model[0](x).tanh())
    assert list(gm.state_dict()) == list(model.state_dict())


def test_one_part_of_a_composition_may_name_the_forward() -> None:
    rule = fg.compose(fg.rules.clip_value(max_value=0.5), fg.rules.d_linear(forward="sign"))
    gm = fg.transform(nn.ReLU(), rule)
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    assert gm(x).tolist() == [-1, 0, 1]
    gm(x).backward(torch.tensor([3.0, 0.25, -3.0]))
    assert x.grad.tolist() == [0.5, 0.25, -0.5]


def test_a_rule_of_the_output_sees_the_replaced_output() -> None:
    fg.register("by_output")(lambda grad, y: grad * y)
    gm = fg.transform(nn.ReLU(), fg.get("by_output")(forward="sigmoid"))
    x = torch.randn(5, requires_grad=True)
    gm(x).sum().backward()
    assert torch.equal(x.grad, x.detach().sigmoid())


def test_an_unknown_forward_is_answered_with_the_closest_first() -> None:
    words = "unknown forward 'heavyside'. Did you mean 'heaviside'? Valid: heaviside, "
    with pytest.raises(fg.TableError, match=words.replace("?", r"\?")):
        fg.RuleTable.of({"gelu": fg.rules.arctan(forward="heavyside")})


@pytest.mark.parametrize("forward", ["prelu", "threshold", "softmax", "clamp", "glu"])
def test_what_needs_more_than_an_input_or_changes_the_shape_is_no_replacement(forward: str) -> None:
    with pytest.raises(fg.PlanError, match=f"unknown forward '{forward}'"):
        fg.transform(nn.ReLU(), fg.rules.scale(forward=forward))


def test_a_replacement_that_keeps_the_shape_is_refused_where_the_shape_changes() -> None:
    fg.register("halves", keeps_shape=False)(lambda grad: torch.cat([grad, grad], -1))
    model = nn.GLU()
    with pytest.raises(fg.PlanError, match="forward='tanh' keeps the shape, but glu changes it"):
        fg.transform(model, {"glu": fg.get("halves")(forward="tanh")})
    gm = fg.transform(model, {"glu": "halves"})
    x, grad = torch.randn(3, 4, requires_grad=True), torch.randn(3, 2)
    gm(x).backward(grad)
    assert torch.equal(x.grad, torch.cat([grad, grad], -1))


# --- what the table refuses ---


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("rellu", "relu"),
        ("ReLU", "relu"),
        ("leakyrelu", "leaky_relu"),
        ("activation", "activations"),
    ],
)
def test_an_unknown_op_is_answered_with_the_closest_first(key: str, meant: str) -> None:
    with pytest.raises(fg.PlanError) as error:
        fg.transform(Net(), {key: "scale"})
    message = str(error.value)
    assert f"unknown op or group {key!r}. Did you mean {meant!r}? Valid: {meant}, " in message
    assert (
        "list(freegrad_fx.vocabulary.OPS) and list(freegrad_fx.vocabulary.GROUPS). The groups among them: "
        in message
    )
    assert all(name in message for name in GROUPS)


@pytest.mark.parametrize(
    "key",
    ["layer4.*", "", 3, None, F.relu, torch.relu, int, nn.ReLU(), functools.partial(F.relu)],
    ids=["path", "empty", "number", "None", "F.relu", "torch.relu", "int", "nn.ReLU()", "partial"],
)
def test_what_is_no_op_group_or_class_is_no_key(key: Any) -> None:
    with pytest.raises(
        fg.PlanError, match=r"unknown op or group .*A key has to be an op, a group, or a cl"
    ):
        fg.transform(Net(), {key: "scale"})


def test_an_unknown_rule_in_a_table_is_answered_with_the_closest_first() -> None:
    for rules in ("rectanguler", {"relu": "rectanguler"}):
        with pytest.raises(fg.RuleError, match=r"unknown rule 'rectanguler'\. Did you mean 'rect"):
            fg.transform(Net(), rules)


def plain_function(grad: Tensor, x: Tensor) -> Tensor:
    return grad


@pytest.mark.parametrize(
    "rule", [3, 1.0, True, plain_function, nn.ReLU, nn.ReLU(), ["scale", "reverse"], b"scale"]
)
def test_what_is_no_rule_is_refused_with_the_remedy(rule: Any) -> None:
    for rules in (rule, {"relu": rule}):
        with pytest.raises(fg.RuleError) as error:
            fg.transform(Net(), rules)
        message = str(error.value)
        assert f"a rule has to be a name, a Rule or a composition, got {rule!r}" in message
        assert f"of type {type(rule).__name__}" in message
        assert "@freegrad_fx.register('name')" in message


def test_to_explain_a_model_without_rules_lists_its_sites() -> None:
    sites = [d.site for d in fg.explain(Net()).decisions]
    assert [s.name for s in sites if s.kind == "operation"] == SITES
    assert {s.name for s in sites if s.kind == "parameter"} == {
        n for n, _ in Net().named_parameters()
    }
    assert {d.action for d in fg.explain(Net()).decisions} == {"native"}


def test_a_rule_of_the_output_has_to_come_first() -> None:
    fg.register("by_output")(lambda grad, y: grad * y)
    with pytest.raises(fg.PlanError) as error:
        fg.transform(Net(), {"relu": fg.compose("scale", "by_output")})
    assert "rule 'by_output' needs the output y" in str(error.value)
    assert "must come first in the composition; at site relu:relu[0]" in str(error.value)
    fg.transform(Net(), {"relu": fg.compose("by_output", "scale")})


def test_nothing_of_the_model_is_changed_when_a_rule_is_refused() -> None:
    model = Net()
    before = state(model)
    for rules in ({"relu": fg.rules.scale(forward="no")}, {"relu": 3}, {"no": "scale"}):
        with pytest.raises((fg.RuleError, fg.PlanError)):
            fg.transform(model, rules)
    assert state(model) == before


# --- entries that match nothing ---


def test_an_entry_that_matches_nothing_warns_where_the_user_calls() -> None:
    for call in (fg.transform, fg.explain):
        with pytest.warns(fg.FreegradWarning) as caught:
            call(Net(), {"tanh": "scale", "relu": "scale"})
        (warning,) = caught
        assert str(warning.message) == (
            "the entry 'tanh' matches nothing in Net; the ops of the model are: "
            "clamp, gelu, relu, round, sigmoid, softmax"
        )
        assert Path(warning.filename).name == Path(__file__).name


def test_an_entry_that_matches_nothing_is_an_error_under_strict() -> None:
    for call in (fg.transform, fg.explain):
        with pytest.raises(fg.PlanError, match="strict: the entry 'tanh' matches nothing in Net"):
            call(Net(), {"tanh": "scale"}, strict=True)


def test_an_entry_that_is_overruled_everywhere_is_no_mistake_and_is_reported() -> None:
    model = nn.Sequential(nn.ReLU())
    gm = fg.transform(model, {"relu": "scale", "activations": "reverse"}, strict=True)
    assert fg.report(gm).unmatched == ()
    remark = "Entry 2, 'activations': no site; 1 matched, all decided by entry 1."
    assert remark in str(fg.report(gm))


def test_a_native_entry_that_matches_nothing_warns_too() -> None:
    with pytest.warns(fg.FreegradWarning, match="'tanh' matches nothing"):
        fg.transform(Net(), {"tanh": None, "relu": "scale"})


def test_a_model_without_activations_says_that_it_has_none() -> None:
    with pytest.warns(
        fg.FreegradWarning, match="matches nothing in Linear; the ops of the model are: none"
    ):
        gm = fg.transform(nn.Linear(2, 2), "scale")
    assert "Linear, 0 sites" in str(fg.report(gm))


def test_nothing_warns_and_strict_is_content_where_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fg.transform(Net(), {"relu": "scale", Swish: "scale", "clamp": None}, strict=True)


# --- what is no model that can be captured ---


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (nn.ReLU, "the class ReLU"),
        (F.relu, "function"),
        (None, "NoneType"),
        ({"relu": "scale"}, "dict"),
        (torch.ones(2), "Tensor"),
    ],
    ids=["class", "function", "None", "dict", "tensor"],
)
def test_what_is_no_module_is_refused(model: Any, got: str) -> None:
    for call in (fg.transform, fg.explain):
        with pytest.raises(TypeError, match=rf"an instance of nn\.Module, got {got}$"):
            call(model, "scale")


def test_a_compiled_model_is_refused_with_the_remedy() -> None:
    compiled = torch.compile(Net(), backend="eager")
    with pytest.raises(TypeError, match=r"already compiled.*transform\(compiled\._orig_mod"):
        fg.transform(compiled, "scale")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TorchScript's own
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_scripted_model_is_refused_with_the_remedy() -> None:
    for scripted in (torch.jit.script(nn.ReLU()), torch.jit.trace(nn.ReLU(), torch.ones(2))):
        with pytest.raises(TypeError, match=r"TorchScript.*Transform the original nn\.Module"):
            fg.transform(scripted, "scale")


def test_a_lazy_model_is_refused_until_it_has_run() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.ReLU())
    with pytest.raises(
        fg.CaptureError, match=r"'0\.weight' is not initialised yet.*Run the model onc"
    ):
        fg.transform(model, "scale")
    model(torch.randn(2, 5))
    fg.transform(model, "scale")


class BranchesOnValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x.relu()
        return x


class BranchesOnShapes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return x.relu()
        return x


class Iterates(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row.relu() for row in x])


class TakesTheLength(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu() * len(x)


class Leaves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy()).relu()


def helper(x: Tensor) -> float:
    return float(x.detach().relu().sum())


class CallsAHelper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * helper(x)


def source_of(thing: Any, code: str) -> str:
    """``file:line`` of a line of code in this file."""
    lines, first = inspect.getsourcelines(thing)
    (offset,) = (i for i, line in enumerate(lines) if code in line)
    return f"{inspect.getsourcefile(thing)}:{first + offset}"


@pytest.mark.parametrize(
    ("kind", "code", "where"),
    [
        (BranchesOnValues, "if x.sum() > 0:", BranchesOnValues),
        (BranchesOnShapes, "if x.shape[0] > 1:", BranchesOnShapes),
        (Iterates, "return torch.stack([row.relu() for row in x])", Iterates),
        (TakesTheLength, "return x.relu() * len(x)", TakesTheLength),
        (Leaves, "return torch.from_numpy(x.detach().numpy()).relu()", Leaves),
        (CallsAHelper, "return float(x.detach().relu().sum())", helper),
    ],
)
def test_a_model_that_cannot_be_traced_is_an_error_with_the_line_of_the_user_s_file(
    kind: type[nn.Module], code: str, where: Any
) -> None:
    for call in (fg.transform, fg.explain):
        with pytest.raises(fg.CaptureError) as error:
            call(kind(), "scale")
        message = str(error.value)
        assert message.startswith(f"{kind.__name__} cannot be captured: ")
        assert f"  at {source_of(where, code)}: {code}\n" in message
        assert "move that part into a submodule" in message
        assert "example_inputs" in message


@pytest.mark.parametrize("kind", [BranchesOnValues, TakesTheLength, CallsAHelper])
def test_below_the_root_it_is_kept_whole_and_the_rest_is_rewritten(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), kind(), nn.ReLU())
    gm = fg.transform(model, "scale")
    plan = fg.report(gm)
    assert [d.site.name for d in plan.with_action("rewrite")] == ["2:relu[0]"]
    (opaque,) = plan.opaque
    assert opaque.path == "1"
    assert opaque.source.startswith(str(inspect.getsourcefile(kind)))
    assert "Opaque: 1: " in str(plan)
    x = torch.randn(4, 3)
    assert torch.equal(gm(x), model(x))


# --- the plan and the report ---


def state(model: nn.Module) -> Any:
    """Everything that a call might change in a model."""
    modules = []
    for path, module in model.named_modules():
        attributes = {
            name: sorted(value) if isinstance(value, dict) else repr(value)
            for name, value in vars(module).items()
        }
        modules.append((path, id(module), type(module), attributes))
    tensors = [(name, id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()]
    return modules, tensors


@pytest.mark.parametrize("training", [True, False])
def test_explain_is_the_report_of_the_transform_and_leaves_the_model_untouched(
    training: bool,
) -> None:
    model = nn.Sequential(Net(), nn.Dropout(0.5), BranchesOnValues()).train(training)
    model[0].second.eval()
    rules = {"relu": fg.compose("scale", "rectangular"), Swish: "arctan", "softmax": None}
    before = state(model)
    plan = fg.explain(model, rules)
    assert state(model) == before
    report = fg.report(fg.transform(model, rules))
    assert state(model) == before
    assert plan == report
    assert str(plan) == str(report)
    assert plan.to_dict() == report.to_dict()


def test_the_report_in_words() -> None:
    rules = {
        "relu": fg.rules.rectangular(a=-1.0),
        "gelu": fg.compose("scale", "reverse"),
        "clamp": None,
    }
    plan = fg.report(fg.transform(Net(), rules))
    lines = str(plan).splitlines()
    assert lines[0] == "Net, 7 sites: 3 rewritten, 4 left native."
    (head,) = (line for line in lines if line.startswith("site "))
    table = lines[lines.index(head) + 2 :][:7]
    for row, (path, call, op, spelling, backward, code) in zip(
        table,
        [
            (
                "relu",
                "0",
                "relu",
                "nn.ReLU(inplace=True)",
                "rectangular(a=-1.0, b=0.5)",
                "self.relu(s",
            ),
            ("<root>", "0", "relu", "F.relu", "rectangular(a=-1.0, b=0.5)", "F.relu("),
            ("gelu", "0", "gelu", "nn.GELU()", "scale(s=1.0) → reverse(alpha=1.0)", "self.gelu(x)"),
            ("swish", "0", "sigmoid", "torch.sigmoid", "native: no entry matches", "x * torch.sig"),
            ("<root>", "0", "clamp", "Tensor.clamp", "native: clamp = None", ".clamp(min"),
            ("<root>", "0", "round", "torch.round", "native: no entry matches", "torch.round("),
            ("<root>", "0", "softmax", "F.softmax", "native: no entry matches", "F.softmax("),
        ],
        strict=True,
    ):
        cells = re.split(r"  +", row.strip())
        assert cells[:3] == [f"{path}:{op}[{call}]", spelling, backward]
        line = source_of(Swish if path == "swish" else Net.forward, code).rpartition(":")[2]
        assert cells[3].endswith(f"{Path(__file__).name}:{line}")
    remarks = lines[lines.index(table[-1]) + 1 :]
    assert [line for line in remarks if line] == [
        "Entry 1, 'relu': 2 sites.",
        "Entry 2, 'gelu': 1 site.",
        "Entry 3, 'clamp': 1 site.",
    ]
    assert not any(line.endswith(" ") for line in lines)


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.remarks: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open[-1] == "li":
            self.remarks.append(data)


def test_the_report_in_a_notebook_is_well_formed_and_says_the_same() -> None:
    plan = fg.explain(nn.Sequential(Net(), BranchesOnValues()), {"relu": "rectangular"})
    cells = _Cells()
    cells.feed(plan._repr_html_())
    cells.close()
    assert cells.open == []
    assert len(cells.rows) == 1 + 7
    assert cells.rows[2][:2] == ["0:relu[0]", "F.relu"]
    text = re.sub(r"\s+", " ", str(plan))
    for row in cells.rows:
        assert " ".join(cell for cell in row if cell) in text
    assert any("BranchesOnValues, kept as one opaque call" in remark for remark in cells.remarks)


def test_the_root_is_shown_in_a_notebook_too() -> None:
    assert "&lt;root&gt;" in fg.explain(Net(), "scale")._repr_html_()


def test_the_report_is_plain_data_for_programs() -> None:
    class Stateful(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = [x]
            return x.relu()

    rules = {"relu": fg.compose("scale", fg.rules.centralize(dim=(0, 1))), "tanh": None}
    model = nn.Sequential(Net(), BranchesOnValues(), Stateful())
    with pytest.warns(fg.FreegradWarning):
        plan = fg.explain(model, rules)
    data = plan.to_dict()
    assert json.loads(json.dumps(data)) == json.loads(json.dumps(plan.to_dict()))
    assert data["model"] == "Sequential"
    first = data["sites"][0]
    assert first["rules"] == [
        {"rule": "scale", "params": {"s": 1.0}},
        {"rule": "centralize", "params": {"dim": (0, 1)}},
    ]
    assert (first["path"], first["call"], first["op"]) == ("0.relu", 0, "relu")
    assert (first["kind"], first["action"], first["entry"]) == ("operation", "rewrite", 0)
    assert first["spelling"] == "nn.ReLU(inplace=True)"
    assert first["source"] == source_of(Net.forward, "self.relu(self.first(x))")
    assert [entry["hits"] for entry in data["entries"]] == [3, 0]
    assert [entry["rules"] for entry in data["entries"]] == [
        ["scale(s=1.0)", "centralize(dim=(0, 1))"],
        None,
    ]
    assert [opaque["path"] for opaque in data["opaque"]] == ["1"]


def test_a_plan_counts_its_hits() -> None:
    with pytest.warns(fg.FreegradWarning):
        plan = fg.explain(Net(), {"relu": "scale", "activations": "reverse", "tanh": None})
    assert dict(zip([e.selector for e in plan.table.entries], plan.hits, strict=True)) == {
        "relu": 2,
        "activations": 2,
        "tanh": 0,
    }
    assert [entry.selector for entry in plan.unmatched] == ["tanh"]
    assert "Entry 2, 'tanh': MATCHES NOTHING." in str(plan)
    assert [len(plan.with_action(a)) for a in ("rewrite", "native", "skip")] == [4, 3, 0]


def test_a_site_that_is_decoupled_already_is_skipped_with_the_reason() -> None:
    once = fg.transform(nn.Sequential(nn.ReLU(), nn.Tanh()), {"relu": "scale"})
    with pytest.warns(
        fg.FreegradWarning, match=r"site 0:relu\[0\] keeps its backward: already deco"
    ):
        twice = fg.transform(once, "reverse")
    plan = fg.report(twice)
    assert [d.action for d in plan.decisions] == ["skip", "rewrite"]
    assert "1 SKIPPED" in str(plan)
    assert "with the rule 'scale'" in str(plan)
    with pytest.raises(fg.PlanError, match="already decoupled"):
        fg.transform(once, "reverse", strict=True)


@pytest.mark.parametrize(
    "model",
    [nn.ReLU(), torch.fx.symbolic_trace(nn.ReLU()), None],
    ids=["untransformed", "traced", "None"],
)
def test_only_what_was_transformed_has_a_report(model: Any) -> None:
    with pytest.raises(
        TypeError, match=r"report\(\) takes the result of transform\(\) or compile\(\), "
    ):
        fg.report(model)


def test_a_second_trace_has_no_report_and_says_why() -> None:
    again = torch.fx.symbolic_trace(fg.transform(nn.ReLU(), "scale"))
    with pytest.raises(TypeError, match="A second trace of a transformed model keeps its rules"):
        fg.report(again)


# --- what a user is told ---


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        (fg.on("relu", module="blok.*"), r"sites of these ops include: paths"),
        (fg.on("relu", call=7), r"calls 0 to \d"),
        (fg.on("params", type="nn.Linear"), r"classes torch\.nn\.modules\.linear\.Linear"),
        (fg.on("relu", where=lambda site: False), r"`where` function returns False for every site"),
        (fg.on("tanh"), r"ops of the model are: clamp, "),
        (fg.on(parameter="*.wieght"), r"parameters of the model include: \w+\.weight"),
    ],
    ids=["module", "call", "type", "where", "op", "parameter"],
)
def test_an_entry_that_matches_nothing_is_told_what_there_is(entry: Any, told: str) -> None:
    with pytest.warns(fg.FreegradWarning, match=told):
        fg.explain(Net(), fg.RuleTable([entry.backward("scale")]))


@pytest.mark.parametrize("name", ["none", "None", "native", "null", None])
def test_no_rule_is_not_mistaken_for_a_misspelt_one(name: Any) -> None:
    with pytest.raises(fg.RuleError, match="To keep the native backward, use None in a table"):
        fg.get(name)


def test_a_rule_inside_is_told_of_where_a_table_wants_the_native_backward() -> None:
    inner = fg.transform(nn.Sequential(nn.ReLU()), "scale")
    (decision,) = fg.explain(nn.Sequential(inner), {"relu": None}).decisions
    assert decision.action == "native"
    assert "already decoupled, with the rule 'scale'" in decision.reason


def test_the_report_of_a_copy_shows_the_copy_s_tensor() -> None:
    schedule = torch.tensor(1.0)
    gm = fg.transform(nn.Sequential(nn.ReLU()), fg.rules.scale(s=schedule))
    copied = copy.deepcopy(gm)
    schedule.fill_(7.0)
    for model, value in ((gm, 7.0), (copied, 1.0)):
        (decision,) = fg.report(model).decisions
        shown = decision.rules[0].bound["s"]
        assert shown.item() == value
        assert any(shown is buffer for buffer in model.buffers())


def test_several_tensors_as_parameters_of_rules_stay_apart() -> None:
    first, second, third = torch.tensor(2.0), torch.tensor(3.0), torch.tensor(5.0)
    chain = fg.compose(fg.rules.scale(s=first), fg.rules.scale(s=second))
    gm = fg.transform(
        nn.Sequential(nn.Tanh(), nn.ReLU()), {"tanh": chain, "relu": fg.rules.scale(s=third)}
    )
    x = torch.ones(1, requires_grad=True)
    for model in (gm, copy.deepcopy(gm)):
        assert torch.autograd.grad(model(x), x)[0].item() == 2.0 * 3.0 * 5.0
    first.fill_(-1.0)
    assert torch.autograd.grad(gm(x), x)[0].item() == -1.0 * 3.0 * 5.0


def test_the_report_of_a_wrapped_model_is_that_of_the_model() -> None:
    gm = fg.transform(Net(), "scale")
    for wrapped in (torch.compile(gm, backend="eager"), nn.DataParallel(gm)):
        assert fg.report(wrapped) is fg.report(gm)


class Holder(nn.Module):
    """Holds a part under the name that PyTorch's wrappers give to what they wrap."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.module(x))


def test_a_model_whose_only_part_is_called_module_has_its_own_report() -> None:
    gm = fg.transform(Holder(module=nn.ReLU()), "scale")
    assert [d.site.name for d in fg.report(gm).decisions] == ["module:relu[0]", "<root>:tanh[0]"]


def test_the_report_of_a_part_is_not_that_of_a_model_with_other_parts() -> None:
    gm = fg.transform(nn.Sequential(nn.ReLU()), "scale")
    for model in (Holder(module=gm, head=nn.Tanh()), nn.Sequential(gm), Holder(module=nn.ReLU())):
        with pytest.raises(TypeError, match=f"got {type(model).__name__}"):
            fg.report(model)


class Fires(torch.autograd.Function):
    pass


def surrogate(slope: float) -> Any:
    """What the factories of snnTorch do."""
    return lambda x: Fires.apply(x, slope)


@pytest.mark.parametrize("key", [surrogate(2.0), surrogate, Fires.apply])
def test_a_function_as_key_is_told_the_class_that_it_applies(key: Any) -> None:
    with pytest.raises(fg.TableError, match=rf"applies Fires; name that class: {{{__name__}.Fires"):
        fg.use({key: "fast_sigmoid"})
