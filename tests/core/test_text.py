"""How values and forwards are written in reports, reprs and errors."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from freegrad_fx.core.text import shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.5, "1.5"),
        ("relu", "'relu'"),
        (torch.tensor(2.0), "tensor(2.0)"),
        (torch.zeros(2, 3), "tensor[2, 3]"),
        (nn.Parameter(torch.tensor(0.5)), "tensor(0.5)"),
        (torch.tensor(2.0, device="meta"), "tensor[]"),
        (torch.tanh, "torch.tanh"),
        (F.gelu, "gelu"),
        (nn.ReLU, "ReLU"),
        (functools.partial(F.elu, 2, alpha=0.5), "partial(elu, 2, alpha=0.5)"),
        (functools.partial(torch.clamp, min=torch.tensor(0.0)), "partial(torch.clamp, min=tensor(0.0))"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)  # fmt: skip
def test_a_value_is_written_on_one_line(value: Any, text: str) -> None:
    assert shown(value) == text
