"""Rules give the gradients of the libraries that have them, on the same input.

A case is skipped if its library is not installed: none but FreeGrad is a dependency of the tests.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from benchmarks import conformance
from benchmarks._peer_rules import Case
from benchmarks.conformance import cases
from torch import nn

import freegrad_fx as fg

r = fg.rules
CASES = [pytest.param(case, id=f"{case.library} {case.name} {case.rule}") for case in cases()]


@pytest.mark.filterwarnings("ignore:Setting backward hooks")
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_the_library(case: Case) -> None:
    try:
        module = case.load()
    except ImportError as error:
        pytest.skip(f"{case.library} is not installed: {error}")
    ours, theirs = case.compare(module)
    torch.testing.assert_close(ours, theirs, rtol=case.rounding, atol=case.rounding)
    assert theirs.count_nonzero() or "stop" in case.name


def test_the_table_of_the_documentation_has_every_case() -> None:
    page = Path(__file__).parents[2] / "docs" / "_tables" / "conformance.md"
    rows = re.findall(r"^\| ([^|]+) \| `([^`]+)` \| `([^`]+)` \|", page.read_text("utf-8"), re.M)
    assert [(library.split()[0], name, rule) for library, name, rule in rows] == [
        (case.library, case.name, repr(case.rule)) for case in cases()
    ]
    assert "not installed" not in page.read_text("utf-8")


def test_the_script_tells_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = next(cases())
    changed = Case(wrong.name, wrong.module, wrong.rule, lambda m: (torch.ones(2), torch.zeros(2)))
    monkeypatch.setattr(conformance, "cases", lambda: [changed])
    (row,) = conformance.rows()
    assert row.difference == 1.0
    assert not row.agrees
    missing = Case("x", "no_such_library", r.scale, lambda m: (torch.ones(2), torch.zeros(2)))
    monkeypatch.setattr(conformance, "cases", lambda: [missing])
    (row,) = conformance.rows()
    assert row.difference is None


# --- parameters: torch's own functions ---


@pytest.mark.parametrize("limit", [0.1, 100.0])
def test_clippings_of_one_tensor_are_torch_s(limit: float) -> None:
    grad = torch.randn(4, 5, dtype=torch.float64)
    for clip, rule in (
        (nn.utils.clip_grad_value_, r.clip_value(max_value=limit)),
        (nn.utils.clip_grad_norm_, r.clip_norm(max_norm=limit)),
    ):
        weight = nn.Parameter(torch.zeros_like(grad))
        weight.grad = grad.clone()
        clip([weight], limit)
        torch.testing.assert_close(rule.backward(grad), weight.grad, rtol=1e-5, atol=0)


def test_decay_is_the_weight_decay_of_sgd() -> None:
    weight = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    grad, before = torch.randn(4, 5, dtype=torch.float64), weight.detach().clone()
    weight.grad = grad
    torch.optim.SGD([weight], lr=1.0, weight_decay=0.3).step()
    torch.testing.assert_close(before - weight, r.decay(rate=0.3).backward(grad, x=before))
