"""The values of the parameters of rules in a model or a table: which there are, and how they are set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ._torch.modules import compiled_model
from .capture.rule_parameters import RuleParameters
from .core.contract import LOSS_SCALE
from .core.markup import html_view
from .core.rule import Rule
from .core.text import shown
from .errors import PlanError, RuleError, unknown
from .plan import report
from .plan.layout import aligned, terminal_width
from .table import RuleTable
from .table.entry import Entry

__all__ = ["Holder", "RuleValue", "RuleValues", "holder_of", "rule_parameters", "set_parameters"]


@dataclass(frozen=True, eq=False)
class RuleValue:
    """One parameter of one rule.

    Attributes:
        site: The name of the site; ``""`` in a table.
        entry: The selector of the entry that gives the site its rule.
        rule: The name of the rule.
        name: The name of the parameter.
        value: The value that is in force.
        learnable: Whether the rule can give the parameter a gradient.
        learnt: Whether it does: the value is a tensor that requires one.
    """

    site: str
    entry: str
    rule: str
    name: str
    value: Any
    learnable: bool
    learnt: bool


class RuleValues(tuple[RuleValue, ...]):
    """The parameters of rules, in the order of the sites or entries. ``print`` it for a table."""

    __slots__ = ()

    def __str__(self) -> str:
        return aligned(self._cells(), terminal_width())

    def _repr_html_(self) -> str:
        number = len(self)
        return html_view(f"{number} parameter{'s' * (number != 1)} of rules", self._cells())

    def _cells(self) -> list[list[str]]:
        cells = [["site", "entry", "rule", "parameter", "value", "learnt"]]
        for one in self:
            learnt = "yes" if one.learnt else "no" if one.learnable else "never"
            cells.append([one.site, one.entry, one.rule, one.name, shown(one.value), learnt])
        return cells


def rule_parameters(target: Any) -> RuleValues:
    """List the parameters of rules that can be set, scheduled or learnt.

    Args:
        target: A `RuleTable`; or what `report` takes: a transformed or compiled model, a `backend`, a block of `use`.

    Returns:
        One `RuleValue` for each parameter of each rule, by site; for a table, by entry.

    Raises:
        TypeError: `target` is none of these.
        PlanError: `target` is compiled, and has not been called yet.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> gm = fg.transform(torch.nn.Sequential(torch.nn.ReLU()), {"relu": fg.rules.scale(s=2.0)})
        >>> [(one.site, one.rule, one.name, one.value) for one in fg.rule_parameters(gm)]
        [('0:relu[0]', 'scale', 's', 2.0)]
    """
    return RuleValues(_listed(target))


def _listed(target: Any) -> Iterator[RuleValue]:
    if isinstance(target, RuleTable):
        found = [("", entry.selector, entry.rules or ()) for entry in target]
    else:
        plan = report(target)
        found = [
            (d.site.name, "" if d.entry is None else plan.table[d.entry].selector, d.rules)
            for d in plan.with_action("rewrite")
        ]
    for site, entry, rules in found:
        for rule in rules:
            for name, value in rule.values:
                if name == LOSS_SCALE:
                    continue
                learnable = name in rule.declaration.learns
                yield RuleValue(site, entry, rule.name, name, value, learnable, name in rule.learnt)


def set_parameters(target: Any, selector: str = "*", /, **values: Any) -> Any:
    """Set parameters of rules in a model or a table.

    A number is kept in a tensor of zero dimensions from then on, so that compiled code is compiled again at most once,
    for the first number; further ones are written into the tensor. A parameter that has to be a whole number in Python
    is replaced by the new number.

    Args:
        target: A transformed model, or the result of `torch.compile` on one; or a `RuleTable`, for blocks of `use`, for
            `compile` and for `backend`. A table is immutable: the values of tensors in it change, and in the place of
            numbers the table that is returned has tensors.
        selector: The sites of the model, as for `set_rule_parameter`; for a table, the entries as the report prints
            them (``"relu"``), or a pattern. Default: all that have these parameters.
        **values: The new values, by the name of the parameter.

    Returns:
        The model itself; or the table with the values, to use instead of the one that was given.

    Raises:
        PlanError: No site or entry matches.
        RuleError: No rule there has such a parameter; a value does not satisfy the constraints of the rule; or a tensor
            is used at other sites or entries, too.
        TypeError: A value has the wrong type, or `target` is neither a model nor a table.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> table = fg.set_parameters(fg.RuleTable.of("fast_sigmoid"), slope=1.0)
        >>> with fg.use(table):
        ...     y = torch.relu(torch.ones(1, requires_grad=True))
        >>> again = fg.set_parameters(table, slope=2.0)
        >>> again == table, float(table[0].rules[0].bound["slope"])
        (True, 2.0)
    """
    if not isinstance(selector, str):
        raise TypeError(
            f"set_parameters takes the sites or entries as text, such as 'relu' or 'layer4.*', got {selector!r}. Call "
            f"it once for each."
        )
    holder = holder_of(target, values, selector, "set_parameters")
    holder.begin(values)
    return holder.target


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number_in(value: Any) -> Any:
    """The number that a tensor of one number holds, which can be checked as a number; any other value as it is."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta
    return value.item() if one else value


