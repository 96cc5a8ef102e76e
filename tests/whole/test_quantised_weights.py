"""Weights read through another forward: one entry makes a binary or a ternary network; the latent weight learns."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
from _data import Data, load_digits
from freegrad_fx.table.entry import FORWARDS
from freegrad_fx.vocabulary import OPS
from parameter_models import CASES, floats
from runs import assert_same_forward, run

X = floats(4, 6)


def read_through(
    forward: Any, rule: str = "straight_through", parameter: Any = "*.weight"
) -> fg.RuleTable:
    return fg.RuleTable([fg.on(parameter=parameter, forward=forward).backward(rule)])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def with_weights(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> nn.Module:
    """The model with the weights that the forward makes of its own."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if name.endswith("weight"):
                parameter.copy_(forward(parameter.detach().clone()))
    return copied


def assert_reads(gm: nn.Module, reference: nn.Module) -> None:
    """The same output, and in the latent weights the gradients that the reference has in its own."""
    actual, expected = run(gm, X), run(reference, X)
    assert_same_forward(actual, expected)
    for name, gradient in expected.gradients.items():
        assert torch.equal(actual.gradients[name], gradient), name


# --- what a forward can be ---


def doubled_sign(x: Tensor) -> Tensor:
    return 2 * torch.sign(x)


def scaled_sign(x: Tensor, factor: float) -> Tensor:
    return factor * torch.sign(x)


def times(factor: float, x: Tensor) -> Tensor:
    return factor * x


class Quantizer:
    """A function of the user's that is an object."""

    def __call__(self, x: Tensor) -> Tensor:
        return 3 * torch.sign(x)

    def coarse(self, x: Tensor) -> Tensor:
        return 4 * torch.sign(x)


IMPORTABLE = {
    "function": doubled_sign,
    "partial": functools.partial(scaled_sign, factor=3.0),
    "partial-of-partial": functools.partial(functools.partial(scaled_sign, factor=3.0), factor=4.0),
    "partial-by-position": functools.partial(times, 0.5),
    "torch": torch.sign,
    "torch.nn.functional": F.hardtanh,
    "partial-of-torch": functools.partial(torch.clamp, min=-0.1, max=0.1),
    "partial-of-torch-by-position": functools.partial(torch.mul, 0.5),
    "tensor-method": Tensor.sigmoid,
    "ternarize-at": functools.partial(fg.vocabulary.ternarize, threshold=0.05),
}
IN_THIS_PROCESS = {
    "lambda": lambda x: 5 * torch.sign(x),
    "object": Quantizer(),
    # no Python number, and no code that a graph could have
    "partial-of-numpy": functools.partial(scaled_sign, factor=np.float64(3.0)),
    "bound-method": Quantizer().coarse,
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", [n for n in FORWARDS if n not in ("rrelu", "sample_one_hot")])
@pytest.mark.parametrize("example_inputs", [None, (X,)], ids=["symbolic", "export"])
def test_every_op_can_be_read_through(name: str, example_inputs: Any) -> None:
    model = network()
    gm = fg.transform(model, read_through(name), example_inputs=example_inputs)
    reference = with_weights(model, OPS[name].function)
    assert_reads(gm, reference)
    assert all(p is q for p, q in zip(gm.parameters(), model.parameters(), strict=True))
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            assert torch.equal(gm(X), reference(X))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [*IMPORTABLE, *IN_THIS_PROCESS])
def test_every_kind_of_function_can_be_read_through(name: str) -> None:
    forward = {**IMPORTABLE, **IN_THIS_PROCESS}[name]
    model = network()
    gm = fg.transform(model, read_through(forward))
    reference = with_weights(model, forward)
    for copied in (gm, copy.deepcopy(gm), torch.fx.symbolic_trace(gm), fg.transform(gm, {})):
        assert_reads(copied, reference)
    if name in IMPORTABLE:
        assert_reads(pickle.loads(pickle.dumps(gm)), reference)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (row,)).square().sum()

        of_a_row = torch.func.vmap(torch.func.grad(loss), (None, 0))
        return of_a_row(dict(model.named_parameters()), X)

    torch.testing.assert_close(gradients(gm), gradients(reference))


def test_a_tensor_in_a_partial_is_a_place_whose_value_may_change() -> None:
    model, limit = network(), torch.tensor(0.1)
    gm = fg.transform(model, read_through(functools.partial(torch.clamp, max=limit)))
    assert list(gm.state_dict()) == list(model.state_dict())
    for value in (0.1, -0.2):
        limit.fill_(value)
        reference = with_weights(model, lambda w, value=value: w.clamp(max=value))
        assert torch.equal(gm(X), reference(X))


