"""Capture by `torch.export`, from example inputs: for models whose control flow depends on shapes or Python values.

Both modes are exported. Where their graphs differ in nothing but constants that came from a module's `training` flag,
one graph is kept and reads the flag; else both are.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .._torch import exporting, tree
from .._torch.modules import has_hooks
from ..errors import CaptureError, FreegradWarning
from ..graph.provenance import META, Origin
from ..graph.serialise import LOCK, keywords_as_names
from ..graph.state import ATTRIBUTES_OF_EVERY_MODULE
from ..sites.remarks import Lost
from .captured import KEYWORD_ONLY, SPECIALISED, Variant
from .copying import python_state_changed
from .guards import Guards, ranks, recorded_guards
from .merge import Exported, merge
from .patches.flags import noted_flags
from .patches.functions import refused_functions
from .patches.random import RandomState
from .patches.refusals import refused_constants, refused_contexts, refused_questions
from .patches.state import noted_assignments
from .regions import collapse, find, hidden_regions, inline_grad_modes
from .result import Capture

__all__ = ["capture_by_export"]


def capture_by_export(
    model: nn.Module,
    root: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | Tensor,
    dynamic_shapes: Any = None,
) -> Capture:
    """Export `root`, the copy of `model`, in both modes.

    Raises:
        CaptureError: Export fails, or would drop the backward of an `autograd.Function`.
    """
    with LOCK:
        return _capture(model, root, *_inputs(example_inputs), dynamic_shapes)


def _capture(
    model: nn.Module,
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any,
) -> Capture:
    flags = {module: module.training for module in root.modules()}
    random = RandomState()
    try:
        with _without_hooks(root), noted_flags(root) as reads:
            exported = []
            for mode in (True, False):
                for module in flags:  # not root.train(), which a model may override
                    module.__dict__["training"] = mode
                exported.append(_exported(root, args, kwargs, dynamic_shapes))
        _refuse_python_effects(model, root, random)
    finally:
        random.restore()
        for module, training in flags.items():
            module.training = training
    train, evaluation = exported
    differing = merge(train, evaluation, reads)
    if not differing:
        variants = [Variant({}, train.graph)]
    else:
        variants = [
            Variant(dict.fromkeys(differing, mode), one.graph)
            for mode, one in ((True, train), (False, evaluation))
        ]
    for variant, one in zip(variants, exported, strict=False):
        _adopt(root, one, variant.label)
    omitted = _omitted(root, args, kwargs)
    names = list(inspect.signature(type(root).forward).parameters)
    behind = names[min(map(names.index, omitted)) :] if omitted else []
    root.__dict__[SPECIALISED] = omitted
    root.__dict__[KEYWORD_ONLY] = tuple(name for name in behind if name in kwargs)
    return Capture(
        root,
        type(model).__name__,
        tuple(variants),
        tuple(dict.fromkeys(note for one in exported for note in hidden_regions(one))),
        (*_hooks_lost(root), *_forget_fakes(model, root)),
    )


_KEEPS_STATE = (
    "{} cannot be captured: its forward changes Python state ({}), and a graph would do so once and for ever. Make it "
    "a buffer."
)


def _hooks_lost(root: nn.Module) -> Iterator[Lost]:
    for path, module in root.named_modules():
        if path and has_hooks(module):
            what = f"the hooks of {type(module).__name__}"
            yield Lost(path, what, "export runs them once and drops them")


def _forget_fakes(model: nn.Module, root: nn.Module) -> Iterator[Lost]:
    """Undo what the exported forward assigned to attributes: stand-ins of tensors, which the graph does not assign."""
    for (path, run), original in zip(root.named_modules(), model.modules(), strict=False):
        for name, value in list(run.__dict__.items()):
            leaves = tree.leaves(value) if name not in ATTRIBUTES_OF_EVERY_MODULE else []
            if any(map(exporting.is_fake, leaves)):
                if name in original.__dict__:
                    run.__dict__[name] = original.__dict__[name]
                else:
                    del run.__dict__[name]
                reason = "the forward assigns tensors to it; the graph does not"
                yield Lost(path, f"attribute {name!r}", reason)


@contextlib.contextmanager
def _without_hooks(root: nn.Module) -> Iterator[None]:
    """The hooks of the root go on running around the graph; they must not be in it too."""
    names = [name for name in root.__dict__ if name.endswith("_hooks") and "state_dict" not in name]
    kept = {name: root.__dict__[name] for name in names}
    for name in names:
        root.__dict__[name] = type(kept[name])()
    try:
        yield
    finally:
        root.__dict__.update(kept)


def _refuse_python_effects(model: nn.Module, root: nn.Module, random: RandomState) -> None:
    """Raise where the forward did something that a graph would do once and for ever."""
    if random.drawn_from():
        raise CaptureError(
            f"{type(model).__name__} draws random numbers from outside of PyTorch's tensor functions (random, "
            f"numpy.random, or a generator): a graph would repeat one draw for ever. Use torch.rand(())."
        )
    if changed := python_state_changed(model, root):
        path, what = next(iter(changed.items()))
        raise CaptureError(
            _KEEPS_STATE.format(type(model).__name__, f"{path or 'the root'}: {what}")
        )


def _omitted(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a default that the examples leave out; the graph is for their defaults."""
    parameters = list(inspect.signature(type(root).forward).parameters.values())[1 + len(args) :]
    return {
        p.name: p.default
        for p in parameters
        if p.name not in kwargs and p.default is not p.empty and p.kind is not p.VAR_POSITIONAL
    }


