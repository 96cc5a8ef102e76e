"""What `freegrad-fx doctor` reports: versions, and what is available on this machine."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

import torch

from .._torch.releases import TESTED, release
from ..extension import status as extension_status

__all__ = ["as_rows", "examine", "version_of"]

# What features, examples and the documentation use beside the package
_OPTIONAL = (
    "torchvision", "timm", "transformers", "snntorch", "spikingjelly", "norse", "brevitas", "captum", "zennit",
    "matplotlib", "typer", "rich", "pydot", "onnx", "triton",
)  # fmt: skip


def examine() -> dict[str, Any]:
    """Return versions, and what can be used on this machine, as plain data."""
    return {
        "freegrad_fx": version_of("freegrad_fx"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "tested": {"torch": list(TESTED), "python": _pythons()},
        "torch_is_tested": ".".join(map(str, release())) in TESTED,
        "cuda": {
            "built_for": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "compiler": _compiler(),
        "extension": str(extension_status()),
        "threads": torch.get_num_threads(),
        "packages": {name: version_of(name) for name in _OPTIONAL},
        "faults": _faults(),
    }


def _pythons() -> list[str]:
    """The releases of Python in the metadata of the package; none if it is not installed."""
    try:
        found = importlib.metadata.metadata("freegrad_fx").get_all("Classifier") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [text.rpartition(" ")[2] for text in found if "Python :: 3." in text]


def _compiler() -> str | None:
    """The path of the C++ compiler that the inductor back end would call."""
    names = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    return next(filter(None, map(shutil.which, names)), None)


def version_of(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _faults() -> dict[str, str]:
    """Packages that are installed and cannot be imported, each with the error."""
    found = {}
    # The one whose compiled parts have to belong to the installed PyTorch
    if version_of("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except Exception as error:
            found["torchvision"] = f"{type(error).__name__}: {error}"
    return found


def as_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Lay out what `examine` returned as a table."""
    tested, cuda, faults = found["tested"], found["cuda"], found["faults"]
    note = "" if found["torch_is_tested"] else ", which is not tested"
    devices = ", ".join(cuda["devices"]) or "no device"
    rows = [
        ("what", "found"),
        ("freegrad_fx", found["freegrad_fx"] or "not installed"),
        ("Python", f"{found['python']} ({sys.executable})"),
        ("platform", found["platform"]),
        ("torch", f"{found['torch']}{note}"),
        (
            "tested with",
            f"torch {', '.join(tested['torch'])}; Python {', '.join(tested['python'])}",
        ),
        ("CUDA", f"torch is built for {cuda['built_for'] or 'the CPU alone'}; {devices}"),
        (
            "C++ compiler",
            found["compiler"] or "not found; the inductor back end needs one on a CPU",
        ),
        ("extension", found["extension"]),
        ("threads", str(found["threads"])),
    ]
    for name, version in found["packages"].items():
        fault = f", does not load: {faults[name]}" if name in faults else ""
        rows.append((name, f"{version or 'not installed'}{fault}"))
    return rows
