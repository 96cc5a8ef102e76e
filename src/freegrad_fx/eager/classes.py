"""Intercepts the calls of module classes that a table selects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from .._torch.dynamo import is_compiling, run_in_python
from .._torch.replacing import all_replaced, replaced
from ..context import intercepting_blocks
from ..vocabulary.activations import OPS
from . import rules
from .rules import with_argument
from .running import in_one_site, looks_for_sites, one_site

__all__ = ["calls_in_python", "calls_of_modules"]


class Decides(Protocol):
    """What is needed of what a block sees."""

    def module_call(self, module: nn.Module, inplace: bool) -> rules.Decisions | None:
        """The decisions for the call of a module that runs now."""

    def run(self, call: Callable[[], Any]) -> Any:
        """Run a call that has been looked at."""


def calls_of_modules(
    kinds: Iterable[type[nn.Module]], decides: Decides, on_demand: Collection[str] = ()
) -> AbstractContextManager[None]:
    """A context in which the calls of modules of some classes are sites of a block.

    The method `forward` of the classes is replaced for this thread, so that hooks run around the rule.

    Args:
        kinds: The classes; classes that are derived from them count, too. The calls of spellings of an op are sites
            already.
        decides: What the block sees and decides.
        on_demand: The ops that the table names among those that are sites only then.
    """

    def around(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not looks_for_sites(decides):
                return forward(self, *args, **kwargs)
            return _called(forward, decides, self, args, kwargs)

        return run

    return all_replaced((kind, "forward", around) for kind in _wanted(kinds, on_demand))


@contextmanager
def calls_in_python(
    kinds: Iterable[type[nn.Module]], on_demand: Collection[str] = ()
) -> Iterator[None]:
    """`calls_of_modules` for the block of a compiled program, which acts only on the calls that run in Python."""
    with ExitStack() as stack:
        for kind in _wanted(kinds, on_demand):
            stack.enter_context(replaced(kind, "forward", _in_python, asks_for_thread=True))
        yield


_IN_PYTHON = "_freegrad_fx_in_python"


@functools.cache  # Dynamo would compile again for another function
def _in_python(forward: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(forward, _IN_PYTHON):
        return forward  # that of a base class, or of another program that runs

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return forward(self, *args, **kwargs)
        blocks = intercepting_blocks()
        if not blocks or not blocks[-1].of_program or in_one_site():
            return forward(self, *args, **kwargs)
        return _called(forward, blocks[-1].observed, self, args, kwargs)

    run_in_python(run.__code__)
    setattr(run, _IN_PYTHON, True)
    return functools.wraps(forward)(run)


def _wanted(
    kinds: Iterable[type[nn.Module]], on_demand: Collection[str]
) -> Iterator[type[nn.Module]]:
    ops = [op for op in OPS.values() if not op.on_demand or op.name in on_demand]
    spelled = {kind for op in ops for kind in op.modules}
    for kind in dict.fromkeys(each for wanted in kinds for each in _with_derived(wanted)):
        if kind not in spelled:
            yield kind


def _with_derived(kind: type[nn.Module]) -> Iterator[type[nn.Module]]:
    yield kind
    for derived in kind.__subclasses__():
        yield from _with_derived(derived)


def _called(
    forward: Callable[..., Any],
    decides: Decides,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The result of a call of a module that is one site."""
    inplace = bool(getattr(module, "inplace", False))
    found = decides.module_call(module, inplace)
    decisions = rules.to_rewrite([found])
    if not decisions:
        # As for `transform`, the call of a class that the table names is one site, whatever is decided for it
        if found is None:
            return forward(module, *args, **kwargs)
        with one_site():
            return decides.run(lambda: forward(module, *args, **kwargs))
    given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    key = next((key for key, value in given if isinstance(value, Tensor)), None)

    def whole(*args: Any, **kwargs: Any) -> Any:
        with one_site():
            return forward(module, *args, **kwargs)

    if key is None:
        return decides.run(lambda: whole(*args, **kwargs))
    x: Tensor = args[key] if isinstance(key, int) else kwargs[key]
    # The module can return its input, and its result can be written into
    operation = with_argument(whole, args, kwargs, key)
    return decides.run(lambda: rules.run(operation, x, decisions, inplace=inplace, on_copy=True))
