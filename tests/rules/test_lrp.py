"""Layer-wise relevance propagation: naive formulas with the matrix of a layer, and zennit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from built_in import OF_OPERANDS
from freegrad_fx.errors import RuleError

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding="same"), (2, 2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 2, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, bias=False), (1, 1, 3, 3, 4)),
}
RULES: dict[str, dict[str, Any]] = {
    "lrp_epsilon": {"epsilon": 0.1},
    "lrp_zplus": {},
    "lrp_alpha_beta": {},
    "lrp_gamma": {},
    "lrp_zbox": {"low": -3.0, "high": 3.0},
    "lrp_wsquare": {},
    "lrp_flat": {},
}
OF_RELEVANCE = ("lrp_zbox", "lrp_wsquare", "lrp_flat")
"""The rules that return the relevance itself, not its quotient by the value."""


def layer_and_values(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer, an input, and the relevance of the output."""
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64)
    return layer, x, torch.randn_like(layer(x))


def relevance(name: str, layer: nn.Module, x: Tensor, of_output: Tensor, **values: Any) -> Tensor:
    """The relevance of the input by a rule."""
    model = fg.transform(nn.Sequential(layer), {op: fg.get(name)(**values) for op in OPS_OF(layer)})
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    (grad,) = torch.autograd.grad(out, leaf, of_output / out.detach())
    return grad if name in OF_RELEVANCE else grad * x


def OPS_OF(layer: nn.Module) -> list[str]:
    return ["linear"] if isinstance(layer, nn.Linear) else ["conv"]


def by_matrix(name: str, layer: nn.Module, x: Tensor, of_output: Tensor) -> Tensor:
    """The relevance of the input, sample by sample, from the matrix of contributions of each input to each output."""
    found = []
    for sample, share in zip(x, of_output, strict=True):
        one = sample[None]
        w = torch.func.jacrev(lambda v: layer(v).flatten())(one).flatten(1)
        b = layer(torch.zeros_like(one)).flatten()
        found.append(FORMULAS[name](w, b, sample.flatten(), share.flatten()).view_as(sample))
    return torch.stack(found)


def shares(z: Tensor, b: Tensor | float, share: Tensor, epsilon: float = 1e-6) -> Tensor:
    """The relevance of the outputs, distributed by contributions z, (outputs, inputs)."""
    total = z.sum(1) + b
    sign = torch.where(total >= 0, 1, -1).to(total.dtype)
    return (z / (total + epsilon * sign)[:, None] * share[:, None]).sum(0)


def positive(z: Tensor) -> Tensor:
    return z.clamp(min=0)


def negative(z: Tensor) -> Tensor:
    return z.clamp(max=0)


def gamma(w: Tensor, b: Tensor, x: Tensor, share: Tensor) -> Tensor:
    z, y = w * x, (w * x).sum(1) + b
    raised = shares(z + positive(z) / 4, b + positive(b) / 4, torch.where(y > 0, share, 0))
    return raised + shares(z + negative(z) / 4, b + negative(b) / 4, torch.where(y < 0, share, 0))


FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "lrp_epsilon": lambda w, b, x, share: shares(w * x, b, share, 0.1),
    "lrp_zplus": lambda w, b, x, share: shares(positive(w * x), positive(b), share),
    "lrp_alpha_beta": lambda w, b, x, share: (
        2 * shares(positive(w * x), positive(b), share)
        - shares(negative(w * x), negative(b), share)
    ),
    "lrp_gamma": gamma,
    "lrp_zbox": lambda w, b, x, share: shares(
        w * x + 3 * positive(w) - 3 * negative(w), b - positive(b) - negative(b), share
    ),
    "lrp_wsquare": lambda w, b, x, share: shares(w**2, b**2, share),
    "lrp_flat": lambda w, b, x, share: shares((w != 0).to(w.dtype), 0.0, share),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", RULES)
def test_the_relevance_is_that_of_the_matrix_of_the_layer(name: str, layer: str) -> None:
    module, x, of_output = layer_and_values(layer)
    found = relevance(name, module, x, of_output, **RULES[name])
    expected = by_matrix(name, module, x, of_output)
    assert torch.linalg.vector_norm(found - expected) < 1e-12 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", RULES)
def test_the_relevance_is_that_of_zennit(name: str, layer: str) -> None:
    rules = pytest.importorskip("zennit.rules", reason="zennit is not installed")
    module, x, of_output = layer_and_values(layer)
    peers = {
        "lrp_epsilon": lambda: rules.Epsilon(epsilon=0.1),
        "lrp_zplus": rules.ZPlus,
        "lrp_alpha_beta": rules.AlphaBeta,
        "lrp_gamma": rules.Gamma,
        "lrp_zbox": lambda: rules.ZBox(torch.full_like(x, -3.0), torch.full_like(x, 3.0)),
        "lrp_wsquare": rules.WSquare,
        "lrp_flat": rules.Flat,
    }
    found = relevance(name, module, x, of_output, **RULES[name])
    handle = peers[name]().register(module)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(module(leaf), leaf, of_output)
    handle.remove()
    assert torch.linalg.vector_norm(found - expected) < 1e-12 * torch.linalg.vector_norm(expected)


def test_every_rule_is_tested() -> None:
    assert {name for name in OF_OPERANDS if name.startswith("lrp_")} == {*RULES}


def test_the_shares_of_a_network_without_biases_add_up_to_its_output() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts[:2]:
                x = x + part(x).relu()
            return self.parts[2](x)

    torch.manual_seed(0)
    model, x = Skip().double(), torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    gm = fg.transform(model, {"linear": fg.get("lrp_gamma")(epsilon=0.0)})
    out = gm(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close((x * grad).sum(), out.sum(), rtol=1e-10, atol=0)


def test_the_parameters_keep_their_native_gradients() -> None:
    module, x, _ = layer_and_values("conv2d")
    gm = fg.transform(nn.Sequential(module), {"conv": "lrp_zplus"})
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    found = torch.autograd.grad(gm(x).square().sum(), list(module.parameters()))
    assert all(map(torch.equal, found, expected))


def test_alpha_and_beta_differ_by_one() -> None:
    with pytest.raises(RuleError, match="alpha == beta \\+ 1"):
        fg.rules.lrp_alpha_beta(alpha=2.0, beta=0.5)
    assert fg.rules.lrp_alpha_beta(alpha=1.3, beta=0.3).bound["alpha"] == 1.3
