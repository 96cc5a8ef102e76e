"""Trainers with rules by every way in: each cell of the table in the documentation is what it says.

The reference is the same training of the same model, in which the activations were replaced by hand.
"""

from __future__ import annotations

import pytest

import trainers

pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", exc_type=ImportError)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def the_table() -> dict[object, str]:
    """What the documentation says of each cell, and of `generate` by the way in."""
    lines = trainers.TABLE.read_text("utf-8").splitlines()[2:]
    found = [[text.strip() for text in line.strip("| ").split(" | ")] for line in lines]
    trained = [
        dict(part.split(": ") for part in text.split(", ") if ": " in part).get(precision, text)
        for line in found
        for text in line[2:-1]
        for precision in trainers.PRECISIONS
    ]
    generated = dict(zip(trainers.WAYS, (line[-1] for line in found[::2]), strict=True))
    return {**dict(zip(trainers.cells(), trained, strict=True)), **generated}


def test_the_table_is_as_the_script_writes_it() -> None:
    assert trainers.table(the_table()) == trainers.TABLE.read_text("utf-8")


@pytest.mark.thinned(11)
@pytest.mark.parametrize("name", trainers.MODELS)
@pytest.mark.parametrize("cell", list(trainers.cells()), ids=lambda cell: "-".join(map(str, cell)))
def test_a_cell_is_what_the_table_says(cell: tuple[str, str, str, bool], name: str) -> None:
    way, trainer, precision, checkpoints = cell
    if trainer == "Lightning":
        pytest.importorskip("lightning.pytorch", exc_type=ImportError)
    assert trainers.outcome(way, trainer, name, precision, checkpoints) == the_table()[cell]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", trainers.MODELS)
@pytest.mark.parametrize("way", trainers.WAYS)
def test_generate_is_what_the_table_says(way: str, name: str) -> None:
    assert trainers.generated(way, name) == the_table()[way]
