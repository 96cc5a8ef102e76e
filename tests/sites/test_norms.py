"""Norms that models compute in separate operations, in every way in, against norms with detached denominators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from doors import DOORS

EPS = 1e-5
SLOW = ("exported", "compiled")
FROZEN = fg.RuleTable([fg.on(["rms_norm", "layer_norm"]).backward("frozen_norm")])


# --- as language models write them ---


class Norm(nn.Module):
    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size, dtype=torch.float64) + 0.5)
        self.bias = nn.Parameter(torch.rand(size, dtype=torch.float64))
        self.eps = EPS


class Llama(Norm):
    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float64)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.eps)
        return self.weight * x.to(dtype)


class Olmo(Norm):
    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float64)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * x).to(dtype)


class Gemma(Norm):
    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        output = self.norm(x.double())
        output = output * (1.0 + self.weight.double())
        return output.type_as(x)


class Gemma3n(Norm):
    def forward(self, x: Tensor) -> Tensor:
        mean_squared = x.pow(2).mean(-1, keepdim=True) + self.eps
        return x * torch.pow(mean_squared, -0.5) * self.weight.double()


class T5(Norm):
    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float64).pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps))


class ImageGPT(Norm):
    def forward(self, x: Tensor) -> Tensor:
        x = x / torch.sqrt(torch.mean(torch.square(x), axis=-1, keepdim=True) + self.eps)
        return x * self.weight


class Unweighted(Norm):
    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.double().square().mean(-1, keepdim=True) + self.eps)
        return x * scale.to(x.dtype)


class Inverse(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (1 / torch.sqrt((x * x).mean(-1, True) + self.eps)))


class Cohere(Norm):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight.double() * ((x - mean) * torch.rsqrt(variance + self.eps))


class Deberta(Norm):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + self.eps)
        return self.weight * x + self.bias


ALL = (Llama, Olmo, Gemma, Gemma3n, T5, ImageGPT, Unweighted, Inverse, Cohere, Deberta)


def constant(self: Norm, x: Tensor) -> Tensor:
    """The norm of a class, with a constant denominator."""
    centred = isinstance(self, Cohere | Deberta)
    x = x - x.mean(-1, keepdim=True) if centred else x
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt().detach()
    if isinstance(self, Unweighted):
        return x
    x = x * (1 + self.weight if isinstance(self, Gemma) else self.weight)
    return x + self.bias if isinstance(self, Deberta) else x


def model_of(*kinds: type[Norm]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for kind in kinds for layer in (nn.Linear(6, 6), kind())]
    return nn.Sequential(*layers, nn.Linear(6, 2)).double()


X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradients(called: Callable[..., Tensor], model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    x = X.clone().requires_grad_()
    y = called(x)
    wanted = [x, *(p for n, p in model.named_parameters() if p.dim() > 1 or "weight" in n)]
    found = torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)
    return y, [torch.zeros(()) if g is None else g for g in found]


# Dynamo reads `.grad` of whatever goes from one graph into the next
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "door",
    [pytest.param(d, id=n, marks=[pytest.mark.slow] * (n in SLOW)) for n, d in DOORS.items()],
)
def test_every_spelling_is_one_operation_in_every_way_in(door: Any) -> None:
    model = model_of(*ALL)
    y, _ = gradients(model, model)
    by_hand = model_of(*ALL)
    for module in by_hand.modules():
        if isinstance(module, Norm):
            module.forward = constant.__get__(module)  # type: ignore[method-assign]
    _, expected = gradients(by_hand, by_hand)
    called = door(model, FROZEN, (X,))
    found_y, found = gradients(called, model)
    assert torch.equal(found_y, y)
    torch.testing.assert_close(found, expected)


def test_the_sites_have_the_same_names_in_a_graph_and_in_a_block() -> None:
    model = model_of(*ALL)
    with fg.use(FROZEN, model=model) as block:
        model(X)
    sites = [[d.site for d in fg.report(m).decisions] for m in (block, fg.transform(model, FROZEN))]
    assert sites[0] == sites[1]
    assert [s.op for s in sites[0]] == ["rms_norm"] * 8 + ["layer_norm"] * 2
    assert [s.path for s in sites[0]] == [str(n) for n in range(1, 20, 2)]
    assert sites[0][0].spelling == "pow, mean, add, rsqrt, mul"


# --- what a rule can do there ---


BOTH = pytest.mark.parametrize("door", [DOORS["symbolic"], DOORS["in a block"]])


@BOTH
def test_rules_at_the_operands_and_at_the_output(door: Any) -> None:
    @fg.register("products", answers=("x", "weight"), kinds="operation")
    def products(grad: Tensor, x: Tensor, weight: Tensor, *, f: Any) -> Any:
        return {"x": f.gradient("x", grad), "weight": 3 * f.gradient("weight", grad)}

    model = model_of(Llama)
    y, plain = gradients(model, model)
    x, first, norm, last = 0, 1, 2, 3
    cases: list[tuple[Any, dict[int, float]]] = [
        (fg.on("rms_norm").backward("products"), {norm: 3.0}),
        (fg.on("rms_norm", at="weight").backward("scale", s=2.0), {norm: 2.0}),
        (fg.on("rms_norm", at="x").backward("scale", s=2.0), {x: 2.0, first: 2.0}),
        (fg.on("rms_norm", at="output").backward("scale", s=2.0), {x: 2.0, first: 2.0, norm: 2.0}),
    ]
    for entry, factors in cases:
        found_y, found = gradients(door(model, fg.RuleTable([entry]), (X,)), model)
        assert torch.equal(found_y, y)
        for index in (x, first, norm, last):
            torch.testing.assert_close(found[index], factors.get(index, 1.0) * plain[index])


@BOTH
def test_the_norm_wins_over_its_parts_if_its_backward_is_replaced(door: Any) -> None:
    model = model_of(Llama)
    parts = [
        fg.on("rsqrt", at="output").backward("stop"),
        fg.on("mul", module="1", call=1, at="b").backward("scale", s=0.0),
    ]
    expected = gradients(door(model, FROZEN, (X,)), model)[1]
    both = fg.RuleTable([*parts, *FROZEN])
    torch.testing.assert_close(
        gradients(door(model, both, (X,)), model)[1], expected, rtol=0, atol=0
    )
    # A rule at an edge of the norm leaves the parts their own
    stopped = fg.RuleTable([parts[0], fg.on("rms_norm", at="output").backward("scale", s=2.0)])
    found = gradients(door(model, stopped, (X,)), model)[1]
    torch.testing.assert_close(found[0], 2 * expected[0])
    kept = fg.RuleTable([fg.on("rms_norm").backward(None), parts[0]])
    torch.testing.assert_close(gradients(door(model, kept, (X,)), model)[1], expected)


def test_the_report_says_which_calls_are_parts_of_a_norm() -> None:
    table = fg.RuleTable([fg.on("rsqrt", at="output").backward("stop"), *FROZEN])
    model = model_of(Llama)
    with fg.use(table, model=model) as block:
        model(X)
    for plan in (fg.explain(model, table), fg.report(block)):
        (decision,) = (d for d in plan.decisions if d.site.at == "output")
        assert decision.site.name == "1:rsqrt[0]@output"
        assert decision.action == "native"
        assert (
            decision.reason
            == "it is a part of 1:rms_norm[0], whose rule replaces the backward of all parts"
        )


def test_a_norm_whose_inner_values_are_used_elsewhere_keeps_its_backward() -> None:
    class Returned(Norm):
        def forward(self, x: Tensor) -> Tensor:
            scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
            return x * scale * self.weight + scale

    with pytest.warns(fg.FreegradWarning, match="that of rsqrt, is used elsewhere too"):
        gm = fg.transform(model_of(Returned), FROZEN)
    (decision,) = fg.report(gm).with_action("skip")
    assert decision.site.name == "1:rms_norm[0]"
    model = model_of(Returned)
    assert all(map(torch.equal, gradients(gm, gm)[1], gradients(model, model)[1]))


class Plain(nn.Module):
    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.weight)


NO_NORMS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda x, w: x * torch.rsqrt(w.pow(2).mean(-1, keepdim=True)),
    lambda x, w: x * torch.rsqrt(x.pow(2).mean(0, keepdim=True)),
    lambda x, w: x * torch.rsqrt(x.pow(3).mean(-1, keepdim=True)),
    lambda x, w: x + torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    lambda x, w: torch.sqrt(x.pow(2).mean(-1, keepdim=True)) / x,
    lambda x, w: x * torch.rsqrt(x.detach().pow(2).mean(-1, keepdim=True)),
]


@pytest.mark.parametrize("forward", NO_NORMS)
def test_what_is_no_norm(forward: Any) -> None:
    table = fg.RuleTable([fg.on(["rms_norm", "layer_norm"], optional=True).backward("stop")])
    assert not fg.explain(Plain(forward), table).decisions


class WritesX(Norm):
    """The square reads a copy of other precision, so that PyTorch allows the write."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        x.view(-1).mul_(2)
        return x * scale.double() * self.weight


