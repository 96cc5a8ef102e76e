"""`graph/provenance.py`: whose code a frame is, and where a node comes from."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import pytest
import torch
from torch import fx, nn

import freegrad_fx
from freegrad_fx.graph.provenance import (
    META,
    Origin,
    caller,
    innermost,
    is_users,
    is_users_file,
    origin,
)

TORCH = os.path.dirname(torch.__file__)
PACKAGE = os.path.dirname(freegrad_fx.__file__)
HERE = __file__


def function_in(file: str, code: str) -> Any:
    """A function `f` whose code stands in a file of that name."""
    space: dict[str, Any] = {}
    exec(compile(code, file, "exec"), space)
    return space["f"]


# --- origins ---


def test_the_origin_of_a_node_is_what_its_meta_holds() -> None:
    node = fx.Graph().placeholder("x")
    written = Origin("layer", "model.py:3")
    node.meta["freegrad_fx"] = written
    assert origin(node) is written
    assert META == "freegrad_fx"


@pytest.mark.parametrize("meta", [{}, {"freegrad_fx": None}, {"freegrad_fx": "layer"}])
def test_a_node_without_an_origin_has_an_empty_one(meta: dict[str, Any]) -> None:
    node = fx.Graph().placeholder("x")
    node.meta.update(meta)
    assert origin(node) == Origin(owner="", source="", owner_type=None, parameter=(), calls=None)


def test_an_origin_survives_pickling_and_cannot_be_changed() -> None:
    written = Origin("layer", "model.py:3", nn.ReLU, ("a.weight", "b.weight"), (("relu", 2),))
    assert pickle.loads(pickle.dumps(written)) == written
    with pytest.raises(AttributeError):
        written.owner = "other"  # type: ignore[misc]


# --- whose code it is ---


FILES: dict[str, tuple[Any, bool]] = {
    "torch": (torch.__file__, False),
    "torch.nn": (nn.functional.__file__, False),
    "the package": (freegrad_fx.__file__, False),
    "graph/provenance.py": (sys.modules["freegrad_fx.graph.provenance"].__file__, False),
    "a text": ("<string>", True),
    "the standard input": ("<stdin>", True),
    "a line of the interpreter": ("<python-input-0>", True),
    "generated code": ("<eval_with_key>.3", False),
    "the import system": ("<frozen importlib._bootstrap>", False),
    "this file": (HERE, True),
    "the standard library": (os.__file__, True),
    "a relative path": ("model.py", True),
    "torchvision": (os.path.join(f"{TORCH}vision", "models.py"), True),
    "a name that begins like the package's": (os.path.join(f"{PACKAGE}_x", "net.py"), True),
    "beside the package": (os.path.join(os.path.dirname(PACKAGE), "net.py"), True),
}


@pytest.mark.parametrize(("file", "users"), FILES.values(), ids=FILES)
def test_files_of_the_user(file: str, users: bool) -> None:
    assert is_users_file(file) is users
    # The code is the same for each, and equal: code objects are compared without their files
    assert is_users(function_in(file, "def f(): pass").__code__) is users


# --- caller ---


def call(function: Callable[[], Any]) -> Any:
    return function()


def line_of_this_call() -> int:
    frame: FrameType | None = sys._getframe(1)
    assert frame is not None
    return frame.f_lineno


def test_caller_is_the_line_that_asks() -> None:
    found, line = caller(), line_of_this_call()
    assert found == f"{HERE}:{line}"


@pytest.mark.parametrize(
    "file",
    [os.path.join(TORCH, "nn", "x.py"), os.path.join(PACKAGE, "x.py"), "<eval_with_key>.3"],
    ids=["torch", "the package", "generated code"],
)
def test_caller_looks_past_pytorch_and_the_package(file: str) -> None:
    through = function_in(file, "def f(g):\n    return g()")
    found, line = through(caller), line_of_this_call()
    assert found == f"{HERE}:{line}"
    found, line = through(lambda: through(caller)), line_of_this_call()  # of two, the inner
    assert found == f"{HERE}:{line}"


def test_caller_is_the_innermost_line_of_the_user() -> None:
    through = function_in("model.py", "def f(g):\n\n    return g()")
    assert through(caller) == "model.py:3"


def test_caller_is_empty_where_no_code_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freegrad_fx.graph.provenance.is_users", lambda code: False)
    assert caller() == ""


# --- innermost ---


def traceback_through(*functions: Callable[[Callable[[], Any]], Any]) -> TracebackType | None:
    """The traceback of an error that is raised inside the last function."""

    def run(rest: tuple[Callable[[Callable[[], Any]], Any], ...]) -> Any:
        if not rest:
            return function_in("<eval_with_key>.3", "def f(): raise ValueError")()
        return rest[0](lambda: run(rest[1:]))

    try:
        run(functions)
    except ValueError as error:
        return error.__traceback__
    raise AssertionError


USERS = function_in("model.py", "def f(g):\n\n\n    return g()")
LINEAR = function_in(os.path.join(TORCH, "nn", "modules", "linear.py"), "def f(g):\n    return g()")
OTHER = function_in(os.path.join(TORCH, "overrides.py"), "def f(g):\n    return g()")
OURS = function_in(os.path.join(PACKAGE, "x.py"), "def f(g):\n    return g()")


def without_this_file(traceback: TracebackType | None) -> TracebackType | None:
    """The same without the frames of this file, which is the user's too."""
    if traceback is None:
        return None
    rest = without_this_file(traceback.tb_next)
    if traceback.tb_frame.f_code.co_filename == HERE:
        return rest
    return TracebackType(rest, traceback.tb_frame, traceback.tb_lasti, traceback.tb_lineno)


@pytest.mark.parametrize(
    ("functions", "expected"),
    [
        ((USERS,), "model.py:4"),
        ((USERS, LINEAR, OTHER), "model.py:4"),
        ((LINEAR, USERS, OURS), "model.py:4"),
        ((LINEAR,), f"{os.path.join(TORCH, 'nn', 'modules', 'linear.py')}:2"),
        ((LINEAR, OTHER, OURS), f"{os.path.join(TORCH, 'nn', 'modules', 'linear.py')}:2"),
        ((OTHER, OURS), ""),
        ((), ""),
    ],
    ids=["user", "user, torch", "torch, user", "nn", "nn, torch", "torch", "nothing"],
)
def test_innermost_frame_of_a_traceback(functions: tuple[Any, ...], expected: str) -> None:
    assert innermost(without_this_file(traceback_through(*functions))) == expected


def test_the_innermost_of_several_frames_of_the_user() -> None:
    found = innermost(traceback_through(USERS))
    assert found.startswith(f"{HERE}:")  # the lambda of this file is inside of model.py


def test_innermost_without_a_traceback() -> None:
    assert innermost(None) == ""
