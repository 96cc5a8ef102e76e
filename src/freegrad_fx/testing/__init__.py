"""Tests for rules: `check_rule` compares what a rule does with its formula, its declaration and a reference.

Needs nothing but PyTorch: it works under any test runner, and without one. Does not know any rule by name.
"""

from .check import CHECKS, check_rule
from .failure import Failure

__all__ = ["CHECKS", "Failure", "check_rule"]


def __dir__() -> list[str]:
    return __all__