class WritesAfterMean(Norm):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        x.add_(1)
        centred = x - mean
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + self.eps)


@BOTH
@pytest.mark.parametrize("kind", [WritesX, WritesAfterMean])
def test_an_input_that_is_written_between_the_calls_is_no_norm(kind: type[Norm], door: Any) -> None:
    model = model_of(kind)
    with pytest.warns(fg.FreegradWarning, match="written into between the calls that read it"):
        found = gradients(door(model, FROZEN, (X,)), model)
    assert all(map(torch.equal, found[1], gradients(model, model)[1]))


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.pow(2)


class Outer(Norm):
    """The square is in a module of its own, and the conversion outside of that of the norm."""

    def __init__(self, size: int = 6) -> None:
        super().__init__(size)
        self.inner, self.squares = Olmo(size), Squares()

    def forward(self, x: Tensor) -> Tensor:
        mean = self.squares(x).mean(-1, keepdim=True)
        return self.inner((x * torch.rsqrt(mean + self.eps)).to(torch.float64))


@pytest.mark.parametrize("path", ["1.squares", "1.inner", "1"])
def test_hooks_that_are_registered_later_run_outside_of_a_norm(path: str) -> None:
    @fg.register("native_norm", kinds="operation")
    def native_norm(grad: Tensor, x: Tensor, weight: Tensor | None, *, f: Any) -> Tensor:
        return f.gradient("x", grad)  # type: ignore[no-any-return]

    model = model_of(Outer)
    gm = fg.transform(model, {"rms_norm": "native_norm"})
    assert [d.site.name for d in fg.report(gm).with_action("rewrite")] == ["1.inner:rms_norm[0]"]
    for m in (gm, model):
        m.get_submodule(path).register_forward_pre_hook(lambda _, given: (given[0] * 2,))
        m.get_submodule(path).register_forward_hook(lambda _m, _x, result: result * 3)
    expected = gradients(model, model)
    found = gradients(gm, gm)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_an_input_that_is_overwritten_later_is_kept_for_the_rule() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.first = Olmo(), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.float())
            y = self.norm(h)
            return y + h.mul_(2)

    torch.manual_seed(0)
    model = Overwrites()
    gm = fg.transform(model, FROZEN)
    _, found = gradients(gm, gm)
    model.norm.forward = constant.__get__(model.norm)  # type: ignore[method-assign]
    model.first.register_forward_hook(lambda m, x, y: y.clone())
    h = model.first(X.float())
    y = (constant(model.norm, h.double()).float() + 2 * h).square().sum()
    (expected,) = torch.autograd.grad(y, model.first.weight)
    torch.testing.assert_close(found[2], expected)


