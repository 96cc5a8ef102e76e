"""The rules on the paths of an autograd graph, from a result to the values that get gradients."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..core.rule import Rule
from .functions import rule_of
from .gates import is_closed
from .several import rule_of_several

__all__ = ["HIDING", "Paths", "paths_to"]

# Autograd nodes, by prefix, whose backward is not visible as nodes of the autograd graph
HIDING = ("CompiledFunction", "ApplyTemplate", "Vmapped", "CheckpointFunction")

Applied = tuple[Rule, str]
"""A rule and its site."""


class Paths:
    """What is on the paths from a result to some values.

    Attributes:
        found: For each value, the last rule that was looked for on each of its paths, with its site; None for a path
            without one.
        passed: Pairs of a rule that was looked for, and another rule that comes after it on a path.
        hidden: The name of a node that hides what it computes; ``""`` if there is none.
    """

    def __init__(self) -> None:
        self.found: list[frozenset[Applied | None]] = []
        self.passed: list[tuple[Applied, Applied]] = []
        self.hidden = ""


def paths_to(values: Sequence[Tensor], result: Tensor, is_wanted: Callable[[Rule], bool]) -> Paths:
    """Look for rules on all paths from a result to some values.

    Args:
        values: Tensors that require gradients.
        result: A tensor that is computed from them.
        is_wanted: Whether a rule is looked for.
    """
    paths = Paths()
    start: Any = get_gradient_edge(result).node
    uses, known, stack = Counter[Any](), {start}, [start]
    while stack:
        for before, _ in stack.pop().next_functions:
            if before is not None:
                uses[before] += 1
                if before not in known:
                    known.add(before)
                    stack.append(before)
    # By node and number of the output: an in-place operation has other paths than the value before it
    arriving: defaultdict[Any, dict[int, set[Applied | None]]] = defaultdict(dict)
    arriving[start] = {0: {None}}
    ready = [start]
    while ready:
        node = ready.pop()
        if node.name().startswith(HIDING):
            paths.hidden = node.name()
        applied = rule_of(node) or rule_of_several(node)
        through: set[Applied | None] = set().union(*arriving[node].values())
        through = set() if is_closed(node) else through
        for place, (before, number) in enumerate(node.next_functions):
            if before is None:
                continue
            leaving = through
            if applied is not None and place:  # the first one is the output of the native operation
                paths.passed += [(a, applied) for a in through if a is not None]
                leaving = {applied} if is_wanted(applied[0]) else through
            arriving[before].setdefault(number, set()).update(leaving)
            uses[before] -= 1
            if not uses[before]:
                ready.append(before)
    for value in values:
        edge = get_gradient_edge(value)
        paths.found.append(frozenset(arriving[edge.node].get(edge.output_nr, ())))
    return paths
