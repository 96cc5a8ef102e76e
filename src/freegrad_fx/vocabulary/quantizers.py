"""Step functions and quantizers, for use as the replacement forward of activations or parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

__all__ = [
    "binarize",
    "dorefa",
    "heaviside",
    "jump_relu",
    "quantize",
    "sample_one_hot",
    "ternarize",
]


def heaviside(x: Tensor, value_at_zero: float = 0.0, *, threshold: float | Tensor = 0.0) -> Tensor:
    """Return 0 where x < threshold, 1 where x > threshold, `value_at_zero` where they are equal, and NaN where x is.

    Formula: H(x − threshold), in the shape and dtype of ``x − threshold``.

    The site is the step after the subtraction, so that a rule reads ``x − threshold``, and a threshold that is a
    parameter gets the negative of the gradient of `x`, summed to its shape.

    Like that of `torch.sign`, its own derivative is zero, so that a network can be run with its rules disabled.
    (`torch.heaviside` requires a tensor of values, maps NaN to 0, and its backward raises.)

    Args:
        x: A tensor of floating point numbers.
        value_at_zero: The result where x is equal to the threshold.
        threshold: The place of the step: a number, or a tensor that can be broadcast against `x`.
    """
    if not isinstance(threshold, int | float) or threshold != 0:
        x = x - threshold
    if has_torch_function_unary(x):
        return handle_torch_function(heaviside, (x,), x, value_at_zero=value_at_zero)
    return torch.ops.freegrad_fx.heaviside(x, value_at_zero)  # type: ignore[no-any-return]


def _heaviside(x: Tensor, value_at_zero: float = 0.0) -> Tensor:
    step = torch.where(x == 0, value_at_zero, (x > 0).to(x.dtype)).to(x.dtype)
    return torch.where(x.isnan(), x, step)


def _heaviside_in_place(x: Tensor, value_at_zero: float = 0.0) -> Tensor:
    """An equivalent implementation for common cases, with fewer passes over memory and without boolean tensors."""
    usual = x.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    recorded = x.requires_grad and torch.is_grad_enabled()
    if value_at_zero != 0 or not usual or recorded:
        return _heaviside(x, value_at_zero)
    # Multiply twice, because smallest·largest < 1. Adding to 0 maps -0 to 0.
    largest = torch.finfo(x.dtype).max
    return x.new_zeros(()).add(x.detach(), alpha=largest).mul_(largest).clamp_(0, 1)


def binarize(x: Tensor, value_at_zero: float = 1.0, scale: bool = False) -> Tensor:
    """Return 1 where x > 0, −1 where x < 0, `value_at_zero` where x = 0, and NaN where x is NaN.

    Formula: α·sign(x) with a choice of sign(0), in the shape and dtype of `x`; its own derivative is zero.

    Without `scale`, α = 1. With it, α is ``mean|x|`` over dims 1…, for each output channel of a weight; over all
    entries if there are fewer than two dims. This α has the smallest squared error.

    Source: Hubara et al. 2016, arXiv:1602.02830; larq SteSign, Brevitas BinaryQuant. (`torch.sign` maps 0 to 0, so that
    a weight could take three values.) With `scale`: Rastegari et al. 2016, arXiv:1603.05279 (XNOR-Net).

    Args:
        x: A tensor of floating point numbers.
        value_at_zero: The sign where x = 0, usually 1 or −1.
        scale: Whether α is the mean magnitude.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(binarize, (x,), x, value_at_zero=value_at_zero, scale=scale)
    return torch.ops.freegrad_fx.binarize(x, value_at_zero, scale)  # type: ignore[no-any-return]


def _binarize(x: Tensor, value_at_zero: float = 1.0, scale: bool = False) -> Tensor:
    if scale:
        size = _wide(x).abs().mean(dim=_per_channel(x), keepdim=True)
        return (_binarize(x, value_at_zero) * size).to(x.dtype)
    if value_at_zero == 1:
        return torch.where(x.isnan(), x, torch.where(x >= 0, 1, -1).to(x.dtype))
    signs = torch.where(x == 0, value_at_zero, torch.where(x > 0, 1.0, -1.0))
    return torch.where(x.isnan(), x, signs.to(x.dtype))


