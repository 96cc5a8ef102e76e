"""Symbolic capture: the copy of a model is traced.

A module's `training` flag is read by the graph at run time; where the model *branches* on one, a graph is made for
each branch. What cannot be traced below the root is kept whole and listed.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx._symbolic_trace import PH
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.proxy import Proxy
from torch.nn.utils.parametrize import type_before_parametrizations

from ..activations import recognise
from ..captured import Variant
from ..errors import CaptureError, unknown
from ..ops import require_specialised
from ..provenance import META, Origin, caller, innermost
from .patches import RandomState, patched
from .proxies import FlagProxy, RecordingProxy, TensorProxy, any_proxy
from .result import Capture, Opaque

__all__ = ["capture_symbolically"]

MAX_VARIANTS = 16

# Tracing patches nn.Module, and so is done by one thread at a time.
_lock = threading.RLock()

_ATTRIBUTES_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


class _Tracer(fx.Tracer):
    """Traces one variant of a model: one set of values for the `training` flags it branches on.

    Args:
        leaf_types: Module classes to keep whole.
        assumed: Values for `training` flags; True for others.
        specialised: Arguments of the forward that are constants.
        concrete_flags: Read flags as the values they are assumed to have, and count each reading as a branch.
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
        self.watch_random = watch_random
        self.watched = watched
        self.whole = whole
        self.thread = threading.get_ident()
        self.refusals = 0
        self.flags: dict[str, bool] = {}
        self.flags_read = False
        self.assigned: dict[tuple[str, str], Any] = {}
        self.opaque: list[Opaque] = []
        self.lost: list[Opaque] = []
        self._attributes: dict[str, Proxy] = {}
        self._tensor_names: dict[int, str] = {}

    # -- what FX asks

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._tensor_names = _tensor_names(root)
        with torch.set_grad_enabled(True), patched(self):
            graph = super().trace(root, concrete_args)
        if self.refusals:
            raise TypeError(_CAUGHT)
        for proxy in self._attributes.values():
            node = proxy.node
            if node.op == "get_attr" and not node._erased and not node.users:
                graph.erase_node(node)
        return graph

    def proxy(self, node: fx.Node) -> Proxy:
        return RecordingProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (*self.leaf_types, torch.jit.ScriptModule)):
            return True
        # A parametrized module has a class of torch.nn.utils
        kind = type_before_parametrizations(m)
        return kind.__module__.startswith(("torch.nn", "torch.ao.nn")) and kind is not nn.Sequential

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if kind == "output":
            self._record_assignments()
        node = super().create_node(kind, *args, **kwargs)
        if kind not in ("placeholder", "output"):
            node.meta[META] = Origin(self._owner(), caller())
        return node

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread or not isinstance(attr_val, Tensor):
            return attr_val
        proxy = self.known_tensor(attr_val)
        return attr_val if proxy is None else proxy

    def create_arg(self, a: Any) -> Any:
        # FX would make a plain dict or list of it
        if isinstance(a, dict | list) and type(a) not in (
            dict,
            list,
            immutable_dict,
            immutable_list,
        ):
            plain: Any = dict(a) if isinstance(a, dict) else list(a)
            return self.create_node("call_function", type(a), (super().create_arg(plain),), {})
        return super().create_arg(a)

    def to_bool(self, obj: Proxy) -> bool:
        path = _flag_path(obj.node)
        if path is None:
            self.refusals += 1
            return super().to_bool(obj)
        return self._taken(path)

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn: Any) -> Any:
        plain = name.lstrip("*")
        if plain not in self.specialised:
            return super()._proxy_placeholder(name, None, sig, fn)
        value = self.specialised[plain]
        default = () if name.startswith("*") else (_as_argument(value),)
        proxy = self.create_proxy("placeholder", name, default, {})
        expected = default[0] if default else value
        self.create_proxy("call_function", require_specialised, (proxy, expected, plain), {})
        return _Constant(value)

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        function, values = super().create_args_for_root(*args, **kwargs)
        return function, [v.value if isinstance(v, _Constant) else v for v in values]

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        path = (self.submodule_paths or {}).get(m)
        if path is None:
            # Made inside a forward, or kept in a list: what it computes is its caller's
            return m.forward(*args, **kwargs)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        if path in self.whole:
            _note(self.opaque, Opaque(path, f"{type(m).__name__}, kept whole", self.whole[path]))
            return self._call_whole(m, path, args, kwargs)
        if _has_hooks(m):
            reason = "they would be run on the trace instead of on each call; register them on a leaf or on the root"
            _note(self.lost, Opaque(path, f"the hooks of the container {type(m).__name__}", reason))
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
            reason = self._explain(error)
            _note(self.opaque, Opaque(path, f"{type(m).__name__}, kept whole", reason, where))
            return self._call_whole(m, path, args, kwargs)
        if set(self.flags) - before.flags.keys() and not self._has_sites(
            before, m, forward, args, kwargs
        ):
            # A module that branches on its mode, and in which no backward could be replaced (stochastic depth, noise):
            # called whole, it needs no graph for each of its branches.
            before.restore()
            return self._call_whole(m, path, args, kwargs)
        return result

    # -- what the patches ask

    def training_flag(self, module: nn.Module) -> Any:
        paths = getattr(self, "submodule_paths", None)
        if paths is None or module not in paths:
            return None
        path = paths[module]
        if self.concrete_flags:
            return self._taken(path)
        self.flags_read = True
        name = f"{path}.training" if path else "training"
        return self._attribute(name, lambda node: FlagProxy(node, self))

    def known_tensor(self, tensor: Tensor) -> Proxy | None:
        name = self._tensor_names.get(id(tensor))
        if name is None:
            return None
        return self._attribute(name, lambda node: TensorProxy(node, self, tensor))

    def assign(self, module: nn.Module, name: str, value: Any) -> bool:
        paths = getattr(self, "submodule_paths", None)
        if paths is None or module not in paths:
            return False
        path = paths[module]
        if name in module._parameters or name in module._modules:
            return False
        self.assigned[path, name] = value
        if name not in module._buffers:
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
        if proxy is None or proxy.node._erased:
            proxy = self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=make)
            self._attributes[name] = proxy
        return proxy

    def _explain(self, error: BaseException) -> str:
        if isinstance(error, AttributeError) and any(n == error.name for _, n in self.watched):
            return f"it keeps state in the attribute {error.name!r} from call to call; make that a buffer"
        first = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first[:200]}"


