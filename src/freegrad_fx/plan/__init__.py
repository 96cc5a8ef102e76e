"""Sites and a table → a plan: what is decided at every site, and how that is shown.

`decision` is one site's, `decide` makes them, `plan` is all of them, `diff` compares two, `report` finds the one of a
model, `layout` lays out text. Nothing here rewrites.
"""

from .decide import FROZEN, make_plan
from .decision import Decided, Decision
from .diff import PlanDiff
from .plan import Plan
from .report import PLAN, report

__all__ = ["FROZEN", "PLAN", "Decided", "Decision", "Plan", "PlanDiff", "make_plan", "report"]