def writes_into_it(x: Tensor) -> Tensor:
    return x.sign_()


def one_row(x: Tensor) -> Tensor:
    return x[:1]


def no_tensor(x: Tensor) -> int:
    return 3


@pytest.mark.parametrize(
    ("forward", "error", "message"),
    [
        ("binarise", fg.TableError, "Did you mean 'binarize'"),
        ("softmax", fg.TableError, "unknown forward 'softmax'"),
        (3, fg.TableError, "got 3"),
        (nn.Tanh(), fg.PlanError, "got the module Tanh()"),
        (nn.Tanh, fg.PlanError, "got the class"),
        (torch.relu_, fg.PlanError, "works in place"),
        (Tensor.relu_, fg.PlanError, "works in place"),
        (functools.partial(F.relu, inplace=True), fg.PlanError, "works in place"),
    ],
    ids=lambda value: "",
)
def test_what_cannot_be_read_through_is_refused_at_once(
    forward: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(").replace(")", r"\)")):
        fg.transform(network(), read_through(forward))


@pytest.mark.parametrize(
    ("forward", "error", "message"),
    [
        (one_row, TypeError, r"shape of its input, \(8, 6\); it returned shape \(1, 6\)"),
        (no_tensor, TypeError, "it returned int"),
        (writes_into_it, fg.RuleError, "changes its argument, .* in place"),
    ],
    ids=["shape", "type", "in-place"],
)
def test_what_a_function_returns_is_checked(
    forward: Any, error: type[Exception], message: str
) -> None:
    gm = fg.transform(network(), read_through(forward))
    with pytest.raises(error, match=message):
        gm(X)


# --- every layer ---


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("LSTM-proj")])
def test_every_layer_reads_binary_weights(name: str) -> None:
    case = CASES[name]
    model = case.build().eval()
    gm = fg.transform(model, read_through("binarize", "clipped_straight_through", "*"))
    reference = case.build().eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(torch.where(parameter >= 0, 1.0, -1.0))
    expected, actual = run(reference, case.inputs), run(gm, case.inputs)
    assert_same_forward(actual, expected)
    latent = dict(model.named_parameters())
    for key, gradient in expected.gradients.items():
        if gradient is None or key not in latent:
            assert (actual.gradients[key] is None) == (gradient is None)
            continue
        clipped = torch.where(latent[key].abs() <= 1, gradient, torch.zeros_like(gradient))
        assert torch.equal(actual.gradients[key], clipped), key


@pytest.mark.parametrize("forward", ["heaviside", "binarize", "ternarize"])
def test_a_quantizer_is_batched_without_a_fallback(forward: str) -> None:
    function = OPS[forward].function
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        batched = torch.func.vmap(function)(X)
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)
    assert torch.equal(batched, torch.stack([function(row) for row in X]))


# --- the latent weight ---


def test_the_latent_weight_is_what_learns_and_what_is_saved() -> None:
    model = network()
    gm = fg.transform(model, read_through("binarize", "clipped_straight_through"))
    before = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        gm(X).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert gm.state_dict()["0.weight"].unique().numel() > 2
    restored = fg.transform(network(), read_through("binarize", "clipped_straight_through"))
    restored.load_state_dict(gm.state_dict())
    assert torch.equal(restored(X), gm(X))


def test_a_frozen_weight_is_read_through_the_forward_too() -> None:
    model = network()
    model[0].weight.requires_grad_(False)
    gm = fg.transform(model, read_through("binarize", parameter="0.weight"))
    reference = copy.deepcopy(model)
    with torch.no_grad():
        reference[0].weight.copy_(torch.where(model[0].weight >= 0, 1.0, -1.0))
    assert torch.equal(gm(X), reference(X))
    gm(X).sum().backward()
    assert model[0].weight.grad is None
    # its rule stands ready
    model.requires_grad_(True)
    assert_reads(gm, reference.requires_grad_(True))


class Renormalises(nn.Module):
    """Looks up rows, and writes into those that are too long."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))

    def forward(self, words: Tensor) -> Tensor:
        return F.embedding(words, self.table, max_norm=0.5)


@pytest.mark.parametrize(
    "model", [Renormalises, lambda: nn.Sequential(nn.Embedding(7, 4, max_norm=0.5))]
)
def test_a_weight_that_the_forward_writes_into_is_a_reported_skip(model: Any) -> None:
    with pytest.warns(fg.FreegradWarning, match="writes into it"):
        gm = fg.transform(model(), read_through("binarize", parameter="*"))
    assert [d.action for d in fg.report(gm).decisions if d.site.kind == "parameter"] == ["skip"]


class InTwoGraphs(nn.Module):
    """Reads a weight, changes it outside of the graphs, and reads it again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        outside_of_the_graphs(self.layer.weight)
        return self.layer(x)


