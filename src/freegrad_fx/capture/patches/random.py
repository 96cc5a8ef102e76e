"""The state of the random number generators that the forward of a model can use."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..._torch.dispatch import DispatchMode

__all__ = ["RandomState"]


class RandomState:
    """The state of the random number generators of Python, PyTorch and NumPy when the object is created.

    All generators belong to the process. Other threads draw from PyTorch's (dropout, new layers), so that a changed
    state counts as a draw only if this thread drew in a `watching` block, or if the seed is another one.
    """

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._seed = torch.initial_seed()
        self._numpy = _numpy_state()
        self._draws = _Draws()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note what this thread draws from PyTorch's generator, and restore the generators if an error is raised."""
        try:
            with self._draws:
                yield
        except BaseException:
            self.restore()
            raise

    def drawn_from(self) -> bool:
        """Whether a random number has been drawn since."""
        return (
            self._torch_drawn_from()
            or self._python != random.getstate()
            or _comparable(self._numpy) != _comparable(_numpy_state())
        )

    def restore(self) -> None:
        """Restore the generators that have been drawn from."""
        if self._python != random.getstate():
            random.setstate(self._python)
        if self._torch_drawn_from():
            torch.set_rng_state(self._torch)
        if self._numpy is not None and _comparable(self._numpy) != _comparable(_numpy_state()):
            sys.modules["numpy"].random.set_state(self._numpy)

    def _torch_drawn_from(self) -> bool:
        mine = self._draws.seen or torch.initial_seed() != self._seed
        return mine and not torch.equal(self._torch, torch.get_rng_state())


class _Draws(DispatchMode):  # type: ignore[misc]
    """Notes whether an operation of this thread draws random numbers."""

    seen = False
    supports_higher_order_operators = True  # a forward can call torch.cond

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.seen |= torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        return func(*args, **(kwargs or {}))


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state(legacy=True)


def _comparable(numpy_state: Any) -> Any:
    """A NumPy state with bytes in place of its array, so that it can be compared."""
    return None if numpy_state is None else (numpy_state[1].tobytes(), *numpy_state[2:])
