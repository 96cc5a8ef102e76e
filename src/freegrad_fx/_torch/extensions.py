"""Extensions in C++: where PyTorch keeps them, how they are compiled, and how one is loaded."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .releases import lookup

__all__ = ["compile_extension", "extension_folder", "load_extension"]

_FEATURE = "building the C++ extension"


def extension_folder(*names: str) -> Path:
    """A folder in PyTorch's cache of extensions, for this PyTorch, Python and processor.

    Args:
        *names: What the folder is for.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        root = lookup("torch._appdirs.user_cache_dir", _FEATURE)(appname="torch_extensions")
    capability = torch.backends.cpu.get_cpu_capability().replace(" ", "").lower()
    of_release = f"torch{torch.__version__}-{sys.implementation.cache_tag}"
    return Path(root, *names, f"{of_release}-{platform.machine()}-{capability}")


def compile_extension(name: str, source: Path, folder: Path) -> Path:
    """Compile an extension.

    Args:
        name: The name of its module.
        source: Its source.
        folder: Where the files are written.

    Returns:
        The library.

    Raises:
        Exception: There is no compiler, or it fails. PyTorch raises errors of many classes.
    """
    from torch.utils import cpp_extension

    with _own_programs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about compilers that were not tested with PyTorch
        cpp_extension.load(
            name,
            [str(source)],
            extra_cflags=_flags(),
            build_directory=str(folder),
            with_cuda=False,
            is_python_module=False,
        )
    # PyTorch adds a number to the name of an extension that it builds again
    return next(file for file in folder.glob(f"{name}*") if file.suffix in (".so", ".pyd"))


@contextlib.contextmanager
def _own_programs() -> Iterator[None]:
    """Let PyTorch find ninja where pip installs it, also if the environment of this Python is not activated."""
    path = os.environ.get("PATH")
    os.environ["PATH"] = os.pathsep.join(filter(None, [path, sysconfig.get_path("scripts")]))
    try:
        yield
    finally:
        if path is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = path


def _flags() -> list[str]:
    if sys.platform == "win32":
        return ["/O2", "/fp:precise"]
    # No fused multiplication and addition, which rounds once where PyTorch's kernels round twice
    flags = ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    wide = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return [*flags, "-mavx2"] if wide and platform.machine() in ("x86_64", "AMD64") else flags


def load_extension(name: str, library: Path) -> Any:
    """Import a module from a library.

    Args:
        name: The name of the module.
        library: The library.

    Raises:
        ImportError: It was built for another PyTorch or Python.
    """
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
