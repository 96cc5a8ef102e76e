"""A plain training loop for classifiers. It does not depend on freegrad_fx.

The order of the batches depends only on the seed: models that are trained with the same seed see the
same batches, even if their backward draws random numbers.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _data import Data

__all__ = ["Epoch", "accuracy", "train"]


ADAM = partial(torch.optim.Adam, lr=2e-3)


class Epoch(NamedTuple):
    """The results of one epoch."""

    loss: float  # mean over the training set, during the epoch
    accuracy: float  # on the held-out set, after the epoch, as a fraction
    seconds: float  # of training; on a CPU the processor time, which other programs do not affect


def train(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    seed: int,
    batch_size: int = 64,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = ADAM,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Iterator[Epoch]:
    """Train; yields after each epoch."""
    updates = optimizer(model.parameters())
    inputs, labels = data.train_inputs, data.train_labels
    clock = time.process_time if inputs.device.type == "cpu" else time.perf_counter
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        model.train()
        total = torch.zeros((), device=inputs.device)
        started = clock()
        for batch in (
            torch.randperm(len(labels), generator=order).to(inputs.device).split(batch_size)
        ):
            value = loss(model(inputs[batch]), labels[batch])
            updates.zero_grad()
            value.backward()
            updates.step()
            total += value.detach() * len(batch)
        mean = total.item() / len(
            labels
        )  # before the clock is read, so that an accelerator has finished
        seconds = clock() - started
        yield Epoch(mean, accuracy(model, data.held_out_inputs, data.held_out_labels), seconds)


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """The fraction of the inputs that the model classifies correctly, in eval mode."""
    model.eval()
    batches = zip(inputs.split(1000), labels.split(1000), strict=True)
    right = sum((predicted(model(x)) == y).sum().item() for x, y in batches)
    return right / len(labels)


def predicted(outputs: Tensor) -> Tensor:
    """The predicted class: the largest of the scores [n, classes], or whether a probability [n] is at least 1/2."""
    return outputs.argmax(dim=1) if outputs.ndim == 2 else outputs >= 0.5
