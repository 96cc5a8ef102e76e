"""Questions of a forward about the global state of PyTorch, such as `torch.is_grad_enabled()`.

A graph has no branches, so it is valid only for the answers during its capture. They are written beside the `training`
flags of a `Variant`, and are compared with the answers of each call before a graph is chosen.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from .._torch import settings

__all__ = ["Question", "can_be_asked", "reader"]


class Question(str):
    """A question, as the code that asks it: ``torch.is_autocast_enabled('cpu')``, ``torch.backends.cudnn.enabled``."""

    __slots__ = ()

    @classmethod
    def of(cls, name: str, args: tuple[Any, ...]) -> Question:
        """The question that a call of a function with some arguments asks."""
        return cls(f"{name}({', '.join(map(repr, args))})")


def can_be_asked(args: tuple[Any, ...]) -> bool:
    """Whether the text of a question can contain the arguments."""
    return all(type(value) in (str, int, bool, type(None)) for value in args)


def reader(question: Question) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function whose call answers a question, and its arguments.

    Raises:
        RuntimeError: This release of PyTorch does not know what the question asks for.
    """
    name, called, arguments = question.partition("(")
    found = settings.located(name)
    if found is None:
        raise RuntimeError(
            f"the model was captured for an answer to {question}, which this release of PyTorch does not have. "
            f"Transform the original model again."
        )
    if not called:
        return getattr, found
    return getattr(*found), ast.literal_eval(f"({arguments[:-1]}{',' * (arguments != ')')})")
