"""`circuit_freeze` on models of Hugging Face, by every way in that takes them.

The oracle is the plain model with the frozen values of one input: it is affine, and its slope is the gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import freegrad_fx as fg
from attention_models import HUGGING_FACE, entry_of, hugging_face, second_derivative
from doors import DOORS, model_compiled
from frozen import assert_slope

# Dynamo reads `.grad` of whatever goes from one graph into the next
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

WAYS = {**DOORS, "model.compile": model_compiled}
ATTENTION = ("eager", "sdpa")

# What each way refuses, with the way in that its error names; it takes the other models
REFUSED: dict[tuple[str, str], str] = {
    **{("symbolic", name): r"example_inputs=\(\.\.\.\)" for name in HUGGING_FACE},
    ("symbolic", "Mixtral"): r"freegrad_fx\.compile\(model, rules\)",
    ("exported", "Mixtral"): r"freegrad_fx\.compile\(model, rules\)",
}
CELLS = [
    (name, way, attention)
    for name in HUGGING_FACE
    for way in ("exported", "compiled", "model.compile")
    for attention in ATTENTION
    if (way, name) not in REFUSED
]

CALLS = {
    "symbolic": "fg.transform(model, table)",
    "exported": "fg.transform(model, table, example_inputs=...)",
    "compiled": "fg.compile(model, table)",
    "model.compile": "model.compile(backend=fg.backend(table))",
    "in a block": "fg.use(table, model=model)",
}


def as_markdown() -> str:
    """The table of the documentation."""
    lines = [f"| way in | {' | '.join(HUGGING_FACE)} |", "|---" * (1 + len(HUGGING_FACE)) + "|"]
    for way, call in CALLS.items():
        cells = ["refused" if (way, name) in REFUSED else "yes" for name in HUGGING_FACE]
        lines.append(f"| `{call}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_table_of_the_documentation_is_that_of_the_tests() -> None:
    page = Path(__file__).parents[2] / "docs" / "howto" / "attribution.md"
    assert as_markdown() in page.read_text("utf-8")


def check(way: Any, model: Any, arguments: dict[str, Any]) -> None:
    """The gradient is the slope of the model with frozen values, and has no derivative."""
    x = next(iter(arguments.values())).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        assert second_derivative(entry_of(model, arguments)(x), x).abs().max() > 1e-3
        frozen = entry_of(way(model, fg.tables.circuit_freeze(strict=True), arguments), arguments)
        y = frozen(x)
        (found,) = torch.autograd.grad(y, x, retain_graph=True)
        assert second_derivative(y, x).abs().max() < 1e-12
        model.__dict__.pop("_compiled_call_impl", None)  # what model.compile leaves
        assert_slope(model, entry_of(model, arguments), x, found)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_in_a_block(transformers: Any, name: str, attention: str) -> None:
    check(WAYS["in a block"], *hugging_face(transformers, name, attention))
    model, arguments = hugging_face(transformers, name, attention)
    called, x = entry_of(model, arguments), next(iter(arguments.values())).requires_grad_()
    with fg.use(fg.tables.cp_lrp(strict=True), model=model) as block:
        y = called(x)
    rewritten = {d.site.op for d in fg.report(block).with_action("rewrite")}
    assert rewritten & {"softmax", "scaled_dot_product_attention"}
    assert rewritten & {"layer_norm", "rms_norm", "rsqrt"}
    relevance = (x * torch.autograd.grad(y, x)[0]).sum()
    if HUGGING_FACE[name][1]:  # the norms are computed in float32
        torch.testing.assert_close(relevance, y, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.thinned(13)
@pytest.mark.parametrize(("name", "way", "attention"), CELLS)
def test_in_a_graph(transformers: Any, name: str, way: str, attention: str) -> None:
    check(WAYS[way], *hugging_face(transformers, name, attention))


@pytest.mark.slow
@pytest.mark.thinned(7)
@pytest.mark.parametrize(("way", "name"), REFUSED)
def test_what_a_way_in_refuses(transformers: Any, way: str, name: str) -> None:
    model, arguments = hugging_face(transformers, name, "sdpa")
    with pytest.raises((fg.CaptureError, fg.PlanError), match=REFUSED[way, name]):
        WAYS[way](model, fg.tables.circuit_freeze(strict=True), arguments)
