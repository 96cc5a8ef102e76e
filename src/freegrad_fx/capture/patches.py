"""What is patched in PyTorch while a model is traced, so that nothing of the forward is run once and forgotten.

Each patch holds for the thread that traces; other threads find what they always find.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch
import torch._export.passes.lift_constants_pass as lift_constants
from torch import fx, nn
from torch.fx.proxy import Proxy
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..aliasing import named_in_place
from ..context import Block
from ..errors import CaptureError
from ..nodes import attribute
from ..ops import apply_function, function_key, require_tensor
from ..provenance import caller, is_users
from .copying import is_python_state
from .merge import FlagRead
from .proxies import FlagProxy, RecordingProxy, any_proxy

__all__ = [
    "RandomState",
    "Recorder",
    "noted_assignments",
    "noted_flags",
    "patched",
    "refused_constants",
    "refused_contexts",
    "refused_functions",
    "refused_questions",
]


class Recorder(Protocol):
    """What the patches ask of a tracer."""

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        """Record a node."""

    def training_flag(self, module: nn.Module) -> Any:
        """The proxy of a module's flag; None where the module is not traced."""

    def known_tensor(self, tensor: torch.Tensor) -> Proxy | None:
        """The proxy of a parameter, buffer or tensor attribute of the model; None for other tensors."""

    def is_held(self, tensor: torch.Tensor) -> bool:
        """Whether a list or dict of the model holds a tensor."""

    def assign(self, module: nn.Module, name: str, value: Any) -> bool:
        """Record an assignment of a proxy to an attribute; False where it is to be carried out."""


@contextlib.contextmanager
def patched(recorder: Recorder) -> Iterator[None]:
    """Everything below, for the time of a trace."""
    with (
        _training(recorder),
        _assignments(recorder),
        _functions(recorder),
        refused_contexts(),
        _isinstance(recorder),
        refused_questions(),
        _factories(recorder),
        _RecordMode(recorder),
    ):
        yield


@contextlib.contextmanager
def _answering_training(answer: Callable[[nn.Module, FrameType], Any]) -> Iterator[None]:
    """Ask `answer` when `module.training` is read; what it answers with None is read as ever.

    The flag is an entry of the instance's ``__dict__``; a property on the class goes before it.
    """

    def read(module: nn.Module) -> Any:
        if (flag := answer(module, sys._getframe(1))) is not None:
            return flag
        try:
            return module.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None

    def write(module: nn.Module, value: Any) -> None:
        module.__dict__["training"] = value

    nn.Module.training = property(read, write)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.training


def _training(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """Reading `module.training` gives a proxy of the flag."""
    thread = threading.get_ident()

    def answer(module: nn.Module, _: FrameType) -> Any:
        return recorder.training_flag(module) if threading.get_ident() == thread else None

    return _answering_training(answer)


@contextlib.contextmanager
def _assignments(recorder: Recorder) -> Iterator[None]:
    """`self.name = value` with a traced value becomes part of the graph."""
    thread = threading.get_ident()
    original = nn.Module.__setattr__

    @functools.wraps(original)
    def assign(module: nn.Module, name: str, value: Any) -> None:
        traced = threading.get_ident() == thread and any_proxy(value)
        if not (traced and recorder.assign(module, name, value)):
            original(module, name, value)

    nn.Module.__setattr__ = assign  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]


_apply = torch.autograd.Function.__dict__["apply"].__func__
_unwrap = torch._functorch.utils.unwrap_dead_wrappers


@contextlib.contextmanager
def _replaced_apply(
    apply: Callable[..., Any], check_stored: Callable[[type[Any], tuple[Any, ...]], None]
) -> Iterator[None]:
    """Replace `autograd.Function.apply`.

    Args:
        apply: What takes its place.
        check_stored: Asked when the original is called, which was fetched before (`spike = MySpike.apply`).
    """
    original = torch.autograd.Function.__dict__["apply"]

    def unwrap(args: tuple[Any, ...]) -> tuple[Any, ...]:
        check_stored(sys._getframe(1).f_locals["cls"], args)  # called by the original `apply`
        return _unwrap(args)

    torch.autograd.Function.apply = classmethod(functools.wraps(_apply)(apply))  # type: ignore[method-assign, assignment]
    torch._functorch.utils.unwrap_dead_wrappers = unwrap
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
        torch._functorch.utils.unwrap_dead_wrappers = _unwrap


