"""The parameters of rules in a captured model: `set_rule_parameter`, and the tensors that the model holds for them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from .._torch.modules import ConvertsInPlace, buffers_of
from ..core.copies import forget, remember
from ..core.rule import Rule, get
from ..errors import PlanError, RuleError, unknown
from ..ops.gradients import decoupled

__all__ = [
    "GENERATOR",
    "HELD",
    "PLAN",
    "RuleParameters",
    "calls_by_site",
    "hold",
    "in_force",
]

PLAN = "_freegrad_fx_plan"
"""The attribute of a transformed model that holds the plan, or a function that returns it."""

_HELD = "rule_parameter_"
GENERATOR = "rule_generator_"
"""What the names of the attributes begin with by which a model holds generators of rules."""


HELD = (Tensor, torch.Generator)
"""What a model holds for the rules: a graph reads it from an attribute of the model."""


def hold(root: nn.Module, value: Tensor | torch.Generator) -> str:
    """Return the name by which a model holds a tensor or a generator that is a parameter of a rule.

    A tensor becomes a non-persistent buffer, unless it already is a parameter or buffer of the model. A generator
    becomes an attribute, which is copied and saved with the model.
    """
    if isinstance(value, torch.Generator):
        names = [name for name in vars(root) if name.startswith(GENERATOR)]
        held_as = next((name for name in names if vars(root)[name] is value), "")
        if not held_as:
            held_as = f"{GENERATOR}{len(names)}"
            setattr(root, held_as, value)
        return held_as
    tensor = value
    named = (*root.named_parameters(), *root.named_buffers())
    name = next((name for name, held in named if held is tensor), "")
    if not name:
        number = sum(n.startswith(_HELD) for n in buffers_of(root))
        name = f"{_HELD}{number}"
        root.register_buffer(name, tensor, persistent=False)
    return name


def calls_by_site(model: RuleParameters) -> dict[str, list[list[fx.Node]]]:
    """For each site, by name, the nodes that apply its rules: one list for each graph, the first rule first."""
    found: dict[str, dict[fx.Graph, list[fx.Node]]] = {}
    for node in _calls(model):
        # the chain of the further rules precedes the node of the first one
        found.setdefault(str(node.kwargs["site"]), {}).setdefault(node.graph, []).insert(0, node)
    return {site: [*graphs.values()] for site, graphs in found.items()}


def in_force(
    model: RuleParameters,
    calls: Mapping[str, list[list[fx.Node]]],
    site: str,
    rules: tuple[Rule, ...],
) -> tuple[Rule, ...]:
    """The rules of a site with the values of their parameters that the graphs of a model use.

    Args:
        model: The model.
        calls: The result of `calls_by_site`.
        site: The name of the site.
        rules: The rules, as the plan has them. They are returned if they have these values.
    """
    for nodes in calls.get(site, []):
        if [node.kwargs["rule"] for node in nodes] == [rule.name for rule in rules]:
            new = [_with_values(r, _values(model, n)) for r, n in zip(rules, nodes, strict=True)]
            return rules if all(map(operator.is_, new, rules)) else tuple(new)
    return rules


def _with_values(rule: Rule, values: Mapping[str, Any]) -> Rule:
    new = {
        n: v for n, v in values.items() if v is not rule.bound[n] and not _equal(v, rule.bound[n])
    }
    return rule(**new) if new else rule


def _equal(value: Any, other: Any) -> bool:
    return not isinstance(value, Tensor) and not isinstance(other, Tensor) and bool(value == other)


def _values(model: nn.Module, call: fx.Node) -> dict[str, Any]:
    """The values of the parameters that a node gives to its rule."""
    given = {n: v for n, v in call.kwargs.items() if n in get(str(call.kwargs["rule"])).bound}
    return {n: _tensor(model, v) if isinstance(v, fx.Node) else v for n, v in given.items()}


def _tensor(model: nn.Module, node: fx.Node) -> Any:
    return reduce(getattr, str(node.target).split("."), model)


def _calls(model: RuleParameters) -> Iterator[fx.Node]:
    """The nodes of all graphs that apply a rule."""
    for variant in model.variants:
        for node in variant.graph.nodes:
            if node.target is decoupled and "rule" in node.kwargs:
                yield node


class RuleParameters(ConvertsInPlace):
    """The part of `CapturedModule` that concerns the parameters of rules."""

    # PyTorch replaces buffers. Those of rules stay the tensors that the caller gave
    converted_in_place = _HELD
    variants: Any
    recompile: Any

    def set_rule_parameter(
        self,
        sites: str = "*",
        /,
        *,
        rule: str | None = None,
        **values: float | Tensor | torch.Generator | None,
    ) -> Self:
        """Set parameters of the rules of this model. It can be called at any time, also on a loaded or copied model.

        A parameter that is a tensor is written into, so that compiled code uses the new value without recompilation.
        A parameter that is a number becomes the new number, or the tensor: compiled code is compiled again.

        Call it after a backward and before the next forward.

        Args:
            sites: The name of a site (``"layer4.1.relu:relu[0]"``, ``"fc.weight"``); a pattern for such names, in which
                ``*`` matches any characters; the name of an op (``"relu"``); or an entry of the table, as the report
                prints it (``"params"``). Default: all sites.
            rule: The name of a rule, to leave other rules at these sites unchanged.
            **values: The new values, numbers, tensors or generators, by the name of the parameter.

        Returns:
            The model itself.

        Raises:
            PlanError: No site with a rule matches.
            RuleError: No rule at these sites has such a parameter; a value does not satisfy the constraints of the
                rule, or does not fit the shape of the tensor; or the tensor is used at other sites, too.
            TypeError: A value, or `sites`, has the wrong type.

        Example:
            >>> import torch, freegrad_fx as fg
            >>> gm = fg.transform(torch.nn.Sequential(torch.nn.ReLU()), {"relu": fg.rules.scale(s=2.0)})
            >>> gm = gm.set_rule_parameter("relu", s=3.0)
            >>> fg.report(gm).decisions[0].rules
            (scale(s=3.0),)
        """
        if not isinstance(sites, str):
            raise TypeError(
                f"set_rule_parameter takes the sites as text, such as 'relu' or 'layer4.*', got {sites!r}. Call it "
                f"once for each."
            )
        calls = list(_calls(self))
        of_entry = _sites_of_entry(self.__dict__.get(PLAN), sites)
        chosen = [
            c
            for c in calls
            if c.kwargs["site"] in of_entry or _selects(sites, str(c.kwargs["site"]))
        ]
        chosen = [c for c in chosen if rule in (None, c.kwargs["rule"])]
        if not chosen:
            known = ", ".join(
                dict.fromkeys(f"{c.kwargs['site']} ({c.kwargs['rule']})" for c in calls)
            )
            of = f" with the rule {rule!r}" if rule is not None else ""
            raise PlanError(
                f"set_rule_parameter: no site{of} matches {sites!r}; the sites with rules are: {known or 'none'}"
            )
        for name in values:
            if not any(name in c.kwargs for c in chosen):
                names = [n for c in chosen for n in get(str(c.kwargs["rule"])).bound]
                raise RuleError(unknown(f"parameter of the rules at {sites!r}:", name, names))
        wanted = [
            (call, {name: value for name, value in values.items() if name in call.kwargs})
            for call in chosen
        ]
        checked = [(call, _checked(self, call, new)) for call, new in wanted]
        for call, new in checked:
            _require_alone(self, call, new, calls, chosen)
        results = [
            _set(self, call, name, value) for call, new in checked for name, value in new.items()
        ]
        if any(results):
            self.recompile()
        return self

    def _remember_sources(self, source: nn.Module) -> None:
        """Note that this model was copied from another one."""
        for name, tensor in buffers_of(self).items():
            original = buffers_of(source).get(name)
            if name.startswith(_HELD) and tensor is not None and original is not None:
                remember(tensor, original)


def _sites_of_entry(plan: Any, selector: str) -> set[str]:
    """The names of the sites that an entry of the table decides."""
    decisions = () if plan is None else plan.decisions
    entries = () if plan is None else plan.table.entries
    return {
        d.site.name
        for d in decisions
        if d.entry is not None and entries[d.entry].selector == selector
    }


def _selects(pattern: str, site: str) -> bool:
    op = site.rpartition(":")[2].partition("[")[0]
    return pattern in (site, op) or fnmatchcase(site, pattern.replace("[", "[[]"))


def _checked(model: nn.Module, call: fx.Node, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in the types that a rule declares. Raises if they are not valid."""
    rule = get(str(call.kwargs["rule"]))
    for name, value in values.items():
        if isinstance(value, Tensor) and not value.is_meta and bool(value.isnan().any()):
            raise RuleError(
                f"set_rule_parameter: the tensor for parameter {name!r} of rule {rule.name!r} holds NaN; it must hold "
                f"numbers"
            )
    new = rule(**{**_values(model, call), **values}).bound
    return {name: new[name] for name in values}


