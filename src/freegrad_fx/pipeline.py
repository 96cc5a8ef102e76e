"""`transform` and `explain`: the one-call conversion. Puts the stages in order and adds nothing of its own."""

from __future__ import annotations

import difflib
import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ._torch.releases import warn_if_untested
from .capture import Capture, capture, check_model
from .capture.captured import CapturedModule
from .context import inside_of_a_block, outside_of_blocks
from .errors import FreegradWarning, PlanError
from .plan import PLAN, Decided, Plan, make_plan
from .rewrite import rewrite, without_ambient
from .table import Entry, RulesLike, RuleTable

__all__ = ["explain", "transform"]


def transform(
    model: nn.Module,
    rules: RulesLike | None = None,
    *,
    ambient: bool | None = None,
    strict: bool = False,
    concrete_args: Mapping[str, Any] | None = None,
    leaf_modules: Sequence[type[nn.Module]] = (),
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> CapturedModule:
    """Give the activations of a model a decoupled backward, and leave its forward as it is.

    Formula: for every site y = f(x) that the rules select, ∂x = rule(∂y, x, y) instead of f'(x)·∂y.

    Args:
        model: Any `nn.Module` whose forward can be traced. It is not changed.
        rules: A rule name, a `Rule` or a composition: for every activation. Or a dict: its keys are op names
            (``"relu"``), groups (``"activations"``, ``"softmax"``, ``"quantizers"``), ``"params"``, ``"all"``, and
            classes of modules or of autograd.Functions, its values rules, or None to keep the native backward. A class
            goes before an op, an op before a group, a group before ``"all"``. A module of a class named so is kept
            whole; it must not write into its input, unless it has a true attribute `inplace`. Or a `RuleTable`, or the
            path of a TOML file that holds one.
        ambient: Let activations and parameters that no rule is given to follow `use` blocks. By default, if `rules` is
            None: ``transform(model)`` is native until a block is entered.
        strict: Raise where the default is a warning or a line in the report: for an entry that matches nothing, a
            site that cannot be given its rule, code that was kept whole, and what the graph loses.
        concrete_args: Values of arguments of the forward that the graph is made for. An argument with a default is
            made a constant unless it stands here with the value `torch.fx.PH`; a call with another value raises.
        leaf_modules: Module classes to keep whole: what is computed in them keeps its backward.
        example_inputs: A tuple of arguments, or a dict of keyword arguments, of the forward. With them the model is
            captured by `torch.export`, which follows control flow on shapes and Python values and opens every module;
            a call that breaks what the examples made it assume raises.
        dynamic_shapes: For `torch.export`. By default the first dimension of every tensor may change, where the
            model allows it.

    Returns:
        A `torch.fx.GraphModule` with the parameters and buffers of `model` (the same tensors), its own modules, and
        the same state_dict keys. `report` tells what was done.

    Raises:
        TypeError: `model` is no `nn.Module`, is compiled or scripted already, or a rule's parameter has a wrong type.
        RuleError: A rule is unknown or not fully bound.
        PlanError: A rule cannot serve a site; under `strict`, see above.
        TableError: A key names no op or group, or the file is no table. It is a PlanError.
        CaptureError: The model cannot be traced; the message says where and why.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> gm = fg.transform(model, {"relu": fg.rules.rectangular(a=-1.0, b=1.0)})
        >>> print(fg.report(gm).decisions[0].site.name)
        1:relu[0]
    """
    table = RuleTable() if rules is None else RuleTable.of(rules)
    captured, plan, sites = _planned(
        model,
        table,
        leaf_modules,
        concrete_args,
        example_inputs,
        dynamic_shapes,
        ambient=rules is None if ambient is None else ambient,
    )
    _complain(plan, strict)
    for variant, decided in zip(captured.variants, sites, strict=True):
        rewrite(variant.graph, captured.root, decided)
    result = CapturedModule.build(captured.root, captured.variants, captured.class_name)
    result.__dict__[PLAN] = plan
    return result


def explain(
    model: nn.Module,
    rules: RulesLike | None = None,
    *,
    ambient: bool | None = None,
    strict: bool = False,
    concrete_args: Mapping[str, Any] | None = None,
    leaf_modules: Sequence[type[nn.Module]] = (),
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Plan:
    """What `transform` would do, without doing it.

    Args:
        model: As for `transform`.
        rules: As for `transform`; without, the plan lists the sites.
        ambient: As for `transform`, but False by default.
        strict: As for `transform`; likewise `concrete_args` and `leaf_modules`.
        concrete_args: See `transform`.
        leaf_modules: See `transform`.
        example_inputs: See `transform`.
        dynamic_shapes: See `transform`.

    Returns:
        The plan: for every site the decision and the reason. ``print`` it.

    Raises:
        TypeError: As for `transform`; likewise RuleError, PlanError and CaptureError.
    """
    table = RuleTable() if rules is None else RuleTable.of(rules)
    _, plan, _ = _planned(
        model,
        table,
        leaf_modules,
        concrete_args,
        example_inputs,
        dynamic_shapes,
        parameters=rules is None,
        ambient=bool(ambient),
    )
    _complain(plan, strict)
    return plan


def _planned(
    model: nn.Module,
    table: RuleTable,
    leaf_modules: Any,
    *how_to_capture: Any,
    parameters: bool = False,
    ambient: bool = False,
) -> tuple[Capture, Plan, list[Decided]]:
    """Capture a model and plan it: what `transform` and `explain` have in common."""
    warn_if_untested()
    check_model(model)
    leaves = [leaf_modules] if isinstance(leaf_modules, type) else list(leaf_modules)
    # torch.export records what a block does to ambient parts of the model now, and refuses it. What is ambient in
    # the end must be in no block then; what would cease to be, without a word, must be in one.
    with outside_of_blocks() if ambient else inside_of_a_block():
        captured = capture(model, (*table.types_in(model), *leaves), *how_to_capture)
    before = {place for variant in captured.variants for place in without_ambient(variant.graph)}
    return captured, *make_plan(captured, table, leaves, parameters, ambient, before)


def _complain(plan: Plan, strict: bool) -> None:
    """Say what the caller asked for and does not get."""
    problems = [
        f"the entry {entry.selector!r} matches nothing in {plan.model}; the {_there_are(plan, entry)}"
        for entry in plan.unmatched
    ]
    problems += [
        f"site {d.site.name} keeps its backward: {d.reason}" for d in plan.with_action("skip")
    ]
    problems += [f"lost: {lost}" for lost in plan.lost]
    if strict:
        problems += [f"not looked into: {opaque}" for opaque in plan.opaque if not opaque.asked]
        if problems:
            raise PlanError("strict: " + "; ".join(problems))
    for problem in problems:
        warnings.warn(problem, FreegradWarning, stacklevel=3)


def _there_are(plan: Plan, entry: Entry) -> str:
    """What a model has of what an entry selects by, the closest first."""
    sites = entry.sites
    meant = [
        d.site
        for d in plan.decisions
        if (sites.wants_parameters if d.site.kind == "parameter" else d.site.op in sites.ops)
    ]
    if not meant:
        ops = sorted({d.site.op for d in plan.decisions if d.site.kind == "operation"})
        return f"ops it has are: {', '.join(ops) or 'none'}"
    if sites.parameter:
        names = [name for site in meant for name in site.names]
        return f"parameters it has are, among others: {_closest(sites.parameter, names)}"
    found = []
    if sites.module:
        found.append(f"paths {_closest(sites.module, [site.path or '<root>' for site in meant])}")
    if sites.type:
        kinds = [str(getattr(kind, "__name__", kind)) for kind in sites.type]
        found.append(f"classes {_closest(kinds, [site.type for site in meant])}")
    if sites.call:
        found.append(f"calls 0 to {max(site.call for site in meant)}")
    if not found:
        return "function given as `where` refuses every site of such ops"
    return f"sites of such ops have, among others: {'; '.join(found)}"


def _closest(patterns: Iterable[str], names: Sequence[str]) -> str:
    close = [difflib.get_close_matches(pattern, names, cutoff=0.3) for pattern in patterns]
    found = list(dict.fromkeys([*itertools.chain(*close), *names]))
    return ", ".join(found[:3]) or "none"