@torch.compiler.disable
def outside_of_the_graphs(weight: Tensor) -> None:
    # A read of the weight itself would go through its quantizer, so that the model may not write it
    weight.data.copy_(weight.data.neg().roll(1, 0))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_weight_that_changes_between_two_graphs_of_a_call_is_read_anew() -> None:
    model = InTwoGraphs()
    first = model.layer.weight.detach().clone()
    second = first.neg().roll(1, 0)
    binarize = OPS["binarize"].function
    compiled = fg.compile(model, read_through("binarize"), backend="eager")
    assert torch.equal(compiled(X), F.linear(F.linear(X, binarize(first)), binarize(second)))
    assert torch.equal(model.layer.weight, second)


# --- whole networks, against others' formulas ---


class Plain(nn.Module):
    """An ordinary network for images of 8×8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(32)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        x = F.relu(self.norm2(F.max_pool2d(self.conv2(x), 2)))
        return self.head(x.flatten(1))


class SteSign(torch.autograd.Function):
    """larq's `ste_sign`: sign with sign(0) = 1, and the gradient where |w| ≤ 1 (clip_value=1.0)."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return torch.sign(torch.sign(w) + 0.1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return grad.masked_fill(w.abs() > 1, 0.0)


class SteTern(torch.autograd.Function):
    """larq's `ste_tern(ternary_weight_networks=True)`: Δ = 0.7·mean|w|, and the gradient where |w| ≤ 1."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        threshold = 0.7 * w.abs().sum() / w.numel()
        return torch.sign(torch.sign(w + threshold) + torch.sign(w - threshold))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return grad.masked_fill(w.abs() > 1, 0.0)


class ByHand(Plain):
    """`Plain` as one writes it without the product."""

    def __init__(self, quantize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.quantize = quantize

    def forward(self, x: Tensor) -> Tensor:
        q = self.quantize
        x = F.relu(self.norm1(F.max_pool2d(F.conv2d(x, q(self.conv1.weight), padding=1), 2)))
        x = F.relu(self.norm2(F.max_pool2d(F.conv2d(x, q(self.conv2.weight), padding=1), 2)))
        return F.linear(x.flatten(1), q(self.head.weight), self.head.bias)


def train(model: nn.Module, data: Data, steps: int) -> float:
    """The fraction of the held-out digits that the model knows after some steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randint(len(data.train_labels), (64,), generator=order)
        loss = F.cross_entropy(model(data.train_inputs[batch]), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        hits = model(data.held_out_inputs).argmax(1) == data.held_out_labels
    return hits.float().mean().item()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("forward", "by_hand"), [("binarize", SteSign.apply), ("ternarize", SteTern.apply)]
)
def test_a_quantised_cnn_learns_the_digits_step_for_step_as_by_hand(
    forward: str, by_hand: Callable[[Tensor], Tensor]
) -> None:
    data = load_digits()
    torch.manual_seed(0)
    weights = ["conv*.weight", "head.weight"]
    table = read_through(forward, "clipped_straight_through", weights)
    gm = fg.transform(Plain(), table)
    torch.manual_seed(0)
    reference = ByHand(by_hand)
    accuracy = train(gm, data, steps=80)
    assert accuracy == train(reference, data, steps=80)
    for actual, expected in zip(gm.parameters(), reference.parameters(), strict=True):
        assert torch.equal(actual, expected)
    assert accuracy > 0.8  # chance is 0.1
    assert torch.equal(gm(data.held_out_inputs), reference(data.held_out_inputs))


def test_a_learnt_step_follows_its_parameter_in_a_block() -> None:
    def gradients(converted: bool) -> list[Any]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        table = fg.RuleTable(
            [fg.on(parameter="weight").backward(fg.quantizers.lsq(per_channel=True))]
        )
        with fg.use(table, model=model) as block:
            model(torch.ones(2, 4)).sum().backward()
            (step,) = (r.bound["step"] for d in fg.report(block).decisions for r in d.rules)
            step.grad = model.weight.grad = None
            if converted:
                model.to(torch.bfloat16)
            y = model(torch.linspace(-1, 1, 8, dtype=model.weight.dtype).view(2, 4))
            y.square().sum().backward()
            (now,) = (r.bound["step"] for d in fg.report(block).decisions for r in d.rules)
        assert now is step
        assert step.dtype == step.grad.dtype == model.weight.dtype
        return [step.detach(), step.grad]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
