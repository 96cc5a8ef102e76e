"""The ready tables on small transformers: against models written by hand, explicit propagation, and conservation."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import freegrad_fx as fg
from attention_models import (
    MLP,
    NORMS,
    Attention,
    Block,
    RMSNorm,
    X,
    gradient,
    logit,
    second_derivative,
    transformer,
)
from doors import DOORS, model_compiled
from frozen import assert_slope

# Dynamo reads `.grad` of whatever goes from one graph into the next
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

FROZEN = fg.RuleTable([fg.on(["layer_norm", "rms_norm", "group_norm"]).backward("frozen_norm")])
TABLES = {name: getattr(fg.tables, name) for name in fg.tables.__all__}
STRICT = {
    name: make for name, make in TABLES.items() if "strict" in inspect.signature(make).parameters
}
NORM = pytest.mark.parametrize("norm", NORMS)
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])


def frozen_norm(self: Any, x: Tensor) -> Tensor:
    """The forward of a norm with a detached denominator."""
    centred = x - x.mean(-1, keepdim=True) if isinstance(self, nn.LayerNorm) else x
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / scale.detach() * self.weight


def changed(
    model: nn.Module,
    mlp: Callable[[Any, Tensor], Tensor],
    attention: Callable[[Any, Tensor], Tensor],
) -> nn.Module:
    """The model with frozen norms, and other forwards of its MLPs and attentions."""
    forwards: dict[type, Any] = {
        nn.LayerNorm: frozen_norm, nn.RMSNorm: frozen_norm, RMSNorm: frozen_norm,
        MLP: mlp, Attention: attention,
    }  # fmt: skip
    for module in model.modules():
        if type(module) in forwards:
            module.forward = forwards[type(module)].__get__(module)
    return model


def frozen_by_hand(model: nn.Module) -> nn.Module:
    """Detach attention patterns, denominators of norms, and MLPs."""

    def attention(self: Any, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-1, -2) * self.q.out_features**-0.5
        return self.o(scores.softmax(-1).detach() @ self.v(x))

    return changed(model, lambda self, x: MLP.forward(self, x).detach(), attention)


# --- frozen ---


@FUSED
@NORM
def test_circuit_freeze_equals_the_model_with_detached_tensors(norm: str, fused: bool) -> None:
    table = fg.tables.circuit_freeze()
    expected = gradient(frozen_by_hand(transformer(norm, fused=False)))
    gm = fg.transform(transformer(norm, fused), table)
    torch.testing.assert_close(gradient(gm), expected)
    plain = transformer(norm, fused)
    assert_slope(plain, lambda x: logit(plain, x), X, expected)
    x = X.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        assert not second_derivative(logit(gm, x), x).any()
    assert second_derivative(logit(transformer(norm, False), x), x).any()


WAYS = {**DOORS, "model.compile": model_compiled}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_in_freezes(way: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(8, RMSNorm, fused=True), nn.LayerNorm(8)).double()
    plain = copy.deepcopy(model)
    found = gradient(way(model, fg.tables.circuit_freeze(strict=True), (X,)))
    assert_slope(plain, lambda x: logit(plain, x), X, found)


@pytest.mark.parametrize(
    "door",
    [
        pytest.param(DOORS["exported"], id="exported", marks=pytest.mark.slow),
        pytest.param(DOORS["compiled"], id="compiled", marks=pytest.mark.slow),
        pytest.param(DOORS["in a block"], id="in a block"),
    ],
)
def test_every_way_in_gives_attention_a_temperature(door: Any) -> None:
    model, table = transformer("by hand", fused=True), fg.tables.gim()
    expected = gradient(fg.transform(model, table))
    torch.testing.assert_close(gradient(door(model, table, (X,))), expected)


# --- relevance ---


@FUSED
@NORM
def test_cp_lrp_conserves_relevance(norm: str, fused: bool) -> None:
    model = transformer(norm, fused)
    relevance = X * gradient(fg.transform(model, fg.tables.cp_lrp()))
    torch.testing.assert_close(relevance.sum(), logit(model, X), rtol=1e-10, atol=0)
    native = X * gradient(model)
    assert abs(native.sum() - logit(model, X)) > 1e-3


def explicit_attn_lrp(model: nn.Module) -> Tensor:
    """AttnLRP in relevance space, operation by operation, with epsilon 0."""

    def linear(x: Tensor, layer: nn.Linear, r: Tensor) -> Tensor:
        return x * (r / layer(x) @ layer.weight)

    def product(a: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        share = r / (2 * (a @ b))
        return a * (share @ b.transpose(-1, -2)), b * (a.transpose(-1, -2) @ share)

    def block(part: Any, x: Tensor, r: Tensor) -> Tensor:
        attention, mlp = part.attention, part.mlp
        normed = part.before(x)
        q, k, v = attention.q(normed), attention.k(normed), attention.v(normed)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        pattern = scores.softmax(-1)
        mixed = pattern @ v
        middle = x + attention.o(mixed)
        inner = part.between(middle)
        gate, up = mlp.gate(inner), mlp.up(inner)
        hidden = F.silu(gate) * up
        # backward: a sum divides by the values, a norm and an activation pass relevance on
        share = r / (middle + mlp.down(hidden))
        r_hidden = linear(hidden, mlp.down, mlp.down(hidden) * share)
        r_inner = linear(inner, mlp.gate, r_hidden / 2) + linear(inner, mlp.up, r_hidden / 2)
        r_middle = middle * share + r_inner
        share = r_middle / middle
        r_pattern, r_v = product(pattern, v, linear(mixed, attention.o, attention.o(mixed) * share))
        r_scores = scores * (r_pattern - pattern * r_pattern.sum(-1, keepdim=True))
        r_q, r_k = product(q, k.transpose(-1, -2), r_scores)
        r_k = r_k.transpose(-1, -2)
        parts = ((attention.q, r_q), (attention.k, r_k), (attention.v, r_v))
        return x * share + sum(linear(normed, layer, given) for layer, given in parts)

    first, second, norm, head = model
    between, last = first(X), second(first(X))
    y = head(norm(last))
    r = torch.zeros_like(y)
    r[0, -1, 2] = y[0, -1, 2]
    r = linear(norm(last), head, r)
    return block(first, X, block(second, between, r))


@FUSED
@pytest.mark.parametrize("norm", ["rms_norm", "by hand"])
def test_attn_lrp_equals_explicit_propagation(norm: str, fused: bool) -> None:
    expected = explicit_attn_lrp(transformer(norm, fused=False))
    gm = fg.transform(transformer(norm, fused), fg.tables.attn_lrp())
    torch.testing.assert_close(X * gradient(gm), expected, rtol=1e-6, atol=1e-12)


class Cooled(torch.autograd.Function):
    """A softmax whose backward has the temperature 3."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.softmax(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        s = (ctx.saved_tensors[0] / 3).softmax(-1)
        return s * (grads[0] - (grads[0] * s).sum(-1, keepdim=True))


