"""Finds the parameters among the arguments of a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..graph.aliasing import named_in_place
from .parameters import is_parameter

__all__ = ["Deciding", "with_parameters"]

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
_WRITES = frozenset(
    (
        "__setitem__",
        *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")),
        *(f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift", "matmul")),
    )
)
# Properties that return a differentiable tensor
_VIEWS = frozenset(["T", "mT", "H", "mH", "real", "imag"])


class Deciding(Protocol):
    """What decides about parameters in a block."""

    def parameter(self, parameter: Tensor) -> Tensor | None:
        """The tensor that takes the place of a parameter, or None to leave it to the next one."""

    def refuse_write(self, parameter: Tensor) -> None:
        """Raise `RuleError` if the forward of a parameter is replaced, which the model writes into."""

    def forget(self, parameter: Tensor) -> None:
        """Note that the contents of a parameter may change without a new version."""


def with_parameters(
    deciding: Sequence[Deciding],
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments of a call with the tensors that take the place of parameters.

    Args:
        deciding: What decides about parameters, the first one first.
        func: The function that is called.
        args: Positional arguments.
        kwargs: Keyword arguments.

    Raises:
        RuleError: The call writes into a parameter whose forward is replaced.
    """

    def replaced(parameter: Tensor) -> Tensor:
        found = (one.parameter(parameter) for one in deciding)
        return next((tensor for tensor in found if tensor is not None), parameter)

    name = getattr(func, "__name__", "")
    writes = name in _WRITES or (named_in_place(name) and name not in _OF_THE_TENSOR)
    first = args[:1] if writes else ()
    for value in (*first, kwargs.get("out")):
        if is_parameter(value):
            for one in deciding:
                one.refuse_write(value)
    if name in _OF_THE_TENSOR:
        of = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__get__" and of == "data" and is_parameter(args[0]):
            for one in deciding:
                one.forget(args[0])  # a write through `.data` changes no version
        if name != "__get__" or of not in _VIEWS:
            return args, kwargs
    rest = args[len(first) :]
    new = (*first, *(_map(replaced, value) for value in rest))
    return new, {k: v if k == "out" else _map(replaced, v) for k, v in kwargs.items()}


def _map(replaced: Callable[[Tensor], Tensor], value: Any) -> Any:
    if is_parameter(value):
        return replaced(value)
    if type(value) in (list, tuple):
        return type(value)(_map(replaced, item) for item in value)
    return value
