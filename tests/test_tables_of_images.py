"""The ready tables for convolutional networks and for training, against networks written by hand, and zennit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import freegrad_fx as fg
import models

EPSILON = 1e-6


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=bias)
        self.second = nn.Conv2d(4, 5, 3, stride=2, bias=bias)
        self.head = nn.Linear(5, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        return self.head(F.relu(self.second(x)).flatten(1))


def make(bias: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(bias).double().eval()


X = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double().clamp(-2, 2)
INDEX = torch.tensor([0, 3, 1])


def stable(z: Tensor) -> Tensor:
    return z + EPSILON * torch.where(z >= 0, 1.0, -1.0).double()


# --- relevance by hand: each layer as a matrix ---


def matrix(layer: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The weight of a linear operation for one sample as a matrix, and its bias."""
    zero = torch.zeros_like(x)
    bias = layer(zero[None])[0].flatten()
    w = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0].flatten(), zero)
    return w.flatten(1), bias


def by_epsilon(w: Tensor, b: Tensor, x: Tensor, relevance: Tensor) -> Tensor:
    return x * (w.T @ (relevance / stable(w @ x + b)))


def by_zplus(w: Tensor, b: Tensor, x: Tensor, relevance: Tensor) -> Tensor:
    parts = (w * x).clamp(min=0)
    return parts.T @ (relevance / stable(parts.sum(1) + b.clamp(min=0)))


def by_alpha_beta(w: Tensor, b: Tensor, x: Tensor, relevance: Tensor) -> Tensor:
    up, down = (w * x).clamp(min=0), (w * x).clamp(max=0)
    raising = up.T @ (relevance / stable(up.sum(1) + b.clamp(min=0)))
    return 2 * raising - down.T @ (relevance / stable(down.sum(1) + b.clamp(max=0)))


def by_gamma(w: Tensor, b: Tensor, x: Tensor, relevance: Tensor) -> Tensor:
    positive = w + 0.25 * w.clamp(min=0), b + 0.25 * b.clamp(min=0)
    # the inputs of these layers are not negative
    z = positive[0] @ x + positive[1]
    negative = w + 0.25 * w.clamp(max=0), b + 0.25 * b.clamp(max=0)
    other = negative[0] @ x + negative[1]
    y = w @ x + b
    found = x * (positive[0].T @ ((y > 0) * relevance / stable(z)))
    return found + x * (negative[0].T @ ((y < 0) * relevance / stable(other)))


def by_box(w: Tensor, b: Tensor, x: Tensor, relevance: Tensor) -> Tensor:
    low, high = -2.0 * torch.ones_like(x), 2.0 * torch.ones_like(x)
    up, down = w.clamp(min=0), w.clamp(max=0)
    z = w @ x + b - up @ low - b.clamp(min=0) - down @ high - b.clamp(max=0)
    s = relevance / stable(z)
    return x * (w.T @ s) - low * (up.T @ s) - high * (down.T @ s)


def by_hand(model: Net, first: Any, second: Any) -> Tensor:
    """The relevance of the input of each sample for its class."""
    found = []
    for x, index in zip(X, INDEX, strict=True):
        hidden = F.relu(model.first(x[None]))
        pooled, where = F.max_pool2d(hidden, 2, return_indices=True)
        last = F.relu(model.second(pooled))[0].flatten()
        y = model.head(last)
        relevance = torch.zeros_like(y)
        relevance[index] = y[index]
        relevance = by_epsilon(model.head.weight, model.head.bias, last, relevance)
        w, b = matrix(model.second, pooled[0])
        relevance = second(w, b, pooled.flatten(), relevance)
        relevance = F.max_unpool2d(relevance.view_as(pooled), where, 2)
        w, b = matrix(model.first, x)
        found.append(first(w, b, x.flatten(), relevance.flatten()).view_as(x))
    return torch.stack(found).detach()


@pytest.mark.parametrize(
    ("table", "first", "second"),
    [
        (fg.tables.epsilon_plus(), by_zplus, by_zplus),
        (fg.tables.epsilon_alpha2_beta1(), by_alpha_beta, by_alpha_beta),
        (fg.tables.epsilon_gamma_box(-2.0, 2.0), by_box, by_gamma),
    ],
    ids=["epsilon_plus", "epsilon_alpha2_beta1", "epsilon_gamma_box"],
)
@pytest.mark.parametrize("transformed", [False, True])
def test_relevance_of_a_network(table: Any, first: Any, second: Any, transformed: bool) -> None:
    model: Any = make()
    expected = by_hand(model, first, second)
    rules = table
    if transformed:
        model, rules = fg.transform(model, table), None
    found = fg.attribute(model, rules, X, INDEX)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["EpsilonPlus", "EpsilonAlpha2Beta1", "EpsilonGammaBox"])
