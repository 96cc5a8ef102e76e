"""`plot_rule`: the numbers that it draws, by formulas of their own, and the axes that it returns."""

from __future__ import annotations

import math
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch

import freegrad_fx as fg
from freegrad_fx.plot import curve_of

mpl.use("agg")


@pytest.fixture(autouse=True)
def closed() -> object:
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def drawn(axes: object) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The lines of the picture, by their labels."""
    return {
        line.get_label(): line.get_data()
        for line in axes.lines  # type: ignore[attr-defined]
        if not line.get_label().startswith("_")
    }


def test_an_effective_derivative_beside_the_forward() -> None:
    axes = fg.plot_rule(fg.rules.arctan(alpha=3.0), "heaviside", low=-2.0, high=1.0)
    lines = drawn(axes)
    x, y = lines["effective derivative"]
    assert (x[0], x[-1]) == (-2.0, 1.0)
    np.testing.assert_allclose(y, 1.5 / (1 + (math.pi * 1.5 * x) ** 2), rtol=1e-12)
    np.testing.assert_array_equal(lines["heaviside(x)"][1], np.where(x > 0, 1.0, 0.0))
    assert axes.get_title() == "arctan(alpha=3.0)"
    assert axes.get_xlabel() == "x"


def test_a_rule_that_reads_the_output_gets_that_of_the_operation() -> None:
    x, y = drawn(fg.plot_rule("identity_rule", "tanh"))["effective derivative"]
    away = np.abs(x) > 1e-3
    np.testing.assert_allclose(y[away], (np.tanh(x) / x)[away], rtol=1e-9)


def test_a_composition_is_applied_in_order() -> None:
    both = fg.compose(fg.rules.scale(s=0.5), fg.rules.rectangular(a=-1.0, b=2.0))
    x, y = drawn(fg.plot_rule(both))["effective derivative"]
    np.testing.assert_array_equal(y, 0.5 * ((x >= -1) & (x <= 2)))


@pytest.mark.parametrize("name", ["clip_value", "sign_gradient"])
def test_a_rule_that_is_not_linear_is_drawn_against_the_gradient(name: str) -> None:
    axes = fg.plot_rule(name)
    x, y = drawn(axes)["gradient of x"]
    np.testing.assert_array_equal(y, np.clip(x, -1, 1) if name == "clip_value" else np.sign(x))
    assert axes.get_xlabel() == "gradient of y"


def test_a_random_rule_has_a_band_and_keeps_the_generator() -> None:
    before = torch.get_rng_state()
    curve = curve_of("full_jam", None, low=-1.0, high=1.0)
    assert torch.equal(torch.get_rng_state(), before)
    assert curve.band is not None
    low, high = curve.band
    assert abs(curve.gradient - 0.5).max() < 0.1
    assert abs(low.mean() - 0.1) < 0.02
    assert abs(high.mean() - 0.9) < 0.02
    again = curve_of("full_jam", None, low=-1.0, high=1.0)
    assert torch.equal(again.gradient, curve.gradient)
    other = curve_of("full_jam", None, low=-1.0, high=1.0, seed=1)
    assert not torch.equal(other.gradient, curve.gradient)
    axes = fg.plot_rule("full_jam")
    assert [c.get_label() for c in axes.collections] == ["80 % of draws"]
    assert "mean effective derivative" in drawn(axes)


def test_the_forward_of_a_rule_is_drawn() -> None:
    lines = drawn(fg.plot_rule(fg.get("straight_through")(forward="round")))
    np.testing.assert_array_equal(lines["round(x)"][1], np.round(lines["round(x)"][0]))


def test_it_draws_into_axes_that_are_given() -> None:
    from matplotlib import pyplot

    _, ax = pyplot.subplots()
    assert fg.plot_rule("triangular", ax=ax) is ax
    assert len(drawn(ax)) == 1


OF_ONE_INPUT = [r for r in fg.rules.available() if not fg.get(r).declaration.needs_operation]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", OF_ONE_INPUT)
def test_every_rule_of_one_input_can_be_drawn(name: str) -> None:
    rule = fg.get(name)
    if rule.parameters.keys() - rule.bound.keys():
        pytest.skip("it has a parameter without a default")
    (label,) = [text for text in drawn(fg.plot_rule(rule)) if "(x)" not in text]
    assert "derivative" in label or "gradient" in label


def test_a_rule_of_several_operands_is_refused() -> None:
    with pytest.raises(fg.RuleError, match=r"rule 'lrp_epsilon' uses the operand 'weight'"):
        fg.plot_rule("lrp_epsilon", "linear")


def test_wrong_arguments() -> None:
    with pytest.raises(fg.RuleError, match=r"operation 'heavyside'.*heaviside"):
        fg.plot_rule("arctan", "heavyside")
    with pytest.raises(fg.RuleError, match=r"low=1\.0, high=-1\.0"):
        fg.plot_rule("arctan", low=1.0, high=-1.0)
    with pytest.raises(fg.RuleError, match="arctan"):
        fg.plot_rule("arctann")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib"):
        fg.plot_rule("arctan")


def test_a_long_title_is_broken_into_lines() -> None:
    title = fg.plot_rule("lsq").get_title()
    assert title.replace("\n", " ") == repr(fg.rules.lsq)
    assert max(map(len, title.splitlines())) <= 44


def test_readers_see_the_registered_name_of_a_rule() -> None:
    both = fg.compose("d(ReLU)", fg.rules.d_linear(forward="heaviside"))
    assert str(both) == "compose(d(ReLU), d(Linear)(forward='heaviside'))"
    plan = fg.explain(torch.nn.Sequential(torch.nn.ReLU()), "d(ReLU)")
    for shown in (str(plan), fg.draw(plan).svg, fg.plot_rule("d(ReLU)").get_title()):
        assert "d(ReLU)" in shown
        assert "get(" not in shown
