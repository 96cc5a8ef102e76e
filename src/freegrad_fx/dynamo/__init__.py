"""The same pass as a backend of `torch.compile`: for programs that cannot be traced into one graph.

Dynamo passes the graphs that it captures to a backend, one after the other, with every module traced into. Each graph
is rewritten by the stages of `transform`, and then compiled by another backend. What Dynamo leaves to Python is
intercepted as in a `use` block.

- `backend`: the backend, and the functions that users call
- `pieces`: one captured graph
- `session`: one call of a compiled program
- `findings`, `programs`: the report, and the problems to warn about
- `homes`, `frames`: the modules and parameters that nodes and running code belong to
- `folding`, `whole`: calls of selected classes as one node
- `closed`, `nested`: operators that run nested graphs
- `outside`: the sites that run in Python
- `watch`: operations in Python that no rule can reach
- `lowering`: the form of a rewritten graph that caches accept
"""

from .backend import Backend, backend, compile

__all__ = ["Backend", "backend", "compile"]
