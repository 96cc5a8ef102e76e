"""The result of a capture: a GraphModule that keeps everything the model had, and one graph for each of its modes.

A plain `fx.GraphModule` drops unused parameters, makes every buffer persistent, reorders the state_dict, loses what no
node refers to when it is copied, and has none of the model's methods. This one holds the whole module tree, and its
class inherits from the model's. This file knows nothing of rules.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import threading
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from .._torch import graphs, modules, tree
from .._torch.dynamo import is_compiling
from ..context import in_the_blocks_of_now, surrounded
from ..errors import CaptureError
from ..graph.serialise import GraphDump, copy_graph, dump_graph, keywords_as_names, load_graph
from ..ops.calls import call_with
from ..ops.checks import require_specialised

__all__ = ["KEYWORD_ONLY", "SPECIALISED", "CapturedModule", "Variant", "sets_grad_mode"]

SPECIALISED = "_specialised_arguments"
"""The attribute that holds arguments which the graphs do not take, with the values that the graphs are for."""

KEYWORD_ONLY = "_keyword_only_arguments"
"""The attribute that names the arguments behind the first of those."""

_BLANK = fx.GraphModule(nn.Module(), fx.Graph()).__dict__
# What belongs to the machinery of a GraphModule, not to the model in it.
_MACHINERY = frozenset(_BLANK.keys() - nn.Module().__dict__.keys() - {"meta"}) | {
    "_variants",
    "_codes",
    "_specs",
    graphs.INPUT_STRUCTURE,
    graphs.OUTPUT_STRUCTURE,
    "_graph_lock",
}


@dataclass(frozen=True)
class Variant:
    """A graph, and the values of the modules' `training` flags for which it is right.

    Attributes:
        flags: The dotted paths of modules whose flag the model branches on, with the value taken; empty for a
            graph that is right in every mode.
        graph: The graph.
    """

    flags: Mapping[str, bool]
    graph: fx.Graph

    @property
    def label(self) -> str:
        """The flags as text: ``training`` / ``eval`` where they are all the same."""
        if not self.flags:
            return ""
        if len(set(self.flags.values())) == 1:
            return "train" if next(iter(self.flags.values())) else "eval"
        return ", ".join(
            f"{path or 'root'}={'train' if on else 'eval'}" for path, on in self.flags.items()
        )


class CapturedModule(fx.GraphModule):
    """A GraphModule with the module tree, the state, the hooks and the methods of the model it was captured from.

    Where the model branches on a module's `training` flag there are several graphs, and each call runs the one that
    fits the flags: `train()`, `eval()`, and `eval()` on a part alone, mean what they mean on the model. Its class is a
    subclass of the model's, so that what the model's class overrides (`train`, `state_dict`, extra state) and adds is
    there.
    """

    # Of the one class that every instance has to itself: for each graph its generated `forward`, and the model's class.
    _forwards: ClassVar[tuple[Callable[..., Any], ...]] = ()
    _model_class: ClassVar[type[nn.Module] | None] = None
    _variants: tuple[Variant, ...]
    _graph_lock: threading.RLock

    @classmethod
    def build(cls, root: nn.Module, variants: Sequence[Variant], class_name: str) -> CapturedModule:
        """Make one.

        Args:
            root: A structural copy of the model; it is taken over.
            variants: The graphs.
            class_name: The name of the model's class.

        Raises:
            CaptureError: The model uses a name that a GraphModule needs.
        """
        model_class: type[nn.Module] | None = type(root)
        if isinstance(root, CapturedModule):
            model_class = root._model_class
        elif isinstance(root, fx.GraphModule | torch.jit.ScriptModule):
            model_class = None
        else:
            _check_names(root)
        state = {key: value for key, value in root.__dict__.items() if key not in _MACHINERY}
        return _assemble(model_class, class_name, state, tuple(variants))

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The graphs, each with the `training` flags for which it is right."""
        return self._variants

    @property
    def graph(self) -> fx.Graph:
        """The graph that a call would run now."""
        return self._variants[self._active()].graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        active = self._active()
        self._variants = tuple(
            Variant(variant.flags, graph) if index == active else variant
            for index, variant in enumerate(self._variants)
        )
        self.recompile()

    @property
    def code(self) -> str:
        """The Python code of the graph that a call would run now."""
        code: str = self._codes[self._active()]
        return code

    @property
    def itself(self) -> CapturedModule:
        """The module: graphs that assign an attribute of the root name it so."""
        return self

    def recompile(self) -> Any:
        """Generate `forward` anew from the graphs."""
        if "forward" in vars(type(self)):
            # Compiled code trusts the class of a module that it calls to stay as it is: a new graph needs a new class
            self.__class__ = _renewed(type(self))
        forwards, codes, specs = [], [], []
        result: Any = None
        for index, variant in enumerate(self._variants):
            graphs.set_generated_graph(self, variant.graph)
            variant.graph.owning_module = self
            with keywords_as_names():
                result = super().recompile()
            structures = (graphs.INPUT_STRUCTURE, graphs.OUTPUT_STRUCTURE)
            specs.append(tuple(getattr(self, name, None) for name in structures))
            # Each graph has input and output structures of its own
            code = src = graphs.generated_code(self)
            for place, name in enumerate(structures):
                src = src.replace(f"self.{name}", f"self._specs[{index}][{place}]")
            src = src.replace("fx_pytree.tree_flatten_spec(", "_flattened(")
            if src == code:
                forwards.append(type(self).forward)  # which FX has just made
            else:
                names = {**result.globals, "_flattened": _flattened}
                forwards.append(graphs.forward_from_source(src, names, {}))
            codes.append(code)
        self._specs = tuple(specs)
        self._codes = tuple(codes)
        guard = any(sets_grad_mode(variant.graph) for variant in self._variants)
        # While one thread calls a module with other tensors for its parameters, no other may read these
        alone = any(n.target is call_with for v in self._variants for n in v.graph.nodes)
        # The call that GraphModule wraps around its own handles errors in a way that torch.compile cannot trace
        del type(self).__call__
        specialised = self.__dict__.get(SPECIALISED, {})
        if len(forwards) == 1 and not guard and not alone and not specialised:
            type(self).forward = forwards[0]
        else:
            type(self)._forwards = tuple(forwards)
            type(self).forward = _dispatcher(
                result.src,
                result.globals,
                guard,
                alone,
                specialised,
                self.__dict__.get(KEYWORD_ONLY, ()),
            )
        return result

    def _one_thread(self) -> contextlib.AbstractContextManager[Any]:
        if is_compiling():
            return contextlib.nullcontext()
        return surrounded(lambda: self._graph_lock)

    def _active(self) -> int:
        if len(self._variants) == 1:
            return 0
        for index, variant in enumerate(self._variants):
            if all(
                bool((self.get_submodule(path) if path else self).training) == on
                for path, on in variant.flags.items()
            ):
                return index
        known = "; ".join(variant.label for variant in self._variants)
        raise CaptureError(
            f"{type(self).__name__} was captured for these training flags: {known}; and is called with others. "
            f"Put these modules in one mode together."
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        # Entered in the memo before the state is copied, which may refer to it
        new = _blank(self._model_class, type(self).__name__)
        memo[id(self)] = new
        return _fill(new, copy.deepcopy(self._state(), memo), self._copied_variants())

    def __copy__(self) -> CapturedModule:
        state = {k: (dict(v) if type(v) is dict else v) for k, v in self._state().items()}
        name = type(self).__name__
        return _assemble(self._model_class, name, state, self._copied_variants())

    def _copied_variants(self) -> tuple[Variant, ...]:
        return tuple(Variant(dict(v.flags), copy_graph(v.graph)) for v in self._variants)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"torch.jit.script cannot take {type(self).__name__}, which freegrad_fx captured: TorchScript has no "
            f"custom backward. Script the original model: it computes the same values, with the same parameters."
        )

    def _replicate_for_data_parallel(self) -> CapturedModule:
        new = self.__copy__()
        modules.make_replica(new)
        # it runs in a thread of its own
        new.__dict__["forward"] = in_the_blocks_of_now(new.forward)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        variants = [(dict(v.flags), dump_graph(v.graph)) for v in self._variants]
        return _load_module, (self._model_class, type(self).__name__, self._state(), variants)

    def _state(self) -> dict[str, Any]:
        # What compile() leaves there runs this module, not the one that the state is for
        own = _MACHINERY | {modules.COMPILED_CALL}
        return {key: value for key, value in self.__dict__.items() if key not in own}


