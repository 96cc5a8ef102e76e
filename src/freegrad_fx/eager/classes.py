"""Intercepts the calls of module classes that a table selects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from .._torch.replacing import Make, all_replaced
from ..plan import Decision
from . import rules
from .rules import with_argument
from .running import looks_for_sites, one_site

__all__ = ["calls_of_modules"]


class Decides(Protocol):
    """What is needed of what a block sees."""

    def module_call(self, module: nn.Module, inplace: bool) -> Decision | None:
        """The decision for the call of a module that runs now."""


def calls_of_modules(
    kinds: Iterable[type[nn.Module]], spelled: Collection[type[nn.Module]], decides: Decides
) -> AbstractContextManager[None]:
    """A context in which the calls of modules of some classes are sites of a block.

    The method `forward` of the classes is replaced for this thread, so that hooks run around the rule.

    Args:
        kinds: The classes; classes that are derived from them count, too.
        spelled: The classes that are spellings of an activation, whose calls are sites already.
        decides: What the block sees and decides.
    """

    def wanted() -> Iterator[tuple[Any, str, Make]]:
        for kind in dict.fromkeys(each for wanted in kinds for each in _with_derived(wanted)):
            if kind not in spelled:
                yield kind, "forward", lambda forward: _around(forward, decides)

    return all_replaced(wanted())


def _with_derived(kind: type[nn.Module]) -> Iterator[type[nn.Module]]:
    yield kind
    for derived in kind.__subclasses__():
        yield from _with_derived(derived)


def _around(forward: Callable[..., Any], decides: Decides) -> Callable[..., Any]:
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not looks_for_sites(decides):
            return forward(self, *args, **kwargs)
        inplace = bool(getattr(self, "inplace", False))
        decision = decides.module_call(self, inplace)
        if decision is None or decision.action != "rewrite":
            # As for `transform`, the call of a class that the table names is one site, whatever is decided for it
            with one_site() if decision is not None else nullcontext():
                return forward(self, *args, **kwargs)
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        key = next((key for key, value in given if isinstance(value, Tensor)), None)

        def whole(*args: Any, **kwargs: Any) -> Any:
            with one_site():
                return forward(self, *args, **kwargs)

        if key is None:
            return whole(*args, **kwargs)
        x: Tensor = args[key] if isinstance(key, int) else kwargs[key]
        # The module can return its input, and its result can be written into
        operation = with_argument(whole, args, kwargs, key)
        return rules.run(operation, x, decision, inplace=inplace, on_copy=True)

    return run
