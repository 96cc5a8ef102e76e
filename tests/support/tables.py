"""Random rule tables, for hypothesis: every field, every kind of value, every built-in rule."""

from __future__ import annotations

import math
import operator
from typing import Any

from hypothesis import strategies as st
from torch import nn

import freegrad_fx as fg

OPS = ["relu", "gelu", "sigmoid", "clamp", "activations", "softmax", "quantizers", "params", "all"]
TYPES = [nn.ReLU, nn.Linear, "torch.nn.GELU", "torch.nn.modules.conv.Conv2d", "my.package.Block"]

text = st.text(st.characters(exclude_characters="[", exclude_categories=["Cs"]), max_size=8)
patterns = text.map(lambda t: t.removeprefix("re:")) | st.sampled_from(
    ["re:a|b", "re:[[]", "[ab]*"]
)
slices = st.builds(
    slice,
    st.none() | st.integers(0, 9),
    st.none() | st.integers(0, 9),
    st.none() | st.integers(1, 3),
)


def one_or_more(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return values | st.lists(values, min_size=1, max_size=3, unique_by=_meaning)


def _meaning(value: Any) -> Any:
    """Slices are not hashable, and some mean the same."""
    if not isinstance(value, slice):
        return str(value)
    return (value.start or 0, value.stop, value.step or 1)


selections = st.fixed_dictionaries(
    {},
    optional={
        "op": one_or_more(st.sampled_from(OPS)),
        "module": one_or_more(patterns),
        "type": one_or_more(st.sampled_from(TYPES)),
        "call": one_or_more(st.integers(0, 99) | slices),
    },
) | st.fixed_dictionaries(
    {"parameter": one_or_more(patterns)},
    optional={
        "op": st.sampled_from(["params", "all"]),
        "module": one_or_more(patterns),
        "type": one_or_more(st.sampled_from(TYPES)),
    },
)

positive = st.floats(1e-3, 1e300) | st.just(math.inf) | st.integers(1, 10**6)
VALUES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "rectangular": {"a": positive.map(operator.neg), "b": positive},
    "scale": {"s": st.floats(allow_nan=False)},
    "reverse": {"alpha": st.floats(allow_nan=False)},
    "clip_norm": {"max_norm": positive, "eps": positive},
    "centralize": {"dim": st.integers(-3, 3) | st.lists(st.integers(-3, 3)).map(tuple)},
    "arctan": {"alpha": positive},
    "d(ReLU)": {},
    "full_jam": {},
}
rules = st.sampled_from(sorted(VALUES)).flatmap(
    lambda name: st.fixed_dictionaries({}, optional=VALUES[name]).map(
        lambda values: fg.get(name)(**values)
    )
)
compositions = st.lists(rules, min_size=1, max_size=3).map(lambda parts: fg.compose(*parts))


@st.composite
def entries_of(draw: st.DrawFn) -> Any:
    rule = draw(st.none() | rules | compositions)
    forward = None if rule is None else draw(st.none() | st.sampled_from(["heaviside", "tanh"]))
    return fg.on(**draw(selections), forward=forward).backward(rule)


entries = entries_of()
tables = st.lists(entries, max_size=5).map(fg.RuleTable)
