"""The same pass behind `torch.compile`: for programs that no symbolic tracer can flatten.

Dynamo hands a backend one graph after the other, in which every module is opened. Each is rewritten by the stages that
`transform` has, and goes on to another backend, which compiles it. `backend` is what users call; a `session` is one
call of a compiled program; a `piece` is one graph.
"""

from .backend import Backend, backend, compile

__all__ = ["Backend", "backend", "compile"]
