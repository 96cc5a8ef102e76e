"""Ambient rules: what `use` and `native` say for a block of code, and what the sites of a graph ask.

Knows rules; knows nothing of graphs. The state belongs to the thread, as the grad mode of torch does.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ContextDecorator, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from ._torch.dynamo import is_compiling, leave_to_python
from ._torch.functions import follow_checkpoints
from .core.declaration import Declaration
from .core.rule import Rule, RuleLike, compose, get
from .errors import RuleError, unknown

__all__ = [
    "SCOPES",
    "Block",
    "ambient_rules",
    "explicit_rules_act",
    "in_the_blocks_of_now",
    "inside_of_a_block",
    "native",
    "outside_of_blocks",
    "parts_for",
    "surrounded",
    "use",
]

SCOPES = {"operation": "activations", "parameter": "params"}
"""The scope of an ambient rule, by the kind of the sites in it."""

Called = TypeVar("Called", bound=Callable[..., Any])


class _State(threading.local):
    """What is in force in a thread; the first three follow from the blocks."""

    def __init__(self) -> None:
        # Dynamo guards what stands on the object, not on its class
        self.explicit = True
        self.activations: tuple[Rule, ...] = ()
        self.params: tuple[Rule, ...] = ()
        self.blocks: tuple[Block, ...] = ()
        self.surroundings: tuple[_Surrounding, ...] = ()


_state = _State()

# The same blocks once more, as an asynchronous task sees them, so that a task never gets those of another one. It is
# not the state itself because compiled code can be guarded by a thread's attributes alone.
_entered: ContextVar[tuple[Block, ...]] = ContextVar("freegrad_fx_blocks", default=())


def ambient_rules(scope: str) -> tuple[Rule, ...]:
    """The rules in force for ``"activations"`` or ``"params"``; none where the backward is native.

    Raises:
        RuntimeError: The thread is in the blocks of another asynchronous task.
    """
    _require_own_blocks()
    return _state.activations if scope == "activations" else _state.params


def explicit_rules_act() -> bool:
    """Whether the rules that a table has given to sites act.

    Raises:
        RuntimeError: The thread is in the blocks of another asynchronous task.
    """
    _require_own_blocks()
    return _state.explicit


def _require_own_blocks() -> None:
    if not is_compiling() and _entered.get() != _state.blocks:
        raise RuntimeError(
            "the use() and native() blocks of this asynchronous task are not those in force in its thread. A block "
            "belongs to a thread: enter it in the task or thread that calls the model, around the call, and do not "
            "await in it."
        )


def _put(blocks: tuple[Block, ...]) -> None:
    """Let the thread be in these blocks, the innermost last."""
    values: dict[str, Any] = {"explicit": True, **dict.fromkeys(SCOPES.values(), ())}
    for block in blocks:
        values.update(block.changes)
    for name, value in values.items():
        setattr(_state, name, value)
    _state.blocks = blocks
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


def outside_of_blocks() -> Any:
    """A context in which no block is in force."""
    return _in(())


def inside_of_a_block() -> AbstractContextManager[Any]:
    """A context in which some rule is in force at every ambient site."""
    identity = Rule(Declaration("identity", lambda grad: grad, (), {}))
    return Block(**dict.fromkeys(SCOPES.values(), (identity,)))


def in_the_blocks_of_now(function: Called) -> Called:
    """Return `function` so that it runs in the blocks that are in force now, whenever and in whatever thread.

    If it runs after what surrounds it now (see `surrounded`) was left, that is entered again.
    """
    blocks, surroundings = _state.blocks, _state.surroundings

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(_in(blocks))
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
    """Run in a context, which what `torch.utils.checkpoint` runs again in the backward is run in once more.

    Args:
        make: Makes the context, each time anew.
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
    """What `use` and `native` are: it changes the state of the thread. Blocks nest, and can be entered again."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    # The effects of entering and leaving would be Dynamo's to replay, which cannot see all of them
    @leave_to_python
    def __enter__(self) -> Self:
        _follow_checkpoints()
        _require_own_blocks()
        _put((*_state.blocks, self))
        return self

    @leave_to_python
    def __exit__(self, *_: object) -> None:
        """Leave the block, also where others that were entered later are still open.

        Raises:
            RuntimeError: It was not entered in this thread.
        """
        blocks = list(_state.blocks)
        if self not in blocks:
            raise RuntimeError(
                f"this {type(self).__name__}() block was entered in another thread than it is left in, and is still "
                f"in force there. Do not suspend a generator inside of a block."
            )
        del blocks[len(blocks) - 1 - blocks[::-1].index(self)]
        _put(tuple(blocks))

    def __call__(self, func: Called) -> Called:
        """Return `func` so that each call of it runs in the block.

        Raises:
            TypeError: `func` is a class, or one whose body does not run when it is called: asynchronous, a generator.
        """
        suspended = (
            inspect.isgeneratorfunction,
            inspect.iscoroutinefunction,
            inspect.isasyncgenfunction,
        )
        if not callable(func) or inspect.isclass(func) or any(asks(func) for asks in suspended):
            raise TypeError(
                f"{type(self).__name__}() decorates functions that run when they are called, which "
                f"{getattr(func, '__qualname__', repr(func))} is not. Put the block into it, around the call of the "
                f"model."
            )
        return super().__call__(func)


class use(Block):
    """Give every ambient site in a scope a rule, for the block.

    Formula: at every ambient site y = f(x) whose forward runs in the block, ∂x = rule(∂y, x, y).

    Ambient sites are those of ``transform(model)`` without rules, those that no entry decides in
    ``transform(model, rules, ambient=True)``, and `Activation` layers. The rule is bound when the forward runs: the
    backward may run after the block, or in another thread. Blocks nest, and the innermost one for a scope wins; rules
    that a table gave to a site go before. What `torch.utils.checkpoint` runs again in the backward runs in the blocks
    of the first time. A block is for its own thread: a thread that is started in it has none. It can be used as a
    decorator, and entered again.

    Args:
        rule: A rule name, a `Rule` or a composition.
        params: Values for the rule's parameters.
        scope: ``"activations"``, ``"params"``, ``"all"``, or a tuple of these.

    Raises:
        RuleError: The rule is unknown, not fully bound, names a forward, or cannot serve a scope; or a scope is
            unknown.

    Source: FreeGrad, ``freegrad.use``.
    """

    def __init__(
        self,
        rule: RuleLike,
        params: Mapping[str, Any] | None = None,
        scope: str | tuple[str, ...] = "activations",
    ) -> None:
        scopes = _scopes(scope)
        super().__init__(**dict.fromkeys(scopes, parts_for(scopes, rule, params)))


class native(Block):
    """Switch every rule off for the block: the gradients are those of the untransformed model, bit for bit.

    Rules given by tables and ambient ones are both off; a `use` inside the block switches ambient sites on again. A
    forward that a rule has replaced stays replaced, with its own derivative. Threads, tasks: as for `use`.
    """

    def __init__(self) -> None:
        super().__init__(explicit=False, activations=(), params=())


def parts_for(
    scopes: tuple[str, ...], rule: RuleLike, params: Mapping[str, Any] | None = None
) -> tuple[Rule, ...]:
    """The parts of a rule with some values for its parameters, for sites whose forward stays as it is.

    Raises:
        RuleError: It is unknown, not fully bound, names a forward, or cannot serve every site in these scopes.
    """
    if params:
        rule = get(rule)(**params) if isinstance(rule, str) else rule(**params)
    parts = compose(rule).parts
    for part in parts:
        _check(part, parts, scopes)
    return parts


def _scopes(scope: str | tuple[str, ...]) -> tuple[str, ...]:
    asked = (scope,) if isinstance(scope, str) else tuple(scope)
    valid = (*SCOPES.values(), "all")
    for name in asked:
        if name not in valid:
            raise RuleError(unknown("scope", name, valid))
    return tuple(s for s in SCOPES.values() if s in asked or "all" in asked)


def _check(rule: Rule, parts: tuple[Rule, ...], scopes: tuple[str, ...]) -> None:
    """Raise `RuleError` if a rule cannot serve every site in some scopes."""
    rule.require_bound()
    if rule.forward is not None:
        raise RuleError(
            f"{rule!r} replaces a forward, which transform() alone can do: give it to that, or leave forward= out."
        )
    if not rule.keeps_shape:
        raise RuleError(
            f"rule {rule.name!r} does not keep the shape of a gradient, and is for single sites alone"
        )
    for kind, scope in SCOPES.items():
        if scope not in scopes:
            continue
        if kind not in rule.kinds:
            raise RuleError(
                f"rule {rule.name!r} is for {' and '.join(rule.kinds)} sites alone, not for {scope!r}"
            )
        if "y" in rule.inputs and (kind == "parameter" or rule is not parts[0]):
            reason = (
                "a parameter has none"
                if kind == "parameter"
                else "it must come first in a composition"
            )
            raise RuleError(f"rule {rule.name!r} needs the output y of an operation: {reason}")


@functools.cache
def _follow_checkpoints() -> None:
    """Let what `torch.utils.checkpoint` runs again in the backward run in the blocks of its first time.

    Otherwise it would record what the rules in force at the time of the backward need, or of its thread, which has
    none: wrong gradients, without a word. `context_fn` would do, if nobody forgot it. Nothing needs it before the first
    block is entered; what has begun until then is run again outside of all blocks.
    """
    follow_checkpoints(in_the_blocks_of_now, _in_no_blocks)


def _in_no_blocks(function: Called) -> Called:
    """Return `function` so that it runs outside of all blocks."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        with outside_of_blocks():
            return function(*args, **kwargs)

    return outside  # type: ignore[return-value]
