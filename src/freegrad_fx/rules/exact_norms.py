"""Rules with the native gradient of norms that keep less: the output instead of the input, or nothing.

Each formula is the native gradient. The lean form computes the same from what it keeps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._torch.dynamo import is_compiling
from ..core.register import register
from .forms import blank, form_of
from .precision import wide

__all__ = ["exact_batch_norm", "exact_layer_norm", "exact_rms_norm"]

_MOST = 4.0
"""The largest bias, relative to the weight, for which (y − bias)/weight has lost no more than two bits."""


def _rank(constants: Any) -> int:
    """The number of dimensions that are normalised."""
    sizes = constants.get("normalized_shape", ())
    return int(constants.get("dims", 1 if isinstance(sizes, int) else len(sizes)))


def _keep_norm(
    x: Tensor, z: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, rank: int
) -> tuple[Any, ...]:
    """Whether the output is kept, it or the input, and the channels where the affine loses digits, with their z.

    Args:
        x: The input.
        z: The normalised input.
        weight: The weight.
        bias: The bias.
        y: The output.
        rank: The number of dimensions that are normalised.
    """
    if x.dtype != y.dtype:  # under autocast: the next operation keeps a rounded copy of y
        return False, x, None, None
    if weight is None and bias is None:
        return True, y, None, None
    places = _lossy(weight, bias)
    if places is None:
        return False, x, None, None
    if not places.numel():
        return True, y, None, None
    return True, y, places, z.flatten(-rank)[..., places].to(y.dtype)


def _lossy(weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The channels in which the normalised values lose digits in the output; None if most do, or it is not known."""
    given = [t for t in (weight, bias) if t is not None]
    if is_compiling() or any(
        type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta for t in given
    ):
        return None
    if given[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    scale = torch.ones_like(given[0]) if weight is None else weight.abs()
    offset = torch.zeros_like(scale) if bias is None else bias.abs()
    lossy = ~((offset <= _MOST * scale) & (scale > torch.finfo(scale.dtype).tiny))
    places = lossy.flatten().nonzero().flatten()
    return None if 2 * places.numel() > lossy.numel() else places


def _as(like: Tensor | torch.dtype | None, result: Tensor | None, grad: Tensor) -> Any:
    """A gradient in the dtype of its value, or of the incoming gradient if that is wider."""
    if like is None or result is None:
        return result
    dtype = like.dtype if isinstance(like, Tensor) else like
    return result.to(torch.promote_types(dtype, grad.dtype))


def _from_output(
    y: Tensor,
    places: Tensor | None,
    z: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rank: int,
) -> Tensor:
    """The normalised values, in at least single precision."""
    found = wide(y)
    found = found if bias is None else found - bias
    found = found if weight is None else found / weight
    if places is None or z is None:
        return found
    return found.flatten(-rank).index_copy(-1, places, z.to(found.dtype)).view(found.shape)


def _keep_of_layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, y: Tensor, *, f: Any
) -> tuple[Any, ...]:
    rank, eps = _rank(f.constants), f.constants.get("eps", 1e-5)
    shape = x.shape[x.dim() - rank :]
    z, mean, rstd = torch.native_layer_norm(wide(x), shape, None, None, eps)
    kept = _keep_norm(x, z, weight, bias, y, rank)
    return x.dtype, rstd, None if kept[0] else mean, *kept


def _of_layer_norm(
    grad: Tensor, kept: tuple[Any, ...], weight: Tensor | None, bias: Tensor | None, *, f: Any
) -> Any:
    dtype, rstd, mean, of_y, value, places, some = kept
    rank = _rank(f.constants)
    shape = grad.shape[grad.dim() - rank :]
    needs = [name in f.needs for name in ("x", "weight", "bias")]
    scale, offset = (t if t is None else wide(t) for t in (weight, bias))
    if of_y:  # the values are normalised already: their mean is 0, their deviation 1
        z = _from_output(value, places, some, weight, bias, rank)
        mean, of_z = torch.zeros_like(rstd), torch.ones_like(rstd)
    else:
        z, of_z = wide(value), rstd
    found = torch.ops.aten.native_layer_norm_backward(
        wide(grad), z, shape, mean, of_z, scale, offset, needs
    )
    of_x, of_weight, of_bias = found
    of_x = rstd * of_x if of_y and needs[0] else of_x
    return {
        "x": _as(dtype, of_x, grad),
        "weight": _as(weight, of_weight, grad),
        "bias": _as(bias, of_bias, grad),
    }


