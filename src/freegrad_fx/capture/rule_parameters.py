"""The parameters of rules in a captured model: `set_rule_parameter`, and the tensors that the model holds for them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor, fx, nn

from .._torch.modules import HoldsForRules, buffers_of
from .._torch.tensors import mark_as_parameter
from ..core.contract import LOSS_SCALE, RULE_PARAMETER
from ..core.copies import forget, remember
from ..core.rule import Rule, get
from ..errors import PlanError, RuleError, unknown
from ..ops.gradients import decoupled, stop_gradient
from ..ops.joint import scattered

__all__ = [
    "GENERATOR",
    "HELD",
    "LEARNT",
    "PLAN",
    "RuleParameters",
    "calls_by_site",
    "hold",
    "in_force",
]

PLAN = "_freegrad_fx_plan"
"""The attribute of a transformed model that holds the plan, or a function that returns it."""

LEARNT = "_freegrad_fx_parameters"
"""The attribute of a model that holds the names of the parameters which belong to its rules."""

GENERATOR = "rule_generator_"
"""What the names of the attributes begin with by which a model holds generators of rules."""


HELD = (Tensor, torch.Generator)
"""What a model holds for the rules: a graph reads it from an attribute of the model."""


def hold(root: nn.Module, value: Tensor | torch.Generator, *, learnt: bool = False) -> str:
    """Return the name by which a model holds a tensor or a generator that is a parameter of a rule.

    A tensor becomes a non-persistent buffer, or a parameter that is not in the state_dict, unless it already is a
    parameter or buffer of the model. A generator becomes an attribute, which is copied and saved with the model.

    Args:
        root: The model.
        value: The tensor or the generator.
        learnt: Whether the tensor gets a gradient. A leaf of the autograd graph becomes a parameter.
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
    learnt = learnt and tensor.requires_grad and tensor.is_leaf
    if name and not (learnt and name in buffers_of(root) and name.startswith(RULE_PARAMETER)):
        return name
    if name:  # another rule, which does not learn it, was first
        del buffers_of(root)[name]
    else:
        numbers = (n for n in range(len(named) + 1) if not hasattr(root, f"{RULE_PARAMETER}{n}"))
        name = f"{RULE_PARAMETER}{next(numbers)}"
    if learnt:
        mark_as_parameter(tensor)
        root.register_parameter(name, tensor)  # type: ignore[arg-type]
        root.__dict__[LEARNT] = (*root.__dict__.get(LEARNT, ()), name)
    else:
        root.register_buffer(name, tensor, persistent=False)
    return name


def calls_by_site(model: RuleParameters) -> dict[str, list[list[fx.Node]]]:
    """For each site, by name, the nodes that apply its rules: one list for each graph, the first rule first."""
    found: dict[str, dict[fx.Graph, list[fx.Node]]] = {}
    for node in _calls(model):
        # the chain of the further rules precedes the node of the first one
        for site in sites_of(node):
            found.setdefault(site, {}).setdefault(node.graph, []).insert(0, node)
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


def sites_of(call: fx.Node) -> tuple[str, ...]:
    """The names of the sites of a node that applies a rule; there are several if it acts on them together."""
    for user in call.users:
        if user.target is scattered:
            found: tuple[str, ...] = tuple(map(str, user.kwargs["sites"]))  # type: ignore[arg-type]
            return found
    return (str(call.kwargs["site"]),)


