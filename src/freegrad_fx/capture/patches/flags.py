"""Reads of the `training` flags of modules while a model is traced."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch import fx, nn

from ..._torch.replacing import replaced
from ...graph.provenance import is_users
from ..merge import FlagRead
from .reads import reader
from .recorder import Recorder

__all__ = ["answering_training", "noted_flags", "recorded_flags"]


def answering_training(
    answer: Callable[[nn.Module, FrameType], Any],
) -> contextlib.AbstractContextManager[None]:
    """Call `answer` when `module.training` is read, and return its result. If the result is None, return the flag.

    The flag is in the ``__dict__`` of the instance. A property of the class takes precedence over it.
    """

    def read(module: nn.Module) -> Any:
        # The frame of the replacement is between this frame and the frame that reads
        if (flag := answer(module, reader(sys._getframe(2)))) is not None:
            return flag
        try:
            return module.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None

    return replaced(nn.Module, "training", lambda _: property(read))


def recorded_flags(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """Return a proxy of the flag where `module.training` is read."""
    return answering_training(lambda module, _: recorder.training_flag(module))


@contextlib.contextmanager
def noted_flags(root: nn.Module) -> Iterator[tuple[set[FlagRead], list[nn.Module]]]:
    """Collect the reads of the `training` flags of a model, and the other modules whose flag the forward reads."""
    paths = {module: path for path, module in root.named_modules()}
    found: set[FlagRead] = set()
    elsewhere: list[nn.Module] = []

    def note(module: nn.Module, frame: FrameType) -> None:
        if module in paths:
            reader = frame.f_locals.get("self")
            path = paths.get(reader) if isinstance(reader, nn.Module) else None
            found.add(FlagRead(path, paths[module], is_users(frame.f_code)))
        elif frame.f_code is not _COPIES_FLAG:
            elsewhere.append(module)

    with answering_training(note):
        yield found, elsewhere


# An export makes graph modules of its own
_COPIES_FLAG = fx.GraphModule.__init__.__code__
