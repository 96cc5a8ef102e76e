"""Rules with the native gradient that keep less for it than PyTorch does, except for those of norms.

Each formula is the native gradient. The lean form computes the same from what it keeps. A dropout keeps its native
backward, and what that has saved is packed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.packing import pack, unpack
from ..core.register import register
from . import masks
from .forms import blank, form_of

__all__ = [
    "exact_add",
    "exact_avg_pool",
    "exact_conv",
    "exact_dropout",
    "exact_leaky_relu",
    "exact_max_pool",
    "exact_mul",
    "exact_relu",
    "exact_silu",
]


# --- one bit of an activation ---


@register(
    "exact_relu",
    reference="the derivative of ReLU, as PyTorch computes it",
    kinds="operation",
    mask=masks.not_clipped,
    save="bits",
    meant_for="relu",
    again="relu",
)
def exact_relu(grad: Tensor, mask: Tensor) -> Tensor:
    """grad where x > 0 or x is NaN, 0 elsewhere

    One bit for each entry is kept. PyTorch keeps the output, which costs nothing where the next operation keeps it too,
    as a trained linear layer or convolution does.
    """
    return masks.only_where(mask, grad)


def _slope_of(function: Any, *, slope: float) -> dict[str, Any]:
    return {"slope": -function(torch.tensor([-1.0], dtype=torch.float64)).item()}


@register(
    "exact_leaky_relu",
    reference="the derivative of leaky ReLU",
    kinds="operation",
    mask=masks.positive,
    save="bits",
    of_op=_slope_of,
    meant_for="leaky_relu",
    examples=({"slope": 0.3}, {"slope": -0.5}),
)
def exact_leaky_relu(grad: Tensor, mask: Tensor, *, slope: float = 0.01) -> Tensor:
    """grad where x > 0, slope·grad elsewhere

    One bit for each entry is kept; PyTorch keeps the input.

    Args:
        slope: The slope for negative inputs. At a site it is that of the operation.
    """
    return torch.where(mask, grad, grad * slope)


# --- pools ---


class _Windows:
    """The windows of a max pool. That of one dimension is computed as one of two dimensions, as PyTorch does."""

    def __init__(self, constants: Any) -> None:
        self.dims = dims = int(constants["kind"][-2])
        self.kernel = self._per_dim(constants["kernel_size"], 1)
        stride = constants.get("stride")
        self.stride = (
            self.kernel if stride is None or stride in ((), []) else self._per_dim(stride, 1)
        )
        self.padding = self._per_dim(constants.get("padding", 0), 0)
        self.dilation = self._per_dim(constants.get("dilation", 1), 1)
        self.ceil = bool(constants.get("ceil_mode", False))
        self.how = (self.kernel, self.stride, self.padding, self.dilation, self.ceil)
        aten = torch.ops.aten
        self.forward: Any = (
            aten.max_pool3d_with_indices if dims == 3 else aten.max_pool2d_with_indices
        )
        self.backward: Any = (
            aten.max_pool3d_with_indices_backward
            if dims == 3
            else aten.max_pool2d_with_indices_backward
        )

    def _per_dim(self, value: Any, filler: int) -> list[int]:
        values = [value] * self.dims if isinstance(value, int) else [*value]
        values = values * self.dims if len(values) < self.dims else values
        return [filler, *values] if self.dims == 1 else values

    def dtype(self) -> torch.dtype:
        size = math.prod(self.kernel)
        return torch.uint8 if size <= 2**8 else torch.int32 if size < 2**31 else torch.int64

    def starts(self, output: Tensor) -> list[Tensor]:
        """The coordinate at which the window of each output begins, for each dimension."""
        rank, found = len(self.kernel), []
        for axis, (stride, padding) in enumerate(zip(self.stride, self.padding, strict=True)):
            size = output.shape[axis - rank]
            start = torch.arange(size, device=output.device) * stride - padding
            found.append(start.view(-1, *[1] * (rank - 1 - axis)))
        return found

    def offsets(self, index: Tensor, sizes: Any) -> Tensor:
        """The places in the windows, from those in the planes of the input."""
        starts, place, found = self.starts(index), 1, torch.zeros_like(index)
        for axis in reversed(range(len(self.kernel))):
            inside = (index % sizes[axis] - starts[axis]) // self.dilation[axis]
            found, index = found + inside * place, index // sizes[axis]
            place *= self.kernel[axis]
        return found.to(self.dtype())

    def indices(self, offsets: Tensor, sizes: Any) -> Tensor:
        """The places in the planes of the input, from those in the windows."""
        starts, place, rest = self.starts(offsets), 1, offsets.to(torch.int64)
        found = torch.zeros_like(rest)
        for axis in reversed(range(len(self.kernel))):
            inside = rest % self.kernel[axis] * self.dilation[axis] + starts[axis]
            found, rest = found + inside * place, rest // self.kernel[axis]
            place *= sizes[axis]
        return found


def _keep_offsets(x: Tensor, *, f: Any) -> tuple[Any, ...]:
    windows = _Windows(f.constants)
    planes = x.unsqueeze(-2) if windows.dims == 1 else x
    index = windows.forward(planes, *windows.how)[1]
    return windows.offsets(index, planes.shape[-len(windows.kernel) :]), form_of(planes)


def _from_offsets(grad: Tensor, kept: tuple[Any, ...], *, f: Any) -> Tensor:
    offsets, (shape, _, last) = kept
    windows = _Windows(f.constants)
    index = windows.indices(offsets, shape[-len(windows.kernel) :])
    grad = grad.unsqueeze(-2) if windows.dims == 1 else grad
    found = windows.backward(grad, blank((shape, grad.dtype, last), grad), *windows.how, index)
    return found.squeeze(-2) if windows.dims == 1 else found  # type: ignore[no-any-return]


@register(
    "exact_max_pool",
    reference="the native gradient of a max pool; PyTorch issue 103785",
    kinds="operation",
    keeps_shape=False,
    reducing=True,
    meant_for="max_pool",
    again="max_pool",
    lean=(_keep_offsets, _from_offsets),
)
def exact_max_pool(grad: Tensor, x: Tensor, *, f: Any) -> Tensor:
    """the native gradient of a max pool, from the place of the maximum in its window

    One byte for each output is kept, more for windows of more than 256 entries. PyTorch keeps the input, and eight
    bytes for each output. The forward computes the pool twice.
    """
    return f.gradient("x", grad)  # type: ignore[no-any-return]


def _keep_form(x: Tensor, *, f: Any) -> tuple[Any, ...]:
    return (form_of(x),)


def _from_form(grad: Tensor, kept: tuple[Any, ...], *, f: Any) -> Tensor:
    return f.gradient("x", grad, x=blank(kept[0], grad))  # type: ignore[no-any-return]


@register(
    "exact_avg_pool",
    reference="the native gradient of an average pool",
    kinds="operation",
    keeps_shape=False,
    reducing=True,
    meant_for="avg_pool",
    lean=(_keep_form, _from_form),
)
def exact_avg_pool(grad: Tensor, x: Tensor, *, f: Any) -> Tensor:
    """the native gradient of an average pool, from the shape of its input

    Nothing is kept; PyTorch keeps the input.
    """
    return f.gradient("x", grad)  # type: ignore[no-any-return]


# --- convolutions ---


def _keep_of_conv(x: Tensor, *, f: Any, recompute: int) -> tuple[Any, ...]:
    if "weight" not in f.needs:
        return None, form_of(x)
    return f.recipe("x", recompute) or x, form_of(x)


def _of_conv(
    grad: Tensor, kept: tuple[Any, ...], weight: Tensor, *, f: Any, recompute: int
) -> dict[str, Any]:
    x, form = kept
    if x is None:
        x = blank(form, grad)
    elif not isinstance(x, Tensor):
        x = x.compute()
    given = {"x": x, "weight": weight}
    dims = [d for d in range(grad.dim()) if d != grad.dim() - weight.dim() + 1]
    return {
        "x": lambda: f.gradient("x", grad, **given),
        "weight": lambda: f.gradient("weight", grad, **given),
        "bias": lambda: grad.sum(dims),
    }


@register(
    "exact_conv",
    reference="the native gradient of a convolution; PyTorch issue 133566; Chen et al. 2016, arXiv:1604.06174",
    requires="recompute >= 0",
    kinds="operation",
    keeps_shape=False,
    reducing=True,
    answers=("x", "weight", "bias"),
    meant_for="conv",
    lean=(_keep_of_conv, _of_conv),
    examples=({"recompute": 8},),
)
def exact_conv(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *, f: Any, recompute: int = 0
) -> Any:
    """the native gradients of a convolution; the input is kept only if the weight is trained

    PyTorch keeps the input of a frozen convolution too.

    Args:
        recompute: The number of operations that may be computed again in the backward for the input, which is then not
            kept. These are ReLUs, batch norms, sums and max pools with the rules ``exact_*``, in eager mode.
    """
    return {name: lambda n=name: f.gradient(n, grad) for name in ("x", "weight", "bias")}


# --- sums ---


@register(
    "exact_add",
    reference="the native gradient of a sum",
    kinds="operation",
    keeps_shape=False,
    answers=("a", "b"),
    meant_for="add",
    again="add",
)
def exact_add(grad: Tensor, *, f: Any) -> Any:
    """∂a = grad, ∂b = alpha·grad

    Nothing is kept, as in PyTorch; but `exact_conv` can compute the sum again.
    """
    scale = f.constants.get("alpha", 1)
    scale = scale.conjugate() if isinstance(scale, complex) else scale
    return {"a": grad, "b": grad if scale == 1 else grad * scale}


# --- gates ---


def _keep_of_silu(x: Tensor) -> tuple[Any, ...]:
    return (x,)


def _of_silu(grad: Tensor, kept: tuple[Any, ...]) -> Tensor:
    return exact_silu.function(grad, kept[0])


@register(
    "exact_silu",
    reference="the native gradient of SiLU",
    kinds="operation",
    meant_for="silu",
    again="silu",
    lean=(_keep_of_silu, _of_silu),
)
def exact_silu(grad: Tensor, x: Tensor) -> Tensor:
    """grad·σ(x)·(1 + x·(1 − σ(x)))

    The input is kept, as PyTorch does. The rule `exact_mul` computes the output again from it.
    """
    if torch.is_grad_enabled():  # the kernel has no derivative
        sigmoid = torch.sigmoid(x)
        return grad * sigmoid * (1 + x * (1 - sigmoid))
    return torch.ops.aten.silu_backward(grad, x)  # type: ignore[no-any-return]


def _keep_factors(a: Tensor | None, b: Tensor | None, *, f: Any) -> tuple[Any, ...]:
    kept_a = (f.recipe("a", 1) or a) if "b" in f.needs else None
    kept_b = (f.recipe("b", 1) or b) if "a" in f.needs else None
    real_a, real_b = (factor is None or not factor.is_complex() for factor in (a, b))
    return kept_a, real_a, kept_b, real_b


def _of_mul(grad: Tensor, kept: tuple[Any, ...], *, f: Any) -> dict[str, Any]:
    a, real_a, b, real_b = kept

    def times(factor: Any, real: bool) -> Tensor:
        if factor is None:  # a number
            factor = next(iter(f.constants.values()))
        if isinstance(factor, Tensor):
            factor = factor.conj()
        elif isinstance(factor, complex):
            factor = factor.conjugate()
        elif not isinstance(factor, int | float):
            factor = factor.compute()
        found: Tensor = grad * factor
        return found.real if real and found.is_complex() else found

    return {"a": lambda: times(b, real_a), "b": lambda: times(a, real_b)}


@register(
    "exact_mul",
    reference="the native gradient of a product; the gates of Liger Kernel and unsloth",
    kinds="operation",
    keeps_shape=False,
    answers=("a", "b"),
    meant_for="mul",
    lean=(_keep_factors, _of_mul),
)
def exact_mul(grad: Tensor, a: Tensor, b: Tensor, *, f: Any) -> Any:
    """∂a = grad·b, ∂b = grad·a; a factor that is a SiLU with the rule exact_silu is computed again

    Of ``silu(gate)·up``, ``gate`` and ``up`` are kept; PyTorch keeps ``silu(gate)`` besides.
    """
    return {name: lambda n=name: f.gradient(n, grad) for name in ("a", "b")}


# --- dropouts ---

_INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16}
_INTEGERS |= {torch.float32: torch.int32, torch.float64: torch.int64}


def _pack_mask(saved: Tensor) -> Any:
    """The bits of a tensor of booleans, or of one that is +0 or one number everywhere; NotImplemented for others."""
    if type(saved) is not Tensor or saved.numel() < 8:
        return NotImplemented
    if saved.untyped_storage().nbytes() != saved.numel() * saved.itemsize:
        return NotImplemented  # the rest of the memory is kept elsewhere
    mask, number = saved, 1.0
    if saved.dtype is not torch.bool:
        # Elsewhere the mask is of booleans, and the checks would wait for the device
        if saved.device.type not in ("cpu", "meta") or saved.dtype not in _INTEGERS:
            return NotImplemented
        entries = saved.view(_INTEGERS[saved.dtype])
        mask = entries.bool()
        if not saved.is_meta:
            largest = entries.max()
            number = largest.view(saved.dtype).item()
            if not (0 <= number < math.inf and torch.equal((entries == largest) & mask, mask)):
                return NotImplemented
    packed, order = pack(mask, 1)
    return packed, order, saved.shape, saved.dtype, number


def _unpack_mask(kept: Any) -> Tensor:
    packed, order, shape, dtype, number = kept
    mask = unpack(packed, shape, order, 1)
    if dtype is torch.bool:
        return mask
    return mask.to(dtype).mul_(number)


@register(
    "exact_dropout",
    reference="the native gradient of a dropout",
    kinds="operation",
    meant_for="dropout",
    packs=(_pack_mask, _unpack_mask),
)
def exact_dropout(grad: Tensor, *, f: Any) -> Tensor:
    """the native gradient of a dropout; its mask is kept as bits

    The backward is PyTorch's own, which keeps the mask as numbers, or as booleans on a GPU. The mask stays as it is in
    a dropout in place, in compiled code, and in a checkpoint.
    """
    return f.gradient("x", grad)  # type: ignore[no-any-return]
