"""`transform` and `explain`: run the stages in order."""

from __future__ import annotations

import difflib
import itertools
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ._torch.releases import warn_if_untested
from .capture import Capture, capture, check_model
from .capture.captured import CapturedModule
from .capture.export import inputs_of
from .context import inside_of_a_block, outside_of_blocks
from .core.scopes import unlearned
from .errors import FreegradWarning, PlanError, VerificationError
from .expected import with_memory
from .graph.serialise import copy_graph
from .plan import PLAN, Decided, Plan, make_plan
from .plan.noise import with_noise
from .plan.reach import require_reached, run_in
from .rewrite import rewrite, without_ambient
from .sites.parameters import find_parameters
from .sites.remarks import Cache, Opaque
from .table import Entry, RulesLike, RuleTable
from .verification import Inputs, do_the_same, lacks_values, verify_examples

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
    verify: bool = True,
) -> CapturedModule:
    """Replace the backward of the activations and parameters of a model; the forward is unchanged.

    Formula: for every site y = f(x) that the rules select, ∂x = rule(∂y, x, y) instead of f'(x)·∂y.

    Args:
        model: An `nn.Module`. It is not changed.
        rules: One of the following.

            - A rule name, a `Rule` or a composition, for every activation.
            - A dict. A key is an op name (``"relu"``), a group (``"activations"``, ``"softmax"``, ``"quantizers"``),
              ``"params"``, ``"all"``, or a class of modules or of autograd.Functions. A value is a rule; None keeps
              the native backward. A class takes precedence over an op, an op over a group, a group over ``"all"``.
              Modules of a class that is a key are not traced. They must not write into their input, unless they have
              a true attribute `inplace`.
            - A `RuleTable`, or the path of a TOML file that contains one.
            - None, for no rules.
        ambient: Whether activations and parameters without a rule follow `use` blocks. The default is True if `rules`
            is None, else False.
        strict: Raise `PlanError` instead of a warning or a line in the report for: an entry that matches nothing, or
            that comes after a wider one, a site that cannot be given its rule, code that was not traced, and behaviour
            of the model that the graph lacks.
        concrete_args: Values of arguments of the forward for which the graph is specialised. An argument with a
            default is specialised for the default, unless its value here is `torch.fx.PH`. A later call with another
            value raises.
        leaf_modules: Module classes that are not traced. The code inside keeps its native backward.
        example_inputs: The arguments of the forward as a tuple, or its keyword arguments as a dict. If given, the model
            is captured by `torch.export`, which supports control flow on shapes and Python values and traces into
            every module. A later call that violates an assumption made from the examples raises.
        dynamic_shapes: For `torch.export`. By default the first dimension of every tensor is dynamic, if the model
            allows it.
        verify: Whether a model that is captured from example inputs is compared with the original, bit by bit and with
            every rule off: for the examples, and for other values of the same shapes. It takes no longer than the
            export. The report says what was compared. See `freegrad_fx.verify`.

    Returns:
        A `torch.fx.GraphModule` with the same parameters, buffers, submodules and state_dict keys as `model`. The
        tensors are shared, so training one trains the other. `report` returns the plan that was applied.

    Raises:
        TypeError: `model` is not an `nn.Module`, is already compiled or scripted, or a rule's parameter has a wrong
            type.
        RuleError: A rule is unknown or lacks a parameter value.
        PlanError: A rule cannot be used at a site, or a problem was found under `strict`.
        TableError: A key is not an op, group or class, or the file is not a valid table. A subclass of `PlanError`.
        CaptureError: The model cannot be captured; the message gives the place and the reason.
        VerificationError: What was captured from the example inputs does not do what the model does. A subclass of
            `CaptureError`.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> gm = fg.transform(model, {"relu": fg.rules.rectangular(a=-1.0, b=1.0)})
        >>> print(fg.report(gm).decisions[0].site.name)
        1:relu[0]
    """
    table = RuleTable() if rules is None else RuleTable.of(rules)
    began = time.perf_counter()
    captured, plan, sites = _planned(
        model,
        table,
        leaf_modules,
        concrete_args,
        example_inputs,
        dynamic_shapes,
        ambient=rules is None if ambient is None else ambient,
    )
    seconds = time.perf_counter() - began
    compared = None
    if example_inputs is not None:
        inputs = Inputs(*inputs_of(example_inputs))
        left_out = _not_verified(model, inputs, verify)
        if left_out:
            plan = replace(plan, verified=f"NOT VERIFIED: {left_out}")
        elif any(decision.forward is not None for decision in plan.decisions):
            # A replaced forward is to differ, so that the graphs are compared as they are now
            copies = tuple(replace(v, graph=copy_graph(v.graph)) for v in captured.variants)
            compared = CapturedModule.build(captured.root, copies, captured.class_name)
    _complain(plan, captured, strict, model, verify)
    result = _rewritten(captured, sites)
    if example_inputs is not None and not left_out:
        plan = _verified(model, compared or result, inputs, plan, seconds)
        plan = with_memory(plan, model, result, inputs)
    result.__dict__[PLAN] = plan
    return result


