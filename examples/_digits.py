"""scikit-learn's handwritten digits as tensors, split into a training and a held-out set.

1797 images of 8×8 pixels, which come with scikit-learn: nothing is downloaded. This module knows
nothing of models or of freegrad_fx.
"""

from typing import NamedTuple

import sklearn.datasets
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["Digits", "load_digits"]


class Digits(NamedTuple):
    """Images of shape [n, 1, 8, 8] in [0, 1] and their labels of shape [n]."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_digits(held_out: float = 0.25) -> Digits:
    """Split the digits, every class in the same proportion, and the same way at every call."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=held_out, stratify=labels, random_state=0)
    train_pixels, held_out_pixels, train_labels, held_out_labels = split
    return Digits(
        _images(train_pixels),
        torch.as_tensor(train_labels),
        _images(held_out_pixels),
        torch.as_tensor(held_out_labels),
    )


def _images(pixels: object) -> Tensor:
    return torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
