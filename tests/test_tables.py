"""The ready tables on small transformers: against models written by hand, explicit propagation, and conservation."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import freegrad_fx as fg
from doors import DOORS

# Dynamo reads `.grad` of whatever goes from one graph into the next
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

FROZEN = fg.RuleTable([fg.on(["layer_norm", "rms_norm", "group_norm"]).backward("frozen_norm")])
TABLES = {name: getattr(fg.tables, name) for name in fg.tables.__all__}
STRICT = {
    name: make for name, make in TABLES.items() if "strict" in inspect.signature(make).parameters
}


# --- models ---


class RMSNorm(nn.Module):
    """As language models write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-5))


class Attention(nn.Module):
    def __init__(self, size: int, fused: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.fused:
            return self.o(F.scaled_dot_product_attention(q, k, v))
        return self.o(self.pattern(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5) @ v)

    def pattern(self, scores: Tensor) -> Tensor:
        return F.softmax(scores, -1)


class MLP(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(size, 2 * size, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, size: int, norm: Callable[[int], nn.Module], fused: bool) -> None:
        super().__init__()
        self.before, self.between = norm(size), norm(size)
        self.attention, self.mlp = Attention(size, fused), MLP(size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": lambda size: nn.LayerNorm(size, bias=False),
    "rms_norm": lambda size: nn.RMSNorm(size, eps=1e-5),
    "by hand": RMSNorm,
}
NORM = pytest.mark.parametrize("norm", NORMS)
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])


def transformer(norm: str, fused: bool) -> nn.Module:
    torch.manual_seed(0)
    make = NORMS[norm]
    blocks = [Block(8, make, fused) for _ in range(2)]
    model = nn.Sequential(*blocks, make(8), nn.Linear(8, 5, bias=False)).double()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "weight" in name and parameter.dim() == 1 else 0.0, 0.4)
    return model


X = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def logit(called: Callable[..., Tensor], x: Tensor) -> Tensor:
    return called(x)[0, -1, 2]


def gradient(called: Callable[..., Tensor], x: Tensor = X) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(logit(called, x), x)[0]


