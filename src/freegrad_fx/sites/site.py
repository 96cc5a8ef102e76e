"""The data classes of sites. Independent of how sites are found, and of rules.

A site is identified by its place in the model (owner path, op, call index), never by the name of a node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import is_parametrized

from ..graph.nodes import argument, first_argument, operand_node
from ..ops.hooked import call_without_hooks
from ..vocabulary.calls import constants_of
from ..vocabulary.comparisons import Step
from ..vocabulary.op import Op, Operand
from .alone import Alone
from .compound import Compound
from .owners import already

__all__ = ["OUTPUT", "REPLACE", "Located", "LocatedOperation", "LocatedParameter", "Site"]

REPLACE = "replace"
"""The placement of a rule that replaces the backward of an operation, or acts on a parameter."""

OUTPUT = "output"
"""The placement of a rule on the gradient of the output of an operation. The others are the names of operands."""


@dataclass(frozen=True)
class Site:
    """A place in a model where a backward can be replaced.

    Attributes:
        kind: ``"operation"`` or ``"parameter"``.
        op: The canonical name of the operation; the class name, for a call of a class that the table selects by type;
            or ``"parameter"``.
        path: The dotted path of the owner: the module that is called, the module whose `forward` calls the function,
            or the module that holds the parameter; ``""`` for the root.
        call: The number of sites with the same op and path that come before it; 0 for a parameter.
        spelling: The call as written in the model, for example ``nn.ReLU(inplace=True)``, ``F.relu``, ``Tensor.relu_``.
        source: ``file:line`` of the user code that makes the call.
        type: The qualified name of the owner's class, for example ``torch.nn.modules.activation.ReLU``.
        names: The dotted names of a parameter, for example ``layer4.0.conv1.weight``. A tied parameter has several.
        at: Where at the operation a rule acts: ``"replace"``: it takes the place of the backward. ``"output"``: on the
            gradient of the output, before the backward of the operation. The name of an operand: on the gradient that
            this operation gives the operand. Each is a site of its own.
    """

    kind: str
    op: str
    path: str
    call: int
    spelling: str = ""
    source: str = ""
    type: str = ""
    names: tuple[str, ...] = ()
    at: str = REPLACE

    def __setstate__(self, state: dict[str, Any]) -> None:
        # models saved before the kind was renamed
        kind = "operation" if state["kind"] == "activation" else state["kind"]
        self.__dict__.update({"at": REPLACE, **state, "kind": kind})

    @property
    def name(self) -> str:
        """``path:op[call]``, ``path:op[call]@output``, or the name of the parameter, as in reports and errors."""
        if self.names:
            return self.names[0]
        at = "" if self.at == REPLACE else f"@{self.at}"
        return f"{self.path or '<root>'}:{self.op}[{self.call}]{at}"

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """A key that is unique among the sites of the model."""
        return (self.kind, self.name if self.names else self.path, self.op, self.call, self.at)


@dataclass(frozen=True)
class Located:
    """A site in one graph.

    Attributes:
        site: The site.
        owners: The class of the module at the site's path; for a tied parameter, the classes of all modules that hold
            it.
        obstacle: The reason why no rule can act at the site; ``""`` if one can.
        op: Its line in the vocabulary; None for a parameter, and for a call of a class that the table selects by type.
        called: The class of the module or `autograd.Function` that is called; None for other calls.
        tensors: The operands that are tensors in this call; None if it is not known.
        alone: The operation as a function of the activated tensor alone; None if it takes other tensors, and for a
            parameter.
        dim: The dimension along which the operation computes a softmax, if the call says it.
    """

    site: Site
    owners: tuple[type[nn.Module], ...]
    obstacle: str = ""
    op: Op | None = None
    called: type[Any] | None = None
    tensors: tuple[str, ...] | None = None
    alone: Alone | None = field(default=None, compare=False)
    dim: int | None = None

    @property
    def operands(self) -> tuple[str, ...]:
        """The operands at which a rule can act. That of a call of a class is `x`, its first tensor."""
        if self.tensors is not None:
            return self.tensors
        return ("x",) if self.op is None else self.op.operands

    def edges(self, names: Iterable[str]) -> list[Self]:
        """The sites at the output and the operands of an operation.

        Args:
            names: The placements that are wanted.
        """
        if self.site.kind == "parameter":
            return []
        return [self.edge(name) for name in names if name == OUTPUT or name in self.operands]

    def site_at(self, at: str) -> Site:
        """The site at a placement, as reports and rules name it."""
        return self.site if at == self.site.at else replace(self.site, at=at)

    def edge(self, at: str) -> Self:
        """The site at the output or an operand of an operation."""
        return replace(self, site=self.site_at(at))


@dataclass(frozen=True, kw_only=True)
class LocatedOperation(Located):
    """The site of an operation.

    Attributes:
        node: The node of the operation.
        key: The position of the first operand: an index of `node.args` or a key of `node.kwargs`.
        inplace: Whether the operation writes its result into the first operand.
        module: The module that is called; None for other calls.
        arguments: The operands that are tensors; empty for a call of a class that the table selects by type.
        decoupled: The placements at which an earlier transform has put rules, each with the first rule.
        step: The comparison whose result the operation converts; None for other operations.
        compound: The calls that compute the operation, if they are several; None for one call.
    """

    node: fx.Node
    key: int | str
    inplace: bool
    module: nn.Module | None = None
    arguments: tuple[Operand, ...] = ()
    decoupled: tuple[tuple[str, str], ...] = ()
    step: Step | None = None
    compound: Compound | None = None

    @property
    def input(self) -> fx.Node:
        """The node of the first operand."""
        if self.compound is not None:
            return self.compound.operand(self.first.name)
        node = operand_node(self.node, self.first)
        node = argument(self.node, self.key) if node is None else node
        assert isinstance(node, fx.Node)
        return node

    def constants(self) -> dict[str, Any] | None:
        """The arguments of the call besides its operands, by PyTorch's names; None if it cannot be computed again."""
        if self.op is None:
            return None
        if self.compound is not None:
            return dict(self.compound.constants)
        node, first = self.node, first_argument(self.node)
        # With hooks, what follows the first operand describes the call
        args = node.args[first:3] if node.target is call_without_hooks else node.args[first:]
        return constants_of(self.op, self.arguments, node.target, args, node.kwargs, self.module)

    @property
    def first(self) -> Operand:
        """The first operand that is a tensor. An operation that works in place writes into it."""
        return self.arguments[0] if self.arguments else Operand("x", self.key)

    def edges(self, names: Iterable[str]) -> list[Self]:
        """The sites at the output and the operands of an operation, also at those that its module computes.

        Args:
            names: The placements that are wanted.
        """
        wanted = [*names]
        found = super().edges(wanted)
        computed = ((n, self.computed(n)) for n in wanted)
        return found + [replace(self.edge(n), obstacle=why) for n, why in computed if why]

    def computed(self, name: str) -> str:
        """The reason why no rule can reach an operand, because the called module computes it; ``""`` otherwise."""
        if self.module is None or self.op is None or name not in self.op.operands:
            return ""
        return _COMPUTED.format(name) if _is_computed(name, self.module) else ""

    def moved(self, nodes: Mapping[fx.Node, fx.Node]) -> Self:
        """The site in a copy of the graph.

        Args:
            nodes: The nodes of the copy, by those of the graph.
        """
        compound = None if self.compound is None else self.compound.moved(nodes)
        return replace(self, node=nodes[self.node], compound=compound)

    def operand(self, name: str) -> Operand:
        """The operand of a name."""
        return next((o for o in self.arguments if o.name == name), self.first)

    def edge(self, at: str) -> Self:
        """The site at the output or an operand of an operation."""
        rule = dict(self.decoupled).get(at)
        edge = super().edge(at)
        return edge if rule is None else replace(edge, obstacle=already(rule))


