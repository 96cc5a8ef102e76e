"""Finds the parameters among the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..graph.aliasing import named_in_place
from .parameters import is_parameter

__all__ = ["with_parameters"]

# Questions about a tensor, and what changes it: they concern the parameter itself
_OF_THE_TENSOR = frozenset(
    {
        "__get__", "__set__", "__delete__", "__len__", "__repr__", "__format__", "__hash__", "__setitem__",
        "__reduce_ex__", "__deepcopy__", "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset",
        "element_size", "is_floating_point", "is_complex", "is_contiguous", "is_inference", "is_signed", "is_pinned",
        "is_set_to", "is_shared", "data_ptr", "storage", "untyped_storage", "get_device", "has_names", "register_hook",
        "register_post_accumulate_grad_hook", "retain_grad", "backward", "requires_grad_", "set_", "resize_",
    }
)  # fmt: skip
# Properties that return a differentiable tensor
_VIEWS = frozenset(["T", "mT", "H", "mH", "real", "imag"])


def with_parameters(
    deciding: Sequence[Callable[[Tensor], Tensor | None]],
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of a call with the tensors that take the place of parameters.

    Args:
        deciding: Each returns the tensor that takes the place of a parameter, or None to leave it to the next one.
        func: The function that is called.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    def replaced(parameter: Tensor) -> Tensor:
        found = (decide(parameter) for decide in deciding)
        return next((tensor for tensor in found if tensor is not None), parameter)

    name = getattr(func, "__name__", "")
    if name in _OF_THE_TENSOR:
        of = getattr(getattr(func, "__self__", None), "__name__", "")
        if name != "__get__" or of not in _VIEWS:
            return args, kwargs
    first = args[:1] if named_in_place(name) else ()
    rest = args[len(first) :]
    new = (*first, *(_map(replaced, value) for value in rest))
    return new, {k: v if k == "out" else _map(replaced, v) for k, v in kwargs.items()}


def _map(replaced: Callable[[Tensor], Tensor], value: Any) -> Any:
    if is_parameter(value):
        return replaced(value)
    if type(value) in (list, tuple):
        return type(value)(_map(replaced, item) for item in value)
    return value