@dataclass(frozen=True)
class _Constant:
    """A constant argument on its way through FX, which would take a dict or tuple apart."""

    value: Any


class _State:
    """What a trace has recorded so far; it can be gone back to."""

    def __init__(self, tracer: _Tracer) -> None:
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
        self.tracer.opaque, self.tracer.lost = map(list, self.notes)
        self.tracer.refusals = self.refusals


_CAUGHT = "the forward catches the error by which a trace says that it cannot follow a branch"


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


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _note(notes: list[Opaque], note: Opaque) -> None:
    if note not in notes:
        notes.append(note)


def _flag_path(node: fx.Node) -> str | None:
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
    return value if value is None or type(value) in _PLAIN else ...


_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)


# -- variants ---------------------------------------------------------------------------------------------------------


def capture_symbolically(
    model: nn.Module,
    root: nn.Module,
    leaf_types: tuple[type[nn.Module], ...],
    concrete_args: Mapping[str, Any],
) -> Capture:
    """Trace `root`, the copy of `model`, once for every combination of the flags that the model branches on."""
    specialised = _specialised(root, concrete_args)
    trace = partial(_trace, model, root, leaf_types, specialised)
    found = _variants(trace)
    if found is None:
        # A flag was used in a way that a proxy cannot see (`training is True`): every reading is a branch.
        found = _variants(partial(trace, concrete_flags=True)) or []
    if not found or len(found) > MAX_VARIANTS:
        found = [trace(assumed, concrete_flags=True) for assumed in _both_modes(root)]
    return Capture(
        root,
        type(model).__name__,
        tuple(Variant(tracer.flags, graph) for tracer, graph, _ in found),
        tuple(dict.fromkeys(note for tracer, _, _ in found for note in tracer.opaque)),
        tuple(dict.fromkeys(n for tracer, _, lost in found for n in (*tracer.lost, *lost))),
    )


