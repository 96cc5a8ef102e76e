"""The common part of the experiments: options, training of all variants, output and results.

An experiment is a model, data, settings and variants: rules for `freegrad_fx.transform`, or for `freegrad_fx.use`
around the plain model. All variants of one seed start with the same weights and see the same batches. The results are
written after each run, so that `--resume` can continue an experiment that was stopped.
"""

import argparse
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

import freegrad_fx as fg
from _data import Data, Source, load
from _options import count
from _results import OURS, PEER, Results, Run, draw, table
from _training import Epoch, train

__all__ = ["Experiment", "Variant", "main"]

OUT = Path(__file__).resolve().parent.parent / "out"

console = Console()


@dataclass(frozen=True)
class Variant:
    """A forward and its backward: native, or given by rules."""

    name: str
    rules: Mapping[str, fg.Rule] | None = None

    def model(self, original: nn.Module, library: str, *, block: bool = False) -> nn.Module:
        """Apply the rules to a model, with either package.

        Args:
            original: The plain model.
            library: The package.
            block: Whether `freegrad_fx.use` surrounds each call of the plain model, instead of a transform.
        """
        if library == OURS and self.rules and block:
            return InBlock(original, self.rules)
        if library == OURS:
            return fg.transform(original, self.rules) if self.rules else original
        from _freegrad import wrapped

        return wrapped(original, next(iter(self.rules.values())) if self.rules else None)


class InBlock(nn.Module):
    """A plain model whose forward runs in a `use` block. Only the forward has to: the rules are bound in it."""

    def __init__(self, model: nn.Module, rules: Mapping[str, fg.Rule]) -> None:
        super().__init__()
        self.model = model
        self.block = fg.use(rules, model=model)

    def forward(self, x: Tensor) -> Tensor:
        with self.block:
            return self.model(x)


@dataclass(frozen=True)
class Experiment:
    """A model, its data, its variants and the settings of the training."""

    name: str
    title: str
    model: Callable[[], nn.Module]
    variants: tuple[Variant, ...]
    data: Mapping[str, Source]
    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float = 0.0
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def train(
        self,
        variant: Variant,
        library: str,
        data: Data,
        *,
        epochs: int,
        seed: int,
        block: bool = False,
        compiled: bool = False,
    ) -> Iterator[Epoch]:
        """Train a variant; yields after each epoch."""
        torch.manual_seed(seed)
        model = variant.model(self.model(), library, block=block).to(data.train_inputs.device)
        # Random rules then draw the same numbers, independently of the initialisation of the model.
        torch.manual_seed(seed)
        if compiled:
            torch.compiler.reset()  # Dynamo limits how often a forward is compiled
            model = torch.compile(model)
        return train(
            model,
            data,
            epochs=epochs,
            seed=seed,
            batch_size=self.batch_size,
            optimizer=partial(torch.optim.SGD, lr=self.learning_rate, momentum=self.momentum),
            loss=self.loss,
        )


def main(experiment: Experiment, arguments: list[str] | None = None) -> Results:
    """Run an experiment with the options of the command line."""
    chosen = options(experiment, arguments)
    # The networks are small: a second thread helps little, and slows down on a busy machine.
    torch.set_num_threads(1)
    console.rule(experiment.title)
    try:
        data = load(experiment.data, chosen.data, download=not chosen.quick, say=show)
    except (OSError, RuntimeError) as error:
        sys.exit(f"{experiment.name}: {error}")
    if chosen.quick:
        data = data.shortened(1024, 512)
    show(f"Data: {data}")

    path = chosen.out / f"{experiment.name}-{data.slug}{'-quick' * chosen.quick}.json"
    results = Results(about(experiment, data, chosen))
    if chosen.resume and path.exists():
        results.runs = runs_to_keep(path, results.about)
    train_all(experiment, data.to(chosen.device), chosen, results, path)

    console.print(table(results))
    spread = ", mean ± standard deviation over the seeds" if chosen.seeds > 1 else ""
    clock = "processor time" if chosen.device == "cpu" else "wall-clock time"
    show(f"After {chosen.epochs} epochs{spread}. s/epoch: the median, {clock} of training.")
    if chosen.compare:
        show(
            f"With {OURS} and with {PEER}, the accuracies after an epoch differ by "
            f"{100 * results.difference():.2f} points at most."
        )
    draw(results, path.with_suffix(".png"))
    show(f"Results: {path}\nCurves:  {path.with_suffix('.png')}")
    return results


