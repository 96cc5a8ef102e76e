"""Models that are defined where there is no file: typed at the prompt, given to `python -c`, executed from a text.

The capture asks whose code runs, for example to answer `isinstance(x, Tensor)`: by a file's name alone, such code was
taken for PyTorch's own, and the graph had the other branch.
"""

from __future__ import annotations

from typing import Any

import pytest

from side_by_side import captured_or_refused, check_capture

TEXT = """
import functools
import torch
import torch.nn.functional as F
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = F.relu(self.f(x))
        BODY
"""

BODIES = {
    "isinstance": "return torch.tanh(self.g(h)) if isinstance(h, torch.Tensor) else h",
    "not isinstance": "return h if not isinstance(x, torch.Tensor) else torch.tanh(self.g(h))",
    "training is False": "return self.g(h) if self.training is False else h",
    "in place in one mode": "return F.relu(self.g(h), inplace=self.training)",
}
FILES = ("<stdin>", "<string>", "<python-input-0>")


def class_from(body: str, file: str) -> Any:
    space: dict[str, Any] = {"__name__": "somewhere"}
    exec(compile(TEXT.replace("BODY", body), file, "exec"), space)
    return space["Model"]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_model_means_the_same_wherever_it_was_typed(body: str, file: str) -> None:
    check_capture(class_from(body, file))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "body",
    [
        "return h * 2 if torch.is_grad_enabled() else h",
        "with torch.autocast('cpu', torch.bfloat16): return self.g(h)",
    ],
    ids=["grad mode", "autocast"],
)
def test_what_is_refused_of_a_file_is_refused_of_a_text(body: str, file: str) -> None:
    (_, of_text), (_, of_file) = (
        captured_or_refused(class_from(body, name)()) for name in (file, "model.py")
    )
    assert of_text.replace(file, "model.py") == of_file
