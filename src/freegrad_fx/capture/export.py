"""Capture by `torch.export`, from example inputs: for models whose control flow depends on shapes or Python values.

The model is exported in train mode, and in eval mode if its code asks for a `training` flag. If the two graphs differ
only in constants that came from a flag, they are merged into one graph that reads the flag. Otherwise both graphs are
kept.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from .._torch import exporting, settings, tree
from .._torch.modules import has_global_forward_hooks, has_hooks, hooks_of
from ..errors import CaptureError, FreegradWarning
from ..graph.provenance import META, Origin
from ..graph.serialise import LOCK, keywords_as_names
from ..sites.remarks import Lost
from .captured import KEYWORD_ONLY, SPECIALISED, Variant
from .constants import CONSTANTS, constants_read
from .doors import with_remedy
from .examples import distinct
from .guards import Guards, ranks, recorded_guards
from .kept import Assigned
from .merge import Exported, FlagRead, merge
from .outside import Outside, keeps_state, refuse_own_modules
from .patches.flags import noted_flags
from .patches.functions import refused_functions
from .patches.hooks import refused_autograd
from .patches.metadata import keep_checks, noted_metadata
from .patches.questions import noted_questions
from .patches.random import RandomState
from .patches.reads import collected_reads
from .patches.refusals import refused_constants, refused_contexts
from .python_state import PythonState
from .questions import Question
from .refusal import NotExportedError
from .regions import collapse, find, hidden_regions, inline_grad_modes
from .result import Capture

__all__ = ["ADOPTED", "capture_by_export", "inputs_of"]

ADOPTED = "_adopted_attributes"
"""The attribute that holds the names by which a model holds modules and constants that the export created."""


def capture_by_export(
    model: nn.Module,
    root: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | Tensor,
    dynamic_shapes: Any = None,
) -> Capture:
    """Export `root`, the copy of `model`, for both modes.

    Raises:
        CaptureError: The export fails, or the graph would not compute what the model computes.
    """
    args, kwargs = distinct(inputs_of(example_inputs))
    refusal: NotExportedError | None = None
    with LOCK:
        outside = Outside(model, root)
        refuse_own_modules(type(model), outside)
        try:
            with (
                outside.uncached(),
                outside.identities(),
                noted_questions(outside) as answers,
            ):
                captured = _capture(model, root, args, kwargs, dynamic_shapes)
        except NotExportedError as error:
            refusal = error
        finally:
            found = outside.left(exporting.is_symbolic)
    if refusal is not None:
        raise with_remedy(refusal, model, args, kwargs) from refusal.__cause__
    if found:
        raise CaptureError(keeps_state(type(model), found[0]))
    return replace(captured, variants=tuple(_with_answers(captured.variants, answers)))


def _with_answers(
    variants: Iterable[Variant], answers: Mapping[Question, Any]
) -> Iterator[Variant]:
    """The graphs, each valid only for the answers that the forward got; see `questions`.

    Whether a call is compiled or exported is no condition: the forward got the answers of an eager call, so the graph
    computes what an eager call of the model computes, also where it is compiled.
    """
    needed: dict[str, Any] = {
        asked: value
        for asked, value in answers.items()
        if asked.partition("(")[0] not in settings.CAPTURES
    }
    return (Variant({**variant.flags, **needed}, variant.graph) for variant in variants)


def _capture(
    model: nn.Module,
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
) -> Capture:
    if has_global_forward_hooks():
        raise NotExportedError(
            f"{type(model).__name__} cannot be captured from example_inputs while there are forward hooks for all "
            f"modules (register_module_forward_hook, register_module_forward_pre_hook): torch.export would run them "
            f"once and put what they compute into the graph.",
            symbolic=True,
            instead="remove these hooks and register hooks on the modules that need them",
        )
    train, evaluation, reads = _export_both_modes(model, root, args, kwargs, dynamic_shapes)
    differing = [] if train is evaluation else merge(train, evaluation, reads)
    if not differing:
        variants = [Variant({}, train.graph)]
    else:
        variants = [
            Variant(dict.fromkeys(differing, mode), one.graph)
            for mode, one in ((True, train), (False, evaluation))
        ]
    for variant, one in zip(variants, (train, evaluation), strict=False):
        _adopt(root, one, variant.label)
    omitted = _omitted(root, args, kwargs)
    names = list(inspect.signature(type(root).forward).parameters)
    first = min((names.index(name) for name in omitted if name in names), default=len(names))
    following = names[first:]
    root.__dict__[SPECIALISED] = omitted
    root.__dict__[KEYWORD_ONLY] = tuple(name for name in following if name in kwargs)
    regions = (note for one in (train, evaluation) for note in hidden_regions(one))
    return Capture(
        root,
        type(model).__name__,
        tuple(variants),
        tuple(dict.fromkeys(regions)),
        (
            *_hooks_lost(root),
            *_checkpointing_lost(root),
            *dict.fromkeys((*train.lost, *evaluation.lost)),
        ),
    )


def _export_both_modes(
    model: nn.Module,
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
) -> tuple[Exported, Exported, set[FlagRead]]:
    """Export `root` in train and in eval mode, and restore its flags and the random number generators.

    A forward that has read no flag in train mode does the same in eval mode, which is then not exported.

    Returns:
        The graph of train mode, the graph of eval mode, and the flags that were read.

    Raises:
        CaptureError: The export fails, or the forward has an effect that a graph would not repeat.
    """
    flags = {module: module.training for module in root.modules()}
    random, state = RandomState(), PythonState(root)
    try:
        with (
            _without_hooks(root),
            noted_flags(root) as (reads, elsewhere),
            collected_reads(root) as constants,
        ):
            exported = []
            for mode in (True, False):
                for module in flags:  # not root.train(), which a model can override
                    module.__dict__["training"] = mode
                exported.append(_exported(root, args, kwargs, dynamic_shapes))
                # A copy of a module, which has its flag, is made from its dict, or read elsewhere
                if not (reads or elsewhere or any(name == "__dict__" for _, name in constants)):
                    exported.append(exported[0])
                    break
        _refuse_python_effects(model, state, random)
        assigned = [place for one in exported for place in one.assigned]
        parts = [part for one in exported for part in one.parts.values()]
        root.__dict__[CONSTANTS] = constants_read(root, constants, assigned, parts)
    finally:
        random.restore()
        for module, training in flags.items():
            module.training = training
    train, evaluation = exported
    return train, evaluation, reads


def _hooks_lost(root: nn.Module) -> Iterator[Lost]:
    """Drop the hooks of submodules: the graph contains what they computed during the export."""
    for path, module in root.named_modules():
        if path and has_hooks(module):
            for table in hooks_of(module):
                table.clear()
            what = f"the hooks of {type(module).__name__}"
            yield Lost(path, what, "torch.export runs them once and drops them")


def _checkpointing_lost(root: nn.Module) -> Iterator[Lost]:
    """The gradient checkpointing that was enabled in a model of Hugging Face, named once."""
    for path, module in root.named_modules():
        if module.__dict__.get("gradient_checkpointing") is True:
            reason = (
                "the graph contains the operations without the checkpoints, so it saves no memory; "
                "freegrad_fx.compile(model, rules) keeps them"
            )
            yield Lost(path, "gradient_checkpointing", reason)
            return


@contextlib.contextmanager
def _without_hooks(root: nn.Module) -> Iterator[None]:
    """Remove the hooks of the root while it is exported: they run around the graph, so they must not be in it."""
    names = [name for name in root.__dict__ if name.endswith("_hooks") and "state_dict" not in name]
    kept = {name: root.__dict__[name] for name in names}
    for name in names:
        root.__dict__[name] = type(kept[name])()
    try:
        yield
    finally:
        root.__dict__.update(kept)


def _refuse_python_effects(model: nn.Module, state: PythonState, random: RandomState) -> None:
    """Raise `CaptureError` if the forward drew random numbers or changed Python state, which no graph repeats."""
    if random.drawn_from():
        raise NotExportedError(
            f"{type(model).__name__} draws random numbers from outside of PyTorch's tensor functions (random, "
            f"numpy.random, or a generator). A graph would reuse the same numbers at each call.",
            instead="use torch.rand(())",
        )
    if changed := state.changed(exporting.is_symbolic):
        (path, _), what = next(iter(changed.items()))
        raise NotExportedError(
            f"{type(model).__name__} cannot be captured from example_inputs: {what}{f' of {path}' if path else ''}. "
            f"A graph would not repeat the change at each call.",
            instead="make the state a buffer of constant shape",
        )


def _omitted(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that the examples omit, with their defaults, to which the graph is specialised.

    ``**kwargs`` of the forward is one of them: the keywords that the examples do not give.
    """
    parameters = list(inspect.signature(type(root).forward).parameters.values())[1 + len(args) :]
    omitted = {
        p.name: p.default
        for p in parameters
        if p.name not in kwargs and p.default is not p.empty and p.kind is not p.VAR_POSITIONAL
    }
    others: dict[str, Any] = {f"**{p.name}": {} for p in parameters if p.kind is p.VAR_KEYWORD}
    return {**omitted, **{name: v for name, v in others.items() if name[2:] not in kwargs}}


