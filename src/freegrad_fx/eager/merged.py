"""Layers with the batch norm behind them, in a block: two calls, of which the first does not tell what follows.

The layer runs between two gates. If its result goes into a batch norm with which it is one site, the gate before it
closes, and the rule of the site gives the input of the layer its gradient instead. The parameters of both keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .._torch.dispatch import function_transforms_active
from .._torch.tensors import gradient_is_read, version
from ..backward.gates import Gate, gated
from ..errors import RuleError
from ..graph.provenance import caller
from ..ops.gradients import decoupled_by
from ..ops.merging import merged_parameters
from ..plan import Decision
from ..sites.merged import MERGED
from ..sites.site import OUTPUT, REPLACE
from ..vocabulary.activations import OPS
from ..vocabulary.arguments import argument_names
from ..vocabulary.calls import constants_of
from ..vocabulary.op import Operand, Spelling
from .rules import Decisions, is_differentiable, rules_act, to_rewrite
from .sites import EagerSites

__all__ = ["run_layer", "run_norm"]

Run = Callable[[tuple[Any, ...], Mapping[str, Any]], tuple[Any, list[Decisions | None]]]
"""Runs a call with other arguments, and returns its result and what was decided for it."""


@dataclass
class _Layer:
    """The call of a layer, whose result may go into a batch norm.

    Attributes:
        spelling: How it calls its op.
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        source: ``file:line`` of the call.
        passed: For each block, the entries for the first operation that matched one before the call.
        result: The result, before the gate behind the layer.
        version: The number of writes into it.
        asked: What each block decided for the layer.
        before: The gate before the layer.
        behind: The gate behind it.
    """

    spelling: Spelling
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    source: str
    passed: dict[int, tuple[int, ...]] = field(default_factory=dict)
    result: Tensor = field(default_factory=lambda: torch.empty(0))
    version: int = 0
    asked: list[Decisions | None] = field(default_factory=list)
    before: Gate = field(default_factory=Gate)
    behind: Gate = field(default_factory=Gate)

    def close(self, site: str) -> None:
        """Let no gradient pass, because the rule of a site gives the input its gradient."""
        self.before.closed = self.behind.closed = True
        self.behind.problem = (
            f"the result of the layer at {self.source} goes into a batch norm, with which it is the site {site!r}, and "
            f"also elsewhere, so that both are no single layer. Transform the model, which sees that in advance: "
            f"transform(model, rules)."
        )

    @property
    def given(self) -> dict[int | str, Any]:
        """The arguments, by their places."""
        return _by_place(self.args, self.kwargs)


def _by_place(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int | str, Any]:
    return dict([*enumerate(args), *kwargs.items()])


_layers = WeakTensorKeyDictionary()
"""The layers by their results, while these exist."""


def run_layer(
    observing: list[EagerSites],
    spelling: Spelling,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    run: Run,
) -> Any:
    """Run a layer whose result may go into a batch norm.

    Args:
        observing: The blocks in force.
        spelling: How the call calls its op.
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        run: Runs the call, with the rules of the layer itself.
    """
    layer = _Layer(spelling, function, args, kwargs, "")
    given, key = layer.given, spelling.key
    if not (rules_act() and is_differentiable(given[key])):
        return run(args, kwargs)[0]
    layer.source = caller()
    layer.passed = {id(observed): observed.passed_now() for observed in observing}
    if not function_transforms_active():
        given[key] = gated(given[key], layer.before)
    positional = tuple(given[index] for index in range(len(args)))
    layer.result, layer.asked = run(positional, {name: given[name] for name in kwargs})
    result: Tensor = layer.result
    if not function_transforms_active():
        result = gated(result, layer.behind)
    _layers[result] = layer
    layer.version = version(result)
    return result


def run_norm(
    observing: list[EagerSites],
    spelling: Spelling,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    run: Run,
) -> Any:
    """Run a batch norm; as one site with the layer before it, if a block gives that site a rule.

    Args:
        observing: The blocks in force.
        spelling: How the call calls its op.
        function: The function.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        run: Runs the call, with the rules of the batch norm itself.
    """
    given = _by_place(args, kwargs)
    source = given[spelling.key]
    layer = _layers[source] if isinstance(source, Tensor) and source in _layers else None
    if layer is None or version(source) != layer.version or not rules_act():
        return run(args, kwargs)[0]
    op = OPS[MERGED[layer.spelling.op.name]]
    pair = Spelling(op, layer.spelling.key, False, False, (Operand("x", layer.spelling.key),))
    asking = [observed for observed in observing if op.name in observed.on_demand]
    asked = [
        observed.operation(
            pair, layer.function, layer.args, layer.kwargs, passed=layer.passed.get(id(observed))
        )
        for observed in asking
    ]
    decisions = to_rewrite(asked)
    if not decisions:
        return run(args, kwargs)[0]
    if function_transforms_active() or set(decisions) - {REPLACE, OUTPUT}:
        name = next(iter(decisions.values())).site.name
        raise RuleError(
            f"a block cannot put a rule at {name!r} in a transform of torch.func, or at its operand x. Transform the "
            f"model: transform(model, rules)."
        )
    if layer.before.closed:  # another batch norm has read the result
        raise RuleError(layer.behind.problem)
    if gradient_is_read(source):
        name = next(iter(decisions.values())).site.name
        raise RuleError(
            f"the gradient of the result of the layer at {layer.source} is read, by a hook or retain_grad(); but the "
            f"layer and the batch norm behind it are the site {name!r}, in which it does not exist. Give the site "
            f"None; or remove the hook."
        )
    given[spelling.key] = layer.result
    positional = tuple(given[index] for index in range(len(args)))
    y, _ = run(positional, {name: given[name] for name in kwargs})
    replaces, output = decisions.get(REPLACE), decisions.get(OUTPUT)
    if replaces is not None and replaces.rules:
        y = _with_rule(y, layer, replaces, function, args, kwargs)
        layer.close(replaces.site.name)
        for observed in asking:
            for found in filter(None, layer.asked):
                observed.note_parts(found, replaces.site.name)
    if output is not None and output.rules:
        y = decoupled_by(output.rules, y.detach(), y, output.site.name)
    reads = any(d.reads("y") or d.site.at == OUTPUT for d in decisions.values())
    return y.clone() if reads else y  # the model can write into it


def _with_rule(
    y: Tensor,
    layer: _Layer,
    decision: Decision,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    spelling, given, site = layer.spelling, layer.given, decision.site.name
    x: Tensor = given[spelling.key]
    constants = constants_of(
        spelling.op, spelling.operands, layer.function, layer.args, layer.kwargs
    )
    if constants is None:
        raise RuleError(
            f"the layer at site {site!r} cannot be computed again at other operands. Give the site None."
        )
    own: dict[str, Tensor | None] = {"weight": None, "bias": None}
    for operand in spelling.operands[1:]:
        value = given[operand.key]
        own[operand.name] = value.transpose(-2, -1) if operand.transposed else value
    weight = own["weight"]
    assert weight is not None
    named = {**dict(zip(argument_names(function), args, strict=False)), **kwargs}
    statistics = (named.get(name) for name in ("running_mean", "running_var", "weight", "bias"))
    weight, bias = merged_parameters(
        x, weight, own["bias"], *statistics, eps=named.get("eps", 1e-5), site=site,
        training=named.get("training", False), groups=constants.get("groups", 1),
        transposed="transpose" in constants.get("kind", ""),
    )  # fmt: skip
    operands = {"weight": weight, "bias": bias, **constants}
    operation = MERGED[spelling.op.name]
    return decoupled_by(decision.rules, y, x, site, operation, operands)
