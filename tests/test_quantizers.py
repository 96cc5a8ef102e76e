"""Forwards with their rules as one value: against naive code, Brevitas, and the ratio of signal to noise."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx import quantizers
from freegrad_fx.core.rule import Rule


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (0.02 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def channels(w: Tensor, per_channel: bool = True) -> list[list[float]]:
    return [c.flatten().tolist() for c in (w if per_channel else [w])]


def absmax(bits: int, per_channel: bool) -> Callable[[Tensor], list[float]]:
    def naive(w: Tensor) -> list[float]:
        most, found = 2 ** (bits - 1) - 1, []
        for c in channels(w, per_channel):
            step = max(map(abs, c)) / most
            found += [round(v / step) * step for v in c]
        return found

    return naive


def ternary(w: Tensor) -> list[float]:
    (c,) = channels(w, per_channel=False)
    delta = 0.7 * sum(map(abs, c)) / len(c)
    above = [abs(v) for v in c if abs(v) > delta]
    alpha = sum(above) / len(above)
    return [0.0 if abs(v) <= delta else math.copysign(alpha, v) for v in c]


def binary(w: Tensor) -> list[float]:
    return [math.copysign(sum(map(abs, c)) / len(c), v) for c in channels(w) for v in c]


def dorefa(bits: int) -> Callable[[Tensor], list[float]]:
    def naive(w: Tensor) -> list[float]:
        (c,) = channels(w, per_channel=False)
        n, m = 2**bits - 1, max(abs(math.tanh(v)) for v in c)
        return [2 * round(n * (math.tanh(v) / (2 * m) + 0.5)) / n - 1 for v in c]

    return naive


# With the ratio of signal to noise of normal weights, 64 by 512, in dB. For a normal distribution, that of the best
# binary values is 10·log10(1/(1 − 2/π)) = 4.4.
QUANTIZERS: dict[str, tuple[Rule, Callable[[Tensor], list[float]], float]] = {
    "int8": (quantizers.int8(), absmax(8, True), 42.6),
    "int8, whole": (quantizers.int8(per_channel=False), absmax(8, False), 40.3),
    "int4": (quantizers.int4(), absmax(4, True), 17.4),
    "int4, whole": (quantizers.int4(per_channel=False), absmax(4, False), 15.1),
    "ternary": (quantizers.ternary(), ternary, 7.2),
    "binary": (quantizers.binary(), binary, 4.4),
    "dorefa": (quantizers.dorefa(bits=3), dorefa(3), -21.2),
}


def quantised(rule: Rule, w: Tensor) -> Tensor:
    function: Any = rule.forward
    result: Tensor = function(w)
    return result


@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_forward_is_that_of_naive_code(name: str) -> None:
    rule, naive, _ = QUANTIZERS[name]
    w = weights(6, 3, 5, dtype=torch.float64)
    expected = torch.tensor(naive(w), dtype=w.dtype).view_as(w)
    torch.testing.assert_close(quantised(rule, w), expected, rtol=1e-12, atol=1e-15)
    for special in (torch.zeros(3, 4), torch.zeros(0, 4), weights(7), weights()):
        assert quantised(rule, special).shape == special.shape
        assert quantised(rule, special).isfinite().all()
    half = weights(6, 5, dtype=torch.float16)
    assert quantised(rule, half).dtype == torch.float16
    assert quantised(rule, torch.tensor([[1.0, math.nan]]))[0, 1].isnan()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_the_report_has_the_ratio_of_signal_to_noise(name: str) -> None:
    rule, naive, decibels = QUANTIZERS[name]
    layer = nn.Linear(512, 64)
    w = weights(64, 512)
    layer.weight = nn.Parameter(w)
    table = fg.RuleTable([fg.on(parameter="weight").backward(rule)])
    gm = fg.transform(layer, table)
    (decision,) = fg.report(gm).with_action("rewrite")
    q = torch.tensor(naive(w.double())).double().view_as(w)
    expected = 10 * math.log10(w.double().square().sum() / (w - q).square().sum())
    assert decision.snr == pytest.approx(expected, abs=0.05)
    assert decision.snr == pytest.approx(decibels, abs=0.3)
    assert f"(SNR {decision.snr:.1f} dB)" in fg.report(gm).to_text(0)
    assert fg.RuleTable.from_toml(table.to_toml()) == table


def decision_for(forward: Any, value: Tensor) -> Any:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(value, requires_grad=value.is_floating_point())
    rule = fg.rules.get("straight_through")(forward=forward)
    return fg.explain(layer, {"params": rule}).decisions[0]


def test_the_ratio_follows_the_values_and_every_way_in_has_it() -> None:
    layer, x = nn.Linear(4, 2), torch.ones(1, 4)
    table = fg.RuleTable([fg.on(parameter="weight").backward(quantizers.int4())])
    gm = fg.transform(layer, table)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[7.0, 1, -3, 0], [3.5, 0.5, 1, -2]]))
    block = fg.use(table, model=layer)
    with block:
        layer(x)
    compiled = fg.compile(layer, table, backend="eager")
    compiled(x)
    for plan in (fg.report(gm), fg.report(block), fg.report(compiled), fg.explain(layer, table)):
        (decision,) = plan.with_action("rewrite")
        assert decision.snr == math.inf
    assert '"snr": "inf"' in fg.report(gm).to_json()


@pytest.mark.parametrize(
    ("forward", "value"),
    [
        ("round", torch.zeros(2, 2)),
        ("round", torch.tensor([[math.nan]])),
        ("round", torch.empty(0, 2)),
        (lambda w: w / 0, torch.ones(1, 1)),
    ],
)
def test_no_ratio_where_it_is_not_defined(forward: Any, value: Tensor) -> None:
    decision = decision_for(forward, value)
    assert decision.snr is None
    assert decision.action == "rewrite"


def test_the_ratio_draws_no_numbers_and_writes_nothing() -> None:
    def noisy(w: Tensor) -> Tensor:
        return w.mul_(0.5) + torch.rand_like(w)

    layer = nn.Linear(2, 2)
    before, state = layer.weight.clone(), torch.get_rng_state()
    rule = fg.rules.get("straight_through")(forward=noisy)
    plan = fg.explain(layer, {"params": rule})
    assert all(d.snr is not None for d in plan.decisions)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer.weight, before)


def gradient(rule: Rule, w: Tensor, g: Tensor) -> Tensor:
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False).to(w.dtype)
    layer.weight = nn.Parameter(w.clone())
    gm = fg.transform(layer, {"params": rule})
    gm(torch.eye(w.shape[1], dtype=w.dtype)).mul(g.T).sum().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad


@pytest.mark.parametrize("name", ["int8", "int4", "ternary", "dorefa"])
def test_the_gradient_is_that_of_a_forward_with_a_detached_rounding(name: str) -> None:
    w, g = weights(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    rule, _, _ = QUANTIZERS[name]
    v = w.clone().requires_grad_()
    smooth = v.tanh() / v.tanh().abs().max() if name == "dorefa" else v
    (expected,) = torch.autograd.grad(smooth, v, g)
    torch.testing.assert_close(gradient(rule, w, g), expected)


def test_the_gradient_of_binary_weights() -> None:
    """α·sign(w) with the clipped straight-through sign, times n·(1 − 1/s), as in the code of the authors."""
    w, g = 20 * weights(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    v = w.clone().requires_grad_()
    through = v.clamp(-1, 1)
    y = v.abs().mean(1, keepdim=True) * (through + (v.sign() - through).detach())
    (expected,) = torch.autograd.grad(y, v, g)
    torch.testing.assert_close(gradient(quantizers.binary(), w, g), 6 * (1 - 1 / 6) * expected)
    clipped = gradient(quantizers.binary(scale=False), w, g)
    torch.testing.assert_close(clipped, g * (w.abs() <= 1))


@pytest.mark.parametrize("make", [lambda: quantizers.dorefa(bits=1), lambda: quantizers.dorefa(17)])
def test_unsupported_numbers_of_bits_are_refused(make: Callable[[], Rule]) -> None:
    with pytest.raises(fg.TableError, match="dorefa has 2 to 16 bits"):
        make()


@pytest.mark.parametrize("name", ["int8", "int8, whole"])
def test_weights_are_those_of_brevitas(name: str) -> None:
    layers = pytest.importorskip(
        "brevitas.nn", reason="needs the extra `peers`", exc_type=ImportError
    )
    from brevitas import quant

    kind = "PerTensor" if "whole" in name else "PerChannel"
    scheme = getattr(quant, f"Int8Weight{kind}Float")
    layer = layers.QuantLinear(16, 8, bias=False, weight_quant=scheme)
    layer.weight = nn.Parameter(weights(8, 16))
    theirs = layer.quant_weight()
    value = theirs if isinstance(theirs, Tensor) else theirs.value
    rule, _, _ = QUANTIZERS[name]
    torch.testing.assert_close(quantised(rule, layer.weight.detach()), value.detach())
    g = torch.randn(8, 16)
    (expected,) = torch.autograd.grad(value, layer.weight, g)
    # Brevitas passes a gradient through the range too, at the entry that sets it
    size = layer.weight.detach().abs()
    inner = size < (size.amax() if "whole" in name else size.amax(1, keepdim=True))
    found = gradient(rule, layer.weight.detach(), g)
    torch.testing.assert_close(found[inner], expected[inner])


# --- a step for each weight ---


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()


def learnt_by_hand(w: Tensor, step: Tensor, bits: int) -> Tensor:
    """LSQ as its authors' pseudocode writes it, with detach."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = 1 / math.sqrt(w.numel() * high)
    s = (step - step * scale).detach() + step * scale
    level = (w / s).clamp(low, high)
    return ((level.round() - level).detach() + level) * s


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("door", ["transform", "export", "use"])
def test_lsq_learns_a_step_for_each_weight(door: str, bits: int, per_channel: bool) -> None:
    model, x = small(), torch.randn(5, 4, dtype=torch.float64)
    rule = quantizers.lsq(bits=bits, per_channel=per_channel)
    table = fg.RuleTable([fg.on(parameter="*.weight").backward(rule)])
    if door == "use":
        with fg.use(table, model=model) as block:
            y = model(x)
        decisions = fg.report(block).decisions
        again = fg.use(table, model=model)
        with again:
            assert torch.equal(model(x), y)
        later = fg.report(again).decisions
        assert all(
            a.rules == b.rules for a, b in zip(decisions, later, strict=True)
        )  # tensors are compared by identity
    else:
        gm = fg.transform(model, table, **({"example_inputs": (x,)} if door == "export" else {}))
        y, decisions = gm(x), fg.report(gm).decisions
        assert list(gm.state_dict()) == list(model.state_dict())
        assert sorted(gm.rule_state_dict()) == ["0.weight/lsq.step", "2.weight/lsq.step"]
    steps = {
        d.site.name: d.rules[0].bound["step"] for d in decisions if d.site.name.endswith("weight")
    }
    by_hand = {}
    for name, w in model.named_parameters():
        if name.endswith("weight"):
            dims = (1,) if per_channel else (0, 1)
            first = 2 * w.detach().abs().mean(dims, keepdim=per_channel)
            by_hand[name] = (first / math.sqrt(2 ** (bits - 1) - 1)).requires_grad_()
            torch.testing.assert_close(steps[name].detach(), by_hand[name].detach())
    hidden = nn.functional.linear(
        x, learnt_by_hand(model[0].weight, by_hand["0.weight"], bits), model[0].bias
    )
    expected = nn.functional.linear(
        hidden.relu(), learnt_by_hand(model[2].weight, by_hand["2.weight"], bits), model[2].bias
    )
    torch.testing.assert_close(y, expected)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), [*model.parameters(), *steps.values()]),
        torch.autograd.grad(expected.square().sum(), [*model.parameters(), *by_hand.values()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_copies_have_steps_of_their_own() -> None:
    model, x = small(), torch.randn(5, 4, dtype=torch.float64)
    table = fg.RuleTable([fg.on(parameter="*.weight").backward(quantizers.lsq())])
    gm = fg.transform(model, table)
    loaded = pickle.loads(pickle.dumps(gm))
    copied = copy.deepcopy(gm)
    for other in (loaded, copied):
        assert torch.equal(other(x), gm(x))
        names = [name for name, _ in other.named_parameters()]
        assert names == [name for name, _ in gm.named_parameters()]
    before = gm(x)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if name.startswith("rule_parameter_"):
                parameter.mul_(3)
    assert torch.equal(gm(x), before)
    assert not torch.equal(copied(x), before)
    # a plan of the model has the same steps, and another table has others
    assert fg.explain(model, table).decisions[1].rules == fg.report(gm).decisions[1].rules
    other = fg.RuleTable([fg.on(parameter="*.weight").backward(quantizers.lsq())])
    assert fg.explain(model, other).decisions[1].rules != fg.report(gm).decisions[1].rules


def test_a_weight_of_zeros_gets_a_step_above_zero() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    nn.init.zeros_(model[0].weight)
    gm = fg.transform(model, fg.RuleTable([fg.on(parameter="*.weight").backward(quantizers.lsq())]))
    y = gm(torch.ones(1, 2))
    assert bool(y.isfinite().all())


def test_where_lsq_cannot_be_is_said() -> None:
    model, x = small(), torch.randn(5, 4, dtype=torch.float64)
    with pytest.raises(fg.PlanError, match=r"1:relu\[0\] is an operation. Select parameters"):
        fg.transform(model, {"relu": quantizers.lsq()})
    table = fg.RuleTable([fg.on(parameter="*.weight").backward(quantizers.lsq())])
    with pytest.raises(fg.PlanError, match="Transform the model, or run it in a block"):
        fg.compile(model, table, backend="eager")(x)
    compiled = torch.compile(fg.transform(model, table), backend="eager")
    assert torch.equal(compiled(x), fg.transform(model, table)(x))
    for bits in (1, 17, 2.5, True):
        with pytest.raises(fg.RuleError, match="from 2 to 16"):
            quantizers.lsq(bits=bits)


def test_a_step_that_is_made_in_inference_mode_is_learnt_later() -> None:
    model, x = small(), torch.randn(5, 4, dtype=torch.float64)
    table = fg.RuleTable([fg.on(parameter="*.weight").backward(quantizers.lsq())])
    with torch.inference_mode(), fg.use(table, model=model):
        expected = model(x).clone()
    with fg.use(table, model=model) as block:
        y = model(x)
    steps = [d.rules[0].bound["step"] for d in fg.report(block).decisions if d.rules]
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y.square().sum(), [*steps, *model.parameters()])
    assert all(g.isfinite().all() for g in found)
