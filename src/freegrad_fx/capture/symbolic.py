"""Symbolic capture: the copy of a model is traced once for every combination of `training` flags it branches on.

A question about the global state (`torch.is_grad_enabled()`) counts as a flag.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

from torch import fx, nn

from ..errors import CaptureError, unknown
from ..graph.provenance import innermost
from ..graph.serialise import LOCK
from ..graph.state import ATTRIBUTES_OF_EVERY_MODULE, is_python_state
from ..ops import apply_function
from ..sites.remarks import Cache, Lost
from .arguments import flag_path
from .attributes import KeepsState
from .captured import Variant
from .constants import CONSTANTS, constants_read
from .decorated import is_decorated
from .holders import still_held
from .identity import Identities, traced_as_it_compares
from .outside import Outside, is_proxy, keeps_state, refuse_own_modules
from .patches.random import RandomState
from .proxies import any_proxy
from .python_state import Attribute, PythonState
from .questions import Question
from .result import Capture
from .stores import is_made_from_state
from .tracer import Tracer

__all__ = ["capture_symbolically", "open_arguments"]

PH: Any = fx.PH  # type: ignore[attr-defined]

MAX_VARIANTS = 16


def capture_symbolically(
    model: nn.Module,
    root: nn.Module,
    leaf_types: tuple[type[nn.Module], ...],
    concrete_args: Mapping[str, Any],
) -> Capture:
    """Trace `root`, the copy of `model`, once for every combination of the flags that the model branches on."""
    specialised = _specialised(root, concrete_args)
    with LOCK:  # another capture may have replaced functions
        outside = Outside(model, root)
        refuse_own_modules(type(model), outside)
        state = PythonState(root)
    trace = partial(_trace, model, root, outside, state, leaf_types, specialised)
    found = _variants(trace, outside.compares_identity)
    if found is None:
        # Every read counts as a branch, also one that a proxy cannot intercept (`training is True`)
        found = _variants(partial(trace, concrete_flags=True), False) or []
    if not found:
        found = [trace(assumed, concrete_flags=True) for assumed in _both_modes(root)]
    if outside.compares_variables or outside.asks_identity:
        found = [_as_it_compares(trace, traced, root) for traced in found]
    tracers = [tracer for tracer, _, _ in found]
    root.__dict__[CONSTANTS] = constants_read(
        root,
        [read for tracer in tracers for read in tracer.read_first],
        [place for tracer in tracers for place in (*tracer.assigned, *tracer.watched)],
        [tensor for tracer in tracers for tensor in tracer.tensor_attrs],
    )
    return Capture(
        root,
        type(model).__name__,
        tuple(Variant(tracer.flags, graph, tracer.marks) for tracer, graph, _ in found),
        tuple(dict.fromkeys(note for tracer, _, _ in found for note in tracer.opaque)),
        tuple(dict.fromkeys(n for tracer, _, lost in found for n in (*tracer.lost, *lost))),
    )


_Traced: TypeAlias = tuple[Tracer, fx.Graph, list[Lost]]


def _both_modes(root: nn.Module) -> list[dict[str, bool]]:
    paths = [path for path, _ in root.named_modules()]
    return [dict.fromkeys(paths, True), dict.fromkeys(paths, False)]


def _variants(trace: Callable[..., _Traced], compares_identity: bool) -> list[_Traced] | None:
    """Trace both sides of every branch on a flag.

    Args:
        trace: Traces the model with assumed flags.
        compares_identity: Whether the forward may compare a flag by `is`.

    Returns:
        The traces, without those for an answer that cannot be traced; None if a graph differs from the one that plain
        flags would give, or if there are more than ``MAX_VARIANTS`` traces.
    """
    pending: list[dict[str, Any]] = [{}]
    found: list[_Traced] = []
    # Each answer to a question may be without a graph, or make no difference; each flag that is read has two graphs
    while pending and len(found) + sum(map(_ends_in_a_flag, pending)) <= MAX_VARIANTS:
        assumed = pending.pop(0)
        try:
            tracer, graph, lost = trace(assumed)
        except CaptureError:
            if assumed and isinstance(next(reversed(assumed)), Question):
                continue  # a call with this answer has no graph, and says so
            raise
        if tracer.flags_read:
            kept = frozenset(tracer.siteless)
            open_flags = tracer.flags_read - tracer.flags.keys()
            values = (True, False) if open_flags and compares_identity else (True,)
            for value in values:  # `training is True` and `training is False` show in one of them
                flags = {**assumed, **dict.fromkeys(open_flags, value), **tracer.flags}
                _, plain, _ = trace(flags, verifies=kept)
                if _outline(graph, flags) != _outline(plain, {}):
                    return None
        found.append((tracer, graph, lost))
        taken: dict[str, Any] = {}
        for path, value in tracer.flags.items():
            if path not in assumed and isinstance(value, bool):
                pending.append({**taken, path: not value})
            taken[path] = value
    return None if pending else _without_idle_questions(found)


def _ends_in_a_flag(assumed: dict[str, Any]) -> bool:
    return bool(assumed) and not isinstance(next(reversed(assumed)), Question)


def _without_idle_questions(found: list[_Traced]) -> list[_Traced]:
    """The traces without those that differ from another one only in the answer to a question."""
    kept: list[_Traced] = []
    for traced in found:
        flags = traced[0].flags
        for tracer, graph, _ in kept:
            differing = [k for k in flags if flags[k] != tracer.flags.get(k)]
            idle = len(differing) == 1 and isinstance(differing[0], Question)
            if (
                idle
                and flags.keys() == tracer.flags.keys()
                and _outline(graph, {}) == _outline(traced[1], {})
            ):
                del tracer.flags[differing[0]]
                break
        else:
            kept.append(traced)
    return kept


def _outline(graph: fx.Graph, flags: Mapping[str, bool]) -> list[tuple[Any, ...]]:
    """The nodes of a graph without their names, and with the assumed values in place of flags."""
    rows: list[tuple[Any, ...]] = []
    stands_for: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        path = flag_path(node)
        if path is not None:
            stands_for[node] = flags.get(path, True)
            continue
        rows.append((node.op, node.target, fx.map_arg((node.args, node.kwargs), stands_for.get)))
        stands_for[node] = f"%{len(rows)}"
    return rows


def _specialised(root: nn.Module, concrete_args: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the forward that are constants: those with a default, ``**kwargs``, and `concrete_args`."""
    parameters = inspect.signature(type(root).forward).parameters
    for name in concrete_args:
        if name not in list(parameters)[1:]:
            kind = f"argument of {type(root).__name__}.forward in concrete_args:"
            raise CaptureError(unknown(kind, name, list(parameters)[1:]))
    chosen = {
        name: {} if parameter.kind is parameter.VAR_KEYWORD else parameter.default
        for name, parameter in parameters.items()
        if parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD
    }
    if is_decorated(
        type(root).forward
    ):  # a decorator gets the single arguments, so their number has to be known
        chosen |= {name: () for name, p in parameters.items() if p.kind is p.VAR_POSITIONAL}
    chosen.update(concrete_args)
    return {name: value for name, value in chosen.items() if value is not PH}