def _takes_tensor(rule: Rule, name: str) -> bool:
    """Whether a parameter of a rule can be a tensor; a whole number that Python code uses cannot."""
    declared = rule.parameters.get(name)
    return declared is None or declared.types is None or float in declared.types


def _tensor_of(value: float, model: nn.Module | None = None) -> Tensor:
    """A number as a tensor of at least single precision, as formulas compute with it in a half-precision model, too."""
    dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
    tensors = () if model is None else (*model.parameters(), *model.buffers())
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        dtype = torch.float64
    return torch.tensor(value, dtype=dtype)


class _InModel:
    """The parameters of the sites of a transformed model."""

    def __init__(self, target: Any, model: RuleParameters, sites: str) -> None:
        self.target, self._model, self._sites = target, model, sites

    def begin(self, values: Mapping[str, Any]) -> None:
        """Set the parameters, and keep those that can be tensors in tensors."""
        self.set(values)  # as numbers, which are checked against the constraints of the rules
        rules = [
            rule for decision in report(self._model).decisions for rule in decision.rules or ()
        ]
        for name, value in values.items():
            if _is_number(value) and all(_takes_tensor(rule, name) for rule in rules):
                as_tensor: dict[str, Any] = {name: _tensor_of(value, self._model)}
                self._model.set_rule_parameter(self._sites, **as_tensor)

    def set(self, values: Mapping[str, Any]) -> None:
        """Set the parameters."""
        self._model.set_rule_parameter(self._sites, **values)


