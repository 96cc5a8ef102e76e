"""Values of any nesting taken apart, and tensors compared bit by bit."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.examples import twin

__all__ = ["Parts", "copied", "difference", "same_bits", "take_apart"]


@dataclasses.dataclass
class Parts:
    """A value taken apart.

    Attributes:
        outline: Its types, its nesting and its plain values.
        tensors: Its tensors, by their place.
        opaque: The number of objects of which only the class is compared.
    """

    outline: Any
    tensors: dict[str, Tensor]
    opaque: int


def take_apart(value: Any, name: str = "") -> Parts:
    """Take a value apart: containers, dataclasses and the attributes of other objects are searched recursively."""
    parts = Parts(None, {}, 0)
    parts.outline = _outlined(value, name, parts, ())
    return parts


def _outlined(value: Any, place: str, parts: Parts, around: tuple[int, ...]) -> Any:
    kind = type(value)
    if isinstance(value, Tensor):
        parts.tensors[place] = value
        return Tensor if kind is nn.Parameter else kind
    if value is None or kind in (bool, int, str, bytes):
        return kind, value
    if kind in (float, complex):  # as bits, so that nan equals nan
        return kind, struct.pack("dd", complex(value).real, complex(value).imag)
    if id(value) in around or isinstance(value, nn.Module | type) or callable(value):
        return kind
    around = (*around, id(value))
    if isinstance(value, Mapping):
        return kind, [
            (str(key), _outlined(value[key], f"{place}[{key!r}]", parts, around)) for key in value
        ]
    if isinstance(value, tuple | list):
        names = getattr(value, "_fields", None)
        places = [f".{n}" for n in names] if names else [f"[{i}]" for i in range(len(value))]
        return kind, [
            _outlined(v, f"{place}{p}", parts, around) for v, p in zip(value, places, strict=False)
        ]
    if isinstance(value, set | frozenset):
        return kind, sorted(map(repr, value))
    if hasattr(value, "tobytes") and hasattr(value, "dtype"):  # an array or a number of NumPy
        return kind, str(value.dtype), getattr(value, "shape", ()), value.tobytes()
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict:
        return kind, [
            (key, _outlined(item, f"{place}.{key}", parts, around))
            for key, item in attributes.items()
        ]
    parts.opaque += kind.__module__ != "torch"  # dtypes, devices and the like compare
    return (kind, str(value)) if kind.__module__ == "torch" else kind


def copied(tensor: Tensor) -> Tensor:
    """The contents of a tensor, which later writes do not change."""
    return twin(tensor).detach()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape, device, layout and bits. Strides are not compared."""
    if a is b:
        return True
    return not _other_kind(a, b) and all(
        x.shape == y.shape and torch.equal(x, y) for x, y in zip(_bits(a), _bits(b), strict=True)
    )


def _other_kind(a: Tensor, b: Tensor) -> str:
    for name in ("dtype", "shape", "device", "layout"):
        mine, other = getattr(a, name), getattr(b, name)
        if mine != other and not (name == "shape" and a.is_nested and b.is_nested):
            text = (str(tuple(mine)), str(tuple(other))) if name == "shape" else (mine, other)
            return f"the {name} is {text[1]} instead of {text[0]}"
    return ""


_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor) -> list[Tensor]:
    """Integer tensors that hold the bits of a tensor."""
    tensor = tensor.detach()
    if tensor.is_meta:
        return []
    if tensor.is_nested:
        return [bits for part in tensor.unbind() for bits in _bits(part)]
    if tensor.is_quantized:
        return [tensor.int_repr(), *_bits(tensor.dequantize())]
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    tensor = tensor.resolve_neg()
    size = _OF_SIZE.get(tensor.element_size())
    if type(tensor) is not Tensor or size is None or tensor.dtype == size:
        return [tensor]
    return [tensor.contiguous().view(size)]


def difference(expected: Tensor, actual: Tensor, tolerance: Mapping[torch.dtype, float]) -> str:
    """What tells two tensors apart, in words; ``""`` where nothing does.

    Args:
        expected: The tensor of the original.
        actual: The other tensor.
        tolerance: For each dtype, the largest difference that is not one, relative to the largest value. Empty if bits
            have to be the same.
    """
    if same_bits(expected, actual):
        return ""
    if other := _other_kind(expected, actual):
        return other
    if not (expected.is_floating_point() or expected.is_complex()) or expected.is_nested:
        return "its values differ"
    a, b = (
        t.detach().to_dense() if t.layout is not torch.strided else t for t in (expected, actual)
    )
    wide = torch.complex128 if a.is_complex() else torch.double
    a, b = a.dequantize() if a.is_quantized else a, b.dequantize() if b.is_quantized else b
    a, b = a.detach().to(wide), b.detach().to(wide)
    if not torch.equal(a.isfinite(), b.isfinite()):
        return "one has nan or inf where the other has not"
    off = (a - b)[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0
    if allowed := tolerance.get(expected.dtype, 0.0):
        largest = a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0
        if off <= allowed * max(largest, 1e-6):
            return ""
    if off == 0:
        return "only the bits differ (the sign of a zero, or of a nan)"
    return f"its values differ by up to {off:.3g}"
