"""The interface of FreeGrad 1.0.1. To port code, write ``import freegrad_fx.compat.freegrad as freegrad``.

Names, signatures and semantics are those of the package `freegrad` (Troiano et al. 2025,
doi:10.1016/j.neucom.2025.131178). They differ from the rest of this package:

- A rule is a function of ``ctx``, the gradient and the input.
- The innermost of nested blocks replaces the others, including their scopes.
- A rule for parameters receives None as the input.
- The parts of a composition share their parameters.

Unlike FreeGrad's layers, these layers can be compiled into one graph and have second derivatives. The ambient sites of
``transform(model)`` follow the blocks of this interface too.
"""

from importlib.metadata import PackageNotFoundError, version

from . import context, functional, hook, registry, transforms, wrappers
from .context import use
from .registry import compose, get, register
from .wrappers import Activation

try:
    __version__ = version("freegrad_fx")
except PackageNotFoundError:  # run from a checkout
    __version__ = "0.0.0"

__all__ = [
    "Activation",
    "__version__",
    "compose",
    "context",
    "functional",
    "get",
    "hook",
    "register",
    "registry",
    "transforms",
    "use",
    "wrappers",
]
