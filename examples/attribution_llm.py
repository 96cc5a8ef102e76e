"""Which token an answer comes from: relevance in a Llama and a GPT-2, under five tables.

    python examples/attribution_llm.py [--quick] [--steps N] [--out FOLDER]

Two models of transformers, tiny and unmodified, learn for some seconds to answer a question: which letter comes after
the mark?

    k a f > c h b d ?    →    c

Then the score of the answer is attributed to the tokens, at the output of the embedding. The script prints the
relevance of each token. For 200 sequences it prints the sum of the relevance beside the score, and how often the token
with the largest relevance is the letter or the mark. `cp_lrp` conserves: in a Llama, which has no biases, the relevance
of the tokens sums to the score. In a GPT-2, positions and biases have a share too. Nothing is downloaded.

It needs transformers (pip install transformers).
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import _torchvision  # noqa: F401 transformers imports torchvision
import freegrad_fx as fg
from _options import count
from _pictures import draw_variants, relevance_bar, relevance_colours

OUT = Path(__file__).resolve().parent.parent / "out"

LETTERS = "abcdefghijklmnop"
TOKENS = [*LETTERS, ">", "?"]
MARK, QUESTION = len(LETTERS), len(LETTERS) + 1
LENGTH = 12

console = Console()


@dataclass(frozen=True)
class Sequences:
    """Questions of shape [n, LENGTH], their answers, and the places of the answers."""

    tokens: Tensor
    answers: Tensor
    places: Tensor


def draw_sequences(number: int, random: torch.Generator) -> Sequences:
    tokens = torch.randint(len(LETTERS), (number, LENGTH), generator=random)
    marks = torch.randint(LENGTH - 2, (number,), generator=random)
    each = torch.arange(number)
    tokens[each, marks], tokens[:, -1] = MARK, QUESTION
    return Sequences(tokens, tokens[each, marks + 1], marks + 1)


# ---- The models ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model, and what the explanation of it needs.

    Attributes:
        name: Its name.
        model: The model.
        at: The module that embeds the tokens.
        gates: As for the tables: whether the model has gates.
    """

    name: str
    model: nn.Module
    at: str
    gates: bool


def subjects() -> list[Subject]:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    ends = {"bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            **ends,
        )
    )
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(TOKENS), n_embd=64, n_layer=2, n_head=4, n_positions=32, **ends)
    )
    return [
        Subject("Llama", llama, "model.embed_tokens", True),
        Subject("GPT-2", gpt2, "transformer.wte", False),
    ]


def train(model: nn.Module, steps: int) -> None:
    updates = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    random = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        batch = draw_sequences(64, random)
        loss = F.cross_entropy(answers_of(model, batch), batch.answers)
        updates.zero_grad()
        loss.backward()
        updates.step()
    model.eval()


def answers_of(model: nn.Module, sequences: Sequences) -> Tensor:
    """The scores of all tokens as the answer: [n, tokens]."""
    return model(input_ids=sequences.tokens).logits[:, -1]


# ---- The attributions ----------------------------------------------------------------------------


def tables(subject: Subject) -> dict[str, fg.RuleTable | None]:
    # strict: a norm or an attention that a table does not reach is an error
    options: dict[str, Any] = {"strict": True} if subject.gates else {"strict": True, "gates": []}
    return {
        "gradient × input": None,
        "cp_lrp": fg.tables.cp_lrp(**options),
        "attn_lrp": fg.tables.attn_lrp(**options),
        "relp": fg.tables.relp(**options),
        "gim": fg.tables.gim(**options),
    }


def relevances(subject: Subject, sequences: Sequences) -> dict[str, Tensor]:
    """The relevance of each token for the score of the answer, under each table: [n, LENGTH]."""
    inputs = {"input_ids": sequences.tokens}
    return {
        name: fg.attribute(subject.model, table, inputs, sequences.answers, at=subject.at).sum(
            dim=-1
        )
        for name, table in tables(subject).items()
    }


# ---- What is shown -------------------------------------------------------------------------------