def ternarize(x: Tensor, threshold: float | None = None, scale: bool = False) -> Tensor:
    """Return 1 where x > threshold, −1 where x < −threshold, 0 between, and NaN where x is NaN.

    Formula: ``α·sign(x)·1[|x| > Δ]``, in the shape and dtype of `x`; its own derivative is zero.

    Args:
        x: A tensor of floating point numbers.
        threshold: Δ; by default ``0.7·mean|x|`` over the whole tensor.
        scale: Whether α is the mean of ``|x|`` where ``|x| > Δ``, which has the smallest squared error, instead of 1.

    Source: Li & Liu 2016, arXiv:1605.04711 (ternary weight networks); larq SteTern, which uses ``|x| ≥ Δ``, with 0.05
    as the default of Δ.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(ternarize, (x,), x, threshold=threshold, scale=scale)
    return torch.ops.freegrad_fx.ternarize(x, threshold, scale)  # type: ignore[no-any-return]


def _ternarize(x: Tensor, threshold: float | None = None, scale: bool = False) -> Tensor:
    size = x.detach().abs()
    # at least float32, because the sum over a large tensor overflows float16
    wide = torch.promote_types(x.dtype, torch.float32)
    limit = 0.7 * size.mean(dtype=wide) if threshold is None else threshold
    values = torch.where(size > limit, x.detach().sign(), 0).to(x.dtype)
    if scale:
        chosen = (size > limit).to(wide)
        values = (values * ((size * chosen).sum() / chosen.sum().clamp(min=1))).to(x.dtype)
    return torch.where(x.isnan(), x, values)


def quantize(
    x: Tensor,
    bits: int = 8,
    low: float | None = None,
    high: float | None = None,
    symmetric: bool = True,
    per_channel: bool = False,
) -> Tensor:
    """Return the nearest of 2^bits evenly spaced values, ties to even, and NaN where x is NaN.

    Formula: ``s·(clamp(round(x/s) + z, n₀, n₁) − z)``, in the shape and dtype of `x`; its own derivative is zero.

    Symmetric: ``n₁ = 2^(bits − 1) − 1``, ``n₀ = −n₁``, ``s = max(|low|, |high|)/n₁``, ``z = 0``. Otherwise ``n₀ = 0``,
    ``n₁ = 2^bits − 1``, ``s = (high − low)/n₁``, and ``z = round(−low/s)``, after `low` and `high` are extended to
    include 0. So 0 is always one of the values.

    Args:
        x: A tensor of floating point numbers.
        bits: The number of bits: at least 2, or 1 if not `symmetric`. At most 16.
        low: The lower end of the range; by default the smallest entry.
        high: The upper end of the range; by default the largest entry.
        symmetric: Whether the values are symmetric around 0, one fewer than 2^bits.
        per_channel: Whether the default of the range is taken over dims 1…, by output channel of a weight, instead of
            over the whole tensor.

    Raises:
        ValueError: The number of bits is not supported, an end of the range is infinite, or `low` is not below `high`.

    Source: Krishnamoorthi 2018, arXiv:1806.08342; `torch.fake_quantize_per_tensor_affine`, Brevitas.
    """
    if has_torch_function_unary(x):
        how: dict[str, Any] = {"bits": bits, "low": low, "high": high}
        how |= {"symmetric": symmetric, "per_channel": per_channel}
        return handle_torch_function(quantize, (x,), x, **how)
    return torch.ops.freegrad_fx.quantize(  # type: ignore[no-any-return]
        x, bits, low, high, symmetric, per_channel
    )


def _quantize(
    x: Tensor,
    bits: int = 8,
    low: float | None = None,
    high: float | None = None,
    symmetric: bool = True,
    per_channel: bool = False,
) -> Tensor:
    if not (2 if symmetric else 1) <= bits <= 16:
        least = "2 to 16" if symmetric else "1 to 16"
        raise ValueError(f"quantize has {least} bits with symmetric={symmetric}, got bits={bits}")
    given = [end for end in (low, high) if end is not None]
    if not all(map(math.isfinite, given)):
        raise ValueError(f"quantize needs finite ends of its range, got low={low} and high={high}")
    if len(given) == 2 and given[0] >= given[1]:
        raise ValueError(f"quantize needs low < high, got low={low} and high={high}")
    v = _wide(x)
    dims = tuple(range(1, x.dim())) if per_channel and x.dim() else tuple(range(x.dim()))
    some = v if v.numel() else v.new_zeros([1] * v.dim())  # an empty tensor has no largest entry
    ends = [
        (some.amin if sign < 0 else some.amax)(dim=dims, keepdim=True)
        if end is None
        else v.new_full((), end)
        for sign, end in ((-1, low), (1, high))
    ]
    if symmetric:
        most = 2 ** (bits - 1) - 1
        step = torch.maximum(ends[0].abs(), ends[1].abs()) / most
    else:
        most = 2**bits - 1
        step = (ends[1].clamp(min=0) - ends[0].clamp(max=0)) / most
    step = torch.where(step == 0, 1, step)
    shift = 0 if symmetric else (-ends[0].clamp(max=0) / step).round()
    level = ((v / step).round() + shift).clamp(-most if symmetric else 0, most)
    return torch.where(x.isnan(), x, ((level - shift) * step).to(x.dtype))


def dorefa(x: Tensor, bits: int = 4) -> Tensor:
    """Return the nearest of 2^bits evenly spaced values from −1 to 1 to ``tanh(x)/max|tanh(x)|``.

    Formula: ``2·round(n·u)/n − 1`` with ``n = 2^bits − 1`` and ``u = tanh(x)/(2·max|tanh(x)|) + 1/2``, in the shape and
    dtype of `x`; its own derivative is zero.

    The values fill [−1, 1] whatever the size of `x` is, and 0 is not one of them.

    Args:
        x: A tensor of floating point numbers.
        bits: The number of bits, 2 to 16. (With one bit, the method is `binarize` with one scale for all entries.)

    Raises:
        ValueError: The number of bits is not supported.

    Source: Zhou et al. 2016, arXiv:1606.06160 (DoReFa-Net), equation 9.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(dorefa, (x,), x, bits=bits)
    return torch.ops.freegrad_fx.dorefa(x, bits)  # type: ignore[no-any-return]