class RuleParameters(HoldsForRules):
    """The part of `CapturedModule` that concerns the parameters of rules."""

    # PyTorch replaces buffers. Those of rules stay the tensors that the caller gave
    _freegrad_fx_buffers = RULE_PARAMETER
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
            if any(site in of_entry or _selects(sites, site) for site in sites_of(c))
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

    def rule_state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that are parameters of the rules of this model, and not of the model itself.

        They are not in the model's ``state_dict()``. Save both, and load them with `load_rule_state_dict`.

        Returns:
            The tensors, detached, by ``site/rule.parameter``, for example ``"fc.weight/lsq.step"``; those of a
            replacement forward by ``site/forward.argument``. One that several sites share has the name of the first.

        Example:
            >>> import torch, freegrad_fx as fg
            >>> alpha = torch.nn.Parameter(torch.tensor(2.0))
            >>> table = {"heaviside": fg.rules.arctan(alpha=alpha)}
            >>> gm = fg.transform(torch.nn.Sequential(fg.Activation("heaviside")), table)
            >>> gm.rule_state_dict()
            {'0:heaviside[0]/arctan.alpha': tensor(2.)}
        """
        return {key: tensor.detach() for key, tensor in self._tensors_of_rules().items()}

    def load_rule_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> Self:
        """Copy tensors into those that are parameters of the rules of this model.

        Args:
            state: The tensors, as `rule_state_dict` returns them.
            strict: Whether the names must be the same as those of `rule_state_dict`.

        Returns:
            The model itself.

        Raises:
            RuleError: A name is missing or unknown, and `strict`; or a tensor has another shape. Nothing is loaded.
            TypeError: `state` is no dict of tensors.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                f"load_rule_state_dict takes what rule_state_dict() returned, got {type(state).__name__}"
            )
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"load_rule_state_dict: {key!r} has to be a tensor, got {type(value).__name__}"
                )
        own = self._tensors_of_rules()
        problems = [
            f"{key!r} has the shape {[*state[key].shape]}, and in the model {[*tensor.shape]}"
            for key, tensor in own.items()
            if key in state and state[key].shape != tensor.shape
        ]
        if strict:
            problems += [f"{key!r} is missing" for key in own if key not in state]
            problems += [f"{key!r} is not in the model" for key in state if key not in own]
        if problems:
            raise RuleError(
                f"load_rule_state_dict: {'; '.join(problems)}. The rules of {type(self).__name__} have: "
                f"{', '.join(own) or 'no tensors'}. strict=False loads only what both have."
            )
        with torch.no_grad():
            for key, tensor in own.items():
                if key in state:
                    tensor.copy_(state[key])
                    forget(tensor)
        return self

    def _tensors_of_rules(self) -> dict[str, Tensor]:
        """The tensors that this model holds for its rules, by their names in `rule_state_dict`."""
        found: dict[str, Tensor] = {}
        known: set[int] = set()

        def add(key: str, value: Any) -> None:
            if not isinstance(value, fx.Node) or not _is_held(self, value):
                return
            if key.endswith(f".{LOSS_SCALE}"):
                return  # the scaler saves it
            tensor = _tensor(self, value)
            if id(tensor) not in known:
                known.add(id(tensor))
                found[key] = tensor

        for site, graphs in calls_by_site(self).items():
            for calls in graphs:
                names = [str(call.kwargs["rule"]) for call in calls]
                for number, call in enumerate(calls):
                    again = names[:number].count(names[number])
                    rule = f"{names[number]}#{again + 1}" if again else names[number]
                    for name, value in call.kwargs.items():
                        add(f"{site}/{rule}.{name}", value)
                for name, value in _arguments(calls[0].args[0]):
                    add(f"{site}/forward.{name}", value)
        return found

    def _remember_sources(self, source: nn.Module) -> None:
        """Note that this model was copied from another one."""
        for name, tensor in buffers_of(self).items():
            original = buffers_of(source).get(name)
            if name.startswith(RULE_PARAMETER) and tensor is not None and original is not None:
                remember(tensor, original)


def _is_held(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node reads a tensor that a model holds for its rules."""
    path, _, name = str(node.target).rpartition(".")
    if node.op != "get_attr" or not name.startswith(RULE_PARAMETER):
        return False
    holder = model.get_submodule(path)  # a part of the model can have been transformed before
    return isinstance(holder, HoldsForRules) and (
        name in holder.__dict__.get(LEARNT, ()) or name in buffers_of(holder)
    )


def _arguments(call: Any) -> Iterator[tuple[str, Any]]:
    """The arguments of a replacement forward by name or position, without `stop_gradient` around them."""
    if not isinstance(call, fx.Node):
        return
    for name, value in (*enumerate(call.args), *call.kwargs.items()):
        while isinstance(value, fx.Node) and value.target is stop_gradient:
            value = value.args[0]
        yield str(name), value


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
    now = {**_values(model, call), **values}
    new = rule(**now).bound
    rule(**{**now, **{n: v.item() for n, v in values.items() if _is_number(rule, n, v)}})
    return {name: new[name] for name in values}


def _is_number(rule: Rule, name: str, value: Any) -> bool:
    """Whether a tensor is one number, so that it can be checked against the constraints, which only numbers are."""
    declared = rule.parameters.get(name)
    if declared is None or float not in (declared.types or ()):
        return False
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta


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
            learnt = name in get(str(call.kwargs["rule"])).declaration.learns
            value = call.graph.create_node("get_attr", hold(model, value, learnt=learnt))
        value.meta.update(call.meta)
    call.update_kwarg(name, value)
    if isinstance(given, fx.Node) and not given.users:
        given.graph.erase_node(given)
    return True