def _inputs(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Tensor):
        return (example,), {}
    raise TypeError(
        f"example_inputs is a tuple of the forward's arguments, or a dict of its keyword arguments, got "
        f"{type(example).__name__}: example_inputs=(torch.randn(8, 3, 32, 32),)."
    )


def _exported(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Exported:
    program = _export(root, args, kwargs, dynamic_shapes)
    with warnings.catch_warnings(), keywords_as_names(), recorded_guards() as guards:
        warnings.simplefilter("ignore")
        module = program.module()
    graph = module.graph
    inline_grad_modes(module, graph)
    parts: dict[str, Any] = {}
    # A module under several names has sites under the first, as in symbolic tracing
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
    return Exported(graph, parts)


def _export(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Any:
    attempts = (
        [dynamic_shapes]
        if dynamic_shapes is not None
        else [_batch_is_dynamic(root, args, kwargs), None]
    )
    for attempt in attempts:
        try:
            with (
                warnings.catch_warnings(),
                refused_functions(),
                refused_questions(),
                refused_contexts(),
                refused_constants(),
                keywords_as_names(),
                noted_assignments(root) as assigned,
            ):
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", FreegradWarning)
                program = exporting.export(root, args, kwargs, attempt)
            if assigned:
                raise CaptureError(_KEEPS_STATE.format(type(root).__name__, assigned[0]))
            return program
        except CaptureError:
            raise
        except FreegradWarning as warning:
            raise CaptureError(
                f"a part of {type(root).__name__} has backward rules already, which torch.export drops. Transform the "
                f"model without example_inputs: symbolic tracing keeps them; or transform the original parts at once. "
                f"If its rules are those of use() blocks alone, ambient=True lets the whole model follow them."
            ) from warning
        except Exception as error:
            failure = error
    first = str(failure).strip().partition("\n")[0]
    raise CaptureError(
        f"{type(root).__name__} cannot be captured from the example inputs: torch.export says "
        f"{type(failure).__name__}: {first[:300]}. freegrad_fx.compile(model, rules) takes any program."
    ) from failure


def _batch_is_dynamic(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Leave the first dimension of every tensor to export: dynamic where the model allows it."""

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
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    owner = next(reversed(stack.values()))[0]
    source = ""
    for line in map(str.strip, (node.stack_trace or "").splitlines()):
        if line.startswith('File "') and f"{torch.__path__[0]}/" not in line:
            file, _, rest = line.removeprefix('File "').partition('", line ')
            source = f"{file}:{rest.partition(',')[0]}"
    owner = owner.partition("@")[0]
    return Origin(names.get(owner, owner), source)


def _adopt(root: nn.Module, exported: Exported, label: str) -> None:
    """Give the model the modules and constants that the export made, under names of their own."""
    for target, part in exported.parts.items():
        name = re.sub(r"\W+", "_", f"captured_{label}_{target}".replace("__", "_"))
        while hasattr(root, name):
            name += "_"
        setattr(root, name, part)
        for node in exported.graph.nodes:
            if node.op in ("get_attr", "call_module") and node.target == target:
                node.target = name
