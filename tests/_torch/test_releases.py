"""A private name that a release does not have is an error of the feature that needs it, and of nothing else."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

import freegrad_fx as fg
from freegrad_fx._torch import releases
from freegrad_fx._torch.releases import lookup, private, uses_private_names


def test_a_missing_name_says_what_needs_it_and_what_was_tested() -> None:
    with pytest.raises(fg.TorchVersionError) as caught:
        lookup("torch._C._nothing", "knowing everything")
    text = str(caught.value)
    assert "knowing everything needs an internal name" in text
    assert "_nothing" in text
    assert torch.__version__ in text
    assert "2.12 to 2.15" in text


@pytest.mark.parametrize("name", ["torch.nowhere.nothing", "torch._C.Nothing", "nowhere.nothing"])
def test_a_stand_in_raises_when_it_is_used_and_not_before(name: str) -> None:
    missing = private(name, "knowing everything")
    with pytest.raises(fg.TorchVersionError, match="knowing everything"):
        missing(1)
    with pytest.raises(fg.TorchVersionError, match="knowing everything"):
        isinstance(1, missing)

    with pytest.raises(fg.TorchVersionError, match="knowing everything"):
        missing.anything  # noqa: B018
    with pytest.raises(fg.TorchVersionError, match="knowing everything"):
        issubclass(int, missing)

    class Derived(missing):  # type: ignore[misc]
        pass

    with pytest.raises(fg.TorchVersionError, match="knowing everything"):
        Derived()


def test_an_attribute_that_a_function_does_not_find_is_the_same_error() -> None:
    @uses_private_names("knowing everything")
    def ask(tensor: torch.Tensor) -> object:
        return tensor._nothing

    with pytest.raises(fg.TorchVersionError, match="knowing everything"):
        ask(torch.ones(1))


def test_other_errors_are_handed_on() -> None:
    @uses_private_names("knowing everything")
    def divide(x: int) -> float:
        return 1 / x

    assert divide(1) == 1
    with pytest.raises(ZeroDivisionError):
        divide(0)


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_importing_needs_no_private_name() -> None:
    code = """
import pkgutil, torch
def nothing(name):
    raise ImportError(name)
pkgutil.resolve_name = nothing
import freegrad_fx as fg
gm = None
try:
    fg.transform(torch.nn.Sequential(torch.nn.ReLU()), "straight_through")
except fg.TorchVersionError as error:
    assert "is tested with torch 2.12 to 2.15" in str(error), error
    print("raised when it was used")
"""
    done = in_a_process(code)
    assert done.stdout == "raised when it was used\n", done.stderr


@pytest.mark.slow  # tests/project/test_imports.py asks the same of the package itself
def test_importing_imports_no_compiler() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import freegrad_fx
heavy = ("sympy", "torch._dynamo", "torch._inductor", "torch.export", "torch._functorch")
print([m for m in sys.modules if m.startswith(heavy) and m not in before])
"""
    # torch.export alone is small, and some releases of torch import it with torch.fx
    found = in_a_process(code)
    loaded = set(eval(found.stdout)) - {"torch.export"}
    assert {
        m for m in loaded if m.startswith(("sympy", "torch._dynamo", "torch._inductor"))
    } == set()


@pytest.fixture
def _warned_of_nothing_yet() -> None:
    releases.warn_if_untested.cache_clear()


@pytest.mark.usefixtures("_warned_of_nothing_yet")
def test_a_newer_release_warns_once_at_the_first_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.16.0+cpu")
    model = torch.nn.Sequential(torch.nn.ReLU())
    with pytest.warns(
        fg.FreegradWarning, match=r"torch 2\.16\.0\+cpu is newer .* 2\.12 to 2\.15"
    ) as seen:
        fg.transform(model, "straight_through")
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fg.transform(model, "straight_through")
        fg.explain(model)
        fg.compile(model, "straight_through")


@pytest.mark.usefixtures("_warned_of_nothing_yet")
def test_a_backend_warns_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "3.0.0")
    with pytest.warns(fg.FreegradWarning, match="is newer"):
        fg.backend("straight_through")


@pytest.mark.parametrize("version", ["2.15.3", "2.15.0+cu130", "2.13.0a0+git1234", "2.9.1"])
@pytest.mark.usefixtures("_warned_of_nothing_yet")
def test_a_tested_or_older_release_does_not_warn(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fg.transform(torch.nn.Sequential(torch.nn.ReLU()), "straight_through")
