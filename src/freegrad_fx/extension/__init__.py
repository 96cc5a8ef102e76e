"""The optional C++ extension: a node of the autograd graph that runs the backward of rules without Python.

It is built on request, by `build`, by ``freegrad-fx build`` or with the environment variable
``FREEGRAD_FX_EXTENSION=build``, and used from then on in every process. Without it everything works, and gives the same
gradients.
"""

from .library import Status, build, status

__all__ = ["Status", "build", "status"]


def __dir__() -> list[str]:
    return __all__
