"""What a forward stores in attributes: which attributes its class can replace, and whether a value is made anew."""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import fx

from .outside import is_library

__all__ = ["attributes_replaced", "is_made_from_state"]


@functools.lru_cache(maxsize=4096)
def attributes_replaced(kind: Any) -> frozenset[str]:
    """The names of the attributes that methods of a module's class assign, without what its constructor assigns."""
    found: set[str] = set()
    for base in kind.__mro__:
        if not is_library(base.__module__):
            for name, value in vars(base).items():
                if isinstance(value, FunctionType) and name != "__init__":
                    found.update(_stored(value.__code__))
    return frozenset(found)


def _stored(code: CodeType) -> set[str]:
    found = {
        instruction.argval
        for instruction in dis.get_instructions(code)
        if instruction.opname == "STORE_ATTR"
    }
    return found.union(*(_stored(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def is_made_from_state(nodes: Iterable[fx.Node]) -> bool:
    """Whether nodes are computed from parameters, buffers and constants alone, without inputs and random numbers."""
    pending, seen = [*nodes], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            if node.op == "placeholder" or _draws(node):
                return False
            pending += node.all_input_nodes
    return True


_RANDOM = ("rand", "normal", "bernoulli", "dropout", "multinomial", "poisson", "exponential")


def _draws(node: fx.Node) -> bool:
    if (tags := getattr(node.target, "tags", None)) is not None:  # an operator of torch.export
        return torch.Tag.nondeterministic_seeded in tags
    if node.op == "call_module":  # a dropout, or what else the module does
        return True
    name = getattr(node.target, "__name__", str(node.target))
    return node.op != "get_attr" and any(word in name for word in _RANDOM)
