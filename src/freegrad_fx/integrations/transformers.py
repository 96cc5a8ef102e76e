"""A callback for the Trainer of Hugging Face: rules in training, evaluation and checkpoints."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import RuleError
from ..schedules import Schedule
from ..table import RulesLike, RuleTable
from .training import RULES_FILE, TrainingRules

__all__ = ["RulesCallback"]


class RulesCallback(TrainerCallback, ExportableState):
    """Trains the model of a `transformers.Trainer` with rules, and keeps the rules in its checkpoints.

    Every call of the model runs in a block of `use`, in training and in evaluation, until `remove` is called. What the
    rules learn is among the model's `parameters()`. A checkpoint holds the file ``rules.toml``, with the values of the
    parameters, and a training that is resumed from it goes on as if it had not been interrupted.

    Give the callback to the constructor, ``Trainer(model, callbacks=[callback])``.

    Args:
        rules: As for `use`.
        schedules: Schedules for parameters of the rules, as for `RuleScheduler`.
        entries: The entries that follow the schedules, as for `RuleScheduler`.
        every: When the schedules make a step: ``"step"``, after each step of the optimizer, or ``"epoch"``.

    Attributes:
        table (RuleTable): The table in force.
        scheduler (RuleScheduler | None): The scheduler; None without schedules.

    Raises:
        RuleError: As for `use` and `RuleScheduler`; when a checkpoint is resumed that was saved without rules or with
            others; when training starts and the optimizer lacks what the rules learn; and under `DataParallel`.
        TableError: As for `use`.
        ValueError: `every` is none of its values.
    """

    def __init__(
        self,
        rules: RulesLike,
        schedules: Mapping[str, Schedule] | None = None,
        *,
        entries: str = "*",
        every: str = "step",
    ) -> None:
        self._rules = TrainingRules(rules, schedules, entries, every)
        self._hooks: list[Any] = []

    @property
    def table(self) -> RuleTable:
        """The table in force, whose parameters follow the schedules."""
        return self._rules.table

    @property
    def scheduler(self) -> Any:
        """The `RuleScheduler`; None without schedules."""
        return self._rules.scheduler

    def remove(self) -> None:
        """Let the model run without the rules again."""
        while self._hooks:
            self._hooks.pop().remove()

    def _attach(self, model: Any) -> None:
        self._rules.attach(model)
        if not self._hooks:
            # Of the hooks of the model, this one begins first and ends last
            self._hooks = [
                model.register_forward_pre_hook(self._enter, prepend=True),
                model.register_forward_hook(self._leave, always_call=True),
            ]

    def _enter(self, *_: Any) -> None:
        self._rules.enter()

    def _leave(self, *_: Any) -> None:
        self._rules.leave()

    # --- called by the Trainer ---

    def on_init_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Attach the rules to the model, before the optimizer is made."""
        if args.restore_callback_states_from_checkpoint:
            raise RuleError(
                "restore_callback_states_from_checkpoint makes each callback again, and a RulesCallback would lose its "
                "rules. Leave it False: a RulesCallback restores itself."
            )
        self._attach(others["model"])

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Require that the rules act and are trained; continue with those of a checkpoint if one is resumed."""
        if args.n_gpu > 1:
            raise RuleError(
                "a RulesCallback does not act in the replicas of DataParallel, with which the Trainer uses several "
                "GPUs in one process. Start one process for each GPU, with torchrun."
            )
        self._attach(others["model"])
        self._rules.require_trained([others["optimizer"]])
        if state.global_step:
            saved = (state.stateful_callbacks or {}).get(type(self).__name__)
            where = f"the checkpoint of step {state.global_step}"
            self._rules.load(None if saved is None else _from_text(saved["rules"]), where)

    def on_step_end(self, *args: Any, **others: Any) -> None:
        """Make a step of the schedules."""
        self._rules.step("step")

    def on_epoch_end(self, *args: Any, **others: Any) -> None:
        """Make a step of the schedules."""
        self._rules.step("epoch")

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Write the rules into the folder of the checkpoint."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir() and (text := self._rules.toml()):
            (folder / RULES_FILE).write_text(text, "utf-8")

    def state(self) -> dict[str, Any]:
        """The rules and the values of their parameters, for ``trainer_state.json``."""
        return {"args": {}, "attributes": {}, "rules": _as_text(self._rules.state())}


def _as_text(state: Any) -> str:
    file = io.BytesIO()
    torch.save(state, file)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _from_text(text: str) -> Any:
    return torch.load(io.BytesIO(base64.b64decode(text)), weights_only=True)
