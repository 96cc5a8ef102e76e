"""``python -m benchmarks.memory``: the bytes that whole models keep for their backward, natively and with tables.

Nothing is timed: the bytes are exact, and the same on every CPU with the same release of PyTorch. Prints a table, and
writes it as Markdown with ``--write PATH``. ``--sites NAME`` prints where the bytes of one model are kept. The section
model-memory of `benchmarks.compare` compares them with the targets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg

from ._cases import torchvision_models

__all__ = ["CASES", "Case", "Llama", "ViT", "as_markdown", "counts", "main", "vit_small"]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.proj(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class _GatedMLP(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(*sizes, bias=False)
            for sizes in ((width, inner), (width, inner), (inner, width))
        )
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class _Block(nn.Module):
    def __init__(self, norms: Iterable[nn.Module], attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norms
        self.attention, self.mlp = attention, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Llama(nn.Module):
    """A small model with the blocks of Llama, without rotary embeddings."""

    def __init__(self, layers: int, width: int, heads: int, inner: int, tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(
            *(
                _Block(
                    (nn.RMSNorm(width, eps=1e-6) for _ in range(2)),
                    _Attention(width, heads, causal=True),
                    _GatedMLP(width, inner),
                )
                for _ in range(layers)
            )
        )
        self.norm, self.head = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, tokens, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The logits of the next tokens."""
        return self.head(self.norm(self.blocks(self.embedding(ids))))  # type: ignore[no-any-return]


class ViT(nn.Module):
    """A vision transformer, whose attention has one layer for query, key and value, as in timm."""

    def __init__(
        self, size: int, layers: int, width: int, heads: int, dropout: float | None = None
    ) -> None:
        super().__init__()
        drops = [] if dropout is None else [nn.Dropout(dropout)]
        self.patches = nn.Conv2d(3, width, 16, stride=16)
        self.position = nn.Parameter(torch.zeros(1, (size // 16) ** 2, width))
        self.blocks = nn.Sequential(
            *(
                _Block(
                    (nn.LayerNorm(width, eps=1e-6) for _ in range(2)),
                    nn.Sequential(_Attention(width, heads, causal=False), *drops),
                    nn.Sequential(
                        nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), *drops
                    ),
                )
                for _ in range(layers)
            )
        )
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the classes."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))  # type: ignore[no-any-return]


def vit_small(quick: bool) -> nn.Module:
    """ViT-S/16 with frozen norms; a smaller one if `quick` is true."""
    model = ViT(32, 1, 48, 6) if quick else ViT(224, 12, 384, 6)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(False)
    return model


def _with_dropouts(quick: bool) -> nn.Module:
    """A ViT-S with a dropout after each attention and each MLP, as in BERT."""
    return ViT(32, 1, 48, 6, 0.1) if quick else ViT(224, 12, 384, 6, 0.1)


def _resnet50(quick: bool) -> nn.Module:
    models = torchvision_models()
    return models.resnet18() if quick else models.resnet50()  # type: ignore[no-any-return]


def _frozen_norms(quick: bool) -> nn.Module:
    """A ResNet whose batch norms are in eval mode and frozen, as for transfer learning with small batches."""
    model = _resnet50(quick)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
    return model


def _llama(quick: bool) -> nn.Module:
    return Llama(1, 32, 4, 88, 50) if quick else Llama(8, 512, 8, 1376, 8000)


def _images(quick: bool) -> Tensor:
    return torch.randn(2, 3, 32, 32) if quick else torch.randn(4, 3, 224, 224)


def _ids(quick: bool) -> Tensor:
    return torch.randint(50, (2, 16)) if quick else torch.randint(8000, (4, 512))


def _few_bit_and_exact() -> fg.RuleTable:
    gelu = fg.on("gelu").backward(fg.rules.few_bit(bits=3))
    return fg.RuleTable([gelu]) + fg.tables.save_memory()


@dataclass(frozen=True)
class Case:
    """A model with a table.

    Attributes:
        name: The name of the model.
        table: The table, as text.
        model: Makes the model; a small one for True.
        inputs: Makes its input.
        rules: Makes the table.
        target: The limit of the ratio; None if there is none.
    """

    name: str
    table: str
    model: Callable[[bool], nn.Module]
    inputs: Callable[[bool], Tensor]
    rules: Callable[[], fg.RuleTable]
    target: float | None = None

    def count(self, quick: bool) -> fg.MemoryReport:
        """Count the bytes."""
        torch.manual_seed(0)
        model = self.model(quick)
        return fg.memory(fg.transform(model, self.rules()), self.inputs(quick))


CASES = (
    Case("resnet50", "save_memory()", _resnet50, _images, fg.tables.save_memory),
    Case(
        "resnet50", "save_memory(relu=True)", _resnet50, _images,
        lambda: fg.tables.save_memory(relu=True),
    ),
    Case(
        "resnet50", "save_memory(recompute=4)", _resnet50, _images,
        lambda: fg.tables.save_memory(recompute=4), 0.75,
    ),
    Case(
        "resnet50", "save_memory(recompute=16)", _resnet50, _images,
        lambda: fg.tables.save_memory(recompute=16), 0.65,
    ),
    Case(
        "resnet50, frozen batch norms", "save_memory(frozen=True)", _frozen_norms, _images,
        lambda: fg.tables.save_memory(frozen=True),
    ),
    Case("ViT-S, frozen norms", "save_memory()", vit_small, _images, fg.tables.save_memory),
    Case(
        "ViT-S, frozen norms", "few_bit(bits=3), save_memory()", vit_small, _images,
        _few_bit_and_exact, 0.7,
    ),
    Case("ViT-S, dropout 0.1", "save_memory()", _with_dropouts, _images, fg.tables.save_memory),
    Case("Llama, 8 layers of 512", "save_memory()", _llama, _ids, fg.tables.save_memory),
)  # fmt: skip


def as_markdown(found: list[tuple[Case, fg.MemoryReport]]) -> str:
    """The table, as the documentation includes it."""
    lines = [
        f"Bytes kept for the backward, with torch {torch.__version__.partition('+')[0]} on a CPU, in single precision:",
        "",
        "| model | table | natively | kept | ratio |",
        "|---|---|---|---|---|",
    ]
    for case, report in found:
        sizes = f"{report.native / 2**20:.1f} MiB | {report.kept / 2**20:.1f} MiB"
        lines.append(f"| {case.name} | `{case.table}` | {sizes} | {report.ratio:.3f} |")
    return "\n".join(lines) + "\n"


def counts(name: str, quick: bool) -> Iterator[tuple[str, float]]:
    """The MiB that a model keeps natively and with each table."""
    for number, case in enumerate(case for case in CASES if case.name == name):
        report = case.count(quick)
        if not number:
            yield "native", report.native / 2**20
        yield case.table, report.kept / 2**20


def main(arguments: list[str] | None = None) -> Any:
    """Count all cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small models, as a check")
    parser.add_argument("--write", type=Path, metavar="PATH", help="write the table as Markdown")
    parser.add_argument("--sites", metavar="NAME", help="print the sites of models of this name")
    options = parser.parse_args(arguments)
    found = [(case, case.count(options.quick)) for case in CASES]
    for case, report in found:
        if case.name == options.sites:
            print(f"{case.table}\n{report}\n")
    text = as_markdown(found)
    print(text)
    if options.write:
        options.write.write_text(text, "utf-8")
    return found


if __name__ == "__main__":
    main()
