"""Graph → Sites: the places of a captured model where a backward can be replaced, and the code that hides such places.

A site is named by what it is in the model (owner path, op, call index), never by the name of a node. Knows nothing of
rules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._ops import OpOverload
from torch.nn.utils.parametrize import is_parametrized

from .activations import Op, Spelling, recognise
from .aliasing import LIBRARIES, activated, has_forward_hooks
from .capture import Opaque
from .ops import apply_function, decoupled, function_of, stop_gradient
from .provenance import origin

__all__ = ["Located", "Site", "find_opaque", "find_sites"]


@dataclass(frozen=True)
class Site:
    """One place in one model where a backward can be replaced.

    Attributes:
        kind: ``"activation"`` or ``"parameter"``.
        op: The canonical name of the operation; for a call of a class that the table names, that class's name; for a
            parameter ``"parameter"``.
        path: The dotted path of the owner: of the module called, of the module whose `forward` calls a function, or
            of the module that holds the parameter; ``""`` for the root.
        call: How many sites of this op and path come before it; 0 for a parameter.
        spelling: How the model writes it: ``nn.ReLU(inplace=True)``, ``F.relu``, ``Tensor.relu_``.
        source: ``file:line`` of the user's code that calls it.
        type: The qualified name of the owner's class, ``torch.nn.modules.activation.ReLU``.
        names: Of a parameter: its dotted name, ``layer4.0.conv1.weight``, and further ones where it is tied.
    """

    kind: str
    op: str
    path: str
    call: int
    spelling: str = ""
    source: str = ""
    type: str = ""
    names: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """``path:op[call]``, or the parameter's name, as reports and errors print it."""
        return self.names[0] if self.names else f"{self.path or '<root>'}:{self.op}[{self.call}]"

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells this site from every other one of the model."""
        return (self.kind, self.name if self.names else self.path, self.op, self.call)


@dataclass(frozen=True)
class Located:
    """A site in one graph.

    Attributes:
        site: The site.
        node: The node of the operation.
        op: Its line in the vocabulary; None for a call of a class that the table names.
        key: Where the activated tensor stands in the node's arguments.
        inplace: Whether the operation writes into it.
        called: The class of the module or `autograd.Function` that is called; None for other functions and methods.
        owner: The class of the module at the site's path.
        obstacle: Why no rule can be given to it; ``""`` where one can.
    """

    site: Site
    node: fx.Node
    op: Op | None
    key: int | str
    inplace: bool
    called: type[Any] | None
    owner: type[nn.Module]
    obstacle: str = ""

    @property
    def input(self) -> fx.Node:
        """The node of the activated tensor."""
        node = activated(self.node, self.key)
        assert isinstance(node, fx.Node)
        return node


def find_sites(graph: fx.Graph, root: nn.Module, types: Sequence[type[Any]] = ()) -> list[Located]:
    """List the sites of a graph, in execution order.

    Args:
        graph: A captured graph.
        root: The module whose submodules it calls.
        types: Classes of modules and of autograd.Functions whose calls are sites too.
    """
    found: list[Located] = []
    calls: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        called = _called(node, module)
        spelled: Spelling | _Custom | None
        spelled = recognise(node, module)
        if spelled is None and called is not None and issubclass(called, tuple(types)):
            spelled = _custom_spelling(node, module)
        if spelled is None:
            continue
        where = origin(node)
        path = str(node.target) if module is not None else where.owner
        name = spelled.op.name if isinstance(spelled, Spelling) else _class_name(called)
        owner = type(root.get_submodule(path))
        text, kind = _text(node, called, spelled.inplace), f"{owner.__module__}.{owner.__qualname__}"
        site = Site("activation", name, path, calls[path, name], text, where.source, kind)
        calls[path, name] += 1
        op = spelled.op if isinstance(spelled, Spelling) else None
        obstacle = _obstacle(node, module, spelled)
        found.append(Located(site, node, op, spelled.key, spelled.inplace, called, owner, obstacle))
    return found


@dataclass(frozen=True)
class _Custom:
    """How a node calls a class that the table names: what `Spelling` is for a line of the vocabulary."""

    key: int | str
    inplace: bool
    writes_out: bool = False


def _called(node: fx.Node, module: nn.Module | None) -> type[Any] | None:
    if node.target is apply_function:
        return function_of(str(node.args[0]))
    return None if module is None else type(module)


def _class_name(called: type[Any] | None) -> str:
    return called.__name__ if called is not None else ""


def _custom_spelling(node: fx.Node, module: nn.Module | None) -> _Custom | None:
    """The first tensor given to it is the activated one; only its `inplace` can tell that it is overwritten."""
    given: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
    key = next((key for key, value in given if isinstance(value, fx.Node)), None)
    return None if key is None else _Custom(key, bool(getattr(module, "inplace", False)))


def _obstacle(node: fx.Node, module: nn.Module | None, spelling: Spelling | _Custom) -> str:
    source = activated(node, spelling.key)
    while source.target == "clone":  # an operation in place may run on a copy of what is cut
        source = source.args[0]
    if source.target is stop_gradient:
        rules = [str(user.kwargs["rule"]) for user in node.users if user.target is decoupled]
        if rules:
            return (
                f"already decoupled, with the rule {', '.join(rules)!r}; transform the original model, or compose the "
                f"rules"
            )
        return "its input is cut from the autograd graph already"
    if spelling.inplace and module is not None and has_forward_hooks(module):
        return "works in place and has forward hooks: what it returns need not be what it writes"
    if spelling.writes_out:
        return "writes its result into an out= tensor, which autograd does not support"
    return ""


def _text(node: fx.Node, called: type[Any] | None, inplace: bool) -> str:
    if called is not None and node.op == "call_module":
        prefix = "nn." if called.__module__.startswith("torch.nn.") else ""
        return f"{prefix}{called.__name__}({'inplace=True' if inplace else ''})"
    if called is not None:
        return f"{called.__name__}.apply"
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


def _computes(parametrization: nn.Module) -> bool:
    """Whether a part of a parametrization may compute activations; PyTorch's own (norms) do not."""
    kind = type(parametrization)
    return not kind.__module__.startswith("torch.nn.utils.") and kind is not nn.ModuleDict


