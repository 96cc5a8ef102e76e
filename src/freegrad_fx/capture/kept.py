"""State that an exported forward changes: tensors that it assigns to attributes are kept, other changes are refused.

torch.export repeats only what operations do to tensors. While a model is exported, the tensors that its forward assigns
are therefore additional outputs, and the graph assigns them afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from .._torch import exporting, tree
from .._torch.graphs import structures_of, with_structures
from .._torch.modules import buffers_of, children_of, parameters_of
from .._torch.replacing import replaced
from ..graph.provenance import META, Origin
from ..graph.state import ATTRIBUTES_OF_EVERY_MODULE
from ..sites.remarks import Cache, Lost
from .held import MISSING, Change, Held
from .python_state import Attribute
from .refusal import NotExportedError
from .stores import attributes_replaced, is_made_from_state

__all__ = ["Assigned", "Kept"]


@dataclass(frozen=True)
class Kept:
    """An attribute that the forward assigns and that the graph assigns too.

    Attributes:
        path: The path of the module.
        name: The name of the attribute.
        structure: The nesting of the tensors in the value.
        count: The number of tensors in the value.
        is_cache: Whether it is a dict that the forward fills. The graph leaves it empty, and its values must not depend
            on the inputs.
    """

    path: str
    name: str
    structure: Any
    count: int
    is_cache: bool = False


class Assigned:
    """The attributes that a forward assigns while it is exported.

    Args:
        root: The model.

    Attributes:
        kept: The attributes that the graph assigns; see `add_to`.
        lost: Other attributes that the forward only writes.
        places: The names of both, with the paths of their modules.
    """

    def __init__(self, root: nn.Module) -> None:
        self.kept: list[Kept] = []
        self.lost: list[Lost] = []
        self.places: tuple[Attribute, ...] = ()
        self._root = root
        self._modules = {id(module.__dict__): module for module in root.modules()}
        self._held: Held | None = None
        self._read: set[tuple[int, str]] = set()
        self._written: set[tuple[int, str]] = set()
        self._hidden: dict[tuple[int, str], Any] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forward while the block exports the model, and restore afterwards what the model holds.

        Raises:
            NotExportedError: The forward makes a change that the graph would not repeat.
        """
        around = Held(self._root, tensors=True)
        # torch.export interprets the graph of a GraphModule instead of calling the module
        called = not isinstance(self._root, fx.GraphModule)
        handles = (
            self._root.register_forward_pre_hook(self._enter),
            self._root.register_forward_hook(self._leave),
        )
        try:
            with self._reads(), self._writes():
                if called:
                    self._make_buffers()
                yield
            for handle in handles:
                handle.remove()
            # Tensors that are not the model's own attributes are constants of the graph
            changes = around.changes()
            for change in changes if not called else (c for c in changes if c.module is None):
                raise _refused(self._root, change)
        finally:
            for handle in handles:
                handle.remove()
            self._held = None
            self._hidden.clear()
            around.restore()

    def add_to(self, graph: fx.Graph) -> None:
        """Assign the last outputs of an exported graph to the attributes instead of returning them.

        Raises:
            NotExportedError: The forward stores a value that depends on its inputs in a dict.
        """
        if not self.kept:
            return
        output = next(iter(reversed(graph.nodes)))
        flat = list(output.args[0])
        count = sum(kept.count for kept in self.kept)
        values = iter(flat[len(flat) - count :])
        with graph.inserting_before(output):
            for kept in self.kept:
                tensors = [next(values) for _ in range(kept.count)]
                if kept.is_cache:
                    if not is_made_from_state(tensors):
                        raise _refused(self._root, f"{kept.path or 'the root'}: {kept.name!r}")
                    self.lost.append(Cache.of(kept.path, kept.name))
                    continue
                value = tree.unflatten(tensors, kept.structure)
                owner = graph.create_node("get_attr", kept.path or "itself")
                assign = graph.call_function(setattr, (owner, kept.name, value))
                for node in (owner, assign):
                    node.meta[META] = Origin(kept.path, "")
        output.args = (flat[: len(flat) - count],)
        structures = structures_of(graph)
        assert structures is not None
        names, inputs, outputs = structures
        graph.set_codegen(with_structures(names, inputs, outputs.children()[0]))

    # -- the hooks around the forward

    def _enter(self, *_: Any) -> None:
        self._held = Held(self._root, besides=self._hidden_containers())
        self._read.clear()
        self._written.clear()
        self.kept.clear()
        self.lost.clear()
        self.places = ()

    def _leave(self, _: nn.Module, __: Any, output: Any) -> Any:
        assert self._held is not None
        values: list[Tensor] = []
        changes = self._held.changes()
        for path, name, cache in self._caches_filled(changes):
            changes = [c for c in changes if (c.path, c.name) != (path, name)]
            self.kept.append(Kept(path, name, tree.structure(cache), len(cache), is_cache=True))
            values += cache.values()
            self.places = (*self.places, (path, name))
        for change in changes:
            tensors = self._tensors_to_keep(change)
            if tensors is not None:
                structure = tree.structure(change.after)
                self.kept.append(Kept(change.path, change.name, structure, len(tensors)))
                values += tensors
            elif self._is_only_written(change):
                reason = "the forward assigns a value to it; the graph does not"
                self.lost.append(Lost(change.path, f"attribute {change.name!r}", reason))
            else:
                raise _refused(self._root, change)
            self.places = (*self.places, (change.path, change.name))
        self._held.restore()
        return (output, tuple(values)) if self.kept else None

    def _tensors_to_keep(self, change: Change) -> list[Tensor] | None:
        """The tensors that the graph can assign to an attribute instead of the forward; None if it cannot."""
        module, before, after = change.module, change.before, change.after
        if module is None or change.name in {*parameters_of(module), *children_of(module)}:
            return None
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            alike = (before.dtype, before.device) == (after.dtype, after.device)
            same = alike and before.dim() == after.dim() and before.shape == after.shape
            return [after] if same or self._is_only_written(change) else None
        leaves = tree.leaves(after) if after is not MISSING else []
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            return None
        return leaves if _is_plain(after) and self._is_only_written(change) else None

    def _caches_filled(self, changes: list[Change]) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
        """The dicts that the forward found empty and filled with tensors: path of the module, attribute, contents."""
        for path, name in dict.fromkeys((change.path, change.name) for change in changes):
            module = self._root.get_submodule(path)
            now = {**module.__dict__, **self._hidden_of(module)}.get(name)
            if type(now) is not dict or not now:
                continue
            its = [change for change in changes if (change.path, change.name) == (path, name)]
            filled = all(c.module is None and c.before is MISSING for c in its)
            if filled and len(its) == len(now) and _is_plain(now) and _are_tensors(now.values()):
                yield path, name, dict(now)

    def _is_only_written(self, change: Change) -> bool:
        """Whether the forward reads an attribute only after it has assigned it."""
        if change.module is None:
            return False
        key = (id(change.module.__dict__), change.name)
        watched = change.before is MISSING or isinstance(change.before, Tensor)
        watched = watched and not hasattr(type(change.module), change.name)
        return watched and key in self._written and key not in self._read

    # -- what the forward reads and writes

    def _make_buffers(self) -> None:
        """Make tensor attributes buffers, so that export does not make them constants, and take other ones away.

        `nn.Module.__getattr__`, by which reads are noted, is called for buffers and for attributes that do not exist.
        Those that are None are taken away, and containers that a method may replace.
        """
        kinds: set[Any] = {type(module) for module in self._modules.values()}
        # A module can assign an attribute of another one
        assigned = frozenset[str]().union(*map(attributes_replaced, kinds))
        for module in self._modules.values():
            for name, value in list(module.__dict__.items()):
                is_container = type(value) in (list, tuple, dict) and name in assigned
                if (
                    not (value is None or type(value) is Tensor or is_container)
                    or name in ATTRIBUTES_OF_EVERY_MODULE
                    or hasattr(type(module), name)
                    or exporting.is_fake(value)
                ):
                    continue
                del module.__dict__[name]
                if isinstance(value, Tensor) and value.is_leaf:
                    buffers_of(module)[name] = value
                else:
                    self._hidden[id(module.__dict__), name] = value

    def _hidden_of(self, module: nn.Module) -> dict[str, Any]:
        here = id(module.__dict__)
        return {name: value for (owner, name), value in self._hidden.items() if owner == here}

    def _hidden_containers(self) -> Iterator[tuple[str, str, Any]]:
        for path, module in self._root.named_modules():
            for name, value in self._hidden_of(module).items():
                yield path, name, value

    def _reads(self) -> contextlib.AbstractContextManager[None]:
        def noting(read: Callable[[nn.Module, str], Any]) -> Callable[..., Any]:
            def note(module: nn.Module, name: str) -> Any:
                key = (id(module.__dict__), name)
                if key not in self._written:
                    self._read.add(key)
                return self._hidden[key] if key in self._hidden else read(module, name)

            return note

        return exporting.missing_attributes_read_by(noting)

    def _writes(self) -> contextlib.AbstractContextManager[None]:
        def noting(assign: Callable[[nn.Module, str, Any], None]) -> Callable[..., None]:
            def note(module: nn.Module, name: str, value: Any) -> None:
                if id(module.__dict__) in self._modules:
                    self._written.add((id(module.__dict__), name))
                if self._held and isinstance(value, Tensor) and name in buffers_of(module):
                    # Otherwise export would copy the value into the buffer, and only into those of the root
                    buffers_of(module)[name] = value
                else:
                    assign(module, name, value)

            return note

        return replaced(nn.Module, "__setattr__", noting)


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor, or consists of built-in containers of tensors."""
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(type(key) is str for key in value) and all(map(_is_plain, value.values()))
    return isinstance(value, Tensor)


def _are_tensors(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Tensor) for value in values)


def _refused(root: nn.Module, change: Change | str) -> NotExportedError:
    return NotExportedError(
        f"{type(root).__name__} cannot be captured from example_inputs: its forward changes Python state ({change}). "
        f"The graph would not repeat the change at each call.",
        instead="make the state a buffer of constant shape",
    )
