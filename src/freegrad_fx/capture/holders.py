"""Removes the proxies of a finished trace from the objects that still hold them."""

from __future__ import annotations

import collections
import gc
import inspect
import weakref
from collections.abc import Iterable
from types import CellType
from typing import Any

from torch import fx

from .outside import CACHE
from .python_state import refill

__all__ = ["still_held"]


def still_held(made: Iterable[weakref.ref[Any]]) -> list[str]:
    """Remove the proxies of a finished trace from the objects that still hold them, and name the objects.

    Garbage is collected and the holders are searched only if a proxy is alive, which it seldom is.
    """
    for generation in range(
        3
    ):  # garbage of the trace is young; to collect all takes long where much is in memory
        made = [ref for ref in made if ref() is not None]
        if made:
            gc.collect(generation)
    found: list[str] = []
    for ref in made:
        if (proxy := ref()) is not None:
            found.extend(_removed(proxy))
    return list(dict.fromkeys(found))


# No comprehension in these functions refers to the proxy: its cell would be a holder of the proxy
def _removed(proxy: Any) -> list[str]:
    found: list[str] = []
    for holder in gc.get_referrers(proxy):
        if isinstance(holder, CACHE):
            holder.cache_clear()
        elif isinstance(holder, dict):
            found += _removed_from_dict(holder, proxy)
        elif isinstance(holder, list | set | collections.deque):
            kept: list[Any] = []
            for item in holder:
                if item is not proxy:
                    kept.append(item)
            refill(holder, kept)
            found.append(f"a {type(holder).__name__} that the forward can reach")
        elif isinstance(holder, CellType):
            del holder.cell_contents
            found.append("a variable of an enclosing function")
        elif not inspect.isframe(holder) and not isinstance(holder, fx.Tracer):
            if type(attributes := getattr(holder, "__dict__", None)) is dict:
                _removed_from_dict(attributes, proxy)
            found.append(f"an object of the type {type(holder).__name__}")
    return found


def _removed_from_dict(holder: dict[Any, Any], proxy: Any) -> list[str]:
    owners = gc.get_referrers(holder)
    caches = [c for c in owners if isinstance(c, CACHE)]
    for cache in caches:
        cache.cache_clear()
    found: list[str] = []
    for key, value in list(holder.items()) if not caches else ():
        if key is proxy or value is proxy:
            del holder[key]
            found.append(f"the entry {key!r} of a dict" if isinstance(key, str) else "a dict")
    return found
