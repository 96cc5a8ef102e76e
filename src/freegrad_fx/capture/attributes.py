"""The part of a tracer that knows the attributes of the modules: what the forward reads of them, and what it assigns.

A graph assigns at its end what the forward assigned, so that the next call reads it. This holds for a tensor that takes
the place of a tensor. What else the forward reads before it assigns it would be a constant of the graph.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy

from .._torch import graphs
from .._torch.graphs import is_erased
from .._torch.modules import buffers_of, children_of, parameters_of
from .arguments import is_written_in_place
from .inventory import held_tensors, tensor_names
from .outside import is_proxy
from .proxies import RecordingProxy, TensorProxy, any_proxy
from .python_state import Attribute

__all__ = ["AttributeTracer", "KeepsState"]

# Methods that change the shape of a tensor, which is the same object afterwards
_RESHAPING = frozenset(
    {
        *("resize_", "resize_as_", "set_", "t_", "transpose_", "swapaxes_", "swapdims_"),
        *("squeeze_", "unsqueeze_", "as_strided_"),
    }
)


class KeepsState(TypeError):
    """A forward reads an attribute that it changes, and that a graph would not change."""


class AttributeTracer(graphs.Tracer):
    """A tracer that records reads and assignments of attributes.

    Args:
        watched: Attributes that the forward changes and a graph does not. Reading one before it is assigned raises.
        reshaped: The dotted names of tensors whose shape and dtype are read at run time, because the forward assigns
            them. The shapes of other tensors of the model are constants.

    Attributes:
        assigned: The attributes that the forward assigned, with the values.
        read_first: The attributes that the forward read, or asked for, before it assigned them. If the name is
            ``"__dict__"``, it read all of them.
        described: The dotted names of the tensors whose shape or the like is a constant of the graph.
        tensors_themselves: Whether the forward reads parameters and buffers themselves, because it may compare one by
            `is` or `id` with one that it got otherwise, for example from `parameters()`. Operations on a tensor of the
            model are recorded, too.
        moved: The proxies that have become the results of calls, with the nodes that they had before.
    """

    def __init__(
        self, watched: frozenset[Attribute], reshaped: frozenset[str], **options: Any
    ) -> None:
        super().__init__(**options)
        self.watched = watched
        self.reshaped = reshaped
        self.thread = threading.get_ident()
        self.tensors_themselves = False
        self.refusals = 0
        self.assigned: dict[Attribute, Any] = {}
        self.read_first: dict[Attribute, None] = {}  # in the order of the reads
        self.described: set[str] = set()
        self.made: list[weakref.ref[Proxy]] = []
        self.moved: list[tuple[Proxy, fx.Node]] = []
        self._attributes: dict[str, Proxy] = {}
        self._tensor_names: dict[int, str] = {}
        self._held: set[int] = set()
        self._tables: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}

    def look_up(self, root: nn.Module) -> None:
        """Look up the tensors of a model before it is traced."""
        modules = dict(root.named_modules())
        self._tensor_names = tensor_names(modules)
        self._held = held_tensors(modules.values())
        self._tables = {
            path: [(table, dict(table)) for table in (buffers_of(module), parameters_of(module))]
            for path, module in modules.items()
            if isinstance(buffers_of(module), dict)  # that of a scripted module cannot be changed
        }

    def forget_proxies(self) -> None:
        """Drop the proxies of a finished trace. The names in `assigned` remain."""
        self._attributes.clear()
        self.moved.clear()
        self.assigned = dict.fromkeys(self.assigned)

    def set_by_the_trace(self) -> set[Attribute]:
        """The attributes that the graph assigns, and those in which FX stores the constants of a graph."""
        constants = (n for n in self.tensor_attrs.values() if n.startswith("_tensor_constant"))
        return {*self.assigned, *(("", name) for name in constants)}

    def state_kept(self, root: nn.Module) -> frozenset[Attribute]:
        """The attributes that the forward reads and then assigns, if what it reads would become a constant."""
        return frozenset(
            (path, name)
            for path, name in self.assigned
            if not {(path, name), (path, "__dict__")}.isdisjoint(self.read_first)
            and not isinstance(_value(root.get_submodule(path), name), Tensor)
        )

    def shapes_that_change(self) -> frozenset[str]:
        """The dotted names of tensors whose shape is a constant of the graph although the forward may change it."""
        changed = {_dotted(*place) for place in self.assigned}
        for node in self.graph.nodes if self.described else ():
            if node.op == "call_method" and node.target in _RESHAPING:
                changed.add(str(getattr(node.args[0], "target", "")))
        return frozenset(self.described & changed)

    # -- methods that torch.fx calls

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return a proxy in place of a parameter or buffer of a module.

        With `tensors_themselves`, a proxy is returned only for what the forward assigned or gives another shape.
        """
        if threading.get_ident() != self.thread or not isinstance(attr_val, Tensor):
            return attr_val
        proxy = self.known_tensor(attr_val)
        itself = proxy is None or (self.tensors_themselves and type(proxy) is TensorProxy)
        return attr_val if itself else proxy

    # -- methods that the patches call

    def known_tensor(self, tensor: Tensor) -> Proxy | None:
        """See `patches.Recorder`."""
        name = self._tensor_names.get(id(tensor))
        if name is None:
            return None
        if name in self.reshaped:
            return self._attribute(name, lambda node: RecordingProxy(node, self))
        return self._attribute(name, lambda node: TensorProxy(node, self, tensor))

    def describe(self, proxy: Any) -> bool:
        """See `patches.Recorder`."""
        if type(proxy) is not TensorProxy:
            return False
        self.described.add(str(proxy.node.target))
        return True

    def is_held(self, tensor: Tensor) -> bool:
        """See `patches.Recorder`."""
        return id(tensor) in self._held

    def read(self, module: nn.Module, name: str) -> None:
        """See `patches.Recorder`."""
        path = (getattr(self, "submodule_paths", None) or {}).get(module)
        if path is None or (path, name) in self.assigned:
            return
        self.read_first[path, name] = None
        for other, state in self.watched:
            if path == other and name in (state, "__dict__"):
                self.refusals += 1  # the forward can catch the error
                raise KeepsState(f"keeps state in the attribute {state!r} between calls")

    def assign(self, module: nn.Module, name: str, value: Any) -> bool:
        """See `patches.Recorder`."""
        paths = getattr(self, "submodule_paths", None)
        if paths is None or module not in paths:
            return False
        path = paths[module]
        if name in parameters_of(module) or name in children_of(module):
            return False
        buffers = buffers_of(module)
        if not any_proxy(value):
            if name in buffers and value is not buffers[name]:
                raise TypeError(f"the forward replaces the buffer {name!r} by what is not traced")
            return False
        self.assigned[path, name] = value
        if name in buffers and buffers[name] is None:
            buffers[name] = value
            return True
        if name not in buffers:
            # The copy is assigned too, so that the rest of the forward reads the value
            return False
        self._attributes[_dotted(path, name)] = value
        return True

    # -- internals

    def note_table_writes(self) -> None:
        """Note what the forward stored in the tables of buffers without `__setattr__`: `self._buffers["n"] += 1`.

        Raises:
            TypeError: The forward registers a new buffer, or replaces a parameter or buffer by what is not traced.
        """
        for path, tables in self._tables.items():
            for is_buffer, (table, before) in zip((True, False), tables, strict=True):
                kind = "buffer" if is_buffer else "parameter"
                for name in {**before, **table}:
                    now, old = table.get(name, ...), before.get(name, ...)
                    if now is old:
                        continue
                    if old is ...:
                        raise TypeError(f"the forward registers the {kind} {name!r}")
                    if is_proxy(now) and is_written_in_place(now.node, _dotted(path, name)):
                        continue
                    if not (is_proxy(now) and is_buffer):
                        raise TypeError(f"the forward replaces the {kind} {name!r}")
                    self.assigned[path, name] = now

    def restore_tables(self, is_traced: Callable[[Any], bool] | None = None) -> None:
        """Put the parameters and buffers back; only those in the place of traced values if `is_traced` tells them."""
        for tables in self._tables.values():
            for table, before in tables:
                if all(map(_same, table.items(), before.items())) and len(table) == len(before):
                    continue
                if is_traced is None:
                    table.clear()
                    table.update(before)
                for name, now in list(table.items()):
                    if is_traced is not None and is_traced(now) and name in before:
                        table[name] = before[name]

    def record_assignments(self) -> None:
        """Record at the end of the graph what the forward assigned."""
        for (path, name), value in self.assigned.items():
            owner = self.create_proxy("get_attr", path or "itself", (), {})
            self.create_proxy("call_function", setattr, (owner, name, value), {})

    def _attribute(self, name: str, make: Callable[[fx.Node], Proxy]) -> Proxy:
        proxy = self._attributes.get(name)
        if proxy is None or is_erased(proxy.node):
            proxy = self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=make)
            self._attributes[name] = proxy
            self.made.append(weakref.ref(proxy))
        return proxy


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _value(module: nn.Module, name: str) -> Any:
    return module.__dict__.get(name, buffers_of(module).get(name))


def _same(pair: tuple[str, Any], other: tuple[str, Any]) -> bool:
    return pair[0] == other[0] and pair[1] is other[1]