def _functions(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """A user's `autograd.Function` is one node: traced into, it would lose its backward."""
    thread = threading.get_ident()

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            args, kwargs = _with_proxies(recorder, args, kwargs)
        if threading.get_ident() == thread and any_proxy(args, kwargs):
            key = function_key(cls)
            return recorder.create_proxy("call_function", apply_function, (key, *args), kwargs)
        return _apply(cls, *args, **kwargs)

    def check_stored(_: type[Any], args: tuple[Any, ...]) -> None:
        if threading.get_ident() == thread and any_proxy(args):
            raise TypeError(
                "the apply method of an autograd.Function was stored before it was called; "
                "tracing into it would lose its backward"
            )

    return _replaced_apply(apply, check_stored)


def refused_functions() -> contextlib.AbstractContextManager[None]:
    """A user's `autograd.Function` raises: export would drop its backward without a word."""
    thread = threading.get_ident()

    def refuse(cls: type[Any], _: tuple[Any, ...] = ()) -> None:
        if threading.get_ident() == thread and not cls.__module__.startswith("torch."):
            raise CaptureError(
                f"the model calls the autograd.Function {cls.__qualname__}, whose backward torch.export drops. "
                f"Transform the model without example_inputs: symbolic tracing keeps it."
            )

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        refuse(cls)
        return _apply(cls, *args, **kwargs)

    return _replaced_apply(apply, refuse)


@contextlib.contextmanager
def refused_constants() -> Iterator[None]:
    """A tensor that learns and that no module has registered raises: export would make a constant of it."""
    thread = threading.get_ident()
    original = lift_constants.lift_constants_pass

    def lift(graph_module: fx.GraphModule, *rest: Any) -> Any:
        for node in graph_module.graph.nodes if threading.get_ident() == thread else ():
            value = attribute(node, graph_module)
            if isinstance(value, torch.Tensor) and value.requires_grad:
                raise CaptureError(
                    f"the forward uses a tensor of shape {tuple(value.shape)} that requires a gradient and that no "
                    f"module has registered under the name by which it is used (kept in a list, a function or a "
                    f"global?): torch.export would make it a constant, which never learns. Use nn.ParameterList or "
                    f"nn.Parameter, or transform the model without example_inputs."
                )
        return original(graph_module, *rest)

    lift_constants.lift_constants_pass = lift  # type: ignore[assignment]
    try:
        yield
    finally:
        lift_constants.lift_constants_pass = original


@contextlib.contextmanager
def refused_contexts() -> Iterator[None]:
    """`torch.autocast`, `torch.inference_mode` and `use` in a forward would be lost: they refuse to be traced."""
    thread = threading.get_ident()
    contexts: tuple[type[Any], ...] = (torch.autocast, torch.inference_mode, Block)
    originals = [context.__enter__ for context in contexts]

    def refuse(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @functools.wraps(enter)
        def refusing(self: Any) -> Any:
            # a block of ours may be a decorator of the user's function
            users = isinstance(self, Block) or is_users(sys._getframe(1).f_code)
            if threading.get_ident() == thread and users:
                package = type(self).__module__.partition(".")[0]
                raise TypeError(
                    f"{package}.{type(self).__name__} inside a forward cannot be put into a graph"
                )
            return enter(self)

        return refusing

    for context, enter in zip(contexts, originals, strict=True):
        context.__enter__ = refuse(enter)
    try:
        yield
    finally:
        for context, enter in zip(contexts, originals, strict=True):
            context.__enter__ = enter


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


_is_grad_enabled = torch.is_grad_enabled
_is_autocast_enabled = torch.is_autocast_enabled


@contextlib.contextmanager
def refused_questions() -> Iterator[None]:
    """A forward that asks for the grad mode would have the answer of the capture for ever."""
    thread = threading.get_ident()

    def refusing(question: Callable[..., bool]) -> Any:
        def ask(*args: Any) -> bool:
            if threading.get_ident() == thread and is_users(sys._getframe(1).f_code):
                raise TypeError(
                    f"the forward asks torch.{question.__name__}(), which a graph cannot answer anew"
                )
            return question(*args)

        return ask

    torch.is_grad_enabled = refusing(_is_grad_enabled)
    torch.is_autocast_enabled = refusing(_is_autocast_enabled)
    try:
        yield
    finally:
        torch.is_grad_enabled = _is_grad_enabled
        torch.is_autocast_enabled = _is_autocast_enabled


@contextlib.contextmanager
def noted_flags(root: nn.Module) -> Iterator[set[FlagRead]]:
    """Lists who reads whose `training` flag."""
    paths = {module: path for path, module in root.named_modules()}
    found: set[FlagRead] = set()

    def note(module: nn.Module, frame: FrameType) -> None:
        if module in paths:
            reader = frame.f_locals.get("self")
            path = paths.get(reader) if isinstance(reader, nn.Module) else None
            found.add(FlagRead(path, paths[module], is_users(frame.f_code)))

    with _answering_training(note):
        yield found


@contextlib.contextmanager
def noted_assignments(root: nn.Module) -> Iterator[list[str]]:
    """Lists the attributes of a model's modules that are given other Python values."""
    modules = set(root.modules())
    original = nn.Module.__setattr__
    names: list[str] = []
    # export puts copies in the place of containers, so the containers themselves are watched
    containers = [
        (f"{type(module).__name__}.{name}", value, copy.deepcopy(value))
        for module in modules
        for name, value in module.__dict__.items()
        if type(value) in (list, dict, set) and is_python_state(value)
    ]

    @functools.wraps(original)
    def assign(module: nn.Module, name: str, value: Any) -> None:
        before = module.__dict__.get(name)
        python = is_python_state(value) and is_python_state(before)
        if module in modules and python and before != value:
            names.append(f"{type(module).__name__}.{name}")
        original(module, name, value)

    nn.Module.__setattr__ = assign  # type: ignore[assignment, method-assign]
    try:
        yield names
    finally:
        nn.Module.__setattr__ = original  # type: ignore[method-assign]
        names += [n for n, now, was in containers if is_python_state(now) and now != was]


@contextlib.contextmanager
def _isinstance(recorder: Recorder) -> Iterator[None]:
    """`isinstance(x, Tensor)` in a forward: the answer is yes, and each call checks that it was right."""
    thread = threading.get_ident()
    original = builtins.isinstance
    tensor = torch.empty(0)

    proxies: dict[type[Any], bool] = {}  # nearly everything that is asked about is none

    def answer(value: Any, kinds: Any) -> bool:
        kind = type(value)
        if kind not in proxies:
            proxies[kind] = issubclass(kind, Proxy)
        if not proxies[kind] or threading.get_ident() != thread:
            return original(value, kinds)
        code = sys._getframe(1).f_code
        if not (is_users(code) or code is torch.is_tensor.__code__):
            return original(value, kinds)
        if issubclass(kind, FlagProxy):
            return original(True, kinds)
        if not any(user.target is require_tensor for user in value.node.users):
            recorder.create_proxy("call_function", require_tensor, (value, caller()), {})
        return original(tensor, kinds)

    builtins.isinstance = answer
    try:
        yield
    finally:
        builtins.isinstance = original


@contextlib.contextmanager
def _factories(recorder: Recorder) -> Iterator[None]:
    """`torch.rand(x.shape[0])` is a node; its C++ would refuse the proxy before anything else could take the call."""
    thread = threading.get_ident()

    def record(factory: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(factory)
        def recording(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                return recorder.create_proxy("call_function", factory, args, kwargs)
            return factory(*args, **kwargs)

        return recording

    names: dict[str, Any] = {factory.__name__: factory for factory in _FACTORIES}
    for name, factory in names.items():
        setattr(torch, name, record(factory))
    try:
        yield
    finally:
        for name, factory in names.items():
            setattr(torch, name, factory)


def _with_proxies(
    recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with a proxy for every tensor of the model; the very same where there is none."""
    found = False

    def swap(value: Any) -> Any:
        nonlocal found
        proxy = recorder.known_tensor(value) if isinstance(value, torch.Tensor) else None
        found = found or proxy is not None
        return value if proxy is None else proxy

    swapped = pytree.tree_map(swap, (args, kwargs))
    return swapped if found else (args, kwargs)


# What is asked of a tensor rather than computed from it.
_PROPERTIES_COMPUTED = frozenset({"data", "T", "mT", "H", "mH", "real", "imag", "grad"})
_METHODS_ASKED = frozenset(
    {
        "size",
        "dim",
        "numel",
        "nelement",
        "stride",
        "is_floating_point",
        "is_complex",
        "is_contiguous",
        "element_size",
        "data_ptr",
        "get_device",
        "storage_offset",
        "untyped_storage",
        "register_hook",
        "requires_grad_",
        "__hash__",
        "__len__",
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


class _RecordMode(TorchFunctionMode):
    """Records what no proxy takes part in: functions that make a tensor from nothing, and changes of the grad mode."""

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
        if func in _FACTORIES:  # fetched before the trace: `from torch import rand`
            return self.recorder.create_proxy("call_function", func, args, kwargs or {})
        if func is torch._C._set_grad_enabled:
            self._record_grad_mode(*args)
            return func(*args)
        name = getattr(func, "__name__", "")
        writes = named_in_place(name) or name in _INPLACE_NAMES
        first = args[0] if args else None
        if writes and isinstance(first, torch.Tensor) and self.recorder.is_held(first):
            raise TypeError(
                "the forward writes into a tensor that a list or dict of the model holds"
            )
        # A parameter that the forward found without asking for it by name (`self.parameters()`)
        traced, traced_kwargs = _with_proxies(self.recorder, args, kwargs or {})
        if traced is args or not _computes(func):
            return func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "__get__":
            return getattr(traced[0], func.__self__.__name__)
        return RecordingProxy.__torch_function__(func, types, traced, traced_kwargs)

    def _record_grad_mode(self, enabled: bool) -> None:
        """Leaving a `no_grad` block restores the mode that a *call* found, not the one that the trace found."""
        setter = sys._getframe(2)
        inside = setter.f_back
        names = (setter.f_code.co_name, inside.f_code.co_name if inside is not None else "")
        context = setter.f_locals.get("self")
        mode: Any = enabled
        if "__exit__" in names and self.previous:
            mode = self.previous.pop()
        elif names[0] != "__enter__" or not isinstance(context, torch.set_grad_enabled):
            # `set_grad_enabled` sets the mode when it is made and again when it is entered
            self.previous.append(
                self.recorder.create_proxy("call_function", _is_grad_enabled, (), {})
            )
        self.recorder.create_proxy("call_function", torch._C._set_grad_enabled, (mode,), {})


class RandomState:
    """The random number generators that Python code may draw from while it is traced."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.get_rng_state()
        self._numpy = _numpy_state()

    def drawn_from(self) -> bool:
        """Whether a number was drawn since."""
        now = RandomState()
        return (
            self._python != now._python
            or not torch.equal(self._torch, now._torch)
            or _comparable(self._numpy) != _comparable(now._numpy)
        )

    @contextlib.contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Put the generators back if an error goes through."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Put the generators back."""
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state(legacy=True)


def _comparable(numpy_state: Any) -> Any:
    """A state whose first array is bytes."""
    return None if numpy_state is None else (numpy_state[1].tobytes(), *numpy_state[2:])
