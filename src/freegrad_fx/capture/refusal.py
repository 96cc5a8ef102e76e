"""The reason why a model cannot be exported. `doors` adds the way that takes the model."""

from __future__ import annotations

from ..errors import CaptureError

__all__ = ["NotExportedError"]


class NotExportedError(CaptureError):
    """The reason why a model cannot be captured by `torch.export`, without a remedy.

    Args:
        reason: A sentence.
        symbolic: Whether a symbolic trace keeps what an export loses.
        instead: How to change the model so that it can be exported, as a clause; ``""`` if this is not known.
    """

    def __init__(self, reason: str, *, symbolic: bool = False, instead: str = "") -> None:
        super().__init__(reason)
        self.symbolic = symbolic
        self.instead = instead
