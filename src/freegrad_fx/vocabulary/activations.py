"""The table of activations. To add an activation, add a line; to add a spelling, extend a line."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn

from .comparisons import compared
from .op import Op, by_name, make_op
from .operations import OPERATIONS
from .quantizers import (
    binarize,
    dorefa,
    heaviside,
    jump_relu,
    quantize,
    sample_one_hot,
    ternarize,
)

__all__ = ["CASES", "FORWARDS", "GROUPS", "OPS", "TABLE"]


_A, _S, _Q, _H = "activations", "softmax", "quantizers", "heaviside"


# Names that begin with an underscore occur in ATen's decompositions.
TABLE = (
    make_op("relu", nn.ReLU, group=_A, keeps_positive=True),
    make_op("relu6", nn.ReLU6, group=_A),
    make_op("leaky_relu", nn.LeakyReLU, group=_A),
    make_op("prelu", nn.PReLU, group=_A, also="_prelu_kernel", needs_more=True),
    make_op("rrelu", nn.RReLU, group=_A, also="rrelu_with_noise"),
    make_op("elu", nn.ELU, group=_A),
    make_op("selu", nn.SELU, group=_A),
    make_op("celu", nn.CELU, group=_A),
    make_op("gelu", nn.GELU, group=_A),
    make_op("silu", nn.SiLU, group=_A),
    make_op("mish", nn.Mish, group=_A),
    make_op("hardswish", nn.Hardswish, group=_A),
    make_op("hardsigmoid", nn.Hardsigmoid, group=_A),
    make_op("hardtanh", nn.Hardtanh, group=_A),
    make_op("hardshrink", nn.Hardshrink, group=_A),
    make_op("softshrink", nn.Softshrink, group=_A),
    make_op("tanhshrink", nn.Tanhshrink, group=_A),
    make_op("threshold", nn.Threshold, group=_A, needs_more=True),
    make_op("softplus", nn.Softplus, group=_A),
    make_op("softsign", nn.Softsign, group=_A),
    make_op("sigmoid", nn.Sigmoid, group=_A, also="expit"),
    make_op("logsigmoid", nn.LogSigmoid, group=_A, also="log_sigmoid"),
    make_op("tanh", nn.Tanh, group=_A),
    make_op("heaviside", group=f"{_A} {_H}", functions=(heaviside,)),
    make_op("jump_relu", group=_A, functions=(jump_relu,)),
    make_op(
        "softmax", nn.Softmax, nn.Softmax2d, group=_S, also="_softmax _safe_softmax",
        elementwise=False, needs_more=True,
    ),
    make_op(
        "log_softmax", nn.LogSoftmax, group=_S, also="_log_softmax",
        elementwise=False, needs_more=True,
    ),
    make_op("softmin", nn.Softmin, group=_S, elementwise=False, needs_more=True),
    make_op("sign", group=_Q, also="sgn"),
    make_op("binarize", group=_Q, functions=(binarize,), elementwise=False),
    make_op("ternarize", group=_Q, functions=(ternarize,), elementwise=False),
    make_op("quantize", group=_Q, functions=(quantize,), elementwise=False),
    make_op("dorefa", group=_Q, functions=(dorefa,), elementwise=False),
    make_op("round", group=_Q, zero_below=0.5),
    make_op("floor", group=_Q),
    make_op("ceil", group=_Q),
    make_op("trunc", group=_Q, also="fix", zero_below=1.0),
    # Not an activation: most comparisons are masks. It is a site only if an entry names it, or "heaviside".
    make_op("comparison", group=_H, functions=(compared,), needs_more=True, on_demand=True),
    # No group, because models also use these for other purposes than activation.
    make_op("glu", nn.GLU, elementwise=False, keeps_shape=False),
    make_op("clamp", also="clip", needs_more=True),
    make_op("clamp_min", needs_more=True),
    make_op("clamp_max", needs_more=True),
    make_op("abs", also="absolute __abs__", functions=(torch.abs, operator.abs)),
    make_op("sample_one_hot", functions=(sample_one_hot,), elementwise=False),
    make_op("identity", nn.Identity, also="positive", may_return_x=True),
)  # fmt: skip


# Special cases of an op that have their own name. Dynamo and torch.export record nn.ReLU6 as a hardtanh.
CASES = {"hardtanh": ("relu6", {"min_val": 0.0, "max_val": 6.0})}


OPS: Mapping[str, Op] = by_name((*TABLE, *OPERATIONS))


FORWARDS = tuple(op.name for op in TABLE if op.function is not None and op.keeps_shape)
"""The ops that can replace a forward: they take one tensor and keep its shape."""


GROUPS: Mapping[str, frozenset[str]] = MappingProxyType(
    {g: frozenset(op.name for op in TABLE if g in op.groups) for g in (_A, _S, _Q, _H)}
)
