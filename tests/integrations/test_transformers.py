"""Rules in the Trainer of Hugging Face: they act, and a checkpoint keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import freegrad_fx as fg
from rules_in_training import SCHEDULES, equal, network, rows, rules, weights

pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
transformers = pytest.importorskip("transformers", exc_type=ImportError)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def trainer(model: nn.Module, callbacks: list[Any], folder: Path, steps: int, **more: Any) -> Any:
    options = {"save_strategy": "steps", "save_steps": 4, **more}
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **options,
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=rows(), callbacks=callbacks
    )


def callback(table: Any = None) -> Any:
    return fg.integrations.transformers.RulesCallback(table or rules()[0], SCHEDULES)


def test_the_rules_act_in_the_model_until_they_are_removed(tmp_path: Path) -> None:
    by_hand, ruled = network(0.5), network()
    rule = fg.integrations.transformers.RulesCallback({"relu": fg.rules.scale(s=0.5)})
    trainer(by_hand, [], tmp_path, 4, save_strategy="no").train()
    trainer(ruled, [rule], tmp_path, 4, save_strategy="no").train()
    torch.testing.assert_close(weights(ruled), weights(by_hand))

    def gradient() -> torch.Tensor | None:
        ruled.zero_grad()
        ruled(torch.ones(2, 4))["logits"].sum().backward()
        assert ruled.first.weight.grad is not None
        return ruled.first.weight.grad.clone()

    within = gradient()
    rule.remove()
    assert not torch.equal(within, gradient())
    with fg.use({"relu": fg.rules.scale(s=0.5)}, model=ruled):
        assert torch.equal(within, gradient())


def test_resumed_training_is_that_which_was_not_interrupted(tmp_path: Path) -> None:
    (table, learnt), model = rules(), network()
    whole = callback(table)
    trainer(model, [whole], tmp_path / "whole", 8).train()
    assert whole.scheduler.last_epoch == 8
    assert learnt["slope"] != 2.0

    trainer(network(), [callback()], tmp_path / "half", 8).train()
    checkpoint = (tmp_path / "half" / "checkpoint-4").rename(tmp_path / "elsewhere")
    assert fg.RuleTable.from_toml(checkpoint / "rules.toml")[0].rules == (fg.rules.scale(s=3.0),)
    (table, again), resumed = rules(), network()
    trainer(resumed, [callback(table)], tmp_path / "on", 8).train(
        resume_from_checkpoint=str(checkpoint)
    )
    assert equal(weights(resumed), weights(model))
    assert torch.equal(again["slope"], learnt["slope"])

    other = fg.integrations.transformers.RulesCallback({**rules()[0], "relu": "reverse"})
    with pytest.raises(fg.RuleError, match=r"step 4 was saved with other rules: relu: scale"):
        trainer(network(), [other], tmp_path / "other", 8).train(
            resume_from_checkpoint=str(checkpoint)
        )


def test_a_checkpoint_without_rules_is_not_resumed_with_rules(tmp_path: Path) -> None:
    trainer(network(), [], tmp_path, 4).train()
    with pytest.raises(fg.RuleError, match="saved without rules"):
        trainer(
            network(), [fg.integrations.transformers.RulesCallback("reverse")], tmp_path, 8
        ).train(resume_from_checkpoint=True)


def test_a_callback_that_comes_too_late_for_the_optimizer_is_an_error(tmp_path: Path) -> None:
    late = trainer(network(), [], tmp_path, 4)
    late.create_optimizer()
    late.add_callback(callback())
    with pytest.raises(fg.RuleError, match="no optimizer of this training"):
        late.train()


def test_an_error_in_the_model_leaves_no_block(tmp_path: Path) -> None:
    model = network()
    model.third = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="shapes"):
        trainer(model, [callback()], tmp_path, 4).train()
    x = torch.tensor([-1.0], requires_grad=True)
    torch.relu(x).backward()
    assert x.grad == 0
