"""Small transformers: written with each norm and attention, and those of Hugging Face's families."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def hugging_face(transformers: Any, name: str, attention: str) -> tuple[Any, dict[str, Any]]:
    """A small model, and the arguments for a call, of which the first is an input with gradients."""
    fields, _ = HUGGING_FACE[name]
    config = getattr(transformers, f"{name}Config")(**fields)
    config._attn_implementation, config._experts_implementation = attention, "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval().double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    if name == "ViT":
        return model, {"pixel_values": torch.randn(1, 3, 8, 8, dtype=torch.float64)}
    cache = {} if name == "Bert" else {"use_cache": False}
    return model, {"inputs_embeds": torch.randn(1, 5, 16, dtype=torch.float64), **cache}


def entry_of(called: Callable[..., Any], arguments: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """One number of the output of a model of Hugging Face, as a function of its first argument."""
    name = next(iter(arguments))
    return lambda x: called(**{**arguments, name: x}).last_hidden_state[0, -1, 3]