def _rewritten(captured: Capture, sites: Sequence[Decided]) -> CapturedModule:
    """The captured model with the rules of a plan."""
    variants = [
        replace(v, marks=rewrite(v.graph, captured.root, decided, v.marks))
        for v, decided in zip(captured.variants, sites, strict=True)
    ]
    return CapturedModule.build(captured.root, variants, captured.class_name)


def _not_verified(model: nn.Module, inputs: Inputs, verify: bool) -> str:
    """Why a capture from example inputs is not compared with the original; ``""`` if it is."""
    if not verify:
        return "verify=False"
    if lacks_values(model, inputs):
        return "the model or an example input is on the meta device or fake, so that nothing can be computed"
    return ""


def _verified(
    model: nn.Module, result: CapturedModule, inputs: Inputs, plan: Plan, seconds: float
) -> Plan:
    """Compare what was captured with the original, and note in the plan what was compared.

    Raises:
        VerificationError: They differ. The message names a way in that takes the model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = verify_examples(model, result, inputs, plan.lost, seconds)
        except torch.OutOfMemoryError:
            why = "there is not enough memory to run the model"
            return replace(plan, verified=f"NOT VERIFIED: {why}")
        if found:
            text = str(found).partition(": ")[2].replace(".\nNote: ", "; ").rstrip(".")
            return replace(plan, verified=f"Verified: {text}")
        raise VerificationError(
            f"{plan.model} cannot be captured from the example inputs: what was captured does not do what the model "
            f"does. {found.first}. {found.cause} {_other_door(model, inputs)} verify=False leaves out the comparison.",
            found,
        )


def _other_door(model: nn.Module, inputs: Inputs) -> str:
    """The way in that takes a model which torch.export does not take, as a sentence."""
    try:
        result = transform(model, {"activations": None})
        if do_the_same(model, result, inputs):
            return (
                "Transform the model without example_inputs: symbolic tracing takes it, and does the same for these "
                "inputs."
            )
    except Exception:
        pass  # the sentence below names the other way
    return "Compile the model with freegrad_fx.compile(model, rules), which accepts any program."


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
    """Return the plan of `transform` without applying it.

    From example inputs, the plan also says what is kept for the backward, natively and with the rules. For that the
    model is run twice, in its present mode; everything that it changes is put back.

    Args:
        model: As for `transform`.
        rules: As for `transform`. Without rules, the plan lists the sites of the model.
        ambient: As for `transform`, but False by default.
        strict: See `transform`.
        concrete_args: See `transform`.
        leaf_modules: See `transform`.
        example_inputs: See `transform`.
        dynamic_shapes: See `transform`.

    Returns:
        The plan: for every site the decision and the reason. Print it for a readable report.

    Raises:
        TypeError: As for `transform`. RuleError, PlanError, TableError and CaptureError are raised as there, too.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> plan = fg.explain(torch.nn.Sequential(torch.nn.ReLU()), {"relu": fg.rules.scale(s=2.0)})
        >>> [(d.site.name, d.action) for d in plan.decisions]
        [('0:relu[0]', 'rewrite')]
    """
    table = RuleTable() if rules is None else RuleTable.of(rules)
    captured, plan, sites = _planned(
        model,
        table,
        leaf_modules,
        concrete_args,
        example_inputs,
        dynamic_shapes,
        parameters=rules is None,
        ambient=bool(ambient),
    )
    _complain(plan, captured, strict, model)
    if example_inputs is not None:
        inputs = Inputs(*inputs_of(example_inputs))
        plan = with_memory(plan, model, _rewritten(captured, sites), inputs)
    return with_noise(plan, model)


def _planned(
    model: nn.Module,
    table: RuleTable,
    leaf_modules: Any,
    *how_to_capture: Any,
    parameters: bool = False,
    ambient: bool = False,
) -> tuple[Capture, Plan, list[Decided]]:
    """Capture a model and make its plan."""
    warn_if_untested()
    check_model(model)
    leaves = [leaf_modules] if isinstance(leaf_modules, type) else list(leaf_modules)
    # torch.export would record the effect of a block on sites that are already ambient, and the capture refuses that.
    # If sites stay ambient, no block may be in force. Otherwise one is, so that ambient sites, which would silently
    # become native, are refused.
    with outside_of_blocks() if ambient else inside_of_a_block():
        captured = capture(model, (*table.types_in(model), *leaves), *how_to_capture)
    before = {place for variant in captured.variants for place in without_ambient(variant.graph)}
    plan, sites = make_plan(captured, table, leaves, parameters, ambient, before)
    if table.reaches:
        require_reached(plan, captured.root, run_in(captured), captured)
    return captured, plan, sites


def _complain(
    plan: Plan, captured: Capture, strict: bool, model: nn.Module, verify: bool = False
) -> None:
    """Warn of requests that the plan does not fulfil; raise `PlanError` if `strict`.

    Args:
        plan: The plan.
        captured: The captured model, before it is rewritten.
        strict: See `transform`.
        model: The model.
        verify: Whether a comparison with the original is requested.
    """
    unmatched = plan.unmatched
    problems = [
        f"the entry {entry.selector!r} matches nothing in {plan.model}; the {_there_are(plan, entry, model)}"
        for entry in unmatched[:_EXPLAINED]
    ]
    if (more := len(unmatched) - _EXPLAINED) > 0:
        problems.append(
            f"{more} more entries match nothing in {plan.model}, from {unmatched[_EXPLAINED].selector!r} to "
            f"{unmatched[-1].selector!r}; report(gm).unmatched has all of them"
        )
    problems += plan.misplaced.values()
    problems += [
        f"site {d.site.name} keeps its backward: {d.reason}" for d in plan.with_action("skip")
    ]
    problems += [f"lost: {lost}" for lost in plan.lost if not isinstance(lost, Cache)]
    if any(unlearned(d.rules) for d in plan.decisions):
        found = [p for v in captured.variants for p in find_parameters(v.graph, captured.root)]
        # an exported graph also reads the parameters that it does not use
        learnt = {id(p.tensor) for p in found if p.calls or any(node.users for node in p.reads)}
        problems += dict.fromkeys(
            text for d in plan.decisions for text in unlearned(d.rules, learnt)
        )
    if strict:
        problems += [f"not traced: {opaque}" for opaque in plan.opaque if not opaque.asked]
        problems += [f"{plan.verified}; verify=False accepts this"] * (
            verify and bool(plan.verified)
        )
        if problems:
            raise PlanError("strict: " + "; ".join(problems))
    problems += [_not_opened(opaque) for opaque in plan.opaque if opaque.holds]
    for problem in problems:
        warnings.warn(problem, FreegradWarning, stacklevel=3)


_EXPLAINED = 20
"""The number of entries that match nothing for which the names in the model are searched, which takes time."""


def _not_opened(opaque: Opaque) -> str:
    """The warning of a module that could not be traced and contains what the table selects."""
    return (
        f"not traced: {opaque}. These keep their backward. freegrad_fx.compile(model, rules) reaches them; so does "
        f"transform(model, rules, example_inputs=(...)), if torch.export takes the model. To keep the backward on "
        f"purpose, give leaf_modules=[{opaque.what.partition(',')[0]}]."
    )


def _there_are(plan: Plan, entry: Entry, model: nn.Module) -> str:
    """The names in the model that an entry could have meant, the most similar first, as a clause."""
    sites = entry.sites
    if sites.type and not sites.ops and not sites.wants_parameters:
        kinds = dict.fromkeys(type(module) for module in model.modules())
        names = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
        return f"classes of the model include: {_closest(map(_named, sites.type), names)}"
    meant = [
        d.site
        for d in plan.decisions
        if (sites.wants_parameters if d.site.kind == "parameter" else d.site.op in sites.ops)
    ]
    if not meant:
        ops = sorted({d.site.op for d in plan.decisions if d.site.kind == "operation"})
        return f"ops of the model are: {', '.join(ops) or 'none'}"
    if sites.parameter:
        names = [name for site in meant for name in site.names]
        return f"parameters of the model include: {_closest(sites.parameter, names)}"
    found = []
    if sites.module:
        found.append(f"paths {_closest(sites.module, [site.path or '<root>' for site in meant])}")
    if sites.type:
        found.append(f"classes {_closest(map(_named, sites.type), [site.type for site in meant])}")
    if sites.call:
        found.append(f"calls 0 to {max(site.call for site in meant)}")
    if not found:
        return "`where` function returns False for every site of these ops"
    return f"sites of these ops include: {'; '.join(found)}"


def _closest(patterns: Iterable[str], names: Sequence[str]) -> str:
    near = [difflib.get_close_matches(pattern, names, cutoff=0.3) for pattern in patterns]
    found = list(dict.fromkeys([*itertools.chain(*near), *names]))
    return ", ".join(found[:3]) or "none"


def _named(kind: Any) -> str:
    """The qualified name of a class, or the name that was given for one."""
    return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
