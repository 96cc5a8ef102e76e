"""The blocks that are in force, and the state that the sites of a graph read. `blocks` has those of users.

Independent of graphs. The state is local to the thread, like the grad mode of PyTorch.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    ContextDecorator,
    ExitStack,
    contextmanager,
    nullcontext,
)
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from ._torch.dynamo import (
    is_compiling,
    is_traced_by_dynamo,
    leave_to_python,
    takes_for_constant,
)
from ._torch.functions import follow_checkpoints
from .core.declaration import Declaration
from .core.rule import Rule
from .core.scopes import SCOPES
from .errors import RuleError

__all__ = [
    "OWN_RULES",
    "Block",
    "ambient_rules",
    "ambient_sites_were_compiled",
    "deciding_blocks",
    "explicit_rules_act",
    "in_a_block",
    "in_python",
    "in_the_blocks_of_now",
    "inside_of_a_block",
    "intercepted",
    "intercepting_blocks",
    "left_alone",
    "outside_of_blocks",
    "programs",
    "require_own_blocks",
    "surrounded",
    "table_in_force",
    "tables_cannot_be_traced",
    "thread_state",
]

Called = TypeVar("Called", bound=Callable[..., Any])


OWN_RULES = "_has_own_rules"
"""A name in the globals of code whose sites have rules of their own, or those of the block, already."""


class _State(threading.local):
    """The rules in force in a thread. `explicit`, `activations` and `params` are derived from `blocks`."""

    def __init__(self) -> None:
        # Dynamo guards attributes of the object, not of its class
        self.explicit = True
        self.table = False
        self.sites: Mapping[str, tuple[Rule, ...] | None] | None = None
        self.activations: tuple[Rule, ...] = ()
        self.params: tuple[Rule, ...] = ()
        self.blocks: tuple[Block, ...] = ()
        self.intercepting: tuple[Block, ...] = ()
        self.traced: tuple[Block, ...] = ()
        self.deciding: tuple[Block, ...] = ()
        self.surroundings: tuple[_Surrounding, ...] = ()


_state = _State()

# The blocks that the current asynchronous task has entered. They are compared with those of the thread, so that a task
# never uses the blocks of another task. This cannot replace `_State`: Dynamo can guard thread-local attributes, but not
# context variables.
_entered: ContextVar[tuple[Block, ...]] = ContextVar("freegrad_fx_blocks", default=())


# Has an entry as soon as any thread has entered a block: until then, nobody has to look at the state of a thread. A
# capture is in a block of its own, and leaves no entry behind.
_used: list[bool] = []
_used_for_good: list[bool] = []


def thread_state() -> tuple[list[bool], Any, ContextVar[Any]]:
    """What says whether rules that tables gave to sites act, for code in C++ that asks at every site.

    Returns:
        A list that is empty until a block is entered; the state of the thread; and the blocks of the asynchronous task.
        Rules act if ``blocks`` of the state are those of the task, and ``explicit`` is true.
    """
    return _used, _state, _entered


def ambient_rules(scope: str, site: str = "") -> tuple[Rule, ...]:
    """The rules in force at an ambient site; empty where the backward is native.

    Args:
        scope: ``"activations"`` or ``"params"``.
        site: The name of the site, by which a table of a block decides.

    Raises:
        RuntimeError: The thread is in the blocks of another asynchronous task.
        RuleError: A block has a table, which cannot decide the site where it runs.
    """
    if is_compiling():
        _note_compiled()
    require_own_blocks()
    if _state.table and (decided := _by_table(site)) is not None:
        return decided
    return _state.activations if scope == "activations" else _state.params


def _by_table(site: str) -> tuple[Rule, ...] | None:
    """The rules that the tables of blocks give to an ambient site; None if no entry decides it."""
    if not is_compiling():
        if _state.sites is None and _state.deciding and _state.intercepting:
            return ()  # an `Activation`, whose operation is intercepted
        if _state.sites is not None and site in _state.sites:
            return _state.sites[site]
    raise RuleError(
        f"the table of a use() block cannot decide {site or 'an ambient site'}, which is ambient: in an export, in a "
        f"part of a transformed model that is kept as one opaque call, in code that fg.compile runs, and in a model "
        f"that an earlier version saved, ambient sites follow blocks with one rule. Give use() one rule, or transform "
        f"the original model with the table: transform(model, rules)."
    )


_compiled: list[bool] = []


@takes_for_constant
def _note_compiled() -> None:
    _compiled[:] = [True]


def ambient_sites_were_compiled() -> bool:
    """Whether a compiler has traced ambient sites in this process. Compiled code does not tell that it runs."""
    return bool(_compiled)


def table_in_force() -> bool:
    """Whether a block with a table is in force."""
    return _state.table


def tables_cannot_be_traced() -> bool:
    """Whether Dynamo traces code whose ambient sites a table may decide, so that it has to run in Python."""
    return is_traced_by_dynamo() and _state.table


@leave_to_python
def in_python(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function that Dynamo must not trace."""
    return function(*args, **kwargs)