_Traced: TypeAlias = tuple[_Tracer, fx.Graph, list[Opaque]]


def _both_modes(root: nn.Module) -> list[dict[str, bool]]:
    paths = [path for path, _ in root.named_modules()]
    return [dict.fromkeys(paths, True), dict.fromkeys(paths, False)]


def _variants(trace: Callable[..., _Traced]) -> list[_Traced] | None:
    """Follow both sides of every branch on a flag; None where the graphs do not mean what plain flags would.

    Where there are more variants than may be kept, one more than that is returned.
    """
    pending: list[dict[str, bool]] = [{}]
    found: list[_Traced] = []
    while pending and len(found) <= MAX_VARIANTS:
        assumed = pending.pop(0)
        tracer, graph, lost = trace(assumed)
        if tracer.flags_read:
            plain, plain_graph, _ = trace({**assumed, **tracer.flags}, concrete_flags=True)
            if _outline(graph, tracer.flags) != _outline(plain_graph, plain.flags):
                return None
        found.append((tracer, graph, lost))
        taken: dict[str, bool] = {}
        for path, value in tracer.flags.items():
            if path not in assumed:
                pending.append({**taken, path: not value})
            taken[path] = value
    return found


def _outline(graph: fx.Graph, flags: Mapping[str, bool]) -> list[tuple[Any, ...]]:
    """A graph without its names, and with flags for what they are taken for."""
    rows: list[tuple[Any, ...]] = []
    stands_for: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        path = _flag_path(node)
        if path is not None:
            stands_for[node] = flags.get(path, True)
            continue
        rows.append((node.op, node.target, fx.map_arg((node.args, node.kwargs), stands_for.get)))
        stands_for[node] = f"%{len(rows)}"
    return rows


