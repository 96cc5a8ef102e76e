"""What a rule is: registration, declaration, binding, equality, pickling and composition."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from built_in import saved_by
from freegrad_fx.core import rule as rule_module

# --- declaring a rule ---


def args(grad: Tensor, *more: Tensor) -> Tensor:
    return grad


def keywords(grad: Tensor, **more: float) -> Tensor:
    return grad


def positional_default(grad: Tensor, slope: float = 1.0) -> Tensor:
    return grad


def x_with_a_default(grad: Tensor, x: Tensor | None = None) -> Tensor:
    return grad


def grad_with_a_default(grad: Tensor | None = None) -> Tensor:
    return grad


def positional_only(grad: Tensor, x: Tensor, /) -> Tensor:
    return grad


def unknown_input(grad: Tensor, z: Tensor) -> Tensor:
    return grad


def context_first(ctx: Any, grad: Tensor) -> Tensor:
    return grad


def input_first(x: Tensor, grad: Tensor) -> Tensor:
    return grad


def grad_twice_named(grad: Tensor, gradient: Tensor) -> Tensor:
    return grad


def keyword_only_grad(*, grad: Tensor) -> Tensor:
    return grad


def no_gradient(*, slope: float = 1.0) -> Tensor:
    return torch.zeros(1)


def nothing() -> Tensor:
    return torch.zeros(1)


def reserved_x(grad: Tensor, *, x: float = 1.0) -> Tensor:
    return grad


def reserved_y(grad: Tensor, *, y: float = 1.0) -> Tensor:
    return grad


def reserved_rule(grad: Tensor, *, rule: str = "") -> Tensor:
    return grad


def reserved_site(grad: Tensor, *, site: str = "") -> Tensor:
    return grad


def reserved_forward(grad: Tensor, *, forward: str = "") -> Tensor:
    return grad


@pytest.mark.parametrize(
    ("function", "culprit"),
    [
        (args, r"\*more"),
        (keywords, r"\*\*more"),
        (positional_default, "slope: 'float' = 1.0"),
        (x_with_a_default, "x: 'Tensor | None' = None"),
        (grad_with_a_default, "grad: 'Tensor | None' = None"),
        (positional_only, "grad"),
        (unknown_input, "'z'"),
        (context_first, "'ctx'"),
        (input_first, "'x'"),
        (grad_twice_named, "'gradient'"),
        (keyword_only_grad, "'grad'"),
        (no_gradient, "no argument `grad`"),
        (nothing, "no argument `grad`"),
        (reserved_x, "'x'"),
        (reserved_y, "'y'"),
        (reserved_rule, "'rule'"),
        (reserved_site, "'site'"),
        (reserved_forward, "'forward'"),
        (3, "3"),
        (None, "None"),
        (torch.relu, "relu"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_signature_outside_the_vocabulary_is_refused_when_it_is_registered(
    function: Any, culprit: str
) -> None:
    with pytest.raises(fg.RuleError, match=rf"rule 'mine'.*{culprit}") as error:
        fg.register("mine")(function)
    assert "def rule(grad, x, *, slope: float = 25.0)" in str(error.value)  # how it should look
    assert "mine" not in fg.rules.available()


@pytest.mark.parametrize(
    "name", ["", None, 3, nothing], ids=["empty", "None", "number", "function"]
)
def test_a_rule_needs_a_name(name: Any) -> None:
    with pytest.raises(fg.RuleError, match=r"registered under a name.*@register\('my_rule'\)"):
        fg.register(name)


def test_a_name_is_taken_once() -> None:
    before = fg.get("scale")
    with pytest.raises(fg.RuleError, match=r"'scale' is already registered.*overwrite=True"):
        fg.register("scale")(lambda grad: grad)
    assert fg.get("scale") is before
    mine = fg.register("scale", overwrite=True)(lambda grad: grad)
    assert fg.get("scale") is mine


def test_examples_are_bound_when_a_rule_is_registered() -> None:
    rule = fg.register("mine", examples=[{"s": 2}, {"s": 0.0}])(lambda grad, *, s=1.0: s * grad)
    assert rule.declaration.examples == ({"s": 2}, {"s": 0.0})
    for examples, problem in (
        ([{"t": 1.0}], "unknown parameter of rule 'bad': 't'"),
        ([{"s": -1.0}], "'bad' requires s >= 0, got s=-1.0"),
        ({"s": 1.0}, r"examples= of rule 'bad' must be a sequence of dicts.*got the entry 's'"),
    ):
        with pytest.raises(fg.RuleError, match=problem):
            fg.register("bad", requires="s >= 0", examples=examples)(lambda grad, *, s=1.0: grad)
    assert "bad" not in fg.rules.available()


def test_any_callable_with_a_signature_in_the_vocabulary_is_a_rule() -> None:
    class Doubles:
        def __call__(self, grad: Tensor, *, times: float = 1.0) -> Tensor:
            return 2 * times * grad

    def power(grad: Tensor, *, base: float, exponent: float = 2.0) -> Tensor:
        return grad * base**exponent

    one = torch.tensor(1.0)
    assert fg.register("doubles")(Doubles())(times=3.0).backward(one).item() == 6
    assert fg.register("power_of_3")(partial(power, base=3.0)).backward(one).item() == 9
    assert fg.register("negates")(lambda grad: -grad).backward(one).item() == -1


def test_a_rule_tells_its_formula_reference_and_inputs() -> None:
    @fg.register("told", reference="a paper", keeps_shape=False)
    def told(grad: Tensor, x: Tensor, *, slope: float = 2.0) -> Tensor:
        """slope·grad

        More about it.
        """
        return slope * grad

    assert (told.formula, told.reference, told.inputs) == ("slope·grad", "a paper", ("x",))
    assert not told.keeps_shape
    assert told.parts == (told,)
    assert fg.register("untold")(lambda grad: grad).formula == ""


def test_only_what_the_signature_names_is_saved() -> None:
    @fg.register("neither")
    def neither(grad: Tensor) -> Tensor:
        return grad

    @fg.register("input")
    def takes_x(grad: Tensor, x: Tensor) -> Tensor:
        return grad * x

    @fg.register("output")
    def takes_y(grad: Tensor, y: Tensor) -> Tensor:
        return grad * y

    @fg.register("both")
    def both(grad: Tensor, y: Tensor, x: Tensor) -> Tensor:  # in any order
        return grad * x - y

    assert [saved_by(r)[0] for r in (neither, takes_x, takes_y, both)] == [
        [],
        ["x"],
        ["y"],
        ["y", "x"],
    ]
    assert both.inputs == ("y", "x")
    one, two, three = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)
    assert both.backward(two, x=three, y=one).item() == 5


# --- finding and binding ---


@pytest.mark.parametrize(
    ("name", "meant"),
    [("rectangula", "rectangular"), ("d(relu)", "d(ReLU)"), ("fastsigmoid", "fast_sigmoid")],
)
def test_an_unknown_rule_is_answered_with_the_closest_name_first(name: str, meant: str) -> None:
    with pytest.raises(fg.RuleError) as error:
        fg.get(name)
    message = str(error.value)
    assert f"unknown rule {name!r}. Did you mean {meant!r}? Valid: {meant}, " in message
    assert " more: freegrad_fx.list_rules(). " in message
    assert "import the module that registers it" in message


@pytest.mark.parametrize("what", [3, ["scale"], nothing])
def test_what_is_no_rule_is_not_found(what: Any) -> None:
    with pytest.raises(fg.RuleError, match="unknown rule"):
        fg.get(what)


def test_a_rule_is_found_by_its_name_and_is_found_as_itself() -> None:
    assert fg.get("rectangular") is fg.rules.rectangular
    bound_rule = fg.rules.rectangular(a=-1.0)
    assert fg.get(bound_rule) is bound_rule


def test_an_unknown_parameter_is_answered_with_the_closest_name_first() -> None:
    with pytest.raises(fg.RuleError) as error:
        fg.rules.clip_norm(maxnorm=1.0)
    assert str(error.value) == (
        "unknown parameter of rule 'clip_norm': 'maxnorm'. Did you mean 'max_norm'? "
        "Valid: max_norm, eps."
    )
    with pytest.raises(
        fg.RuleError, match=r"unknown parameter of rule 'guided': 'a'\. Valid: none"
    ):
        fg.rules.guided(a=1.0)


@pytest.mark.parametrize("value", ["1", None, True, [1.0], 1j, nn.ReLU], ids=repr)
def test_a_parameter_of_the_wrong_type_is_refused(value: Any) -> None:
    with pytest.raises(TypeError) as error:
        fg.rules.scale(s=value)
    assert str(error.value) == (
        f"parameter 's' of rule 'scale' must be float, got {value!r} of type {type(value).__name__}"
    )


@pytest.mark.parametrize(
    "value",
    [2, np.float64(2), np.float32(2), np.float16(2), np.int64(2), np.uint8(2)],
    ids=lambda value: type(value).__name__,
)
def test_every_real_number_is_taken_and_stored_as_a_python_float(value: Any) -> None:
    rule = fg.rules.scale(s=value)
    assert rule.bound["s"] == 2.0
    assert type(rule.bound["s"]) is float
    assert repr(rule) == "scale(s=2.0)"


def test_numpy_truth_values_are_no_numbers() -> None:
    with pytest.raises(TypeError, match=r"must be float, got np\.True_"):
        fg.rules.scale(s=np.bool_(True))


def test_integers_and_tuples_are_taken_where_the_signature_says_so() -> None:
    assert type(fg.rules.centralize(dim=np.int32(1)).bound["dim"]) is int
    assert fg.rules.centralize(dim=(1, 2)).bound["dim"] == (1, 2)
    assert [type(d) for d in fg.rules.centralize(dim=(np.int64(1), 2)).bound["dim"]] == [int, int]
    for wrong in (1.0, True, [1, 2]):
        with pytest.raises(TypeError, match="must be int or tuple"):
            fg.rules.centralize(dim=wrong)
    for wrong in ((1.0,), (1, True), ("a",), ((1,),)):
        with pytest.raises(
            TypeError, match="parameter 'dim' of rule 'centralize' must be int, got"
        ):
            fg.rules.centralize(dim=wrong)


def test_the_annotation_says_what_a_parameter_takes_and_without_one_the_default() -> None:
    @fg.register("many")
    def many(
        grad: Tensor,
        *,
        anything: Any,
        bare,
        thing: object,
        like_this=0.5,
        maybe: float | None = None,
        mode: Literal["a", "b"] = "a",
        slope: Tensor | float = 1.0,
        function: Callable[[Tensor], Tensor] = torch.relu,
    ) -> Tensor:
        return grad

    tensor, parameter = torch.ones(2), nn.Parameter(torch.ones(2))
    for name, values in {
        "anything": (1, "text", tensor, None),
        "bare": (1, "text", tensor, None),
        "thing": (1, "text", tensor, None),
        "like_this": (1, 2.0),
        "maybe": (None, 3, 4.0),
        "mode": ("a", "b"),
        "slope": (2, 3.0, tensor, parameter),
        "function": (torch.sigmoid, lambda x: x),
    }.items():
        for value in values:
            bound_value = many(**{name: value}).bound[name]
            assert bound_value is value or bound_value == value
    for name in ("like_this", "maybe", "slope"):
        with pytest.raises(TypeError, match=f"parameter '{name}' of rule 'many'"):
            many(**{name: "text"})
        with pytest.raises(TypeError, match=f"parameter '{name}' of rule 'many'"):
            many(**{name: True})


def test_a_truth_value_is_taken_where_the_signature_wants_one() -> None:
    @fg.register("switched")
    def switched(grad: Tensor, *, on: bool = True, level: int = 0) -> Tensor:
        return grad * on

    assert switched(on=False).bound["on"] is False
    for wrong in (1, 1.0, "yes"):
        with pytest.raises(TypeError, match="parameter 'on' of rule 'switched' must be bool"):
            switched(on=wrong)
    with pytest.raises(TypeError, match="must be int, got True of type bool"):
        switched(level=True)


def test_parameters_are_not_positional() -> None:
    with pytest.raises(
        TypeError, match=r"by keyword: rectangular\(a=\.\.\., b=\.\.\.\).*rule\.backward\(grad"
    ):
        fg.rules.rectangular(-1.0, 1.0)
    with pytest.raises(TypeError, match="by keyword"):
        fg.rules.scale(torch.ones(3))  # meant as the function that it was


def test_what_a_rule_of_freegrads_signature_calls_underscore_takes_no_parameters() -> None:
    fixed = fg.register("fixed")(lambda ctx, grad, tin, s=2.0, **_: grad * s)
    with pytest.raises(fg.RuleError, match="unknown parameter of rule 'fixed': 'alpha'"):
        fixed(alpha=1.0)
    with pytest.raises(fg.RuleError, match="unknown parameter of rule 'fixed'"):
        fixed(_=1.0)
    assert fixed(s=3.0).backward(torch.ones(2), x=torch.ones(2)).tolist() == [3, 3]
    free = fg.register("free")(lambda ctx, grad, tin, **params: grad * params["alpha"])
    assert free(alpha=4.0).backward(torch.ones(2), x=torch.ones(2)).tolist() == [4, 4]


@pytest.mark.parametrize("name", ["grad", "x", "y", "mask", "rule", "site", "ambient"])
def test_a_rule_that_takes_more_parameters_takes_none_of_a_reserved_name(name: str) -> None:
    free = fg.register("free")(lambda ctx, grad, tin, **params: grad)
    with pytest.raises(fg.RuleError, match=f"unknown parameter of rule 'free': '{name}'"):
        free(**{name: 1.0})


def test_a_required_parameter_has_to_be_bound_before_the_rule_is_used() -> None:
    @fg.register("required")
    def required(grad: Tensor, *, k: float, t: float, s: float = 1.0) -> Tensor:
        return k * t * s * grad

    grad = torch.ones(2)
    with pytest.raises(fg.RuleError) as error:
        required(t=2.0).backward(grad)
    assert str(error.value) == "rule 'required' has no value for k. Bind it: required(k=...)."
    with pytest.raises(fg.RuleError, match=r"no value for k, t\. Bind it: required\(k=\.\.\., t="):
        fg.transform(nn.ReLU(), "required")
    assert required(t=2.0)(k=3.0).backward(grad).tolist() == [6, 6]
    assert required.declaration.defaults == {"s": 1.0}


def test_binding_gives_a_new_rule_and_keeps_what_was_bound() -> None:
    default = fg.rules.rectangular
    once = default(a=-1.0)
    twice = once(b=2.0)
    assert dict(default.bound) == {"a": -0.5, "b": 0.5}
    assert dict(once.bound) == {"a": -1.0, "b": 0.5}
    assert dict(twice.bound) == {"a": -1.0, "b": 2.0}
    assert twice() == twice
    x = torch.tensor([-0.75, 1.5])
    assert twice.backward(torch.ones(2), x=x).tolist() == [1, 1]
    assert default.backward(torch.ones(2), x=x).tolist() == [0, 0]


def test_a_rule_cannot_be_changed() -> None:
    rule = fg.rules.rectangular(a=-1.0)
    with pytest.raises(AttributeError):
        rule.name = "other"
    with pytest.raises(TypeError):
        rule.bound["a"] = 3.0
    with pytest.raises(TypeError):
        rule.parameters["a"] = rule.parameters["b"]


def test_the_formula_says_what_it_misses() -> None:
    with pytest.raises(
        fg.RuleError, match=r"rule 'rectangular' reads 'x', which is missing.*grad, x=\.\.\.\)"
    ):
        fg.rules.rectangular.backward(torch.ones(2))
    assert fg.rules.scale.backward(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize(
    "name",
    ["args", "kwargs", "func", "types", "input", "name", "function", "values", "ctx", "self"],
)
def test_a_parameter_may_have_any_name_that_is_not_reserved(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def mine(grad, *, {name}: float = 1.0):\n    return {name} * grad", namespace)
    rule = fg.register("mine")(namespace["mine"])
    gm = fg.transform(nn.ReLU(), rule(**{name: 3.0}))
    x = torch.ones(2, requires_grad=True)
    gm(x).sum().backward()
    assert x.grad.tolist() == [3, 3]


# --- rules as values ---


def test_equal_rules_are_those_with_the_same_values() -> None:
    rectangular = fg.rules.rectangular
    assert rectangular == rectangular(a=-0.5) == fg.get("rectangular")(b=0.5, a=-0.5)
    assert rectangular != rectangular(a=-1.0)
    assert rectangular != rectangular(forward="heaviside")
    assert rectangular(a=1.0, b=2.0) == rectangular(b=2.0)(a=1.0)
    assert fg.rules.d_linear != fg.rules.straight_through  # the same formula, another rule
    assert rectangular != "rectangular"
    assert len({rectangular, rectangular(a=-0.5), rectangular(a=-1.0), fg.rules.scale}) == 3
    assert hash(rectangular(a=1.0, b=2.0)) == hash(rectangular(b=2.0)(a=1.0))


@pytest.mark.parametrize(
    "option", [{"save": "mask"}, {"compile": True}, {"forward": "heaviside"}], ids=str
)
def test_how_a_rule_runs_is_a_part_of_it(option: dict[str, Any]) -> None:
    plain = fg.rules.rectangular
    assert plain(**option) == plain(**option)
    assert plain(**option) != plain
    assert fg.compose(plain(**option)) != fg.compose(plain)
    assert len({plain, plain(**option), plain(**option)}) == 2
    first, second = (fg.RuleTable([fg.on("relu").backward(r)]) for r in (plain, plain(**option)))
    assert first != second


def test_rules_of_one_name_and_another_formula_are_not_equal() -> None:
    first = fg.register("twin")(lambda grad: grad)
    second = fg.register("twin", overwrite=True)(lambda grad: 2 * grad)
    assert first != second


SOME = {
    "rectangular(a=-0.5, b=0.5)": lambda: fg.rules.rectangular,
    "rectangular(a=-1.0, b=0.5)": lambda: fg.rules.rectangular(a=-1),
    "rectangular(a=-0.5, b=0.5, save='mask', compile=True)": lambda: fg.rules.rectangular(
        save="mask", compile=True
    ),
    "guided": lambda: fg.rules.guided,
    "get('d(ReLU)')": lambda: fg.rules.d_relu,
    "get('d(Linear)')(forward='heaviside')": lambda: fg.rules.d_linear(forward="heaviside"),
    "centralize(dim=(1, 2))": lambda: fg.rules.centralize(dim=(1, 2)),
    "clip_norm(max_norm=inf, eps=1e-12)": lambda: fg.rules.clip_norm(max_norm=math.inf),
    "fast_sigmoid(slope=5.0, forward='heaviside')": lambda: fg.rules.fast_sigmoid(
        slope=5.0, forward="heaviside"
    ),
    "compose(clip_value(max_value=2.0), scale(s=3.0))": lambda: fg.compose(
        fg.rules.clip_value(max_value=2.0), fg.rules.scale(s=3.0)
    ),
}


@pytest.mark.parametrize("text", SOME)
def test_the_repr_of_a_rule_evaluates_to_it(text: str) -> None:
    rule = SOME[text]()
    assert repr(rule) == text
    assert eval(text, {**vars(fg.rules), "inf": math.inf}) == rule


@pytest.mark.parametrize("text", SOME)
def test_a_rule_survives_pickle_and_copies(text: str) -> None:
    rule = SOME[text]()
    for other in (pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule), copy.copy(rule)):
        assert other == rule
        assert hash(other) == hash(rule)
        assert repr(other) == text
    grad, x = torch.randn(2, 3, 4, 5)
    assert all(
        torch.equal(a.backward(grad, x=x), b.backward(grad, x=x))
        for a, b in zip(pickle.loads(pickle.dumps(rule)).parts, rule.parts, strict=True)
    )


def test_a_pickled_rule_of_the_user_s_needs_its_registration() -> None:
    rule = fg.register("gone")(lambda grad, *, k=1.0: k * grad)
    data = pickle.dumps(rule(k=2.0))
    assert pickle.loads(data) == rule(k=2.0)
    del rule_module._registry["gone"]
    with pytest.raises(fg.RuleError, match=r"unknown rule 'gone'.*import the module"):
        pickle.loads(data)


# --- composition ---


def handed_on(rule: Any, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient that an activation with this rule hands on."""
    leaf = x.clone().requires_grad_()
    fg.transform(nn.Sigmoid(), rule)(leaf).backward(grad)
    return leaf.grad