def open_arguments(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    """The given arguments of a forward that are constants of the graph unless `concrete_args` opens them."""
    parameters = inspect.signature(type(model).forward).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]
    given = {**dict(zip(positional, args, strict=False)), **kwargs}
    return tuple(
        p.name for p in parameters if p.default is not p.empty and given.get(p.name) is not None
    )


def _trace(
    model: nn.Module,
    root: nn.Module,
    outside: Outside,
    *rest: Any,
    compares: bool = False,
    **options: Any,
) -> _Traced:
    """Trace one variant, with `compares` as a forward that compares objects by `is` or `id`.

    The other arguments are those of `_trace_assuming`, without `identities`.
    """

    def trace(identities: Identities) -> _Traced:
        return _trace_assuming(identities, model, root, outside, *rest, **options)

    return traced_as_it_compares(trace, compares, root)


def _as_it_compares(trace: Callable[..., _Traced], traced: _Traced, root: nn.Module) -> _Traced:
    """A trace in which tensors are one object where they are so in the model. Few models are traced again for this."""
    tracer = traced[0]
    tracer.identities.look_at_calls(root)
    if not tracer.identities.returned:
        return traced
    again = trace(tracer.assumed, concrete_flags=tracer.concrete_flags, compares=True)
    again[0].flags = tracer.flags
    return again


def _trace_assuming(
    identities: Identities,
    model: nn.Module,
    root: nn.Module,
    outside: Outside,
    state: PythonState,
    leaf_types: tuple[type[nn.Module], ...],
    specialised: dict[str, Any],
    assumed: dict[str, Any],
    concrete_flags: bool = False,
    verifies: frozenset[str] | None = None,
) -> _Traced:
    """Trace one variant, and again with more checks if the forward has effects that the first graph does not repeat."""
    random = RandomState()
    with LOCK, random.watching():
        make = partial(
            Tracer,
            leaf_types,
            assumed,
            specialised,
            concrete_flags,
            verifies,
            outside=outside,
            identities=identities,
        )
        tracer = make()
        graph = _traced(tracer, root, outside)
        changed = state.changed(is_proxy, tracer.set_by_the_trace())
        forgotten = list(_forget_proxies(model, root, tracer))
        stored = _left_behind(tracer, outside)
        drawn, kept = random.drawn_from(), tracer.state_kept(root)
        reshaped = tracer.shapes_that_change()
        _refuse_changes(root, {a: what for a, what in changed.items() if not a[0]})
        if drawn or kept or changed or stored or reshaped:
            random.restore()
            tracer = make(
                watch_random=drawn,
                watched=kept | changed.keys(),
                reshaped=reshaped,
                whole={path: what for (path, _), what in changed.items()},
                watch_outside=bool(stored),
            )
            graph = _traced(tracer, root, outside)
            _refuse_changes(root, state.changed(is_proxy, tracer.set_by_the_trace()))
            forgotten = list(_forget_proxies(model, root, tracer))
            if stored := _left_behind(tracer, outside):
                raise CaptureError(keeps_state(type(root), stored[0]))
            if random.drawn_from():
                raise CaptureError(
                    f"{type(root).__name__} draws random numbers in its own forward from outside of PyTorch's tensor "
                    f"functions (random, numpy.random, or a generator). A graph would reuse the same numbers at each "
                    f"call. Compile the model with freegrad_fx.compile(model, rules), which accepts any program; or "
                    f"use torch.rand(()), or move that part into a submodule, which is then kept as one opaque call."
                )
    return tracer, graph, forgotten