_COMPUTED = (
    "the call computes the {} itself, by a parametrization or a hook; give the rule to the parameters from which it is "
    "computed: on(parameter=...)"
)


def _is_computed(name: str, module: nn.Module) -> bool:
    """Whether a module computes what it reads by a name."""
    return isinstance(vars(module).get(name), Tensor) or is_parametrized(module, name)


@dataclass(frozen=True, kw_only=True)
class LocatedParameter(Located):
    """The site of a parameter.

    Attributes:
        tensor: The parameter; or an example tensor, if the parameter is an input of the graph.
        reads: The nodes whose value is the parameter: get_attr nodes, or an input of the graph.
        calls: The nodes that call a module with the parameter, each with the names of the parameter in that module.
        embeds: The embedding modules among the called modules that use it as their table.
    """

    tensor: Tensor
    reads: tuple[fx.Node, ...]
    calls: tuple[tuple[fx.Node, tuple[str, ...]], ...] = ()
    embeds: tuple[nn.Embedding | nn.EmbeddingBag, ...] = ()

    @property
    def sparse(self) -> bool:
        """Whether the gradient of the parameter is sparse."""
        return any(module.sparse for module in self.embeds)

    @property
    def renormalised(self) -> bool:
        """Whether an embedding lookup renormalises the parameter in place."""
        return any(module.max_norm is not None for module in self.embeds)