def test_the_first_rule_of_a_composition_gets_the_incoming_gradient() -> None:
    clip, double = fg.rules.clip_value(max_value=1.0), fg.rules.scale(s=2.0)
    grad, x = torch.tensor([0.25, 0.75, 3.0]), torch.zeros(3)
    assert handed_on(fg.compose(clip, double), grad, x).tolist() == [0.5, 1.5, 2.0]
    assert handed_on(fg.compose(double, clip), grad, x).tolist() == [0.5, 1.0, 1.0]


def test_every_part_of_a_composition_has_parameters_of_its_own() -> None:
    shift = fg.register("shift")(lambda grad, *, by=1.0: grad + by)
    rule = fg.compose(fg.rules.scale(s=2.0), shift(by=3.0), fg.rules.scale(s=-5.0), shift)
    x = torch.zeros(2)
    assert handed_on(rule, torch.tensor([1.0, 10.0]), x).tolist() == [-24, -114]


def test_every_part_of_a_composition_sees_the_operation_s_own_input() -> None:
    grad, x = torch.randn(2, 200)
    rule = fg.compose("guided", "reverse", fg.rules.rectangular(a=-1.0, b=1.0))
    expected = grad.clamp(min=0) * -1.0 * ((x > 0) & (x <= 1))
    assert torch.equal(handed_on(rule, grad, x), expected)


