"""One table through both doors on real models: torchvision's classifiers, a detection model, and language models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import freegrad_fx as fg
from models import VISION, Vision
from runs import Run, assert_same_forward, differs, run
from sweep import RULES, Interception, by_hand, wake

# Dynamo reads `.grad` of whatever goes from one graph into the next
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

RULE, NAIVE = RULES["rectangular"]


def places(plan: fg.Plan) -> set[tuple[str, str, int]]:
    rewritten = plan.with_action("rewrite")
    return {(d.site.path or d.site.name, d.site.op, d.site.call) for d in rewritten}


def without_prefix(run: Run) -> Run:
    """`torch.compile` puts a module around the model, and a prefix before its names."""
    run.gradients = {k.removeprefix("_orig_mod."): v for k, v in run.gradients.items()}
    run.buffers = {k.removeprefix("_orig_mod."): v for k, v in run.buffers.items()}
    return run


# --- torchvision ---

SMALL = [
    *(v for v in VISION if v.name == "resnet18"),
    Vision("squeezenet1_1", train_size=64, size=64),
]
LARGE = [
    *(v for v in VISION if v.name not in ("resnet18", "inception_v3")),
    Vision("shufflenet_v2_x0_5"),
    Vision("mnasnet0_5"),
    Vision("convnext_tiny"),
]
MODES = [pytest.param(True, id="train"), pytest.param(False, id="eval", marks=pytest.mark.slow)]
CASES = [pytest.param(v, id=v.name) for v in SMALL] + [
    pytest.param(v, id=v.name, marks=pytest.mark.slow) for v in LARGE
]


@pytest.mark.sampled(6)
@pytest.mark.thinned(2)
@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize("vision", CASES)
def test_one_table_means_the_same_through_both_doors(vision: Vision, training: bool) -> None:
    model = wake(vision.make()).train(training)
    first = next(path for path, m in model.named_modules() if isinstance(m, nn.Conv2d))
    table = fg.RuleTable(
        [
            fg.on(parameter=[f"{first}.weight", "*.bias"]).backward("scale", s=0.5),
            fg.on("activations", where=some).backward("straight_through"),
            fg.on("activations").backward(RULE),
        ]
    )
    x = vision.sample(training)
    transformed = fg.transform(model, table).train(training)
    expected = run(transformed, x)
    native = run(model, x)
    backend = fg.backend(table, inner="aot_eager")
    actual = without_prefix(run(torch.compile(model, backend=backend, fullgraph=True), x))
    assert_same_forward(actual, native)
    assert differs(actual, native)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[name], gradient, msg=name)
    # of the sites that `transform` knows, those of the other mode do not run
    captured = {
        n for v in transformed.variants if v.graph is transformed.graph for n in sites_of(v)
    }
    assert {site for site in places(backend.report()) if site[1] != "parameter"} == captured


def some(site: fg.Site) -> bool:
    """Half of all sites, by what they are called."""
    return (sum(map(ord, site.path)) + site.call) % 2 == 0


def sites_of(variant: Any) -> Iterator[tuple[str, str, int]]:
    for node in variant.graph.nodes:
        if node.target is fg.ops.decoupled and node.kwargs["site"].endswith("]"):
            path, _, op = node.kwargs["site"].rpartition(":")
            name, _, call = op.removesuffix("]").partition("[")
            yield ("" if path == "<root>" else path) or node.kwargs["site"], name, int(call)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torchvision's own
@pytest.mark.usefixtures("non_maximum_suppression")
def test_a_detection_model_is_rewritten_across_its_graph_breaks() -> None:
    import torchvision

    model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    )
    images = [torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}]
    learning = [p for p in model.parameters() if p.requires_grad]

    def gradients(call: Any) -> tuple[Tensor | None, ...]:
        torch.manual_seed(1)  # the proposals that are trained on are drawn
        losses = call(images, targets)
        return torch.autograd.grad(sum(losses.values()), learning, allow_unused=True)

    backend = fg.backend({"activations": RULE}, inner="aot_eager")
    actual = gradients(torch.compile(model, backend=backend))
    with Interception(NAIVE) as reference:
        expected = gradients(model)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    rewritten = Counter(d.site.op for d in backend.report().with_action("rewrite"))
    # the scores of the proposals carry no gradient: their sigmoid may run in Python
    assert Counter(reference.calls) - rewritten <= Counter(sigmoid=1)
    assert not backend.report().lost
    model.eval()
    torch.compile(model, backend=backend)(images)


# --- Hugging Face ---

SIZES = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def bert(library: Any) -> nn.Module:
    return library.BertForSequenceClassification(
        library.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32, num_labels=3, **SIZES,
        )
    )  # fmt: skip


def gpt2(library: Any) -> nn.Module:
    return library.GPT2LMHeadModel(
        library.GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2, **SIZES)
    )


def llama(library: Any) -> nn.Module:
    return library.LlamaForCausalLM(
        library.LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=32, **SIZES,
        )
    )  # fmt: skip


LANGUAGE = {
    bert: {
        *((f"bert.encoder.layer.{i}.intermediate.intermediate_act_fn", "gelu", 0) for i in (0, 1)),
        ("bert.pooler.activation", "tanh", 0),
    },
    gpt2: {(f"transformer.h.{i}.mlp.act", "gelu", 0) for i in (0, 1)},  # in separate operations
    llama: {(f"model.layers.{i}.mlp.act_fn", "silu", 0) for i in (0, 1)},
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("training", MODES)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(m, id=m.__name__, marks=pytest.mark.slow if i else ())
        for i, m in enumerate(LANGUAGE)
    ],
)
def test_a_language_model_gets_its_rules(transformers: Any, make: Any, training: bool) -> None:
    model = make(transformers).train(training)
    inputs = {"input_ids": torch.randint(3, 50, (2, 7)), "attention_mask": torch.ones(2, 7).long()}

    def run(call: Any) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
        torch.manual_seed(1)
        outputs = [o for o in tree_leaves(call(**inputs)) if isinstance(o, Tensor)]
        total = sum(o.sin().sum() for o in outputs if o.requires_grad)
        return outputs, torch.autograd.grad(total, list(model.parameters()), allow_unused=True)

    backend = fg.backend({"activations": RULE}, inner="aot_eager")
    outputs, actual = run(torch.compile(model, backend=backend))
    with by_hand(model, NAIVE):
        expected_outputs, expected = run(model)
    torch.testing.assert_close(outputs, expected_outputs, rtol=0, atol=0)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    assert places(backend.report()) == LANGUAGE[make]


@pytest.mark.slow
def test_generate_gives_the_same_tokens_and_the_model_can_be_trained_on(transformers: Any) -> None:
    model = gpt2(transformers).eval()
    tokens = torch.randint(3, 50, (2, 5))
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    expected = model.generate(tokens, **options)
    with by_hand(model, NAIVE):
        reference = gradients_of_loss(model, tokens)
    backend = fg.backend({"activations": RULE}, inner="aot_eager")
    model.compile(backend=backend)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert places(backend.report()) == LANGUAGE[gpt2]
    torch.testing.assert_close(gradients_of_loss(model, tokens), reference)


def gradients_of_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, ...]:
    output = model(input_ids=tokens).logits.sin().sum()
    return torch.autograd.grad(output, list(model.parameters()))
