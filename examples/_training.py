"""A training loop for classifiers, as plain as can be. It knows nothing of freegrad_fx.

The order of the batches depends on the seed alone: models that are trained with the same seed see
the same batches, whatever random numbers their backward draws.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _digits import Digits

__all__ = ["Epoch", "accuracy", "train"]


class Epoch(NamedTuple):
    """What happened in one epoch."""

    loss: float  # the mean over the training batches
    accuracy: float  # on the held-out set, after the epoch: a fraction


def train(
    model: nn.Module,
    data: Digits,
    *,
    epochs: int,
    seed: int,
    learning_rate: float = 2e-3,
    batch_size: int = 64,
) -> Iterator[Epoch]:
    """Train with Adam, an epoch for each item that is taken."""
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        batches = torch.randperm(len(data.train_labels), generator=order).split(batch_size)
        model.train()
        loss = sum(step(model, optimizer, data, batch) for batch in batches) / len(batches)
        yield Epoch(loss, accuracy(model, data.held_out_images, data.held_out_labels))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits, batch: Tensor) -> float:
    """Learn from one batch, given as indices, and return its loss."""
    loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of the images that the model, in eval mode, gives their label."""
    model.eval()
    return (model(images).argmax(dim=1) == labels).float().mean().item()
