"""What is replaced in PyTorch while a model is traced, so that nothing of the forward is run once and forgotten.

Every replacement goes through `replaced`, which keeps it from other threads.
"""

from __future__ import annotations

import builtins
import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.fx.proxy import Proxy
from torch.overrides import TorchFunctionMode

from .._torch import exporting, tree
from .._torch.functions import Function, functions_answered_by
from .._torch.graphs import SET_GRAD_ENABLED
from .._torch.replacing import replaced
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


def _answering_training(
    answer: Callable[[nn.Module, FrameType], Any],
) -> contextlib.AbstractContextManager[None]:
    """Ask `answer` when `module.training` is read; what it answers with None is read as ever.

    The flag is an entry of the instance's ``__dict__``; a property on the class goes before it.
    """

    def read(module: nn.Module) -> Any:
        # between this frame and the reader's there is that of the replacement
        if (flag := answer(module, sys._getframe(2))) is not None:
            return flag
        try:
            return module.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None

    return replaced(nn.Module, "training", lambda _: property(read))


def _training(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """Reading `module.training` gives a proxy of the flag."""
    return _answering_training(lambda module, _: recorder.training_flag(module))


def _assignments(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """`self.name = value` with a traced value becomes part of the graph."""

    def recording(assign: Callable[[nn.Module, str, Any], None]) -> Callable[..., None]:
        def record(module: nn.Module, name: str, value: Any) -> None:
            if not (any_proxy(value) and recorder.assign(module, name, value)):
                assign(module, name, value)

        return record

    return replaced(nn.Module, "__setattr__", recording)


def _functions(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """A user's `autograd.Function` is one node: traced into, it would lose its backward."""

    def record(function: Function, args: tuple[Any, ...]) -> Any:
        args, _ = _with_proxies(recorder, args, {})
        if not any_proxy(args):
            return NotImplemented
        key = function_key(function)
        return recorder.create_proxy("call_function", apply_function, (key, *args), {})

    return functions_answered_by(record)


def refused_functions() -> contextlib.AbstractContextManager[None]:
    """A user's `autograd.Function` raises: export would drop its backward without a word."""

    def refuse(function: Function, _: tuple[Any, ...]) -> Any:
        if function.__module__.partition(".")[0] in ("torch", __name__.partition(".")[0]):
            return NotImplemented
        raise CaptureError(
            f"the model calls the autograd.Function {function.__qualname__}, whose backward torch.export drops. "
            f"Transform the model without example_inputs: symbolic tracing keeps such calls. If it cannot trace the "
            f"model, freegrad_fx.compile(model, rules) keeps them too."
        )

    return functions_answered_by(refuse)


def refused_constants() -> contextlib.AbstractContextManager[None]:
    """A tensor that learns and that no module has registered raises: export would make a constant of it."""

    def refusing(lift: Callable[..., Any]) -> Callable[..., Any]:
        def look(graph_module: fx.GraphModule, *rest: Any) -> Any:
            for node in graph_module.graph.nodes:
                value = attribute(node, graph_module)
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    raise CaptureError(
                        f"the forward uses a tensor of shape {tuple(value.shape)} that requires a gradient and that "
                        f"no module has registered under the name by which it is used (kept in a list, a function or "
                        f"a global?): torch.export would make it a constant, which never learns. Use nn.ParameterList "
                        f"or nn.Parameter, or transform the model without example_inputs."
                    )
            return lift(graph_module, *rest)

        return look

    return exporting.constants_lifted_by(refusing)


@contextlib.contextmanager
def refused_contexts() -> Iterator[None]:
    """`torch.autocast`, `torch.inference_mode` and `use` in a forward would be lost: they refuse to be traced."""

    def refusing(enter: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def refuse(context: Any) -> Any:
            # a block of ours may be a decorator of the user's function
            if isinstance(context, Block) or is_users(sys._getframe(2).f_code):
                package = type(context).__module__.partition(".")[0]
                raise TypeError(
                    f"{package}.{type(context).__name__} inside a forward cannot be put into a graph"
                )
            return enter(context)

        return refuse

    with contextlib.ExitStack() as stack:
        for context in (torch.autocast, torch.inference_mode, Block):
            stack.enter_context(replaced(context, "__enter__", refusing))
        yield


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


@contextlib.contextmanager
def refused_questions() -> Iterator[None]:
    """A forward that asks for the grad mode would have the answer of the capture for ever."""

    def refusing(question: Callable[..., bool]) -> Callable[..., bool]:
        def ask(*args: Any) -> bool:
            if is_users(sys._getframe(2).f_code):
                raise TypeError(
                    f"the forward asks torch.{question.__name__}(), which a graph cannot answer anew"
                )
            return question(*args)

        return ask

    with (
        replaced(torch, "is_grad_enabled", refusing),
        replaced(torch, "is_autocast_enabled", refusing),
    ):
        yield


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
    names: list[str] = []
    # export puts copies in the place of containers, so the containers themselves are watched
    containers = [
        (f"{type(module).__name__}.{name}", value, copy.deepcopy(value))
        for module in modules
        for name, value in module.__dict__.items()
        if type(value) in (list, dict, set) and is_python_state(value)
    ]

    def noting(assign: Callable[[nn.Module, str, Any], None]) -> Callable[..., None]:
        def note(module: nn.Module, name: str, value: Any) -> None:
            before = module.__dict__.get(name)
            python = is_python_state(value) and is_python_state(before)
            if module in modules and python and before != value:
                names.append(f"{type(module).__name__}.{name}")
            assign(module, name, value)

        return note

    try:
        with replaced(nn.Module, "__setattr__", noting):
            yield names
    finally:
        names += [n for n, now, was in containers if is_python_state(now) and now != was]


def _isinstance(recorder: Recorder) -> contextlib.AbstractContextManager[None]:
    """`isinstance(x, Tensor)` in a forward: the answer is yes, and each call checks that it was right."""
    tensor = torch.empty(0)
    proxies: dict[type[Any], bool] = {}  # nearly everything that is asked about is none

    def answering(ask: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
        def answer(value: Any, kinds: Any) -> bool:
            kind = type(value)
            if kind not in proxies:
                proxies[kind] = issubclass(kind, Proxy)
            if not proxies[kind]:
                return ask(value, kinds)
            code = sys._getframe(2).f_code
            if not (is_users(code) or code is torch.is_tensor.__code__):
                return ask(value, kinds)
            if issubclass(kind, FlagProxy):
                return ask(True, kinds)
            if not any(user.target is require_tensor for user in value.node.users):
                recorder.create_proxy("call_function", require_tensor, (value, caller()), {})
            return ask(tensor, kinds)

        return answer

    return replaced(builtins, "isinstance", answering)


@contextlib.contextmanager
def _factories(recorder: Recorder) -> Iterator[None]:
    """`torch.rand(x.shape[0])` is a node; its C++ would refuse the proxy before anything else could take the call."""

    def recording(factory: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: recorder.create_proxy("call_function", factory, args, kwargs)

    with contextlib.ExitStack() as stack:
        for factory in _FACTORIES:
            stack.enter_context(replaced(torch, factory.__name__, recording))
        yield


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

    swapped = tree.map_leaves(swap, (args, kwargs))
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
        if func is SET_GRAD_ENABLED:
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
        self.recorder.create_proxy("call_function", SET_GRAD_ENABLED, (mode,), {})


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
