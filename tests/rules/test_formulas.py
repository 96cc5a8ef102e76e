"""The built-in rules are their formulas.

The formulas are in `reference`, and the values of the parameters are those that each rule declares with `examples=`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import freegrad_fx as fg
import reference
from built_in import BUILT_IN, EXAMPLES, examples_of, saved_by

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


# --- what a new rule needs ---


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_rule_has_a_reference(name: str) -> None:
    reference.of(name)


def test_a_rule_without_a_reference_is_told_where_to_add_one() -> None:
    with pytest.raises(
        LookupError, match=r"'new'\. Add .* to tests/support/reference\.py.*@entry\('new'\)"
    ):
        reference.of("new")


def test_every_reference_is_that_of_a_built_in_rule() -> None:
    kinds = (reference.ENTRYWISE, reference.WHOLE_TENSOR)
    assert sorted(name for formulas in kinds for name in formulas) == sorted(BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rule_declares_examples_of_all_its_parameters(name: str) -> None:
    given_values = {key for values in examples_of(name) for key in values}
    missing = fg.get(name).parameters.keys() - given_values - {"generator"}
    assert not missing, f"add values of {', '.join(missing)} to examples= of rule {name!r}"


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rule_has_the_parameters_and_defaults_of_its_reference(name: str) -> None:
    assert fg.get(name).declaration.defaults == reference.defaults_of(name)
    assert dict(fg.get(name).bound) == reference.defaults_of(name)


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_rule_cites_what_it_comes_from(name: str) -> None:
    assert fg.get(name).reference
    assert "grad" in fg.get(name).formula


# --- the formulas ---


def numbers(*marks: float) -> st.SearchStrategy[float]:
    """Numbers that every float type has, the marks with both neighbours, and what is not a number."""
    around = [v for m in marks for v in (m, m * 1.125, m * 0.875)]
    special = [0.0, -0.0, math.inf, -math.inf, math.nan]
    return st.sampled_from([*around, *special]) | st.floats(-32, 32, width=16)


@st.composite
def tensors(draw: st.DrawFn, *marks: tuple[float, ...], min_dims: int = 0) -> list[Tensor]:
    """One for each tuple of marks, of one shape and dtype, empty and 0-dim ones among them."""
    shape = tuple(draw(st.lists(st.integers(0, 3), min_size=min_dims, max_size=3)))
    dtype = draw(st.sampled_from(FLOATS))
    n = math.prod(shape)
    values = [draw(st.lists(numbers(*some), min_size=n, max_size=n)) for some in marks]
    return [torch.tensor(v, dtype=torch.float64).to(dtype).reshape(shape) for v in values]


def marks_of(name: str) -> tuple[float, ...]:
    """The numbers at which the formula of a rule can jump: its defaults and declared values, of both signs."""
    given_values = [fg.get(name).declaration.defaults, *examples_of(name)]
    found = {v for values in given_values for v in values.values() if isinstance(v, float)}
    return tuple(sorted(found | {-v for v in found}))


@st.composite
def values_of(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """Declared values of any of the parameters, in any combination that the rule takes."""
    if fg.get(name).declaration.of_op is not None:  # its values belong together
        return draw(st.sampled_from([example for example in examples_of(name) if example]))
    choices: dict[str, list[Any]] = {}
    for example in examples_of(name):
        for key, value in example.items():
            choices.setdefault(key, []).append(value)
    chosen = {key: st.sampled_from(values) for key, values in choices.items()}
    return draw(st.fixed_dictionaries({}, optional=chosen).filter(lambda v: is_taken(name, v)))


def is_taken(name: str, values: dict[str, Any]) -> bool:
    try:
        fg.get(name)(**values)
    except fg.RuleError:
        return False
    return True


def inputs_for(data: st.DataObject, name: str, **how: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A gradient, and what else the formula of a rule reads."""
    read = reference.inputs_of(name)
    grad, *others = data.draw(tensors((1.0, -2.0), *(marks_of(name) for _ in read), **how))
    values = dict(zip(read, others, strict=True))
    if values.keys() >= {"x", "y"}:  # a rule may rely on y being an activation of x, with f(0) = 0
        function = data.draw(st.sampled_from([torch.tanh, torch.relu, nn.functional.gelu]))
        values["y"] = function(values["x"])
    return grad, values


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor, size: Tensor) -> None:
    """Equal but for a few roundings of an intermediate of the size of `size`, usually the gradient."""
    assert actual.dtype == size.dtype
    assert actual.shape == expected.shape
    expected = expected.to(actual.dtype).double()
    allowed = torch.where(size.isfinite(), size, 0).double().abs() + expected.abs()
    wrong = (actual.double() - expected).abs() > 8 * torch.finfo(actual.dtype).eps * allowed
    exact = ~expected.isfinite()
    same = (actual.double() == expected) | (actual.isnan() & expected.isnan())
    # an infinite gradient times a slope that is too small for the dtype
    same |= size.isinf() & ~actual.isfinite() & exact
    assert torch.where(exact, same, ~wrong & actual.isfinite()).all(), (actual, expected, size)


