"""Every rule at an operation that it is meant for, on a device and on the CPU. `benchmarks.gpu` runs it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import freegrad_fx as fg

__all__ = ["RULES", "differences"]

RULES = (*(rule for rule in vars(fg.rules).values() if isinstance(rule, fg.Rule)),)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        q, k, v = (layer(x).unflatten(-1, (2, 8)).transpose(1, 2) for layer in layers)
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return found.transpose(1, 2).flatten(2)


class _Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 32), nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x) * self.up(x)  # type: ignore[no-any-return]


class _Sum(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


SHARE = 2e-3  # of the entries that can differ by more than rounding, where a rule jumps

# By operation: a module that has it, and the shape of its input.
SITES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "tanh": (nn.Tanh, (8, 16, 8, 8)),
    "softmax": (lambda: nn.Softmax(-1), (64, 64)),
    "linear": (lambda: nn.Linear(16, 32), (64, 16)),
    "conv": (lambda: nn.Conv2d(8, 16, 3, padding=1), (4, 8, 16, 16)),
    "layer_norm": (lambda: nn.LayerNorm(16), (64, 16)),
    "rms_norm": (lambda: nn.RMSNorm(16), (64, 16)),
    "batch_norm": (lambda: nn.BatchNorm2d(8).eval(), (4, 8, 16, 16)),
    "max_pool": (lambda: nn.MaxPool2d(3, 2, 1), (4, 8, 16, 16)),
    "avg_pool": (lambda: nn.AvgPool2d(2), (4, 8, 16, 16)),
    "scaled_dot_product_attention": (_Attention, (4, 12, 16)),
    "mul": (_Product, (64, 16)),
    "add": (lambda: _Sum(16, 16), (64, 16)),
    "dropout": (lambda: nn.Dropout(0.1), (64, 16)),
}


def places(rule: fg.Rule) -> tuple[str, ...]:
    """The operations to run a rule at; "parameter" for the weight of a linear layer."""
    if "operation" not in rule.kinds:
        return ("parameter",)
    return (*(op for op in rule.info.meant_for if op in SITES),)[:2] or ("tanh",)


def transformed(rule: fg.Rule, place: str) -> tuple[nn.Module, Tensor]:
    """A module with the rule at one site, and an input."""
    make, shape = SITES["linear" if place == "parameter" else place]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    if "feedback" in rule.parameters.keys() - rule.bound.keys():
        rule = rule(feedback=torch.randn_like(model.weight))
    model = nn.Sequential(model)  # torch.nn's own modules are kept whole below a model
    on = fg.on(parameter="0.weight") if place == "parameter" else fg.on(place)
    return fg.transform(model, fg.RuleTable([on.backward(rule)])), x


def gradients(
    model: nn.Module, x: Tensor, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """The gradients of the input and of all parameters, for a gradient of the output that is the same everywhere."""
    model = copy.deepcopy(model).to(device, dtype)
    x = x.to(device, dtype).requires_grad_()
    torch.manual_seed(1)
    y = model(x)
    grad = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad(y, wanted, grad, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]


def differences(rule: fg.Rule, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """What differs between the gradients on a device and on the CPU, one sentence for each fault; none if all is well.

    A rule or an operation that draws random numbers has other ones on another device: it is run twice with one seed,
    and the shares of its entries that are not finite are compared.
    """
    for place in places(rule):
        model, x = transformed(rule, place)
        inputs = [x]
        if x.dim() == 4:
            inputs.append(x.to(memory_format=torch.channels_last))
        for given in inputs:
            last = ", channels last" if given is not x else ""
            where = f"{rule.name} at {place}{last}"
            here = gradients(model, given, device, dtype)
            if wrong := [g for g in here if g.device.type != device.type or g.dtype != dtype]:
                yield f"{where}: a gradient of {wrong[0].dtype} on {wrong[0].device}"
                continue
            if rule.declaration.random or place == "dropout":
                again = gradients(model, given, device, dtype)
                same = max(map(_share_apart, here, again)) <= SHARE
                if not (same and all(g.isfinite().all() for g in here)):
                    yield f"{where}: {'not finite' if same else 'another gradient for the same seed'}"
                continue
            there = gradients(model, given, torch.device("cpu"), dtype)
            share = max(map(_share_apart, here, there))
            if share > SHARE:
                yield f"{where}: {share:.1%} of the entries differ"


def _share_apart(here: Tensor, there: Tensor) -> float:
    """The share of the entries that differ by more than rounding."""
    limit = 16 * torch.finfo(there.dtype).eps * float(there.nan_to_num().abs().max().clamp(min=1.0))
    close = torch.isclose(here.cpu().double(), there.double(), rtol=0.0, atol=limit, equal_nan=True)
    return 1.0 - float(close.double().mean())