def test_a_rule_of_the_output_comes_first_in_a_composition() -> None:
    by_output = fg.register("by_output")(lambda grad, y: grad * y * (1 - y))
    grad, x = torch.randn(2, 20)
    y = torch.sigmoid(x)
    actual = handed_on(fg.compose(by_output, fg.rules.scale(s=2.0)), grad, x)
    assert torch.equal(actual, 2.0 * (grad * y * (1 - y)))


def test_compositions_nest() -> None:
    a, b, c = fg.rules.clip_value(max_value=0.5), fg.rules.scale(s=2.0), fg.rules.reverse
    assert fg.compose(fg.compose(a, b), c) == fg.compose(a, fg.compose(b, c)) == fg.compose(a, b, c)
    assert fg.compose(a, fg.compose(b, c)).parts == (a, b, c)
    assert fg.compose(a, b) != fg.compose(b, a)
    assert len({fg.compose(a, b), fg.compose(a, b), fg.compose(b, a)}) == 2
    assert fg.compose("scale") == fg.compose(fg.rules.scale)


def test_a_composition_has_the_forward_of_its_parts() -> None:
    step = fg.rules.arctan(forward="heaviside")
    assert fg.compose("scale", step, step).forward == "heaviside"
    assert fg.compose("scale", "arctan").forward is None
    with pytest.raises(fg.RuleError, match="different forwards"):
        fg.compose(step, fg.rules.scale(forward="sign"))