def _specialised(root: nn.Module, concrete_args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the forward that are constants: those with a default, keyword collections, and what is asked."""
    parameters = inspect.signature(type(root).forward).parameters
    for name in concrete_args:
        if name not in list(parameters)[1:]:
            kind = f"argument of {type(root).__name__}.forward in concrete_args:"
            raise CaptureError(unknown(kind, name, list(parameters)[1:]))
    chosen = {
        name: {} if parameter.kind is parameter.VAR_KEYWORD else parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD
    }
    chosen.update(concrete_args)
    return {name: value for name, value in chosen.items() if value is not PH}


def _trace(
    model: nn.Module,
    root: nn.Module,
    leaf_types: tuple[type[nn.Module], ...],
    specialised: dict[str, Any],
    assumed: dict[str, bool],
    concrete_flags: bool = False,
) -> _Traced:
    """Trace one variant; once more, and with a sharper eye, where the first trace drew random numbers or kept state."""
    with _lock:
        random = RandomState()
        make = partial(_Tracer, leaf_types, assumed, specialised, concrete_flags)
        tracer = make()
        graph = _traced(tracer, root)
        whole = _restore_python_state(model, root, tracer)
        forgotten = list(_forget_proxies(model, root, tracer))
        drawn, watched = random.drawn_from(), _state_kept(root, tracer)
        if "" in whole:
            raise CaptureError(
                f"{type(root).__name__} cannot be captured: {whole['']}, and a graph would do so once and for ever. "
                f"Make it a buffer, or move that part into a submodule: it is then kept whole."
            )
        if drawn or watched or whole:
            random.restore()
            for path, name in watched:
                del root.get_submodule(path).__dict__[name]
            tracer = make(watch_random=drawn, watched=watched, whole=whole)
            graph = _traced(tracer, root)
            forgotten = list(_forget_proxies(model, root, tracer))
            if random.drawn_from():
                random.restore()
                raise CaptureError(
                    f"{type(root).__name__} draws random numbers in its own forward from outside of PyTorch's tensor "
                    f"functions (random, numpy.random, or a generator): a graph would repeat one draw for ever. Use "
                    f"torch.rand(()), or move that part into a submodule: it is then kept whole."
                )
    return tracer, graph, forgotten


def _restore_python_state(model: nn.Module, root: nn.Module, tracer: _Tracer) -> dict[str, str]:
    """Undo changes of numbers, text and plain containers; the paths of the modules that changed any, and what."""
    changed: dict[str, str] = {}
    for (path, traced), original in zip(root.named_modules(), model.modules(), strict=False):
        for name, before in original.__dict__.items():
            if name in _ATTRIBUTES_OF_EVERY_MODULE or (path, name) in tracer.assigned:
                continue
            after = traced.__dict__.get(name)
            if _is_python_state(before) and _is_python_state(after) and before != after:
                traced.__dict__[name] = copy.deepcopy(before)
                changed[path] = f"its forward changes the attribute {name!r}"
    return changed


def _is_python_state(value: Any) -> bool:
    if type(value) in (list, tuple, set, frozenset):
        return all(map(_is_python_state, value))
    if type(value) is dict:
        return all(map(_is_python_state, [*value, *value.values()]))
    return value is None or type(value) in (bool, int, float, complex, str, bytes)


def _state_kept(root: nn.Module, tracer: _Tracer) -> frozenset[tuple[str, str]]:
    """The attributes that the forward assigns and that had a value before which a graph would not read anew."""
    return frozenset(
        (path, name)
        for path, name in tracer.assigned
        if name in (attributes := root.get_submodule(path).__dict__)
        and not isinstance(attributes[name], Tensor)
    )


def _traced(tracer: _Tracer, root: nn.Module) -> fx.Graph:
    try:
        return tracer.trace(root)
    except CaptureError:
        raise
    except Exception as error:
        kinds = inspect.signature(type(root).forward).parameters.values()
        collects = [
            p.name for p in kinds if p.kind is p.VAR_KEYWORD and p.name in tracer.specialised
        ]
        where = innermost(error.__traceback__)
        file, _, line = where.rpartition(":")
        code = linecache.getline(file, int(line)).strip() if line.isdigit() else ""
        raise CaptureError(
            f"{type(root).__name__} cannot be captured: {tracer._explain(error)}\n"
            f"  at {where or 'an unknown place'}" + (f": {code}" if code else "") + "\n"
            "The forward of the model itself does there what a symbolic trace cannot follow, such as a branch on the "
            "values or shapes of its inputs. Give example_inputs=(...) to capture it by torch.export; or move that "
            "part into a submodule: it is then kept whole, and the rest is rewritten."
            + "".join(
                f" If it needs keywords in **{c}: concrete_args={{{c!r}: torch.fx.PH}}."
                for c in collects
            )
        ) from error


def _forget_proxies(model: nn.Module, root: nn.Module, tracer: _Tracer) -> Iterator[Opaque]:
    """Undo what the traced forward did to the attributes of the copy, and name what the graph will not do."""
    for (path, traced), original in zip(root.named_modules(), model.modules(), strict=False):
        for name in set(original.__dict__) | set(traced.__dict__):
            if name in _ATTRIBUTES_OF_EVERY_MODULE:
                continue
            value = traced.__dict__.get(name)
            assigned = (path, name) in tracer.assigned or (path, name) in tracer.watched
            if not any_proxy(value) and not assigned:
                continue
            if name in original.__dict__:
                traced.__dict__[name] = copy.copy(original.__dict__[name])
            else:
                traced.__dict__.pop(name, None)
            if not assigned:
                reason = "the forward puts tensors into it; the graph does not"
                yield Opaque(path, f"attribute {name!r}", reason)