# Functions with a softmax, or gates, inside.
_ATTENTIONS = frozenset(
    {
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        torch.ops.aten.scaled_dot_product_attention.default,
        torch.ops.aten.lstm.input,
        torch.ops.aten.gru.input,
        torch.ops.aten.rnn_tanh.input,
        torch.ops.aten.rnn_relu.input,
        torch.ops.aten._native_multi_head_attention.default,
        torch.ops.aten._transformer_encoder_layer_fwd.default,
    }
)


def _whole(module: nn.Module) -> str:
    """Why a module that is one call may compute activations; ``""`` where it cannot."""
    if isinstance(module, _COMPOSITES):
        return "PyTorch computes its activations inside one call"
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript code cannot be traced"
    parts = module.get_submodule("parametrizations") if is_parametrized(module) else nn.Module()
    if is_parametrized(module) and any(map(_computes, parts.modules())):
        return "its parametrization is computed inside one call"
    return ""


def find_opaque(
    graph: fx.Graph,
    root: nn.Module,
    types: Sequence[type[Any]] = (),
    leaf_modules: Sequence[type[nn.Module]] = (),
) -> list[Opaque]:
    """List the calls of a graph that were not looked into, that are no sites, and that may compute activations.

    Args:
        graph: A captured graph.
        root: The module whose submodules it calls.
        types: Classes whose calls are sites.
        leaf_modules: Module classes that the caller wants kept whole.
    """
    found: dict[Opaque, None] = {}
    for node in graph.nodes:
        where = origin(node)
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            asked = isinstance(module, tuple(leaf_modules))
            reason = "leaf_modules asks for it" if asked else _whole(module)
            if reason and not isinstance(module, tuple(types)):
                what = f"{type(module).__name__}, kept whole"
                found[Opaque(str(node.target), what, reason, where.source, asked)] = None
        elif node.target is apply_function:
            if issubclass(function_of(str(node.args[0])), tuple(types)):
                continue
            what = f"autograd.Function {node.args[0]}"
            found[Opaque(where.owner, what, "keeps the backward it has", where.source)] = None
        elif node.op == "call_function" and not isinstance(node.target, type):
            if node.target in _ATTENTIONS:
                reason = "PyTorch computes activations inside of it"
                found[Opaque(where.owner, _text(node, None, False), reason, where.source)] = None
            module_name = getattr(node.target, "__module__", None) or "torch"
            if module_name.partition(".")[0] not in LIBRARIES:
                name = f"{module_name}.{getattr(node.target, '__name__', node.target)}"
                what, reason = f"function {name}, kept whole", "it is wrapped for torch.fx"
                found[Opaque(where.owner, what, reason, where.source)] = None
    return list(found)
