"""The table of operations that are sites only for tables that name them. To add an operation, add a line.

Most of them have several operands, and models call them everywhere: a report that listed every addition would hide the
rest.
"""

from __future__ import annotations

import functools
import operator

from torch import nn

from .op import make_op

__all__ = ["LINEAR", "MATMUL", "OPERATIONS"]

_op = functools.partial(
    make_op, on_demand=True, keeps_shape=False, elementwise=False, needs_more=True
)


# A product with a parameter on its right, or with the transpose of one, is `linear` as well; see `recognition`.
LINEAR = _op("linear", nn.Linear, operands="x=input,self weight bias")
MATMUL = _op(
    "matmul",
    also="mm bmm addmm baddbmm",
    functions=(operator.matmul,),
    operands="a=mat1,batch1,input,self,a b=mat2,batch2,other,b",
)


OPERATIONS = (
    LINEAR,
    MATMUL,
)
