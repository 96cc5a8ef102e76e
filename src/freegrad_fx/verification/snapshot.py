"""What a model holds and what can be drawn, recorded so that it can be put back."""

from __future__ import annotations

import collections
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .._torch.tensors import version
from .values import copied, same_bits

__all__ = ["RandomNumbers", "Snapshot"]


class RandomNumbers:
    """The state of the random number generators of Python, PyTorch (CPU and CUDA) and NumPy."""

    def __init__(self) -> None:
        self.python = random.getstate()
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state_all() if _uses_cuda() else []
        numpy = sys.modules.get("numpy")
        self.numpy = None if numpy is None else numpy.random.get_state(legacy=True)

    def put_back(self) -> None:
        """Restore the generators."""
        random.setstate(self.python)
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)

    def differences(self, other: RandomNumbers) -> list[str]:
        """The generators whose state differs."""
        found = ["random"] if self.python != other.python else []
        found += ["torch"] if not torch.equal(self.cpu, other.cpu) else []
        pairs = zip(self.cuda, other.cuda, strict=False)
        found += ["torch.cuda"] if not all(torch.equal(a, b) for a, b in pairs) else []
        if self.numpy is not None and other.numpy is not None:
            a, b = self.numpy, other.numpy
            same = a[1].tobytes() == b[1].tobytes() and a[2:] == b[2:]
            found += ["numpy.random"] if not same else []
        return found


@dataclass
class _TensorState:
    tensor: Tensor
    memory: Tensor  # the same memory, with the shape and the strides of the tensor
    contents: Tensor
    grad: Tensor | None
    requires_grad: bool
    writes: int | None  # None for a tensor that does not count them

    def is_written(self) -> bool:
        """Whether a write was counted, or the memory was replaced. Writes into `.data` are not counted."""
        return self.writes is None or _writes(self.tensor) != self.writes or self._is_moved()

    def _is_moved(self) -> bool:
        a, b = self.tensor, self.memory
        return (a.data_ptr(), a.shape, a.stride()) != (b.data_ptr(), b.shape, b.stride())

    def put_back(self, thorough: bool) -> None:
        tensor = self.tensor
        if self._is_moved():
            tensor.data = self.memory
        # Normalisation layers write into their buffers without a counted write
        look = thorough or not isinstance(tensor, nn.Parameter) or self.is_written()
        if look and not same_bits(tensor, self.contents):
            # Not a write that autograd counts: graphs that the caller holds stay valid
            tensor.data.copy_(self.contents)
        self.writes = _writes(tensor)
        if tensor.is_leaf:
            if tensor.requires_grad != self.requires_grad:
                tensor.requires_grad_(self.requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad


def _uses_cuda() -> bool:
    used: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return used


def _writes(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else version(tensor)


_CONTAINERS = (dict, list, set, collections.deque)


class Snapshot:
    """Everything that modules hold: attributes, hooks, modes, submodules, the contents of tensors and containers.

    Objects of other classes are followed through their attributes, so that state in helper objects is put back, too.

    Args:
        modules: The modules, with all their submodules.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[int, _TensorState] = {}
        self._seen: dict[int, Any] = {}
        pending: list[Any] = list(modules)
        while pending:
            pending.extend(self._add(pending.pop()))

    def put_back(self, thorough: bool = True) -> None:
        """Restore what has changed.

        Args:
            thorough: Compare the contents of all parameters, and not only of those with a counted write.
        """
        for container, before in self._containers.values():
            if not _same_items(container, before):
                container.clear()
                if isinstance(container, dict | set):
                    container.update(before)
                else:
                    container.extend(before)
        with torch.no_grad():
            for state in self._tensors.values():
                state.put_back(thorough)

    def contents(self, tensor: Tensor, times: float = 1.0, thorough: bool = True) -> Tensor:
        """The contents of a tensor. A copy is made only if they differ from those in the snapshot, times a number."""
        if (state := self._tensors.get(id(tensor))) is not None:
            before = state.contents
            if not thorough and not state.is_written():
                return before
            if same_bits(tensor, before if times == 1.0 else before.mul(times)):
                return before
        return copied(tensor)

    def _add(self, value: Any) -> Iterator[Any]:
        if type(value) in _PLAIN or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            if _is_kept(value):
                grad = value.grad if value.is_leaf else None
                state = (value.detach(), copied(value), grad, value.requires_grad)
                self._tensors[id(value)] = _TensorState(value, *state, _writes(value))
        elif isinstance(value, _CONTAINERS):
            before = dict(value) if isinstance(value, dict) else list(value)
            self._containers[id(value)] = (value, before)
            if len(value) <= _MOST_SEARCHED:
                yield from before.values() if isinstance(before, dict) else before
        elif isinstance(value, tuple):
            yield from value
        elif _has_state(value):
            yield value.__dict__


_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})


_MOST_SEARCHED = 10_000


def _has_state(value: Any) -> bool:
    """Whether the attributes of a value are a state of the model."""
    if isinstance(value, nn.Module):
        return True
    if isinstance(value, type | ModuleType) or type(getattr(value, "__dict__", None)) is not dict:
        return False
    return type(value).__module__.partition(".")[0] != "torch"


def _is_kept(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def _same_items(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), before.items(), strict=True)
        return all(k is j or k == j for (k, _), (j, _) in pairs) and all(
            value is before[key] for key, value in container.items()
        )
    return all(a is b for a, b in zip(container, before, strict=True))
