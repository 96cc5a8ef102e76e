"""Sites and a table → a plan: what is decided at every site, and how that is shown.

`decision` is one site's, `decide` makes them, `plan` is all of them, `diff` compares two, `lookup` finds the one of a
model, `layout` lays out text. Nothing here rewrites.
"""

from .decide import make_plan
from .decision import Decided, Decision
from .diff import PlanDiff
from .lookup import PLAN, report
from .plan import Plan

__all__ = ["PLAN", "Decided", "Decision", "Plan", "PlanDiff", "make_plan", "report"]
