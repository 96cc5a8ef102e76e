"""Builds the library of the extension, finds it, and says what is in use."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import sys
import tempfile
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._torch.extensions import compile_extension, extension_folder, load_extension
from ..errors import FreegradWarning

__all__ = ["VARIABLE", "Status", "build", "current", "status", "switch"]

VARIABLE = "FREEGRAD_FX_EXTENSION"
"""The environment variable: ``build`` builds the extension when it is first needed, ``off`` does not load it."""

_NAME = "freegrad_fx_node"
_SOURCE = Path(__file__).with_name("node.cpp")
_BUILD = "Build it with `freegrad-fx build`, or with freegrad_fx.extension.build()."


@dataclass(frozen=True)
class Status:
    """What is in use.

    Attributes:
        active: Whether the extension is in use.
        reason: Why, or why not.
        library: The file in use, or where the built file would be; None if it is not known.
    """

    active: bool
    reason: str
    library: Path | None

    def __str__(self) -> str:
        return f"{'in use' if self.active else 'not in use'}: {self.reason}"


class _Loaded:
    """The module in use, if any, and why."""

    module: Any = None
    looked = False
    off = False
    status = Status(False, "it has not been looked for", None)


_lock = threading.RLock()


def current() -> Any:
    """The module of the extension; None if it is not in use. The first call loads it."""
    if not _Loaded.looked:
        with _lock:
            if not _Loaded.looked:
                _look()
    return None if _Loaded.off else _Loaded.module


def switch(*, on: bool) -> None:
    """Use a loaded extension, or do not, in all threads from now on. For comparisons of both ways.

    The generated code of a model keeps what was in use when it was transformed.
    """
    _Loaded.off = not on


def status() -> Status:
    """Say whether the C++ extension is in use, and why.

    Returns:
        The status. Printed, it is one sentence.

    Example:
        >>> import freegrad_fx as fg
        >>> print(fg.extension.status())    # doctest: +SKIP
        not in use: it has not been built. Build it with `freegrad-fx build`, or with freegrad_fx.extension.build().
    """
    current()
    return _Loaded.status


def build(*, force: bool = False) -> Status:
    """Build the C++ extension for this PyTorch and Python, and use it from now on, in this and in later processes.

    This takes about a minute, and needs a C++ compiler and ninja, which the extra ``extension`` installs. The library
    is kept in PyTorch's cache of extensions: in the folder that ``TORCH_EXTENSIONS_DIR`` names, if it is set. If the
    build fails, a `FreegradWarning` says why, and everything works as without the extension. Models that were
    transformed before use the extension in part: transform them again.

    Args:
        force: True to build it again if it is there.

    Returns:
        What is in use afterwards.
    """
    with _lock:
        if _Loaded.module is None or force:
            _look(build=True, force=force)
    return _Loaded.status


def _look(build: bool = False, force: bool = False) -> None:
    """Load the library, after building it if that is asked for, and note what happened."""
    _Loaded.looked = True
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "build", "off"):
        _fail(
            f"{VARIABLE}={wanted!r} is none of its values: build, off. Correct or unset it.", None
        )
        return
    if wanted == "off" and not build:
        _Loaded.status = Status(False, f"it is switched off by {VARIABLE}=off", None)
        return
    library: Path | None = None
    doing = "found"
    try:
        library = _library()
        doing = "built"
        if force or not library.exists():
            if not (build or wanted == "build"):
                _Loaded.status = Status(False, f"it has not been built. {_BUILD}", library)
                return
            _build(library)
        doing = "loaded"
        if _Loaded.module is None:  # a process can load it once
            _Loaded.module = load_extension(_NAME, library)
    except Exception as error:
        reason = f"{type(error).__name__}: {_line(error)}"
        _fail(
            f"it could not be {doing} ({reason}). Everything works without it. {_REMEDY[doing]}",
            library,
        )
        return
    _Loaded.status = Status(True, f"it was built at {library}", library)


_REMEDY = {
    "found": f"Set {VARIABLE}=off to stop this warning.",
    "built": "Install a C++ compiler and ninja (pip install ninja), and build it again.",
    "loaded": "Build it again with freegrad_fx.extension.build(force=True).",
}


def _fail(reason: str, library: Path | None) -> None:
    _Loaded.status = Status(False, reason, library)
    warnings.warn(f"the C++ extension is not in use: {reason}", FreegradWarning, stacklevel=4)


def _line(error: Exception) -> str:
    """The line of an error that says most: that of the compiler, if there is one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else "")


@functools.cache
def _library() -> Path:
    """Where the library for this PyTorch, Python, processor and source is kept."""
    version = vars(sys.modules[__name__.partition(".")[0]])["__version__"]
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    suffix = ".pyd" if os.name == "nt" else ".so"
    folder = extension_folder("freegrad_fx", f"{version}-{digest}")
    return folder / f"{_NAME}{suffix}"


def _build(library: Path) -> None:
    """Build the library in a folder of its own, and move it to its place, where another process may put it too."""
    library.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="build-", dir=library.parent))
    try:
        os.replace(compile_extension(_NAME, _SOURCE, folder), library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
