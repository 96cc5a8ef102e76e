"""Rule tables: which sites get which backward.

`fields` validates the arguments of `on`, `classes` maps classes to names, `selector` matches sites, `entry` combines a
selector with rules, and `table` orders entries. `data` and `toml` convert tables to and from plain data and TOML.
Depends on rules and the vocabulary, not on graphs.
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
