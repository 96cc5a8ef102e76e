"""What is known of the outputs of PyTorch's own module classes, for entries that select modules by their class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["changes_shape", "returns_several"]

_SEVERAL = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss)
_OTHER_SHAPE = (
    nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.CosineSimilarity, nn.PairwiseDistance,
    nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample, nn.Fold, nn.Unfold,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.GLU,
    nn.CrossEntropyLoss, nn.MSELoss, nn.L1Loss, nn.NLLLoss, nn.BCELoss, nn.BCEWithLogitsLoss,
)  # fmt: skip
_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.LPPool1d, nn.LPPool2d, nn.LPPool3d,
)  # fmt: skip


def returns_several(module: nn.Module) -> bool:
    """Whether a module of PyTorch returns a tuple instead of a tensor."""
    return _of_torch(module) and (
        isinstance(module, _SEVERAL) or bool(getattr(module, "return_indices", False))
    )


def changes_shape(module: nn.Module) -> bool:
    """Whether a module of PyTorch is known to return a tensor of another shape than that of its input."""
    if not _of_torch(module):
        return False
    if isinstance(module, nn.Linear):
        return bool(module.in_features != module.out_features)
    if isinstance(module, _CONVOLUTIONS):
        return module.in_channels != module.out_channels or any(s != 1 for s in module.stride)
    if isinstance(module, _POOLS):
        stride = getattr(module, "stride", None)
        steps = _values(module.kernel_size if stride is None else stride)
        return any(step != 1 for step in steps)
    return isinstance(module, _OTHER_SHAPE)


def _of_torch(module: nn.Module) -> bool:
    """Whether the forward of a module is that of a class of PyTorch, also in a class derived from it."""
    return str(getattr(type(module).forward, "__module__", "")).startswith("torch.")


def _values(sizes: Any) -> Iterable[int]:
    return sizes if isinstance(sizes, tuple | list) else (sizes,)
