"""Sites and a rule table → a plan: what is decided at every site, and how the decisions are shown.

- `decision`: the decision for one site
- `decide`: makes the decisions
- `plan`: the decisions for a model, as text, HTML, JSON and plain data
- `diff`: compares two plans
- `dims`: checks the dimension of rules for a softmax
- `noise`: how much of the information in a parameter a replacement forward keeps
- `lookup`: finds the plan of a transformed or compiled model
- `layout`: tables of text and HTML

Nothing in this package rewrites a graph.
"""

from .decide import also, make_plan
from .decision import Decided, Decision
from .diff import PlanDiff
from .lookup import PLAN, report
from .plan import Plan

__all__ = ["PLAN", "Decided", "Decision", "Plan", "PlanDiff", "also", "make_plan", "report"]
