"""Rules in Lightning: they act, and a checkpoint keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import freegrad_fx as fg
from rules_in_training import SCHEDULES, Network, equal, network, rows, rules, weights

lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Module(lightning.LightningModule):
    def __init__(self, net: Network, part: bool = False) -> None:
        super().__init__()
        self.net, self.part = net, part

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.net(**batch)["loss"]

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        self.outputs = self.net(**batch)["logits"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        of = self.net if self.part else self
        return torch.optim.AdamW(of.parameters(), lr=0.05)


def fit(model: Module, callbacks: list[Any], epochs: int, folder: Path, **options: Any) -> Any:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(model, torch.utils.data.DataLoader(rows(), batch_size=4), **options)
    return trainer


def callback(table: Any = None) -> Any:
    return fg.integrations.lightning.RulesCallback(table or rules()[0], SCHEDULES)


def test_the_rules_act_on_each_step_and_on_nothing_else(tmp_path: Path) -> None:
    by_hand, ruled = Module(network(0.5)), Module(network())
    rule = {"relu": fg.rules.scale(s=0.5)}
    fit(by_hand, [], 2, tmp_path)
    fit(ruled, [fg.integrations.lightning.RulesCallback(rule)], 2, tmp_path)
    torch.testing.assert_close(weights(ruled), weights(by_hand))
    x = torch.tensor([-1.0], requires_grad=True)
    torch.relu(x).backward()
    assert x.grad == 0


def test_resumed_training_is_that_which_was_not_interrupted(tmp_path: Path) -> None:
    (table, learnt), model = rules(), Module(network())
    whole = callback(table)
    fit(model, [whole], 4, tmp_path)
    assert whole.scheduler.last_epoch == 8
    assert learnt["slope"] != 2.0

    path = tmp_path / "half.ckpt"
    fit(Module(network()), [callback()], 2, tmp_path).save_checkpoint(path)
    saved = torch.load(path, weights_only=True)["callbacks"]["freegrad_fx.RulesCallback"]
    assert "slope" not in "".join(torch.load(path, weights_only=True)["state_dict"])
    assert fg.RuleTable.from_toml(saved["rules.toml"])[0].rules == (fg.rules.scale(s=3.0),)

    (table, again), resumed = rules(), Module(network())
    fit(resumed, [callback(table)], 4, tmp_path, ckpt_path=path)
    assert equal(weights(resumed), weights(model))
    assert torch.equal(again["slope"], learnt["slope"])

    with pytest.raises(fg.RuleError, match=r"saved with other rules: relu: scale.*rules\.toml"):
        fit(
            Module(network()),
            [fg.integrations.lightning.RulesCallback({"relu": "reverse"})],
            4,
            tmp_path,
            ckpt_path=path,
        )
    # PyTorch's optimizer refuses what an unruled model lacks
    missing = pytest.warns(UserWarning, match=r"following callbacks: \['freegrad_fx.RulesCallback")
    with missing, pytest.raises(ValueError, match="parameter group"):
        fit(Module(network()), [], 4, tmp_path, ckpt_path=path)


def test_a_checkpoint_without_rules_is_not_resumed_with_rules(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    fit(Module(network()), [], 1, tmp_path).save_checkpoint(path)
    with pytest.raises(fg.RuleError, match="saved without rules"):
        fit(Module(network()), [callback()], 2, tmp_path, ckpt_path=path)


def test_what_no_optimizer_has_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(fg.RuleError, match=r"no optimizer.*model\.parameters\(\)"):
        fit(Module(network(), part=True), [callback()], 1, tmp_path)


def test_an_error_in_a_step_leaves_no_block(tmp_path: Path) -> None:
    class Fails(Module):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            raise OverflowError

    with pytest.raises(OverflowError):
        fit(Fails(network()), [callback()], 1, tmp_path)
    x = torch.tensor([-1.0], requires_grad=True)
    torch.relu(x).backward()
    assert x.grad == 0


def test_an_epoch_that_the_module_ends_early_leaves_no_block(tmp_path: Path) -> None:
    class Early(Module):
        def on_train_batch_start(self, batch: Any, index: int) -> int | None:
            return -1 if index == 2 else None

    fit(Early(network()), [callback()], 1, tmp_path)
    x = torch.tensor([-1.0, 1.0], requires_grad=True)
    (grad,) = torch.autograd.grad(torch.relu(x).sum(), x)
    assert grad.tolist() == [0.0, 1.0]


def test_replaced_forwards_act_in_validation(tmp_path: Path) -> None:
    table = fg.RuleTable([fg.on("relu").backward("straight_through", forward="heaviside")])
    model, loader = Module(network()), torch.utils.data.DataLoader(rows(), batch_size=16)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[fg.integrations.lightning.RulesCallback(table)],
        default_root_dir=tmp_path,
    )
    trainer.validate(model, loader, verbose=False)
    with fg.use(table, model=model):
        assert torch.equal(model.outputs, model.net(**next(iter(loader)))["logits"])
    assert not torch.equal(model.outputs, model.net(**next(iter(loader)))["logits"])
