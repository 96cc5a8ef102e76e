"""Capture by `torch.export`, from example inputs: for models whose control flow depends on shapes or Python values.

Both modes are exported. Where their graphs differ in nothing but constants that came from a module's `training` flag,
one graph is kept and reads the flag; else both are.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
import torch.export._unlift as unlift
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils import _pytree as pytree

from ..captured import Variant
from ..errors import CaptureError
from ..provenance import META, Origin
from .patches import RandomState, refused_functions
from .result import Capture, Opaque

__all__ = ["Guards", "capture_by_export"]

_Exported: TypeAlias = tuple[fx.Graph, dict[str, Any]]
"""The graph of one mode, and the modules and constants in it that are not the model's."""

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
        lines = ["def check(*args):"]
        for number, (expression, _) in enumerate(self.checks):
            lines.append(f"    torch._assert({expression}, messages[{number}])")
        messages = [
            f"the model was captured for inputs with {words}, and is called with others. Give transform() "
            f"dynamic_shapes=... for what may change, or example inputs of the kind you call it with."
            for _, words in self.checks
        ]
        names: dict[str, Any] = {
            **SYMPY_INTERP,
            "torch": torch,
            "messages": messages,
            "inf": float("inf"),
        }
        exec("\n".join([*lines, "    return"]), names)
        self.__dict__["_check"] = torch._dynamo.dont_skip_tracing(names["check"])

    def forward(self, *args: Any) -> None:
        """Check one call's flat inputs."""
        self.__dict__["_check"](*args)

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
    args, kwargs = _inputs(example_inputs)
    flags = {module: module.training for module in root.modules()}
    states = [True, False]
    graphs: list[_Exported] = []
    random = RandomState()
    try:
        for mode in states:
            root.train(mode)
            graphs.append(_exported(root, args, kwargs, dynamic_shapes))
    finally:
        random.restore()
        for module, training in flags.items():
            module.training = training
    if _merge(*graphs):
        graphs = graphs[:1]
        variants = [Variant({}, graphs[0][0])]
    else:
        paths = [path for path, _ in root.named_modules()]
        variants = [
            Variant(dict.fromkeys(paths, mode), graph)
            for mode, (graph, _) in zip(states, graphs, strict=True)
        ]
    for variant, (graph, parts) in zip(variants, graphs, strict=True):
        _adopt(root, graph, parts, variant.label)
    lost = tuple(
        Opaque(
            path, f"the hooks of {type(module).__name__}", "export runs them once and drops them"
        )
        for path, module in root.named_modules()
        if path and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)
    )
    return Capture(root, type(model).__name__, tuple(variants), (), lost)


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
) -> _Exported:
    program = _export(root, args, kwargs, dynamic_shapes)
    with warnings.catch_warnings(), _recorded_guards() as guards:
        warnings.simplefilter("ignore")
        module = program.module()
    graph = module.graph
    parts: dict[str, Any] = {}
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            parts["guards"] = Guards(tuple(guards))
            node.target = "guards"
        elif (
            node.op == "get_attr" and isinstance(part := _find(module, str(node.target)), nn.Module)
        ) or (node.op == "get_attr" and _find(root, str(node.target)) is None):
            parts[str(node.target)] = part
        if node.op not in ("placeholder", "output"):
            node.meta[META] = _origin(node)
    _collapse(graph)
    graph.owning_module = None
    return graph, parts