def rounded_to(dtype: torch.dtype, name: str, values: dict[str, Any]) -> dict[str, Any]:
    """All parameters as numbers of a dtype, as which a tensor of this dtype is compared and multiplied with them."""
    values = {**reference.defaults_of(name), **values}
    return {key: rounded(dtype, value) for key, value in values.items()}


def rounded(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(rounded(dtype, v) for v in value)
    return torch.tensor(value, dtype=dtype).item() if isinstance(value, float) else value


def results(name: str, grad: Tensor, values: dict[str, Any], **read: Tensor) -> list[Tensor]:
    """The gradients of a rule and of its reference, of the same random numbers."""
    torch.manual_seed(3)
    actual = fg.get(name)(**values).backward(grad, **read)
    torch.manual_seed(3)
    draw = reference.DRAWS[name](grad) if name in reference.RANDOM else None
    return [actual, reference.expected_of(name, grad, draw, **read, **values)]


GRID = [0.0, -0.0, 1e-4, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 4.0, 20.0, 1e4, math.inf]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("name", "values"), EXAMPLES, ids=str)
def test_a_rule_is_its_formula_at_small_large_and_infinite_numbers(
    name: str, values: dict[str, Any]
) -> None:
    for dtype in FLOATS:
        x = torch.tensor([*GRID, *(-v for v in GRID), math.nan, math.nan]).to(dtype).reshape(3, -1)
        grad = torch.tensor([1.0, -2.0, 0.0, 0.75, -1.0]).repeat(6).to(dtype).reshape(x.shape)
        read = {key: {"x": x, "y": x.tanh()}[key] for key in reference.inputs_of(name)}
        bound = rounded_to(dtype, name, values) if name in reference.ENTRYWISE else values
        actual, expected = results(name, grad, bound, **read)
        largest = torch.full_like(grad, 2.0)
        assert_equal_up_to_rounding(actual, expected, largest)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", sorted(reference.EXACT))
@given(data=st.data())
def test_a_rule_that_rounds_once_is_its_formula_bit_for_bit(name: str, data: st.DataObject) -> None:
    grad, read = inputs_for(data, name)
    values = rounded_to(grad.dtype, name, data.draw(values_of(name)))
    actual, expected = results(name, grad, values, **read)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("name", sorted({*reference.ENTRYWISE} - reference.EXACT))
@given(data=st.data())
def test_a_rule_of_single_entries_is_its_formula_up_to_rounding(
    name: str, data: st.DataObject
) -> None:
    grad, read = inputs_for(data, name)
    values = rounded_to(grad.dtype, name, data.draw(values_of(name)))
    actual, expected = results(name, grad, values, **read)
    assert_equal_up_to_rounding(actual, expected, grad)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", sorted(reference.WHOLE_TENSOR))
@given(data=st.data())
def test_a_rule_of_the_whole_gradient_is_its_formula_up_to_rounding(
    name: str, data: st.DataObject
) -> None:
    grad, read = inputs_for(data, name, min_dims=2)
    values = data.draw(values_of(name))
    # Which number decides where there is no finite largest entry? And ∞ is rotated into ∞ or into no number
    if name in reference.RANDOM or name == "rotation_trick":
        grad = grad.nan_to_num(1.0, 2.0, -3.0)
    largest = torch.where(grad.isfinite(), grad, 0).abs().max() if grad.numel() else grad.sum()
    actual, expected = results(name, grad, values, **read)
    assert_equal_up_to_rounding(actual, expected, largest.expand_as(grad))


