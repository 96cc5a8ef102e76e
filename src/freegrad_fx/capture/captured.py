"""The module that runs captured graphs: a GraphModule with the state, the hooks and the methods of the model.

A plain `fx.GraphModule` drops unused parameters, makes every buffer persistent, reorders the state_dict, loses
submodules that no node refers to when it is copied, and lacks the methods of the model. A `CapturedModule` holds the
complete module tree, and its class inherits from the class of the model. Of rules only `rule_parameters` and `methods`
know.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from .._torch import graphs, modules, tree
from .._torch.dynamo import is_compiling
from ..context import in_the_blocks_of_now, surrounded
from ..errors import CaptureError
from ..graph.marks import Marks
from ..graph.nodes import takes_parameters
from ..graph.serialise import copy_graph, dump_graph, keywords_as_names, load_graph
from ..ops.direct import called_directly
from .constants import (
    CONSTANTS,
    Checks,
    checks_of,
    require_constants,
    require_constants_compiled,
)
from .direct import DIRECT, FUSED, made_later
from .dispatcher import dispatcher
from .hooking import TRACED, Versions
from .methods import warn_in_methods
from .questions import Question, reader
from .rule_parameters import LEARNT, RuleParameters

__all__ = [
    "KEYWORD_ONLY",
    "SPECIALISED",
    "CapturedModule",
    "Variant",
    "sets_grad_mode",
]

SPECIALISED = "_specialised_arguments"
"""The attribute that holds the arguments that are constants of the graphs, with their values."""

KEYWORD_ONLY = "_keyword_only_arguments"
"""The attribute that holds the names of arguments that follow a constant one and have to be given by keyword."""

_BLANK = fx.GraphModule(nn.Module(), fx.Graph()).__dict__
# Attributes of the GraphModule itself, which are not state of the model
_MACHINERY = frozenset(_BLANK.keys() - nn.Module().__dict__.keys() - {"meta"}) | {
    "_variants",
    "_codes",
    "_specs",
    graphs.INPUT_STRUCTURE,
    graphs.OUTPUT_STRUCTURE,
    "graph_lock",
    "_constant_checks",
}


@dataclass(frozen=True)
class Variant:
    """A graph, and the values of the `training` flags and of the global state for which it is valid.

    Attributes:
        flags: The dotted paths of the modules on whose flag the model branches, with the value taken; and the
            questions about the global state that the model asks, with the answer. Empty for a graph that is always
            valid.
        graph: The graph.
        marks: Where the calls of modules begin and end in the graph.
    """

    flags: Mapping[str, Any]
    graph: fx.Graph
    marks: Marks = field(default_factory=Marks)

    @property
    def modes(self) -> dict[str, bool]:
        """The `training` flags, by the path of the module."""
        return {path: on for path, on in self.flags.items() if not isinstance(path, Question)}

    @property
    def answers(self) -> dict[Question, Any]:
        """The answers to questions about the global state."""
        return {asked: value for asked, value in self.flags.items() if isinstance(asked, Question)}

    @property
    def label(self) -> str:
        """The flags as text, ``train`` or ``eval`` if all are equal; ``""`` if there are none."""
        modes = self.modes
        if len(set(modes.values())) == 1:
            parts = ["train" if next(iter(modes.values())) else "eval"]
        else:
            parts = [f"{path or 'root'}={'train' if on else 'eval'}" for path, on in modes.items()]
        return ", ".join([*parts, *(f"{asked} = {value}" for asked, value in self.answers.items())])


class CapturedModule(RuleParameters, fx.GraphModule):
    """A GraphModule with the module tree, the state, the hooks and the methods of the captured model.

    If the model branches on `training` flags, there are several graphs, and each call runs the graph that fits the
    flags. `train()`, `eval()`, and `eval()` on a submodule have the same effect as on the model. The class is a
    subclass of the model's class, so overridden methods (`train`, `state_dict`, extra state) and additional methods
    are available.
    """

    # Every instance has a class of its own, with the generated `forward` of each graph and the class of the model
    _forwards: ClassVar[Mapping[int, tuple[Callable[..., Any], ...]]] = {}
    # For each graph the `training` flags; the questions as functions, with their arguments and answers
    _conditions: ClassVar[tuple[tuple[tuple[Any, ...], tuple[Any, ...]], ...]] = ()
    _model_class: ClassVar[type[nn.Module] | None] = None
    _variants: tuple[Variant, ...]
    graph_lock: threading.RLock
    _constant_checks: Checks | None

    @classmethod
    def build(cls, root: nn.Module, variants: Sequence[Variant], class_name: str) -> CapturedModule:
        """Make a module that runs graphs.

        Args:
            root: A structural copy of the model. The result takes over its state.
            variants: The graphs.
            class_name: The name of the model's class.

        Raises:
            CaptureError: The model has a member with a name that GraphModule reserves.
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
        """The graphs, each with the `training` flags for which it is valid."""
        return self._variants

    @property
    def graph(self) -> fx.Graph:
        """The graph that a call runs with the current `training` flags."""
        return self._variants[self._active()].graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        active = self._active()
        self._variants = tuple(
            replace(variant, graph=graph) if index == active else variant
            for index, variant in enumerate(self._variants)
        )
        self.recompile()

    @property
    def code(self) -> str:
        """The Python code of `graph`."""
        code: str = self._codes[self._active()]
        return code

    @property
    def own_class(self) -> type[nn.Module] | None:
        """The class of the model that was captured; None if that is a graph."""
        return self._model_class

    def own_state(self) -> dict[str, Any]:
        """The attributes of the module that are not those of a GraphModule."""
        return self._state()

    @property
    def itself(self) -> CapturedModule:
        """The module itself. Graphs that assign an attribute of the root refer to it by this name."""
        return self

    def recompile(self) -> Any:
        """Generate `forward` from the graphs."""
        if "forward" in vars(type(self)):
            # Compiled code assumes that the class of a module does not change: a new graph needs a new class
            self.__class__ = _renewed(type(self))
        forwards: list[Callable[..., Any]] = []
        codes, specs = [], []
        result: Any = None
        for index, variant in enumerate(self._variants):
            graphs.set_generated_graph(self, variant.graph)
            variant.graph.owning_module = self
            with keywords_as_names():
                result = super().recompile()
            structures = (graphs.INPUT_STRUCTURE, graphs.OUTPUT_STRUCTURE)
            specs.append(tuple(getattr(self, name, None) for name in structures))
            code = graphs.generated_code(self)
            forwards.append(self._function(code, result.globals, index) or type(self).forward)
            codes.append(code)
        self._specs = tuple(specs)
        self._codes = tuple(codes)
        depends = any(variant.flags for variant in self._variants)
        type(self)._conditions = tuple(map(_conditions, self._variants)) if depends else ()
        guard = any(sets_grad_mode(variant.graph) for variant in self._variants)
        # While one thread calls a module with replaced parameters, no other thread can be allowed to read them
        alone = any(
            takes_parameters(n) and n.args[1] for v in self._variants for n in v.graph.nodes
        )
        # GraphModule wraps its call in error handling that torch.compile cannot trace
        del type(self).__call__
        versions = Versions(self)
        direct = tuple(map(called_directly, forwards))
        type(self)._forwards = {
            0: tuple(forwards),
            DIRECT: direct,
            FUSED: made_later(direct, versions.chooser),
            TRACED: (versions.run_traced,) * len(forwards),
        }
        type(self).forward = dispatcher(
            result.src,
            {**result.globals, "_version": versions.current, "_at_once": versions.chooser.choose},
            len(forwards) > 1 or bool(depends),
            guard,
            alone,
            bool(self.__dict__.get(CONSTANTS)),
            self.__dict__.get(SPECIALISED, {}),
            self.__dict__.get(KEYWORD_ONLY, ()),
        )
        return result

    def _function(self, src: str, names: dict[str, Any], index: int) -> Callable[..., Any] | None:
        """Make the function of the code of a graph, if the structures of its inputs and outputs have to be put in."""
        # Each graph has its own input and output structures
        code = src
        for place, name in enumerate((graphs.INPUT_STRUCTURE, graphs.OUTPUT_STRUCTURE)):
            src = src.replace(f"self.{name}", f"self._specs[{index}][{place}]")
        src = src.replace("fx_pytree.tree_flatten_spec(", "_flattened(")
        if src == code:
            return None
        return graphs.forward_from_source(src, {**names, "_flattened": _flattened}, {})  # type: ignore[no-any-return]

    def forward_of(self, index: int, graph: fx.Graph) -> Callable[..., Any]:
        """The function of a graph that stands for that of a variant."""
        with keywords_as_names():
            code = graph.python_code("self")
        made = self._function(code.src, code.globals, index)
        return made or graphs.forward_from_source(code.src, code.globals, {})

    def has_code_of(self, index: int) -> bool:
        """Whether the code of a variant is that of its graph now, which can have been edited."""
        with keywords_as_names():
            return bool(self._variants[index].graph.python_code("self").src == self._codes[index])

    def add_version(self, number: int, forwards: Sequence[Callable[..., Any]]) -> None:
        """Add a version of the forward: a function for each variant."""
        type(self)._forwards = {**type(self)._forwards, number: tuple(forwards)}

    def run_version(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """Run a version of the forward: see `hooking`."""
        return type(self)._forwards[number][self._active()](self, *args, **kwargs)

    def _require_constants(self) -> None:
        constants = self.__dict__[CONSTANTS]
        if is_compiling():
            for path, values in constants.items():
                module = self.get_submodule(path) if path else self
                require_constants_compiled(module, path, values)
            return
        if self._constant_checks is None:
            self._constant_checks = checks_of(self, constants)
        require_constants(self, constants, self._constant_checks)

    def _one_thread(self) -> contextlib.AbstractContextManager[Any]:
        if is_compiling():
            return contextlib.nullcontext()
        return surrounded(lambda: self.graph_lock)

    def _active(self) -> int:
        conditions = type(self)._conditions
        if not conditions:
            return 0
        for index, (modes, answers) in enumerate(conditions):
            if all(
                bool((self.get_submodule(path) if path else self).training) == on
                for path, on in modes
            ) and all(ask(*args) == answer for ask, args, answer in answers):
                return index
        raise CaptureError(_no_graph(type(self).__name__, self._variants))

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModule:
        # Registered in the memo before the state is copied, because the state can refer to the module
        new = _blank(self._model_class, type(self).__name__)
        memo[id(self)] = new
        _fill(new, copy.deepcopy(self._state(), memo), self._copied_variants())
        new._remember_sources(self)
        return new

    def __copy__(self) -> CapturedModule:
        state = {k: (dict(v) if type(v) is dict else v) for k, v in self._state().items()}
        name = type(self).__name__
        return _assemble(self._model_class, name, state, self._copied_variants())

    def _copied_variants(self) -> tuple[Variant, ...]:
        return tuple(Variant(dict(v.flags), copy_graph(v.graph), v.marks) for v in self._variants)

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            f"torch.jit.script does not support {type(self).__name__}, which freegrad_fx captured: TorchScript has no "
            f"custom backward. Script the original model, which computes the same values with the same parameters."
        )

    def _replicate_for_data_parallel(self) -> CapturedModule:
        new = self.__copy__()
        modules.make_replica(new)
        # Each replica runs in its own thread
        new.__dict__["forward"] = in_the_blocks_of_now(new.forward)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        variants = [(dict(v.flags), dump_graph(v.graph), v.marks) for v in self._variants]
        return _load_module, (self._model_class, type(self).__name__, self._state(), variants)

    def _state(self) -> dict[str, Any]:
        # The compiled call runs this module, so it is not passed on to a copy
        own = _MACHINERY | {modules.COMPILED_CALL}
        return {key: value for key, value in self.__dict__.items() if key not in own}