def test_relevance_equals_that_of_zennit(name: str) -> None:
    composites = pytest.importorskip("zennit.composites", reason="needs the extra `peers`")
    options = {"low": -2.0, "high": 2.0} if name == "EpsilonGammaBox" else {}
    # zennit knows modules alone
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 5, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(5, 4)),
    ).double()
    table = {
        "EpsilonPlus": fg.tables.epsilon_plus,
        "EpsilonAlpha2Beta1": fg.tables.epsilon_alpha2_beta1,
        "EpsilonGammaBox": fg.tables.epsilon_gamma_box,
    }[name](**options)
    found = fg.attribute(model, table, X, INDEX)
    x = X.clone().requires_grad_()
    with getattr(composites, name)(**options).context(model) as modified:
        y = modified(x)
        relevance = torch.zeros_like(y).scatter(
            1, INDEX[:, None], y.detach().gather(1, INDEX[:, None])
        )
        (expected,) = torch.autograd.grad(y, x, relevance)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


def resnet18() -> Any:
    """With statistics as after some training."""
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


IMAGES = torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(2)).double()
IMAGES = IMAGES.clamp(-2, 2)


@pytest.mark.slow
@pytest.mark.parametrize("transformed", [False, True])
def test_batch_norms_of_a_residual_network_are_merged(transformed: bool) -> None:
    model, table = resnet18(), fg.tables.epsilon_plus()
    found = fg.attribute(
        fg.transform(model, table) if transformed else model,
        None if transformed else table,
        IMAGES,
        INDEX[:2],
    )
    for block in [model, *(m for m in model.modules() if hasattr(m, "bn2"))]:
        for number in ("1", "2") if block is not model else ("1",):
            conv, norm = getattr(block, f"conv{number}"), getattr(block, f"bn{number}")
            setattr(block, f"conv{number}", fuse_conv_bn_eval(conv, norm))
            setattr(block, f"bn{number}", nn.Identity())
        if getattr(block, "downsample", None) is not None:
            block.downsample = fuse_conv_bn_eval(*block.downsample)
    expected = fg.attribute(model, table, IMAGES, INDEX[:2])
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["EpsilonPlus", "EpsilonAlpha2Beta1", "EpsilonGammaBox"])
def test_relevance_of_resnet18_equals_that_of_zennit(name: str) -> None:
    composites = pytest.importorskip("zennit.composites", reason="needs the extra `peers`")
    from zennit.canonizers import CompositeCanonizer, SequentialMergeBatchNorm
    from zennit.layer import Sum
    from zennit.rules import Norm
    from zennit.torchvision import ResNetBasicBlockCanonizer
    from zennit.types import AvgPool

    class Merge(SequentialMergeBatchNorm):  # type: ignore[misc, unused-ignore]
        def register(self, linears: Any, batch_norm: Any) -> None:
            super().register(linears, batch_norm)
            batch_norm.eps = 0.0  # as zennit 1.0 does

    options = {"low": -2.0, "high": 2.0} if name == "EpsilonGammaBox" else {}
    tables = {
        "EpsilonPlus": fg.tables.epsilon_plus,
        "EpsilonAlpha2Beta1": fg.tables.epsilon_alpha2_beta1,
        "EpsilonGammaBox": fg.tables.epsilon_gamma_box,
    }
    model = resnet18()
    found = fg.attribute(model, tables[name](**options), IMAGES, INDEX[:2], multiply=not options)
    x = IMAGES.clone().requires_grad_()
    # In gradient space, sums and pools need no stabiliser
    plain = [(Sum, Norm(stabilizer=1e-30)), (AvgPool, Norm(stabilizer=1e-30))]
    canonizers = [CompositeCanonizer((Merge(), ResNetBasicBlockCanonizer()))]
    composite = getattr(composites, name)(canonizers=canonizers, layer_map=plain, **options)
    with composite.context(model) as modified:
        y = modified(x)
        index = INDEX[:2, None]
        relevance = torch.zeros_like(y).scatter(1, index, y.detach().gather(1, index))
        (expected,) = torch.autograd.grad(y, x, relevance)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


