"""Intercepts the calls of module classes that a table selects."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn

from .._torch.replacing import Make, all_replaced
from ..context import intercepting_blocks
from ..plan import Decision
from .rules import decoupled_by, replaced_forward, rules_act
from .running import in_one_site, one_site

__all__ = ["calls_of_modules"]


class Decides(Protocol):
    """What is needed of a block."""

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
        decides: The block.
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
        if in_one_site() or not any(block is decides for block in intercepting_blocks()):
            return forward(self, *args, **kwargs)
        inplace = bool(getattr(self, "inplace", False))
        decision = decides.module_call(self, inplace)
        if decision is None or decision.action != "rewrite":
            # As for `transform`, the call of a class that the table names is one site, whatever is decided for it
            with one_site() if decision is not None else nullcontext():
                return forward(self, *args, **kwargs)
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        key = next((key for key, value in given if isinstance(value, Tensor)), None)
        if key is None:
            with one_site():
                return forward(self, *args, **kwargs)
        return _run(self, forward, args, kwargs, key, inplace, decision)

    return run


def _run(
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    key: int | str,
    inplace: bool,
    decision: Decision,
) -> Any:
    x: Tensor = args[key] if isinstance(key, int) else kwargs[key]

    def operation(given: Tensor) -> Any:
        if decision.forward is not None:
            return replaced_forward(decision.forward, given)
        with one_site():
            if isinstance(key, int):
                return forward(module, *args[:key], given, *args[key + 1 :], **kwargs)
            return forward(module, *args, **{**kwargs, key: given})

    acts = rules_act() and (x.is_floating_point() or x.is_complex())
    if not acts:
        return operation(x)
    start = x.clone() if inplace else x
    stop = start.detach()
    # The module can return its input, and its result can be written into
    y = operation(stop.clone())
    out = decoupled_by(decision.rules, y, start, decision.site.name)
    return x.copy_(out) if inplace else out
