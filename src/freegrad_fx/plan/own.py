"""The tensors that parameters have for themselves, in the places of their rules and forwards."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from .._torch.exporting import is_fake
from ..core.own import Own
from ..errors import PlanError
from ..sites.site import Located, LocatedParameter
from ..table import Entry

__all__ = ["with_own_tensors"]


def with_own_tensors(place: Located, entry: Entry) -> Entry:
    """The entry with the tensors of a parameter in the places of `Own`; the entry itself if it has none.

    Raises:
        PlanError: The site is no parameter, or the values of the parameter are not known.
    """
    if not any(isinstance(value, Own) for value in _values(entry)):
        return entry
    if not isinstance(place, LocatedParameter) or is_fake(place.tensor):
        what = (
            "the values of the parameter are not known where a program is compiled. Transform the model, or run it in "
            "a block of use(), and compile that"
            if isinstance(place, LocatedParameter)
            else f"{place.site.name} is an operation. Select parameters: on(parameter='*.weight')"
        )
        raise PlanError(
            f"entry {entry.selector!r} has a tensor for each parameter, which is made from its values, but {what}."
        )
    tensor = place.tensor

    def own(value: Any) -> Any:
        return value.of(tensor) if isinstance(value, Own) else value

    rules = tuple(
        rule(**{name: own(v) for name, v in rule.bound.items() if isinstance(v, Own)})
        for rule in entry.rules or ()
    )
    forward: Any = entry.forward
    if isinstance(forward, functools.partial):
        keywords = {name: own(value) for name, value in forward.keywords.items()}
        forward = functools.partial(forward.func, *map(own, forward.args), **keywords)
    return replace(entry, rules=rules, forward=forward)


def _values(entry: Entry) -> Iterator[Any]:
    for rule in entry.rules or ():
        yield from rule.bound.values()
    if isinstance(entry.forward, functools.partial):
        yield from (*entry.forward.args, *entry.forward.keywords.values())
