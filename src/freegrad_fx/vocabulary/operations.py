"""The table of operations that are sites only for tables that name them. To add an operation, add a line.

Most of them have several operands, and models call them everywhere: a report that listed every addition would hide the
rest.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import torch
from torch import Tensor, nn

from .op import make_op

__all__ = ["LINEAR", "MATMUL", "OPERATIONS"]

_op = functools.partial(
    make_op, on_demand=True, keeps_shape=False, elementwise=False, needs_more=True
)
_AB = "a=input,self,a b=other,b"


# A product with a parameter on its right, or with the transpose of one, is `linear` as well; see `recognition`.
LINEAR = _op("linear", nn.Linear, operands="x=input,self weight bias")
MATMUL = _op(
    "matmul",
    also="mm bmm addmm baddbmm",
    functions=(operator.matmul, torch.einsum),
    operands="a=mat1,batch1,input,self,a b=mat2,batch2,other,b",
)
MATMUL = dataclasses.replace(MATMUL, aten=(*MATMUL.aten, torch.ops.aten.einsum.default))


OPERATIONS = (
    LINEAR,
    MATMUL,
    _op(
        "conv", nn.Conv1d, nn.Conv2d, nn.Conv3d,
        nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        also="conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution",
        operands="x=input,self weight bias",
    ),
    _op("scaled_dot_product_attention", operands="query key value"),
    _op(
        "mul", also="multiply", operands=_AB,
        functions=(operator.mul,), inplace_functions=(operator.imul,),
    ),
    _op("add", operands=_AB, functions=(operator.add,), inplace_functions=(operator.iadd,)),
    _op(
        "sub", also="subtract", swapped="rsub __rsub__", operands=_AB,
        functions=(operator.sub,), inplace_functions=(operator.isub,),
    ),
    _op(
        "div", also="divide true_divide", swapped="__rdiv__", operands=_AB,
        functions=(operator.truediv,), inplace_functions=(operator.itruediv,),
    ),
    _op(
        "pow", also="square __pow__", functions=(operator.pow,),
        inplace_functions=(operator.ipow, Tensor.__ipow__),
        elementwise=True, keeps_shape=True,
    ),
    _op("exp", elementwise=True, keeps_shape=True),
    _op("sqrt", elementwise=True, keeps_shape=True),
    _op("rsqrt", elementwise=True, keeps_shape=True),
    _op("mean"),
    _op("layer_norm", nn.LayerNorm, operands="x=input,self weight bias", keeps_shape=True),
    _op("rms_norm", nn.RMSNorm, operands="x=input,self weight", keeps_shape=True),
    _op("group_norm", nn.GroupNorm, operands="x=input,self weight bias", keeps_shape=True),
    _op(
        "batch_norm", nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
        operands="x=input,self weight bias", keeps_shape=True,
    ),
    # A layer and the batch norm behind it, which are found together
    _op("linear_bn", operands="x weight bias"),
    _op("conv_bn", operands="x weight bias"),
    _op(
        "max_pool", nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
        also="max_pool1d max_pool2d max_pool3d",
    ),
    _op(
        "avg_pool", nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
        nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
        also="avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
    ),
    _op("embedding", nn.Embedding, operands="weight"),
    _op("dropout", nn.Dropout, keeps_shape=True, may_return_x=True),
)  # fmt: skip
