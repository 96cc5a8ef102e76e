"""The demo: transforms two unmodified models, then trains one of them with four backwards.

    python examples/demo.py [--quick] [--epochs N] [--seeds N] [--out FOLDER]

1. Transforms torchvision's resnet18 and a small network, shows the report and the generated code, and
   checks that the forward is bit-identical.
2. Trains the small network on scikit-learn's digits: with the native backward, with a gradient that is
   restricted to a window, with noise added to that, and as a spiking network (a step in the forward)
   with a surrogate gradient. Initial weights, batches and settings are the same.

Nothing is downloaded, and every number shown is computed by the run.
"""

import argparse
import difflib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, fx, nn

import freegrad_fx as fg
from _data import load_digits
from _options import count
from _torchvision import torchvision
from _training import Epoch, train

OUT = Path(__file__).resolve().parent.parent / "out"

# The gradient passes where the input of an activation is in [-1, 1]. The report and the training have this rule.
WINDOW = fg.rules.rectangular(a=-1.0, b=1.0)

console = Console()


class SmallCNN(nn.Module):
    """An ordinary network, which spells its activation in three ways."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(32)
        self.act = nn.ReLU()
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        x = self.act(self.norm2(F.max_pool2d(self.conv2(x), 2)))
        x = self.fc1(x.flatten(1)).relu()
        return self.fc2(x)


@dataclass
class Contestant:
    """One way to train the network, and its results."""

    rule: fg.Rule | None  # None: the untransformed model
    colour: str
    runs: list[list[Epoch]] = field(default_factory=list)  # one for each seed

    @property
    def forward(self) -> str:
        return (self.rule and self.rule.forward) or "relu"

    @property
    def backward(self) -> str:
        return repr(fg.get(self.rule.name)(**self.rule.given)) if self.rule else "native"

    @property
    def name(self) -> str:
        return f"{self.forward} + {self.backward}"

    def new_model(self) -> nn.Module:
        return fg.transform(SmallCNN(), self.rule) if self.rule else SmallCNN()

    def accuracy(self) -> Tensor:
        """Accuracy on the held-out set, in percent: [seeds, epochs]."""
        return 100 * torch.tensor([[epoch.accuracy for epoch in run] for run in self.runs])

    def loss(self) -> Tensor:
        """Loss on the training set: [seeds, epochs]."""
        return torch.tensor([[epoch.loss for epoch in run] for run in self.runs])


def contestants() -> list[Contestant]:
    # Okabe and Ito's colours, which colour-blind readers can distinguish
    return [
        Contestant(None, "#000000"),
        Contestant(WINDOW, "#0072B2"),
        Contestant(fg.rules.rectangular_jam(a=-1.0, b=1.0), "#E69F00"),
        Contestant(fg.rules.fast_sigmoid(slope=5.0, forward="heaviside"), "#009E73"),
    ]


# ---- Transform two models -----------------------------------------------------------------------


def show_resnet18() -> None:
    console.rule("torchvision's resnet18, unmodified")
    model = torchvision.models.resnet18()
    show(f">>> gm = fg.transform(resnet18(), fg.rules.{WINDOW})\n>>> print(fg.report(gm))")
    started = time.perf_counter()
    rewritten = fg.transform(model, WINDOW)
    seconds = time.perf_counter() - started
    report = str(fg.report(rewritten)).splitlines()
    show("\n".join(report[:8]))
    show(f"... and {len(report) - 8} lines more. Rewriting took {seconds:.2f} s.\n")
    show_comparison(model, rewritten, torch.randn(8, 3, 64, 64))


def show_cnn() -> None:
    console.rule("A network written by hand, unmodified")
    model = SmallCNN()
    rewritten = fg.transform(model, WINDOW)
    show(f">>> gm = fg.transform(SmallCNN(), fg.rules.{WINDOW})\n>>> print(fg.report(gm))")
    show(str(fg.report(rewritten)))
    show("\nThe program that torch.fx captures (-), and the rewritten one, gm.code (+):\n")
    for line in code_changes(fx.symbolic_trace(model).code, rewritten.code):
        show(line, {"+": "green", "-": "red"}.get(line[0], ""))
    show("")
    show_comparison(model, rewritten, torch.randn(32, 1, 8, 8))


def show_comparison(model: nn.Module, rewritten: nn.Module, x: Tensor) -> None:
    """Compare a transformed model with the original; raise an error if the forwards differ."""
    for training in (False, True):
        expected, computed = model.train(training)(x), rewritten.train(training)(x)
        if not torch.equal(computed, expected):
            raise RuntimeError("the forward is not the same")
    pairs = zip(model.parameters(), rewritten.parameters(), strict=True)
    if not all(one is other for one, other in pairs):
        raise RuntimeError("the parameters are not the same tensors")
    cosine = F.cosine_similarity(gradient(model, x), gradient(rewritten, x), dim=0)
    show(f"Forward      bit-identical, in eval and in train mode ({expected.numel()} values each)")
    show("Parameters   the same tensors")
    show(f"Gradient     of conv1.weight: another (cosine with the native one: {cosine:.2f})\n")


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient of the weight of the first convolution."""
    (grad,) = torch.autograd.grad(model(x).square().mean(), model.get_parameter("conv1.weight"))
    return grad.flatten()


def code_changes(before: str, after: str) -> Iterator[str]:
    """All lines of two generated programs, marked as in a diff."""
    old, new = statements(before), statements(after)
    diff = difflib.unified_diff(old, new, n=len(old), lineterm="")
    return (line for line in diff if not line.startswith(("---", "+++", "@@")))


