"""The functions of PyTorch that compute activations inside, where no rule can act."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["opaque_call"]

_COMPOSITES: frozenset[Any] = frozenset(
    getattr(place, name)
    for place, names in (
        (
            F,
            "scaled_dot_product_attention multi_head_attention_forward gumbel_softmax cross_entropy "
            "binary_cross_entropy_with_logits",
        ),
        (
            torch,
            "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell "
            "_transformer_encoder_layer_fwd _native_multi_head_attention",
        ),
    )
    for name in names.split()
    if hasattr(place, name)
)


def opaque_call(function: Callable[..., Any]) -> str:
    """The reason why a rule cannot act inside of a function; ``""`` for other functions."""
    if function in _COMPOSITES:
        return "PyTorch computes activations inside of this call"
    return ""
