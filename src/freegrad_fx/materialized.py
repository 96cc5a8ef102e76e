"""`materialize`: the plain model whose weights are what the forwards of a table made of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._torch.modules import compiled_model
from .batches import called, restored
from .blocks import native
from .capture.beside import release
from .capture.captured import CapturedModule
from .capture.plain import plain_model
from .eager import use
from .eager.decided import decided_parameters
from .eager.rules import replaced_forward
from .errors import PlanError, VerificationError
from .plan import PLAN, Decision, Plan, report
from .sites.parameters import named_parameters
from .table import RulesLike, RuleTable
from .verification.values import same_bits, take_apart

__all__ = ["materialize"]


def materialize(
    model: nn.Module, rules: RulesLike | None = None, *, example_inputs: Any = None
) -> nn.Module:
    """Return the plain model whose weights are the values that the replaced forwards read, for deployment.

    Formula: for every parameter w that an entry reads through ``forward=q``, the result has q(w) instead.

    The result is a copy: an instance of the model's own class, in the same mode, with the same keys of the state_dict,
    buffers, hooks, and tied weights. It has no rules, and no other forward is replaced; all exporters take it. The
    model that is given is not changed.

    Args:
        model: A transformed model, also behind `torch.compile`, or a model that contains transformed parts; or a plain
            model that was trained in blocks of `use`, or compiled with `compile`, with its `rules`.
        rules: The rules of a plain model, in any form that `use` takes. None for a transformed model.
        example_inputs: One batch: a tensor, a tuple of positional arguments or a dict of keyword arguments. With it,
            the outputs of the result and of the model are compared bit by bit, in the present mode, with the same
            random numbers.

    Returns:
        The plain model.

    Raises:
        PlanError: An operation has a replaced forward, which is not in the weights; the uses of a tied parameter do not
            all read it through the same forward; or a transformed model cannot be taken back to its class.
        VerificationError: The outputs for the example inputs differ.
        TypeError: `model` is no module, `rules` are given for a transformed model, or none for a plain one.
        RuleError: As for `use`.
        TableError: As for `use`.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> gm = fg.transform(torch.nn.Sequential(torch.nn.Linear(4, 3)), fg.tables.binary_weights(scale=False))
        >>> plain = fg.materialize(gm, example_inputs=torch.randn(2, 4))
        >>> type(plain), plain[0].weight.unique().tolist()
        (<class 'torch.nn.modules.container.Sequential'>, [-1.0, 1.0])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be an nn.Module, got {type(model).__name__}")
    inner = compiled_model(model)
    model = model if inner is None else inner
    # A part of a transformed model can have been transformed before: the inner parts come first
    parts = [part for part in [*model.modules()][::-1] if isinstance(part, CapturedModule)]
    if parts and rules is not None:
        raise TypeError(
            "rules are given for a model that is transformed already, and has its own. Give None, or the original "
            "model."
        )
    if not parts and rules is None:
        raise TypeError(
            f"materialize() takes a transformed model, or a plain one with its rules, got {type(model).__name__} "
            f"without rules. A model that ran in blocks of use(), or that was compiled with compile(), is a plain one: "
            f"materialize(model, rules)."
        )
    table = None if rules is None else RuleTable.of(rules)
    if table is None:
        of_parts: dict[nn.Module, list[tuple[Tensor, Decision]]]
        of_parts = {part: _read_in(part) for part in parts}
        _require_read_alike(model, of_parts)
        read = [pair for pairs in of_parts.values() for pair in pairs]
    else:
        read = _read_through(model, table)
    memo: dict[int, Any] = {}
    for part in parts:
        plain_model(part, memo)
    result: nn.Module = copy.deepcopy(model, memo)
    with torch.no_grad():
        for parameter, decision in read:
            assert decision.forward is not None
            value = replaced_forward(decision.forward, parameter.detach())
            memo[id(parameter)].copy_(value)
    release(result)
    if example_inputs is not None:
        _compare(model, table, result, example_inputs)
    return result


def _read_in(model: CapturedModule) -> list[tuple[Tensor, Decision]]:
    """The parameters of a transformed model that are read through another forward, with the decisions."""
    plan = model.__dict__.get(PLAN)
    if not isinstance(plan, Plan):
        raise PlanError(
            f"{type(model).__name__} is the result of a second trace, which does not keep what its table decided. Give "
            f"the result of transform()."
        )
    chosen = [d for d in report(model).decisions if d.action == "rewrite" and d.forward is not None]
    for decision in chosen:
        if decision.site.kind != "parameter":
            raise PlanError(_of_operation(decision.site.name))
    parameters = dict(named_parameters(model))
    return [(parameters[d.site.names[0]], d) for d in chosen]


def _require_read_alike(
    model: nn.Module, of_parts: Mapping[nn.Module, list[tuple[Tensor, Decision]]]
) -> None:
    """Raise `PlanError` if a tied parameter is read through another forward in one place, and not in another."""
    reading: dict[int, list[tuple[str, Tensor]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter, decision in of_parts.get(module, ()):
            assert decision.forward is not None
            value = replaced_forward(decision.forward, parameter.detach())
            reading.setdefault(id(parameter), []).append((f"{path}." if path else "", value))
    for name, parameter in named_parameters(model):
        places = reading.get(id(parameter))
        if places is None:
            continue
        (_, first), *others = places
        alike = all(same_bits(first, value) for _, value in others)
        if not alike or not any(name.startswith(prefix) for prefix, _ in places):
            raise PlanError(
                f"the parameter {name!r} is tied, and its uses do not all read it through the same forward, so that no "
                f"plain model has one value for it. Transform the whole model with one table, "
                f"transform(model, rules), and materialize that; or untie the parameter."
            )


def _read_through(model: nn.Module, table: RuleTable) -> list[tuple[Tensor, Decision]]:
    """The parameters of a plain model that a table reads through another forward, with the decisions."""
    for entry in table:
        if entry.forward is not None and entry.sites.selects_operations:
            raise PlanError(_of_operation(f"the entry {entry.selector!r}"))
    return [pair for pair in decided_parameters(model, table) if pair[1].forward is not None]


def _of_operation(what: str) -> str:
    return (
        f"{what} replaces the forward of an operation, which no weights can express, so that a plain model would "
        f"compute something else. Export the transformed model itself, whose graph has the replaced forward: "
        f"torch.export.export(gm.eval(), ...)."
    )


def _compare(model: nn.Module, table: RuleTable | None, result: nn.Module, batch: Any) -> None:
    """Raise `VerificationError` if the result does not compute what the model computes."""
    outputs = []
    for one, rules in ((model, table), (result, None)):
        with torch.no_grad(), restored(one, 0), native():
            if rules is None:
                outputs.append(take_apart(called(one, batch)))
            else:
                with use(rules, model=one):
                    outputs.append(take_apart(called(one, batch)))
    expected, found = outputs
    for name, tensor in expected.tensors.items():
        other = found.tensors.get(name)
        if other is None or not same_bits(tensor, other):
            raise VerificationError(
                f"the plain model of {type(model).__name__} does not compute the output{name and ' ' + repr(name)} of "
                f"the model. Either its forward depends on more than its weights and inputs, such as on values of the "
                f"table that change while it runs, or on random numbers; or it writes into a weight. Export the "
                f"transformed model itself instead."
            )