def _export(
    root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    attempts = (
        [dynamic_shapes]
        if dynamic_shapes is not None
        else [_batch_is_dynamic(root, args, kwargs), None]
    )
    for attempt in attempts:
        try:
            with warnings.catch_warnings(), refused_functions():
                warnings.simplefilter("ignore")
                return torch.export.export(root, args, kwargs, dynamic_shapes=attempt, strict=False)
        except CaptureError:
            raise
        except Exception as error:
            failure = error
    first = str(failure).strip().partition("\n")[0]
    raise CaptureError(
        f"{type(root).__name__} cannot be captured from the example inputs: torch.export says "
        f"{type(failure).__name__}: {first[:300]}"
    ) from failure


def _batch_is_dynamic(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Leave the first dimension of every tensor to export: dynamic where the model allows it."""

    def spec(value: Any) -> Any:
        return {0: Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None

    names = [*inspect.signature(root.forward).parameters][: len(args)]
    shapes = pytree.tree_map(spec, (*args,))
    named = pytree.tree_map(spec, kwargs)
    return {**dict(zip(names, shapes, strict=False)), **named}


@contextlib.contextmanager
def _recorded_guards() -> Iterator[list[tuple[str, str]]]:
    """The guards that `ExportedProgram.module` writes, as expressions that can be pickled."""
    original = unlift._convert_guards_code_to_fn
    found: list[tuple[str, str]] = []

    def record(guards: list[str], paths: list[Any]) -> Any:
        for guard in guards:
            expression, words = guard, guard
            for index, path in enumerate(paths):
                name = "L" + pytree.keystr(path)
                expression = expression.replace(name, f"args[{index}]")
                words = words.replace(name, path[0].key + pytree.keystr(path[1:]))
            found.append((expression, words.replace("\n", " ")))
        return original(guards, paths)

    unlift._convert_guards_code_to_fn = record  # type: ignore[assignment]
    try:
        yield found
    finally:
        unlift._convert_guards_code_to_fn = original


def _find(module: nn.Module, target: str) -> Any:
    found: Any = module
    for name in target.split("."):
        found = getattr(found, name, None)
    return found


def _origin(node: fx.Node) -> Origin:
    stack = node.meta.get("nn_module_stack") or {"": ("", "")}
    owner = next(reversed(stack.values()))[0]
    source = ""
    for line in map(str.strip, (node.stack_trace or "").splitlines()):
        if line.startswith('File "') and f"{torch.__path__[0]}/" not in line:
            file, _, rest = line.removeprefix('File "').partition('", line ')
            source = f"{file}:{rest.partition(',')[0]}"
    return Origin(owner.partition("@")[0], source)


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
        rest = tuple(last.args[1:2]) if function == "function.softmin" else ()
        with graph.inserting_before(last):
            whole = graph.call_function(_COMPOSITES[function], (x, *rest))
        whole.meta = dict(last.meta)
        last.replace_all_uses_with(whole)
        for node in reversed(nodes):
            graph.erase_node(node)


# -- two modes, one graph ---------------------------------------------------------------------------------------------


def _merge(in_train: _Exported, in_eval: _Exported) -> bool:
    """Make the train graph right in every mode, if the two differ in flags alone. Returns whether it did."""
    (train, train_parts), (evaluation, evaluation_parts) = in_train, in_eval
    same: dict[fx.Node, fx.Node] = {}
    flags: list[tuple[fx.Node, int]] = []
    others = iter(evaluation.nodes)
    other = next(others, None)
    for node in train.nodes:
        if _counts_batches(node):
            flags.append((node, 1))
            continue
        if other is None or not _alike(node, other, train_parts, evaluation_parts):
            return False
        found = _differing_flags(node, other, same)
        if found is None:
            return False
        flags += [(node, position) for position in found]
        same[other] = node
        other = next(others, None)
    if other is not None or str(train._codegen.pytree_info) != str(evaluation._codegen.pytree_info):  # type: ignore[attr-defined]
        return False
    for node, position in flags:
        owner = node.meta[META].owner
        with train.inserting_before(node):
            flag = train.create_node("get_attr", f"{owner}.training" if owner else "training")
        flag.meta[META] = node.meta[META]
        node.update_arg(position, flag)
    return True


def _counts_batches(node: fx.Node) -> bool:
    """Whether a node is the counter of a BatchNorm in train mode; adding its flag counts in every mode."""
    counter = node.args[0] if node.args else None
    return (
        node.target is torch.ops.aten.add_.Tensor
        and isinstance(counter, fx.Node)
        and str(counter.target).endswith("num_batches_tracked")
        and not node.users
    )


def _alike(a: fx.Node, b: fx.Node, a_parts: Any, b_parts: Any) -> bool:
    if a.op != b.op:
        return False
    a_part, b_part = a_parts.get(str(a.target)), b_parts.get(str(b.target))
    if isinstance(a_part, Guards) and isinstance(b_part, Guards):
        return a_part.checks == b_part.checks
    if isinstance(a_part, fx.GraphModule) and isinstance(b_part, fx.GraphModule):
        return _same_graph(a_part.graph, b_part.graph)
    if isinstance(a_part, Tensor) and isinstance(b_part, Tensor):
        return torch.equal(a_part, b_part)
    return a.op == "placeholder" or a.target == b.target


def _same_graph(a: fx.Graph, b: fx.Graph) -> bool:
    same: dict[fx.Node, fx.Node] = {}
    if len(a.nodes) != len(b.nodes):
        return False
    for mine, yours in zip(a.nodes, b.nodes, strict=True):
        if not _alike(mine, yours, {}, {}) or _differing_flags(mine, yours, same) != []:
            return False
        same[yours] = mine
    return True


def _differing_flags(a: fx.Node, b: fx.Node, same: dict[fx.Node, fx.Node]) -> list[int] | None:
    """The positions at which `a` has True and `b` False; None if they differ otherwise."""
    b_args, b_kwargs = fx.map_arg((b.args, b.kwargs), lambda n: same.get(n, n))
    if a.kwargs != b_kwargs or len(a.args) != len(b_args):
        return None
    found = []
    for position, (mine, yours) in enumerate(zip(a.args, b_args, strict=True)):
        if mine is True and yours is False:
            found.append(position)
        elif mine != yours:
            return None
    return found


def _adopt(root: nn.Module, graph: fx.Graph, parts: dict[str, Any], label: str) -> None:
    """Give the model the modules and constants that the export made, under names of their own."""
    for target, part in parts.items():
        name = f"captured_{label}_{target}".replace("__", "_").replace(".", "_")
        while hasattr(root, name):
            name += "_"
        setattr(root, name, part)
        for node in graph.nodes:
            if node.op in ("get_attr", "call_module") and node.target == target:
                node.target = name
