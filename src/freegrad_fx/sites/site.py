"""The data classes of sites. Independent of how sites are found, and of rules.

A site is identified by its place in the model (owner path, op, call index), never by the name of a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from ..graph.nodes import argument
from ..vocabulary.op import Op, Operand
from .alone import Alone

__all__ = ["Located", "LocatedOperation", "LocatedParameter", "Site"]


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
        # models saved before the kind was renamed
        kind = "operation" if state["kind"] == "activation" else state["kind"]
        self.__dict__.update({**state, "kind": kind})

    @property
    def name(self) -> str:
        """``path:op[call]``, or the name of the parameter, as in reports and error messages."""
        return self.names[0] if self.names else f"{self.path or '<root>'}:{self.op}[{self.call}]"

    @property
    def key(self) -> tuple[str, str, str, int]:
        """A key that is unique among the sites of the model."""
        return (self.kind, self.name if self.names else self.path, self.op, self.call)


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
        alone: The operation as a function of the activated tensor alone; None if it takes other tensors, and for a
            parameter.
    """

    site: Site
    owners: tuple[type[nn.Module], ...]
    obstacle: str = ""
    op: Op | None = None
    called: type[Any] | None = None
    alone: Alone | None = field(default=None, compare=False)


@dataclass(frozen=True, kw_only=True)
class LocatedOperation(Located):
    """The site of an operation.

    Attributes:
        node: The node of the operation.
        key: The position of the first operand: an index of `node.args` or a key of `node.kwargs`.
        inplace: Whether the operation writes its result into the first operand.
        module: The module that is called; None for other calls.
        arguments: The operands that are tensors; empty for a call of a class that the table selects by type.
    """

    node: fx.Node
    key: int | str
    inplace: bool
    module: nn.Module | None = None
    arguments: tuple[Operand, ...] = ()

    @property
    def input(self) -> fx.Node:
        """The node of the first operand."""
        node = argument(self.node, self.key)
        assert isinstance(node, fx.Node)
        return node


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