def _check_names(root: nn.Module) -> None:
    """Refuse a model whose own names are those that a GraphModule needs for itself."""
    needed = (set(dir(CapturedModule)) - set(dir(nn.Module))) | _MACHINERY
    members = {
        *modules.children_of(root),
        *modules.parameters_of(root),
        *modules.buffers_of(root),
    }
    methods = {n for n in set(dir(type(root))) - set(dir(nn.Module)) if not n.startswith("__")}
    own = {*root.__dict__, *members, *methods}
    if clashes := sorted((needed & own) | ({"meta"} & members)):
        raise CaptureError(
            f"{type(root).__name__} has members named {', '.join(clashes)}, which torch.fx.GraphModule needs for "
            f"itself. Rename them, or transform a module that holds the model: nn.Sequential(model)."
        )


def _renewed(kind: type[CapturedModule]) -> Any:
    """A class that is another one, and the same."""
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return types.new_class(kind.__name__, kind.__bases__, exec_body=lambda names: names.update(own))


def _blank(model_class: type[nn.Module] | None, class_name: str) -> CapturedModule:
    """An instance of a class of its own, without state: generated code belongs to the class."""
    body = {"__module__": CapturedModule.__module__, "_model_class": model_class}
    bases = (CapturedModule,) if model_class is None else (CapturedModule, model_class)
    try:
        made = types.new_class("GraphModuleImpl", bases, exec_body=lambda names: names.update(body))
    except TypeError:  # a class that cannot be inherited from so: its methods stay behind
        made = types.new_class(
            "GraphModuleImpl", bases[:1], exec_body=lambda names: names.update(body)
        )
    made.__name__ = class_name
    new: CapturedModule = object.__new__(made)
    return new


