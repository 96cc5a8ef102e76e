"""Questions of an exported forward about the dtype and the device of tensors: kept in the graph, or checked by it."""

from __future__ import annotations

import ast
import contextlib
import functools
import linecache
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx

from ..._torch import exporting
from ..._torch.replacing import Make, all_replaced
from ...graph.provenance import is_library_code
from ...ops.checks import require_metadata

__all__ = ["keep_checks", "noted_metadata"]


class _DtypeOf:
    """Stands for the dtype of a tensor where the forward only converts other tensors to it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def noted_metadata(converts: bool = True) -> Iterator[None]:
    """Record which dtypes and devices of tensors a forward asks for while it is exported.

    ``x.to(y.dtype)`` becomes an operation that reads the dtype at each call. For other questions, a check is recorded
    that the answer is still the same. The dtype and device of the examples are otherwise not part of the graph.

    Args:
        converts: Whether ``x.to(y.dtype)`` is recorded as such an operation, and not checked.
    """

    def asking(name: str) -> Callable[[Any], Any]:
        def make(attribute: Any) -> property:
            def read(tensor: Tensor) -> Any:
                frame = sys._getframe(2)
                if is_library_code(frame.f_code):
                    return attribute.__get__(tensor)
                if converts and name == "dtype" and _only_converts(frame):
                    return _DtypeOf(tensor)
                answer = attribute.__get__(tensor)
                _check(tensor, device=name != "dtype")
                return answer

            return property(read)

        return make

    def asking_method(method: Callable[..., Any]) -> Callable[..., Any]:
        def ask(tensor: Any, *rest: Any, **kwargs: Any) -> Any:
            if not is_library_code(sys._getframe(2).f_code) and exporting.is_fake(tensor):
                _check(tensor)
            return method(tensor, *rest, **kwargs)

        return ask

    traced = exporting.fake_tensor()
    with all_replaced(
        [
            *((traced, name, asking(name)) for name in ("dtype", "device", "is_cuda")),
            *((traced, name, asking_method) for name in ("is_floating_point", "is_complex")),
            (torch, "is_floating_point", asking_method),
            *_conversions_recorded(),
        ]
    ):
        yield


def _check(tensor: Tensor, device: bool = False) -> None:
    if device:
        exporting.assert_metadata(tensor, device=tensor.device)
    else:
        exporting.assert_metadata(tensor, dtype=tensor.dtype)


def _conversions_recorded() -> Iterator[tuple[Any, str, Make]]:
    """Replacements of the methods that convert a tensor, and return the tensor itself if there is nothing to do."""
    inside = False

    def once(convert: Callable[..., Any]) -> Make:
        def make(method: Callable[..., Any]) -> Callable[..., Any]:
            def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
                nonlocal inside
                if inside or not exporting.is_fake(tensor):
                    given = args[0] if args else kwargs.get("dtype")
                    if isinstance(given, _DtypeOf):
                        _check(given.tensor)
                        return method(tensor, given.tensor.dtype)
                    return method(tensor, *args, **kwargs)
                inside = True  # PyTorch calls the method again, from each mode that is active
                try:
                    # The tracer would take the input of a conversion that does nothing for its result
                    return convert(method, exporting.alias(tensor), *args, **kwargs)
                finally:
                    inside = False

            return run

        return make

    def plainly(method: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return method(tensor, *args, **kwargs)

    def to_cpu(method: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return method(tensor, *args, **kwargs)
        return exporting.moved_to(tensor, torch.device("cpu"))

    yield Tensor, "to", once(_converted)
    yield Tensor, "cpu", once(to_cpu)
    for name in _CONVERSIONS:
        yield Tensor, name, once(plainly)


_CONVERSIONS = (
    *("float", "double", "half", "bfloat16", "int", "long", "short", "char", "byte", "bool"),
    *("type_as", "type"),
)


def _converted(to: Callable[..., Any], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Tensor.to`, recorded with neither the dtype of the example nor the one that a `_DtypeOf` stands for."""
    given = args[0] if args else kwargs.get("dtype")
    if isinstance(given, _DtypeOf):
        if given.tensor.device == tensor.device:
            return tensor.type_as(given.tensor)
        _check(given.tensor)
        return to(tensor, given.tensor.dtype)
    if isinstance(given, Tensor) and len(args) == 1 and not kwargs:
        return tensor.type_as(given)
    place = args[0] if args else kwargs.get("device")
    if len(args) + len(kwargs) == 1 and isinstance(place, str | torch.device | int):
        return exporting.moved_to(tensor, torch.device(place))
    return to(tensor, *args, **kwargs)


def keep_checks(graph: fx.Graph) -> None:
    """Remove the assertions that export wrote for the examples, and write those of `noted_metadata` as checks."""
    seen: set[tuple[fx.Node, str]] = set()
    for node in list(graph.nodes):
        if node.target is not exporting.metadata_assertion():
            continue
        x, given = exporting.asserted_metadata(node)
        # Export always gives the layout
        for name, value in given.items() if "layout" not in given else ():
            if (x, name) not in seen:
                seen.add((x, name))
                with graph.inserting_before(node):
                    check = graph.call_function(require_metadata, (x, name, value))
                check.meta = dict(node.meta)
        graph.erase_node(node)
    for node in list(graph.nodes):
        if node.target is exporting.alias_operation() and all(
            map(exporting.is_conversion, node.users)
        ):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


# --- what the code does with a dtype ---


def _only_converts(frame: FrameType) -> bool:
    """Whether a frame is reading a dtype that it uses only as the argument of `to`."""
    return (frame.f_code.co_filename, *_position(frame)) in _conversions(frame.f_code)


def _position(frame: FrameType) -> tuple[int | None, ...]:
    positions = list(frame.f_code.co_positions())
    line, end_line, column, end_column = positions[frame.f_lasti // 2]
    return line, column, end_line, end_column


@functools.lru_cache(maxsize=1024)
def _conversions(code: CodeType) -> frozenset[tuple[Any, ...]]:
    """The file and position of each ``y.dtype`` in a function that is only used in ``x.to(y.dtype)``."""
    try:
        module = ast.parse("".join(linecache.getlines(code.co_filename)))
    except (SyntaxError, ValueError):
        return frozenset()
    functions = [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef)
        and node.name == code.co_name
        and min([node.lineno, *(d.lineno for d in node.decorator_list)]) == code.co_firstlineno
    ]
    return frozenset(
        (code.co_filename, read.lineno, read.col_offset, read.end_lineno, read.end_col_offset)
        for function in functions
        for read in _converting_reads(function)
    )


def _converting_reads(function: ast.FunctionDef) -> Iterator[ast.expr]:
    arguments = {
        id(argument)
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "to"
        and len(call.args) + len(call.keywords) == 1
        for argument in (*call.args, *(k.value for k in call.keywords if k.arg == "dtype"))
    }
    names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr == "dtype" and id(node) in arguments:
            yield node
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Attribute)
            and node.value.attr == "dtype"
            and len(node.targets) == 1
            and isinstance(target := node.targets[0], ast.Name)
        ):
            uses = [name for name in names if name.id == target.id and name is not target]
            if all(isinstance(use.ctx, ast.Load) and id(use) in arguments for use in uses):
                yield node.value
