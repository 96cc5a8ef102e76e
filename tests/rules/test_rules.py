"""The built-in rules are their formulas, and a rule is what its signature declares."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import freegrad_fx as fg
import reference
from freegrad_fx.core import rule as rule_module

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

BUILT_IN = [rule.name for rule in vars(fg.rules).values() if isinstance(rule, fg.Rule)]

FORMULAS: dict[str, Callable[..., Any]] = {
    **reference.ENTRYWISE,
    **reference.WHOLE_TENSOR,
    **reference.JAMS,
}


# --- the formulas ---


def numbers(*marks: float) -> st.SearchStrategy[float]:
    """Numbers that every float type has, the marks with both neighbours, and what is no number."""
    around = [v for m in marks for v in (m, m * 1.125, m * 0.875)]
    special = [0.0, -0.0, math.inf, -math.inf, math.nan]
    return st.sampled_from([*around, *special]) | st.floats(-32, 32, width=16)


@st.composite
def tensors(
    draw: st.DrawFn, marks: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor]:  # grad, x: of one shape and dtype, empty and 0-dim ones among them
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    dtype = draw(st.sampled_from(FLOATS))
    n = math.prod(shape)
    values = [
        draw(st.lists(numbers(*some), min_size=n, max_size=n)) for some in ((1.0, -2.0), marks)
    ]
    grad, x = (torch.tensor(v, dtype=torch.float64).to(dtype).reshape(shape) for v in values)
    return grad, x


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor, grad: Tensor) -> None:
    """Equal but for a few roundings of an intermediate of the size of the gradient."""
    assert actual.dtype == grad.dtype
    assert actual.shape == grad.shape
    expected = expected.to(grad.dtype).double()
    size = torch.where(grad.isfinite(), grad, 0).double().abs() + expected.abs()
    wrong = (actual.double() - expected).abs() > 8 * torch.finfo(grad.dtype).eps * size
    exact = ~expected.isfinite()
    same = (actual.double() == expected) | (actual.isnan() & expected.isnan())
    assert torch.where(exact, same, ~wrong & actual.isfinite()).all(), (actual, expected, grad)


def bound(**choices: st.SearchStrategy[float]) -> st.SearchStrategy[dict[str, float]]:
    """Any of the parameters; the others keep their defaults."""
    return st.fixed_dictionaries({}, optional=choices)


def interval(a: float, b: float) -> st.SearchStrategy[dict[str, float]]:
    """Both ends of a window, either, or none; in order, also with the other's default."""
    either = bound(a=bounds, b=bounds)
    return either.filter(lambda given: given.get("a", a) <= given.get("b", b))


bounds = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 4.0])
widths = st.sampled_from([0.25, 1.0, 3.0])
factors = st.sampled_from([-1.5, 0.0, 0.1, 1.0, 7.0])

EXACT: dict[str, st.SearchStrategy[dict[str, float]]] = {
    "d(ReLU)": bound(),
    "d(Linear)": bound(),
    "rectangular": interval(a=-0.5, b=0.5),
    "straight_through": bound(),
    "clipped_straight_through": bound(bound=st.sampled_from([0.0, 0.5, 1.0, 4.0])),
    "guided": bound(),
    "clip_value": bound(max_value=widths),
    "reverse": bound(alpha=st.sampled_from([-2.0, 0.0, 0.5, 1.0])),
}

ROUNDED: dict[str, st.SearchStrategy[dict[str, float]]] = {
    "triangular": bound(width=widths),
    "scale": bound(s=factors),
    "fast_sigmoid": bound(slope=st.sampled_from([0.5, 1.0, 5.0])),
    "arctan": bound(alpha=st.sampled_from([0.5, 1.0, 2.0])),
}


