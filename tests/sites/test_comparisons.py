"""Steps that a model computes as comparisons: with a rule, their gradients are those of a surrogate by hand."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import freegrad_fx as fg
from freegrad_fx.vocabulary import heaviside
from models import VISION, Vision

RULES = {"heaviside": fg.rules.arctan(alpha=2.0)}
X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))

Spike = Callable[[Tensor, Tensor], Tensor]


class ByHand(torch.autograd.Function):
    """The step of snnTorch and SpikingJelly with their arctan surrogate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at_zero: bool) -> Tensor:
        ctx.save_for_backward(x)
        return ((x >= 0) if at_zero else (x > 0)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad / (1 + (torch.pi * x) ** 2), None


def by_hand(x: Tensor, at_zero: bool = False) -> Tensor:
    return ByHand.apply(x, at_zero)


class LIF(nn.Module):
    """Three steps of leaky integrate-and-fire neurons with learnt thresholds."""

    def __init__(self, spike: Spike) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
        self.threshold = nn.Parameter(torch.tensor([0.1, 0.2, 0.0, -0.1]))
        self.spike = spike

    def forward(self, x: Tensor) -> Tensor:
        mem, total = torch.zeros(x.shape[0], 4), torch.zeros(())
        for _ in range(3):
            mem = 0.9 * mem + self.fc(x)
            spikes = self.spike(mem, self.threshold)
            mem = mem - spikes * self.threshold
            total = total + self.out(spikes)
        return total


# How networks write it, and the same with the surrogate by hand
WRITTEN: dict[str, tuple[Spike, Spike]] = {
    "(v > t).float()": (lambda v, t: (v > t).float(), lambda v, t: by_hand(v - t)),
    "torch.ge(v, t).to(dtype)": (
        lambda v, t: torch.ge(v, t).to(v.dtype),
        lambda v, t: by_hand(v - t, True),
    ),
    "v.gt(number).double()": (
        lambda v, t: v.gt(0.1).double().float(),
        lambda v, t: by_hand(v - 0.1),
    ),
    "t.lt(v).type_as(v)": (lambda v, t: t.lt(v).type_as(v), lambda v, t: by_hand(v - t)),
    "(v < t).to(v)": (lambda v, t: (v < t).to(v), lambda v, t: by_hand(t - v)),
    "(v <= number).to(torch.float32)": (
        lambda v, t: (v <= 0.1).to(torch.float32),
        lambda v, t: by_hand(0.1 - v, True),
    ),
    "torch.where(v > t, 1.0, 0.0)": (
        lambda v, t: torch.where(v > t, 1.0, 0.0),
        lambda v, t: by_hand(v - t),
    ),
    "torch.where(v >= t, 0.0, 1.0)": (
        lambda v, t: torch.where(v >= t, 0.0, 1.0),
        lambda v, t: by_hand(t - v),
    ),
    "1.0 * torch.greater(v, t)": (
        lambda v, t: 1.0 * torch.greater(v, t),
        lambda v, t: by_hand(v - t),
    ),
    "heaviside(v, threshold=t)": (
        lambda v, t: heaviside(v, threshold=t),
        lambda v, t: by_hand(v - t),
    ),
    "heaviside(v, 1.0, threshold=number)": (
        lambda v, t: heaviside(v, 1.0, threshold=0.1),
        lambda v, t: by_hand(v - 0.1, True),
    ),
}


@dataclass
class Ran:
    """What a model gives, the gradients of its parameters, and the names of the sites with a rule."""

    y: Tensor
    gradients: list[Tensor | None]
    sites: list[str]


def ran(model: nn.Module, call: Callable[[Tensor], Tensor], report: Callable[[], Any]) -> Ran:
    model.zero_grad()
    y = call(X)
    y.square().sum().backward()
    gradients = [p.grad for p in model.parameters()]
    return Ran(y.detach(), gradients, [d.site.name for d in report().with_action("rewrite")])


def transformed(model: nn.Module) -> Ran:
    gm = fg.transform(model, RULES)
    with fg.native():
        assert torch.equal(gm(X), model(X))
    return ran(model, gm, lambda: fg.report(gm))


def exported(model: nn.Module) -> Ran:
    gm = fg.transform(model, RULES, example_inputs=(X,))
    return ran(model, gm, lambda: fg.report(gm))


def compiled(model: nn.Module) -> Ran:
    torch.compiler.reset()
    made = fg.compile(model, RULES, backend="aot_eager")
    return ran(model, made, lambda: fg.report(made))


def compiled_after_the_transform(model: nn.Module) -> Ran:
    torch.compiler.reset()
    gm = fg.transform(model, RULES)
    made = torch.compile(gm, backend="aot_eager", fullgraph=True)
    return ran(model, made, lambda: fg.report(gm))


def in_a_block(model: nn.Module, call: Any = None) -> Ran:
    block = fg.use(RULES, model=model)
    with block:
        return ran(model, call or model, lambda: fg.report(block))


def compiled_in_a_block(model: nn.Module) -> Ran:
    torch.compiler.reset()
    made = torch.compile(model, backend="eager")
    return in_a_block(model, lambda x: made(x))


QUICK = (transformed, in_a_block)
# The other ways compile, which takes seconds
CASES = [(written, way) for written in WRITTEN for way in QUICK]
CASES += [(w, exported) for w in list(WRITTEN)[::2]]
CASES += [(w, compiled) for w in list(WRITTEN)[1::3]]
CASES += [(w, compiled_after_the_transform) for w in list(WRITTEN)[2::4]]
CASES += [(w, compiled_in_a_block) for w in list(WRITTEN)[::5]]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of Dynamo, behind a graph break
@pytest.mark.sampled(7)
@pytest.mark.parametrize(("written", "way"), CASES)
def test_gradients_are_those_of_the_surrogate_by_hand(written: str, way: Any) -> None:
    spike, edited = WRITTEN[written]
    model, reference = LIF(spike), LIF(edited)
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        reference.fc.bias[0] = model.fc.bias[0] = 0.1  # v reaches its threshold exactly
        reference.fc.weight[0] = model.fc.weight[0] = 0.0
    expected = ran(reference, reference, lambda: fg.explain(reference))
    found = way(model)
    assert torch.equal(found.y, expected.y)
    for f, e in zip(found.gradients, expected.gradients, strict=True):
        assert (f is None) is (e is None)
        if f is not None:
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-6)
    op = "heaviside" if "heaviside" in written else "comparison"
    assert found.sites == [f"<root>:{op}[{call}]" for call in range(3)]