def _require_alone(
    model: nn.Module,
    call: fx.Node,
    values: Mapping[str, Any],
    calls: list[fx.Node],
    chosen: list[fx.Node],
) -> None:
    """Raise `RuleError` if a tensor cannot be set: it has another shape, or other sites use it, too."""
    rule = call.kwargs["rule"]
    for name, value in values.items():
        current = _values(model, call)[name]
        if not isinstance(current, Tensor):
            continue
        if isinstance(value, Tensor) and value.dim() and value.shape != current.shape:
            raise RuleError(
                f"set_rule_parameter: parameter {name!r} of rule {rule!r} is a tensor of shape {[*current.shape]}, got "
                f"one of shape {[*value.shape]}. Give a number or a tensor of that shape, or transform again."
            )
        others = [
            other.kwargs["site"]
            for other in calls
            if any(v is current for n, v in _values(model, other).items())
            and (other not in chosen or name not in other.kwargs)
        ]
        if others:
            raise RuleError(
                f"set_rule_parameter: the tensor {name!r} of rule {rule!r} at {call.kwargs['site']!r} is also used at "
                f"{', '.join(map(repr, dict.fromkeys(others)))}. Select these sites too, or give each entry its own "
                f"tensor when transforming."
            )


def _set(model: RuleParameters, call: fx.Node, name: str, value: Any) -> bool:
    """Set a parameter. Returns whether the graph was changed."""
    given = call.kwargs[name]
    if isinstance(given, fx.Node) and not isinstance(_tensor(model, given), torch.Generator):
        tensor = _tensor(model, given)
        with torch.no_grad():
            tensor.copy_(torch.as_tensor(value))
        forget(tensor)
        return False
    if _equal(given, value):
        return False
    if isinstance(value, HELD):
        with call.graph.inserting_before(call):
            value = call.graph.create_node("get_attr", hold(model, value))
        value.meta.update(call.meta)
    call.update_kwarg(name, value)
    if isinstance(given, fx.Node) and not given.users:
        given.graph.erase_node(given)
    return True
