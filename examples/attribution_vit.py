"""Where a vision transformer and a ResNet look: heat maps of five tables each, on a photograph.

    python examples/attribution_vit.py [--quick] [--steps N] [--out FOLDER]

torchvision's VisionTransformer and resnet18, both unmodified, learn for some seconds to tell parts of two photographs
apart that scikit-learn ships: a pagoda, a flower, and what is around them. Then the score of "flower" is attributed to
the pixels of the whole photograph. For each table, the script prints the sum of the relevance beside the score, and the
share of the positive relevance that lies on the flower. Nothing is downloaded.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import freegrad_fx as fg
from _options import count
from _pictures import draw_variants, relevance_bar, relevance_colours
from _torchvision import torchvision

OUT = Path(__file__).resolve().parent.parent / "out"
SIZE, PATCH = 96, 8
PAGODA, FLOWER, NEITHER = range(3)
MEAN, DEVIATION = 0.5, 0.25

console = Console()


# ---- The photographs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Photograph:
    """A photograph, and where its object is."""

    pixels: Tensor  # [3, height, width], in [0, 1]
    rows: tuple[int, int]
    columns: tuple[int, int]

    def share(self, top: int, left: int, side: int) -> float:
        """The share of a square that the box around the object covers."""
        height = min(self.rows[1], top + side) - max(self.rows[0], top)
        width = min(self.columns[1], left + side) - max(self.columns[0], left)
        return max(height, 0) * max(width, 0) / side**2

    def square(self, top: int, left: int, side: int) -> Tensor:
        """A square, in the size that the models take."""
        part = self.pixels[None, :, top : top + side, left : left + side]
        return F.interpolate(part, size=(SIZE, SIZE), mode="area")[0]


def photographs() -> list[Photograph]:
    places = {
        "china.jpg": ((30, 400), (60, 350)),
        "flower.jpg": ((90, 375), (165, 450)),
    }
    return [
        Photograph(torch.tensor(load_sample_image(name)).permute(2, 0, 1) / 255, *place)
        for name, place in places.items()
    ]


def draw_squares(photos: list[Photograph], number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Squares of random sizes, places and colours, and their classes."""
    random = torch.Generator().manual_seed(seed)
    images, classes = [], []
    while len(images) < number:
        label = len(images) % len(photos)
        photo = photos[label]
        height, width = photo.pixels.shape[1:]
        side = int(torch.randint(130, height + 1, (), generator=random))
        top = int(torch.randint(height - side + 1, (), generator=random))
        left = int(torch.randint(width - side + 1, (), generator=random))
        share = photo.share(top, left, side)
        if 0.15 < share < 0.4:
            continue  # neither an object nor its surroundings
        image = photo.square(top, left, side)
        image = image.flip(-1) if torch.rand((), generator=random) < 0.5 else image
        brightness = 0.6 + 0.8 * torch.rand(3, 1, 1, generator=random)
        images.append((image * brightness).clamp(0, 1))
        classes.append(label if share >= 0.4 else NEITHER)
    return normalized(torch.stack(images)), torch.tensor(classes)


def normalized(images: Tensor) -> Tensor:
    return (images - MEAN) / DEVIATION


# ---- The models ----------------------------------------------------------------------------------


def new_models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    transformer = torchvision.models.VisionTransformer(
        image_size=SIZE,
        patch_size=PATCH,
        num_layers=3,
        num_heads=4,
        hidden_dim=64,
        mlp_dim=128,
        num_classes=3,
    )
    return {"ViT": transformer, "resnet18": torchvision.models.resnet18(num_classes=3)}


def train(model: nn.Module, images: Tensor, classes: Tensor, steps: int) -> None:
    updates = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(classes), (16,), generator=order)
        loss = F.cross_entropy(model(images[batch]), classes[batch])
        updates.zero_grad()
        loss.backward()
        updates.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, classes: Tensor) -> float:
    return (model(images).argmax(dim=1) == classes).float().mean().item()


# ---- The attributions ----------------------------------------------------------------------------


def tables() -> dict[str, dict[str, fg.RuleTable | None]]:
    """Five tables for each model; None for the native gradient."""
    # strict: a norm or an attention that a table does not reach is an error. A ViT has no gates.
    complete = {"gates": [], "strict": True}
    low, high = (0 - MEAN) / DEVIATION, (1 - MEAN) / DEVIATION
    return {
        "ViT": {
            "gradient × input": None,
            "cp_lrp": fg.tables.cp_lrp(**complete),
            "attn_lrp": fg.tables.attn_lrp(**complete),
            "relp": fg.tables.relp(**complete),
            "gim": fg.tables.gim(**complete),
        },
        "resnet18": {
            "gradient × input": None,
            "guided_backprop": fg.tables.guided_backprop(),
            "epsilon_plus": fg.tables.epsilon_plus(),
            "epsilon_alpha2_beta1": fg.tables.epsilon_alpha2_beta1(),
            "epsilon_gamma_box": fg.tables.epsilon_gamma_box(low, high),
        },
    }


