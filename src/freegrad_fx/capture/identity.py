"""Whether a forward asks if two tensors are one object, of a tensor that a call may have returned as it was given.

A proxy that represents a result is a new object, but ``x.relu_()`` returns `x` itself, and ``x.contiguous()`` may.
Python does not ask a proxy for the result of `is`. So a model whose code may compare objects is traced twice: with new
proxies for such results, and with the proxy of the argument. If both graphs are the same, nothing depends on it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx, nn

from .._torch.graphs import is_erased
from ..errors import CaptureError
from ..graph.aliasing import written_argument
from ..graph.nodes import called_module
from .proxies import IN_PLACE

__all__ = ["Identities", "traced_as_it_compares"]

# Methods and functions that return their argument if there is nothing to do
_AS_GIVEN = frozenset(
    {
        "contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long", "short", "char",
        "byte", "bool", "cfloat", "cdouble", "chalf", "cpu", "cuda", "conj", "resolve_conj", "resolve_neg", "positive",
        "pos", "coalesce", "pin_memory", "flatten", "sum_to_size", "atleast_1d", "atleast_2d", "atleast_3d", "dropout",
        "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout",
    }
)  # fmt: skip


@dataclass
class Identities:
    """What a trace assumes about the results of such calls, and what it notes.

    Attributes:
        tensors_themselves: Whether parameters and buffers are read themselves, as if the forward compared them.
        same: Which calls return the proxy of their argument: ``"certain"`` are those that work in place, ``"all"`` also
            those that may return their argument; ``""`` none.
        hashed: Whether the forward asked for the hash of a proxy, as a set or the key of a dict does.
        hashed_own: Whether it was the proxy of a parameter or buffer.
        calls: Without `same`, the calls with a proxy as first argument, each with the node of the argument.
        returned: The nodes of such calls, each with the node of the argument.
        uncertain: Whether one of them need not return its argument.
    """

    tensors_themselves: bool = False
    same: str = ""
    hashed: bool = False
    hashed_own: bool = False
    calls: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    returned: dict[fx.Node, fx.Node] = field(default_factory=dict)
    uncertain: bool = False

    def note(self, node: fx.Node, argument: fx.Node, root: nn.Module) -> bool:
        """Note a call. Return whether its result is to be the proxy of its argument.

        Args:
            node: The call.
            argument: The node of its first argument.
            root: The model.
        """
        if not self.same:
            self.calls.append((node, argument))
            return False
        certain, possible = _returns_argument(node, argument, root)
        if certain or possible:
            self.returned[node] = argument
        return certain or (possible and self.same == "all")

    def look_at_calls(self, root: nn.Module) -> None:
        """Look which of the calls that were noted may return their argument."""
        for node, argument in self.calls:
            if is_erased(node):
                continue
            certain, possible = _returns_argument(node, argument, root)
            if certain or possible:
                self.returned[node] = argument
                self.uncertain |= not certain


def _returns_argument(node: fx.Node, argument: fx.Node, root: nn.Module) -> tuple[bool, bool]:
    """Whether a call returns its first argument: certainly, and possibly."""
    module = called_module(node, root)
    if module is not None:
        return _module_returns_argument(module)
    number = node.target in IN_PLACE  # of which the operator makes another one
    certain = not number and written_argument(node, root) is argument
    return certain, number or _may_return_argument(node)


def _module_returns_argument(module: nn.Module) -> tuple[bool, bool]:
    """Whether the call of a module returns its argument: certainly, and possibly."""
    kind = type(module)
    if not kind.__module__.startswith("torch.nn."):
        return False, True
    attributes = object.__getattribute__(module, "__dict__")  # a trace records other reads
    name = kind.__name__
    return bool(attributes.get("inplace")), "Dropout" in name or name in ("Identity", "Flatten")


def _may_return_argument(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] == "real"
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return name in _AS_GIVEN


Traced: TypeAlias = tuple[Any, fx.Graph, list[Any]]
"""The tracer, the graph, and what is lost."""


def traced_as_it_compares(
    trace: Callable[[Identities], Traced], may_compare: bool, root: nn.Module
) -> Traced:
    """The trace of a model in which tensors are one object where they are so in the model.

    Args:
        trace: Traces the model.
        may_compare: Whether code of the model compares variables by `is`, or calls `id`.
        root: The model.

    Raises:
        CaptureError: It depends on the values whether two tensors are one object.
    """
    own = Identities()
    first, error = _attempt(trace, own)
    if own.hashed_own:
        own = Identities(tensors_themselves=True)
        first, error = _attempt(trace, own)
    if own.hashed or (may_compare and first is not None):
        own.look_at_calls(root)
    if not own.returned:
        if first is None:
            raise error
        return first
    other = Identities(own.tensors_themselves, "all")
    every, _ = _attempt(trace, other)
    expected = _outline(every, other)
    if first is not None and _outline(first, own) == expected:
        return first
    if every is not None and not own.uncertain:
        return every
    other = Identities(own.tensors_themselves, "certain")
    certain, _ = _attempt(trace, other)
    if certain is not None and _outline(certain, other) == expected:
        return certain
    if first is every is certain is None:
        raise error
    raise CaptureError(
        f"{type(root).__name__} cannot be captured: its forward compares objects, by `is`, `id`, a set or a dict, "
        f"and a call such as x.contiguous() or x.float() returns x itself or a new tensor, which a graph does not "
        f"know. Compare shapes, dtypes or a flag instead; or call the model in a block, `with freegrad_fx.use(rules, "
        f"model=model):`, which runs the model itself."
    )


def _attempt(
    trace: Callable[[Identities], Traced], identities: Identities
) -> tuple[Traced | None, CaptureError]:
    """A trace, and its error if there is no trace."""
    try:
        return trace(identities), CaptureError()
    except CaptureError as error:
        return None, error


def _outline(traced: Traced | None, identities: Identities) -> list[tuple[Any, ...]]:
    """The nodes of a traced graph without their names, with one name for all nodes that may be one object."""
    rows: list[tuple[Any, ...]] = []
    stands_for: dict[fx.Node, str] = {}
    for node in () if traced is None else traced[1].nodes:
        rows.append((node.op, node.target, fx.map_arg((node.args, node.kwargs), stands_for.get)))
        argument = identities.returned.get(node)
        stands_for[node] = f"%{len(rows)}" if argument is None else stands_for[argument]
    return rows
