"""Capture by `torch.export`, from example inputs: for models whose control flow depends on shapes or Python values.

Both modes are exported. Where their graphs differ in nothing but constants that came from a module's `training` flag,
one graph is kept and reads the flag; else both are.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import has_torch_function

from .._torch import exporting, tree
from .._torch.graphs import SET_GRAD_ENABLED
from .._torch.modules import has_hooks
from ..captured import KEYWORD_ONLY, SPECIALISED, Variant
from ..errors import CaptureError, FreegradWarning
from ..provenance import META, Origin
from ..serialise import LOCK, keywords_as_names
from .copying import ATTRIBUTES_OF_EVERY_MODULE, python_state_changed
from .merge import Exported, merge
from .patches import (
    RandomState,
    noted_assignments,
    noted_flags,
    refused_constants,
    refused_contexts,
    refused_functions,
    refused_questions,
)
from .result import Capture, Opaque

__all__ = ["Guards", "capture_by_export"]

# Functions that export takes apart, and that are one activation to the user.
_COMPOSITES = {
    "function.softsign": F.softsign,
    "function.tanhshrink": F.tanhshrink,
    "function.softmin": F.softmin,
}


class Guards(nn.Module):
    """Raises where a call breaks what the export took for granted.

    Args:
        checks: Python expressions of ``args``, the flat inputs, each with the words for it.
    """

    def __init__(self, checks: tuple[tuple[str, str], ...]) -> None:
        super().__init__()
        self.checks = checks
        self._compile()

    def _compile(self) -> None:
        raising, recording = ["def check(*args):"], ["def record(*args):"]
        for number, (expression, _) in enumerate(self.checks):
            raising.append(f"    if not ({expression}): fail({number})")
            if not expression.startswith("isinstance"):
                recording.append(f"    torch._assert({expression}, messages[{number}])")
        messages = [
            f"the model was captured for inputs with {words}, and is called with others. Give transform() "
            f"dynamic_shapes=... for what may change, or example inputs of the kind you call it with (a batch of 1 "
            f"makes the batch fixed: give at least 2)."
            for _, words in self.checks
        ]

        def fail(number: int) -> None:
            raise CaptureError(messages[number])

        names: dict[str, Any] = {**exporting.guard_names(), "torch": torch, "inf": float("inf")}
        names.update(messages=messages, fail=fail)
        exec("\n".join([*raising, "    return", *recording, "    return"]), names)
        for function in ("check", "record"):
            self.__dict__[f"_{function}"] = exporting.traced_in_full(names[function])

    def forward(self, *args: Any) -> None:
        """Check one call's flat inputs."""
        self.__dict__["_record" if has_torch_function(args) else "_check"](*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Guards, (self.checks,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Guards:
        return Guards(self.checks)


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
        tuple(dict.fromkeys(note for one in exported for note in _hidden(one))),
        (*_hooks_lost(root), *_forget_fakes(model, root)),
    )


_KEEPS_STATE = (
    "{} cannot be captured: its forward changes Python state ({}), and a graph would do so once and for ever. Make it "
    "a buffer."
)


def _hooks_lost(root: nn.Module) -> Iterator[Opaque]:
    for path, module in root.named_modules():
        if path and has_hooks(module):
            what = f"the hooks of {type(module).__name__}"
            yield Opaque(path, what, "export runs them once and drops them")


def _forget_fakes(model: nn.Module, root: nn.Module) -> Iterator[Opaque]:
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
                yield Opaque(path, f"attribute {name!r}", reason)


def _hidden(exported: Exported) -> Iterator[Opaque]:
    """Regions that stay graphs of their own (checkpoints, conditionals)."""
    for node in exported.graph.nodes:
        if node.op == "get_attr" and isinstance(
            exported.parts.get(str(node.target)), fx.GraphModule
        ):
            user = next(iter(node.users), node)
            owner = node.meta[META]
            what = f"the region of {getattr(user.target, '__name__', user.target)}, kept whole"
            yield Opaque(owner.owner, what, "it is a graph of its own", owner.source)


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


# -- one export -------------------------------------------------------------------------------------------------------


def _exported(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> Exported:
    program = _export(root, args, kwargs, dynamic_shapes)
    with warnings.catch_warnings(), keywords_as_names(), _recorded_guards() as guards:
        warnings.simplefilter("ignore")
        module = program.module()
    graph = module.graph
    _inline_grad_modes(module, graph)
    parts: dict[str, Any] = {}
    # A module under several names has sites under the first, as in symbolic tracing
    first = {module: path for path, module in root.named_modules()}
    names = {path: first[m] for path, m in root.named_modules(remove_duplicate=False)}
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            parts["guards"] = Guards((*_ranks(graph), *guards))
            node.target = "guards"
        elif node.op == "get_attr":
            part = _find(module, str(node.target))
            if isinstance(part, nn.Module) or _find(root, str(node.target)) is None:
                parts[str(node.target)] = part
        if node.op not in ("placeholder", "output"):
            node.meta[META] = _origin(node, names)
    _collapse(graph)
    graph.owning_module = None
    return Exported(graph, parts)


def _ranks(graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """Checks of the number of dimensions, which export takes for granted."""
    for index, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            yield f"isinstance(args[{index}], torch.Tensor)", f"a tensor {node.name}"
            yield f"args[{index}].dim() == {value.dim()}", f"{node.name}.dim() == {value.dim()}"
        elif value is None:
            yield f"args[{index}] is None", f"{node.name} = None"


def _inline_grad_modes(module: nn.Module, graph: fx.Graph) -> None:
    """Put `no_grad` regions, which export makes graphs of their own, back between two changes of the grad mode."""
    for node in list(graph.nodes):
        if node.target is torch.ops.higher_order.wrap_with_autocast:
            raise CaptureError("torch.autocast inside a forward cannot be put into a graph")
        if node.target is not torch.ops.higher_order.wrap_with_set_grad_enabled:
            continue
        enabled, holder, *operands = node.args
        region = _find(module, str(holder.target))
        _inline_grad_modes(region, region.graph)
        inside = list(region.graph.nodes)
        values = dict(zip([n for n in inside if n.op == "placeholder"], operands, strict=True))
        results: Any = ()
        with graph.inserting_before(node):
            before = graph.call_function(torch.is_grad_enabled)
            start = graph.call_function(SET_GRAD_ENABLED, (enabled,))
            for inner in inside:
                if inner.op == "output":
                    results = fx.map_arg(inner.args[0], values.__getitem__)
                elif inner.op == "get_attr":
                    name = f"{holder.target}_{inner.target}".replace(".", "_")
                    setattr(module, name, _find(region, str(inner.target)))
                    values[inner] = graph.create_node("get_attr", name)
                elif inner.op != "placeholder":
                    values[inner] = graph.node_copy(inner, values.__getitem__)
            end = graph.call_function(SET_GRAD_ENABLED, (before,))
        for made in (before, start, end):
            made.meta = dict(node.meta)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not holder.users:
            graph.erase_node(holder)


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


@contextlib.contextmanager
def _recorded_guards() -> Iterator[list[tuple[str, str]]]:
    """The guards that `ExportedProgram.module` writes, as expressions that can be pickled."""
    found: list[tuple[str, str]] = []

    def recording(write: Callable[..., Any]) -> Callable[..., Any]:
        def record(guards: list[str], paths: list[Any]) -> Any:
            for guard in guards:
                expression, words = guard, guard
                for index, path in enumerate(paths):
                    name = "L" + tree.key_text(path)
                    expression = expression.replace(name, f"args[{index}]")
                    words = words.replace(name, path[0].key + tree.key_text(path[1:]))
                found.append((expression, words.replace("\n", " ")))
            return write(guards, paths)

        return record

    with exporting.guards_written_by(recording):
        yield found


def _find(module: nn.Module, target: str) -> Any:
    found: Any = module
    for name in target.split("."):
        found = getattr(found, name, None)
    return found


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


def _collapse(graph: fx.Graph) -> None:
    """Make one node again of the activations that export takes apart: a rule is meant for the whole."""
    groups: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        call, function = node.meta.get("torch_fn", ("", ""))
        if function in _COMPOSITES:
            groups.setdefault(call, []).append(node)
    for nodes in groups.values():
        last, inside = nodes[-1], set(nodes)
        (x,) = {n for node in nodes for n in node.all_input_nodes if n not in inside}
        function = last.meta["torch_fn"][1]
        # aten.softmax.int(x, dim, dtype)
        rest = last.args[1:] if function == "function.softmin" else ()
        more = {"dtype": rest[1]} if len(rest) > 1 else {}
        with graph.inserting_before(last):
            whole = graph.call_function(_COMPOSITES[function], (x, *rest[:1]), more)
        whole.meta = dict(last.meta)
        last.replace_all_uses_with(whole)
        for node in reversed(nodes):
            graph.erase_node(node)


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