def explicit_rules_act() -> bool:
    """Whether rules that a table gave to sites act; they do not inside of `native`.

    Raises:
        RuntimeError: The thread is in the blocks of another asynchronous task.
    """
    if not is_compiling():
        if not _used:
            return True
        require_own_blocks()
    return _state.explicit


def intercepting_blocks() -> tuple[Any, ...]:
    """The blocks in force that intercept plain eager code, the innermost first; none inside of `native`.

    In code that a compiler traces, they are those that act on traced code too.

    Raises:
        RuntimeError: The thread is in the blocks of another asynchronous task.
    """
    if is_compiling():
        return _state.traced
    if _state.intercepting:
        require_own_blocks()
    return _state.intercepting


def programs() -> tuple[Any, ...]:
    """The blocks in force of compiled programs."""
    return tuple(block for block in _state.intercepting if block.of_program)


def deciding_blocks() -> tuple[Any, ...]:
    """The blocks of the user that are in force in this thread, the innermost first; none inside of `native`."""
    return _state.deciding


def in_a_block() -> bool:
    """Whether this thread is in a block, also in one of `native`."""
    return bool(_state.blocks)


def require_own_blocks() -> None:
    """Raise `RuntimeError` if the thread is in the blocks of another asynchronous task."""
    if not is_compiling() and _entered.get() != _state.blocks:
        raise RuntimeError(
            "the use() and native() blocks of this asynchronous task differ from those in force in its thread. A block "
            "applies to one thread: enter it in the task or thread that calls the model, around the call, and do not "
            "await inside of it."
        )


def _put(blocks: tuple[Block, ...]) -> None:
    """Set the blocks of the thread, the innermost last."""
    if not (_used_for_good or all(block is _CAPTURE for block in blocks)):
        _used_for_good.append(True)
        _used.append(True)
    values: dict[str, Any] = {
        "explicit": True,
        "table": False,
        "sites": None,
        **dict.fromkeys(SCOPES.values(), ()),
    }
    intercepting: tuple[Block, ...] = ()
    traced: tuple[Block, ...] = ()
    deciding: tuple[Block, ...] = ()
    for block in blocks:
        values.update(block.changes)
        if block.ends_interception:
            traced = ()
            kept = block.keeps_programs
            intercepting = tuple(b for b in intercepting if kept and b.of_program)
            deciding = deciding if isinstance(block, _Alone) else ()
        if block.intercepts:
            intercepting = (block, *intercepting)
            traced = traced if block.of_program else (block, *traced)
            deciding = deciding if block.of_program else (block, *deciding)
            values["sites"] = None
    for name, value in values.items():
        setattr(_state, name, value)
    _state.blocks = blocks
    _state.intercepting = intercepting
    _state.traced = traced
    _state.deciding = deciding
    _entered.set(blocks)


@contextmanager
def _in(blocks: tuple[Block, ...]) -> Iterator[None]:
    before, seen = _state.blocks, _entered.get()
    _put(blocks)
    try:
        yield
    finally:
        _put(before)
        _entered.set(seen)


def intercepted() -> bool:
    """Whether a block intercepts the eager code that runs now, or decides its ambient sites.

    Compiled code asks when it is traced.
    """
    return (
        not is_compiling()
        and bool(_used)
        and (bool(_state.intercepting) or _state.sites is not None)
    )


def left_alone(model: Any = None) -> AbstractContextManager[Any]:
    """A context in which no block around it intercepts plain eager code, because another table decides its sites.

    Args:
        model: The model whose table that is, for the reports of the blocks; None if it belongs in none. The tables of
            the blocks decide its ambient sites.
    """
    if model is None:
        return _ALONE
    for block in _state.intercepting:
        block.leaves_alone(model)
    if not (_state.table and _state.deciding):
        return _ALONE
    decided: dict[str, tuple[Rule, ...] | None] = {}
    for block in reversed(_state.deciding):
        of_block = block.at_ambient_sites(model)
        decided.update((s, r) for s, r in of_block.items() if r is not None or s not in decided)
    return _Alone(sites=decided)


def outside_of_blocks() -> Any:
    """A context manager in which no block is in force."""
    return _in(())


@contextmanager
def inside_of_a_block() -> Iterator[None]:
    """A context in which some rule is in force at every ambient site, and no other block is."""
    _used.append(True)
    try:
        with _in((_CAPTURE,)):
            yield
    finally:
        _used.pop()


