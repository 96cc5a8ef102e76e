"""The tracer: one symbolic trace of one variant of a model.

The graph reads the `training` flags of modules at run time. A branch on a flag is recorded, because each side of it
needs a graph. A submodule that cannot be traced is kept as one opaque call and listed.
"""

from __future__ import annotations

import inspect
import math
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.proxy import Proxy

from .._torch.graphs import is_erased
from .._torch.modules import has_hooks
from ..errors import CaptureError
from ..graph.marks import Marks, settle, take_marks
from ..graph.provenance import META, Origin, caller, innermost
from ..ops.checks import require_open, require_specialised
from ..sites.remarks import Lost, Opaque, add_once
from ..vocabulary.comparisons import step_at
from ..vocabulary.recognition import recognise
from .arguments import Constant, as_argument, decided, flag_path, refuse_unbuildable
from .attributes import AttributeTracer, KeepsState
from .decorated import call_of, is_decorated
from .identity import Identities
from .inventory import compares_identity, kept_whole
from .marking import begin_call, end_call
from .outside import Outside, is_proxy
from .patches.random import RandomState
from .patches.symbolic import patched
from .proxies import FlagProxy, RecordingProxy, TensorProxy
from .python_state import Attribute
from .questions import Question
from .snapshot import Snapshot

__all__ = ["Tracer"]