def test_every_built_in_rule_is_tested_here() -> None:
    assert set(EXACT) | set(ROUNDED) == set(reference.ENTRYWISE)
    assert {*FORMULAS, "noise"} == set(BUILT_IN) == set(SAVED)
    assert set(BUILT_IN) <= set(fg.rules.available())


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_a_rule_has_the_parameters_and_defaults_of_the_catalogue(name: str) -> None:
    declared = {
        p.name: p.default
        for p in inspect.signature(FORMULAS[name]).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    }
    assert fg.get(name).declaration.defaults == declared
    assert dict(fg.get(name).bound) == declared


@pytest.mark.parametrize("name", sorted(EXACT))
@given(data=st.data())
def test_a_rule_that_selects_equals_its_formula_bit_for_bit(name: str, data: st.DataObject) -> None:
    grad, x = data.draw(tensors(marks=(-2.0, -0.5, 0.25, 0.5, 1.0, 4.0)))
    parameters = data.draw(EXACT[name])
    rule = fg.get(name)(**parameters)
    expected = reference.entrywise(FORMULAS[name], grad, x, **parameters)
    actual = rule.backward(grad, x=x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", sorted(ROUNDED))
@given(data=st.data())
def test_a_rule_that_computes_equals_its_formula(name: str, data: st.DataObject) -> None:
    grad, x = data.draw(tensors(marks=(-3.0, -1.0, 0.25, 1.0)))
    parameters = data.draw(ROUNDED[name])
    rule = fg.get(name)(**parameters)
    expected = reference.entrywise(FORMULAS[name], grad, x, **parameters)
    assert_equal_up_to_rounding(rule.backward(grad, x=x), expected, grad)


@given(data=st.data())
def test_clip_norm_equals_its_formula(data: st.DataObject) -> None:
    grad, _ = data.draw(tensors())
    parameters = data.draw(bound(max_norm=st.sampled_from([0.0, 0.5, 10.0]), eps=st.just(1e-6)))
    expected = reference.clip_norm(grad, **parameters)
    assert_equal_up_to_rounding(fg.rules.clip_norm(**parameters).backward(grad), expected, grad)


@pytest.mark.parametrize("dtype", FLOATS)
def test_clip_norm_leaves_a_gradient_of_norm_max_norm(dtype: torch.dtype) -> None:
    grad = torch.full((100, 100), 3.0, dtype=dtype)
    clipped = fg.rules.clip_norm(max_norm=2.0).backward(grad)
    assert clipped.double().norm().item() == pytest.approx(2.0, rel=1e-2)
    assert torch.equal(fg.rules.clip_norm(max_norm=301.0).backward(grad), grad)


def test_clip_norm_of_half_precision_survives_a_norm_that_half_precision_has_not() -> None:
    grad = torch.full((100,), 60000.0, dtype=torch.float16)
    clipped = fg.rules.clip_norm.backward(grad)
    assert clipped.double().norm().item() == pytest.approx(1.0, rel=1e-2)


@given(data=st.data())
def test_centralize_equals_its_formula(data: st.DataObject) -> None:
    grad, _ = data.draw(tensors())
    grad = grad.nan_to_num(1.0, 2.0, -3.0)
    dims = st.integers(-grad.dim(), grad.dim() - 1) if grad.dim() else st.just(-1)
    several = st.permutations(range(grad.dim())).map(lambda p: tuple(p[: 1 + len(p) // 2]))
    dim = data.draw(dims | several if grad.dim() else dims)
    expected = reference.centralize(grad, dim=dim)
    actual = fg.rules.centralize(dim=dim).backward(grad)
    size = grad.abs().max() if grad.numel() else grad.new_zeros(())
    assert_equal_up_to_rounding(actual - size, (expected - size.double()).to(grad.dtype), grad)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("a", "b"), [(-1e6, 1e6), (-1e39, 1e39), (-1e309, 1e309), (0.0, 1e39)])
def test_a_window_may_be_wider_than_the_numbers_of_a_dtype(
    a: float, b: float, dtype: torch.dtype
) -> None:
    x = torch.tensor([-2.0, -0.0, 1.0, 2048.0, math.nan], dtype=dtype)
    passes = torch.tensor([a <= value <= b for value in x.tolist()])
    for grad in (torch.ones(5, dtype=dtype), torch.full((5,), math.inf, dtype=dtype)):
        actual = fg.rules.rectangular(a=a, b=b).backward(grad, x=x)
        assert torch.equal(actual, torch.where(passes, grad, 0))
        rewritten = fg.transform(nn.Tanh(), fg.rules.rectangular(a=a, b=b, save="mask"))
        leaf = x.clone().requires_grad_()
        assert torch.equal(torch.autograd.grad(rewritten(leaf), leaf, grad)[0], actual)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_window_that_ends_at_the_largest_number_leaves_infinity_out(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([-math.inf, -largest, 0.0, largest, math.inf], dtype=dtype)
    rule = fg.rules.rectangular(a=-largest, b=largest)
    assert rule.backward(torch.ones(5, dtype=dtype), x=x).tolist() == [0, 1, 1, 1, 0]
    rule = fg.rules.rectangular(a=-math.inf, b=math.inf)
    assert rule.backward(torch.ones(5, dtype=dtype), x=x).tolist() == [1] * 5


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rule_leaves_its_arguments_as_they_are(name: str) -> None:
    grad, x, y = torch.randn(3, 4, 5)
    before = grad.clone(), x.clone(), y.clone()
    fg.get(name).backward(grad, x=x, y=y)
    assert all(map(torch.equal, (grad, x, y), before))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (3, 4)], ids=str)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rule_keeps_shape_dtype_and_memory_format(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    grad, x = torch.randn(2, *shape).to(dtype)
    for given_grad in (grad, grad.t() if grad.dim() == 2 else grad):
        result = fg.get(name).backward(given_grad, x=x.reshape(given_grad.shape))
        assert (result.shape, result.dtype) == (given_grad.shape, dtype)
    image = torch.randn(2, 3, 4, 5).to(dtype, memory_format=torch.channels_last)
    result = fg.get(name).backward(image, x=image)
    assert result.is_contiguous(memory_format=torch.channels_last)


# --- random rules ---

RANDOM = ["full_jam", "noise", "positive_jam", "rectangular_jam"]


@pytest.mark.parametrize("name", BUILT_IN)
def test_only_random_rules_differ_from_call_to_call(name: str) -> None:
    grad, x = torch.randn(2, 50)
    same = torch.equal(fg.get(name).backward(grad, x=x), fg.get(name).backward(grad, x=x))
    assert same == (name not in RANDOM)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", RANDOM)
def test_the_same_seed_gives_the_same_gradient(name: str, dtype: torch.dtype) -> None:
    grad, x = torch.randn(2, 50).to(dtype)
    torch.manual_seed(3)
    first = fg.get(name).backward(grad, x=x)
    torch.manual_seed(3)
    assert torch.equal(fg.get(name).backward(grad, x=x), first)


def assert_uniform(values: Tensor) -> None:
    """Kolmogorov's distance from U(0, 1), and no dependence between neighbours."""
    n = values.numel()
    steps = (torch.arange(n) + 0.5) / n
    assert (values.flatten().sort().values - steps).abs().max() < 1.6 / math.sqrt(n)
    assert values.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * n))
    assert values.var().item() == pytest.approx(1 / 12, rel=0.05)
    rows = values.reshape(100, -1)
    assert abs(torch.corrcoef(rows[:2])[0, 1].item()) < 4 / math.sqrt(rows.shape[1])


@pytest.mark.parametrize("name", sorted(reference.JAMS))
def test_a_jam_is_uniform_where_the_formula_lets_it_through(name: str) -> None:
    rule = fg.get(name)
    grad = torch.full((100, 300), -4.0)
    assert_uniform(rule.backward(grad, x=torch.full_like(grad, 2.0)) / grad)


@pytest.mark.parametrize("name", sorted(reference.JAMS))
@given(data=st.data())
def test_a_jam_is_between_nothing_and_its_formula(name: str, data: st.DataObject) -> None:
    grad, x = data.draw(tensors(marks=(-5.0, -1.0, 0.0, 2.0, 5.0)))
    grad = grad.nan_to_num(1.0, 2.0, -3.0)
    parameters = data.draw(interval(a=-5.0, b=5.0) if name == "rectangular_jam" else bound())
    widest = reference.entrywise(reference.JAMS[name], grad, x, **parameters)
    actual = fg.get(name)(**parameters).backward(grad, x=x)
    assert actual.dtype == grad.dtype
    assert (actual.abs() <= widest.abs()).all()
    assert (actual * widest >= 0).all()


@pytest.mark.parametrize("name", sorted(reference.JAMS))
def test_a_jam_lets_every_entry_of_its_window_through(name: str) -> None:
    x = torch.tensor([-6.0, -5.0, -0.5, -0.0, 0.0, 3.0, 5.0, 6.0, math.inf, math.nan]).repeat(50, 1)
    grad = torch.ones_like(x)
    window = reference.entrywise(reference.JAMS[name], grad, x)
    assert torch.equal(fg.get(name).backward(grad, x=x).sum(0) > 0, window.sum(0) > 0)


@pytest.mark.parametrize("sigma", [None, 0.0, 2.5])
def test_noise_is_normal_around_the_gradient(sigma: float | None) -> None:
    rule = fg.rules.noise if sigma is None else fg.rules.noise(sigma=sigma)
    grad = torch.linspace(-3, 3, 30000).reshape(100, 300)
    added = rule.backward(grad) - grad
    if sigma == 0:
        assert not added.any()
    else:
        assert_uniform(torch.special.ndtr(added / (0.1 if sigma is None else sigma)))


# --- what is saved for the backward ---

SAVED = {
    "d(ReLU)": "x",
    "d(Linear)": "",
    "rectangular": "x",
    "triangular": "x",
    "scale": "",
    "clip_norm": "",
    "noise": "",
    "centralize": "",
    "full_jam": "",
    "positive_jam": "x",
    "rectangular_jam": "x",
    "reverse": "",
    "clip_value": "",
    "straight_through": "",
    "clipped_straight_through": "x",
    "fast_sigmoid": "x",
    "arctan": "x",
    "guided": "x",
}


def saved_by(rule: fg.Rule) -> tuple[list[str], Tensor]:
    """Which of x and y the decoupled operation keeps for its backward, and the gradient that it then gives."""
    leaf = torch.randn(4, requires_grad=True)
    x, y = leaf * 1, torch.randn(4)
    names = {x.data_ptr(): "x", y.data_ptr(): "y"}
    kept: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(names.get(tensor.data_ptr(), "something else"))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fg.ops.decoupled(y, x, rule=rule)
    out.sum().backward()
    return kept, leaf.grad


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rule_saves_what_the_catalogue_says(name: str) -> None:
    kept, grad = saved_by(fg.get(name))
    assert kept == SAVED[name].split()
    assert grad is not None


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
        (no_gradient, "no `grad`"),
        (nothing, "no `grad`"),
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


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_rule_cites_what_it_comes_from(name: str) -> None:
    assert fg.get(name).reference
    assert "grad" in fg.get(name).formula


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
    assert all(valid in message for valid in fg.rules.available())
    assert "once the module that registers it has been imported" in message


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
    with pytest.raises(TypeError, match=r"by keyword: rectangular\(a, b\).*rule\.backward\(grad"):
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
    with pytest.raises(fg.RuleError, match="rule 'rectangular' needs 'x'"):
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
    with pytest.raises(fg.RuleError, match=r"unknown rule 'gone'.*has been imported"):
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
