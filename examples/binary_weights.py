"""A CNN with binary weights and one with ternary weights: one table entry each, on an unmodified model.

    python examples/binary_weights.py [--quick] [--epochs N] [--seeds N] [--device cpu]

The model reads the weights of the convolutions and of the linear layers through a quantizer. The
optimizer updates the real-valued weights (Courbariaux et al. 2015, arXiv:1511.00363):

    binary   1 where w ≥ 0, else −1    Hubara et al. 2016, arXiv:1602.02830
    ternary  sign(w)·1[|w| > Δ]        Li & Liu 2016, arXiv:1605.04711; Δ = 0.7·mean|w|

Their gradient is that of the quantized weight where |w| ≤ 1, else 0. Initial weights, batches and
settings are the same for all networks. The data are scikit-learn's digits; nothing is downloaded.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import freegrad_fx as fg
from _data import load_digits
from _options import count
from _results import spread
from _training import Epoch, train

console = Console()

LAYERS = (nn.Conv2d, nn.Linear)


class PlainCNN(nn.Module):
    """An ordinary network for images of 8×8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64 * 2 * 2, 10, bias=False)
        self.norm3 = nn.BatchNorm1d(10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        x = F.relu(self.norm2(F.max_pool2d(self.conv2(x), 2)))
        return self.norm3(self.fc(x.flatten(1)))


@dataclass
class Contestant:
    """A quantizer for the weights, and the results with it."""

    name: str
    forward: str | None = None  # None: the untransformed model
    quantize: Callable[[Tensor], Tensor] = torch.clone
    runs: list[list[Epoch]] = field(default_factory=list)  # one for each seed
    zeros: list[float] = field(default_factory=list)

    def new_model(self) -> nn.Module:
        return fg.transform(PlainCNN(), self.table()) if self.forward else PlainCNN()

    def table(self) -> fg.RuleTable:
        weights = fg.on(parameter="*.weight", type=LAYERS, forward=self.forward)
        return fg.RuleTable([weights.backward("clipped_straight_through", bound=1.0)])

    def weights(self, model: nn.Module) -> Tensor:
        """All weights of the layers, in the form that the forward reads."""
        layers = (module for module in model.modules() if isinstance(module, LAYERS))
        return torch.cat([self.quantize(layer.weight.detach()).flatten() for layer in layers])


def contestants() -> list[Contestant]:
    return [
        Contestant("real"),
        Contestant("binary", "binarize", fg.vocabulary.binarize),
        Contestant("ternary", "ternarize", fg.vocabulary.ternarize),
    ]


def train_all(everyone: Iterable[Contestant], epochs: int, seeds: int, device: str) -> None:
    """Train every contestant from the same initial weights, once for each seed."""
    data = load_digits().to(device)
    show(f"Data: {data}")
    for seed in range(seeds):
        for one in everyone:
            torch.manual_seed(seed)
            model = one.new_model().to(device)
            one.runs.append(list(train(model, data, epochs=epochs, seed=seed)))
            weights = one.weights(model)
            one.zeros.append(100 * (weights == 0).float().mean().item())
            show(f"seed {seed}, {one.name}: {one.runs[-1][-1].accuracy:.2%}")


def results(everyone: Iterable[Contestant]) -> Table:
    """The results of the last epoch."""
    table = Table("weights", box=box.SIMPLE_HEAD)
    for heading in ("held-out accuracy, %", "training loss", "weights that are 0, %"):
        table.add_column(heading, justify="right")
    for one in everyone:
        last = [run[-1] for run in one.runs]
        accuracy = spread([100 * epoch.accuracy for epoch in last], ".2f")
        table.add_row(
            one.name, accuracy, spread([e.loss for e in last], ".4f"), spread(one.zeros, ".1f")
        )
    return table


def show(text: object) -> None:
    """Print plain text: without markup, and without wrapping."""
    console.print(str(text), markup=False, highlight=False, soft_wrap=True)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds: 3 epochs, 1 seed")
    parser.add_argument("--epochs", type=count, help="of training (default: 20)")
    parser.add_argument("--seeds", type=count, help="how often everything is trained (default: 5)")
    parser.add_argument("--device", default="cpu", help="for instance cuda (default: cpu)")
    chosen = parser.parse_args()
    chosen.epochs = chosen.epochs or (3 if chosen.quick else 20)
    chosen.seeds = chosen.seeds or (1 if chosen.quick else 5)
    return chosen


def main() -> None:
    chosen = options()
    # The network is small: a second thread helps little, and slows down on a busy machine.
    torch.set_num_threads(1)
    everyone = contestants()
    console.rule("A CNN with binary weights")
    binary = everyone[1]
    show(f"{binary.table()}\n\n{fg.report(binary.new_model())}\n")
    console.rule("It learns the digits")
    train_all(everyone, chosen.epochs, chosen.seeds, chosen.device)
    console.print(results(everyone))
    spread_shown = ", mean ± standard deviation over the seeds" if chosen.seeds > 1 else ""
    show(f"After {chosen.epochs} epochs{spread_shown}.")


if __name__ == "__main__":
    main()