def _dorefa(x: Tensor, bits: int = 4) -> Tensor:
    if not 2 <= bits <= 16:
        raise ValueError(f"dorefa has 2 to 16 bits, got bits={bits}")
    t, most = _wide(x).tanh(), 2**bits - 1
    largest = t.abs().amax() if t.numel() else t.new_ones(())
    unit: Tensor = t / (2 * torch.where(largest == 0, 1, largest)) + 0.5
    levels: Tensor = 2 * (most * unit).round() / most - 1
    return torch.where(x.isnan(), x, levels.to(x.dtype))


def _wide(x: Tensor) -> Tensor:
    """The values in at least single precision, detached."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _per_channel(x: Tensor) -> tuple[int, ...]:
    """The dims over which an output channel of a weight extends: 1…, or all if there are fewer than two."""
    return tuple(range(x.dim() > 1, x.dim()))


def sample_one_hot(x: Tensor, dim: int = -1) -> Tensor:
    """Return a one-hot sample with the probabilities ``softmax(x)``.

    Formula: 1 at ``argmax(x + G)``, 0 elsewhere, with Gumbel noise G, along `dim`, in the shape and dtype of `x`; its
    own derivative is zero.

    The numbers are drawn from PyTorch's global generator, also in eval mode. As the forward of a softmax, it is for the
    rules `reinmax` and `gumbel_straight_through`.

    Args:
        x: A tensor of floating point numbers, the logits.
        dim: The dimension of the softmax.

    Source: Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(sample_one_hot, (x,), x, dim=dim)
    return torch.ops.freegrad_fx.sample_one_hot(x, dim)  # type: ignore[no-any-return]


def _sample_one_hot(x: Tensor, dim: int = -1) -> Tensor:
    if not x.numel():
        return x.clone()
    logits = _wide(x)
    # -log(U) is exponential; the smallest positive number instead of 0
    drawn = -torch.rand_like(logits).clamp(min=torch.finfo(logits.dtype).tiny).log()
    place = (logits - drawn.log()).argmax(dim, keepdim=True)
    sample = torch.zeros_like(logits).scatter(dim, place, 1.0)
    return torch.where(x.isnan(), x, sample.to(x.dtype))


def jump_relu(x: Tensor, threshold: float = 0.0) -> Tensor:
    """Return x where x > threshold, 0 where x ≤ threshold, and NaN where x is NaN.

    Formula: ``x·1[x > threshold]``, in the shape and dtype of `x`; its own derivative is ``1[x > threshold]``.

    Args:
        x: A tensor of floating point numbers.
        threshold: The jump.

    Source: Rajamanoharan et al. 2024, arXiv:2407.14435 (JumpReLU autoencoders); SAELens.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(jump_relu, (x,), x, threshold=threshold)
    return torch.ops.freegrad_fx.jump_relu(x, threshold)  # type: ignore[no-any-return]


def _jump_relu(x: Tensor, threshold: float = 0.0) -> Tensor:
    return torch.where(x <= threshold, 0, x)


# They are operators, so that Dynamo and torch.export record each as one recognisable call, and composite, so that
# autograd, vmap and Inductor trace into them.
_library: Any = torch.library.Library("freegrad_fx", "FRAGMENT")  # type: ignore[no-untyped-call]

_library.define(
    "sample_one_hot(Tensor self, int dim=-1) -> Tensor", tags=torch.Tag.nondeterministic_seeded
)
for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
    _library.impl("sample_one_hot", _sample_one_hot, _key)

for _schema, (_usual, _batched) in {
    "heaviside(Tensor self, float value_at_zero=0.0) -> Tensor": (_heaviside_in_place, _heaviside),
    "binarize(Tensor self, float value_at_zero=1.0, bool scale=False) -> Tensor": (
        _binarize,
        _binarize,
    ),
    "dorefa(Tensor self, int bits=4) -> Tensor": (_dorefa, _dorefa),
    "jump_relu(Tensor self, float threshold=0.0) -> Tensor": (_jump_relu, _jump_relu),
    "quantize(Tensor self, int bits=8, float? low=None, float? high=None, bool symmetric=True, "
    "bool per_channel=False) -> Tensor": (_quantize, _quantize),
    "ternarize(Tensor self, float? threshold=None, bool scale=False) -> Tensor": (
        _ternarize,
        _ternarize,
    ),
}.items():
    _library.define(_schema)
    _library.impl(_schema.partition("(")[0], _usual, "CompositeImplicitAutograd")
    _library.impl(_schema.partition("(")[0], _batched, "FuncTorchBatchedDecomposition")