def relevances(
    model: nn.Module, chosen: Mapping[str, fg.RuleTable | None], image: Tensor
) -> dict[str, Tensor]:
    """The relevance of each pixel for the score of "flower", under each table."""
    found = {}
    for name, table in chosen.items():
        subject, rules = model, table
        if table is not None and isinstance(model, torchvision.models.VisionTransformer):
            # A block of `use` cannot look into its nn.MultiheadAttention; a graph from example inputs shows the inside
            subject, rules = fg.transform(model, table, example_inputs=(image,)), None
        found[name] = fg.attribute(subject, rules, image, FLOWER).sum(dim=1)[0]
    return found


def on_the_flower(relevance: Tensor, flower: Tensor) -> float | None:
    """The share of the positive relevance that is on the flower; None if there is no positive relevance."""
    positive = relevance.clamp(min=0)
    total = positive.sum()
    return ((positive * flower).sum() / total).item() if total > 0 else None


# ---- What is shown -------------------------------------------------------------------------------


def picture(image: Tensor, maps: Mapping[str, Mapping[str, Tensor]], variant: str) -> Figure:
    """One row for each model: the photograph, and a heat map for each table."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    rows = figure.subplots(len(maps), 6)
    for axes, (model, found) in zip(rows, maps.items(), strict=True):
        axes[0].imshow(image[0].permute(1, 2, 0) * DEVIATION + MEAN)
        axes[0].set_ylabel(model, fontsize="large")
        for at, (name, relevance) in zip(axes[1:], found.items(), strict=True):
            # A ViT sees patches. For a CNN, sums over neighbours are easier to see than single pixels.
            side = PATCH if model == "ViT" else PATCH // 2
            sums = F.avg_pool2d(relevance[None], side, divisor_override=1)[0]
            shown = sums / sums.abs().quantile(0.98)
            extent = (0, SIZE, SIZE, 0)
            drawn = at.imshow(
                shown, cmap=relevance_colours(variant), vmin=-1, vmax=1, extent=extent
            )
            at.set_title(name, fontsize="medium")
        for at in axes:
            at.set(xticks=[], yticks=[])
    bar = relevance_bar(figure, drawn, rows, shrink=0.7)
    bar.set_label("relevance for “flower”")
    return figure


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds: 3 steps of training")
    parser.add_argument("--steps", type=count, help="of training of the ViT (default: 150)")
    parser.add_argument("--out", "-o", type=Path, default=OUT, help="the folder for the picture")
    chosen = parser.parse_args()
    chosen.steps = chosen.steps or (3 if chosen.quick else 150)
    return chosen


def main() -> None:
    chosen = options()
    # The networks are small: a second thread helps little, and slows down on a busy machine.
    torch.set_num_threads(1)
    photos = photographs()
    images, classes = draw_squares(photos, 48 if chosen.quick else 400, seed=0)
    flower = photos[FLOWER]
    top, left, side = 0, 90, flower.pixels.shape[1]
    image = normalized(flower.square(top, left, side)[None])
    mask = torch.zeros(flower.pixels.shape[1:])
    mask[slice(*flower.rows), slice(*flower.columns)] = 1
    mask = F.interpolate(mask[None, None, :, left : left + side], size=(SIZE, SIZE))[0, 0]

    shown = Table("model", "table", box=box.SIMPLE_HEAD)
    for heading in ("score", "sum of relevance", "on the flower"):
        shown.add_column(heading, justify="right")
    maps = {}
    for name, model in new_models().items():
        train(model, images, classes, chosen.steps if name == "ViT" else -(-chosen.steps // 4))
        console.print(f"{name}: {accuracy(model, images, classes):.0%} of the squares are right")
        maps[name] = relevances(model, tables()[name], image)
        score = model(image)[0, FLOWER].item()
        for table, relevance in maps[name].items():
            share = on_the_flower(relevance, mask)
            total = relevance.sum().item()
            shown.add_row(
                name,
                table,
                f"{score:.2f}",
                f"{total:.2f}",
                "none positive" if share is None else f"{share:.0%}",
            )
    console.print(shown)
    console.print(f"The flower's box is {mask.mean():.0%} of the photograph.")
    paths = draw_variants(
        lambda variant: picture(image, maps, variant), chosen.out / "attribution_vit"
    )
    console.print(f"The heat maps: {paths[0]}", soft_wrap=True, highlight=False)
    if chosen.quick:
        console.print(
            "With --quick the models have learnt little: the numbers only show that it runs."
        )


if __name__ == "__main__":
    main()
