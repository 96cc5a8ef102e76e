"""The interception of plain eager code."""

from .block import use

__all__ = ["use"]
