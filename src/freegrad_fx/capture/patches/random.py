"""The state of the random number generators that the forward of a model can use."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["RandomState"]


class RandomState:
    """The state of the random number generators of Python, PyTorch and NumPy when the object is created."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._numpy = _numpy_state()

    def drawn_from(self) -> bool:
        """Whether a random number has been drawn since."""
        now = RandomState()
        return (
            self._python != now._python
            or not torch.equal(self._torch, now._torch)
            or _comparable(self._numpy) != _comparable(now._numpy)
        )

    @contextlib.contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Restore the generators if an error is raised in the block."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Restore the generators."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state(legacy=True)


def _comparable(numpy_state: Any) -> Any:
    """A NumPy state with bytes in place of its array, so that it can be compared."""
    return None if numpy_state is None else (numpy_state[1].tobytes(), *numpy_state[2:])