def inputs_of(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments in `example_inputs`."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Tensor):
        return (example,), {}
    raise TypeError(
        f"example_inputs must be a tuple of arguments of the forward, such as (torch.randn(8, 3, 32, 32),), or a dict "
        f"of keyword arguments, got {type(example).__name__}."
    )


def _exported(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Exported:
    """Export `root` in its current mode as one flat graph, with the origin of each node."""
    program, assigned = _export(root, args, kwargs, dynamic_shapes)
    with warnings.catch_warnings(), keywords_as_names(), recorded_guards() as guards:
        warnings.simplefilter("ignore")
        module = program.module()
    graph = module.graph
    inline_grad_modes(module, graph)
    for region in module.modules():
        if isinstance(region, fx.GraphModule):
            keep_checks(region.graph)
    parts: dict[str, Any] = {}
    # The sites of a module with several names have the first name, as in symbolic tracing
    first = {module: path for path, module in root.named_modules()}
    names = {path: first[m] for path, m in root.named_modules(remove_duplicate=False)}
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            parts["guards"] = Guards((*ranks(graph), *guards))
            node.target = "guards"
        elif node.op == "get_attr":
            part = find(module, str(node.target))
            if isinstance(part, nn.Module) or find(root, str(node.target)) is None:
                parts[str(node.target)] = part
        if node.op not in ("placeholder", "output"):
            node.meta[META] = _origin(node, names)
    collapse(graph)
    graph.owning_module = None
    assigned.add_to(graph)
    return Exported(graph, parts, tuple(assigned.lost), assigned.places)


def _export(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> tuple[Any, Assigned]:
    """The exported program. Without `dynamic_shapes` the first dimensions are dynamic if that can be exported."""
    if any(isinstance(v, PackedSequence) for v in tree.leaves((args, kwargs), _is_packed)):
        raise NotExportedError(
            f"{type(root).__name__} cannot be captured from the example inputs: torch.export does not support a "
            f"PackedSequence among them.",
            symbolic=True,
        )
    attempts = (
        [dynamic_shapes]
        if dynamic_shapes is not None
        else [_batch_is_dynamic(root, args, kwargs), None]
    )
    for attempt in attempts:
        assigned = Assigned(root)
        try:
            with (
                warnings.catch_warnings(),
                exporting.quiet(),
                refused_functions(),
                refused_autograd(),
                noted_metadata(converts=attempt is attempts[0]),
                refused_contexts(),
                refused_constants(),
                keywords_as_names(),
                assigned.watching(),
            ):
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", FreegradWarning)
                program = exporting.export(root, args, kwargs, attempt)
            return program, assigned
        except CaptureError:
            raise
        except FreegradWarning as warning:
            raise NotExportedError(
                f"a part of {type(root).__name__} has backward rules already, which torch.export drops.",
                symbolic=True,
                instead="transform the original model as a whole. If the rules come from use() blocks only, transform "
                "with ambient=True",
            ) from warning
        except Exception as error:
            failure = error
    raise NotExportedError(
        f"{type(root).__name__} cannot be captured from the example inputs: {_in_words(failure)}.",
        symbolic=_OUTPUT in str(failure),
    ) from failure


_OUTPUT = "in output, which is not a known type"


def _in_words(failure: Exception) -> str:
    """Why torch.export failed."""
    text = str(failure).strip()
    if "fake tensor in the exported program constant's list" in text:
        return "the forward uses a tensor whose origin torch.export does not know, such as the .data of a tensor"
    if _OUTPUT in text:
        kind = text.partition("<class '")[2].partition("'>")[0]
        if kind.endswith("Cache"):
            return (
                f"it returns a {kind.rpartition('.')[2]}, which torch.export does not support. Add use_cache=False to "
                f"the example inputs (example_inputs={{..., 'use_cache': False}}), or set model.config.use_cache=False"
            )
        return f"it returns an object of the class {kind}, which torch.export does not support"
    return f"torch.export raised {type(failure).__name__}: " + text.partition("\n")[0][:300].rstrip(
        "."
    )


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _batch_is_dynamic(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dynamic shapes: the first dimension of every tensor is dynamic where the model allows it."""

    def spec(value: Any) -> Any:
        return (
            {0: exporting.dynamic_where_possible()}
            if isinstance(value, Tensor) and value.dim()
            else None
        )

    names = [*inspect.signature(root.forward).parameters][: len(args)]
    shapes = tree.map_leaves(spec, (*args,))
    named = tree.map_leaves(spec, kwargs)
    return {**dict(zip(names, shapes, strict=False)), **named}


def _origin(node: fx.Node, names: Mapping[str, str]) -> Origin:
    """The origin of a node of an exported graph."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    paths = (path.partition("@")[0] for path, _ in reversed(stack))
    # Passes of PyTorch create nodes whose stack names no module
    owner = next((names[path] for path in paths if path in names), "")
    source = ""
    for line in map(str.strip, (node.stack_trace or "").splitlines()):
        if line.startswith('File "') and f"{torch.__path__[0]}/" not in line:
            file, _, rest = line.removeprefix('File "').partition('", line ')
            source = f"{file}:{rest.partition(',')[0]}"
    return Origin(owner, source)


def _adopt(root: nn.Module, exported: Exported, label: str) -> None:
    """Add the modules and constants that the export created to the model, under unused names."""
    for target, part in exported.parts.items():
        name = re.sub(r"\W+", "_", f"captured_{label}_{target}".replace("__", "_"))
        while hasattr(root, name):
            name += "_"
        setattr(root, name, part)
        root.__dict__[ADOPTED] = (*root.__dict__.get(ADOPTED, ()), name)
        for node in exported.graph.nodes:
            if node.op in ("get_attr", "call_module") and node.target == target:
                node.target = name
