"""A model and rules of every kind that changes in training, for the tests of the callbacks of trainers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import freegrad_fx as fg


class Network(nn.Module):
    """A network whose rules are scheduled, learnt and random."""

    def __init__(self, by_hand: float | None = None) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.by_hand = by_hand

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        before = self.first(x)
        h = torch.relu(before)
        if self.by_hand is not None:  # the gradient of scale(s)
            h = h.detach() + self.by_hand * (before - before.detach())
        h = torch.sigmoid(torch.tanh(self.second(h)))
        output = self.third(h)
        if labels is None:
            return {"logits": output}
        return {"loss": nn.functional.cross_entropy(output, labels), "logits": output}


def network(by_hand: float | None = None) -> Network:
    torch.manual_seed(0)
    return Network(by_hand)


def rules() -> tuple[dict[str, Any], dict[str, Tensor | torch.Generator]]:
    """A table of rules with a scheduled parameter, a learnt one and a generator, and the latter two."""
    slope = nn.Parameter(torch.tensor(2.0))
    generator = torch.Generator().manual_seed(5)
    table = {
        "relu": fg.rules.scale(s=1.0),
        "tanh": fg.rules.arctan(alpha=slope),
        "sigmoid": fg.rules.noise(sigma=0.5, generator=generator),
    }
    return table, {"slope": slope, "generator": generator}


SCHEDULES = {"s": fg.schedules.linear(1.0, 3.0, steps=4)}


def rows(count: int = 16) -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(1)
    xs = torch.randn(count, 4, generator=random)
    return [{"x": x, "labels": torch.tensor(n % 2)} for n, x in enumerate(xs)]


def weights(model: nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
