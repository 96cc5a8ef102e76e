"""The interface of FreeGrad 1.0.1: ``import freegrad_fx.compat.freegrad as freegrad`` is the whole port.

The names, signatures and meaning are those of the package `freegrad` (Troiano et al. 2025,
doi:10.1016/j.neucom.2025.131178), and differ from this package's own: a rule is a function of ``ctx``, the gradient and
the input; of nested blocks the innermost replaces the others, scopes and all; a rule for parameters gets no input; the
parts of a composition share their parameters. What FreeGrad's layers cannot do, these can: they compile into one graph,
and have second derivatives. Ambient sites of ``transform(model)`` follow its blocks too.
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
