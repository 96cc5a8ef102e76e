"""Runs a script in several processes that `torchrun` starts, and reads what each of them found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock  # which torch itself needs

__all__ = ["WORLD", "found_in", "gloo", "torchrun"]

WORLD = 2

gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this build of torch has no gloo",
)


def found_in(
    tmp_path_factory: pytest.TempPathFactory, script: str, *which: str
) -> list[dict[str, Any]]:
    """What each process found; the workers of pytest-xdist wait for the first of them, and share it.

    Args:
        tmp_path_factory: The fixture of pytest.
        script: The path of the script. It writes ``FOLDER/RANK.pt``.
        which: Its arguments behind the folder.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all of them have
    folder /= "-".join(("processes", Path(script).stem, *which))
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            folder.mkdir()
            printed = torchrun(script, str(folder), *which)
            assert (folder / f"{WORLD - 1}.pt").exists(), printed
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def torchrun(script: str, *arguments: str) -> str:
    """Run a script in two processes, and return what they print."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(
        (*command, f"--nproc-per-node={WORLD}", script, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