class Skips(nn.Module):
    """Two residual blocks with batch norms, and no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(2))
        self.head = nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + F.relu(norm(conv(x)), inplace=True)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("transformed", [False, True])
def test_skips_conserve_relevance(transformed: bool) -> None:
    torch.manual_seed(0)
    model = Skips().double().eval()
    for norm in model.norms:
        nn.init.uniform_(norm.weight, -1, 1)  # type: ignore[arg-type]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[operator, union-attr]
    expected = model(X).gather(1, INDEX[:, None])[:, 0]
    for table in (
        fg.tables.epsilon_plus(epsilon=1e-12),
        fg.tables.epsilon_alpha2_beta1(epsilon=1e-12),
    ):
        rules = None if transformed else table
        called = fg.transform(model, table) if transformed else model
        found = fg.attribute(called, rules, X, INDEX).sum((1, 2, 3))
        torch.testing.assert_close(found, expected)


def test_relevance_without_biases_is_conserved() -> None:
    model = make(bias=False)
    expected = model(X).gather(1, INDEX[:, None])[:, 0]
    for table in (
        fg.tables.epsilon_plus(epsilon=1e-12),
        fg.tables.epsilon_alpha2_beta1(epsilon=1e-12),
    ):
        found = fg.attribute(model, table, X, INDEX).sum((1, 2, 3))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("table", "rule"),
    [
        (fg.tables.guided_backprop, lambda g, x: g.clamp(min=0) * (x > 0)),
        (fg.tables.deconvnet, lambda g, x: g.clamp(min=0)),
    ],
    ids=["guided_backprop", "deconvnet"],
)
def test_gradients_at_relus(table: Any, rule: Any) -> None:
    model, x = make(), X.clone().requires_grad_()
    relu = models.naive(F.relu, rule)
    y = model.head(relu(model.second(F.max_pool2d(relu(model.first(x)), 2))).flatten(1))
    (expected,) = torch.autograd.grad(y.gather(1, INDEX[:, None]).sum(), x)
    found = fg.attribute(model, table(), X, INDEX, multiply=False)
    torch.testing.assert_close(found, expected)


def test_feedback_alignment_changes_the_gradients_below_the_last_layer() -> None:
    model = make()
    native = torch.autograd.grad(model(X).sum(), list(model.parameters()))
    gm = fg.transform(model, fg.tables.feedback_alignment())
    found = torch.autograd.grad(gm(X).sum(), list(gm.parameters()))
    names = [name for name, _ in model.named_parameters()]
    same = {n for n, a, b in zip(names, native, found, strict=True) if torch.equal(a, b)}
    assert same == {"head.weight", "head.bias"}
    again = torch.autograd.grad(gm(X).sum(), list(gm.parameters()))
    assert all(map(torch.equal, found, again))


@pytest.mark.parametrize(
    ("table", "levels"),
    [(fg.tables.binary_weights, 2), (fg.tables.ternary_weights, 3)],
    ids=["binary", "ternary"],
)
def test_weights_are_read_as_few_values(table: Any, levels: int) -> None:
    gm = fg.transform(make(), table(scale=False))
    forwards = {d.site.name: d.forward for d in fg.report(gm).decisions if d.forward is not None}
    assert sorted(forwards) == ["first.weight", "head.weight", "second.weight"]
    plain = make()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if name.endswith("weight"):
                delta = 0.7 * parameter.abs().mean()
                kept = parameter.sign() * (1.0 if levels == 2 else (parameter.abs() > delta))
                parameter.copy_(kept)
    torch.testing.assert_close(gm(X), plain(X))


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_are_read_as_levels_with_learnt_steps(per_channel: bool) -> None:
    gm = fg.transform(make(), fg.tables.lsq(3, per_channel=per_channel))
    plain, steps = make(), {}
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith("weight"):
                dims = tuple(range(per_channel, weight.dim()))
                steps[f"{name}/lsq.step"] = step = 2 * weight.abs().mean(dims, True) / 3**0.5
                weight.copy_((weight / step).clamp(-4, 3).round() * step)
    y = gm(X)
    torch.testing.assert_close(y, plain(X))
    found = gm.rule_state_dict()
    assert sorted(found) == sorted(steps)
    for name, step in found.items():
        torch.testing.assert_close(step.flatten(), steps[name].flatten())
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in gm.parameters())
    with pytest.raises(fg.RuleError, match="from 2 to 16, got 1"):
        fg.tables.lsq(1)
