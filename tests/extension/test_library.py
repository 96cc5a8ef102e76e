"""How the library of the C++ extension is built, found and loaded, without a compiler."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

import freegrad_fx as fg
from freegrad_fx.extension import library


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a new process whose cache of extensions is empty."""
    for name, value in {"module": None, "looked": False, "off": False}.items():
        monkeypatch.setattr(library._Loaded, name, value)
    monkeypatch.setattr(library._Loaded, "status", library._Loaded.status)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.delenv(library.VARIABLE, raising=False)
    library._library.cache_clear()
    yield
    library._library.cache_clear()


def acts() -> bool:
    x = torch.randn(4, requires_grad=True)
    gm = fg.transform(torch.nn.ReLU(), {"relu": fg.rules.scale(s=3.0)})
    return torch.equal(torch.autograd.grad(gm(x).sum(), x)[0], torch.full((4,), 3.0))


def test_it_is_not_built_unasked(tmp_path: Path) -> None:
    assert acts()
    status = fg.extension.status()
    assert not status.active
    assert str(status).startswith("not in use: it has not been built. Build it with")
    assert status.library is not None
    assert status.library.is_relative_to(tmp_path)
    words = str(status.library)
    assert all(part in words for part in (fg.__version__, torch.__version__, "cpython-3"))
    assert [*tmp_path.iterdir()] == []


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "off")
    assert acts()
    assert (
        str(fg.extension.status()) == "not in use: it is switched off by FREEGRAD_FX_EXTENSION=off"
    )


def test_a_wrong_value_of_the_variable_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.VARIABLE, "yes")
    with pytest.warns(
        fg.FreegradWarning, match=r"FREEGRAD_FX_EXTENSION='yes' is none of its values"
    ):
        assert acts()
    assert acts()  # one warning


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_build_that_fails_is_one_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by_variable: bool
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError(
            "Error building extension\n[1/2] c++ node.cpp\nnode.cpp:1: error: no luck\n"
        )

    monkeypatch.setattr(library, "compile_extension", fail)
    if by_variable:
        monkeypatch.setenv(library.VARIABLE, "build")
    with pytest.warns(
        fg.FreegradWarning, match=r"could not be built \(RuntimeError: node.cpp:1: error: no luck"
    ) as seen:
        assert acts() if by_variable else not fg.extension.build().active
    assert len(seen) == 1
    assert acts()
    assert "Install a C++ compiler and ninja" in fg.extension.status().reason
    assert not [*tmp_path.rglob("*node*")]


def test_ninja_is_found_beside_this_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As pip installs it, in an environment that is not activated."""
    seen = []

    def load(*_: Any, build_directory: str, **__: Any) -> None:
        seen.append(os.environ["PATH"].split(os.pathsep))
        Path(build_directory, f"{library._NAME}.so").touch()

    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    library.compile_extension(library._NAME, library._SOURCE, tmp_path)
    assert seen == [["/usr/bin", sysconfig.get_path("scripts")]]
    assert os.environ["PATH"] == "/usr/bin"


def test_a_library_that_does_not_load_is_one_warning(tmp_path: Path) -> None:
    file = library._library()
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no library")
    with pytest.warns(fg.FreegradWarning, match=r"could not be loaded \(ImportError.*force=True"):
        assert acts()
    assert not fg.extension.status().active
