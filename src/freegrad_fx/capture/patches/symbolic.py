"""All replacements of a symbolic trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..questions import Question
from .flags import recorded_flags
from .functions import recorded_functions
from .questions import GRAD_MODE, answered_questions
from .reads import noted_reads
from .recorder import Recorder
from .refusals import refused_contexts
from .state import recorded_assignments
from .tensors import RecordMode, answered_isinstance, recorded_factories

__all__ = ["patched"]


@contextlib.contextmanager
def patched(recorder: Recorder) -> Iterator[None]:
    """Make all replacements while the block runs."""
    mode = RecordMode(recorder)

    def answer(question: Question, now: Any) -> Any:
        if question == GRAD_MODE and mode.previous:
            return now  # the forward itself has set the mode
        return recorder.answer(question, now)

    with (
        recorded_flags(recorder),
        noted_reads(recorder.read),
        recorded_assignments(recorder),
        recorded_functions(recorder),
        refused_contexts(),
        answered_isinstance(recorder),
        answered_questions(answer, recorder.outside),
        recorded_factories(recorder),
        mode,
    ):
        yield
