"""The random number generators that Python code may draw from while it is traced."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["RandomState"]


class RandomState:
    """The random number generators that Python code may draw from while it is traced."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._numpy = _numpy_state()

    def drawn_from(self) -> bool:
        """Whether a number was drawn since."""
        now = RandomState()
        return (
            self._python != now._python
            or not torch.equal(self._torch, now._torch)
            or _comparable(self._numpy) != _comparable(now._numpy)
        )

    @contextlib.contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Put the generators back if an error goes through."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put the generators back."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state(legacy=True)


def _comparable(numpy_state: Any) -> Any:
    """A state whose first array is bytes."""
    return None if numpy_state is None else (numpy_state[1].tobytes(), *numpy_state[2:])