def tokens_table(sequences: Sequences, found: Mapping[str, Tensor]) -> Table:
    """The relevance of the tokens of the first sequence: a row for each token, a column for each table."""
    shown = Table("token", box=box.SIMPLE_HEAD)
    for name in found:
        shown.add_column(name, justify="right", no_wrap=True)
    columns = torch.stack([relevance[0] for relevance in found.values()])
    for token, values in zip(sequences.tokens[0].tolist(), columns.T.tolist(), strict=True):
        shown.add_row(TOKENS[token], *(f"{value:.2f}" for value in values))
    return shown


def summary_table() -> Table:
    shown = Table("model", box=box.SIMPLE_HEAD)
    shown.add_column("table", no_wrap=True)
    for heading in ("score", "sum of relevance", "differ by at most", "letter or mark first"):
        shown.add_column(heading, justify="right")
    return shown


def summary(sequences: Sequences, scores: Tensor, relevance: Tensor) -> list[str]:
    """For all sequences: score and relevance on average, and how far apart they are at most; and the hits."""
    sums = relevance.sum(dim=1)
    largest = relevance.argmax(dim=1)
    hits = (largest == sequences.places) | (largest == sequences.places - 1)
    return [
        f"{scores.mean():.2f}",
        f"{sums.mean():.2f}",
        f"{(sums - scores).abs().max():.1e}",
        f"{hits.float().mean():.0%}",
    ]


def picture(sequences: Sequences, maps: Mapping[str, Mapping[str, Tensor]], variant: str) -> Figure:
    """For each model the tokens of the first sequence, coloured by their relevance under each table."""
    figure = Figure(figsize=(12, 3.0), layout="constrained")
    panels = figure.subplots(1, len(maps), sharey=True)
    for axes, (model, found) in zip(panels, maps.items(), strict=True):
        values = torch.stack([relevance[0] for relevance in found.values()])
        scaled = values / values.abs().amax(dim=1, keepdim=True)
        drawn = axes.imshow(scaled, cmap=relevance_colours(variant), vmin=-1, vmax=1, aspect="auto")
        names = [TOKENS[token] for token in sequences.tokens[0].tolist()]
        axes.set_xticks(range(LENGTH), names, fontsize="large", family="monospace")
        axes.set_yticks(range(len(found)), list(found))
        answer = TOKENS[int(sequences.answers[0])]
        axes.set_title(f"{model}: relevance for the answer “{answer}”", fontsize="medium")
        axes.tick_params(length=0)
    relevance_bar(figure, drawn, panels)
    return figure


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds: 5 steps of training")
    parser.add_argument("--steps", type=count, help="of training (default: 400)")
    parser.add_argument("--out", "-o", type=Path, default=OUT, help="the folder for the picture")
    chosen = parser.parse_args()
    chosen.steps = chosen.steps or (5 if chosen.quick else 400)
    return chosen


def main() -> None:
    chosen = options()
    # The networks are small: a second thread helps little, and slows down on a busy machine.
    torch.set_num_threads(1)
    try:
        everyone = subjects()
    except ImportError as error:
        sys.exit(f"attribution_llm needs transformers: pip install transformers ({error})")
    sequences = draw_sequences(200, torch.Generator().manual_seed(1))
    totals = summary_table()
    maps = {}
    for subject in everyone:
        train(subject.model, chosen.steps)
        with torch.no_grad():
            outputs = answers_of(subject.model, sequences)
        right = (outputs.argmax(dim=1) == sequences.answers).float().mean()
        scores = outputs.gather(1, sequences.answers[:, None])[:, 0]
        maps[subject.name] = relevances(subject, sequences)
        console.rule(f"{subject.name}: {right:.0%} of the answers are right")
        console.print(tokens_table(sequences, maps[subject.name]))
        for name, relevance in maps[subject.name].items():
            totals.add_row(subject.name, name, *summary(sequences, scores, relevance))
    console.rule(f"{len(sequences.answers)} sequences")
    console.print(totals)
    paths = draw_variants(
        lambda variant: picture(sequences, maps, variant), chosen.out / "attribution_llm"
    )
    console.print(f"The tokens: {paths[0]}", soft_wrap=True, highlight=False)
    if chosen.quick:
        console.print(
            "With --quick the models have learnt little: the numbers only show that it runs."
        )


if __name__ == "__main__":
    main()