def _fill(
    new: CapturedModule, state: dict[str, Any], variants: tuple[Variant, ...]
) -> CapturedModule:
    machinery = {k: copy.copy(v) for k, v in _BLANK.items() if k in _MACHINERY}
    own = {"_variants": variants, "_graph_lock": threading.RLock()}
    new.__dict__.update({**machinery, "meta": {}, **state, **own})
    new.recompile()
    return new


def _assemble(
    model_class: type[nn.Module] | None,
    class_name: str,
    state: dict[str, Any],
    variants: tuple[Variant, ...],
) -> CapturedModule:
    return _fill(_blank(model_class, class_name), state, variants)


def _load_module(
    model_class: type[nn.Module] | None,
    class_name: str,
    state: dict[str, Any],
    variants: list[tuple[dict[str, bool], GraphDump]],
) -> CapturedModule:
    loaded = tuple(Variant(flags, load_graph(dump)) for flags, dump in variants)
    return _assemble(model_class, class_name, state, loaded)


def sets_grad_mode(graph: fx.Graph) -> bool:
    """Whether a graph enables or disables gradients by itself."""
    return any(node.target is graphs.grad_mode_setter() for node in graph.nodes)


def _flattened(inputs: Any, spec: tree.TreeSpec) -> list[Any]:
    """The inputs of a call as a flat list; raise `CaptureError` where their structure is not the captured one."""
    if isinstance(inputs, tuple) and isinstance(inputs[0], list):
        inputs = (tuple(inputs[0]), inputs[1])  # as FX writes arguments and keyword arguments
    elif isinstance(inputs, list):
        inputs = tuple(inputs)
    try:
        return spec.flatten_up_to(inputs)
    except ValueError as error:
        raise CaptureError(
            f"the model was captured for inputs of another structure ({error}). Transform it with example inputs of "
            f"the structure you call it with."
        ) from error


def _dispatcher(
    src: str,
    names: dict[str, Any],
    guard: bool,
    alone: bool,
    specialised: Mapping[str, Any],
    keyword_only: Collection[str],
) -> Any:
    """A `forward` with the signature of the generated ones, that runs the one that fits the training flags.

    Args:
        src: The source of one of them.
        names: What that source refers to.
        guard: Restore the grad mode even if the graph raises between two changes of it.
        alone: Let one thread run it at a time.
        specialised: Further arguments, with the one value that each may have.
        keyword_only: Arguments that are given by keyword.
    """
    signature = next(n for n in ast.walk(ast.parse(src)) if isinstance(n, ast.FunctionDef)).args
    arguments = [a.arg for a in (*signature.posonlyargs, *signature.args)]
    arguments += [f"*{signature.vararg.arg}"] if signature.vararg else []
    arguments += [f"{a.arg}={a.arg}" for a in signature.kwonlyargs]
    arguments += [f"**{signature.kwarg.arg}"] if signature.kwarg else []
    call = f"return type(self)._forwards[self._active()]({', '.join(arguments)})"
    contexts = ["torch.set_grad_enabled(torch.is_grad_enabled())"] * guard
    contexts += ["self._one_thread()"] * alone
    if contexts:
        call = f"with {', '.join(contexts)}:\n        {call}"
    remedy = "Put the argument into the example_inputs that the model is transformed with."
    own: dict[str, Any] = {"torch": torch, "_remedy": remedy}
    own["_require_specialised"] = require_specialised
    checks = ""
    # An argument behind one that is left out is given by keyword alone: its place is not that of the model's forward
    first = next((i for i, a in enumerate(signature.args) if a.arg in keyword_only), None)
    if first is not None:
        signature.kwonlyargs = signature.args[first:]
        signature.kw_defaults = [None] * len(signature.kwonlyargs)
        signature.args = signature.args[:first]
    parameters = ast.unparse(signature)
    for number, (name, value) in enumerate(specialised.items()):
        own[f"_default_{number}"] = value
        separator = ", *, " if number == 0 and keyword_only and not signature.kwonlyargs else ", "
        parameters += f"{separator}{name}=_default_{number}"
        checks += f"    _require_specialised({name}, _default_{number}, {name!r}, _remedy)\n"
    body = f"def forward({parameters}):\n{checks}    {call}\n"
    return graphs.forward_from_source(body, {**names, **own}, {})