def second_derivative(value: Tensor, x: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    probe = torch.randn(grad.shape, generator=torch.Generator().manual_seed(3), dtype=grad.dtype)
    (second,) = torch.autograd.grad((grad * probe).sum(), x, allow_unused=True)
    return torch.zeros_like(x) if second is None else second


@contextlib.contextmanager
def frozen_by_hand(model: nn.Module) -> Any:
    """Detach attention patterns, denominators of norms, and MLPs."""

    def norm(self: Any, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True) if isinstance(self, nn.LayerNorm) else x
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / scale.detach() * self.weight

    changed: dict[type, Any] = {
        nn.LayerNorm: norm, nn.RMSNorm: norm, RMSNorm: norm,
        MLP: lambda self, x: MLP.forward(self, x).detach(),
    }  # fmt: skip
    for module in model.modules():
        if type(module) in changed:
            module.forward = changed[type(module)].__get__(module)
        if isinstance(module, Attention):
            module.pattern = lambda scores: F.softmax(scores, -1).detach()
    yield model


# --- frozen ---


@FUSED
@NORM
def test_circuit_freeze_equals_the_model_with_detached_tensors(norm: str, fused: bool) -> None:
    table = fg.tables.circuit_freeze()
    with frozen_by_hand(transformer(norm, fused=False)) as by_hand:
        expected = gradient(by_hand)
    gm = fg.transform(transformer(norm, fused), table)
    torch.testing.assert_close(gradient(gm), expected)
    x = X.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        assert not second_derivative(logit(gm, x), x).any()
    assert second_derivative(logit(transformer(norm, False), x), x).any()


SLOW = ("exported", "compiled")


@pytest.mark.parametrize(
    "door",
    [pytest.param(d, id=n, marks=[pytest.mark.slow] * (n in SLOW)) for n, d in DOORS.items()],
)
def test_every_way_in_takes_the_tables(door: Any) -> None:
    model = transformer("by hand", fused=True)
    for table in (fg.tables.circuit_freeze(), fg.tables.gim()):
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


@NORM
def test_gim_acts_on_fused_attention_as_on_a_softmax(norm: str) -> None:
    table = fg.tables.gim(temperature=3.0)
    eager, fused = (fg.transform(transformer(norm, f), table) for f in (False, True))
    torch.testing.assert_close(gradient(eager), gradient(fused))
    cool = fg.transform(transformer(norm, True), fg.tables.gim(temperature=1.0))
    assert not torch.allclose(gradient(fused), gradient(cool))


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
    assert fg.RuleTable.from_toml(table.to_toml()) == table
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


class PowerNorm(RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-5) ** -0.5


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
    model = nn.Sequential(nn.Linear(8, 8), PowerNorm(8), RMSNorm(8)).double()
    table = fg.tables.circuit_freeze(strict=True)
    with pytest.raises(fg.PlanError, match=r"does not reach: 1 \(PowerNorm\)\. Add an entry"):
        door(model, table, (X,))(X)
    native = fg.RuleTable([fg.on("pow", at="output").backward(None)]) + table
    door(model, native, (X,))(X)


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
    with pytest.raises(fg.TableError, match="unknown name in reaches: 'norms'"):
        fg.RuleTable([], reaches=["norms"])


# --- models of Hugging Face ---

LAYERS: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
TEXT = {**LAYERS, "vocab_size": 20, "max_position_embeddings": 16}
GROUPED = {**TEXT, "num_key_value_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 20, "n_positions": 16}
# The configuration, and whether the model has no biases, so that relevance is conserved
HUGGING_FACE: dict[str, tuple[dict[str, Any], bool]] = {
    "Llama": (GROUPED, True),
    "Qwen3": ({**GROUPED, "head_dim": 4}, True),
    "Gemma": ({**GROUPED, "head_dim": 4}, True),
    "Mixtral": ({**GROUPED, "num_local_experts": 2}, False),  # the router's weights are gates, too
    "GPT2": (GPT2, False),
    "Bert": (TEXT, False),
    "ViT": ({**LAYERS, "image_size": 8, "patch_size": 4}, False),
}


def hugging_face(transformers: Any, name: str, attention: str) -> tuple[Any, Tensor]:
    """A small model, as a function of its embeddings or pixels, and an input."""
    fields, _ = HUGGING_FACE[name]
    config = getattr(transformers, f"{name}Config")(**fields)
    config._attn_implementation, config._experts_implementation = attention, "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval().double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    if name == "ViT":
        x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
        return (model, lambda x: model(pixel_values=x).last_hidden_state[0, -1, 3]), x
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    cache = {} if name == "Bert" else {"use_cache": False}
    return (model, lambda x: model(inputs_embeds=x, **cache).last_hidden_state[0, -1, 3]), x


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_models_of_hugging_face(transformers: Any, name: str, attention: str) -> None:
    (model, called), x = hugging_face(transformers, name, attention)
    x.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        with fg.use(fg.tables.circuit_freeze(strict=True), model=model) as block:
            frozen = called(x)
        second = second_derivative(frozen, x)
        assert second.abs().max() < 1e-12
        assert second_derivative(called(x), x).abs().max() > 1e-3
    rewritten = {d.site.op for d in fg.report(block).with_action("rewrite")}
    assert rewritten & {"softmax", "scaled_dot_product_attention"}
    assert rewritten & {"layer_norm", "rms_norm", "rsqrt"}
    with fg.use(fg.tables.cp_lrp(strict=True), model=model):
        y = called(x)
    relevance = (x * torch.autograd.grad(y, x)[0]).sum()
    if HUGGING_FACE[name][1]:  # the norms are computed in float32
        torch.testing.assert_close(relevance, y, rtol=1e-6, atol=0)
