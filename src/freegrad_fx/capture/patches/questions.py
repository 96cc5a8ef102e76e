"""Answers to a forward that asks for the global state of PyTorch, with a note of what was asked."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from ..._torch import settings
from ..._torch.replacing import all_replaced
from ...graph.provenance import is_users
from ..outside import Outside
from ..questions import Question, can_be_asked

__all__ = ["GRAD_MODE", "answered_questions", "noted_questions"]

GRAD_MODE = Question.of("torch.is_grad_enabled", ())


@contextlib.contextmanager
def answered_questions(
    answer: Callable[[Question, Any], Any], outside: Outside | None
) -> Iterator[None]:
    """Call `answer` where user code asks for the global state, and return its result.

    Args:
        answer: Gets the question, and the answer of an eager call now.
        outside: What the forward can reach. Functions that it holds by another name (`from torch import ...`) ask too.
    """
    places = {
        name: place for name in settings.FUNCTIONS if (place := settings.located(name)) is not None
    }
    held = {id(getattr(*place)): place for place in places.values()}
    reading = _reading(answer)
    wanted = [
        *((*place, _asking(name, answer)) for name, place in places.items()),
        *((kind, method, reading) for kind, method in settings.flag_readers().items()),
    ]
    with all_replaced(wanted):
        functions = {key: getattr(*place) for key, place in held.items()}
        with nullcontext() if outside is None else outside.swapped(functions):
            yield


def _asking(name: str, answer: Callable[[Question, Any], Any]) -> Callable[..., Any]:
    eager_only = name in settings.CAPTURES

    def replacing(function: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if not is_users(sys._getframe(2).f_code):
                return function(*args, **kwargs)
            args = (*args, *kwargs.values())
            if not can_be_asked(args):
                raise TypeError(f"the forward calls {name}() with an argument that is traced")
            # The capture itself is what these functions would report
            now = False if eager_only else function(*args)
            return answer(Question.of(name, args), now)

        return ask

    return replacing


def _reading(answer: Callable[[Question, Any], Any]) -> Callable[..., Any]:
    def replacing(read: Callable[..., Any]) -> Callable[..., Any]:
        def ask(reader: Any, *args: Any) -> Any:
            now = read(reader, *args)
            if not is_users(sys._getframe(2).f_code):
                return now
            name = settings.flag_of(reader, *args)
            return now if name is None else answer(Question(name), now)

        return ask

    return replacing


@contextlib.contextmanager
def noted_questions(outside: Outside) -> Iterator[dict[Question, Any]]:
    """Collect the questions that a forward asks, with the answers."""
    found: dict[Question, Any] = {}
    grad_mode = torch.is_grad_enabled()
    flags = settings.flags()  # torch.export itself changes some while it runs the forward

    def note(question: Question, now: Any) -> Any:
        if question == GRAD_MODE and now != grad_mode:
            return now  # the forward itself has set the mode
        return found.setdefault(question, flags.get(question, now))

    with answered_questions(note, outside):
        yield found
