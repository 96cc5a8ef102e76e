"""What is wrapped around a model in training: optimizers, averages, pruning, parametrizations, processes, timm.

The reference is a model whose activation has the gradient of the rule, written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import freegrad_fx as fg
from half import HALF, HalfByHand

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))


class Network(nn.Module):
    def __init__(self, activation: type[nn.ReLU] = nn.ReLU) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.norm(self.first(x))))


def pair(example: bool = False) -> tuple[nn.Module, nn.Module]:
    """A transformed model, and the one written by hand."""
    by_hand, model = Network(HalfByHand), Network()
    model.load_state_dict(by_hand.state_dict())
    return fg.transform(model, HALF, example_inputs=(X,) if example else None), by_hand


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, tensor), expected in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(tensor, expected, msg=name)


def train(model: nn.Module, after: Callable[[], None] = lambda: None, **options: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after()


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_optimizers_of_every_form(options: dict[str, bool]) -> None:
    model, by_hand = pair()
    for one in (model, by_hand):
        train(one, **options)
    assert_equal(model, by_hand)


@pytest.mark.parametrize("average", [get_ema_multi_avg_fn(0.5), None], ids=["ema", "swa"])
def test_averages_of_the_weights_have_the_rules_too(average: Any) -> None:
    averages = []
    for model in pair():
        averages.append(AveragedModel(model, multi_avg_fn=average))
        train(model, lambda: averages[-1].update_parameters(model))  # noqa: B023
        update_bn([X], averages[-1])
    assert_equal(*averages)
    for averaged in averages:
        train(averaged.module)
    assert_equal(*averages)


def pruned(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


@pytest.mark.parametrize("example", [False, True], ids=["symbolic", "exported"])
@pytest.mark.parametrize(
    "change",
    [
        pruned,
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
    ],
    ids=["pruned", "weight_norm", "spectral_norm"],
)
def test_weights_are_pruned_and_parametrized_after_the_transform(
    change: Callable[[nn.Module], Any], example: bool
) -> None:
    model, by_hand = pair(example)
    for one in (model, by_hand):
        torch.manual_seed(1)
        change(one.get_submodule("first"))
    if example and change is pruned:  # by a hook
        with pytest.warns(fg.FreegradWarning, match="hooks of first .*do not run"):
            model(X)
        return
    train(model)
    train(by_hand)
    assert_equal(model, by_hand)


def test_the_state_dict_is_loaded_with_weights_only(tmp_path: Path) -> None:
    (model, _), (other, _) = pair(), pair()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_equal(model, other)


def _in_a_process(rank: int, model: nn.Module) -> None:
    torch.set_num_threads(1)
    model(X).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad if parameter.grad is not None else 0)


@pytest.mark.slow
def test_a_spawned_process_trains_the_shared_parameters() -> None:
    model, by_hand = pair()
    torch.multiprocessing.spawn(_in_a_process, (model.share_memory(),), nprocs=1)
    _in_a_process(0, by_hand)
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_step_of_the_training_script_of_timm() -> None:
    import timm
    import timm.loss
    import timm.optim
    import timm.scheduler
    import timm.utils

    random = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32, generator=random), torch.tensor([0, 1, 2, 1])
    trained = []
    for activation in (nn.ReLU, HalfByHand):
        torch.manual_seed(0)
        model = timm.create_model("resnet10t", num_classes=3, act_layer=activation)
        if activation is nn.ReLU:
            model = fg.transform(model, HALF)
        optimizer = timm.optim.create_optimizer_v2(model, opt="lamb", lr=0.01, weight_decay=0.05)
        scheduler = timm.scheduler.CosineLRScheduler(optimizer, t_initial=4, warmup_t=1)
        average = timm.utils.ModelEmaV3(model, decay=0.5)
        loss_of = timm.loss.LabelSmoothingCrossEntropy()
        for step in range(2):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model.train()(images), labels)
            loss.backward()
            timm.utils.dispatch_clip_grad(model.parameters(), 1.0, mode="agc")
            optimizer.step()
            average.update(model, step=step)
            scheduler.step(step + 1)
        trained += [model, average.module]
    for one, other in ((0, 2), (1, 3)):
        assert_equal(trained[one], trained[other])
