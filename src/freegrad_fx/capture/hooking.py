"""Versions of the forward of a captured model: one for each set of modules that have hooks.

A graph has opened the calls of modules, so their hooks would not run, or without their derivative. The marks of the
graph show where these calls begin and end. The first call with hooks on other modules makes another version of the
graph, in which the marked calls of these modules run their hooks. A call without such hooks only checks that there are
none.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import fx, nn

from .._torch import tree
from .._torch.dynamo import add_guard, is_compiling, takes_for_constant
from .._torch.graphs import is_fx_tracing
from .._torch.modules import HOOKS_OF_ALL, children_of, hooks_of
from ..backward.hazards import is_sharded
from ..errors import CaptureError, FreegradWarning
from ..graph.hooked import read_parameters_late, run_hooks_at
from ..graph.marks import calls, insert_marks, take_marks
from ..graph.nodes import called_path, takes_parameters
from ..graph.provenance import origin
from ..graph.serialise import copy_graph
from ..ops.hooked import with_hooks_on_errors
from .direct import DIRECT, Chooser
from .scopes import names_by_scope, run_in_scopes

__all__ = ["TRACED", "Versions"]

TRACED = -1
"""The version for a call that is traced by `torch.fx`."""


class Versions:
    """Chooses the version of the forward that a call runs. Version 0 is the graph without hooks.

    Args:
        module: The captured model. Modules that are exchanged later are followed after `recompile()`,
            and refused before it if they are of another class.

    Attributes:
        current: Returns the number of the version. A function, because `torch.compile` takes its result for a constant.
        chooser: Chooses the version of nearly every call.
    """

    def __init__(self, module: Any) -> None:
        self.module = weakref.ref(module)
        self.marked = frozenset[str]().union(*(v.marks.paths for v in module.variants))
        self.numbers: dict[frozenset[str], int] = {frozenset(): 0}
        self.warned: set[str] = set()
        opened = list(_opened(module, self.marked))
        self.tables = {path: hooks_of(part) for path, part in opened}
        self.chooser = Chooser()
        kept = self.chooser.of_model
        tables = kept.tables
        tables.extend(table for of_one in self.tables.values() for table in of_one)
        tables.extend(HOOKS_OF_ALL)
        for path, part in opened:
            if path:
                holder, _, name = path.rpartition(".")
                kept.add(children_of(module.get_submodule(holder)), name, part)
        self.parts = [(path, part) for path, part in opened if path]

        def current() -> int:
            number = DIRECT
            if not kept.same_parts():
                self.refuse_others()
            if is_fx_tracing():
                number = TRACED
            elif any(tables):
                number = self.find()
            if is_compiling():
                wanted = self.wanted()
                add_guard(lambda _: self.wanted() == wanted, "the modules that have hooks")
                number = 0 if number == DIRECT else number
            return number

        self.current: Callable[[], int] = takes_for_constant(current)

    def refuse_others(self) -> None:
        """Raise `CaptureError` if an opened module was exchanged for one of another class, which would not run."""
        kept = self.chooser.of_model
        for holder, name, (path, part) in zip(kept.holders, kept.names, self.parts, strict=True):
            now = holder.get(name)
            if now is not None and type(now) is not type(part):
                kind, other = (f"{type(m).__module__}.{type(m).__qualname__}" for m in (part, now))
                raise CaptureError(
                    f"{path} of this transformed model was a {kind} and has been exchanged for a {other}, which would "
                    f"not run: the graph has the operations of the {kind}. Exchange it in the original model, before "
                    f"it is transformed; or exchange it there and use freegrad_fx.use(rules, model=model)."
                )

    def wanted(self) -> frozenset[str]:
        """The paths of the modules whose hooks have to run."""
        if any(HOOKS_OF_ALL):
            return self.marked | frozenset(self._with_hooks())
        return frozenset(self._with_hooks())

    def _with_hooks(self) -> Iterator[str]:
        return (path for path, tables in self.tables.items() if any(tables))

    def find(self) -> int:
        """The number of the version for the hooks of now, which is made if there is none."""
        wanted = self.wanted()
        number = self.numbers.get(wanted)
        return self._make(wanted) if number is None else number

    def _make(self, wanted: frozenset[str]) -> int:
        module: Any = self.module()
        with module.graph_lock:
            graphs, lost = [], set(wanted - self.marked)
            for variant in module.variants:
                graph = copy_graph(variant.graph)
                if insert_marks(graph, variant.marks):
                    lost |= wanted & variant.marks.unmarked
                    for begin, end in calls(graph):
                        if begin.args[0] in wanted:
                            run_hooks_at(begin, end)
                    take_marks(graph)
                    if sharded := [p for p in wanted if is_sharded(module.get_submodule(p))]:
                        read_parameters_late(graph, sharded)
                else:
                    lost |= wanted
                graphs.append(graph)
            self._warn(module, sorted(lost - self.warned))
            number = self.numbers.setdefault(wanted, max(self.numbers.values()) + 1)
            forwards = (module.forward_of(index, graph) for index, graph in enumerate(graphs))
            module.add_version(number, [*map(with_hooks_on_errors, forwards)])
        return number

    def _warn(self, module: nn.Module, lost: list[str]) -> None:
        self.warned.update(lost)
        for path in lost:
            part = module.get_submodule(path)
            kind = type(part).__name__
            if is_sharded(part):
                raise RuntimeError(
                    f"fully_shard was applied to {path} ({kind}), a part of this transformed model, and the graph does "
                    f"not show where the calls of {path} begin and end, so that its parameters would not be gathered. "
                    f"{_UNMARKED} Shard the transformed model as a whole, fully_shard(gm); or transform the part by "
                    f"itself before it is sharded; or give the rules with use(rules, model=model) or "
                    f"compile(model, rules)."
                )
            warnings.warn(
                f"the hooks of {path} ({kind}) do not run at every call: the graph of this transformed model does not "
                f"show where the calls of {path} begin and end. {_UNMARKED} Transform the model "
                f"without example_inputs; or register the hooks on the original model and use "
                f"freegrad_fx.compile(model, rules).",
                FreegradWarning,
                stacklevel=2,
            )

    def run_traced(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the forward while `torch.fx` traces it."""
        given = tree.leaves((args, kwargs))
        tracer = next((value.tracer for value in given if isinstance(value, fx.Proxy)), None)
        if names_by_scope(tracer) and not kwargs:
            return run_in_scopes(module, tracer, args)
        return module.run_version(self.find(), *args, **kwargs)


_UNMARKED = (
    "This is so for models that were captured from example_inputs, transformed twice, or changed by hand, and for "
    "calls whose arguments or results are objects that a graph cannot hold."
)


def _opened(module: Any, marked: frozenset[str]) -> Iterable[tuple[str, nn.Module]]:
    """The modules of a captured model with calls that are no node of a graph, by their paths."""
    nodes = [node for variant in module.variants for node in variant.graph.nodes]
    called = {called_path(n) for n in nodes if n.op == "call_module" or takes_parameters(n)}
    owners: set[str] = set()
    for owner in {origin(node).owner for node in nodes}:
        owners.update(_with_parents(owner))
    for path, part in module.named_modules():
        inside = not called.isdisjoint(_with_parents(path))
        if path in marked or (path in owners and not inside):
            yield path, part


def _with_parents(path: str) -> list[str]:
    steps = path.split(".") if path else []
    return [".".join(steps[:n]) for n in range(1, len(steps) + 1)]
