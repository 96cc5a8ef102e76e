"""A callback for Lightning: rules in training, evaluation and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "lightning":
        raise
    from pytorch_lightning import Callback

from ..schedules import Schedule
from ..table import RulesLike, RuleTable
from .training import TrainingRules

__all__ = ["RulesCallback"]


class RulesCallback(Callback):
    """Trains a `LightningModule` with rules, and keeps the rules in its checkpoints.

    Every step of training, validation, test and prediction runs in a block of `use`, with the `LightningModule` as the
    model. What the rules learn is among its `parameters()`. A checkpoint holds the rules with the values of their
    parameters, and a training that is resumed from it goes on as if it had not been interrupted. Give random rules a
    `generator` of their own: Lightning does not save the state of PyTorch's.

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
            others; and when training starts and no optimizer has what the rules learn.
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
        super().__init__()
        self._rules = TrainingRules(rules, schedules, entries, every)
        self._steps = 0

    @property
    def table(self) -> RuleTable:
        """The table in force, whose parameters follow the schedules."""
        return self._rules.table

    @property
    def scheduler(self) -> Any:
        """The `RuleScheduler`; None without schedules."""
        return self._rules.scheduler

    @property
    def state_key(self) -> str:
        """The key of the rules among the callbacks of a checkpoint."""
        return "freegrad_fx.RulesCallback"

    # --- called by Lightning ---

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Attach the rules to the module, before it makes its optimizers."""
        self._rules.attach(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Require that an optimizer has what the rules learn."""
        self._rules.require_trained(trainer.optimizers)
        self._steps = trainer.global_step

    def on_train_batch_start(self, *args: Any) -> None:
        """Enter the block."""
        self._rules.enter()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """Leave the block, and make a step of the schedules if the optimizer has made one."""
        self._rules.leave()
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self._rules.step("step")

    def on_train_epoch_end(self, *args: Any) -> None:
        """Make a step of the schedules."""
        self._rules.leave_all()  # a batch with which the module ends the epoch early has no end
        self._rules.step("epoch")

    def on_validation_batch_start(self, *args: Any) -> None:
        """Enter the block."""
        self._rules.enter()

    def on_validation_batch_end(self, *args: Any) -> None:
        """Leave the block."""
        self._rules.leave()

    def on_test_batch_start(self, *args: Any) -> None:
        """Enter the block."""
        self._rules.enter()

    def on_test_batch_end(self, *args: Any) -> None:
        """Leave the block."""
        self._rules.leave()

    def on_predict_batch_start(self, *args: Any) -> None:
        """Enter the block."""
        self._rules.enter()

    def on_predict_batch_end(self, *args: Any) -> None:
        """Leave the block."""
        self._rules.leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the block that was in force."""
        self._rules.leave_all(exception)

    def state_dict(self) -> dict[str, Any]:
        """The rules and the values of their parameters, for a checkpoint."""
        return self._rules.state()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Continue with the rules of a checkpoint."""
        self._rules.load(checkpoint.get("callbacks", {}).get(self.state_key), "the checkpoint")