def train_all(
    experiment: Experiment,
    data: Data,
    chosen: argparse.Namespace,
    results: Results,
    path: Path,
) -> None:
    """Train every variant from every seed, and write the results after each run."""
    done = {run.key for run in results.runs}
    # The packages run in alternation, so that a slow phase of the machine affects both.
    keys = [
        (variant.name, library, seed)
        for seed in range(chosen.seeds)
        for variant in experiment.variants
        for library in chosen.libraries
    ]
    variants = {variant.name: variant for variant in experiment.variants}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=18),
        TextColumn("held-out {task.fields[accuracy]:6.1%}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(keys) * chosen.epochs, accuracy=0.0)
        for key in keys:
            if key in done:
                progress.advance(bar, chosen.epochs)
                continue
            name, library, seed = key
            epochs = []
            progress.update(bar, description=f"seed {seed}, {name}, {library}")
            for epoch in experiment.train(
                variants[name],
                library,
                data,
                epochs=chosen.epochs,
                seed=seed,
                block=chosen.block,
                compiled=chosen.compile,
            ):
                epochs.append(epoch)
                progress.update(bar, advance=1, accuracy=epoch.accuracy)
            results.runs.append(Run(name, library, seed, epochs))
            results.write(path)
            show(f"seed {seed}, {name}, {library}: {epochs[-1].accuracy:.2%}")


def about(experiment: Experiment, data: Data, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return the settings and versions that the results depend on."""
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "data": str(data),
        "epochs": chosen.epochs,
        "batch_size": experiment.batch_size,
        "learning_rate": experiment.learning_rate,
        "momentum": experiment.momentum,
        "loss": experiment.loss.__name__,
        "block": chosen.block,
        "compiled": chosen.compile,
        "device": chosen.device,
        "machine": platform.platform(),
        "torch": torch.__version__,
        "freegrad_fx": fg.__version__,
    }


def runs_to_keep(path: Path, wanted: dict[str, Any]) -> list[Run]:
    """Read the runs of a stopped experiment; they must have the same settings."""
    before = Results.read(path)
    changed = [name for name in wanted if before.about.get(name) != wanted[name]]
    if changed:
        sys.exit(f"{path} was made with another {', '.join(changed)}: leave out --resume.")
    return before.runs


def show(text: str) -> None:
    """Print plain text: without markup, and without wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def options(experiment: Experiment, arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=experiment.title)
    sources = list(experiment.data)
    folder = ", or a folder with MNIST's four idx files" if "mnist" in sources else ""
    parser.add_argument(
        "--data", help=f"{', '.join(sources)}{folder} (default: the first that can be had)"
    )
    parser.add_argument("--epochs", type=count, help=f"default: {experiment.epochs}")
    parser.add_argument("--seeds", type=count, help="how often everything is trained (default: 5)")
    parser.add_argument(
        "--block", action="store_true", help="train the plain model in use blocks, untransformed"
    )
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--device", default="cpu", help="for instance cuda (default: cpu)")
    parser.add_argument("--compare", choices=[PEER], help="train with that package too")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder for the results")
    parser.add_argument("--resume", action="store_true", help="keep the runs that are done already")
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds: 2 epochs, 1 seed, few data"
    )
    chosen = parser.parse_args(arguments)
    chosen.epochs = chosen.epochs or (2 if chosen.quick else experiment.epochs)
    chosen.seeds = chosen.seeds or (1 if chosen.quick else 5)
    chosen.libraries = [OURS, PEER] if chosen.compare else [OURS]
    if chosen.compare and importlib.util.find_spec(PEER) is None:
        parser.error(f"--compare {PEER}: it is not installed; python -m pip install {PEER}==1.0.1")
    return chosen
