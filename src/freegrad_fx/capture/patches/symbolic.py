"""All replacements of a symbolic trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .flags import recorded_flags
from .functions import recorded_functions
from .recorder import Recorder
from .refusals import refused_contexts, refused_questions
from .state import recorded_assignments
from .tensors import RecordMode, answered_isinstance, recorded_factories

__all__ = ["patched"]


@contextlib.contextmanager
def patched(recorder: Recorder) -> Iterator[None]:
    """Make all replacements while the block runs."""
    with (
        recorded_flags(recorder),
        recorded_assignments(recorder),
        recorded_functions(recorder),
        refused_contexts(),
        answered_isinstance(recorder),
        refused_questions(),
        recorded_factories(recorder),
        RecordMode(recorder),
    ):
        yield