def _conditions(variant: Variant) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """When a graph is valid, in a form that is fast to check and that Dynamo can trace."""
    answers = tuple((*reader(asked), value) for asked, value in variant.answers.items())
    return tuple(variant.modes.items()), answers


def _no_graph(name: str, variants: Sequence[Variant]) -> str:
    """The message of the error for a call for which no graph is valid."""
    found: dict[Question, list[Any]] = {}
    for variant in variants:
        for asked, value in variant.answers.items():
            found.setdefault(asked, []).append(value)
    now = {asked: ask(*args) for asked in found for ask, args in [reader(asked)]}
    for asked, values in found.items():
        if now[asked] not in values:
            return (
                f"{name} asks for {asked}, which was {' or '.join(map(str, dict.fromkeys(values)))} in the capture and "
                f"is {now[asked]} in this call. Call it in the state of the capture, transform the model in the state "
                f"of the call, or use freegrad_fx.compile(model, rules), which follows such changes."
            )
    known = "; ".join(variant.label for variant in variants)
    return (
        f"{name} was captured for these training flags: {known}. It is called with others. Put these modules in the "
        f"same mode."
    )


def _check_names(root: nn.Module) -> None:
    """Raise `CaptureError` if a member of a model has a name that GraphModule reserves."""
    needed = (set(dir(CapturedModule)) - set(dir(nn.Module))) | _MACHINERY
    needed.discard(LEARNT)  # of the rules that a rewrite has inserted
    members = {
        *modules.children_of(root),
        *modules.parameters_of(root),
        *modules.buffers_of(root),
    }
    methods = {n for n in set(dir(type(root))) - set(dir(nn.Module)) if not n.startswith("__")}
    own = {*root.__dict__, *members, *methods}
    if clashes := sorted((needed & own) | ({"meta"} & members)):
        raise CaptureError(
            f"{type(root).__name__} has members named {', '.join(clashes)}, which are reserved by "
            f"torch.fx.GraphModule. Rename them, or transform a module that holds the model: nn.Sequential(model)."
        )