# Comparisons that are no sites: where the result is used as a bool, or is not a number of floating point
AS_BOOL: dict[str, Callable[[Tensor], Tensor]] = {
    "a mask": lambda v: v.masked_fill(v > 0, 0.0),
    "an index": lambda v: v[(v > 0).any(1)],
    "a choice": lambda v: torch.where(v > 0, v, 0.0),
    "a product": lambda v: v * (v > 0),
    "integers": lambda v: v[(v > 0).long()].sum(1),
    "another choice": lambda v: torch.where(v > 0, 2.0, 0.0) * v,
    "an equality": lambda v: (v == 0).float() + v,
}


@pytest.mark.filterwarnings("ignore:the entry 'heaviside'")
@pytest.mark.parametrize("name", AS_BOOL)
def test_a_comparison_that_is_used_as_a_bool_is_no_site(name: str) -> None:
    class Model(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return AS_BOOL[name](v)

    assert not fg.explain(Model(), RULES).decisions
    with fg.use(RULES) as block:
        Model()(X)
    assert not fg.report(block).decisions


class Masked(nn.Module):
    def forward(self, v: Tensor) -> Tensor:
        return torch.relu(v) * (v > 0.5).float() * (v < 2.0).float()


@pytest.mark.parametrize("op", ["activations", "all", "relu"])
def test_comparisons_are_no_sites_unless_they_are_named(op: str) -> None:
    assert [d.site.op for d in fg.explain(Masked(), {op: "straight_through"}).decisions] == ["relu"]


def test_an_entry_for_activations_does_not_take_the_comparisons_that_another_entry_names() -> None:
    table = fg.RuleTable(
        [
            fg.on("heaviside", call=1).backward("arctan"),
            fg.on("activations").backward("straight_through"),
        ]
    )
    actions = [(d.site.op, d.action) for d in fg.explain(Masked(), table).decisions]
    assert actions == [("relu", "rewrite"), ("comparison", "native"), ("comparison", "rewrite")]
    ordered = fg.RuleTable.of({"activations": "scale", "heaviside": "arctan", "comparison": None})
    assert [e.selector for e in ordered.entries] == ["comparison", "heaviside", "activations"]


class Written(nn.Module):
    """Writes into what it has compared before it converts the result, and into the result afterwards."""

    def __init__(self, spike: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.spike = spike

    def forward(self, x: Tensor) -> Tensor:
        v = 2 * x
        if self.spike is not None:
            spikes = self.spike(v.clone())
            v.mul_(3)
        else:
            fired = v > 0.2
            v.mul_(3)
            spikes = fired.float()
        spikes.mul_(2)
        return spikes + v


@pytest.mark.parametrize("way", ["transform", "export", "use"])
def test_writes_into_the_sides_and_into_the_result(way: str) -> None:
    x, e = X.clone().requires_grad_(), X.clone().requires_grad_()
    expected = Written(lambda v: by_hand(v - 0.2))(e)
    expected.square().sum().backward()
    if way == "use":
        with fg.use(RULES):
            y = Written()(x)
    else:
        y = fg.transform(Written(), RULES, **({"example_inputs": (X,)} if way == "export" else {}))(
            x
        )
    y.square().sum().backward()
    assert torch.equal(y, expected)
    assert e.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(x.grad, e.grad)


class Lengths(nn.Module):
    def forward(self, x: Tensor, lengths: Tensor, flags: Tensor) -> Tensor:
        mask = (torch.arange(3) < lengths[:, None]).float() * (flags > 0).to(x.dtype)
        return x * mask * (x > 0.1).half()


def test_comparisons_of_integers_and_bools_keep_their_results() -> None:
    given = X.clone().requires_grad_(), torch.tensor([1, 2, 3, 0, 1]), torch.rand(5, 1) > 0.3
    gm = fg.transform(Lengths(), RULES)
    y = gm(*given)
    assert torch.equal(y, Lengths()(*given))
    (grad,) = torch.autograd.grad(y.sum(), given[0])
    assert grad.isfinite().all()
    with fg.use(RULES):
        assert torch.equal(Lengths()(*given), y)


def test_a_replaced_forward_reads_the_difference() -> None:
    model = LIF(lambda v, t: (v > t).float())
    rule = fg.rules.straight_through(forward="sigmoid")
    gm = fg.transform(model, {"comparison": rule})
    smooth = LIF(lambda v, t: torch.sigmoid(v - t))
    smooth.load_state_dict(model.state_dict())
    torch.testing.assert_close(gm(X), smooth(X))
    with fg.use({"comparison": rule}, model=model):
        torch.testing.assert_close(model(X), smooth(X))


def test_a_step_in_a_module_with_hooks() -> None:
    class Step(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return (v > 0.1).float()

    model = nn.Sequential(nn.Linear(3, 4), Step(), nn.Linear(4, 2))
    model[1].register_forward_hook(lambda module, args, out: out * 2)
    gm = fg.transform(model, RULES)
    assert torch.equal(gm(X), model(X))
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(gm(x).sum(), x)
    v = model[0](x)
    step = 2 * by_hand(v - 0.1)
    (expected,) = torch.autograd.grad(model[2](step).sum(), x)
    torch.testing.assert_close(grad, expected)


def test_a_transformed_model_keeps_its_steps_when_it_is_transformed_again() -> None:
    gm = fg.transform(LIF(lambda v, t: (v > t).float()), RULES)
    with pytest.warns(fg.FreegradWarning, match="already decoupled"):
        again = fg.transform(gm, RULES)
    counts = [sum(n.target is fg.ops.decoupled for n in g.graph.nodes) for g in (gm, again)]
    assert counts == [3, 3]
    assert isinstance(again, fx.GraphModule)


class Saved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0.1).float()


def test_a_saved_model_keeps_its_steps() -> None:
    saved = io.BytesIO()
    torch.save(fg.transform(Saved(), RULES), saved)
    saved.seek(0)
    x, e = X.clone().requires_grad_(), X.clone().requires_grad_()
    torch.load(saved, weights_only=False)(x).sum().backward()
    by_hand(e - 0.1).sum().backward()
    torch.testing.assert_close(x.grad, e.grad)


def test_the_forward_heaviside_has_no_threshold() -> None:
    with pytest.raises(fg.TableError, match=r"step at 0.*\(x > threshold\)"):
        fg.forward("heaviside", threshold=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "vision", [v for v in VISION if v.name in ("resnet18", "swin_t")], ids=lambda v: v.name
)
def test_models_with_masks_keep_their_sites(vision: Vision) -> None:
    sites = [d.site.op for d in fg.explain(vision.make(), "straight_through").decisions]
    assert "comparison" not in sites


@pytest.mark.parametrize("way", ["transform", "use"])
@pytest.mark.parametrize(
    "write", [lambda mask: mask.fill_(False), lambda mask: mask.logical_not_()]
)
def test_a_mask_that_is_written_into_is_no_step(write: Any, way: str) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = x > 0
            write(mask)
            return mask.float() + 0 * x

    x = torch.randn(5, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the entry matches nothing
        if way == "transform":
            y = fg.transform(Writes(), RULES)(x)
        else:
            with fg.use(RULES):
                y = Writes()(x)
    assert torch.equal(y, Writes()(x))
    assert not torch.autograd.grad(y.sum(), x)[0].any()