def test_what_cannot_be_composed_is_refused() -> None:
    with pytest.raises(fg.RuleError, match="at least one rule"):
        fg.compose()
    with pytest.raises(fg.RuleError, match=r"unknown rule 'scal'\. Did you mean 'scale'"):
        fg.compose("clip_norm", "scal")
    with pytest.raises(fg.RuleError, match="unknown rule 3"):
        fg.compose(3)
    with pytest.raises(TypeError, match="no parameters of its own"):
        fg.compose("clip_norm", "scale")(s=2.0)
    fg.register("unbound")(lambda grad, *, k: k * grad)
    with pytest.raises(fg.RuleError, match=r"no value for k\. Bind it: unbound"):
        fg.transform(nn.ReLU(), fg.compose("scale", "unbound"))


def test_a_parameter_with_the_name_of_an_old_option_stays_one() -> None:
    @fg.register("has_fuse")
    def has_fuse(grad: Tensor, *, fuse: float = 2.0) -> Tensor:
        return grad * fuse

    rule = has_fuse(fuse=3.0)
    assert pickle.loads(pickle.dumps(rule)) == rule
    gm = pickle.loads(pickle.dumps(fg.transform(nn.Sequential(nn.ReLU()), {"relu": rule})))
    x = torch.ones(2, requires_grad=True)
    (g,) = torch.autograd.grad(gm(x).sum(), x)
    assert g.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("argument", ["learns", "answers", "kinds", "meant_for", "peers"])
@pytest.mark.parametrize("value", [5, [5]])
def test_what_are_no_names_are_refused(argument: str, value: Any) -> None:
    with pytest.raises(fg.RuleError, match=rf"{argument}= of rule 'odd'.* a tuple of names, got"):
        fg.register("odd", **{argument: value})(lambda grad: grad)


@pytest.mark.parametrize("skip", [5, ["compiled"]])
def test_a_list_of_checks_to_leave_out_is_refused_with_the_form(skip: Any) -> None:
    with pytest.raises(TypeError, match=r"skip has to be a dict .* The checks: runs, "):
        fg.testing.check_rule("straight_through", skip=skip)
