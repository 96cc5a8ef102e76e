"""`check_rule` finds each kind of fault in a rule that has it, and says what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import freegrad_fx as fg
from freegrad_fx.testing import CHECKS, check_rule

NAME = "checked"


@dataclass
class Fault:
    """A rule with one fault.

    Attributes:
        check: The checks that find it; others must not.
        words: What the error says, as a pattern.
        formula: The formula.
        declared: What `register` is given besides.
        given: What `check_rule` is given.
        text: The docstring.
    """

    check: str
    words: str
    formula: Callable[..., Any]
    declared: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    text: str = "the formula"


def declare(formula: Callable[..., Any], text: str = "the formula", **declared: Any) -> fg.Rule:
    formula.__doc__ = text
    return fg.register(NAME, overwrite=True, **{"reference": "own work", **declared})(formula)


def failures_of(rule: fg.Rule, **given: Any) -> fg.RuleCheckError:
    with pytest.raises(fg.RuleCheckError) as caught:
        check_rule(rule, **given)
    return caught.value


# --- one rule for each fault ---


def branches_on_data(grad: Tensor) -> Tensor:
    return grad if grad.numel() and grad.flatten()[0] > 1e30 else 2 * grad


def copies_into_zeros(grad: Tensor) -> Tensor:
    out = torch.zeros((), dtype=grad.dtype, device=grad.device).expand(grad.shape).clone()
    out = out if grad.dim() != 4 else out.to(memory_format=torch.channels_last)
    return out.copy_(grad)


class _Cut(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sigmoid()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


def counts_calls() -> Callable[[Tensor], Tensor]:
    calls: list[int] = []

    def formula(grad: Tensor) -> Tensor:
        calls.append(1)
        return grad * len(calls)

    return formula


def unfinished(grad: Tensor, *, width: float) -> Tensor:
    return grad * width


def doubled(grad: Tensor) -> Tensor:
    return 2 * grad


def writing(grad: Tensor) -> Tensor:
    return grad.mul_(2)


def writing_mask(x: Tensor) -> Tensor:
    return x.clamp_(-1, 1) > 0


def gated(grad: Tensor, mask: Tensor) -> Tensor:
    return grad * mask


def odd_mask(x: Tensor) -> Tensor:
    return x.sigmoid()


def clamped(grad: Tensor) -> Tensor:
    return grad.clamp(-1, 1)


FAULTS = {
    "raises": Fault("runs", r"found: +ZeroDivisionError: .*", lambda grad: grad * (1 // 0)),
    "raises without dimensions": Fault(
        "runs",
        r"at float16 of shape \(\).*\(and at \d+ more\)[^0]*found: +IndexError.*[^0]*remedy: .*without dimensions",
        lambda grad: grad * (grad.shape[0] >= 0),
    ),
    "raises for an empty gradient": Fault(
        "runs",
        r"at float16 of shape \(0,\)",
        lambda grad: grad + 0 * grad.flatten()[0].detach(),
        {"reducing": True, "linear": True},
    ),
    "returns no tensor": Fault("runs", r"found: +NoneType None", lambda grad: None),
    "a number for all entries": Fault(
        "shape", r"the shape of x, \(3, 4\)\s+found: +\(\)", lambda grad: grad.sum()
    ),
    "drops a dimension of one entry": Fault(
        "shape", r"at float16 of shape \(1,\)", lambda grad: 2 * grad.squeeze()
    ),
    "stays in single precision": Fault(
        "dtype",
        r"expected: torch.float16\s+found: +torch.float32\s+remedy: .*result.to\(grad.dtype\)",
        lambda grad: 2 * grad.to(torch.promote_types(grad.dtype, torch.float32)),
    ),
    "loses the memory format": Fault(
        "layout", r"channels_last\s+found: +strides", lambda grad: (2 * grad).contiguous()
    ),
    "a tensor on the CPU": Fault(
        "device",
        r"on the device 'meta'.*\s.*\s.*\s+remedy: .*torch.zeros_like\(grad\)",
        lambda grad: grad * torch.full(grad.shape, 2.0, dtype=grad.dtype),
    ),
    "writes into the gradient": Fault(
        "purity", r"the formula writes into grad\s+remedy: .*grad \* 2", writing
    ),
    "a fast form that writes": Fault(
        "purity", r"the fast form writes into grad", doubled, {"fast": writing}
    ),
    "a mask that writes": Fault("purity", r"the mask writes into x", gated, {"mask": writing_mask}),
    "returns its input": Fault(
        "purity", r"returns the memory of x\s+remedy: +return x.clone\(\)", lambda grad, x: x
    ),
    "draws without saying so": Fault(
        "random",
        r"as the rule declares none[^§]*register the rule with random=True",
        lambda grad: grad * torch.rand_like(grad),
    ),
    "draws without any use": Fault(
        "random",
        r"the rule draws from PyTorch's generator",
        lambda grad: grad + 0 * torch.rand_like(grad),
    ),
    "says that it draws": Fault(
        "random", r"registered with random=True", doubled, {"random": True}
    ),
    "no formula": Fault("formula", r"begin the docstring with the formula", doubled, text=""),
    "no source": Fault("citation", r"register\('checked', reference=", doubled, {"reference": ""}),
    "clips without saying so": Fault(
        "linear", r"rule\(a − 3·b\)[^§]*register the rule with linear=False", clamped
    ),
    "says that it clips": Fault(
        "linear", r"registered with linear=False", doubled, {"linear": False}
    ),
    "reduces without saying so": Fault(
        "reducing",
        r"when all other entries become 30 times as large[^§]*register the rule with reducing=True",
        lambda grad: grad - grad.mean(),
    ),
    "counts the entries": Fault(
        "reducing",
        r"for the entry at index \(0, 0\) alone",
        lambda grad: grad / max(grad.numel(), 1),
    ),
    "says that it reduces": Fault(
        "reducing", r"registered with reducing=True", doubled, {"reducing": True}
    ),
    "depends on the shape, and is declared joint": Fault(
        "joint",
        r"flattened[^§]*register the rule without joint=True",
        lambda grad: grad - grad.mean(-1, keepdim=True) if grad.dim() else grad * 0,
        {"reducing": True, "joint": True},
    ),
    "takes no sparse gradient": Fault(
        "sparse",
        r"register the rule without sparse=True",
        lambda grad: torch.maximum(grad, 0.5 * grad),
        {"sparse": True, "linear": False},
    ),
    "makes a sparse gradient dense": Fault(
        "sparse",
        r"expected: a sparse gradient\s+found: +one of torch.strided",
        lambda grad, x: torch.zeros_like(x) + 2 * grad,
        {"sparse": True},
    ),
    "another fast form": Fault(
        "fast",
        r"the gradient of the formula: 0.78",
        doubled,
        {"fast": lambda grad: 2.001 * grad},
    ),
    "a fast form that passes NaN": Fault(
        "fast",
        r"small, large and border values",
        lambda grad, x: torch.where(x > 0, grad, 0),
        {"fast": lambda grad, x: torch.where(x <= 0, 0, grad)},
    ),
    "a fast form that serves nothing": Fault(
        "fast",
        r"NotImplemented for all inputs and values",
        doubled,
        {"fast": lambda grad: NotImplemented},
    ),
    "a fast form that raises": Fault(
        "fast", r"found: +ZeroDivisionError", doubled, {"fast": lambda grad: 1 // 0}
    ),
    "a mask of numbers": Fault(
        "mask", r"let mask= return a boolean tensor of the shape of x", gated, {"mask": odd_mask}
    ),
    "an if on the data": Fault(
        "device compiled func",
        r"no `if` on entries",
        branches_on_data,
    ),
    "a write that vmap refuses": Fault(
        "func", r"torch.vmap of torch.func.vjp[^0]*", copies_into_zeros
    ),
    "a derivative cut off": Fault(
        "second_derivative",
        r"∂/∂x of the rule by finite differences: .*\s+found: +0;[^§]*\.detach\(\)",
        lambda grad, x: grad * x.detach().sigmoid(),
    ),
    "a wrong derivative": Fault(
        "second_derivative",
        r"a custom autograd.Function needs a backward",
        lambda grad, x: grad * _Cut.apply(x),
    ),
    "overflows in half precision": Fault(
        "half_precision",
        r"where x = 1000 and grad = 1\s+expected: .* 0.999999\s+found: +nan[^§]*x.float\(\)",
        lambda grad, x: grad * torch.where(x.abs() < 1e4, x * x / (1 + x * x), 1),
    ),
    "overflows": Fault(
        "half_precision extreme_values non_finite",
        r"torch.sigmoid instead of exp",
        lambda grad, x: grad * x.exp() / (1 + x.exp()) ** 2,
    ),
    "divides by zero": Fault(
        "extreme_values",
        r"where x = 0 .*\s+expected: a finite gradient\s+found: +inf",
        lambda grad, x: grad / x,
    ),
    "zero times infinity": Fault(
        "non_finite",
        r"at x = inf, with a finite gradient[^§]*found: +nan",
        lambda grad, x: grad * x * torch.exp(-x.abs()),
    ),
    "fails for NaN": Fault(
        "non_finite",
        r"at an entry of grad that is nan[^§]*found: +ValueError",
        lambda grad: 2 * grad if not _has_nan(grad) else _refuse(),
        given={"skip": dict.fromkeys(("device", "compiled", "func"), "it reads entries")},
    ),
    "another reference": Fault(
        "reference",
        r"what the reference gives: .* at index \(0, 0\)",
        doubled,
        given={"reference": lambda grad: 3 * grad},
    ),
    "a parameter of the wrong sign": Fault(
        "primitive",
        r"for the parameter 't'[^§]*what the primitive gives",
        lambda grad, x, *, t=0.5: grad * t,
        {"learns": {"t": lambda grad, x, *, t=0.5: -grad * x}},
        {"primitive": lambda x, t: t * x, "skip": {"compiled": "it takes long"}},
    ),
    "another derivative than that of the primitive": Fault(
        "primitive",
        r"the derivative of the primitive by x, times grad",
        doubled,
        given={"primitive": lambda x: 3 * x, "skip": {"compiled": "it takes long"}},
    ),
    "a parameter of another reference": Fault(
        "reference",
        r"for the parameter 't'[^§]*what the reference gives",
        lambda grad, x, *, t=0.5: {"x": grad * t, "t": lambda: grad * x},
        {"learns": "t"},
        {
            "reference": lambda grad, x, t: {"x": grad * t, "t": 2 * grad * x},
            "skip": {"compiled": "it takes long"},
        },
    ),
    "a parameter that gets no gradient": Fault(
        "learnt",
        r"found: +RuleError[^§]*no gradient for 't'",
        lambda grad, x, *, t=0.5: {"x": grad * t},
        {"learns": "t"},
        {"skip": {"compiled": "it takes long"}},
    ),
    "a parameter with an infinite gradient": Fault(
        "learnt",
        r"a finite gradient of the parameter\s+found: +-?(inf|nan)",
        lambda grad, x, *, t=0.5: grad * t,
        {"learns": {"t": lambda grad, x, *, t=0.5: grad / (x - x)}},
        {"skip": {"compiled": "it takes long"}},
    ),
    "a parameter whose gradient is summed": Fault(
        "learnt",
        r"found: +RuleError[^§]*a tensor that is broadcast against x",
        lambda grad, x, *, t=0.5: grad * t,
        {"learns": {"t": lambda grad, x, *, t=0.5: (grad * x).sum()}},
        {"skip": {"compiled": "it takes long"}},
    ),
    "a reference that raises": Fault(
        "reference",
        r"found: +ZeroDivisionError[^§]*called as reference\(grad, parameters by keyword\)",
        doubled,
        given={"reference": lambda grad: 1 // 0},
    ),
}


def _has_nan(grad: Tensor) -> bool:
    # a batch has no entries to read, and such inputs are not what this fault is about
    return bool(grad.isnan().any())


def _refuse() -> Tensor:
    raise ValueError("not a number")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_explained(name: str) -> None:
    fault = FAULTS[name]
    rule = declare(fault.formula, fault.text, **fault.declared)
    error = failures_of(rule, **fault.given)
    assert {failure.check for failure in error.failures} == set(fault.check.split()), str(error)
    with pytest.raises(AssertionError, match=fault.words):
        raise error


def test_every_check_has_a_rule_that_it_refuses() -> None:
    found = {check for fault in FAULTS.values() for check in fault.check.split()}
    assert found | {"pointwise"} == set(CHECKS)  # for this tests/extension builds the C++ extension


# --- what it says, and what it leaves as it was ---


def test_one_error_lists_all_failures() -> None:
    rule = declare(clamped, "", reference="", reducing=True)
    error = failures_of(rule)
    assert isinstance(error, AssertionError)
    assert [f.check for f in error.failures] == ["formula", "citation", "linear", "reducing"]
    text = str(error)
    assert text.startswith("rule 'checked' fails 4 checks:\n\n1. formula, at the docstring\n")
    assert all(str(failure) in text for failure in error.failures)
    assert "not run" not in text


def test_a_rule_that_fails_on_ordinary_inputs_is_not_checked_further() -> None:
    error = failures_of(declare(writing, ""))
    assert {failure.check for failure in error.failures} == {"purity", "formula"}
    assert "The other checks were not run, as they rely on these." in str(error)


def test_what_a_compiler_says_is_in_the_failure() -> None:
    def formula(grad: Tensor) -> Tensor:
        return torch.from_numpy(2 * grad.numpy()).reshape(grad.shape)

    found = {failure.check: failure.found for failure in failures_of(declare(formula)).failures}
    assert "Error" in found["compiled"].partition("raised: ")[2]
    assert "meta" in found["device"]


def test_a_check_is_left_out_with_a_reason() -> None:
    rule = declare(clamped, "", reference="")
    reasons = {"linear": "we never use jvp", "citation": "ours"}
    error = failures_of(rule, skip=reasons)
    assert [failure.check for failure in error.failures] == ["formula"]
    assert str(error).endswith("Left out: linear (we never use jvp); citation (ours).")
    check_rule(rule, skip={**reasons, "formula": "it has no name"})


def test_values_are_those_of_the_rule_or_its_defaults_and_examples() -> None:
    seen: list[float] = []

    def formula(grad: Tensor, *, width: float = 1.0) -> Tensor:
        seen.append(width)
        return grad * width

    skip = {"compiled": "a list in the formula"}
    rule = declare(formula, examples=({"width": 0.5}, {"width": 2.0}))
    check_rule(rule, skip=skip)
    assert set(seen) == {1.0, 0.5, 2.0}
    seen.clear()
    check_rule(rule(width=3.0), skip=skip)
    assert set(seen) == {3.0}


def test_a_rule_without_defaults_is_checked_with_its_examples() -> None:
    with pytest.raises(fg.RuleError, match=r"has no value for width\. Bind it"):
        check_rule(declare(unfinished))
    check_rule(declare(unfinished, examples=({"width": 2.0},)))
    check_rule(declare(unfinished)(width=2.0))


def test_the_failure_names_the_values() -> None:
    def formula(grad: Tensor, *, width: float = 1.0) -> Tensor:
        return grad * width if width < 2 else grad.sum()

    rule = declare(formula, examples=({"width": 1.5}, {"width": 2.5}))
    (failure,) = failures_of(rule).failures
    assert failure.at == "float32 of shape (3, 4), with width=2.5"


def test_a_reference_is_given_what_the_rule_reads_and_the_parameters_that_it_takes() -> None:
    def formula(grad: Tensor, x: Tensor, *, slope: float = 2.0, gain: float = 1.0) -> Tensor:
        return gain * grad * torch.sigmoid(slope * x)

    def in_numpy(grad: Tensor, x: Tensor, *, slope: float) -> Any:
        with np.errstate(over="ignore"):
            return grad.numpy() / (1 + np.exp(-slope * x.numpy()))

    rule = declare(formula, examples=({"slope": 1.0}, {"gain": 3.0}))
    check_rule(rule, reference=in_numpy)  # not at gain=3.0, which the reference does not know
    check_rule(rule(slope=5.0), reference=in_numpy)
    with pytest.raises(fg.RuleCheckError, match=r"reference, at float64 of shape \(3, 4\), with"):
        check_rule(rule, reference=lambda grad, x, **values: in_numpy(grad, x, slope=2.0))


def test_the_operation_gives_the_output_that_a_rule_reads() -> None:
    def formula(grad: Tensor, y: Tensor) -> Tensor:
        seen.append(y.detach().amin().item() if y.numel() and y.device.type == "cpu" else 0.0)
        return grad * y

    seen: list[float] = []
    skip = dict.fromkeys(("compiled", "func", "reducing"), "it reads entries")
    rule = declare(formula)
    check_rule(rule, op="relu", skip=skip)
    assert min(seen) == pytest.approx(0, abs=1e-5)
    check_rule(rule, op=lambda x: x.clamp(-3, -2), skip=skip)
    assert min(seen) == pytest.approx(-3, abs=0.1)
    with pytest.raises(fg.RuleError, match=r"unknown operation 'rellu'\. Did you mean 'relu'\?"):
        check_rule(rule, op="rellu")


def test_a_rule_of_an_operation_that_changes_the_shape() -> None:
    def formula(grad: Tensor) -> Tensor:
        return torch.cat([grad, grad], -1)

    rule = declare(formula, keeps_shape=False)
    with pytest.raises(fg.RuleError, match=r"it needs the operation .*op=\.\.\."):
        check_rule(rule)
    check_rule(rule, op="glu")
    with pytest.raises(ValueError, match=r"does not take a torch.float32 tensor"):
        check_rule(rule, op=lambda x: x.reshape(5, 5))


def test_options_of_the_rule_do_not_matter() -> None:
    check_rule(fg.rules.rectangular(a=-1.0, b=1.0, save="mask", compile=True))


def test_generators_are_as_before() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    check_rule("full_jam")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("rule", "given", "error", "words"),
    [
        (fg.compose("clip_norm", "noise"), {}, TypeError, "its parts one by one: clip_norm, noise"),
        (fg.rules.scale(s=torch.ones(3, 1)), {}, TypeError, "'s' of shape .* Bind a number"),
        ("scale", {"skip": {"linaer": "x"}}, fg.RuleError, "Did you mean 'linear'"),
        ("scale", {"skip": {"linear": ""}}, TypeError, "gives no reason"),
        ("scael", {}, fg.RuleError, "Did you mean 'scale'"),
    ],
)
def test_what_cannot_be_checked_is_refused(
    rule: Any, given: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        check_rule(rule, **given)


def test_a_tensor_without_dimensions_is_a_value() -> None:
    rule = fg.rules.scale(s=torch.tensor(0.5))
    check_rule(rule, skip={"dtype": "two tensors without dimensions promote"})
