"""A compiled model: the names of its modules and parameters, and the sites found in it so far.

Dynamo captures a model in pieces, and captures it again for other shapes and modes. A `Program` combines the pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from .._torch.parametrized import plain_class
from ..plan import Decision, Plan, also
from ..sites.remarks import Lost, Opaque, Remark
from ..sites.site import Located
from ..table import RuleTable

__all__ = ["Calls", "Program", "class_of"]


class Program:
    """One model, or the code of a compiled function outside of models, as far as it has been captured.

    Args:
        root: The model, or None.
        name: The name in reports.
        table: The rule table.

    Attributes:
        root: The model, or None.
        name: The name in reports.
        outside: The decisions for calls in Python.
    """

    def __init__(self, root: nn.Module | None, name: str, table: RuleTable) -> None:
        self.root = root
        self.name = name
        self._table = table
        self._decisions: dict[Decision, bool] = {}  # and whether a graph contains the site
        self._opaque: dict[Opaque, None] = {}
        self._lost: dict[Lost, None] = {}
        self._in_python: dict[str, None] = {}
        self._steps: dict[Remark, None] = {}
        self.outside: dict[tuple[Any, ...], Mapping[str, Decision]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read the names of modules and parameters again."""
        self.outside.clear()
        self._paths: dict[nn.Module, str] = {}
        self._names: dict[int, tuple[Tensor, tuple[str, ...]]] = {}
        if self.root is None:
            return
        self._paths = {module: path for path, module in self.root.named_modules()}
        for name, parameter in self.root.named_parameters(remove_duplicate=False):
            _, names = self._names.get(id(parameter), (parameter, ()))
            self._names[id(parameter)] = parameter, (*names, name)

    def owner(self, modules: Iterable[nn.Module]) -> nn.Module | None:
        """The innermost of some modules, given outermost first, that belongs to the model; else the model."""
        known = [module for module in modules if module in self._paths]
        return known[-1] if known else self.root

    def path(self, module: nn.Module | None) -> str:
        """The dotted path of a module, the first if it has several; ``""`` if it has none."""
        return "" if module is None else self._paths.get(module, "")

    def names(self, parameter: Tensor) -> tuple[str, ...]:
        """The dotted names of a parameter; empty if it does not belong to the model."""
        return self._names.get(id(parameter), (parameter, ()))[1]

    def holder(self, name: str) -> nn.Module | None:
        """The module that holds the parameter with a dotted name."""
        return None if self.root is None else self.root.get_submodule(name.rpartition(".")[0])

    def parameters(self) -> Iterable[tuple[Tensor, tuple[str, ...]]]:
        """The parameters, with their dotted names."""
        return self._names.values()

    def identities(self) -> Collection[int]:
        """The ids of the parameters."""
        return self._names.keys()

    def add(self, place: Located, decision: Decision) -> None:
        """Add a site that runs, with its decision."""
        self._decisions[also(place, decision, self._table)] = True

    def add_in_python(self, place: Located, decision: Decision) -> None:
        """Add a site that runs in Python, with its decision."""
        self._decisions.setdefault(also(place, decision, self._table), False)
        self._in_python[place.site.name] = None

    def note(self, opaque: Iterable[Opaque], steps: Iterable[Remark] = ()) -> None:
        """Add calls that were not traced into, and steps that are comparisons."""
        self._opaque.update(dict.fromkeys(opaque))
        self._steps.update(dict.fromkeys(steps))

    def miss(self, place: Located) -> None:
        """Add a site that ran where no rule reaches it."""
        site = place.site
        reason = "it ran outside of the captured graphs, where no rule reaches it, with its native backward"
        self._lost[Lost(site.path, f"{site.name} ({site.spelling})", reason, site.source)] = None

    @property
    def plan(self) -> Plan:
        """The plan of everything that has been captured, or has run in Python, so far."""
        # A call in Python of a site that is also in a graph has another spelling
        in_graphs = {_what(decision) for decision, inside in self._decisions.items() if inside}
        found = [d for d, inside in self._decisions.items() if inside or _what(d) not in in_graphs]
        return Plan(
            model=self.name,
            decisions=tuple(sorted(found, key=lambda d: d.site.kind == "parameter")),
            table=self._table,
            opaque=tuple(self._opaque),
            lost=tuple(self._lost),
            steps=tuple(self._steps),
            eager=tuple(self._in_python),
        )


def _what(decision: Decision) -> tuple[Any, ...]:
    return decision.site.key, decision.action, decision.entry


def class_of(module: nn.Module | None) -> type[Any]:
    """The class of a module, without what parametrization or a capture made of it."""
    if module is None:
        return nn.Module
    kind: type[Any] = getattr(module, "_model_class", None) or plain_class(module)
    return kind


Calls: TypeAlias = Counter[tuple[Program, str, str]]
"""The number of sites by program, owner path and op."""
