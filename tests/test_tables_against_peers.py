"""The ready tables for transformers beside LXT and gim-explain, where these are right, and where gim-explain is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from attention_models import X, entry_of, gradient, hugging_face, logit, transformer

REASON = "needs the extra `peers`"
FUSED = pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])


# --- LXT ---


def by_lxt(model: Any, norm: str, x: Tensor) -> Tensor:
    """The model with LXT's explicit functions, through whose backward relevance flows; nothing is stabilised."""
    lf = pytest.importorskip("lxt.explicit.functional", reason=REASON)
    identity = pytest.importorskip("lxt.explicit.rules", reason=REASON).identity

    def linear(layer: Any, x: Tensor) -> Tensor:
        return lf.linear_epsilon(x, layer.weight.detach(), None, 0.0)

    def normed(layer: Any, x: Tensor) -> Tensor:
        if norm == "layer_norm":
            return lf.layer_norm_grad_fn.apply(x, layer.weight.detach(), None, 1e-5, 0.0)
        # LXT's own `rms_norm_identity` computes in float32
        return identity(layer, x)

    def attention(part: Any, x: Tensor) -> Tensor:
        q, k, v = (linear(layer, x) for layer in (part.q, part.k, part.v))
        scores = lf.mul2(lf.matmul(q, k.transpose(-1, -2), False, 0.0), q.shape[-1] ** -0.5)
        return linear(part.o, lf.matmul(lf.softmax(scores, -1), v, False, 0.0))

    def mlp(part: Any, x: Tensor) -> Tensor:
        gate = identity(F.silu, linear(part.gate, x))
        return linear(part.down, lf.mul2(gate, linear(part.up, x)))

    *blocks, last, head = model
    for block in blocks:
        x = lf.add2(x, attention(block.attention, normed(block.before, x)), False, 0.0)
        x = lf.add2(x, mlp(block.mlp, normed(block.between, x)), False, 0.0)
    return linear(head, normed(last, x))


@FUSED
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_attn_lrp_equals_the_explicit_rules_of_lxt(norm: str, fused: bool) -> None:
    x = X.clone().requires_grad_()
    y = logit(lambda x: by_lxt(transformer(norm, fused=False), norm, x), x)
    (expected,) = torch.autograd.grad(y, x, y.detach())
    gm = fg.transform(transformer(norm, fused), fg.tables.attn_lrp())
    found = X * gradient(gm)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# --- gim-explain ---


def under_gim(
    model: nn.Module, called: Callable[..., Any], x: Tensor = X, **options: Any
) -> Tensor:
    gim = pytest.importorskip("gim", reason=REASON)
    x = x.clone().requires_grad_()
    with gim.GIM(model, **options):
        y = called(x)
    return torch.autograd.grad(y, x)[0]


def of_few_digits(model: nn.Module) -> nn.Module:
    """With biases in its norms, without which gim-explain fails; it takes their parameters as float32."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.bias = nn.Parameter(torch.zeros_like(module.weight))
    return model.float().double()


NATIVE_PRODUCTS = fg.RuleTable([fg.on("matmul", at="output").backward(None)])


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_gim_equals_gim_explain(norm: str) -> None:
    """At norms of PyTorch, with a softmax whose products it leaves native, and in a fused attention without one."""
    eager, fused = (of_few_digits(transformer(norm, f)) for f in (False, True))
    for model, table in (
        (eager, NATIVE_PRODUCTS + fg.tables.gim(gates=[])),
        (fused, fg.tables.gim(gates=[], temperature=1.0)),
    ):
        expected = under_gim(model, lambda x, model=model: logit(model, x))
        torch.testing.assert_close(gradient(fg.transform(model, table)), expected)


def test_gim_acts_inside_of_a_fused_attention_where_gim_explain_does_nothing() -> None:
    model = of_few_digits(transformer("rms_norm", fused=True))
    theirs = [
        under_gim(model, lambda x: logit(model, x), softmax_temperature=t) for t in (1.0, 2.0)
    ]
    assert torch.equal(*theirs)
    ours = gradient(fg.transform(model, fg.tables.gim(gates=[])))
    assert not torch.allclose(ours, theirs[0])
    eager = of_few_digits(transformer("rms_norm", fused=False))
    torch.testing.assert_close(ours, gradient(fg.transform(eager, fg.tables.gim(gates=[]))))


@pytest.mark.slow
def test_gim_acts_on_the_norms_of_a_llama_where_gim_explain_does_nothing(transformers: Any) -> None:
    model, arguments = hugging_face(transformers, "Llama", "sdpa")
    called, x = entry_of(model, arguments), arguments["inputs_embeds"]
    native = under_gim(model, called, x, freeze_norm=False)
    assert torch.equal(under_gim(model, called, x), native)
    x.requires_grad_()
    # what gim-explain does do
    with fg.use(fg.tables.gim(gates=[], temperature=1.0), model=model):
        (ours,) = torch.autograd.grad(called(x), x)
    norms = fg.RuleTable([fg.on("rsqrt", at="output").backward(None)])
    with fg.use(norms + fg.tables.gim(gates=[], temperature=1.0), model=model):
        (without,) = torch.autograd.grad(called(x), x)
    torch.testing.assert_close(without, native)
    assert not torch.allclose(ours, native)

    def rms_norm(self: Any, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (x.float() * scale.detach()).to(x.dtype)

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = rms_norm.__get__(module)
    torch.testing.assert_close(ours, under_gim(model, called, x.detach(), freeze_norm=False))