def gim_by_hand(model: nn.Module) -> nn.Module:
    def half(product: Tensor) -> Tensor:
        return product / 2 + product.detach() / 2

    def attention(self: Any, x: Tensor) -> Tensor:
        scores = half(self.q(x) @ self.k(x).transpose(-1, -2)) * self.q.out_features**-0.5
        return self.o(half(Cooled.apply(scores) @ self.v(x)))

    def mlp(self: Any, x: Tensor) -> Tensor:
        return self.down(half(F.silu(self.gate(x)) * self.up(x)))

    return changed(model, mlp, attention)


@FUSED
@NORM
def test_gim_equals_a_model_with_its_four_changes(norm: str, fused: bool) -> None:
    expected = gradient(gim_by_hand(transformer(norm, fused=False)))
    gm = fg.transform(transformer(norm, fused), fg.tables.gim(temperature=3.0))
    torch.testing.assert_close(gradient(gm), expected)


def test_the_temperature_of_a_softmax_is_that_of_the_formula() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 4, dtype=torch.float64)
    rules = {"softmax": fg.rules.softmax_temperature(temperature=2.5)}
    with fg.use(rules):
        (given,) = torch.autograd.grad(F.softmax(x, 0), x, grad)
    s = (x / 2.5).softmax(0)
    torch.testing.assert_close(given, s * (grad - (grad * s).sum(0)))


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((3, 4)),
        nn.LayerNorm(4, elementwise_affine=False),
        nn.RMSNorm(4),
        nn.GroupNorm(2, 6),
        nn.GroupNorm(3, 6, affine=False),
    ],
    ids=str,
)
def test_a_frozen_norm_is_linear_in_its_input(norm: Any) -> None:
    """With σ constant, the norm is the same as L(x)/σ·weight + bias with a linear L."""
    norm = norm.double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    model = nn.Sequential(norm)
    gm = fg.transform(model, FROZEN)
    (given,) = torch.autograd.grad(gm(x), x, grad, create_graph=True)

    def rows(t: Tensor) -> Tensor:
        if isinstance(norm, nn.GroupNorm):
            return t.reshape(2, norm.num_groups, -1)
        return t.flatten(-len(norm.normalized_shape))

    r = rows(x)
    centred = r if isinstance(norm, nn.RMSNorm) else r - r.mean(-1, keepdim=True)
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt().detach()
    y = scaled.reshape(x.shape)
    weight = getattr(norm, "weight", None)
    if weight is not None:
        y = y * (weight[:, None, None] if isinstance(norm, nn.GroupNorm) else weight)
    torch.testing.assert_close(given, torch.autograd.grad(y, x, grad)[0])
    if given.requires_grad:
        (second,) = torch.autograd.grad(given.sum(), x, allow_unused=True)
        assert second is None or not second.any()


