"""`use`: rules for whatever runs in a block, without a transform."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Self

from torch import Tensor, nn
from torch.amp import GradScaler

from .._torch.dynamo import leave_to_python
from ..blocks import use as ambient_use
from ..capture.captured import CapturedModule
from ..context import Block
from ..core.rule import Composition, Rule, RuleLike
from ..errors import FreegradWarning, TableError
from ..modules import Activation
from ..plan import PLAN
from ..scaling import unscaled
from ..table import RulesLike, RuleTable
from ..table.table import is_path
from .interception import enter, leave, resuming
from .observed import Observed
from .threads import watch_threads

__all__ = ["use"]


class use(ambient_use):
    """Context manager that gives what runs in the block a decoupled backward: a model, a function, a training step.

    Formula: at every site y = f(x) whose forward runs in the block, ∂x = rule(∂y, x, y) instead of f'(x)·∂y.

    Nothing is captured and no model is changed: the calls of PyTorch's functions are intercepted, so that any Python
    code can run in the block. In a transformed or compiled model its own table decides; its ambient sites follow the
    block.

    The rule is bound when the forward runs, so the backward can run after the block or in another thread. Blocks can
    be nested: the innermost block that decides a site takes precedence, and `native` disables all blocks around it.
    Recomputation by `torch.utils.checkpoint` runs in the blocks of the original forward. A block applies only to the
    thread that entered it. A thread that was started inside of it has no rules, and warns once where the block would
    give some. A block can be entered repeatedly, and used as a decorator.

    Args:
        rules: A rule name, a `Rule` or a composition, for the sites in `scope`; or a dict, a `RuleTable` or the path of
            a TOML file, as for `transform`.
        params: Values for the parameters of a rule.
        scope: For a rule: ``"activations"``, ``"params"``, ``"all"``, or a tuple of these.
        model: The model to whose modules the paths, owners' classes, call indices and parameters of a table refer. With
            a model, only calls that run inside of it are sites.
        rule: FreeGrad's name for `rules`.
        scaler: The `torch.amp.GradScaler` that scales the loss, so that the rules act on gradients that are not scaled;
            see `unscaled`.

    Raises:
        RuleError: A rule is unknown, lacks a parameter value, or cannot be used in a scope; or a scope is unknown.
        TableError: A key is not an op, a group or a class; or an entry needs `model`.
        TypeError: Both `rules` and `rule` are given, or neither; `model` is not a module; `scaler` is no scaler; or
            `params` or `scope` is given with a table.

    Source: FreeGrad, ``freegrad.use``, which acts on wrapped models only.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> model = torch.nn.Sequential(torch.nn.ReLU())
        >>> x = torch.tensor([-1.0, 2.0], requires_grad=True)
        >>> with fg.use("straight_through") as block:
        ...     y = model(x)
        >>> torch.autograd.grad(y.sum(), x)
        (tensor([1., 1.]),)
    """

    intercepts = True

    @leave_to_python
    def __init__(
        self,
        rules: RulesLike | None = None,
        params: Mapping[str, Any] | None = None,
        scope: str | tuple[str, ...] = "activations",
        *,
        model: nn.Module | None = None,
        rule: RuleLike | None = None,
        scaler: GradScaler | Tensor | None = None,
    ) -> None:
        given = _one_of(rules, rule)
        if scaler is not None:
            given = unscaled(given, scaler)
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model has to be an nn.Module, got {type(model).__name__}")
        if isinstance(given, Rule | Composition) or (isinstance(given, str) and not is_path(given)):
            super().__init__(given, params, scope)
            del self.changes["table"]  # that of a block around it decides where this rule does not
            table = RuleTable.of({name: _bound(self, name) for name in self.changes})
        else:
            if params is not None or scope != "activations":
                raise TypeError(
                    "params and scope belong to a single rule; in a table, each entry has its parameters and its sites"
                )
            Block.__init__(self, table=True)
            table = RuleTable.of(given)
            _require_model(table, model)
        self._tells = True  # the first time tells
        self._table_given = "table" in self.changes
        if model is not None and not _has_ambient_sites(model):
            self.changes = {}  # the ambient sites of other models are not those of this one
        self.observed = Observed(table, model)
        self.warned = False
        self._inside = 0
        self.__dict__[PLAN] = self.observed.plan

    @leave_to_python
    def __enter__(self) -> Self:
        watch_threads()
        super().__enter__()
        try:
            enter(self)
        except (
            BaseException
        ):  # Python does not leave a block that was not entered; also KeyboardInterrupt
            super().__exit__()
            raise
        self._inside += 1
        return self

    @leave_to_python
    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # refuses a thread that has not entered it
        leave(self)
        self._inside -= 1
        self.observed.end_call()
        if self._tells and self.observed.ran and error[:1] in ((), (None,)):
            self._tells = False
            observed = self.observed
            problems = observed.unmatched() if self._table_given else observed.without_a_site()
            for problem in problems:
                warnings.warn(problem, FreegradWarning, stacklevel=2)
            self.observed.require_reached()

    @property
    def watched(self) -> bool:
        """Whether other threads are watched: the block is entered, and has not warned of one yet."""
        return self._inside > 0 and not self.warned

    def resume(self) -> Callable[[], AbstractContextManager[Any]]:
        """A function that returns a context in which code runs again as it runs now."""
        return resuming(self)

    def leaves_alone(self, model: nn.Module) -> None:
        """Note that a model runs in the block whose own table decides its sites."""
        self.observed.transformed(model)

    def at_ambient_sites(self, model: CapturedModule) -> Mapping[str, tuple[Rule, ...] | None]:
        """The rules that the block gives to the ambient sites of a model, by their names; None where it gives none."""
        return self.observed.at_ambient_sites(model)


def _has_ambient_sites(model: nn.Module) -> bool:
    return any(isinstance(module, CapturedModule | Activation) for module in model.modules())


def _bound(block: use, scope: str) -> Any:
    rules = block.changes[scope]
    return rules[0] if len(rules) == 1 else Composition(rules)


def _one_of(rules: RulesLike | None, rule: RuleLike | None) -> RulesLike:
    if (rules is None) == (rule is None):
        raise TypeError(
            "use() takes the rules once: use('straight_through'), use({'relu': 'rectangular'}), use(table), "
            "or FreeGrad's use(rule='straight_through')"
        )
    return rules if rules is not None else rule  # type: ignore[return-value]


def _require_model(table: RuleTable, model: nn.Module | None) -> None:
    """Raise `TableError` if an entry refers to the places of a model, and there is none, or to the end of a call."""
    for entry in table.entries:
        if entry.sites.order == "last":
            raise TableError(
                f"entry {entry.selector!r} selects the last operation, which a block cannot know before the call ends. "
                f"Select it by its place, module= and call=, or transform the model: transform(model, rules)."
            )
    if model is not None:
        return
    for entry in table.entries:
        sites = entry.sites
        needs = [
            ("module=, which is a path in a model", sites.module),
            ("parameter=, which is a name in a model", sites.parameter),
            ("call=, which counts the calls of a model", sites.call),
            ("first, which is the first in a call of a model", sites.order == "first"),
            (
                "type= with an op, which is the class of an owner in a model",
                sites.type and sites.op,
            ),
            ("parameters, which belong to a model", sites.wants_parameters),
        ]
        for what, there in needs:
            if there:
                raise TableError(
                    f"entry {entry.selector!r} selects by {what}; give the model: use(rules, model=model)"
                )
