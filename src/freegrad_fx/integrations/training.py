"""What the callbacks of trainers have in common: the rules of a training, and their state in a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.beside import hold_beside
from ..core.copies import forget
from ..core.rule import Rule, learnt_by
from ..eager import use
from ..eager.decided import decided_parameters
from ..errors import FreegradWarning, RuleError, TableError
from ..scaling import rule_without_scaler
from ..schedules import RuleScheduler, Schedule
from ..table import RulesLike, RuleTable
from ..table.entry import Entry
from ..vocabulary.forwards import BoundForward

__all__ = ["EVERY", "RULES_FILE", "TrainingRules"]

RULES_FILE = "rules.toml"
"""The name of the rules in a checkpoint."""

EVERY = ("step", "epoch")


class TrainingRules:
    """The rules of one training: a table, its schedules, and the block that is in force around the model.

    Args:
        rules: As for `use`.
        schedules: As for `RuleScheduler`; None for no schedules.
        entries: As for `RuleScheduler`.
        every: When the schedules make a step: ``"step"``, after each step of the optimizer, or ``"epoch"``.

    Attributes:
        table: The table in force, whose parameters follow the schedules.
        scheduler: The scheduler; None if there are no schedules.
        every: As given.
    """

    def __init__(
        self,
        rules: RulesLike,
        schedules: Mapping[str, Schedule] | None,
        entries: str,
        every: str,
    ) -> None:
        if every not in EVERY:
            raise ValueError(f"every has to be {' or '.join(map(repr, EVERY))}, got {every!r}")
        self.table, self.every = RuleTable.of(rules), every
        self.scheduler: RuleScheduler | None = None
        if schedules is not None:
            self.scheduler = RuleScheduler(self.table, schedules, entries=entries)
            self.table = self.scheduler.target
        self._block: use | None = None
        self._model: nn.Module | None = None
        self._inside = 0
        self._made: tuple[Tensor, ...] = ()

    def attach(self, model: nn.Module) -> None:
        """Give a model the rules in the blocks that follow. What the rules learn becomes parameters of the model."""
        if self._model is model:
            return
        if self._model is not None:
            raise RuleError(
                f"this RulesCallback belongs to another model, a {type(self._model).__name__}. Make a callback for "
                f"each model."
            )
        self._block = use(self.table, model=model)  # before the model has parameters of rules
        self._made = _made_for(model, self.table)
        hold_beside(model, self.learnt)
        self._model = model

    def enter(self) -> None:
        """Enter the block."""
        if self._block is not None:
            self._block.__enter__()
            self._inside += 1

    def leave(self, *error: object) -> None:
        """Leave the block, if it was entered."""
        if self._block is not None and self._inside:
            self._inside -= 1
            self._block.__exit__(*(error or (None, None, None)))

    def leave_all(self, error: BaseException | None = None) -> None:
        """Leave the block as often as it was entered.

        Args:
            error: The error because of which it is left, if there is one.
        """
        while self._inside:
            self.leave(*(() if error is None else (type(error), error, error.__traceback__)))

    def step(self, every: str) -> None:
        """Set the scheduled values of the next step, if the schedules follow these steps."""
        if self.scheduler is not None and every == self.every:
            self.scheduler.step()

    @property
    def learnt(self) -> tuple[Tensor, ...]:
        """The tensors that the rules learn: those in the table, and those that are made for each parameter."""
        of_table = learnt_by(_rules_of(self.table))
        return tuple({id(tensor): tensor for tensor in (*of_table, *self._made)}.values())

    @property
    def _tensors(self) -> list[Tensor]:
        """The tensors that change in training, in a fixed order."""
        held = [v for v in _held(self.table) if isinstance(v, Tensor)]
        known = {id(tensor) for tensor in held}
        return [*held, *(tensor for tensor in self._made if id(tensor) not in known)]

    @property
    def _generators(self) -> list[torch.Generator]:
        """The generators of random rules, in a fixed order."""
        return [v for v in _held(self.table) if isinstance(v, torch.Generator)]

    def require_trained(self, optimizers: Iterable[Any]) -> None:
        """Raise `RuleError` unless optimizers have all that the rules learn.

        Args:
            optimizers: The optimizers of the training.
        """
        trained = {
            id(tensor)
            for optimizer in optimizers
            for group in optimizer.param_groups
            for tensor in group["params"]
        }
        learnt, model = self.learnt, self._model
        known = {id(tensor) for tensor in learnt}
        for tensor in () if model is None else _made_for(model, self.table, learnt):
            if id(tensor) not in known:
                raise RuleError(
                    "a parameter of the model was made or replaced after the callback was given the model, so that no "
                    "optimizer has what its rule learns. Make the layers in __init__, not in configure_model; and "
                    "replace parameters before you make the trainer, as with load_state_dict(assign=True)."
                )
        if not known <= trained:
            raise RuleError(
                "the rules learn parameters that no optimizer of this training has. Give the callback to the trainer "
                "when you make it, and make the optimizer from the parameters of the whole model, "
                "model.parameters(), which include those of the rules."
            )

    # --- the state in a checkpoint ---

    def state(self) -> dict[str, Any]:
        """The rules and all that changes in them during training, in types that ``weights_only=True`` loads."""
        return {
            RULES_FILE: self.toml(),
            "entries": _described(self.table),
            "schedule": None if self.scheduler is None else self.scheduler.state_dict(),
            "tensors": [tensor.detach().clone() for tensor in self._tensors],
            "generators": [generator.get_state() for generator in self._generators],
        }

    def load(self, state: Mapping[str, Any] | None, where: str) -> None:
        """Continue with the state of a checkpoint.

        Args:
            state: What `state` returned when the checkpoint was saved; None if it holds no rules.
            where: The checkpoint, for errors.

        Raises:
            RuleError: The checkpoint was saved without rules, with other rules, or with other schedules.
        """
        if state is None:
            raise RuleError(
                f"{where} was saved without rules, so that it cannot be resumed with a RulesCallback. Leave the "
                f"callback out; or load the weights alone, and begin a new training."
            )
        own = _described(self.table)
        if own != state["entries"]:
            raise RuleError(
                f"{where} was saved with other rules: {'; '.join(state['entries'])}. The rules of this RulesCallback "
                f"are: {'; '.join(own)}. Give it the rules of the checkpoint, which are in its {RULES_FILE}; or load "
                f"the weights alone, and begin a new training."
            )
        if (self.scheduler is None) is not (state["schedule"] is None):
            had, has = ("no schedules", "schedules")[:: 1 if self.scheduler is not None else -1]
            raise RuleError(
                f"{where} was saved with {had}, and this RulesCallback has {has}. Give it those of the checkpoint."
            )
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["schedule"])
        with torch.no_grad():
            for own_tensor, saved in zip(self._tensors, state["tensors"], strict=True):
                own_tensor.copy_(saved)
                forget(own_tensor)
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.set_state(saved)

    def toml(self) -> str:
        """The table as the text of a TOML file, with the values of now; ``""`` if it cannot be written as one."""
        try:
            return RuleTable(map(_plain, self.table.entries), self.table.reaches).to_toml()
        except TableError as error:
            warnings.warn(
                f"the checkpoint has no {RULES_FILE}: {error}. It can be resumed all the same.",
                FreegradWarning,
                stacklevel=2,
            )
            return ""


def _made_for(
    model: nn.Module, table: RuleTable, held: Iterable[Tensor] = ()
) -> tuple[Tensor, ...]:
    """What the rules of the parameters of a model learn, without those of tensors that rules learn themselves."""
    decided = decided_parameters(model, table)
    own = {id(tensor) for tensor in held}
    return learnt_by(r for tensor, d in decided if id(tensor) not in own for r in d.rules)


def _rules_of(table: RuleTable) -> Iterator[Rule]:
    for entry in table.entries:
        yield from entry.rules or ()


def _held(table: RuleTable) -> Iterator[Any]:
    """The values of all parameters of rules and of replaced forwards, in a fixed order, without those of scalers."""
    for entry in table.entries:
        for rule in entry.rules or ():
            yield from rule_without_scaler(rule).bound.values()
        if isinstance(entry.forward, BoundForward):
            yield from entry.forward.keywords.values()


def _described(table: RuleTable) -> list[str]:
    """The entries as text, in which a tensor is its shape: its values may change."""
    return [
        f"{entry.selector}: {_text(entry.forward)}{', '.join(map(_text, entry.rules or ())) or 'native'}"
        for entry in table.entries
    ]


def _text(part: Any) -> str:
    if isinstance(part, Rule):
        part = rule_without_scaler(part)
        values = ", ".join(f"{name}={_text(value)}" for name, value in part.bound.items())
        return f"{part.name}({values})"
    if isinstance(part, BoundForward):
        values = ", ".join(f"{name}={_text(value)}" for name, value in part.keywords.items())
        return f"forward {part.op}({values}), "
    if isinstance(part, Tensor):
        return f"tensor{[*part.shape]}"
    if isinstance(part, torch.Generator):
        return "generator"
    if callable(part):
        return f"forward {getattr(part, '__qualname__', type(part).__name__)}, "
    return "" if part is None else f"{part!r}"


def _plain(entry: Entry) -> Entry:
    """An entry with numbers in place of tensors of one element, and without generators and scalers."""
    own = entry.rules and tuple(map(rule_without_scaler, entry.rules))
    rules = own and tuple(rule(**_plain_values(rule.given)) for rule in own)
    forward = entry.forward
    if isinstance(forward, BoundForward):
        plain = _plain_values(forward.keywords)
        forward = BoundForward(forward.func, **{**forward.keywords, **plain})
        forward.op = entry.forward.op  # type: ignore[union-attr]
    return replace(entry, rules=rules, forward=forward)


def _plain_values(values: Mapping[str, Any]) -> dict[str, Any]:
    new: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            new[name] = value.item()
        elif isinstance(value, torch.Generator):
            new[name] = None
    return new
