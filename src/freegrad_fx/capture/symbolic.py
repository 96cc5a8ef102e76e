"""Symbolic capture: the copy of a model is traced.

A module's `training` flag is read by the graph at run time; where the model *branches* on one, a graph is made for
each branch. What cannot be traced below the root is kept whole and listed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import linecache
import math
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy
from torch.overrides import TorchFunctionMode

from ..captured import Variant
from ..errors import CaptureError
from ..ops import apply_function, function_key
from ..provenance import META, Origin, caller, innermost
from .result import Capture, Opaque

__all__ = ["capture_variants"]

MAX_VARIANTS = 16

# Tracing patches nn.Module, and so is done by one thread at a time.
_lock = threading.RLock()

# -- the trace --------------------------------------------------------------------------------------------------------


class _Proxy(Proxy):
    """A proxy that records in-place operators (FX makes them out of place) and Python's builtins."""

    def __abs__(self) -> Proxy:
        return self.tracer.create_proxy("call_method", "abs", (self,), {})

    def __round__(self, ndigits: int | None = None) -> Proxy:
        kwargs = {} if ndigits is None else {"decimals": ndigits}
        return self.tracer.create_proxy("call_method", "round", (self,), kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _record_operator(name: str) -> Callable[[Proxy, Any], Proxy]:
    target = getattr(operator, name)

    def record(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


_INPLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
_INPLACE_BITS = ("and", "or", "xor", "lshift", "rshift")
for _name in (*_INPLACE, *_INPLACE_BITS):
    setattr(_Proxy, f"__i{_name}__", _record_operator(f"i{_name}"))


class _TensorProxy(_Proxy):
    """A parameter or buffer: its shape is a fact, not a proxy."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, tensor: Tensor) -> None:
        super().__init__(node, tracer)
        self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def ndim(self) -> int:
        return self.tensor.ndim

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.tensor.size() if dim is None else self.tensor.size(dim)

    def dim(self) -> int:
        return self.tensor.dim()

    def numel(self) -> int:
        return self.tensor.numel()

    def __len__(self) -> int:
        return len(self.tensor)


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


class _RecordFactories(TorchFunctionMode):
    """Records functions that make a tensor from nothing, which tracing would run once and bake as a constant."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _FACTORIES:
            return self.tracer.create_proxy("call_function", func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _Tracer(fx.Tracer):
    """Traces one variant of a model: one set of values for the `training` flags it branches on."""

    def __init__(self, leaf_types: tuple[type[nn.Module], ...], assumed: dict[str, bool]) -> None:
        # `math.floor(x)` and its kin are calls to be recorded, as `math.sqrt` is by default
        super().__init__(autowrap_modules=(math,))
        self.leaf_types = leaf_types
        self.assumed = assumed
        self.flags: dict[str, bool] = {}
        self.opaque: list[Opaque] = []
        self.lost: list[Opaque] = []
        self._attributes: dict[str, Proxy] = {}
        self._tensor_names: dict[int, str] = {}

    # what FX asks

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._tensor_names = {id(t): name for name, t in root.named_buffers()}
        self._tensor_names.update({id(t): name for name, t in root.named_parameters()})
        with _patched_training(self), _patched_apply(self), _RecordFactories(self):
            graph = super().trace(root, concrete_args)
        for proxy in self._attributes.values():
            if not proxy.node._erased and not proxy.node.users:
                graph.erase_node(proxy.node)
        return graph

    def proxy(self, node: fx.Node) -> Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (*self.leaf_types, torch.jit.ScriptModule)) or super().is_leaf_module(
            m, module_qualified_name
        )

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, *args, **kwargs)
        if kind not in ("placeholder", "output"):
            node.meta[META] = Origin(self._owner(), caller())
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        name = self._tensor_names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        return self._attribute(name, lambda node: _TensorProxy(node, self, attr_val))

    def to_bool(self, obj: Proxy) -> bool:
        path = self._flag_path(obj.node)
        if path is None:
            return super().to_bool(obj)
        return self.flags.setdefault(path, self.assumed.get(path, True))

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        if _has_hooks(m):
            reason = "its hooks would be run on the trace instead of on each call; register them on a leaf or the root"
            self._note(
                self.lost, Opaque(path, f"hooks of the container {type(m).__name__}", reason)
            )
            forward = m.forward
        last = next(iter(reversed(self.graph.nodes)))
        stack, calls = copy.copy(self.module_stack), dict(self.num_calls)
        try:
            return super().call_module(m, forward, args, kwargs)
        except CaptureError:
            raise
        except Exception as error:
            # Keep this module whole: undo what was traced of it, and call it.
            self.module_stack, self.num_calls = stack, calls
            while (node := next(iter(reversed(self.graph.nodes)))) is not last:
                self.graph.erase_node(node)
            where = innermost(error.__traceback__)
            reason = f"cannot be traced: {_explain(error)}"
            self._note(self.opaque, Opaque(path, f"{type(m).__name__}, kept whole", reason, where))
            return self._call_whole(m, path, args, kwargs)

    # our own

    def _call_whole(self, m: nn.Module, path: str, args: Any, kwargs: Any) -> Proxy:
        self.module_stack[path] = (path, type(m))
        try:
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self.module_stack.popitem(last=True)

    def _note(self, notes: list[Opaque], note: Opaque) -> None:
        if note not in notes:
            notes.append(note)

    def _owner(self) -> str:
        return next(reversed(self.module_stack.values()))[0] if self.module_stack else ""

    def _attribute(self, name: str, make: Callable[[fx.Node], Proxy]) -> Proxy:
        proxy = self._attributes.get(name)
        if proxy is None or proxy.node._erased:
            proxy = self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=make)
            self._attributes[name] = proxy
        return proxy

    def training_flag(self, module: nn.Module) -> Any:
        """The proxy of a module's flag while it is traced; None where the flag is read by something else."""
        paths = getattr(self, "submodule_paths", None)
        if paths is None or module not in paths:
            return None
        path = paths[module]
        return self._attribute(f"{path}.training" if path else "training", self.proxy)

    def _flag_path(self, node: fx.Node) -> str | None:
        if node.op != "get_attr" or not isinstance(node.target, str):
            return None
        path, _, name = node.target.rpartition(".")
        return path if name == "training" else None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _explain(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:200]}"


