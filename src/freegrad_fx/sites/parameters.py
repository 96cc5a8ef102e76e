"""Finds the parameters that a graph uses. Each is one site, however many names and uses it has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx, nn

from .._torch.modules import parameters_of_rules
from .._torch.parametrized import plain_class
from ..graph.nodes import called_module, called_path, hooked_module, parameter_of, takes_parameters
from ..graph.provenance import Origin, origin
from ..graph.state import tensors_in
from ..ops.gradients import kept
from ..ops.joint import gathered
from .owners import already, class_at, decoupling, qualified, short_name
from .site import LocatedParameter, Site

__all__ = ["find_parameters", "named_parameters", "unused_parameters"]


def find_parameters(graph: fx.Graph, root: nn.Module) -> list[LocatedParameter]:
    """List the parameters that a graph uses, in the order of ``named_parameters``.

    Args:
        graph: A captured graph. If parameters are inputs of the graph, the origins of the inputs name them.
        root: The module whose submodules and parameters the graph uses.
    """
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in named_parameters(root):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    uses: dict[tuple[str, ...], _Uses] = {}
    insides: dict[nn.Module, _Inside] = {}
    for node in graph.nodes:
        tensor = parameter_of(node, root)
        if tensor is not None and (own := origin(node).parameter or names.get(id(tensor), ())):
            uses.setdefault(own, _Uses(tensor)).reads.append(node)
        module = called_module(node, root) or hooked_module(node, root)
        if module is None:
            continue
        inside = insides.get(module) or insides.setdefault(module, _Inside(module))
        for parameter, local in inside.parameters:
            if id(parameter) not in names:
                continue
            use = uses.setdefault(names[id(parameter)], _Uses(parameter))
            # an earlier transform gives the call a parameter that has rules there
            given = node.args[1] if takes_parameters(node) else ()
            if own := tuple(name for name in local if name not in given):
                use.calls.append((node, own))
            use.embeds += [m for m in inside.embeds if m.weight is parameter]
        for identity in names.keys() & inside.held:
            use = uses.setdefault(names[identity], _Uses(root.get_parameter(names[identity][0])))
            use.obstacle = (
                f"{called_path(node) or 'the root'} ({type(module).__name__}, kept as one opaque call) holds it in a "
                f"list, a dict or an attribute, and may use it without the rule"
            )
    order = {own: index for index, own in enumerate(dict.fromkeys(names.values()))}
    return [
        _parameter(root, own, uses[own])
        for own in sorted(uses, key=lambda own: order.get(own, len(order)))
    ]


def unused_parameters(root: nn.Module, used: Iterable[LocatedParameter]) -> list[LocatedParameter]:
    """List the parameters of a model that none of its graphs uses."""
    found = {id(place.tensor) for place in used}
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in named_parameters(root):
        names[id(parameter)].append(name)
    return [
        _parameter(root, tuple(names[id(p)]), _Uses(p, obstacle="no graph of the model uses it"))
        for p in root.parameters()
        if id(p) not in found and id(p) in names
    ]


def named_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model with all their names, without those that belong to its rules."""
    of_rules = parameters_of_rules(root)
    for name, parameter in root.named_parameters(remove_duplicate=False):
        if id(parameter) not in of_rules:
            yield name, parameter


@dataclass
class _Uses:
    """The uses of a parameter; see `LocatedParameter`."""

    tensor: Tensor
    reads: list[fx.Node] = field(default_factory=list)
    calls: list[tuple[fx.Node, tuple[str, ...]]] = field(default_factory=list)
    embeds: list[nn.Embedding | nn.EmbeddingBag] = field(default_factory=list)
    obstacle: str = ""


class _Inside:
    """The contents of a called module: parameters with names, embedding modules, and unregistered tensors."""

    def __init__(self, module: nn.Module) -> None:
        local: dict[nn.Parameter, list[str]] = defaultdict(list)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            local[parameter].append(name)
        parts = list(module.modules())
        self.parameters = [(parameter, tuple(names)) for parameter, names in local.items()]
        self.embeds = [m for m in parts if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        self.held: set[int] = set().union(*map(_held_outside, parts))


def _parameter(root: nn.Module, names: tuple[str, ...], uses: _Uses) -> LocatedParameter:
    path, _, name = names[0].rpartition(".")
    where = origin(uses.reads[0]) if uses.reads else Origin()
    holders = [n.rpartition(".")[0] for n in names]
    owners = (where.owner_type,) if where.owner_type else tuple(class_at(root, h) for h in holders)
    site = Site(
        kind="parameter",
        op="parameter",
        path=path,
        call=0,
        spelling=f"{short_name(owners[0])}.{name}",
        type=qualified(owners[0]),
        names=names,
    )
    return LocatedParameter(
        site=site,
        owners=owners,
        obstacle=uses.obstacle or _decoupled_already(uses.reads, names),
        tensor=uses.tensor,
        reads=tuple(uses.reads),
        calls=tuple(uses.calls),
        embeds=tuple(uses.embeds),
    )


def _held_outside(module: nn.Module) -> set[int]:
    """The ids of the tensors that a user-defined module holds in other ways than as parameters and buffers."""
    if plain_class(module).__module__.startswith("torch."):
        return set()
    return set(tensors_in({k: v for k, v in module.__dict__.items() if k not in _REGISTERED}))


# This includes hooks: they often refer to the model, but rarely compute with its parameters
_REGISTERED = frozenset(nn.Module().__dict__)


def _decoupled_already(reads: Sequence[fx.Node], names: Sequence[str]) -> str:
    """The obstacle if a parameter is already decoupled by an earlier transform of the model or of a submodule.

    The earlier transform of a submodule knew the parameter by the end of its name.
    """
    users = dict.fromkeys(user for node in reads for user in node.users)
    # copies that an earlier transform made for rules that read x
    copies = [user for user in users if user.target in ("clone", kept)]
    sites = [f".{name}" for name in names]
    found = map(decoupling, dict.fromkeys((*users, *(u for c in copies for u in c.users))))
    rules = [rule for rule, at in filter(None, found) if any(s.endswith(f".{at}") for s in sites)]
    rules += [rule for user in users if user.target is gathered for rule in _joint_rules(user)]
    return already(*rules) if rules else ""


def _joint_rules(gathering: fx.Node) -> list[str]:
    """The rules that act on several parameters together."""
    return [found[0] for user in gathering.users if (found := decoupling(user)) is not None]
