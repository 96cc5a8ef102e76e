"""Rule tables: which sites get which backward.

`fields` reads what a user writes, `classes` names classes, `selector` says which sites are meant, `entry` gives them
a rule, `table` puts entries in order; `data` and `toml` write tables and read them. This package knows rules and the
vocabulary; it has never seen a graph.
"""

from .entry import FORWARDS, Entry, Selection, on
from .fields import Calls, Names, Types
from .selector import Selector
from .table import RulesLike, RuleTable

__all__ = [
    "FORWARDS",
    "Calls",
    "Entry",
    "Names",
    "RuleTable",
    "RulesLike",
    "Selection",
    "Selector",
    "Types",
    "on",
]
