"""Common settings of the pytest-benchmark suites: the option `--quick`, one thread, and skipped benchmarks."""

import os
import shutil

import pytest
import torch

from ._cases import NATIVE, choose


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="benchmarks: small inputs, one round each, and of what is compiled the MLP alone",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick"):
        # before pytest-benchmark reads its options
        config.option.benchmark_min_rounds = 1
        config.option.benchmark_max_time = 0.0
        config.option.benchmark_warmup = False


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether the run is short, and its results are meaningless."""
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def compiler() -> None:
    """Skip benchmarks that need a C++ compiler if there is none."""
    compilers = [os.environ.get("CXX", "c++"), "g++", "clang++", "cl"]
    if not any(shutil.which(compiler) for compiler in compilers):
        pytest.skip("torch.compile needs a C++ compiler; none is on the PATH")
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    choose(NATIVE)  # without the extension, if a candidate does not say otherwise
