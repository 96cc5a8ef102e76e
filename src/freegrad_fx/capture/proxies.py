"""The proxies that represent values while a model is traced."""

from __future__ import annotations

import dis
import inspect
import operator
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor, fx
from torch.fx.proxy import Attribute, Proxy, TraceError

from .._torch.graphs import assertion
from ..graph.provenance import is_users

__all__ = ["IN_PLACE", "FlagProxy", "RecordingProxy", "TensorProxy", "any_proxy"]


# The shape, the `data` and so on: not methods
_PROPERTIES = frozenset(
    name
    for name in dir(Tensor)
    if not name.startswith("_") and inspect.isdatadescriptor(inspect.getattr_static(Tensor, name))
)


class RecordingProxy(Proxy):
    """A proxy that records in-place operators, which FX would replace by out-of-place ones, and assertions.

    A property of a tensor is recorded where it is read. FX would record it where its value is first used, where the
    grad mode or the tensor may have changed.
    """

    def __getattr__(self, name: str) -> Any:
        if name in _PROPERTIES:
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return _RecordingAttribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(Tensor, name):
            raise TraceError(
                f"an assignment to the attribute {name!r} of a tensor cannot be traced"
            )
        super().__setattr__(name, value)

    def __hash__(self) -> int:
        if is_users(sys._getframe(1).f_code):
            tracer: Any = self.tracer
            tracer.note_hash(self)
        return object.__hash__(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __bool__(self) -> bool:
        frame = sys._getframe(1)
        if _asserts(frame):
            message = f"the assertion at {frame.f_code.co_filename}:{frame.f_lineno} fails"
            self.tracer.create_proxy("call_function", assertion(), (self, message), {})
            return True
        return self.tracer.to_bool(self)


def _record_operator(name: str) -> Callable[[Proxy, Any], Proxy]:
    target = getattr(operator, name)

    def record(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


_INPLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_INPLACE_BITS = ("and", "or", "xor", "lshift", "rshift")
for _name in (*_INPLACE, *_INPLACE_BITS):
    setattr(RecordingProxy, f"__i{_name}__", _record_operator(f"i{_name}"))


IN_PLACE = frozenset(getattr(operator, f"i{name}") for name in (*_INPLACE, *_INPLACE_BITS))
"""The targets of the in-place operators, which return their first argument."""


class _RecordingAttribute(RecordingProxy, Attribute):
    """An attribute that is not a property of tensors: a method, or a field of another object."""


def _asserts(frame: FrameType) -> bool:
    """Whether a frame evaluates the condition of an `assert` statement."""
    instructions = list(dis.get_instructions(frame.f_code))
    at = next((i for i, ins in enumerate(instructions) if ins.offset == frame.f_lasti), None)
    if at is not None and instructions[at].opname in ("TO_BOOL", "COMPARE_OP"):
        at += 1  # since Python 3.13 a separate instruction converts to bool before the jump
    if at is None or at >= len(instructions) or "JUMP" not in instructions[at].opname:
        return False
    jump = instructions[at]
    if jump.opname.endswith("IF_TRUE"):
        raising = at + 1
    else:
        raising = next((i for i, ins in enumerate(instructions) if ins.offset == jump.argval), -1)
    return 0 <= raising < len(instructions) and (
        instructions[raising].opname == "LOAD_ASSERTION_ERROR"
    )


def _on_tensor(name: str) -> Callable[..., Any]:
    def call(self: TensorProxy, *args: Any) -> Any:
        tracer: Any = self.tracer
        tracer.describe(self)
        return getattr(self.tensor, name)(*args)

    return call


def _read_of_tensor(name: str) -> Callable[[TensorProxy], Any]:
    def read(self: TensorProxy) -> Any:
        tracer: Any = self.tracer
        tracer.describe(self)
        return getattr(self.tensor, name)

    return read


class TensorProxy(RecordingProxy):
    """A proxy for a parameter or buffer. Its shape is known, so it is not a proxy; the tracer notes who asks for it."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.tensor = tensor


for _name in ("shape", "ndim"):
    setattr(TensorProxy, _name, property(_read_of_tensor(_name)))
for _name in ("size", "dim", "numel", "__len__"):
    setattr(TensorProxy, _name, _on_tensor(_name))


class FlagProxy(RecordingProxy):
    """A proxy for a `training` flag. Comparing or hashing it counts as a branch and uses the assumed value."""

    def __eq__(self, other: object) -> bool:
        return bool(self) == other

    def __ne__(self, other: object) -> bool:
        return bool(self) != other

    def __hash__(self) -> int:
        return hash(bool(self))

    def __int__(self) -> int:
        return int(bool(self))

    __index__ = __int__


def any_proxy(*values: Any) -> bool:
    """Whether one of some values is a proxy or contains one."""
    found = False

    def look(value: Any) -> Any:
        nonlocal found
        found = found or isinstance(value, Proxy)
        return value

    fx.node.map_aggregate(values, look)
    return found