@register(
    "exact_layer_norm",
    reference="the native gradient of a layer norm; Yang et al. 2024, arXiv:2406.16282 (MS-LN)",
    kinds="operation",
    reducing=True,
    answers=("x", "weight", "bias"),
    meant_for="layer_norm",
    lean=(_keep_of_layer_norm, _of_layer_norm),
)
def exact_layer_norm(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *, f: Any
) -> Any:
    """rstd·(h − mean(h) − z·mean(h·z)), with h = weight·grad and z = (y − bias)/weight

    The output is kept, which the next operation often keeps too, and 1/σ of each row; PyTorch keeps the input. Of
    channels with |bias| > 4·|weight|, where (y − bias)/weight has few digits, z itself is kept. The input is kept where
    that is less: if most channels are such, and under autocast. The gradients differ from the native ones by the
    rounding of y.
    """
    return {name: lambda n=name: f.gradient(n, grad) for name in ("x", "weight", "bias")}


def _keep_of_rms_norm(x: Tensor, weight: Tensor | None, y: Tensor, *, f: Any) -> tuple[Any, ...]:
    rank, eps = _rank(f.constants), f.constants.get("eps")
    values = wide(x)
    if eps is None:
        eps = torch.finfo(values.dtype).eps
    squares = values.square().mean(tuple(range(-rank, 0)), keepdim=True)
    rstd = torch.rsqrt(squares + eps)
    return x.dtype, rstd, *_keep_norm(x, values * rstd, weight, None, y, rank)


def _of_rms_norm(grad: Tensor, kept: tuple[Any, ...], weight: Tensor | None, *, f: Any) -> Any:
    dtype, rstd, of_y, value, places, some = kept
    rank = _rank(f.constants)
    z = _from_output(value, places, some, weight, None, rank) if of_y else wide(value) * rstd
    inner, outer = tuple(range(-rank, 0)), tuple(range(grad.dim() - rank))

    def of_x() -> Tensor:
        scaled = wide(grad) if weight is None else wide(grad) * weight
        of_z = scaled - z * (scaled * z).mean(inner, keepdim=True)
        return _as(dtype, rstd * of_z, grad)  # type: ignore[no-any-return]

    def of_weight() -> Tensor:
        products = wide(grad) * z
        return _as(weight, products.sum(outer) if outer else products, grad)  # type: ignore[no-any-return]

    return {"x": of_x, "weight": of_weight}


@register(
    "exact_rms_norm",
    reference="the native gradient of an RMS norm; Yang et al. 2024, arXiv:2406.16282 (MS-RMSNorm)",
    kinds="operation",
    reducing=True,
    answers=("x", "weight"),
    meant_for="rms_norm",
    lean=(_keep_of_rms_norm, _of_rms_norm),
)
def exact_rms_norm(grad: Tensor, x: Tensor, weight: Tensor | None, *, f: Any) -> Any:
    """rstd·(h − z·mean(h·z)), with h = weight·grad and z = y/weight

    The output is kept, which the next operation often keeps too, and 1/σ of each row; PyTorch keeps the input, and on
    the CPU a second tensor of its size. Of channels whose weight is 0, z itself is kept. The input is kept where that
    is less: if most weights are 0, and under autocast. The gradients differ from the native ones by the rounding of y.
    """
    return {name: lambda n=name: f.gradient(n, grad) for name in ("x", "weight")}


# --- batch norms in eval mode ---


def _keep_of_batch_norm(x: Tensor, *, f: Any) -> tuple[Any, ...]:
    statistics = f.constants["running_mean"], f.constants["running_var"]
    return (x if "weight" in f.needs else None), form_of(x), *statistics


def _of_batch_norm(grad: Tensor, kept: tuple[Any, ...], weight: Tensor | None, *, f: Any) -> Any:
    x, form, mean, var = kept
    names = ("x", "weight", "bias")
    found = torch.ops.aten.native_batch_norm_backward(
        grad, blank(form, grad) if x is None else x, weight, mean, var, None, None, False,
        f.constants.get("eps", 1e-5), [name in f.needs for name in names],
    )  # fmt: skip
    return dict(zip(names, found, strict=True))


@register(
    "exact_batch_norm",
    reference="the native gradient of a batch norm in eval mode",
    kinds="operation",
    reducing=True,
    answers=("x", "weight", "bias"),
    meant_for="batch_norm",
    native_if="training",
    again="batch_norm",
    lean=(_keep_of_batch_norm, _of_batch_norm),
)
def exact_batch_norm(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, *, f: Any
) -> Any:
    """the native gradients of a batch norm; in eval mode the input is kept only if the weight is trained

    PyTorch keeps the input of a frozen batch norm too. In training mode the backward is PyTorch's own.
    """
    return {name: lambda n=name: f.gradient(n, grad) for name in ("x", "weight", "bias")}
