"""The first submodule of the original whose result the other model does not compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.dispatch import DispatchMode
from .values import take_apart

__all__ = ["first_other_module", "order_of_modules"]


def first_other_module(
    original: nn.Module, call_original: Callable[[], Any], call_other: Callable[[], Any]
) -> str | None:
    """The path of the first module of the original whose result does not occur in a call of the other model.

    Args:
        original: The original.
        call_original: Calls the original once, from the state in which it differs.
        call_other: The same for the other model.

    Returns:
        The path; None if all results of modules occur.
    """
    results = _results(original, call_original)
    seen = _Seen()
    try:
        with seen:
            call_other()
    except Exception:  # what was computed before counts
        pass
    return next((path for path, marks in results if not marks <= seen.marks), None)


def order_of_modules(original: nn.Module, call: Callable[[], Any]) -> list[str]:
    """The paths of the modules in the order in which their calls end."""
    return [path for path, _ in _results(original, call)]


def _results(model: nn.Module, call: Callable[[], Any]) -> list[tuple[str, set[Any]]]:
    found: list[tuple[str, set[Any]]] = []

    def recording(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            tensors = take_apart(output).tensors.values()
            found.append((path, {mark for t in tensors if (mark := _mark(t)) is not None}))

        return record

    hooks = [m.register_forward_hook(recording(path)) for path, m in model.named_modules()]
    try:
        call()
    except Exception:  # the modules that were called before count
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Seen(DispatchMode):  # type: ignore[misc]
    """Marks the arguments and results of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: set[Any] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._add(args)
        result = func(*args, **(kwargs or {}))
        self._add(result)
        return result

    def _add(self, value: Any) -> None:
        self.marks.update(_mark(t) for t in take_apart(value).tensors.values())


def _mark(tensor: Tensor) -> Any:
    """A number that, with the number of elements, stands for the bits of a tensor, whatever its shape."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return None
    with torch.no_grad():
        plain = tensor.detach().contiguous()
        plain = torch.view_as_real(plain) if plain.is_complex() else plain
        size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = plain.view(size[plain.element_size()]).flatten().long()
        weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 2654435761
        return bits.numel(), int(bits.sum()), int((bits * weights).sum())