def _renewed(kind: type[CapturedModule]) -> Any:
    """A new class with the name, the bases and the members of another class."""
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return types.new_class(kind.__name__, kind.__bases__, exec_body=lambda names: names.update(own))


def _blank(model_class: type[nn.Module] | None, class_name: str) -> CapturedModule:
    """An instance without state of a new class. The class is new because it holds the generated code."""
    body = {"__module__": CapturedModule.__module__, "_model_class": model_class}
    bases = (CapturedModule,) if model_class is None else (CapturedModule, model_class)
    try:
        made = types.new_class("GraphModuleImpl", bases, exec_body=lambda names: names.update(body))
    except TypeError:  # a class that cannot be a second base: its methods are not available
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
    own = {"_variants": variants, "graph_lock": threading.RLock(), "_constant_checks": None}
    new.__dict__.update({**machinery, "meta": {}, **state, **own})
    new.recompile()
    warn_in_methods(new, new._model_class)
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
    variants: list[tuple[Any, ...]],
) -> CapturedModule:
    # models saved by earlier releases have no marks
    loaded = tuple(Variant(flags, load_graph(dump), *marks) for flags, dump, *marks in variants)
    return _assemble(model_class, class_name, state, loaded)


def sets_grad_mode(graph: fx.Graph) -> bool:
    """Whether a graph enables or disables gradients."""
    return any(node.target is graphs.grad_mode_setter() for node in graph.nodes)


def _flattened(inputs: Any, spec: tree.TreeSpec) -> list[Any]:
    """The inputs of a call as a flat list. Raise `CaptureError` if their structure differs from the captured one."""
    if isinstance(inputs, tuple) and isinstance(inputs[0], list):
        inputs = (tuple(inputs[0]), inputs[1])  # as FX writes arguments and keyword arguments
    elif isinstance(inputs, list):
        inputs = tuple(inputs)
    try:
        return spec.flatten_up_to(inputs)
    except ValueError as error:
        raise CaptureError(
            f"the inputs have another structure than the example inputs ({error}). Transform the model with example "
            f"inputs of the structure that it is called with."
        ) from error
