"""The command that shows the package at work."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.rule import get
from ..pipeline import transform
from ..plan import report
from .options import Json
from .output import print_json, print_rows, print_text

__all__ = ["demo"]

RULES = {
    "native": None,
    "window": get("rectangular")(a=-1.0, b=1.0),
    "noise": get("rectangular_jam")(a=-1.0, b=1.0),
    "spiking": get("fast_sigmoid")(slope=5.0, forward="heaviside"),
}
"""The backwards that are compared. The last one also replaces the forward of the ReLU, by a step."""

_Data = tuple[Tensor, Tensor]


def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Steps over the whole training set.")] = 150,
    as_json: Json = False,
) -> None:
    """Train a small network with its native backward and with three others, and compare them."""
    training, held_out = _spirals(seed=1), _spirals(seed=2)
    model = _network()
    gm = transform(model, RULES["window"])
    same = torch.equal(gm(training[0]), model(training[0]))
    results = {name: _train(name, training, held_out, epochs) for name in RULES}
    if as_json:
        print_json({"epochs": epochs, "forward_is_bit_identical": same, "results": results})
        return
    print_text(
        "A network with two hidden layers of ReLUs tells the points of two spirals apart. It is an ordinary\n"
        "nn.Module; freegrad_fx.transform(model, rule) gives its ReLUs another backward:\n"
    )
    print_text(str(report(gm)))
    print_text(
        f"\nThe forward of the transformed model is bit-identical: {'yes' if same else 'NO'}."
    )
    print_text(
        f"The network is trained for {epochs} epochs, each time from the same weights. The cosine compares the first\n"
        f"gradient with the native one:\n"
    )
    rows = [("backward of the ReLUs", "forward", "held-out accuracy", "loss", "cosine")]
    for one in results.values():
        numbers = (f"{one['accuracy']:.1%}", f"{one['loss']:.3f}", f"{one['cosine']:.2f}")
        rows.append((one["backward"], one["forward"], *numbers))
    print_rows(rows)
    print_text(f"\n{_conclusion(results)}")
    print_text(
        "\n`freegrad-fx rules` lists the rules. `freegrad-fx explain torchvision:resnet18 --rules guided` shows what\n"
        "one does to a model."
    )


def _spirals(seed: int) -> _Data:
    """Points on two spirals, with noise: [400, 2], and which spiral each is on."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(400) % 2
    turns = torch.rand(400, generator=generator).sqrt() * 1.5 * math.tau
    angles = turns + labels * math.pi
    points = torch.stack([angles.cos(), angles.sin()], 1) * (turns / math.tau)[:, None]
    return points + 0.03 * torch.randn(400, 2, generator=generator), labels


def _network() -> nn.Sequential:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        layers = [nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)]
        return nn.Sequential(*layers)


def _train(name: str, training: _Data, held_out: _Data, epochs: int) -> dict[str, Any]:
    rule, native = RULES[name], _network()
    model: nn.Module = _network() if rule is None else transform(_network(), rule)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        first, expected = (_gradient(one, training) for one in (model, native))
        for _ in range(epochs):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(training[0]), training[1])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        accuracy = (model(held_out[0]).argmax(1) == held_out[1]).double().mean()
    return {
        "backward": str(rule or "native"),
        "forward": str((rule and rule.forward) or "relu"),
        "accuracy": accuracy.item(),
        "loss": loss.item(),
        "cosine": F.cosine_similarity(first, expected, dim=0).item(),
    }


def _gradient(model: nn.Module, data: _Data) -> Tensor:
    loss = F.cross_entropy(model(data[0]), data[1])
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*model.parameters()])])


def _conclusion(results: dict[str, dict[str, Any]]) -> str:
    native = results["native"]["accuracy"]
    others = {name: one for name, one in results.items() if name != "native"}
    best = max(others.values(), key=lambda one: one["accuracy"])
    worst = min(others.values(), key=lambda one: one["accuracy"])
    return (
        f"Conclusion: with its native backward the network reaches {native:.1%}.\nWith another backward it learns too: "
        f"{best['backward']} reaches {best['accuracy']:.1%},\nand {worst['backward']}, the worst, "
        f"{worst['accuracy']:.1%}."
    )