class Tracer(AttributeTracer):
    """Traces one variant of a model: one set of values for the `training` flags that the model branches on.

    Args:
        leaf_types: Module classes to keep as one opaque call.
        assumed: The values of `training` flags, by module path, and the answers to questions about the global state.
            Other flags are assumed to be True, and other answers are those of now.
        specialised: The values of the arguments of the forward that are constants.
        concrete_flags: Return the assumed value, not a proxy, where a flag is read. Every read counts as a branch.
        verifies: Return the assumed value where a flag is read, and record no branch. The argument holds the paths of
            modules to keep as one opaque call: those in `siteless` of the tracer whose graph is verified.
        watch_random: Keep a module as one opaque call if it draws random numbers outside of the graph.
        watched: See `AttributeTracer`.
        reshaped: See `AttributeTracer`.
        whole: The paths of modules to keep as one opaque call, with the reason.
        outside: What the forward can reach outside of the model. It is restored where a part of the trace is removed.
        watch_outside: Keep a module as one opaque call if it stores a tensor outside of the model.
        identities: Which results are the proxies of arguments.

    Attributes:
        siteless: The paths of modules that are kept as one opaque call because they branch on their mode and contain
            no site.
        flags: The flags that the forward branched on, with the value taken, and the questions with their answers.
        flags_read: The flags that the forward read as proxies.
        opaque: The calls that were not traced into.
        lost: What the graph does not do.
        made: The proxies of the trace.
        marks: The calls of modules that the trace opened; `unmarked` are those that it could not mark.
        stored: With `watch_outside`, the places outside of the model where the root stored a tensor.
    """

    def __init__(
        self,
        leaf_types: tuple[type[nn.Module], ...],
        assumed: Mapping[str, Any],
        specialised: Mapping[str, Any],
        concrete_flags: bool = False,
        verifies: frozenset[str] | None = None,
        watch_random: bool = False,
        watched: frozenset[Attribute] = frozenset(),
        reshaped: frozenset[str] = frozenset(),
        whole: Mapping[str, str] = MappingProxyType({}),
        outside: Outside | None = None,
        watch_outside: bool = False,
        identities: Identities | None = None,
    ) -> None:
        # All functions of `math` are recorded; FX does so by default for some of them
        super().__init__(watched, reshaped, autowrap_modules=(math,))
        self.leaf_types = leaf_types
        self.assumed = assumed
        self.specialised = specialised
        self.concrete_flags = concrete_flags
        self.verifies = verifies
        self.siteless: set[str] = set()
        self.watch_random = watch_random
        self.whole = whole
        self.outside = outside
        self.watch_outside = watch_outside
        self.stored: list[str] = []
        self.flags: dict[str, Any] = {}
        self.flags_read: set[str] = set()
        self.opaque: list[Opaque] = []
        self.lost: list[Lost] = []
        self.marks = Marks()
        self.unmarked: set[str] = set()
        self.compares_identity = False
        self.identities = identities or Identities()

    # -- methods that torch.fx calls

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace a module. Attributes that it reads and does not use are not in the graph."""
        self.compares_identity = any(map(compares_identity, {type(m) for m in root.modules()}))  # type: ignore[arg-type]
        outside = self.outside
        self.tensors_themselves = self.identities.tensors_themselves or (
            outside is not None and (outside.compares_variables or outside.asks_identity)
        )
        self.look_up(root)
        with torch.set_grad_enabled(True), patched(self):
            graph = super().trace(root, concrete_args)
        if self.refusals:
            raise TypeError(_CAUGHT)
        for proxy in self._attributes.values():
            node = proxy.node
            if node.op == "get_attr" and not is_erased(node) and not node.users:
                graph.erase_node(node)
        settle(graph)
        self.marks = take_marks(graph, frozenset(self.unmarked))
        return graph

    def proxy(self, node: fx.Node) -> Proxy:
        """Make the proxy for the value of a node."""
        proxy = RecordingProxy(node, self)
        self.made.append(weakref.ref(proxy))
        return proxy

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether the call of a module is one node: for modules of torch.nn, scripted modules and `leaf_types`."""
        if isinstance(m, (*self.leaf_types, torch.jit.ScriptModule)):
            return True
        return kept_whole(m)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Make a node, and write its origin on it."""
        if kind == "output":
            self.note_table_writes()
            self.record_assignments()
        node = super().create_node(kind, *args, **kwargs)
        if kind not in ("placeholder", "output"):
            node.meta[META] = Origin(self._owner(), caller())
        return node

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> Proxy:
        """Record a node. A flag that decides whether an operation is in place is a branch."""
        if any(type(a) is FlagProxy for a in (*args, *kwargs.values())):
            args, kwargs = decided(target, args, kwargs)
        proxy: Proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        given = args[0] if args else None
        if (
            type(given) is RecordingProxy
            and type(proxy) is RecordingProxy
            and self.identities.note(proxy.node, given.node, self.root)
        ):
            self.moved.append((given, given.node))
            given.node = proxy.node
            return given
        return proxy

    def note_hash(self, proxy: Proxy) -> None:
        """Note that the forward asks for the hash of a proxy."""
        self.identities.hashed = True
        self.identities.hashed_own |= type(proxy) is TensorProxy

    def create_arg(self, a: Any) -> Any:
        """Make an argument of a node from a value. Subclasses of dict and list are preserved."""
        kind = type(a)
        # Nearly all values; FX asks a dozen questions about each before it returns the same
        if kind in _RECORDED:
            return a.node
        if kind in _PLAIN:
            return a
        if kind is tuple:
            return tuple(map(self.create_arg, a))
        refuse_unbuildable(a)
        # FX would convert it to a plain dict or list
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
            add_once(self.opaque, note)
        return argument

    def to_bool(self, obj: Proxy) -> bool:
        """Return the assumed value of a flag. Raise an error for other proxies, which cannot be branched on."""
        path = flag_path(obj.node)
        if path is None:
            self.refusals += 1
            return super().to_bool(obj)
        return self._taken(path)

    def argument_proxy(self, name: str, default: Callable[[], Any]) -> Any:
        """Make the proxy for an argument of the forward, or the constant that the argument is specialised to."""
        plain = name.lstrip("*")
        if plain not in self.specialised:
            proxy = default()
            if plain == name and self.compares_identity:
                self.create_proxy("call_function", require_open, (proxy, name), {})
            return proxy
        value = self.specialised[plain]
        usual = () if name.startswith("*") else (as_argument(value),)
        proxy = self.create_proxy("placeholder", name, usual, {})
        expected = usual[0] if usual else value
        self.create_proxy("call_function", require_specialised, (proxy, expected, plain), {})
        return Constant(value)

    def create_args_for_root(self, root_fn: Any, *args: Any, **more: Any) -> tuple[Any, list[Any]]:
        """Make the arguments of the forward, including the constants."""
        undecorated = inspect.unwrap(root_fn)
        function, values = super().create_args_for_root(undecorated, *args, **more)
        if is_decorated(root_fn):
            function = call_of(root_fn, self.specialised)
        return function, [v.value if isinstance(v, Constant) else v for v in values]

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Trace into a module, or record its call as one node."""
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        path = (self.submodule_paths or {}).get(m)
        if path is None:
            # Created in a forward, or kept in a list: its operations belong to the caller
            return m.forward(*args, **kwargs)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        if path in (self.verifies or ()):
            return self._call_opaque(m, path, args, kwargs)
        if path in self.whole:
            self._note_opaque(m, path, self.whole[path])
            return self._call_opaque(m, path, args, kwargs)
        if has_hooks(m):  # they run on each call, not on the trace
            forward = m.forward
        return self._trace_or_call_opaque(m, path, forward, args, kwargs)

    # -- methods that the patches call

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
        self.flags_read.add(path)
        name = f"{path}.training" if path else "training"
        return self._attribute(name, lambda node: FlagProxy(node, self))

    def answer(self, question: Question, now: Any) -> Any:
        """See `patches.Recorder`."""
        return self.flags.setdefault(question, self.assumed.get(question, now))

    # -- internals

    def _taken(self, path: str) -> bool:
        """The assumed value of a flag, recorded as a branch."""
        taken: bool = self.flags.setdefault(path, self.assumed.get(path, True))
        return taken

    def _trace_or_call_opaque(
        self, m: nn.Module, path: str, forward: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """Trace into a module; if that fails, or is not needed, keep it as one opaque call."""
        before = Snapshot(self)
        try:
            begin = begin_call(self, m, path, args, kwargs)
            result = end_call(self, m, path, begin, self._trace_into(m, forward, args, kwargs))
        except CaptureError:
            raise
        except Exception as error:
            before.restore()
            self._stored_outside()
            self._note_opaque(m, path, self.explain(error), innermost(error.__traceback__))
            return self._call_opaque(m, path, args, kwargs)
        branches = self.flags.keys() - before.flags.keys()
        if (branches or has_hooks(m)) and not self._has_sites(before, m, forward, args, kwargs):
            # A module that branches on its mode and contains no site (stochastic depth, noise) does not need a graph
            # for each branch if it is kept as one call, and its hooks run in it
            before.restore()
            self.siteless.add(path)
            return self._call_opaque(m, path, args, kwargs)
        return result

    def _trace_into(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Trace into a module.

        Raises:
            TypeError: The module draws random numbers outside of the graph, stores a tensor outside of the model, or
                catches the error of a branch.
        """
        self.stored += self._stored_outside()
        refusals = self.refusals
        random = RandomState() if self.watch_random else None
        with nullcontext() if random is None else random.watching():
            result = super().call_module(m, forward, args, kwargs)
        if random is not None and random.drawn_from():
            random.restore()
            raise TypeError("draws random numbers from outside of PyTorch's tensor functions")
        if stored := self._stored_outside():
            raise TypeError(f"{stored[0]}, which a graph would not repeat")
        if self.refusals != refusals:
            raise TypeError(_CAUGHT)
        return result

    def _stored_outside(self) -> list[str]:
        """With `watch_outside`, restore what was stored or changed outside of the model, and say what it was."""
        watches = self.watch_outside and self.outside is not None
        return self.outside.left(is_proxy) if watches else []  # type: ignore[union-attr]

    def _call_opaque(self, m: nn.Module, path: str, args: Any, kwargs: Any) -> Proxy:
        """Record the call of a module as one node."""
        self.module_stack[path] = (path, type(m))
        try:
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self.module_stack.popitem(last=True)

    def _note_opaque(self, m: nn.Module, path: str, reason: str, source: str = "") -> None:
        what = f"{type(m).__name__}, kept as one opaque call"
        add_once(self.opaque, Opaque(path, what, reason, source))

    def _has_sites(
        self, before: Snapshot, m: nn.Module, forward: Any, args: Any, kwargs: Any
    ) -> bool:
        """Whether the module that was just traced contains a site, on either side of its branches.

        A part of it that could not be traced may contain sites too, and its note has to stay.
        """
        if self._sites_since(before) or len(self.opaque) > len(before.notes[0]):
            return True
        after = Snapshot(self)
        new = {path: value for path, value in self.flags.items() if path not in before.flags}
        assumed = self.assumed
        try:
            for path in [path for path, value in new.items() if isinstance(value, bool)]:
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

    def _sites_since(self, before: Snapshot) -> bool:
        for node in before.new_nodes():
            module = self.root.get_submodule(str(node.target)) if node.op == "call_module" else None
            if recognise(node, module) or step_at(node) or isinstance(module, self.leaf_types):
                return True
        return False

    def _owner(self) -> str:
        return next(reversed(self.module_stack.values()))[0] if self.module_stack else ""

    def explain(self, error: BaseException) -> str:
        """The reason why something cannot be traced, from the error that was raised."""
        if isinstance(error, KeepsState):
            return f"it {error}; make that a buffer"
        if isinstance(error, NameError) and "not a member of this module" in str(error):
            return "it uses a parameter of a module that is not registered; use nn.ModuleList instead of a list"
        first = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first[:200]}"


_RECORDED = frozenset({RecordingProxy, TensorProxy, FlagProxy})
_PLAIN = frozenset({type(None), bool, int, float, str})

_CAUGHT = (
    "the forward branches on the value of a tensor, or keeps state in an attribute, which cannot be traced, and "
    "catches the error that says so"
)
