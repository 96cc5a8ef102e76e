"""The built-in backward rules, one module for each family. `core` defines what a rule is.

Every module of this package is imported, and the rules that it registers become attributes of the package, under the
names of their functions: ``rules.rectangular``, ``rules.d_relu``. Editors and type checkers read them, with their
parameters, in ``__init__.pyi``, which is generated.
"""

import importlib
import pkgutil

from ..core.register import register
from ..core.rule import Composition, Rule, RuleLike, available, compose, get

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

_BUILT_IN = {get(name).function.__name__: get(name) for name in available()}
globals().update(_BUILT_IN)

__all__ = [
    "Composition",
    "Rule",
    "RuleLike",
    "available",
    "compose",
    "get",
    "register",
]
__all__ += sorted(_BUILT_IN)


def __dir__() -> list[str]:
    return __all__
