"""The product's side of the fuzzer: tables written as the product's, and the ways in.

`open_door` gives a model that can be called, or raises what the product raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import freegrad_fx as fg
from fuzz_tables import Bound, Entry, Table

NAMES_A_DOOR = ("example_inputs", "fg.compile", "freegrad_fx.compile", "fg.backend", "transform(", "leaf_modules",
                "submodule", "symbolic tracing", "concrete_args", "Select the ops")  # fmt: skip


def register_own() -> None:
    """Register the rules of the tables that are not built in."""

    @fg.register("fuzz_x", overwrite=True)
    def fuzz_x(grad: Tensor, x: Tensor, *, k: float = 1.0) -> Tensor:
        """grad·(k·x² + 1)"""
        return grad * (x.square() * k + 1)

    @fg.register("fuzz_xy", overwrite=True)
    def fuzz_xy(grad: Tensor, x: Tensor, y: Tensor, *, k: float = 1.0) -> Tensor:
        """grad·(k·x + y)"""
        return grad * (k * x + y)


def as_rule(rules: Sequence[Bound], save: str | None = None) -> Any:
    options = {} if save is None else {"save": save}
    bound = [fg.get(name)(**dict(parameters), **options) for name, parameters in rules]
    return bound[0] if len(bound) == 1 else fg.compose(*bound)


def as_table(table: Table, classes: Mapping[str, type]) -> Any:
    def entry(e: Entry) -> Any:
        kind: Any = None
        if e.type is not None:
            kind = f"torch.{e.type}" if e.type.startswith("nn.") else classes[e.type]
        call = slice(*e.call) if isinstance(e.call, tuple) else e.call
        fields = {
            "module": e.module,
            "type": kind,
            "parameter": e.parameter,
            "call": call,
            "forward": e.forward,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        on = fg.on(*([list(e.op)] if e.op else []), **given)
        return on.backward(None if e.rules is None else as_rule(e.rules, e.save))

    return fg.RuleTable([entry(e) for e in table.entries])


@contextlib.contextmanager
def block(
    table: Table, door: str, model: nn.Module, classes: Mapping[str, type]
) -> Iterator[fg.use | None]:
    """The blocks around each call; gives the one with the table of a plain model."""
    with contextlib.ExitStack() as stack:
        if table.block is not None:
            rules, scope = table.block
            options = {"model": model} if door == "use" else {}
            stack.enter_context(fg.use(as_rule(rules), scope=scope, **options))
        used = fg.use(as_table(table, classes), model=model) if door == "use" else None
        yield None if used is None else stack.enter_context(used)


def open_door(
    door: str,
    model: nn.Module,
    table: Table,
    classes: Mapping[str, type],
    args: Sequence[Tensor],
    kwargs: Mapping[str, Tensor],
) -> Any:
    """The model under a table, by one way in."""
    rules: Any = as_table(table, classes)
    if door == "use":
        return model
    if door in ("compile", "backend"):
        if door == "compile":
            return fg.compile(model, rules, backend="eager")
        return torch.compile(model, backend=fg.backend(rules, inner="eager"))
    options: dict[str, Any] = {}
    if table.block is not None:
        if table.entries:
            options["ambient"] = True
        else:
            rules = None
    if door == "export":
        given = tuple(t.detach() for t in args)
        names = dict(zip(("x", "z"), given, strict=False))
        options["example_inputs"] = (
            {**names, **{k: v.detach() for k, v in kwargs.items()}} if kwargs else given
        )
    return fg.transform(model, rules, **options)


def kept_whole(result: Any, door: str) -> list[str]:
    """The paths of the modules that the product says it has kept whole."""
    if door in ("compile", "backend", "use"):
        return []
    found = [o for o in fg.report(result).opaque if o.what.endswith("kept as one opaque call")]
    return [o.path for o in found if not o.what.startswith("function ")]


def lost(result: Any, door: str) -> list[str]:
    """What the product says it has not carried over."""
    return (
        []
        if door in ("compile", "backend", "use")
        else [str(item) for item in fg.report(result).lost]
    )


def skipped(result: Any, door: str) -> dict[str, str]:
    """The sites that the product says it has not given their rule, with the reason."""
    if door in ("compile", "backend", "use"):
        return {}
    return {d.site.name: str(d.reason) for d in fg.report(result).with_action("skip")}


REFUSALS = (fg.CaptureError, fg.PlanError)
WARNING = fg.FreegradWarning
