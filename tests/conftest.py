"""What every test starts from: torchvision, a fixed seed, a fair share of the cores."""

import contextlib
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

# On the path through pytest's `pythonpath`. After it a test may import torchvision as a user does.
import _torchvision  # noqa: F401
from freegrad_fx import context
from freegrad_fx._torch.releases import warn_if_untested
from freegrad_fx.core import rule as rule_module
from freegrad_fx.extension import library

# Times on a shared machine say nothing about an example, so no deadline. In CI the examples are the
# same at every run: a red run is then the fault of the change under test.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# Of a release that is newer than those supported the package warns once: here, and in no test.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    warn_if_untested()

# What is built on this machine must not decide what is tested: FREEGRAD_FX_EXTENSION=build runs all tests with the C++
# extension, and without it only those that ask for the fixture `extension` do
os.environ.setdefault(library.VARIABLE, "off")

# Kernels this small are slower on several threads, and much slower on cores that other workers use.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    fuzz = parser.getgroup("fuzz", "random programs (tests/fuzz)")
    fuzz.addoption("--fuzz", type=int, default=0, metavar="N", help="try N more random programs")
    fuzz.addoption("--fuzz-seed", type=int, default=1000, metavar="S", help="the first seed")
    fuzz.addoption(
        "--fuzz-door",
        choices=("symbolic", "export", "compile", "backend", "use"),
        help="only by this way in; without it, all share the N cases",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _refuse_addresses(items)
    _skip_without_compiler(items)
    _leave_most_to_the_slow_tests(items)
    _leave_the_rest_to_the_exhaustive_tests(items)


def _leave_most_to_the_slow_tests(items: list[pytest.Item]) -> None:
    """Of a test with `sampled(n)`, keep one set of parameters in n among the fast tests."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None:
            function = item.nodeid.partition("[")[0]
            if seen[function] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[function] += 1


def _leave_the_rest_to_the_exhaustive_tests(items: list[pytest.Item]) -> None:
    """Of a test with `thinned(n)`, keep one slow set of parameters in n; the others are exhaustive too."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("thinned")
        if mark is not None and item.get_closest_marker("slow"):
            function = item.nodeid.partition("[")[0]
            if seen[function] % mark.args[0]:
                item.add_marker(pytest.mark.exhaustive)
            seen[function] += 1


def _refuse_addresses(items: list[pytest.Item]) -> None:
    """Stop at a parameter whose id is its address: pytest-xdist's workers would not agree on it."""
    addressed = [item.nodeid for item in items if re.search(r" at 0x[0-9a-f]+>", item.nodeid)]
    if addressed:
        raise pytest.UsageError(
            f"{len(addressed)} test ids differ from process to process, for instance "
            f"{addressed[0]!r}. Name the parameters: ids=lambda f: f.__name__, or pytest.param(..., id=...)."
        )


def _has_compiler() -> bool:
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"]
    return any(shutil.which(compiler) for compiler in compilers)


def _skip_without_compiler(items: list[pytest.Item]) -> None:
    if _has_compiler():
        return
    no_compiler = pytest.mark.skip(reason="inductor needs a C++ compiler; none is on the PATH")
    for item in items:
        if item.get_closest_marker("inductor"):
            item.add_marker(no_compiler)


@pytest.fixture(autouse=True)
def _reports_are_as_wide_as_they_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """Printed plans fit the terminal, and tests are run in all kinds of them."""
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture(autouse=True)
def _rules_of_a_test_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule_module, "_registry", dict(rule_module._registry))


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> Iterator[None]:
    """Give each test the same random numbers, and no compiled code of the test before it."""
    torch.manual_seed(0)
    yield
    # Dynamo counts recompilations per code object: without this, the order of tests would matter.
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _no_sites_were_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where some were, a block cannot know that it has no site, and does not warn of it."""
    monkeypatch.setattr(context, "_compiled", [])


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One worker builds, and the others wait for it."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(Path(tempfile.gettempdir(), "freegrad_fx_extension.lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def extension() -> Iterator[None]:
    """The C++ extension is in use. Building it takes a minute, on each machine once."""
    programs = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])
    if not (_has_compiler() and shutil.which("ninja", path=programs)):
        pytest.skip(
            "the C++ extension needs a C++ compiler and ninja; one of them is not installed"
        )
    before = library.current() is not None
    with _alone():
        assert library.build().active, library.status()
    library.switch(on=True)
    yield
    library.switch(on=before)


@pytest.fixture
def non_maximum_suppression(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torchvision's own kernel does not load beside a CPU build of torch."""
    import torchvision

    def nms(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
        left, kept = scores.argsort(descending=True), []
        while left.numel():
            kept.append(left[0])
            overlap = torchvision.ops.box_iou(boxes[left[:1]], boxes[left[1:]])[0]
            left = left[1:][overlap <= threshold]
        return torch.stack(kept) if kept else left

    if torchvision.extension._has_ops():
        yield
        return
    library = torch.library.Library("torchvision", "IMPL")
    library.impl("nms", nms, "CPU")
    monkeypatch.setattr(torchvision.extension, "_has_ops", lambda: True)
    yield
    library._destroy()


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    # where it is installed beside another build of torch it does not load, and nobody needs it here
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    return pytest.importorskip("transformers")
