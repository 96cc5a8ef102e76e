"""Learning without the weights in the backward: accuracy, and the angle to the true gradient, for four backwards.

    python examples/feedback_alignment.py [--quick] [--epochs N] [--seeds N] [--out FOLDER]

A plain network of three layers learns scikit-learn's digits. Its layers send their gradients back through:

    backprop            the weight W
    feedback alignment  a fixed random matrix B          Lillicrap et al. 2016, doi:10.1038/ncomms13276
    sign-symmetric      the sign of W, scaled            Liao et al. 2016, arXiv:1510.05067
    Kolen-Pollack       B, which learns like W           Akrout et al. 2019, arXiv:1904.05391

After each epoch, `fg.compare` gives the cosine between the gradient of the first layer and the true one. An angle below
90° is a direction in which the loss falls. Initial weights, batches and settings are the same for all. Nothing is
downloaded.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import freegrad_fx as fg
from _data import load_digits
from _options import count
from _pictures import draw_variants
from _results import spread
from _training import train

OUT = Path(__file__).resolve().parent.parent / "out"

console = Console()

# The decay brings B and W of Kolen-Pollack together
OPTIMIZER = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)


def new_network() -> nn.Sequential:
    layers = (nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def kolen_pollack(network: nn.Module) -> fg.RuleTable:
    """One entry for each layer but the first, which sends nothing back: each has a matrix of its own to learn."""
    return fg.RuleTable(
        [
            fg.on("linear", module=name).backward(
                "kolen_pollack", feedback=nn.Parameter(nn.Linear(*layer.weight.shape[::-1]).weight)
            )
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Linear) and name != "1"
        ]
    )


@dataclass
class Contestant:
    """A backward, and the results with it."""

    name: str
    rules: Callable[[nn.Module], fg.RuleTable] | None = None  # None: the untransformed network
    accuracy: list[list[float]] = field(default_factory=list)  # for each seed, after each epoch
    angle: list[list[float]] = field(default_factory=list)


def contestants() -> list[Contestant]:
    sign_symmetric = fg.RuleTable([fg.on("linear").backward("sign_symmetric")])
    return [
        Contestant("backprop"),
        Contestant("feedback alignment", lambda network: fg.tables.feedback_alignment()),
        Contestant("sign-symmetric", lambda network: sign_symmetric),
        Contestant("Kolen-Pollack", kolen_pollack),
    ]


def angle(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """The angle between the gradient of the first layer's weight and the true one, in degrees."""
    rows = fg.compare(model, None, inputs, labels).rows
    (cosine,) = (row.cosine.mean for row in rows if row.name == "1.weight")
    return math.degrees(math.acos(min(cosine, 1.0)))


def train_all(everyone: list[Contestant], epochs: int, seeds: int) -> None:
    data = load_digits()
    console.print(f"Data: {data}", highlight=False)
    for seed in range(seeds):
        for one in everyone:
            torch.manual_seed(seed)
            network = new_network()
            model = network if one.rules is None else fg.transform(network, one.rules(network))
            one.accuracy.append([])
            one.angle.append([])
            for epoch in train(model, data, epochs=epochs, seed=seed, optimizer=OPTIMIZER):
                one.accuracy[seed].append(100 * epoch.accuracy)
                degrees = (
                    angle(model, data.held_out_inputs, data.held_out_labels) if one.rules else 0.0
                )
                one.angle[seed].append(degrees)


def results(everyone: list[Contestant]) -> Table:
    shown = Table("backward", box=box.SIMPLE_HEAD)
    for heading in ("held-out accuracy, %", "angle after 1 epoch, °", "at the end, °"):
        shown.add_column(heading, justify="right")
    for one in everyone:
        shown.add_row(
            one.name,
            spread([run[-1] for run in one.accuracy], ".1f"),
            spread([run[0] for run in one.angle], ".0f"),
            spread([run[-1] for run in one.angle], ".0f"),
        )
    return shown


def picture(everyone: list[Contestant], variant: str) -> Figure:
    """The accuracies and the angles: the mean over the seeds, and the range."""
    # Okabe and Ito's colours, which colour-blind readers can distinguish
    first = "#000000" if variant == "light" else "#FFFFFF"
    colours = (first, "#0072B2" if variant == "light" else "#56B4E9", "#E69F00", "#009E73")
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    accuracy, angles = figure.subplots(1, 2)
    for one, colour, style in zip(everyone, colours, ("--", "-", "-.", "-"), strict=True):
        for axes, runs in ((accuracy, one.accuracy), (angles, one.angle)):
            values = torch.tensor(runs)
            epochs = torch.arange(values.shape[1]) + 1
            axes.plot(epochs, values.mean(dim=0), style, color=colour, label=one.name)
            low, high = values.amin(dim=0), values.amax(dim=0)
            axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
    accuracy.set(title="Held-out set", ylabel="accuracy, %")
    angles.set(title="First layer: angle to the true gradient", ylabel="degrees", ylim=(-3, 93))
    angles.axhline(90, color="0.5", linewidth=0.8, linestyle=":")
    angles.set_yticks([0, 30, 60, 90])
    for axes in (accuracy, angles):
        axes.set_xlabel(f"epoch (seeds: {len(everyone[0].accuracy)}; mean and range)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = accuracy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds: 2 epochs, 1 seed")
    parser.add_argument("--epochs", type=count, help="of training (default: 30)")
    parser.add_argument("--seeds", type=count, help="how often everything is trained (default: 3)")
    parser.add_argument("--out", "-o", type=Path, default=OUT, help="the folder for the picture")
    chosen = parser.parse_args()
    chosen.epochs = chosen.epochs or (2 if chosen.quick else 30)
    chosen.seeds = chosen.seeds or (1 if chosen.quick else 3)
    return chosen


def main() -> None:
    chosen = options()
    # The network is small: a second thread helps little, and slows down on a busy machine.
    torch.set_num_threads(1)
    everyone = contestants()
    train_all(everyone, chosen.epochs, chosen.seeds)
    console.print(results(everyone))
    spread_shown = ", mean ± standard deviation" if chosen.seeds > 1 else ""
    console.print(f"After {chosen.epochs} epochs; seeds: {chosen.seeds}{spread_shown}")
    paths = draw_variants(
        lambda variant: picture(everyone, variant), chosen.out / "feedback_alignment"
    )
    console.print(f"The curves: {paths[0]}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
