"""Programs that no graph takes, in `use` blocks: data decides what runs, time loops, detection and language models.

The reference is the program itself under `sweep.Interception`, which hands every activation to a naive Function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import freegrad_fx as fg
from sweep import RULES, Interception, by_hand

RULE, NAIVE = RULES["rectangular"]


class Experts(nn.Module):
    """Each token goes to the experts that its scores choose, and the results are put back with `index_add`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), act, nn.Linear(16, 8))
            for act in (nn.ReLU(), nn.GELU(), nn.SiLU(), nn.ReLU(inplace=True))
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            if rows.numel() == 0:
                continue
            out = out.index_add(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out


class Adaptive(nn.Module):
    """As many steps as the data needs."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.halt = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        total, steps = torch.zeros(x.shape[0], 1), 0
        while float(total.detach().mean()) < 1.5 and steps < 9:
            x = torch.tanh(self.cell(x))
            total = total + torch.sigmoid(self.halt(x))
            steps += 1
        return x * total


class Packed(nn.Module):
    """A recurrent network over packed sequences, whose own activations are inside of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.lstm, self.g = nn.Linear(8, 8), nn.LSTM(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            F.elu(self.f(x))[:, None].repeat(1, 3, 1), torch.tensor([6, 4, 1])
        )
        states, lengths = pad_packed_sequence(self.lstm(packed)[0])
        return F.hardtanh(self.g(states)) * lengths[None, :, None]


class Remembers(nn.Module):
    """A neuron that keeps its state, and a list of what it did, in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)
        self.mem: Tensor | None = None
        self.spikes: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.mem, self.spikes = None, []
        for row in x:
            self.mem = F.relu(self.f(row) + (0 if self.mem is None else 0.9 * self.mem))
            self.spikes.append(torch.sigmoid(self.mem))
        return torch.stack(self.spikes)


@pytest.mark.parametrize("make", [Experts, Adaptive, Packed, Remembers])
@pytest.mark.parametrize("with_model", [False, True])
def test_a_program_equals_its_reference(make: Callable[[], nn.Module], with_model: bool) -> None:
    torch.manual_seed(3)
    model, x = make(), torch.randn(6, 8, requires_grad=True)

    def gradients() -> list[Tensor]:
        y = model(x)
        grads = torch.autograd.grad(y.sin().sum(), [x, *model.parameters()], allow_unused=True)
        return [y, *(torch.zeros(()) if g is None else g for g in grads)]

    with Interception(NAIVE) as reference:
        expected = gradients()
    native = gradients()
    with fg.use({"activations": RULE}, **({"model": model} if with_model else {})) as block:
        actual = gradients()
    assert torch.equal(actual[0], native[0])
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    assert not all(map(torch.equal, actual, native))
    assert {d.site.op for d in fg.report(block).with_action("rewrite")} == {*reference.calls}
    assert bool(fg.report(block).opaque) is (make is Packed)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torchvision's own
@pytest.mark.usefixtures("non_maximum_suppression")
def test_a_detection_model_is_trained_with_targets() -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    images = [torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    learning = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> tuple[Tensor | None, ...]:
        losses = model(images, targets)
        return torch.autograd.grad(sum(losses.values()), learning, allow_unused=True)

    with fg.use({"activations": RULE}, model=model):
        actual = gradients()
    with Interception(NAIVE):
        expected = gradients()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


SIZES = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, **SIZES,
}  # fmt: skip


def llama(library: Any) -> nn.Module:
    return library.LlamaForCausalLM(library.LlamaConfig(**SMALL))


def mixtral(library: Any) -> nn.Module:
    return library.MixtralForCausalLM(
        library.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    )


def t5(library: Any) -> nn.Module:
    return library.T5ForConditionalGeneration(
        library.T5Config(
            d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", decoder_start_token_id=0, **SIZES,
        )
    )  # fmt: skip


def whisper(library: Any) -> nn.Module:
    return library.WhisperForConditionalGeneration(
        library.WhisperConfig(
            d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=10, max_target_positions=16,
            dropout=0.0, decoder_start_token_id=1, **SIZES,
        )
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable.:FutureWarning")
@pytest.mark.parametrize(
    "checkpoints", [None, False, True], ids=["plain", "checkpoints", "reentrant"]
)
@pytest.mark.parametrize("make", [llama, mixtral, t5, whisper])
def test_a_language_model_with_labels(
    transformers: Any, make: Callable[[Any], nn.Module], checkpoints: bool | None
) -> None:
    torch.manual_seed(0)
    model: Any = make(transformers).train()
    tokens = torch.randint(3, 50, (2, 7))
    inputs = {"input_features": torch.randn(2, 8, 20)} if make is whisper else {"input_ids": tokens}

    def gradients() -> list[Tensor | None]:
        model.zero_grad()
        model(**inputs, labels=tokens, use_cache=False).loss.backward()
        return [p.grad for p in model.parameters()]

    with by_hand(model, NAIVE):
        expected = gradients()
    if checkpoints is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpoints})
    with fg.use({"activations": RULE}, model=model) as block:
        actual = gradients()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    assert fg.report(block).with_action("rewrite")


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, t5])
def test_generate_gives_the_same_tokens(
    transformers: Any, make: Callable[[Any], nn.Module]
) -> None:
    torch.manual_seed(0)
    model: Any = make(transformers).eval()
    tokens = torch.randint(3, 50, (2, 5))
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **options)
    with fg.use({"activations": RULE}, model=model):
        assert torch.equal(model.generate(tokens, **options), expected)
        logits = model(tokens, labels=tokens).logits
    assert all(t.isfinite().all() for t in tree_leaves(logits) if isinstance(t, Tensor))