@given(data=st.data())
def test_clip_norm_rounds_each_entry_by_itself(data: st.DataObject) -> None:
    (grad,) = data.draw(tensors((1.0, -2.0)))
    values = data.draw(values_of("clip_norm"))
    expected = reference.clip_norm(grad, **values)
    assert_equal_up_to_rounding(fg.rules.clip_norm(**values).backward(grad), expected, grad)


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
def test_centralize_takes_every_choice_of_dims(data: st.DataObject) -> None:
    (grad,) = data.draw(tensors((1.0, -2.0)))
    grad = grad.nan_to_num(1.0, 2.0, -3.0)
    dims = st.integers(-grad.dim(), grad.dim() - 1) if grad.dim() else st.just(-1)
    several = st.permutations(range(grad.dim())).map(lambda p: tuple(p[: 1 + len(p) // 2]))
    dim = data.draw(dims | several if grad.dim() else dims)
    expected = reference.centralize(grad, dim=dim)
    actual = fg.rules.centralize(dim=dim).backward(grad)
    largest = grad.abs().max() if grad.numel() else grad.sum()
    assert_equal_up_to_rounding(actual, expected, largest.expand_as(grad))


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


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rule_keeps_shape_dtype_and_memory_format(name: str, dtype: torch.dtype) -> None:
    for shape in [(), (0,), (2, 0, 3), (3, 4)]:
        grad, x = torch.randn(2, *shape).to(dtype)
        for given_grad in (grad, grad.t() if grad.dim() == 2 else grad):
            given_x = x.reshape(given_grad.shape)
            result = fg.get(name).backward(given_grad, x=given_x, y=given_x)
            assert (result.shape, result.dtype) == (given_grad.shape, dtype)
    image = torch.randn(2, 3, 4, 5).to(dtype, memory_format=torch.channels_last)
    result = fg.get(name).backward(image, x=image, y=image)
    assert result.is_contiguous(memory_format=torch.channels_last)


# --- random rules ---


@pytest.mark.parametrize("name", BUILT_IN)
def test_only_random_rules_differ_from_call_to_call(name: str) -> None:
    grad, x, y = torch.randn(3, 50)
    first, second = (fg.get(name).backward(grad, x=x, y=y) for _ in range(2))
    assert torch.equal(first, second) == (name not in reference.RANDOM)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", sorted(reference.RANDOM))
def test_the_same_seed_gives_the_same_gradient(name: str, dtype: torch.dtype) -> None:
    grad, x, y = torch.randn(3, 50).to(dtype)
    torch.manual_seed(3)
    first = fg.get(name).backward(grad, x=x, y=y)
    torch.manual_seed(3)
    assert torch.equal(fg.get(name).backward(grad, x=x, y=y), first)


def assert_uniform(values: Tensor) -> None:
    """Kolmogorov's distance from U(0, 1), and no dependence between neighbours."""
    n = values.numel()
    steps = (torch.arange(n) + 0.5) / n
    assert (values.flatten().sort().values - steps).abs().max() < 1.6 / math.sqrt(n)
    assert values.mean().item() == pytest.approx(0.5, abs=4 / math.sqrt(12 * n))
    assert values.var().item() == pytest.approx(1 / 12, rel=0.05)
    rows = values.reshape(100, -1)
    assert abs(torch.corrcoef(rows[:2])[0, 1].item()) < 4 / math.sqrt(rows.shape[1])


@pytest.mark.parametrize("name", ["full_jam", "positive_jam", "rectangular_jam"])
def test_a_jam_is_uniform_where_the_formula_lets_it_through(name: str) -> None:
    rule = fg.get(name)
    grad = torch.full((100, 300), -4.0)
    assert_uniform(rule.backward(grad, x=torch.full_like(grad, 2.0)) / grad)


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


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_rule_saves_what_its_formula_reads(name: str) -> None:
    kept, grad = saved_by(fg.get(name)(save="x"))
    assert tuple(kept) == reference.inputs_of(name)
    assert grad is not None