def in_the_blocks_of_now(function: Called) -> Called:
    """Wrap `function` so that it always runs in the blocks that are in force now, in any thread.

    Contexts of `surrounded` that are active now are entered again if they have been left when it runs.
    """
    blocks, surroundings = _state.blocks, _state.surroundings
    resumes = [block.resume() for block in _state.intercepting]

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(_in(blocks))
            for resume in resumes:
                stack.enter_context(resume())
            for surrounding in surroundings:
                if surrounding.left:
                    stack.enter_context(surrounded(surrounding.make))
            return function(*args, **kwargs)

    return inside  # type: ignore[return-value]


@dataclass(eq=False)
class _Surrounding:
    make: Callable[[], AbstractContextManager[Any]]
    left: bool = False


@contextmanager
def surrounded(make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter a context, and enter it again around the recomputation of `torch.utils.checkpoint` in the backward.

    Args:
        make: Returns a new context manager at each call.
    """
    _follow_checkpoints()
    this, before = _Surrounding(make), _state.surroundings
    _state.surroundings = (*before, this)
    try:
        with make():
            yield
    finally:
        this.left = True
        _state.surroundings = before


class Block(ContextDecorator):
    """The base of all blocks: changes the state of the thread. Blocks are reentrant and reusable."""

    intercepts = False
    """Whether the block also acts on plain eager code."""

    ends_interception = False
    """Whether the blocks around it do not act on plain eager code in it."""

    keeps_programs = False
    """Whether compiled programs around it still intercept in it, and ask by themselves whether their rules act."""

    of_program = False
    """Whether the block is that of a compiled program, which intercepts only what is not in the program's graphs."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    # Dynamo cannot replay all side effects of entering and leaving a block
    @leave_to_python
    def __enter__(self) -> Self:
        _follow_checkpoints()
        require_own_blocks()
        _put((*_state.blocks, self))
        return self

    @leave_to_python
    def __exit__(self, *_: object) -> None:
        """Leave the block. Blocks that were entered later may still be active.

        Raises:
            RuntimeError: The block was not entered in this thread.
        """
        blocks = list(_state.blocks)
        if self not in blocks:
            raise RuntimeError(
                f"this {type(self).__name__}() block is left in a thread that has not entered it; it is still in force "
                f"in the thread that entered it. Do not suspend a generator inside of a block."
            )
        del blocks[len(blocks) - 1 - blocks[::-1].index(self)]
        _put(tuple(blocks))

    def resume(self) -> Callable[[], AbstractContextManager[Any]]:
        """A function that returns a context in which code runs again as it runs now."""
        return nullcontext

    def leaves_alone(self, model: Any) -> None:
        """Note that a model runs in the block whose own table decides its sites."""

    def at_ambient_sites(self, model: Any) -> Mapping[str, tuple[Rule, ...] | None]:
        """The rules that the block gives to the ambient sites of a model, by their names; None where it gives none."""
        return {}

    def __call__(self, func: Called) -> Called:
        """Decorate `func`, so that each call of it runs in the block.

        Raises:
            TypeError: `func` is a class, or its body does not run when it is called: a generator or an asynchronous
                function.
        """
        suspended = (
            inspect.isgeneratorfunction,
            inspect.iscoroutinefunction,
            inspect.isasyncgenfunction,
        )
        if not callable(func) or inspect.isclass(func) or any(asks(func) for asks in suspended):
            raise TypeError(
                f"{type(self).__name__}() cannot decorate {getattr(func, '__qualname__', repr(func))}: it decorates "
                f"only functions that run when they are called, not classes, generators or asynchronous functions. "
                f"Enter the block inside of the function, around the call of the model."
            )
        return super().__call__(func)


class _Alone(Block):
    ends_interception = True


_ALONE = _Alone()


@functools.cache
def _follow_checkpoints() -> None:
    """Make `torch.utils.checkpoint` recompute in the blocks of the original forward.

    Otherwise the recomputation would use the rules in force in the thread of the backward, which silently gives wrong
    gradients. This is installed when the first block is entered. A checkpoint that began before is recomputed outside
    of all blocks.
    """
    follow_checkpoints(in_the_blocks_of_now, _in_no_blocks)


def _in_no_blocks(function: Called) -> Called:
    """Wrap `function` so that it runs outside of all blocks."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with outside_of_blocks():
            return function(*args, **kwargs)

    return outside  # type: ignore[return-value]


# The block of a capture
_CAPTURE = Block(
    **dict.fromkeys(SCOPES.values(), (Rule(Declaration("identity", lambda grad: grad, (), {})),))
)
