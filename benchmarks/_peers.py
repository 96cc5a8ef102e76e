"""The peers: other libraries that have the gradient of a rule, as modules with the same interface as ours.

The name of a candidate begins with the name of its peer. Every peer has the formula of the rule that it is compared
with. If its default for a parameter differs, it gets ours. `compare` checks that the gradients are equal.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# The name of each peer, and of its package on PyPI, which is also the name of its module.
PEERS = {
    "FreeGrad": "freegrad",
    "snnTorch": "snntorch",
    "SpikingJelly": "spikingjelly",
    "Brevitas": "brevitas",
    "Captum": "captum",
    "zennit": "zennit",
}


def missing() -> list[str]:
    """The peers that are not installed."""
    return [peer for peer, package in PEERS.items() if not importlib.util.find_spec(package)]


def versions() -> dict[str, str]:
    """The versions of the installed peers."""
    absent = missing()
    return {p: importlib.metadata.version(PEERS[p]) for p in PEERS if p not in absent}


def peer_of(candidate: str) -> str | None:
    """The peer that a candidate belongs to; None for native PyTorch and for this package."""
    return next((peer for peer in PEERS if candidate.startswith(peer)), None)


class Called(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class FreeGradActivation(nn.Module):
    """FreeGrad's activation in a block that sets its rule, as in FreeGrad's README."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        freegrad = importlib.import_module("freegrad")
        self.layer = importlib.import_module("freegrad.wrappers").Activation(forward="ReLU")
        self.use, self.rule = freegrad.use, rule

    def forward(self, x: Tensor) -> Tensor:
        with self.use(rule=self.rule, scope="activations"):
            return self.layer(x)  # type: ignore[no-any-return]


class SignWithin(nn.Module):
    """Brevitas' binary quantizer without its scale: a clamp, whose gradient clips, followed by Brevitas' sign."""

    def __init__(self) -> None:
        super().__init__()
        self.sign = importlib.import_module("brevitas.function.ops_ste").binary_sign_ste

    def forward(self, x: Tensor) -> Tensor:
        return self.sign(torch.clamp(x, -1.0, 1.0))  # type: ignore[no-any-return]


def _snntorch(name: str, **parameters: Any) -> Callable[[], nn.Module]:
    return lambda: Called(
        getattr(importlib.import_module("snntorch.surrogate"), name)(**parameters)
    )


def _spikingjelly(name: str, **parameters: Any) -> Callable[[], nn.Module]:
    library = "spikingjelly.activation_based.surrogate"
    return lambda: getattr(importlib.import_module(library), name)(**parameters)


def _brevitas(name: str) -> Callable[[], nn.Module]:
    return lambda: Called(getattr(importlib.import_module("brevitas.function.ops_ste"), name))


def _freegrad(rule: str) -> Callable[[], nn.Module]:
    return lambda: FreeGradActivation(rule)


# By rule, then by candidate: the function that creates the module.
OPERATORS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "d(ReLU)": {"FreeGrad": _freegrad("d(ReLU)")},
    "d(Linear)": {"FreeGrad": _freegrad("d(Linear)")},
    "straight_through": {
        "snnTorch straight_through_estimator": _snntorch("straight_through_estimator"),
        "SpikingJelly DeterministicPass": _spikingjelly("DeterministicPass"),
        "Brevitas round_ste": _brevitas("round_ste"),
        "Brevitas ceil_ste": _brevitas("ceil_ste"),
        "Brevitas floor_ste": _brevitas("floor_ste"),
        "Brevitas ternary_sign_ste": _brevitas("ternary_sign_ste"),
    },
    "clipped_straight_through": {"Brevitas clamp, binary_sign_ste": SignWithin},
    "rectangular": {
        "FreeGrad": _freegrad("rectangular"),
        "SpikingJelly Rect": _spikingjelly("Rect", alpha=1.0),
    },
    "triangular": {
        "FreeGrad": _freegrad("triangular"),
        "SpikingJelly PiecewiseQuadratic": _spikingjelly("PiecewiseQuadratic", alpha=1.0),
    },
    "fast_sigmoid": {
        "snnTorch fast_sigmoid": _snntorch("fast_sigmoid", slope=2.0),
        "SpikingJelly SoftSign": _spikingjelly("SoftSign", alpha=2.0),
    },
    "arctan": {
        "snnTorch atan": _snntorch("atan", alpha=2.0),
        "SpikingJelly ATan": _spikingjelly("ATan", alpha=2.0),
    },
    "scale": {"FreeGrad": _freegrad("scale")},
    "noise": {"FreeGrad": _freegrad("noise")},
    "clip_norm": {"FreeGrad": _freegrad("clip_norm")},
    "centralize": {"FreeGrad": _freegrad("centralize")},
    "full_jam": {"FreeGrad": _freegrad("full_jam")},
    "positive_jam": {"FreeGrad": _freegrad("positive_jam")},
    "rectangular_jam": {"FreeGrad": _freegrad("rectangular_jam")},
}


def operators(rule: str) -> dict[str, Callable[[], nn.Module]]:
    """The functions that create the modules of the installed peers that have this rule."""
    absent, makers = missing(), OPERATORS.get(rule, {})
    return {name: make for name, make in makers.items() if peer_of(name) not in absent}