# --- tables ---


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES)
def test_a_table_is_plain_data(make: Callable[[], fg.RuleTable]) -> None:
    table = make()
    assert type(table) is fg.RuleTable
    loaded = fg.RuleTable.from_toml(table.to_toml())
    assert loaded.to_toml() == table.to_toml()
    assert (loaded == table) is (
        make is not fg.tables.lsq
    )  # whose steps are not those of the other
    assert len(fg.RuleTable([fg.on("gelu").backward(None)]) + table) == len(table) + 1


def test_what_is_left_out_on_request() -> None:
    assert fg.tables.relp(patterns=True) == fg.tables.cp_lrp()
    assert len(fg.tables.cp_lrp(gates=[])) == len(fg.tables.cp_lrp()) - 1
    assert len(fg.tables.circuit_freeze(mlps=[])) == len(fg.tables.circuit_freeze()) - 1


@pytest.mark.parametrize("path", ["1", "1.0"])
def test_the_path_of_an_mlp_reaches_the_layers_in_it(path: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.GELU())).double()
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = fg.transform(model, fg.tables.circuit_freeze(mlps=[path]))(x)
    assert not torch.autograd.grad(y.sum(), x)[0].any()
    with pytest.warns(fg.FreegradWarning, match="matches nothing|matched nothing"):
        fg.transform(model, fg.tables.circuit_freeze(mlps=["nope*"]))
    with pytest.raises(TypeError, match=r"Write mlps=\['1'\]"):
        fg.tables.circuit_freeze(mlps="1")


# --- strict ---


class MagnitudeNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + 1e-5)


@pytest.mark.parametrize("make", STRICT.values(), ids=STRICT)
def test_a_strict_table_takes_a_model_that_it_reaches(make: Any) -> None:
    table = make(strict=True)
    assert fg.RuleTable.from_toml(table.to_toml()) == table != make()
    assert fg.RuleTable.from_dict(table.to_dict()).reaches == table.reaches
    assert (fg.RuleTable() + table).reaches == table[:1].reaches == table.reaches
    assert eval(repr(table), {**vars(fg), "on": fg.on, "RuleTable": fg.RuleTable}) == table
    for norm in NORMS:
        model = transformer(norm, fused=norm == "rms_norm")
        fg.explain(model, table)
        with fg.use(table, model=model):
            model(X)


@pytest.mark.parametrize("door", [DOORS["symbolic"], DOORS["compiled"], DOORS["in a block"]])
def test_a_strict_table_refuses_a_norm_that_it_does_not_reach(door: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), MagnitudeNorm(8), RMSNorm(8)).double()
    table = fg.tables.circuit_freeze(strict=True)
    with pytest.raises(fg.PlanError, match=r"does not reach: 1 \(MagnitudeNorm\)\. Add an entry"):
        door(model, table, (X,))(X)
    native = fg.RuleTable([fg.on("mean", at="output").backward(None)]) + table
    door(model, native, (X,))(X)


def test_a_strict_table_names_the_way_into_a_module_that_is_not_traced() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = RMSNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.norm(row) for row in x])

    model, table = nn.Sequential(Rows()).double(), fg.tables.circuit_freeze(strict=True)
    with pytest.raises(fg.PlanError, match=r"freegrad_fx\.compile\(model, rules\) reaches into"):
        fg.transform(model, table)
    assert_slope(
        model, lambda x: logit(model, x), X, gradient(DOORS["compiled"](model, table, (X,)))
    )


def test_a_strict_table_refuses_attention_and_gates_that_it_does_not_reach() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x, x, x, need_weights=False)[0]
            return F.silu(x) * x

    with pytest.raises(fg.PlanError, match=r"MultiheadAttention.*the gate <root>:mul\[0\]"):
        fg.explain(Gated(), fg.tables.cp_lrp(strict=True))
    with pytest.raises(fg.PlanError) as error:
        fg.explain(Gated(), fg.tables.circuit_freeze(strict=True))
    assert "gate" not in str(error.value)


@pytest.mark.parametrize("door", [DOORS["symbolic"], DOORS["compiled"], DOORS["in a block"]])
def test_a_table_for_some_attentions_does_not_reach_the_others(door: Any) -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    model = nn.Sequential(Attention(), Attention(), Attention())
    fused = fg.on("scaled_dot_product_attention", module="re:[12]", at=["query", "key"])
    table = fg.RuleTable([fused.backward("stop")], reaches=["attention"])
    with pytest.raises(fg.PlanError) as error:
        door(model, table, (X,))(X)
    [missed] = str(error.value).split("does not reach: ")[1].split(". Add")[0].split("; ")
    assert missed.removeprefix("the attention ").startswith("0:")
    native = fg.RuleTable([fg.on("scaled_dot_product_attention").backward(None)])
    door(model, table + native, (X,))(X)


def test_the_names_of_what_a_table_reaches_are_checked() -> None:
    with pytest.raises(fg.TableError, match="unknown name in reaches: 'norms'"):
        fg.RuleTable([], reaches=["norms"])
