"""What a site is. Plain data: knows nothing of how sites are found, and nothing of rules.

A site is named by what it is in the model (owner path, op, call index), never by the name of a node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from ..graph.nodes import argument
from ..vocabulary.op import Op

__all__ = ["Located", "LocatedOperation", "LocatedParameter", "Site"]


@dataclass(frozen=True)
class Site:
    """One place in one model where a backward can be replaced.

    Attributes:
        kind: ``"operation"`` or ``"parameter"``.
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        # what was saved before kinds had the names of now
        kind = "operation" if state["kind"] == "activation" else state["kind"]
        self.__dict__.update({**state, "kind": kind})

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
class LocatedOperation(Located):
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
class LocatedParameter(Located):
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