@contextlib.contextmanager
def _patched_training(tracer: _Tracer) -> Iterator[None]:
    """While a model is traced, reading `module.training` gives a proxy of the flag.

    The flag is an entry of the instance's ``__dict__``; a property on the class goes before it. Other threads, and
    code that FX runs for itself, read what they always read.
    """
    thread = threading.get_ident()

    def read(module: nn.Module) -> Any:
        if threading.get_ident() == thread and (flag := tracer.training_flag(module)) is not None:
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


@contextlib.contextmanager
def _patched_apply(tracer: _Tracer) -> Iterator[None]:
    """While a model is traced, a user's `autograd.Function` is one node: traced into, it would lose its backward."""
    thread = threading.get_ident()
    original = torch.autograd.Function.__dict__["apply"]

    @functools.wraps(original.__func__)
    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread and _any_proxy(args, kwargs):
            return tracer.create_proxy(
                "call_function", apply_function, (function_key(cls), *args), kwargs
            )
        return original.__func__(cls, *args, **kwargs)

    unwrap = torch._functorch.utils.unwrap_dead_wrappers

    def refuse_proxies(args: tuple[Any, ...]) -> tuple[Any, ...]:
        # An `apply` that was fetched before the trace (`spike = MySpike.apply`) comes by here
        if threading.get_ident() == thread and _any_proxy(args):
            raise TypeError(
                "the apply method of an autograd.Function was stored before it was called; "
                "tracing into it would lose its backward"
            )
        return unwrap(args)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    torch._functorch.utils.unwrap_dead_wrappers = refuse_proxies
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
        torch._functorch.utils.unwrap_dead_wrappers = unwrap


def _any_proxy(*values: Any) -> bool:
    found = False

    def look(value: Any) -> Any:
        nonlocal found
        found = found or isinstance(value, Proxy)
        return value

    fx.node.map_aggregate(values, look)
    return found


# -- variants ---------------------------------------------------------------------------------------------------------


def capture_variants(
    model: nn.Module, root: nn.Module, leaf_types: tuple[type[nn.Module], ...]
) -> Capture:
    """Trace `root`, the copy of `model`, once for every combination of the flags that the model branches on."""
    specialised = {
        name: parameter.default
        for name, parameter in inspect.signature(type(root).forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    pending: list[dict[str, bool]] = [{}]
    variants: list[Variant] = []
    opaque: dict[Opaque, None] = {}
    lost: dict[Opaque, None] = {}
    while pending:
        assumed = pending.pop(0)
        tracer = _Tracer(leaf_types, assumed)
        graph = _trace(tracer, root, specialised)
        variants.append(Variant(tracer.flags, graph))
        opaque.update(dict.fromkeys(tracer.opaque))
        lost.update(dict.fromkeys((*tracer.lost, *_forget_proxies(model, root))))
        taken: dict[str, bool] = {}
        for path, value in tracer.flags.items():
            if path not in assumed:
                pending.append({**taken, path: not value})
            taken[path] = value
        if len(variants) > MAX_VARIANTS:
            raise CaptureError(
                f"{type(model).__name__} branches on the training flags of {len(tracer.flags)} modules "
                f"({', '.join(path or 'the root' for path in tracer.flags)}), more than can be captured one by one."
            )
    return Capture(root, type(model).__name__, tuple(variants), tuple(opaque), tuple(lost))


def _trace(tracer: _Tracer, root: nn.Module, specialised: dict[str, Any]) -> fx.Graph:
    try:
        return tracer.trace(root, specialised or None)
    except CaptureError:
        raise
    except Exception as error:
        where = innermost(error.__traceback__)
        file, _, line = where.rpartition(":")
        code = linecache.getline(file, int(line)).strip() if line.isdigit() else ""
        raise CaptureError(
            f"{type(root).__name__} cannot be traced: {_explain(error)}\n"
            f"  at {where or 'an unknown place'}" + (f": {code}" if code else "") + "\n"
            "The forward of the model itself depends on the values or shapes of its inputs there. Move that part "
            "into a submodule: it is then kept whole, and the rest is rewritten."
        ) from error


def _forget_proxies(model: nn.Module, root: nn.Module) -> Iterator[Opaque]:
    """Undo what the traced forward assigned to the copy's attributes, and say that the graph will not assign it."""
    for (path, traced), original in zip(root.named_modules(), model.modules(), strict=False):
        for name, value in list(traced.__dict__.items()):
            if name.startswith("_") or not _any_proxy(value):
                continue
            if name in original.__dict__:
                traced.__dict__[name] = original.__dict__[name]
            else:
                del traced.__dict__[name]
            yield Opaque(
                path, f"attribute {name!r}", "assigned in forward; the graph does not assign it"
            )
