"""Applies a plan to a graph. This is the only stage that changes graphs.

- `graphs`: a whole graph: which nodes are rewritten, in which order
- `steps`: the comparisons that get a rule
- `operations`: the rules of the places at one operation
- `surgery`: the nodes that are inserted at one site
- `memory`: the copies that a site needs because operations work in place or share memory
"""

from .graphs import rewrite, without_ambient

__all__ = ["rewrite", "without_ambient"]
