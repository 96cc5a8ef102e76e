"""Decoupled backward rules for unmodified PyTorch models, as a compiler pass over FX graphs.

>>> import freegrad_fx as fg
>>> gm = fg.transform(model, rules)      # doctest: +SKIP
"""

from . import activations, functional, ops, rules
from .captured import CapturedModule
from .context import native, use
from .dynamo import Backend, backend, compile
from .errors import (
    CaptureError,
    FreegradWarning,
    PlanError,
    RuleError,
    TableError,
    TorchVersionError,
)
from .modules import Activation
from .plan import Decision, Plan, report
from .rules import Composition, Rule, compose, get, register
from .sites import Site
from .table import RuleTable, on
from .transform import explain, transform

__version__ = "0.1.0"

__all__ = [
    "Activation",
    "Backend",
    "CaptureError",
    "CapturedModule",
    "Composition",
    "Decision",
    "FreegradWarning",
    "Plan",
    "PlanError",
    "Rule",
    "RuleError",
    "RuleTable",
    "Site",
    "TableError",
    "TorchVersionError",
    "activations",
    "backend",
    "compile",
    "compose",
    "explain",
    "functional",
    "get",
    "native",
    "on",
    "ops",
    "register",
    "report",
    "rules",
    "transform",
    "use",
]