def _refuse_changes(root: nn.Module, changed: Mapping[Attribute, str]) -> None:
    """Raise `CaptureError` for changes of Python state that no opaque call can contain."""
    for what in changed.values():
        raise CaptureError(
            f"{type(root).__name__} cannot be captured: {what}. A graph would not repeat the change at each call. Make "
            f"the attribute a buffer, or move that part into a submodule, which is then kept as one opaque call; or "
            f"compile the model with freegrad_fx.compile(model, rules), which accepts any program."
        )


def _left_behind(tracer: Tracer, outside: Outside) -> list[str]:
    """Remove the proxies of a finished trace from whatever holds them, and name the holders other than caches."""
    found = [*tracer.stored, *outside.left(is_proxy)]
    tracer.forget_proxies()
    found += [f"stores a tensor in {where}" for where in still_held(tracer.made)]
    tracer.made.clear()
    return found


def _traced(tracer: Tracer, root: nn.Module, outside: Outside) -> fx.Graph:
    try:
        with outside.uncached(), outside.identities():
            return tracer.trace(root)
    except BaseException as error:
        outside.left(is_proxy)
        tracer.forget_proxies()
        refusal = _refusal(tracer, root, error) if isinstance(error, Exception) else error
        # The variables of the frames hold proxies, so the search would find them as long as the error lives
        traceback.clear_frames(error.__traceback__)
        still_held(tracer.made)
        tracer.made.clear()
        if refusal is error:
            raise
        raise refusal from error


def _refusal(tracer: Tracer, root: nn.Module, error: Exception) -> Exception:
    """The error that says why a model cannot be traced symbolically, and what to do."""
    if isinstance(error, CaptureError):
        return error
    if isinstance(error, KeepsState):
        return CaptureError(keeps_state(type(root), str(error)))
    kinds = inspect.signature(type(root).forward).parameters.values()
    collects = [p.name for p in kinds if p.kind is p.VAR_KEYWORD and p.name in tracer.specialised]
    if is_decorated(type(root).forward):  # the decorator gets single keywords
        collects = []
    where = innermost(error.__traceback__)
    file, _, line = where.rpartition(":")
    code = linecache.getline(file, int(line)).strip() if line.isdigit() else ""
    return CaptureError(
        f"{type(root).__name__} cannot be captured: {tracer.explain(error)}\n"
        f"  at {where or 'an unknown place'}" + (f": {code}" if code else "") + "\n"
        "This line of the model's own forward cannot be traced symbolically, for example because it branches on "
        f"the values or shapes of its inputs. {_remedies(tracer)}or move that part into a submodule, which is then "
        "kept as one opaque call while the rest is rewritten."
        + "".join(
            f" If the forward needs keywords in **{c}, give concrete_args={{{c!r}: torch.fx.PH}}."
            for c in collects
        )
    )


def _remedies(tracer: Tracer) -> str:
    """The other ways to capture a model that cannot be traced symbolically, the first choice first."""
    if any(node.target is apply_function for node in tracer.graph.nodes):
        # torch.export would refuse the Function
        return "Compile it with freegrad_fx.compile(model, rules), which keeps the model's autograd.Function; "
    if tracer.leaf_types:  # torch.export would refuse the classes that the table selects
        return "Compile it with freegrad_fx.compile(model, rules), where a table can select classes too; "
    return (
        "Give example_inputs=(...) to capture it by torch.export; or compile it with freegrad_fx.compile(model, "
        "rules), which accepts any program; "
    )


def _forget_proxies(model: nn.Module, root: nn.Module, tracer: Tracer) -> Iterator[Lost]:
    """Restore the attributes that the traced forward changed, and list those that the graph does not assign."""
    tracer.restore_tables()
    for (path, traced), original in zip(root.named_modules(), model.modules(), strict=False):
        for name in (original.__dict__.keys() | traced.__dict__) - ATTRIBUTES_OF_EVERY_MODULE:
            value = traced.__dict__.get(name)
            assigned = (path, name) in tracer.assigned or (path, name) in tracer.watched
            if not assigned and (is_python_state(value) or not any_proxy(value)):
                continue
            empty = type(value) is dict and original.__dict__.get(name) == {}
            is_cache = empty and is_made_from_state(v.node for v in value.values() if is_proxy(v))
            if name in original.__dict__:
                traced.__dict__[name] = copy.copy(original.__dict__[name])
            else:
                traced.__dict__.pop(name, None)
            if is_cache and not assigned:
                yield Cache.of(path, name)
            elif not assigned:
                reason = "the forward stores tensors in it; the graph does not"
                yield Lost(path, f"attribute {name!r}", reason)
