"""The releases of PyTorch that the package is tested with, and the lookup of private names."""

from __future__ import annotations

import functools
import pkgutil
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from ..errors import FreegradWarning, TorchVersionError

__all__ = [
    "TESTED",
    "lookup",
    "private",
    "release",
    "unsupported",
    "uses_private_names",
    "warn_if_untested",
]

TESTED = ("2.12", "2.13", "2.14", "2.15")
"""The minor releases with which the tests are run, the oldest first."""

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


@functools.cache  # some names are looked up at every call of a compiled model
def lookup(name: str, feature: str) -> Any:
    """Return the object with a dotted name in PyTorch.

    Args:
        name: The name, such as ``"torch._C._get_tracing_state"``.
        feature: The feature that needs it, as the subject of a sentence.

    Raises:
        TorchVersionError: This release does not have the name.
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise unsupported(feature, error) from error


def private(name: str, feature: str) -> Any:
    """Like `lookup`, for use at import: for a missing name, return a placeholder that raises an error when it is used.

    Use this for functions that are called and classes that are passed to `isinstance`. For objects that are compared by
    identity use `lookup`, because the placeholder would be unequal to everything without an error.
    """
    try:
        return lookup(name, feature)
    except TorchVersionError as error:
        text = str(error)
        return _Missing("Missing", (), {"_text": text, "__doc__": text})


class _Missing(type):
    """The metaclass of placeholders. A placeholder is a class, so that it can replace a class or a function."""

    _text: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TorchVersionError(cls._text)

    def __instancecheck__(cls, instance: object) -> bool:
        raise TorchVersionError(cls._text)

    def __subclasscheck__(cls, subclass: type) -> bool:
        raise TorchVersionError(cls._text)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):  # Python looks these up in every class
            raise AttributeError(name)
        raise TorchVersionError(cls._text)


def uses_private_names(
    feature: str,
) -> Callable[[Callable[Parameters, Returned]], Callable[Parameters, Returned]]:
    """Decorate a function so that a missing name in it raises `TorchVersionError`.

    The function must not call user code, because an `AttributeError` of user code would be converted too.

    Args:
        feature: The feature that needs the names, as the subject of a sentence.
    """

    def decorate(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
        @functools.wraps(function)
        def calling(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
            try:
                return function(*args, **kwargs)
            except (ImportError, AttributeError) as error:
                raise unsupported(feature, error) from error

        return calling

    return decorate


def unsupported(feature: str, detail: object) -> TorchVersionError:
    """The error for a feature that needs something that this release of PyTorch does not have."""
    return TorchVersionError(
        f"{feature} needs an internal name of PyTorch that torch {torch.__version__} does not have ({detail}). "
        f"freegrad_fx is tested with torch {TESTED[0]} to {TESTED[-1]}: install one of these releases, or a newer "
        f"freegrad_fx."
    )


@functools.cache
def warn_if_untested() -> None:
    """Warn once per process if PyTorch is newer than the newest tested release."""
    if release() > _minor(TESTED[-1]):
        warnings.warn(
            f"torch {torch.__version__} is newer than the releases that freegrad_fx is tested with, {TESTED[0]} to "
            f"{TESTED[-1]}. Compare gradients with those of the untransformed model before you rely on them.",
            FreegradWarning,
            stacklevel=4,
        )


def release() -> tuple[int, int]:
    """The minor release of the installed PyTorch, such as ``(2, 13)``."""
    return _minor(torch.__version__)


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