def statements(code: str) -> list[str]:
    """Remove the `;  x = None` by which fx frees unused values."""
    return [line.split(";  ")[0] for line in code.strip().splitlines()]


def show(text: str, style: str = "") -> None:
    """Print plain text: without markup, and without wrapping."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


# ---- Train one of them ---------------------------------------------------------------------------


def train_all(everyone: list[Contestant], epochs: int, seeds: int) -> None:
    """Train every contestant from the same initial weights, once for each seed."""
    data = load_digits()
    columns = (
        TextColumn("{task.description:38}"),
        BarColumn(bar_width=10),
        TextColumn("seed {task.fields[seed]}, {task.fields[accuracy]:6.1%}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for one in everyone:
            bar = progress.add_task(one.name, total=epochs * seeds, seed=0, accuracy=0.0)
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = one.new_model()
                one.runs.append([])
                for epoch in train(model, data, epochs=epochs, seed=seed):
                    one.runs[seed].append(epoch)
                    progress.update(bar, advance=1, seed=seed, accuracy=epoch.accuracy)


def results(everyone: list[Contestant]) -> Table:
    """The accuracy on the held-out set and the loss on the training set, after the last epoch."""
    table = Table("forward", "backward")
    table.add_column("held-out, %", justify="right")
    table.add_column("loss", justify="right")
    for one in everyone:
        accuracy, loss = one.accuracy()[:, -1], one.loss()[:, -1]
        table.add_row(one.forward, one.backward, spread(accuracy, ".1f"), spread(loss, ".3f"))
    return table


def conclusion(everyone: list[Contestant]) -> str:
    """What the results of the last epoch say, as a sentence."""
    native, *others = (one.accuracy()[:, -1].mean().item() for one in everyone)
    return (
        f"The native backward is not needed: with it, {native:.1f} % of the held-out images are classified "
        f"correctly, with the others {min(others):.1f} to {max(others):.1f} %."
    )


def spread(values: Tensor, form: str) -> str:
    """Mean ± standard deviation; only the mean if there is one value."""
    mean = f"{values.mean():{form}}"
    return f"{mean} ± {values.std():{form}}" if len(values) > 1 else mean


# ---- The picture ---------------------------------------------------------------------------------


def draw(everyone: list[Contestant], path: Path) -> None:
    """Draw the rules, the learning curves and the accuracies."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    backward, loss, accuracy = figure.subplots(1, 3)
    for one in everyone:
        x = torch.linspace(-2, 2, 401)
        draw_mean_and_range(backward, one, x, gradient_factor(one.rule, x))
        epochs = torch.arange(one.loss().shape[1]) + 1
        draw_mean_and_range(loss, one, epochs, one.loss())
        draw_mean_and_range(accuracy, one, epochs, one.accuracy())
    figure.suptitle("A small network learns scikit-learn's digits with four backwards")
    backward.set(title="Backward of an activation", xlabel="its input", ylabel="gradient out / in")
    loss.set(title="Training set", ylabel="cross-entropy", yscale="log")
    accuracy.set(title="Held-out set", ylabel="accuracy, %")
    accuracy.set_ylim(top=100)
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(f"epoch (seeds: {len(everyone[0].runs)}; mean and range)")
    for axes in (backward, loss, accuracy):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(everyone), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def draw_mean_and_range(axes: Axes, one: Contestant, x: Tensor, values: Tensor) -> None:
    """Draw the mean over the first dimension (seeds or draws), and the range."""
    style = "-" if one.rule else "--"
    axes.plot(x, values.mean(dim=0), style, color=one.colour, label=one.name, zorder=3)
    low, high = values.amin(dim=0), values.amax(dim=0)
    axes.fill_between(x, low, high, color=one.colour, alpha=0.15, linewidth=0)


def gradient_factor(rule: fg.Rule | None, x: Tensor) -> Tensor:
    """The factor by which a rule multiplies the gradient at each input; many draws, as it can be random."""
    x = x.expand(2000, -1)
    return (rule or fg.rules.d_relu).backward(torch.ones_like(x), x=x, y=x.relu())


# ---- The command ---------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds: 3 epochs, 1 seed")
    parser.add_argument("--epochs", type=count, help="of training (default: 20)")
    parser.add_argument("--seeds", type=count, help="how often everything is trained (default: 5)")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder for the picture")
    chosen = parser.parse_args()
    chosen.epochs = chosen.epochs or (3 if chosen.quick else 20)
    chosen.seeds = chosen.seeds or (1 if chosen.quick else 5)
    return chosen


def main() -> None:
    chosen = options()
    # The network is small: a second thread helps little, and slows down on a busy machine.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    show(
        "This demo gives two unmodified models another backward, and checks that their forward stays the same.\n"
        "Then it trains one of them with four backwards. It downloads nothing.\n"
    )
    show_resnet18()
    show_cnn()
    console.rule("SmallCNN learns the digits")
    show(
        "Each line is a way to train: the forward and the backward of its activations, and the accuracy so far.\n"
    )
    everyone = contestants()
    train_all(everyone, chosen.epochs, chosen.seeds)
    console.print(results(everyone))
    spread_shown = ", mean ± standard deviation" if chosen.seeds > 1 else ""
    show(f"After {chosen.epochs} epochs; seeds: {chosen.seeds}{spread_shown}")
    path = chosen.out / "demo.png"
    draw(everyone, path)
    show(f"The curves: {path}\n")
    show(conclusion(everyone))


if __name__ == "__main__":
    main()
