"""Graph → Sites: the places of a captured model where a backward can be replaced, and the code that hides such places.

A site is named by what it is in the model (owner path, op, call index), never by the name of a node. Knows nothing of
rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn
from torch._ops import OpOverload

from .activations import Op, Spelling, recognise
from .aliasing import activated
from .capture import Opaque
from .ops import apply_function, decoupled, stop_gradient
from .provenance import origin

__all__ = ["Located", "Site", "find_opaque", "find_sites"]


@dataclass(frozen=True)
class Site:
    """One place in one model where a backward can be replaced.

    Attributes:
        kind: ``"activation"``.
        op: The canonical name of the operation; for a module of a class that the table names, that class's name.
        path: The dotted path of the owner: of the module called, or of the module whose `forward` calls a function;
            ``""`` for the root.
        call: How many sites of this op and path come before it.
        spelling: How the model writes it: ``nn.ReLU(inplace=True)``, ``F.relu``, ``Tensor.relu_``.
        source: ``file:line`` of the user's code that calls it.
    """

    kind: str
    op: str
    path: str
    call: int
    spelling: str = ""
    source: str = ""

    @property
    def name(self) -> str:
        """``path:op[call]``, as reports and errors print it."""
        return f"{self.path or '<root>'}:{self.op}[{self.call}]"

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells this site from every other one of the model."""
        return (self.kind, self.path, self.op, self.call)


@dataclass(frozen=True)
class Located:
    """A site in one graph.

    Attributes:
        site: The site.
        node: The node of the operation.
        op: Its line in the vocabulary; None for a module of a class that the table names.
        key: Where the activated tensor stands in the node's arguments.
        inplace: Whether the operation writes into it.
        module: The module that is called; None for a function or method.
        obstacle: Why no rule can be given to it; ``""`` where one can.
    """

    site: Site
    node: fx.Node
    op: Op | None
    key: int | str
    inplace: bool
    module: nn.Module | None
    obstacle: str = ""

    @property
    def input(self) -> fx.Node:
        """The node of the activated tensor."""
        node = activated(self.node, self.key)
        assert isinstance(node, fx.Node)
        return node


def find_sites(
    graph: fx.Graph, root: nn.Module, types: Sequence[type[nn.Module]] = ()
) -> list[Located]:
    """List the sites of a graph, in execution order.

    Args:
        graph: A captured graph.
        root: The module whose submodules it calls.
        types: Further module classes whose calls are sites.
    """
    found: list[Located] = []
    calls: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        spelled = _spelling(node, module, tuple(types))
        if spelled is None:
            continue
        op, key, inplace, obstacle = spelled
        where = origin(node)
        path = str(node.target) if module is not None else where.owner
        name = op.name if op is not None else type(module).__name__
        site = Site(
            kind="activation",
            op=name,
            path=path,
            call=calls[path, name],
            spelling=_text(node, module, inplace),
            source=where.source,
        )
        calls[path, name] += 1
        found.append(Located(site, node, op, key, inplace, module, obstacle))
    return found


def _spelling(
    node: fx.Node, module: nn.Module | None, types: tuple[type[nn.Module], ...]
) -> tuple[Op | None, int | str, bool, str] | None:
    if module is not None and isinstance(module, types):
        key = next((i for i, a in enumerate(node.args) if isinstance(a, fx.Node)), None)
        if key is None:
            return None
        spelling = Spelling(None, key, bool(getattr(module, "inplace", False)), False)  # type: ignore[arg-type]
    else:
        recognised = recognise(node, module)
        if recognised is None:
            return None
        spelling = recognised
    return spelling.op, spelling.key, spelling.inplace, _obstacle(node, spelling)


def _obstacle(node: fx.Node, spelling: Spelling) -> str:
    if activated(node, spelling.key).target is stop_gradient:
        rules = [str(user.kwargs["rule"]) for user in node.users if user.target is decoupled]
        return f"already decoupled, with the rule {', '.join(rules)!r}" if rules else "already cut"
    if spelling.writes_out:
        return "writes its result into an out= tensor, which autograd does not support"
    return ""


def _text(node: fx.Node, module: nn.Module | None, inplace: bool) -> str:
    if module is not None:
        kind = type(module)
        prefix = "nn." if kind.__module__.startswith("torch.nn.") else ""
        return f"{prefix}{kind.__name__}({'inplace=True' if inplace else ''})"
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if isinstance(node.target, OpOverload):
        return str(node.target).rpartition(".")[0]
    owner = getattr(node.target, "__module__", None) or "torch"
    owner = {"torch.nn.functional": "F", "torch._C._nn": "F", "_operator": "operator"}.get(
        owner, owner
    )
    owner = "F" if owner.startswith("torch.nn") else owner
    name = getattr(node.target, "__name__", str(node.target))
    return f"{owner}.{name}{'(inplace=True)' if inplace and not name.endswith('_') else ''}"


# Modules of torch.nn that stay one call, and in which activations or softmaxes are computed.
_COMPOSITES: tuple[type[nn.Module], ...] = (
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.AdaptiveLogSoftmaxWithLoss,
    nn.CrossEntropyLoss,
)
_LIBRARIES = ("torch", "_operator", "operator", "builtins", "math", "freegrad_fx")


def find_opaque(graph: fx.Graph, root: nn.Module) -> list[Opaque]:
    """List the calls of a graph that were not looked into and in which activations may be computed."""
    found: dict[Opaque, None] = {}
    for node in graph.nodes:
        where = origin(node)
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if isinstance(module, _COMPOSITES):
                what = f"nn.{type(module).__name__}, kept whole"
                reason = "PyTorch computes its activations inside one call"
                found[Opaque(str(node.target), what, reason, where.source)] = None
        elif node.op == "call_function" and node.target is apply_function:
            what = f"autograd.Function {node.args[0]}"
            found[Opaque(where.owner, what, "keeps the backward it has", where.source)] = None
        elif node.op == "call_function":
            module_name = getattr(node.target, "__module__", None) or "torch"
            if module_name.partition(".")[0] not in _LIBRARIES:
                name = f"{module_name}.{getattr(node.target, '__name__', node.target)}"
                what, reason = f"function {name}, kept whole", "it is wrapped for torch.fx"
                found[Opaque(where.owner, what, reason, where.source)] = None
    return list(found)
