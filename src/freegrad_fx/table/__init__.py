"""Rule tables: which sites get which backward.

`selector` says which sites an entry means, `entry` gives them a rule, `table` puts entries in order; `data` and `toml`
write tables and read them. This package knows rules and the vocabulary; it has never seen a graph.
"""

from .entry import FORWARDS, Entry, Selection, on
from .selector import Calls, Names, Selector, Types
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
