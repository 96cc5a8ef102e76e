"""What the callbacks of trainers have in common, without a trainer."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.integrations.training import TrainingRules


def training() -> tuple[nn.Module, TrainingRules, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    rules = TrainingRules(fg.tables.lsq(bits=3), None, "*", "step")
    rules.attach(model)
    return model, rules, torch.optim.Adam(model.parameters(), lr=0.05)


def trained(steps: int, model: nn.Module, rules: TrainingRules, optimizer: Any) -> list[Tensor]:
    rules.require_trained([optimizer])
    for _ in range(steps):
        rules.enter()
        model(torch.linspace(-1, 1, 12).view(3, 4)).square().mean().backward()
        optimizer.step()
        rules.leave()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_a_scaler_belongs_to_the_training_and_not_to_the_checkpoint() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    table = {"relu": fg.rules.clip_value(max_value=0.5)}
    rules = TrainingRules(fg.unscaled(table, scaler), None, "*", "step")
    state = rules.state()
    assert fg.RuleTable.from_toml(state["rules.toml"]) == fg.RuleTable.of(table)
    scaler.update(64.0)
    rules.load(state, "the checkpoint")
    TrainingRules(table, None, "*", "step").load(state, "the checkpoint")
    assert scaler.get_scale() == 64.0


def test_a_step_that_each_weight_learns_is_trained_and_resumed() -> None:
    model, rules, optimizer = training()
    first = [step.detach().clone() for step in rules.learnt]
    expected = trained(4, model, rules, optimizer)
    assert len(first) == 2
    assert not any(map(torch.equal, first, rules.learnt))

    half = training()
    trained(2, *half)
    states = half[0].state_dict(), half[1].state(), half[2].state_dict()
    resumed = training()
    for part, state in zip((resumed[0], resumed[2]), (states[0], states[2]), strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    resumed[1].load(states[1], "the checkpoint")
    assert all(map(torch.equal, trained(2, *resumed), expected))


@pytest.mark.parametrize("assign", [False, True])
def test_a_weight_that_is_replaced_before_the_training_is_refused(assign: bool) -> None:
    model, rules, _ = training()
    if assign:
        state = {key: 2 * value for key, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)
    else:
        model[0].weight = nn.Parameter(2 * model[0].weight.detach())  # type: ignore[index]
    with pytest.raises(fg.RuleError, match="made or replaced after"):
        rules.require_trained([torch.optim.SGD(model.parameters(), lr=0.1)])


def test_a_table_for_all_parameters_leaves_out_those_of_its_rules() -> None:
    model = nn.Linear(4, 3)
    table = fg.RuleTable([fg.on(parameter="*").backward(fg.quantizers.lsq(bits=3))])
    rules = TrainingRules(table, None, "*", "step")
    rules.attach(model)
    rules.require_trained([torch.optim.SGD(model.parameters(), lr=0.1)])
    assert len(rules.learnt) == 2


def test_the_plain_model_of_a_training_has_nothing_of_its_rules() -> None:
    model, rules, optimizer = training()
    trained(2, model, rules, optimizer)
    plain = fg.materialize(model, rules.table, example_inputs=torch.ones(3, 4))
    assert [*dict(plain.named_parameters())] == [*plain.state_dict()]
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    assert b"freegrad_fx" not in buffer.getvalue()