class _InTable:
    """The parameters of the entries of a table that has tensors in their place."""

    def __init__(self, table: RuleTable, names: Iterable[str], entries: str) -> None:
        self._names = tuple(names)
        self._tensors: dict[str, list[Tensor]] = {}
        self._rules: list[Rule] = []
        chosen = [
            e for e in table if entries in ("*", e.selector) or fnmatchcase(e.selector, entries)
        ]
        if not chosen:
            raise PlanError(
                unknown("entry of the table:", entries, [entry.selector for entry in table])
            )
        declared = [n for entry in chosen for rule in entry.rules or () for n in rule.parameters]
        for name in self._names:
            if name not in declared:
                raise RuleError(
                    unknown(f"parameter of the rules of entry {entries!r}:", name, declared)
                )
        self._require_alone(table, chosen)
        own = (self._with_tensors(e) if e in chosen else e for e in table.entries)
        self.target = RuleTable(own, table.reaches)

    def _require_alone(self, table: RuleTable, chosen: list[Entry]) -> None:
        """Raise `RuleError` if a tensor that would be set is used by an entry that is not chosen, too."""
        used = [
            (entry, name, value)
            for entry in table
            for rule in entry.rules or ()
            for name, value in rule.values
            if isinstance(value, Tensor)
        ]
        for entry, name, value in used:
            if entry not in chosen or name not in self._names:
                continue
            for other, other_name, other_value in used:
                if other_value is value and (other not in chosen or other_name != name):
                    raise RuleError(
                        f"the tensor {name!r} of entry {entry.selector!r} is also {other_name!r} of entry "
                        f"{other.selector!r}. Select both entries, or give each a tensor of its own."
                    )

    def _with_tensors(self, entry: Entry) -> Entry:
        rules = entry.rules and tuple(self._with_tensor_parameters(rule) for rule in entry.rules)
        return entry if rules == entry.rules else replace(entry, rules=rules)

    def _with_tensor_parameters(self, rule: Rule) -> Rule:
        new: dict[str, Any] = {}
        for name in self._names:
            if name not in rule.parameters:
                continue
            if not _takes_tensor(rule, name):
                raise TypeError(
                    f"parameter {name!r} of rule {rule.name!r} is a whole number, which a table cannot change. Set or "
                    f"schedule it in a transformed model, transform(model, table)."
                )
            value = rule.bound.get(name)
            if not isinstance(value, Tensor):
                new[name] = value = _tensor_of(0.0)
            self._tensors.setdefault(name, []).append(value)
        if any(name in rule.parameters for name in self._names):
            self._rules.append(rule)
        return rule(**new) if new else rule

    def begin(self, values: Mapping[str, Any]) -> None:
        """Set the parameters."""
        self.set(values)

    def set(self, values: Mapping[str, Any]) -> None:
        """Set the parameters, if the values satisfy the constraints of the rules."""
        values = {name: _number_in(value) for name, value in values.items()}
        for name, value in values.items():
            shapes = [[*t.shape] for t in self._tensors[name] if not _is_number(value)]
            if shapes and (
                not isinstance(value, Tensor) or shapes != [[*value.shape]] * len(shapes)
            ):
                raise TypeError(
                    f"parameter {name!r} is set in a table, which takes a number, or a tensor of the shape of the one "
                    f"in the table; got {value!r}. Write the value into the table: on(...).backward(rule, {name}=...)."
                )
        for rule in self._rules:
            of_rule: dict[str, Any] = {n: v for n, v in values.items() if n in rule.parameters}
            rule(**of_rule)
        with torch.no_grad():
            for name, value in values.items():
                for tensor in self._tensors[name]:
                    tensor.copy_(torch.as_tensor(value))


Holder: TypeAlias = _InModel | _InTable
"""The parameters of a model or a table that a scheduler sets."""


def holder_of(target: Any, names: Iterable[str], entries: str, asked: str) -> Holder:
    """What holds the parameters of a model or a table.

    Args:
        target: The model or the table.
        names: The names of the parameters.
        entries: The sites of the model, or the entries of the table.
        asked: The name of the function or class that asks, for errors.

    Raises:
        TypeError: `target` is neither a model nor a table, or a parameter cannot be kept in a table.
        PlanError: No entry matches.
        RuleError: No rule there has such a parameter, or a tensor is used by other entries, too.
    """
    names = tuple(names)
    if LOSS_SCALE in names:
        raise RuleError(
            f"{asked} does not set {LOSS_SCALE!r}, which the GradScaler of unscaled() keeps and changes. Set it there: "
            f"scaler.update(new_scale)."
        )
    if isinstance(target, RuleTable):
        return _InTable(target, names, entries)
    compiled = compiled_model(target) if isinstance(target, nn.Module) else None
    model = target if compiled is None else compiled
    if isinstance(model, RuleParameters):
        return _InModel(target, model, entries)
    remedy = "For rules in another form, give RuleTable.of(rules)."
    if isinstance(target, nn.Module):
        table = {
            "RuleScheduler": "scheduler = RuleScheduler(RuleTable.of(rules), ...); use(scheduler.target)",
            "set_parameters": "table = set_parameters(RuleTable.of(rules), ...); use(table)",
        }[asked]
        remedy = (
            f"Transform the model first. For the rules of use(), compile() and backend(), give the table, and give "
            f"them the table that has the values: {table}."
        )
    raise TypeError(
        f"{asked} takes a transformed model or a RuleTable, got {type(target).__name__}. {remedy}"
    )
