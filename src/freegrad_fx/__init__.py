"""Decoupled backward rules for unmodified PyTorch models, as a compiler pass over FX graphs.

>>> import freegrad_fx as fg
>>> gm = fg.transform(model, rules)      # doctest: +SKIP
"""

import difflib
import importlib
from typing import TYPE_CHECKING, Any

from . import core, ops, rules, vocabulary
from ._moved import find_moved
from .blocks import native
from .core.register import register
from .core.rule import Composition, Rule, compose, get
from .errors import (
    CaptureError,
    FreegradWarning,
    PlanError,
    RuleCheckError,
    RuleError,
    TableError,
    TorchVersionError,
    VerificationError,
)
from .modules import Activation
from .vocabulary.forwards import forward

if TYPE_CHECKING:
    from . import extension, functional, integrations, quantizers, schedules, tables, testing
    from .capture.captured import CapturedModule
    from .compared import Comparison, compare
    from .counted import MemoryReport, memory
    from .drawing import Drawing, draw
    from .dynamo.backend import Backend, backend, compile
    from .eager import use
    from .materialized import materialize
    from .monitor import GradientMonitor
    from .pipeline import explain, transform
    from .plan import Decision, Plan, report
    from .plot import plot_rule
    from .relevance import attribute
    from .rule_values import RuleValue, rule_parameters, set_parameters
    from .scaling import unscaled
    from .schedules import RuleScheduler
    from .sites.site import Site
    from .table import RuleTable, on
    from .table.listing import list_rules
    from .verification import Verification
    from .verification.verify import verify

__version__ = "0.1.0"

find_moved()

# Modules and names that are imported on first access, so that writing rules and tables does not import the capture
_MODULES = (
    "extension",
    "functional",
    "integrations",
    "quantizers",
    "schedules",
    "tables",
    "testing",
)
_LATER = {
    "Backend": "dynamo",
    "CapturedModule": "capture.captured",
    "Comparison": "compared",
    "Decision": "plan",
    "GradientMonitor": "monitor",
    "MemoryReport": "counted",
    "Drawing": "drawing",
    "Plan": "plan",
    "RuleScheduler": "schedules",
    "RuleTable": "table",
    "RuleValue": "rule_values",
    "Site": "sites.site",
    "Verification": "verification",
    "attribute": "relevance",
    "backend": "dynamo",
    "compare": "compared",
    "compile": "dynamo",
    "draw": "drawing",
    "explain": "pipeline",
    "list_rules": "table.listing",
    "memory": "counted",
    "materialize": "materialized",
    "on": "table",
    "plot_rule": "plot",
    "report": "plan",
    "rule_parameters": "rule_values",
    "set_parameters": "rule_values",
    "transform": "pipeline",
    "unscaled": "scaling",
    "use": "eager",
    "verify": "verification",
}

__all__ = [
    "Activation",
    "Backend",
    "CaptureError",
    "CapturedModule",
    "Comparison",
    "Composition",
    "Decision",
    "Drawing",
    "FreegradWarning",
    "GradientMonitor",
    "MemoryReport",
    "Plan",
    "PlanError",
    "Rule",
    "RuleCheckError",
    "RuleError",
    "RuleScheduler",
    "RuleTable",
    "RuleValue",
    "Site",
    "TableError",
    "TorchVersionError",
    "Verification",
    "VerificationError",
    "attribute",
    "backend",
    "compare",
    "compile",
    "compose",
    "core",
    "draw",
    "explain",
    "extension",
    "forward",
    "functional",
    "get",
    "integrations",
    "list_rules",
    "materialize",
    "memory",
    "native",
    "on",
    "ops",
    "plot_rule",
    "quantizers",
    "register",
    "report",
    "rule_parameters",
    "rules",
    "schedules",
    "set_parameters",
    "tables",
    "testing",
    "transform",
    "unscaled",
    "use",
    "verify",
    "vocabulary",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LATER:
        near = () if name.startswith("_") else difflib.get_close_matches(name, __dir__())
        hint = f". Did you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{hint}")
    value = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
