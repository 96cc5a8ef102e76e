"""Trainers, with rules by every way in, for tests/integrations/test_trainers.py and the table of the documentation.

``python tests/support/trainers.py`` trains every cell of the table and writes it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

import freegrad_fx as fg
from places import DOCS

TABLE = DOCS / "_tables" / "trainers.md"
RULES = {"activations": fg.rules.scale(s=0.5)}
MODELS = ("llama", "gpt2")
TRAINERS = ("Trainer", "Accelerate", "Lightning")
PRECISIONS = ("fp32", "bf16")
WAYS = {
    "transform": "`transform(model, rules, example_inputs=...)`",
    "use": "a block of `use` around the forward",
    "compile": "`fg.compile(model, rules)`",
    "backend": "`model.compile(backend=fg.backend(rules))`",
}
Step = Callable[[], AbstractContextManager[Any]]


class ByHand(nn.Module):
    """An activation with the gradient of the rule."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return _Scaled.apply(x, self.activation)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: nn.Module) -> Tensor:
        return activation(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 0.5, None


def make(name: str, *, by_hand: bool = False, checkpoints: bool = False) -> Any:
    """A tiny causal language model without weights; one by hand has the rule in its activations."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "llama":
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(
            **common, **sizes, num_attention_heads=2, max_position_embeddings=32
        )
        model: Any = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.GPT2Config(
            **common, n_embd=16, n_layer=2, n_head=2, n_positions=32, activation_function="gelu"
        )
        model = transformers.GPT2LMHeadModel(config)
    for module in list(model.modules()) if by_hand else ():
        for attribute in ("act_fn", "act"):
            if hasattr(module, attribute):
                setattr(module, attribute, ByHand(getattr(module, attribute)))
    if checkpoints:
        model.gradient_checkpointing_enable()
    return model


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    """Sentences, some of which are padded: their masks and labels differ."""
    random, found = torch.Generator().manual_seed(1), []
    for number in range(count):
        ids = torch.randint(3, 32, (6,), generator=random)
        mask = torch.ones(6, dtype=torch.long)
        mask[: number % 3] = 0
        labels = ids.masked_fill(mask == 0, -100)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def batch(count: int = 2) -> dict[str, Tensor]:
    some = rows(count)
    return {name: torch.stack([row[name] for row in some]) for name in some[0]}


# --- the trainers ---


def train(trainer: str, model: Any, precision: str, checkpoints: bool, step: Step) -> None:
    """Train a model: four batches, two steps of the optimizer."""
    {"Trainer": _by_trainer, "Accelerate": _by_accelerate, "Lightning": _by_lightning}[trainer](
        model, precision, checkpoints, step
    )


def _by_trainer(model: Any, precision: str, checkpoints: bool, step: Step) -> None:
    import transformers

    class Trainer(transformers.Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            with step():
                return super().compute_loss(*args, **kwargs)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=checkpoints,
            bf16=precision == "bf16",
            learning_rate=0.01,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=rows()).train()


def _by_accelerate(model: Any, precision: str, checkpoints: bool, step: Step) -> None:
    import accelerate
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.manual_seed(1)
    accelerator = accelerate.Accelerator(
        cpu=True,
        mixed_precision="bf16" if precision == "bf16" else "no",
        gradient_accumulation_steps=2,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loader = torch.utils.data.DataLoader(rows(), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)
    for inputs in loader:
        with accelerator.accumulate(model):
            with step():
                loss = model(**inputs).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


def _by_lightning(model: Any, precision: str, checkpoints: bool, step: Step) -> None:
    import lightning

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, inputs: dict[str, Tensor], index: int) -> Tensor:
            with step():
                return self.model(**inputs).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    torch.manual_seed(1)
    model.train()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="bf16-mixed" if precision == "bf16" else "32-true",
        accumulate_grad_batches=2,
        enable_model_summary=False,
        **quiet,
    ).fit(Module(), torch.utils.data.DataLoader(rows(), batch_size=2))


# --- the ways in ---


def enter(way: str, name: str, checkpoints: bool = False, trainer: str = "") -> tuple[Any, Step]:
    """A model with rules by a way in, and the context for each step."""
    if way == "transform":
        return copy.deepcopy(_transformed(name, checkpoints, trainer == "Trainer")[1]), _nothing
    model = make(name, checkpoints=checkpoints)
    if way == "use":
        return model, lambda: fg.use(RULES, model=model)
    if way == "compile":
        return fg.compile(model, RULES, backend="aot_eager"), _nothing
    model.compile(backend=fg.backend(RULES, inner="aot_eager"))
    return model, _nothing


_nothing = contextlib.nullcontext


@functools.cache
def _transformed(name: str, checkpoints: bool, counted: bool) -> tuple[Any, Any]:
    """A model, and what it is transformed to. Copies of the latter need the hooks of the former."""
    model = make(name, checkpoints=checkpoints)
    model.config.use_cache = False
    given = {"num_items_in_batch": torch.tensor(7)} if counted else {}
    return model, fg.transform(model, RULES, example_inputs={**batch(), **given})


@functools.cache
def by_hand(
    trainer: str, name: str, precision: str, checkpoints: bool, compiled: bool
) -> list[Tensor]:
    """The parameters of the model that was edited by hand, after training; compiled code rounds bf16 otherwise."""
    model = make(name, by_hand=True, checkpoints=checkpoints)
    if compiled:
        model.compile(backend="aot_eager")
    train(trainer, model, precision, checkpoints, _nothing)
    return list(model.parameters())


def outcome(way: str, trainer: str, name: str, precision: str, checkpoints: bool) -> str:
    """``yes`` if a training has the weights of the reference, bit for bit; else what was found."""
    torch._dynamo.reset()
    compiled = way in ("compile", "backend") and precision == "bf16"
    expected = by_hand(trainer, name, precision, checkpoints, compiled)
    model, step = enter(way, name, checkpoints, trainer)
    train(trainer, model, precision, checkpoints, step)
    got = list(model.parameters())
    same = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    return "yes" if same else "differs"


def generated(way: str, name: str) -> str:
    """``yes`` if a model generates what the plain model does, ``no`` if it raises."""
    torch._dynamo.reset()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = make(name).eval().generate(**inputs, **options)
    model, step = enter(way, name)
    try:
        with step():
            got = model.eval().generate(**inputs, **options)
    except (fg.CaptureError, TypeError):  # for a graph without a cache, or with labels
        return "no"
    return "yes" if torch.equal(got, expected) else "differs"


# --- the table ---


def cells() -> Iterator[tuple[str, str, str, bool]]:
    """The way in, trainer, precision and checkpoints of each cell of training."""
    for way, checkpoints in itertools.product(WAYS, (False, True)):
        for trainer, precision in itertools.product(TRAINERS, PRECISIONS):
            yield way, trainer, precision, checkpoints


def table(found: dict[Any, str]) -> str:
    """The table of the documentation.

    Args:
        found: What was found, by the cell; for `generate`, by the way in.
    """
    heads = ["way in", "gradient checkpoints", *TRAINERS, "`generate`"]
    lines = [heads, ["---"] * len(heads)]
    for way, checkpoints in itertools.product(WAYS, (False, True)):
        line = [WAYS[way], "with" if checkpoints else "without"]
        for trainer in TRAINERS:
            each = {p: found[way, trainer, p, checkpoints] for p in PRECISIONS}
            same = len(set(each.values())) == 1
            texts = each.values() if same else [f"{p}: {text}" for p, text in each.items()]
            line.append(", ".join(dict.fromkeys(texts)))
        lines.append([*line, found[way]])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Train every cell with every model, and write the table."""
    found: dict[Any, str] = {}
    for cell in cells():
        way, trainer, precision, checkpoints = cell
        each = [outcome(way, trainer, name, precision, checkpoints) for name in MODELS]
        found[cell] = " / ".join(dict.fromkeys(each))
        print(*cell, found[cell], flush=True)
    for way in WAYS:
        found[way] = " / ".join(dict.fromkeys(generated(way, name) for name in MODELS))
        print(way, "generate", found[way], flush=True)
    TABLE.write_text(table(found), "utf-8")


if __name__ == "__main__":
    import _torchvision  # noqa: F401

    torch.set_num_threads(1)
    main()
