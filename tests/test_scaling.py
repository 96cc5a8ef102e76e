"""`unscaled`: rules under a GradScaler, beside the same rules without one."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import freegrad_fx as fg
from freegrad_fx.core.rule import available, get

RULES = {"params": fg.rules.clip_norm(max_norm=0.1), "relu": fg.rules.clip_value(max_value=0.01)}
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def scaler(scale: float = 2.0**16, **options: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def gradients(model: Any) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def expected(rules: Any = RULES) -> list[Tensor]:
    gm = fg.transform(make(), rules)
    gm(X).square().sum().backward()
    return gradients(gm)


def through(way: str, rules: Any, of: torch.amp.GradScaler, counter: Any) -> Any:
    """The model, and the call of it, with rules under a scaler."""
    if way == "use":
        model = make()
        return model, fg.use(rules, model=model, scaler=of)(lambda x: model(x))
    if way == "compile":
        model = fg.compile(make(), fg.unscaled(rules, of), backend=counter)
        return model, model
    gm = fg.transform(make(), fg.unscaled(rules, of))
    return gm, torch.compile(gm, backend=counter) if way == "transform, compiled" else gm


@pytest.mark.parametrize("way", ["transform", "use", "compile", "transform, compiled"])
def test_rules_do_the_same_at_every_scale_and_nothing_is_compiled_again(way: str) -> None:
    ours, counter = scaler(), CompileCounterWithBackend("aot_eager")
    model, call = through(way, RULES, ours, counter)
    for scale in (2.0**16, 2.0**15, 2.0**-3, 1.0):
        ours.update(scale)
        ours.scale(call(X).square().sum()).backward()
        for found, wanted in zip(gradients(model), expected(), strict=True):
            assert torch.equal(found / scale, wanted)
    assert counter.frame_count == ("compile" in way)


def test_without_a_scaler_the_gradient_is_far_too_small() -> None:
    gm = fg.transform(make(), {"params": fg.rules.clip_norm(max_norm=0.1)})
    ours = scaler()
    ours.scale(gm(X).square().sum()).backward()
    norm = gradients(gm)[0].norm() / ours.get_scale()
    assert norm.item() == pytest.approx(0.1 / 65536)  # the trap that the documentation describes


@pytest.mark.parametrize("way", ["transform", "use"])
def test_a_training_is_bit_identical_to_one_without_a_scaler(way: str) -> None:
    rules = {"params": fg.compose("normalize", fg.rules.clip_value(max_value=0.2))}
    plain = fg.transform(make(), rules)
    ours = scaler(2.0**127, growth_interval=3)  # overflows at first
    model, call = through(way, rules, ours, None)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (plain, model)]
    steps = skipped = 0
    while steps < 6:
        ours.scale(call(X).square().sum()).backward()
        before = ours.get_scale()
        ours.step(optimizers[1])
        ours.update()
        model.zero_grad()
        if ours.get_scale() < before:
            skipped += 1
            continue
        plain(X).square().sum().backward()
        optimizers[0].step()
        plain.zero_grad()
        steps += 1
    assert skipped > 0
    assert ours.get_scale() > 2.0**100
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


NONLINEAR = [name for name in available() if not get(name).declaration.linear]


@pytest.mark.parametrize("name", [n for n in NONLINEAR if not get(n).declaration.operation])
def test_every_rule_that_is_not_linear_sees_the_gradient_of_the_loss(name: str) -> None:
    values = {p: 0.3 for p in get(name).parameters if p not in get(name).bound}
    rule: Any = get(name)(**values)
    grad, x = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    given = {"x": x} if "x" in rule.inputs else {}
    for scale in (2.0**16, 2.0**-8):
        under = fg.unscaled(rule, torch.tensor(scale))
        torch.manual_seed(0)
        found = under.backward(grad * scale, **given)
        torch.manual_seed(0)
        assert torch.equal(found / scale, rule.backward(grad, **given))
        for bad in (math.inf, math.nan):
            overflowed = grad.clone()
            overflowed[1, 2, 3] = bad
            assert not under.backward(overflowed, **given).isfinite().all()


def test_the_scale_is_not_among_the_parameters_of_rules() -> None:
    table = fg.unscaled({"relu": fg.rules.clip_value()}, torch.amp.GradScaler("cpu"))
    assert [one.name for one in fg.rule_parameters(table)] == ["max_value"]
    with pytest.raises(fg.RuleError, match=r"scaler\.update"):
        fg.set_parameters(table, loss_scale=torch.tensor(2.0))


def test_a_linear_rule_of_the_package_is_not_changed() -> None:
    table = fg.RuleTable.of({"relu": fg.rules.rectangular(a=-1.0, b=1.0), "gelu": None})
    assert fg.unscaled(table, scaler()) == table
    assert fg.unscaled(RULES["params"], scaler(enabled=False)) == RULES["params"]


@pytest.mark.parametrize("way", ["transform", "use", "compile"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_nothing_underflows(way: str, dtype: torch.dtype) -> None:
    small = 2.0**-20  # a gradient that float16 holds only if it is scaled
    rules = {"relu": fg.compose(fg.rules.clip_value(max_value=2.0**-22), "deconvnet")}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.linear(x))

    torch.manual_seed(0)
    model, ours = Net(), scaler()
    inner: Any = {
        "transform": lambda: fg.transform(model, fg.unscaled(rules, ours)),
        "use": lambda: fg.use(rules, model=model, scaler=ours)(lambda x: model(x)),
        "compile": lambda: fg.compile(model, fg.unscaled(rules, ours), backend="aot_eager"),
    }[way]()
    with torch.autocast("cpu", dtype=dtype):
        y = inner(X)
    assert y.dtype == dtype
    ours.scale((y.float() * small).sum()).backward()
    assert model.linear.bias.grad is not None
    assert (model.linear.bias.grad / 2.0**16).tolist() == [5 * 2.0**-22] * 4


def test_a_learnt_parameter_gets_a_gradient_at_the_scale_of_the_others() -> None:
    def of_limit(grad: Tensor, *, limit: float) -> Tensor:
        return (grad.abs() > limit).to(grad.dtype).mul(grad.sign()).sum()

    @fg.register("limited_by_what_it_learns", linear=False, learns={"limit": of_limit})
    def limited(grad: Tensor, *, limit: float) -> Tensor:
        """clamp(grad, −limit, limit)"""
        return grad.clamp(-limit, limit)

    @fg.register("limited_in_a_dict", linear=False, learns="limit")
    def both(grad: Tensor, *, limit: float) -> Mapping[str, Any]:
        """clamp(grad, −limit, limit)"""
        return {
            "x": limited.function(grad, limit=limit),
            "limit": lambda: of_limit(grad, limit=limit),
        }

    x = torch.linspace(-1, 3, 9)
    for rule in (limited, both):
        found = []
        for scale in (1.0, 2.0**10):
            limit, value = nn.Parameter(torch.tensor(0.7)), x.clone().requires_grad_()
            table = {"relu": rule(limit=limit)}
            gm = fg.transform(nn.Sequential(nn.ReLU()), fg.unscaled(table, torch.tensor(scale)))
            (gm(value) * x * scale).sum().backward()
            assert limit.grad is not None
            assert value.grad is not None
            found.append((limit.grad / scale, value.grad / scale))
        assert torch.equal(found[0][0], found[1][0])
        assert found[0][0] != 0
        assert torch.equal(found[0][1], found[1][1])
        assert found[0][1].max() == torch.tensor(0.7)


def test_the_scale_is_that_of_the_backward() -> None:
    scale = torch.tensor(4.0)
    gm = fg.transform(make(), fg.unscaled(RULES, scale))
    y = gm(X).square().sum()
    scale.fill_(1024.0)
    (y * 1024.0).backward()
    for found, wanted in zip(gradients(gm), expected(), strict=True):
        assert torch.equal(found / 1024.0, wanted)


def test_the_scaler_keeps_its_tensor_when_the_model_is_converted_and_saves_it_alone() -> None:
    ours = scaler()
    gm = fg.transform(make(), fg.unscaled(RULES, ours)).half()
    assert ours.get_scale() == 2.0**16
    assert gm.rule_state_dict() == {}


def test_a_copied_model_that_would_not_follow_the_scaler_is_refused() -> None:
    copied = copy.deepcopy(fg.transform(make(), fg.unscaled(RULES, scaler())))
    with pytest.raises(fg.RuleError, match=r"a copy of the scale .* transform\(model, unscaled"):
        copied(X)
    with torch.no_grad():
        copied(X)  # no rule acts


@pytest.mark.parametrize(
    ("rules", "given", "error", "message"),
    [
        (RULES, 3.0, TypeError, "takes the torch.amp.GradScaler"),
        (RULES, torch.ones(2), TypeError, "of zero dimensions"),
        ("clip_nrom", scaler(), fg.RuleError, "clip_norm"),
        (fg.unscaled(RULES, scaler()), scaler(), fg.RuleError, "already"),
    ],
)
def test_what_makes_no_sense_is_refused(rules: Any, given: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        fg.unscaled(rules, given)


def test_a_rule_that_computes_the_operation_is_refused_in_half_precision() -> None:
    table = fg.unscaled({"linear": "int8_backward"}, scaler())
    gm = fg.transform(nn.Sequential(nn.Linear(4, 3)), table)
    with torch.autocast("cpu", dtype=torch.float16):
        y = gm(X)
    with pytest.raises(fg.RuleError, match=r"'int8_backward' uses `f`, which computes in float16"):
        y.sum().backward()
