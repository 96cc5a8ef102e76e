"""The tracer: one symbolic trace of one variant of a model.

A module's `training` flag is read by the graph at run time; a branch on one is noted. What cannot be traced below the
root is kept whole and listed.
"""

from __future__ import annotations

import copy
import dis
import enum
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.proxy import Proxy
from torch.nn.utils.parametrize import type_before_parametrizations

from .._torch import graphs, tree
from .._torch.graphs import is_erased
from .._torch.modules import buffers_of, children_of, has_hooks, parameters_of
from ..errors import CaptureError
from ..graph.provenance import META, Origin, caller, innermost
from ..graph.state import ATTRIBUTES_OF_EVERY_MODULE, is_python_state
from ..ops.checks import require_open, require_specialised
from ..sites.remarks import Lost, Opaque
from ..vocabulary.recognition import recognise
from .patches.random import RandomState
from .patches.symbolic import patched
from .proxies import FlagProxy, RecordingProxy, TensorProxy

__all__ = ["Tracer", "flag_path"]

T = TypeVar("T")


class Tracer(graphs.Tracer):
    """Traces one variant of a model: one set of values for the `training` flags it branches on.

    Args:
        leaf_types: Module classes to keep whole.
        assumed: Values for `training` flags; True for others.
        specialised: Arguments of the forward that are constants.
        concrete_flags: Read flags as the values they are assumed to have, and count each reading as a branch.
        verifies: Read flags as plain values and as no branch, and keep whole these paths: those that the trace to be
            verified kept whole for branching on their mode.
        watch_random: Keep whole what draws random numbers outside of the graph.
        watched: Attributes that the forward assigns, and must not read before, by module path and name.
        whole: Paths of modules to keep whole, with the reason.
    """

    def __init__(
        self,
        leaf_types: tuple[type[nn.Module], ...],
        assumed: dict[str, bool],
        specialised: Mapping[str, Any],
        concrete_flags: bool = False,
        verifies: frozenset[str] | None = None,
        watch_random: bool = False,
        watched: frozenset[tuple[str, str]] = frozenset(),
        whole: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        # `math.floor(x)` and its kin are calls to be recorded, as `math.sqrt` is by default
        super().__init__(autowrap_modules=(math,))
        self.leaf_types = leaf_types
        self.assumed = assumed
        self.specialised = specialised
        self.concrete_flags = concrete_flags
        self.verifies = verifies
        self.siteless: set[str] = set()
        self.watch_random = watch_random
        self.watched = watched
        self.whole = whole
        self.thread = threading.get_ident()
        self.refusals = 0
        self.flags: dict[str, bool] = {}
        self.flags_read = False
        self.assigned: dict[tuple[str, str], Any] = {}
        self.opaque: list[Opaque] = []
        self.lost: list[Lost] = []
        self._attributes: dict[str, Proxy] = {}
        self.asks_identity = False
        self._tensor_names: dict[int, str] = {}
        self._held: set[int] = set()

    # -- what FX asks

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a module; what it read and did not use is not in the graph."""
        self.asks_identity = any(map(_asks_identity, [type(m) for m in root.modules()]))  # type: ignore[arg-type]
        self._tensor_names = _tensor_names(root)
        self._held = _held_tensors(root)
        with torch.set_grad_enabled(True), patched(self):
            graph = super().trace(root, concrete_args)
        if self.refusals:
            raise TypeError(_CAUGHT)
        for proxy in self._attributes.values():
            node = proxy.node
            if node.op == "get_attr" and not is_erased(node) and not node.users:
                graph.erase_node(node)
        return graph

    def proxy(self, node: fx.Node) -> Proxy:
        """Stand for a node's value."""
        return RecordingProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Keep a module one call: those of torch.nn, scripted ones, and what the caller wants whole."""
        if isinstance(m, (*self.leaf_types, torch.jit.ScriptModule)):
            return True
        # A parametrized module has a class of torch.nn.utils
        kind = type_before_parametrizations(m)
        return kind.__module__.startswith(("torch.nn", "torch.ao.nn")) and kind is not nn.Sequential

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Make a node, and write on it where it comes from."""
        if kind == "output":
            self._record_assignments()
        node = super().create_node(kind, *args, **kwargs)
        if kind not in ("placeholder", "output"):
            node.meta[META] = Origin(self._owner(), caller())
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Give the proxy of a parameter or buffer that a module is asked for."""
        if threading.get_ident() != self.thread or not isinstance(attr_val, Tensor):
            return attr_val
        proxy = self.known_tensor(attr_val)
        return attr_val if proxy is None else proxy

    def create_arg(self, a: Any) -> Any:
        """Turn a value into an argument of a node; a subclass of dict or list stays one."""
        # FX would make a plain dict or list of it
        if isinstance(a, dict | list) and type(a) not in (
            dict,
            list,
            immutable_dict,
            immutable_list,
        ):
            plain: Any = dict(a) if isinstance(a, dict) else list(a)
            return self.create_node("call_function", type(a), (super().create_arg(plain),), {})
        argument = super().create_arg(a)
        if isinstance(a, Tensor) and self._tensor_names.get(id(a)) is None:
            what = "a tensor from a list or dict, or made outside of the graph"
            note = Opaque(self._owner(), what, "it is a constant of the graph", caller())
            _note(self.opaque, note)
        return argument

    def to_bool(self, obj: Proxy) -> bool:
        """Decide a branch: on a flag as assumed, on anything else not at all."""
        path = flag_path(obj.node)
        if path is None:
            self.refusals += 1
            return super().to_bool(obj)
        return self._taken(path)

    def argument_proxy(self, name: str, default: Callable[[], Any]) -> Any:
        """Stand for an argument of the forward: open, or the constant that it is specialised to."""
        plain = name.lstrip("*")
        if plain not in self.specialised:
            proxy = default()
            if plain == name and self.asks_identity:
                self.create_proxy("call_function", require_open, (proxy, name), {})
            return proxy
        value = self.specialised[plain]
        usual = () if name.startswith("*") else (_as_argument(value),)
        proxy = self.create_proxy("placeholder", name, usual, {})
        expected = usual[0] if usual else value
        self.create_proxy("call_function", require_specialised, (proxy, expected, plain), {})
        return _Constant(value)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """Make the arguments of the forward, constants among them."""
        function, values = super().create_args_for_root(*args, **kwargs)
        return function, [v.value if isinstance(v, _Constant) else v for v in values]

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace into a module, or keep it one call."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        path = (self.submodule_paths or {}).get(m)
        if path is None:
            # Made inside a forward, or kept in a list: what it computes is its caller's
            return m.forward(*args, **kwargs)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        if path in (self.verifies or ()):
            return self._call_whole(m, path, args, kwargs)
        if path in self.whole:
            _note(self.opaque, Opaque(path, f"{type(m).__name__}, kept whole", self.whole[path]))
            return self._call_whole(m, path, args, kwargs)
        if has_hooks(m):
            reason = "they would be run on the trace instead of on each call; register them on a leaf or on the root"
            _note(self.lost, Lost(path, f"the hooks of the container {type(m).__name__}", reason))
            forward = m.forward
        before = _State(self)
        random = RandomState() if self.watch_random else None
        try:
            result = super().call_module(m, forward, args, kwargs)
            if random is not None and random.drawn_from():
                random.restore()
                raise TypeError("draws random numbers from outside of PyTorch's tensor functions")
            if self.refusals != before.refusals:
                raise TypeError(_CAUGHT)
        except CaptureError:
            raise
        except Exception as error:
            before.restore()
            where = innermost(error.__traceback__)
            reason = self.explain(error)
            _note(self.opaque, Opaque(path, f"{type(m).__name__}, kept whole", reason, where))
            return self._call_whole(m, path, args, kwargs)
        if set(self.flags) - before.flags.keys() and not self._has_sites(
            before, m, forward, args, kwargs
        ):
            # A module that branches on its mode, and in which no backward could be replaced (stochastic depth, noise):
            # called whole, it needs no graph for each of its branches.
            before.restore()
            self.siteless.add(path)
            return self._call_whole(m, path, args, kwargs)
        return result

    # -- what the patches ask

    def training_flag(self, module: nn.Module) -> Any:
        """See `patches.Recorder`."""
        paths = getattr(self, "submodule_paths", None)
        if paths is None or module not in paths:
            return None
        path = paths[module]
        if self.verifies is not None:
            return self.assumed.get(path, True)
        if self.concrete_flags:
            return self._taken(path)
        self.flags_read = True
        name = f"{path}.training" if path else "training"
        return self._attribute(name, lambda node: FlagProxy(node, self))

    def known_tensor(self, tensor: Tensor) -> Proxy | None:
        """See `patches.Recorder`."""
        name = self._tensor_names.get(id(tensor))
        if name is None:
            return None
        return self._attribute(name, lambda node: TensorProxy(node, self, tensor))

    def is_held(self, tensor: Tensor) -> bool:
        """See `patches.Recorder`."""
        return id(tensor) in self._held

    def assign(self, module: nn.Module, name: str, value: Any) -> bool:
        """See `patches.Recorder`."""
        paths = getattr(self, "submodule_paths", None)
        if paths is None or module not in paths:
            return False
        path = paths[module]
        if name in parameters_of(module) or name in children_of(module):
            return False
        self.assigned[path, name] = value
        if name not in buffers_of(module):
            return False  # carried out on the copy too, so that the rest of the forward reads it
        self._attributes[f"{path}.{name}" if path else name] = value
        return True

    # -- our own

    def _taken(self, path: str) -> bool:
        return self.flags.setdefault(path, self.assumed.get(path, True))

    def _call_whole(self, m: nn.Module, path: str, args: Any, kwargs: Any) -> Proxy:
        self.module_stack[path] = (path, type(m))
        try:
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self.module_stack.popitem(last=True)

    def _has_sites(
        self, before: _State, m: nn.Module, forward: Any, args: Any, kwargs: Any
    ) -> bool:
        """Whether a backward could be replaced in the module just traced, on either side of its branches."""
        if self._sites_since(before):
            return True
        after = _State(self)
        new = {path: value for path, value in self.flags.items() if path not in before.flags}
        assumed = self.assumed
        try:
            for path in new:
                self.flags = dict(before.flags)
                self.assumed = {**assumed, path: not new[path]}
                super().call_module(m, forward, args, kwargs)
                if self._sites_since(after):
                    return True
        except Exception:
            return True
        finally:
            self.assumed = assumed
            after.restore()
            self.flags = {**before.flags, **new}
        return False

    def _sites_since(self, before: _State) -> bool:
        for node in before.new_nodes():
            module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
            if recognise(node, module) is not None or isinstance(module, self.leaf_types):
                return True
        return False

    def _record_assignments(self) -> None:
        for (path, name), value in self.assigned.items():
            owner = self.create_proxy("get_attr", path or "itself", (), {})
            self.create_proxy("call_function", setattr, (owner, name, value), {})

    def _owner(self) -> str:
        return next(reversed(self.module_stack.values()))[0] if self.module_stack else ""

    def _attribute(self, name: str, make: Callable[[fx.Node], Proxy]) -> Proxy:
        proxy = self._attributes.get(name)
        if proxy is None or is_erased(proxy.node):
            proxy = self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=make)
            self._attributes[name] = proxy
        return proxy

    def explain(self, error: BaseException) -> str:
        """Why something cannot be traced."""
        if isinstance(error, AttributeError) and any(n == error.name for _, n in self.watched):
            return f"it keeps state in the attribute {error.name!r} from call to call; make that a buffer"
        if isinstance(error, NameError) and "not a member of this module" in str(error):
            return "it uses a parameter of a module that is not registered (kept in a list?); use nn.ModuleList"
        first = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first[:200]}"


@dataclass(frozen=True)
class _Constant:
    """A constant argument on its way through FX, which would take a dict or tuple apart."""

    value: Any


class _State:
    """What a trace has recorded so far; it can be gone back to."""

    def __init__(self, tracer: Tracer) -> None:
        self.tracer = tracer
        self.last = next(iter(reversed(tracer.graph.nodes)), None)
        self.module_stack = copy.copy(tracer.module_stack)
        self.num_calls = dict(tracer.num_calls)
        self.flags = dict(tracer.flags)
        self.assigned = dict(tracer.assigned)
        self.notes = (list(tracer.opaque), list(tracer.lost))
        self.refusals = tracer.refusals

    def new_nodes(self) -> Iterator[fx.Node]:
        """The nodes recorded since, the last first."""
        for node in reversed(self.tracer.graph.nodes):
            if node is self.last:
                return
            yield node

    def restore(self) -> None:
        """Forget what was recorded since."""
        for node in list(self.new_nodes()):
            self.tracer.graph.erase_node(node)
        self.tracer.module_stack = copy.copy(self.module_stack)
        self.tracer.num_calls = dict(self.num_calls)
        self.tracer.flags = dict(self.flags)
        self.tracer.assigned = dict(self.assigned)
        opaque, lost = self.notes
        self.tracer.opaque, self.tracer.lost = list(opaque), list(lost)
        self.tracer.refusals = self.refusals


_CAUGHT = "the forward catches the error by which a trace says that it cannot follow a branch"


@functools.lru_cache(maxsize=4096)
def _asks_identity(kind: type[nn.Module]) -> bool:
    """Whether a class's own code has `x is None` or its like, to which a proxy has one answer only."""
    if kind.__module__.startswith("torch.nn."):
        return False
    codes = [
        f.__code__
        for c in kind.__mro__
        for f in vars(c).values()
        if isinstance(f, FunctionType)
        and not c.__module__.startswith("torch.")
        and f.__name__ != "__init__"
    ]
    return any(
        i.opname == "IS_OP" or i.opname.endswith("_NONE")
        for code in codes
        for i in dis.get_instructions(code)
    )


def _tensor_names(root: nn.Module) -> dict[int, str]:
    """The dotted name of every tensor of a model, by identity: parameters, buffers and plain attributes."""
    names = {
        id(value): f"{path}.{name}" if path else name
        for path, module in root.named_modules()
        for name, value in module.__dict__.items()
        if isinstance(value, Tensor)
    }
    names.update({id(t): name for name, t in root.named_buffers()})
    names.update({id(t): name for name, t in root.named_parameters()})
    return names


def _held_tensors(root: nn.Module) -> set[int]:
    """The tensors, by identity, in the lists and dicts that the modules of a model have as attributes."""
    attributes = [
        value
        for module in root.modules()
        for name, value in module.__dict__.items()
        if name not in ATTRIBUTES_OF_EVERY_MODULE
        and isinstance(value, list | tuple | dict)
        and not is_python_state(value)  # such as the strides of a convolution
    ]
    leaves = tree.leaves(attributes)
    return {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}


def _note(notes: list[T], note: T) -> None:
    if note not in notes:
        notes.append(note)


def flag_path(node: fx.Node) -> str | None:
    """The path of the module whose `training` flag a node reads; None where it reads none."""
    if node.op != "get_attr" or not isinstance(node.target, str):
        return None
    path, _, name = node.target.rpartition(".")
    return path if name == "training" else None


def _as_argument(value: Any) -> Any:
    """A value as a graph can hold it; ``...`` for one that it cannot."""
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return value if all(_as_argument(v) is not ... for v in value) else ...
    if type(value) is dict:
        plain = all(type(k) is str and _as_argument(v) is not ... for k, v in value.items())
        return value if plain else ...
    plain = value is None or type(value) in _PLAIN or isinstance(value, enum.Enum)
    return value if plain else ...


_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)