def test_a_block_names_a_norm_that_it_cannot_find() -> None:
    class Branches(Norm):
        def forward(self, x: Tensor) -> Tensor:
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
            return y if self.weight.dtype in (torch.half,) else y * self.weight

    model = model_of(Branches)
    with (
        pytest.warns(fg.FreegradWarning, match="matched nothing"),
        fg.use(FROZEN, model=model) as b,
    ):
        model(X)
    (note,) = fg.report(b).opaque
    assert "Branches, whose layer_norm, rms_norm in separate operations" in str(note)
    stops = FROZEN + fg.RuleTable([fg.on("rsqrt", at="output").backward("stop")])
    with pytest.warns(fg.FreegradWarning, match="matched nothing"), fg.use(stops, model=model) as b:
        model(X)
    assert not fg.report(b).opaque


@pytest.mark.filterwarnings("ignore:straight_through got no site")
def test_the_innermost_block_decides_a_norm() -> None:
    model = model_of(Llama, Gemma)
    expected = gradients(fg.transform(model, FROZEN), model)[1]
    native = gradients(model, model)[1]
    cases = [(FROZEN, expected), ({"rms_norm": None}, native)]
    for inner, wanted in cases:
        with fg.use({"rms_norm": "stop"}, model=model), fg.use(inner, model=model):
            found = gradients(model, model)[1]
        torch.testing.assert_close(found, wanted)
    with fg.use(FROZEN, model=model), fg.use("straight_through", model=model):
        torch.testing.assert_close(gradients(model, model)[1], expected)


class Gated(nn.Module):
    """As the norms of Mamba: an argument that is None by default changes what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8) + 0.5)

    def forward(self, x: Tensor, gate: Tensor | None = None, eps: float = 1e-6) -> Tensor:
        if gate is not None:
            x = x * torch.sigmoid(gate)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


@pytest.mark.parametrize("given", [{"gate": torch.randn(3, 8)}, {"eps": 0.1}], ids=["gate", "eps"])
def test_a_norm_in_a_block_is_left_native_where_an_argument_is_not_its_default(given: Any) -> None:
    norm, x = Gated(), torch.randn(3, 8, requires_grad=True)
    (native,) = torch.autograd.grad(norm(x, **given).square().sum(), x)
    with fg.use({"rms_norm": "frozen_norm"}, model=norm) as block:
        (frozen,) = torch.autograd.grad(norm(x, eps=1e-6).square().sum(), x)
        (found,) = torch.autograd.grad(norm(x, **given).square().sum(), x)
    assert torch.equal(found, native)
    assert not torch.allclose(frozen, torch.autograd.grad(norm(x).square().sum(), x)[0])
    assert f"called with {next(iter(given))}" in str(fg.report(block))
