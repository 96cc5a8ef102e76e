"""The sites of eager code: the calls that run, with what a table decides for them.

Where a call is, and how often the same one has run before, is told by `Observed` for the blocks of a user, and by
`dynamo.outside` for what a compiled program leaves to Python.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._torch.dispatch import is_transformed
from .._torch.parametrized import plain_class
from ..core.own import follow
from ..core.rule import learnt_by
from ..errors import RuleError
from ..graph.provenance import caller
from ..modules import Activation
from ..plan import Decided, Decision
from ..sites.alone import Alone, call_alone, other_constants
from ..sites.merged import MERGED
from ..sites.operations import dim_of, spelled_function
from ..sites.owners import qualified, short_name
from ..sites.remarks import Opaque
from ..sites.site import REPLACE, Located, LocatedOperation, LocatedParameter, Site
from ..table import RuleTable
from ..vocabulary.op import Op, Spelling
from .opaque import opaque_call
from .parameters import mark_in_place, role_of
from .rules import Decisions, parameter_by, replaced_forward, rules_act
from .running import running_function

__all__ = ["EagerSites", "Place", "decoupled_parameter", "parameter_site"]

_OUT = "it writes its result into an out= tensor, which autograd does not support"


class Place(NamedTuple):
    """Where a call is.

    Attributes:
        modules: The modules that are running, the innermost first.
        owner: The owner of the site.
        path: The dotted path of the owner.
        program: What the path belongs to, if that is not always the same.
    """

    modules: tuple[nn.Module, ...]
    owner: nn.Module | None
    path: str = ""
    program: Any = None


@dataclass(frozen=True)
class _Described:
    """What a call is: see the fields of the same names of `Located`; and its spelling."""

    spelled: str
    obstacle: str = ""
    line: Op | None = None
    called: type[Any] | None = None
    alone: Alone | None = None
    dim: int | None = None


class EagerSites(ABC):
    """The sites of the calls that run, with their decisions.

    Args:
        table: The rule table.

    Attributes:
        table: The rule table.
        wants_parameters: Whether the table can give rules to parameters.
        on_demand: The ops that are sites only for tables that name them, and that the table names.
        looks_at: These, and the parts of those that consist of several calls.
    """

    lines_tell_sites_apart = False
    """Whether calls at the same place in different lines are different sites."""

    names_tell_parameters_apart = False
    """Whether parameters with the same names are the same site."""

    def __init__(self, table: RuleTable) -> None:
        self.table = table
        self._ordered = bool(table.ordered)
        self._ruled: set[tuple[str, type[Any]]] = set()  # the Functions with rules, by path
        self._firsts: dict[tuple[Any, ...], list[int]] = {}
        self.wants_parameters = table.wants_parameters
        self.on_demand = table.on_demand
        self.looks_at = _with_parts(self.on_demand)
        self._asks_for_operations = table.asks_for_operations

    # --- what a kind of sites tells ---

    @abstractmethod
    def place(self, *, in_functions: bool = False) -> Place | None:
        """The place of the call that runs now; None if it is no place of a site.

        Args:
            in_functions: Return the place also in the forward of an autograd.Function.
        """

    @abstractmethod
    def count(self, place: Place, op: str) -> int:
        """Count a site, and return the number of those that ran before at this place, in this call of the model."""

    @abstractmethod
    def decisions(self, place: Place) -> dict[tuple[Any, ...], Decisions]:
        """The decisions that are known for places like this one; for each call, those for the places at it."""

    def passed(self, place: Place) -> tuple[int, ...]:
        """The entries for the first operation that have matched one before, in this call of the model."""
        return ()

    def pass_by(self, place: Place, entry: int) -> None:
        """Note that an entry for the first operation has matched one."""
        raise NotImplementedError(f"{type(self).__name__} knows no calls of a model")

    @abstractmethod
    def decided(self, place: Place, located: Located, table: RuleTable) -> Decision:
        """Decide a site that is not known yet, by the table as it is in force there."""

    @abstractmethod
    def names(self, parameter: Tensor, place: Place) -> tuple[str, ...] | None:
        """The names of a parameter; None if it is no site."""

    @abstractmethod
    def holders(self, parameter: Tensor, names: tuple[str, ...], place: Place) -> list[nn.Module]:
        """The modules that hold a parameter."""

    @abstractmethod
    def in_place_of(
        self, parameter: Tensor, decision: Decision, acts: bool, place: Place
    ) -> Tensor:
        """The tensor that takes the place of a parameter with a rule."""

    @abstractmethod
    def note_opaque(self, place: Place, opaque: Opaque) -> None:
        """Note a call inside of which PyTorch computes activations."""

    @abstractmethod
    def note_call(self) -> None:
        """Note that a function of PyTorch was called."""

    # --- operations ---

    def operation(
        self,
        spelling: Spelling,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        passed: tuple[int, ...] | None = None,
    ) -> Decisions | None:
        """The decisions for the operation that is called now; None if it is no site.

        Args:
            spelling: How the call calls its op.
            function: The function.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            passed: The entries for the first operation that matched one before it; None for those until now.
        """
        self.note_call()
        place = self.place()
        if place is None:
            self._note_function()
        if place is None or not self.takes(place):
            return None
        inplace = spelling.inplace

        def described() -> _Described:
            called = None
            if place.owner is not None and place.owner is place.modules[0]:
                kind = plain_class(place.owner)
                called = kind if kind in spelling.op.modules else None
            spelled = _module(called, inplace) if called else spelled_function(function, inplace)
            obstacle = _OUT if spelling.writes_out else self.obstacle(place)
            alone = call_alone(function, args, kwargs, spelling.key)
            if spelling.op.name == "comparison":  # what it converts is not its input
                alone = None
            return _Described(spelled, obstacle, spelling.op, called, alone, dim)

        dim = dim_of(spelling.op, args, kwargs)
        written: tuple[Any, ...] = (function, inplace, dim)
        if self._asks_for_operations:
            # the other arguments decide what the operation is
            written = (*written, *other_constants(args, kwargs, spelling.key))
        found = spelling.found
        tensors = tuple(operand.name for operand in found) if found else None
        return self._decisions(written, place, spelling.op.name, described, tensors, passed=passed)

    def passed_now(self) -> tuple[int, ...]:
        """The entries for the first operation that have matched one, in the call of the model that runs now."""
        place = self.place() if self._ordered else None
        return () if place is None else self.passed(place)

    @abstractmethod
    def note_parts(self, decisions: Decisions, whole: str) -> None:
        """Note that a call is a part of an operation whose rule has replaced the backward.

        Args:
            decisions: What was decided for the call.
            whole: The name of the site of the operation.
        """

    def takes(self, place: Place) -> bool:
        """Whether a call at a place is a site; `Activation` puts its rules around what its forward calls."""
        return not (place.modules and isinstance(place.modules[0], Activation))

    def obstacle(self, place: Place) -> str:
        """The reason why no rule can act at a place; ``""`` if one can."""
        return ""

    def run(self, call: Callable[[], Any]) -> Any:
        """Run a call that has been looked at."""
        return call()

    def module_call(self, module: nn.Module, inplace: bool) -> Decisions | None:
        """The decisions for the call of a module whose class the table selects; None if it is no site."""
        place = self.place()
        if place is None or place.owner is None or place.modules[0] is not module:
            return None
        kind = plain_class(module)

        def described() -> _Described:
            return _Described(_module(kind, inplace), called=kind)

        return self._decisions((kind, inplace), place, kind.__name__, described)

    def calls(self, module: nn.Module, places: Sequence[LocatedOperation]) -> Decided | None:
        """The decisions for calls of the module that runs now, which runs by its graph; None if they are no sites.

        Args:
            module: The module.
            places: The calls in the graph.
        """
        place = self.place()
        if place is None or place.owner is None or place.modules[0] is not module:
            return None
        found: Decided = []
        for one in places:
            written = ("graph", one.site.spelling, one.site.source, one.obstacle, one.dim)
            made = self._decisions(written, place, one.site.op, _not_described, one.tensors, one)
            found += [(replace(one, site=decision.site), decision) for decision in made.values()]
        return found

    def not_traced(self, module: nn.Module, ops: Collection[str], reason: str) -> None:
        """Note a module that may compute operations by several calls, and could not be traced alone."""
        place = self.place()
        if place is not None and place.modules[:1] == (module,):
            names = ", ".join(sorted(ops))
            what = f"{type(module).__name__}, whose {names} in separate operations cannot be found in a block"
            self.note_opaque(place, Opaque(place.path, what, reason, caller()))

    def function_call(self, function: type[Any]) -> Decisions | None:
        """The decisions for the `apply` of an autograd.Function that runs now; None if it is no site."""
        place = self.place()
        if place is None:
            return None
        name = function.__name__

        def described() -> _Described:
            return _Described(f"{name}.apply", called=function)

        found = self._decisions((function,), place, name, described)
        if any(decision.action == "rewrite" for decision in found.values()):
            self._ruled.add((place.path, function))
        return found

    def _decisions(
        self,
        written: tuple[Any, ...],
        place: Place,
        op: str,
        described: Callable[[], _Described],
        tensors: tuple[str, ...] | None = None,
        in_graph: LocatedOperation | None = None,
        passed: tuple[int, ...] | None = None,
    ) -> Decisions:
        """The decisions for a call, which are known if the same was `written` at the same place before.

        Only a call that is not known yet is described, unless it is one in a graph.
        """
        call = self.count(place, op)
        source = caller() if self.lines_tell_sites_apart else ""
        if passed is None:
            passed = self.passed(place) if self._ordered else ()
        key = (op, place.path, call, *written, type(place.owner), source, tensors, passed)
        known = self.decisions(place)
        found = known.get(key)
        if found is not None:
            for index in self._firsts[key] if self._ordered else ():
                self.pass_by(place, index)
            return found
        owners = () if place.owner is None else (plain_class(place.owner),)
        what = _Described(in_graph.site.spelling) if in_graph is not None else described()
        site = Site(
            kind="operation",
            op=op,
            path=place.path,
            call=call,
            spelling=what.spelled,
            source=in_graph.site.source if in_graph is not None else source or caller(),
            type=qualified(owners[0]) if owners else "",
        )
        located = Located(
            site, owners, what.obstacle, what.line, what.called, tensors, what.alone, what.dim
        )
        if in_graph is not None:
            located = replace(in_graph, site=site, owners=owners)
        table = self.table.only(dict.fromkeys(passed, frozenset())) if passed else self.table
        made = {REPLACE: self.decided(place, located, table)}
        for edge in located.edges(table.placements):
            if table.decide(edge) is not None:
                made[edge.site.at] = self.decided(place, edge, table)
        known[key] = made
        if table.ordered:
            self._firsts[key] = [i for i in table.ordered if table.matches_at(i, located)]
            for index in self._firsts[key]:
                self.pass_by(place, index)
        return made

    def opaque(self, function: Callable[..., Any]) -> bool:
        """Whether PyTorch computes activations inside of a call. It is noted."""
        self.note_call()
        reason = opaque_call(function)
        if not reason:
            return False
        place = self.place()
        if place is not None:
            what = spelled_function(function, False)
            self.note_opaque(place, Opaque(place.path, what, reason, caller()))
        return True

    def _note_function(self) -> None:
        """Note the autograd.Function whose forward computes an activation now, if there is one."""
        function = running_function()
        place = None if function is None else self.place(in_functions=True)
        if function is not None and place is not None:
            ruled = (kind for path, kind in self._ruled if path == place.path)
            if any(issubclass(kind, function) for kind in ruled):
                return
            what = f"autograd.Function {function.__qualname__}"
            opaque = Opaque(place.path, what, "keeps its own backward", caller())
            self.note_opaque(place, opaque)

    # --- parameters ---

    def parameter(self, parameter: Tensor) -> Tensor | None:
        """The tensor that takes the place of a parameter in the call that runs now; None if no entry decides it."""
        place = self.place()
        decision = None if place is None else self._decision_for(parameter, place)
        if place is None or decision is None or decision.entry is None:
            return None
        if decision.action != "rewrite" or not (decision.forward or parameter.requires_grad):
            return parameter
        acts = rules_act()
        if decision.forward is None and not acts:
            return parameter
        swapped_in = role_of(parameter) is not None
        if parameter.is_inference() or (is_transformed(parameter) and not swapped_in):
            return parameter
        return self.in_place_of(parameter, decision, acts, place)

    @abstractmethod
    def drop(self, parameter: Tensor) -> None:
        """Drop the tensor that takes the place of a parameter."""

    def forget(self, parameter: Tensor) -> None:
        """Note that the contents of a parameter may change without a new version."""
        decision = self.parameter_decision(parameter)
        if decision is not None and decision.forward is not None:
            self.drop(parameter)

    def refuse_write(self, parameter: Tensor) -> None:
        """Raise `RuleError` if the forward of a parameter is replaced, which the model writes into.

        The model would compute what it writes from what the replacement returns.
        """
        decision = self.parameter_decision(parameter)
        if decision is None or decision.action != "rewrite" or decision.forward is None:
            return
        name = decision.site.name
        raise RuleError(
            f"the model writes into {name!r} in its forward ({caller()}), so its own forward cannot be replaced: what "
            f"is written would come from the replacement. Write into {name.rpartition('.')[2]}.data there, or outside "
            f"of the forward; or leave forward= out of the entry."
        )

    def parameter_decision(self, parameter: Tensor) -> Decision | None:
        """The decision for a parameter that the call that runs now takes; None if it is no site."""
        place = self.place()
        return None if place is None else self._decision_for(parameter, place)

    def _decision_for(self, parameter: Tensor, place: Place) -> Decision | None:
        if place.owner is None:
            return None  # an optimizer, for example
        names = self.names(parameter, place)
        if names is None:
            return None
        # The names tell parameters of a model apart, also those that it gets later
        named = self.names_tell_parameters_apart or role_of(parameter) is not None
        identity: Any = names if named else id(parameter)
        key = ("parameter", identity, parameter.requires_grad)
        known = self.decisions(place)
        if key not in known:
            located = parameter_site(parameter, names, self.holders(parameter, names, place))
            known[key] = {REPLACE: self.decided(place, located, self.table)}
        return known[key][REPLACE]


def parameter_site(
    parameter: Tensor, names: tuple[str, ...], holders: Iterable[nn.Module]
) -> LocatedParameter:
    """The site of a parameter.

    Args:
        parameter: The parameter.
        names: Its dotted names.
        holders: The modules that hold it.
    """
    path, _, name = names[0].rpartition(".")
    owners = tuple(map(plain_class, holders))
    site = Site(
        kind="parameter",
        op="parameter",
        path=path,
        call=0,
        spelling=f"{short_name(owners[0])}.{name}" if owners else name,
        type=qualified(owners[0]) if owners else "",
        names=names,
    )
    return LocatedParameter(site, owners, tensor=parameter, reads=())


def decoupled_parameter(parameter: Tensor, decision: Decision, acts: bool) -> Tensor:
    """The tensor that takes the place of a parameter: with the forward of a decision, and, if they act, its rules."""
    value: Tensor = parameter.detach()
    follow(parameter, learnt_by(decision.rules))
    if decision.forward is not None:
        value = replaced_forward(decision.forward, value, decision.rules if acts else ())
    result = parameter_by(decision, value, parameter) if acts else value
    mark_in_place(result)
    return result


def _with_parts(on_demand: frozenset[str]) -> frozenset[str]:
    parts = [op for op, pair in MERGED.items() if pair in on_demand]
    return on_demand.union(parts, ["batch_norm"]) if parts else on_demand


def _not_described() -> _Described:
    raise AssertionError("the call is in a graph")


def _module(kind: type[nn.Module], inplace: bool) -> str:
    return f"{short_name(kind)}({'inplace=True' if inplace else ''})"
