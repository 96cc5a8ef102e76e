"""Operations without a proxy among their arguments, and `isinstance` of proxies."""

from __future__ import annotations

import builtins
import contextlib
import operator
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx.proxy import Proxy
from torch.overrides import TorchFunctionMode

from ..._torch.graphs import grad_mode_setter
from ..._torch.replacing import replaced
from ...graph.aliasing import named_in_place
from ...graph.provenance import caller, is_users
from ...graph.shape_values import known_number
from ...ops.checks import require_tensor
from ..proxies import FlagProxy, RecordingProxy
from .recorder import Recorder, with_proxies

__all__ = ["RecordMode", "answered_isinstance", "recorded_factories"]

is_grad_enabled = (
    torch.is_grad_enabled
)  # a trace replaces the function, and the graph needs the original

_FACTORIES = frozenset(
    {
        torch.arange,
        torch.empty,
        torch.eye,
        torch.full,
        torch.linspace,
        torch.logspace,
        torch.normal,
        torch.ones,
        torch.rand,
        torch.randint,
        torch.randn,
        torch.randperm,
        torch.scalar_tensor,
        torch.tensor,
        torch.zeros,
    }
)


def answered_isinstance(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """Let `isinstance(x, Tensor)` in a forward be True for a proxy. A node of the graph checks this at each call."""
    thread = threading.get_ident()
    tensor = torch.empty(0)
    proxies: dict[type[Any], bool] = {}  # nearly all values are not proxies

    def answering(ask: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
        def answer(value: Any, kinds: Any) -> bool:
            kind = type(value)
            if kind not in proxies:
                proxies[kind] = issubclass(kind, Proxy)
            if not proxies[kind] or threading.get_ident() != thread:
                return ask(value, kinds)
            code = sys._getframe(1).f_code
            if not (is_users(code) or code is torch.is_tensor.__code__):
                return ask(value, kinds)
            if issubclass(kind, FlagProxy):
                return ask(True, kinds)
            if (number := known_number(value.node)) is not None:
                return ask(number, kinds)
            if not any(user.target is require_tensor for user in value.node.users):
                recorder.create_proxy("call_function", require_tensor, (value, caller()), {})
            return ask(tensor, kinds)

        return answer

    return replaced(builtins, "isinstance", answering, asks_for_thread=True)


@contextlib.contextmanager
def recorded_factories(recorder: Recorder) -> Iterator[None]:
    """Record factories such as `torch.rand(x.shape[0])`, which raise an error for a proxy before they dispatch."""

    def recording(factory: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: recorder.create_proxy("call_function", factory, args, kwargs)

    with contextlib.ExitStack() as stack:
        for factory in _FACTORIES:
            stack.enter_context(replaced(torch, factory.__name__, recording))
        yield


# Properties that are computed from a tensor; other properties, and the methods below, only describe it
_PROPERTIES_COMPUTED = frozenset({"data", "T", "mT", "H", "mH", "real", "imag", "grad"})


_METHODS_OF_SHAPE = frozenset(
    {
        *(
            "size",
            "dim",
            "numel",
            "nelement",
            "stride",
            "storage_offset",
            "is_contiguous",
            "__len__",
        ),
        *("is_floating_point", "is_complex", "element_size", "get_device"),
    }
)
_METHODS_ASKED = _METHODS_OF_SHAPE | frozenset(
    {
        "data_ptr",
        "untyped_storage",
        "register_hook",
        "requires_grad_",
        "__hash__",
        "__repr__",
        "__format__",
        "__deepcopy__",
        "__reduce_ex__",
    }
)


def _computes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in _PROPERTIES_COMPUTED
    return name not in _METHODS_ASKED and name != "__set__"


_INPLACE_NAMES = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
) | {"__setitem__"}


class RecordMode(TorchFunctionMode):
    """Records operations without a proxy: factories, changes of the grad mode, and functions of model tensors."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self.previous: list[Proxy] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _FACTORIES:  # imported before the trace: `from torch import rand`
            return self.recorder.create_proxy("call_function", func, args, kwargs or {})
        if func is grad_mode_setter():
            self._record_grad_mode(*args)
            return func(*args)
        name = getattr(func, "__name__", "")
        writes = named_in_place(name) or name in _INPLACE_NAMES
        first = args[0] if args else None
        if writes and isinstance(first, torch.Tensor) and self.recorder.is_held(first):
            raise TypeError(
                "the forward writes into a tensor that is in a list or dict of the model"
            )
        # A parameter that the forward did not read by its name, for example from `self.parameters()`
        traced, traced_kwargs = with_proxies(self.recorder, args, kwargs or {})
        if traced is args:
            return func(*args, **(kwargs or {}))
        if not _computes(func) and (
            self.recorder.describe(traced[0])
            or not (name in _METHODS_OF_SHAPE or name == "__get__")
        ):
            return func(*args, **(kwargs or {}))
        if name == "__get__":
            return getattr(traced[0], func.__self__.__name__)
        if name in _INPLACE_NAMES:  # as an operator of a proxy, which is known to write
            target = getattr(operator, name.strip("_"))
            return self.recorder.create_proxy("call_function", target, traced, {})
        return RecordingProxy.__torch_function__(func, types, traced, traced_kwargs)

    def _record_grad_mode(self, enabled: bool) -> None:
        """Record a change of the grad mode. At its end a `no_grad` block restores the mode of the call."""
        setter = sys._getframe(2)
        inside = setter.f_back
        names = (setter.f_code.co_name, inside.f_code.co_name if inside is not None else "")
        context = setter.f_locals.get("self")
        mode: Any = enabled
        if "__exit__" in names and self.previous:
            mode = self.previous.pop()
        elif names[0] != "__enter__" or not isinstance(context, torch.set_grad_enabled):
            # `set_grad_enabled` sets the mode when it is created and again when it is entered
            self.previous.append(
                self.recorder.create_proxy("call_function", is_grad_enabled, (), {})
            )
        self.recorder.create_proxy("call_function", grad_mode_setter(), (mode,), {})
