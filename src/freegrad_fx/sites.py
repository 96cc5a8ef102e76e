"""Graph → Sites: the places of a captured model where a backward can be replaced, and the code that hides such places.

A site is named by what it is in the model (owner path, op, call index), never by the name of a node. Knows nothing of
rules.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from ._torch.modules import has_forward_hooks
from ._torch.operators import NATIVE_ATTENTIONS, Overload
from .activations import Op, Spelling
from .aliasing import of_library
from .capture import Opaque, tensors_in
from .nodes import (
    argument,
    attribute,
    called_module,
    called_path,
    first_argument,
    spelled,
    submodule,
)
from .ops import apply_function, decoupled, function_of, kept, stop_gradient
from .provenance import Origin, origin

__all__ = [
    "Located",
    "Operation",
    "Parameter",
    "Site",
    "find_opaque",
    "find_parameters",
    "find_sites",
    "unused_parameters",
]


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
        owners: The class of the module at the site's path; of a tied parameter those of all modules that hold it.
        obstacle: Why no rule can be given to it; ``""`` where one can.
        op: Its line in the vocabulary; None for a parameter and for a call of a class that the table names.
        called: The class of the module or `autograd.Function` that is called; None for other functions and methods.
    """

    site: Site
    owners: tuple[type[nn.Module], ...]
    obstacle: str = ""
    op: Op | None = None
    called: type[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Operation(Located):
    """The site of an operation.

    Attributes:
        node: The node of the operation.
        key: Where the activated tensor stands in the node's arguments.
        inplace: Whether the operation writes into it.
    """

    node: fx.Node
    key: int | str
    inplace: bool

    @property
    def input(self) -> fx.Node:
        """The node of the activated tensor."""
        node = argument(self.node, self.key)
        assert isinstance(node, fx.Node)
        return node


@dataclass(frozen=True, kw_only=True)
class Parameter(Located):
    """The site of a parameter.

    Attributes:
        tensor: The parameter, or what stands for it where the graph gets it as an input.
        reads: The nodes that are the parameter: get_attr nodes, or an input of the graph.
        calls: The nodes that call a module which holds it, with its names in that module.
        embeds: The modules among them that look up its rows.
    """

    tensor: Tensor
    reads: tuple[fx.Node, ...]
    calls: tuple[tuple[fx.Node, tuple[str, ...]], ...] = ()
    embeds: tuple[nn.Embedding | nn.EmbeddingBag, ...] = ()

    @property
    def sparse(self) -> bool:
        """Whether its gradient is sparse."""
        return any(module.sparse for module in self.embeds)

    @property
    def renormalised(self) -> bool:
        """Whether a lookup writes into it."""
        return any(module.max_norm is not None for module in self.embeds)


def find_sites(
    graph: fx.Graph, root: nn.Module, types: Sequence[type[Any]] = ()
) -> list[Operation]:
    """List the sites of operations in a graph, in execution order.

    Args:
        graph: A captured graph.
        root: The module whose submodules it calls.
        types: Classes of modules and of autograd.Functions whose calls are sites too.
    """
    found: list[Operation] = []
    calls: Counter[tuple[str, str]] = Counter()
    for node in graph.nodes:
        module = called_module(node, root)
        called = _called(node, module)
        spelling: Spelling | _Custom | None = spelled(node, root)
        if spelling is None and called is not None and issubclass(called, tuple(types)):
            spelling = _custom_spelling(node, module)
        if spelling is None:
            continue
        where = origin(node)
        # An origin that tells the class tells the path too: the graph may call modules by names of its own
        own = module is None or where.owner_type is not None
        path = where.owner if own else called_path(node)
        name = spelling.op.name if isinstance(spelling, Spelling) else _class_name(called)
        owner = where.owner_type or _class_at(root, path)
        site = Site(
            kind="activation",
            op=name,
            path=path,
            call=calls[path, name] if where.call is None else where.call,
            spelling=_text(node, called, spelling.inplace),
            source=where.source,
            type=_qualified(owner),
        )
        calls[path, name] += 1
        found.append(
            Operation(
                site=site,
                owners=(owner,),
                obstacle=_obstacle(node, module, spelling),
                op=spelling.op if isinstance(spelling, Spelling) else None,
                called=called,
                node=node,
                key=spelling.key,
                inplace=spelling.inplace,
            )
        )
    return found


def find_parameters(graph: fx.Graph, root: nn.Module) -> list[Parameter]:
    """List the parameters that a graph uses, in the order in which the model has them.

    Args:
        graph: A captured graph. Where it gets parameters as inputs, their origins name them.
        root: The module whose submodules and parameters it uses.
    """
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    uses: dict[tuple[str, ...], _Uses] = {}
    insides: dict[nn.Module, _Inside] = {}
    for node in graph.nodes:
        tensor = _parameter_read(node, root)
        if tensor is not None and (own := origin(node).parameter or names.get(id(tensor), ())):
            uses.setdefault(own, _Uses(tensor)).reads.append(node)
        module = called_module(node, root)
        if module is None:
            continue
        inside = insides.get(module) or insides.setdefault(module, _Inside(module))
        for parameter, local in inside.parameters:
            use = uses.setdefault(names[id(parameter)], _Uses(parameter))
            use.calls.append((node, local))
            use.embeds += [m for m in inside.embeds if m.weight is parameter]
        for identity in names.keys() & inside.held:
            use = uses.setdefault(names[identity], _Uses(root.get_parameter(names[identity][0])))
            use.obstacle = (
                f"{called_path(node) or 'the root'} ({type(module).__name__}, kept whole) holds it in a list, a dict "
                f"or an attribute, and may use it natively"
            )
    order = {own: index for index, own in enumerate(dict.fromkeys(names.values()))}
    return [
        _parameter(root, own, uses[own])
        for own in sorted(uses, key=lambda own: order.get(own, len(order)))
    ]


def unused_parameters(root: nn.Module, used: Iterable[Parameter]) -> list[Parameter]:
    """List the parameters of a model that are in none of its graphs."""
    found = {id(place.tensor) for place in used}
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [
        _parameter(root, tuple(names[id(p)]), _Uses(p, obstacle="no graph of the model uses it"))
        for p in root.parameters()
        if id(p) not in found
    ]


@dataclass
class _Uses:
    """What is found out about a parameter; see `Parameter`."""

    tensor: Tensor
    reads: list[fx.Node] = field(default_factory=list)
    calls: list[tuple[fx.Node, tuple[str, ...]]] = field(default_factory=list)
    embeds: list[nn.Embedding | nn.EmbeddingBag] = field(default_factory=list)
    obstacle: str = ""


class _Inside:
    """What is in a module that is called: parameters with their names, lookup tables, and tensors not registered."""

    def __init__(self, module: nn.Module) -> None:
        local: dict[nn.Parameter, list[str]] = defaultdict(list)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            local[parameter].append(name)
        parts = list(module.modules())
        self.parameters = [(parameter, tuple(names)) for parameter, names in local.items()]
        self.embeds = [m for m in parts if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        self.held: set[int] = set().union(*map(_held_outside, parts))


def _parameter(root: nn.Module, names: tuple[str, ...], uses: _Uses) -> Parameter:
    path, _, name = names[0].rpartition(".")
    where = origin(uses.reads[0]) if uses.reads else Origin()
    holders = [n.rpartition(".")[0] for n in names]
    owners = (where.owner_type,) if where.owner_type else tuple(_class_at(root, h) for h in holders)
    site = Site(
        kind="parameter",
        op="parameter",
        path=path,
        call=0,
        spelling=f"{_short_name(owners[0])}.{name}",
        type=_qualified(owners[0]),
        names=names,
    )
    return Parameter(
        site=site,
        owners=owners,
        obstacle=uses.obstacle or _decoupled_already(uses.reads, names),
        tensor=uses.tensor,
        reads=tuple(uses.reads),
        calls=tuple(uses.calls),
        embeds=tuple(uses.embeds),
    )


def _parameter_read(node: fx.Node, root: nn.Module) -> Tensor | None:
    """The parameter that a node is, or what stands for it."""
    if node.op == "get_attr":
        tensor = attribute(node, root)
        return tensor if isinstance(tensor, nn.Parameter) else None
    if node.op == "placeholder" and origin(node).parameter:
        example = node.meta.get("example_value", node.meta.get("val"))
        return example if isinstance(example, Tensor) else None
    return None


def _held_outside(module: nn.Module) -> set[int]:
    """The tensors, by identity, that a module of the user's holds otherwise than as its parameters and buffers."""
    if type_before_parametrizations(module).__module__.startswith("torch."):
        return set()
    return set(tensors_in({k: v for k, v in module.__dict__.items() if k not in _REGISTERED}))


# Hooks among them: that these refer to the model is no sign that they compute with its parameters
_REGISTERED = frozenset(nn.Module().__dict__)


def _decoupled_already(reads: Sequence[fx.Node], names: Sequence[str]) -> str:
    """What an earlier transform did to a parameter, of the model or of a part, where it had the end of its name."""
    users = dict.fromkeys(user for node in reads for user in node.users)
    copies = [
        user for user in users if user.target in ("clone", kept)
    ]  # made for rules that read x
    sites = [f".{name}" for name in names]
    rules = [
        _rule_of(user)
        for user in dict.fromkeys((*users, *(user for copied in copies for user in copied.users)))
        if user.target is decoupled
        and any(site.endswith(f".{user.kwargs.get('site')}") for site in sites)
    ]
    return _ALREADY.format(", ".join(rules)) if rules else ""


def _class_at(root: nn.Module, path: str) -> type[nn.Module]:
    module = submodule(root, path)
    model_class = getattr(module, "_model_class", None)
    return model_class or type_before_parametrizations(module)


def _qualified(kind: type[Any]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _short_name(kind: type[Any]) -> str:
    return f"{'nn.' if kind.__module__.startswith('torch.nn.') else ''}{kind.__name__}"


@dataclass(frozen=True)
class _Custom:
    """How a node calls a class that the table names: what `Spelling` is for a line of the vocabulary."""

    key: int | str
    inplace: bool
    writes_out: bool = False


def _rule_of(node: fx.Node) -> str:
    return str(node.kwargs.get("rule", "an ambient one"))


_ALREADY = (
    "already decoupled, with the rule {!r}; transform the original model, or compose the rules"
)


def _called(node: fx.Node, module: nn.Module | None) -> type[Any] | None:
    if node.target is apply_function:
        function: type[Any] = function_of(str(node.args[0]))
        return function
    return None if module is None else type(module)


def _class_name(called: type[Any] | None) -> str:
    return called.__name__ if called is not None else ""


def _custom_spelling(node: fx.Node, module: nn.Module | None) -> _Custom | None:
    """The first tensor given to it is the activated one; only its `inplace` can tell that it is overwritten."""
    first = first_argument(node)
    positional = list(enumerate(node.args))[first:]
    given: list[tuple[int | str, Any]] = [*positional, *node.kwargs.items()]
    key = next((key for key, value in given if isinstance(value, fx.Node)), None)
    return None if key is None else _Custom(key, bool(getattr(module, "inplace", False)))


def _obstacle(node: fx.Node, module: nn.Module | None, spelling: Spelling | _Custom) -> str:
    source = argument(node, spelling.key)
    while source.target == "clone":  # an operation in place may run on a copy of what is cut
        source = source.args[0]
    if source.target is stop_gradient:
        rules = [_rule_of(user) for user in node.users if user.target is decoupled]
        if rules:
            return _ALREADY.format(", ".join(rules))
        return "its input is cut from the autograd graph already"
    if spelling.inplace and module is not None and has_forward_hooks(module):
        return "works in place and has forward hooks: what it returns need not be what it writes"
    if spelling.writes_out:
        return "writes its result into an out= tensor, which autograd does not support"
    return ""


def _text(node: fx.Node, called: type[Any] | None, inplace: bool) -> str:
    if called is not None and issubclass(called, nn.Module):
        return f"{_short_name(called)}({'inplace=True' if inplace else ''})"
    if called is not None:
        return f"{called.__name__}.apply"
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    if isinstance(node.target, Overload):
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
        *NATIVE_ATTENTIONS,
        torch.ops.aten.scaled_dot_product_attention.default,
        torch.ops.aten.lstm.input,
        torch.ops.aten.gru.input,
        torch.ops.aten.rnn_tanh.input,
        torch.ops.aten.rnn_relu.input,
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
        module = called_module(node, root)
        if module is not None:
            asked = isinstance(module, tuple(leaf_modules))
            reason = "leaf_modules asks for it" if asked else _whole(module)
            if reason and not isinstance(module, tuple(types)):
                what = f"{type(module).__name__}, kept whole"
                found[Opaque(called_path(node), what, reason, where.source, asked)] = None
        elif node.target is apply_function:
            if issubclass(function_of(str(node.args[0])), tuple(types)):
                continue
            what = f"autograd.Function {node.args[0]}"
            found[Opaque(where.owner, what, "keeps the backward it has", where.source)] = None
        elif node.op == "call_function" and not isinstance(node.target, type):
            if node.target in _ATTENTIONS:
                reason = "PyTorch computes activations inside of it"
                found[Opaque(where.owner, _text(node, None, False), reason, where.source)] = None
            if not of_library(node.target):
                name = f"{node.target.__module__}.{getattr(node.target, '__name__', node.target)}"
                what, reason = f"function {name}, kept whole", "it is wrapped for torch.fx"
                found[Opaque(where.owner, what, reason, where.source)] = None
    return list(found)
