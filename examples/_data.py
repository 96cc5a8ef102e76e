"""The data sets of the examples, as tensors in memory: images, and vectors of bits.

Only MNIST is downloaded, and only if it is selected or no data set is selected. This module does not
depend on models or on freegrad_fx.
"""

import gzip
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import sklearn.datasets
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = [
    "IMAGES",
    "Data",
    "Source",
    "load",
    "load_digits",
    "load_ones",
    "read_idx",
    "read_images",
]

DOWNLOADS = Path(__file__).resolve().parent.parent / "out" / "data"

# FreeGrad's scripts download to ./data, Debian's package dataset-fashion-mnist installs to /usr/share.
MNIST_FOLDERS = (Path("data/MNIST/raw"), DOWNLOADS / "MNIST" / "raw")
FASHION_MNIST_FOLDERS = (
    Path("data/FashionMNIST/raw"),
    DOWNLOADS / "FashionMNIST" / "raw",
    Path("/usr/share/datasets/fashion-mnist"),
)


class Data(NamedTuple):
    """Inputs of shape [n, ...] in [0, 1] and labels of shape [n]: a training set and a held-out set."""

    name: str
    train_inputs: Tensor
    train_labels: Tensor
    held_out_inputs: Tensor
    held_out_labels: Tensor

    def to(self, device: str) -> "Data":
        return Data(self.name, *(tensor.to(device) for tensor in self[1:]))

    def shortened(self, training: int, held_out: int) -> "Data":
        """Return the first samples of both sets."""
        return Data(
            self.name,
            *(tensor[:training] for tensor in self[1:3]),
            *(tensor[:held_out] for tensor in self[3:]),
        )

    @property
    def slug(self) -> str:
        """The name in a form that can be a part of a file name."""
        return "-".join(re.findall(r"[a-z0-9]+", self.name.lower()))

    def __str__(self) -> str:
        sizes = f"{len(self.train_labels)} to train with, {len(self.held_out_labels)} held out"
        return f"{self.name} ({sizes})"


@dataclass(frozen=True)
class Source:
    """A data set, and the function that reads it."""

    read: Callable[[], Data]  # raises FileNotFoundError if the data are not on this machine
    download: Callable[[], object] | None = None


def load(
    sources: Mapping[str, Source],
    choice: str | None = None,
    *,
    download: bool = True,
    say: Callable[[str], object] = print,
) -> Data:
    """Return the selected data set: by name, by a folder of idx files, or the first that is available."""
    if choice is None:
        for name in sources:
            try:
                return _read(sources[name], download)
            except (OSError, RuntimeError) as error:
                say(f"Not {name}: {error}")
        raise FileNotFoundError(f"none of the data sets can be had: {', '.join(sources)}")
    if choice in sources:
        return _read(sources[choice], download)
    # A folder contains images, so it is accepted only if the experiment accepts a data set of images.
    if "mnist" in sources and Path(choice).is_dir():
        return read_images((Path(choice),), choice)
    folder = " or a folder of idx files" if "mnist" in sources else ""
    raise FileNotFoundError(
        f"no data set {choice!r}; this experiment takes {', '.join(sources)}{folder}"
    )


def _read(source: Source, download: bool) -> Data:
    try:
        return source.read()
    except FileNotFoundError:
        if source.download is None or not download:
            raise
    source.download()
    return source.read()


# ---- Images in idx files: MNIST and those that follow it -----------------------------------------


def read_idx(path: Path) -> Tensor:
    """Read a tensor of bytes from an idx file, compressed or not.

    Two zero bytes, the type (8: unsigned bytes), the number of dimensions, every dimension as four
    bytes with the highest first, and the values (LeCun, Cortes & Burges: the MNIST database).
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} holds {len(content) - start} values, which are not {shape}")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).reshape(shape)


def read_images(folders: tuple[Path, ...], name: str) -> Data:
    """Read MNIST's four files, by their usual names, from the first folder that contains them."""
    for folder in folders:
        found = [_found(folder, f"{part}-{kind}") for part in ("train", "t10k") for kind in KINDS]
        if all(found):
            train_images, train_labels, images, labels = (read_idx(path) for path in found if path)
            return Data(
                name,
                train_images.unsqueeze(1) / 255,
                train_labels.long(),
                images.unsqueeze(1) / 255,
                labels.long(),
            )
    raise FileNotFoundError(f"its four idx files are not in {' or '.join(map(str, folders))}")


KINDS = ("images-idx3-ubyte", "labels-idx1-ubyte")


def _found(folder: Path, name: str) -> Path | None:
    candidates = (folder / name, folder / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def _download_mnist() -> None:
    from _torchvision import torchvision

    torchvision.datasets.MNIST(DOWNLOADS, download=True)


def _download_fashion_mnist() -> None:
    from _torchvision import torchvision

    torchvision.datasets.FashionMNIST(DOWNLOADS, download=True)


# ---- scikit-learn's handwritten digits, which are installed with scikit-learn ---------------------


def load_digits(held_out: float = 0.25) -> Data:
    """Split the 1797 images of 8×8 pixels, stratified by class and with a fixed seed."""
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=held_out, stratify=labels, random_state=0)
    train_pixels, held_out_pixels, train_labels, held_out_labels = split
    return Data(
        "digits",
        _images(train_pixels),
        torch.as_tensor(train_labels),
        _images(held_out_pixels),
        torch.as_tensor(held_out_labels),
    )


def _images(pixels: object) -> Tensor:
    return torch.as_tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16


def _enlarged_digits() -> Data:
    """The digits, enlarged to MNIST's size."""
    digits = load_digits()
    return digits._replace(
        name="digits, enlarged to 28×28",
        train_inputs=_enlarged(digits.train_inputs),
        held_out_inputs=_enlarged(digits.held_out_inputs),
    )


def _enlarged(images: Tensor) -> Tensor:
    return F.interpolate(images, size=(28, 28), mode="bilinear")


IMAGES = {
    "mnist": Source(lambda: read_images(MNIST_FOLDERS, "MNIST"), _download_mnist),
    "fashion-mnist": Source(
        lambda: read_images(FASHION_MNIST_FOLDERS, "Fashion-MNIST"), _download_fashion_mnist
    ),
    "digits": Source(_enlarged_digits),
}
"""Images of 28×28 pixels in ten classes, those first that are tried first."""


# ---- "Ones": are more than half of the bits ones? ------------------------------------------------


def load_ones(dimension: int, count: int, held_out: float = 0.2) -> Data:
    """Draw vectors of bits, uniformly over their Hamming weights, and label the majority of ones.

    The number of ones is uniform on 0, ..., d, their positions are uniform, and y = 1[mean(x) > 1/2].
    The seed is fixed.
    """
    random = torch.Generator().manual_seed(0)
    ones = torch.randint(dimension + 1, (count, 1), generator=random)
    rank = torch.rand(count, dimension, generator=random).argsort(dim=1)
    bits = (rank < ones).float()
    labels = (bits.mean(dim=1) > 0.5).float()
    training = count - round(held_out * count)
    return Data(
        f"Ones (d={dimension})",
        bits[:training],
        labels[:training],
        bits[training:],
        labels[training:],
    )
