"""Training and evaluation: a transformed model is in the mode that its modules are in, as the original is.

The original is the oracle for the forward and for native gradients; rules are compared with a model edited by hand.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import freegrad_fx as fg
import models
import runs
from freegrad_fx.capture.symbolic import MAX_VARIANTS
from models import edited_by_hand
from runs import assert_same_forward, assert_same_gradients, differs, run

NATIVE: dict[str, None] = {"activations": None}
RECTANGULAR = fg.rules.rectangular(a=-0.8, b=1.2)
BY_HAND = models.rectangular(-0.8, 1.2)


class Block(nn.Module):
    """Dropout by function and by module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.act, self.dropout = nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.act(self.linear(x)))
        x = F.dropout(x, p=0.4, training=self.training)
        return F.dropout(x, 0.2, self.training, False)


class OnlyFunctionalDropout(nn.Module):
    """Case 15."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.dropout(self.linear(x), training=self.training))


class Normalised(nn.Module):
    """A batch norm by function, whose statistics are updated in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x))
        norm = self.norm
        x = F.batch_norm(F.relu(x), norm.running_mean, norm.running_var, training=self.training)
        return F.relu(x - 0.2)


class RootBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.training:
            return F.relu(self.b(x)) * 2
        return F.silu(self.b(x) + x)


class PartBranches(nn.Module):
    """A part that returns more in training than in evaluation, as auxiliary classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = RootBranches(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.head(self.backbone(x)))


class TwoPartsBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = RootBranches(), RootBranches()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


class Negated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.backbone = nn.Linear(6, 6), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.backbone(self.a(x))
        if not self.training:
            x = F.relu(x) + 1
        return F.dropout(F.silu(x), 0.5, not self.training)


class WithAFlag(nn.Module):
    def __init__(self, flag: bool = True) -> None:
        super().__init__()
        self.a, self.flag = nn.Linear(6, 6), flag

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training and self.flag:
            x = F.relu(x)
        if self.flag and not self.training:
            x = F.silu(x) * 2
        return F.gelu(x) if (self.training or not self.flag) else F.relu(x - 0.1)


class Conditional(nn.Module):
    """The flag in a conditional expression, as a number, and handed on."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) * (2.0 if self.training else 3.0)
        x = self.helper(x, self.training)
        return F.relu(x + self.training)

    def helper(self, x: Tensor, training: bool) -> Tensor:
        return F.silu(x) if training else F.gelu(x)


class ComparedByIdentity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.training is True:
            x = x + 1
        return x if self.training is False else F.silu(x)


class ComparedByEquality(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.training == True:  # noqa: E712
            x = x + 1
        return x if self.training != True else F.silu(x)  # noqa: E712


class AsAKey(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu({True: self.a, False: self.b}[self.training](x))


class AsANumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x)) * (1 + int(self.training))


class StochasticDepth(nn.Module):
    """Drops whole samples of a residual branch, in training."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import StochasticDepth as Drop

        self.a, self.drop = nn.Linear(6, 6), Drop(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.relu(self.a(x)))


class DropPath(nn.Module):
    """The same as timm writes it: a branch, and a random tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop_prob = nn.Linear(6, 6), 0.5

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        if self.drop_prob == 0.0 or not self.training:
            return x + h
        keep = 1 - self.drop_prob
        mask = h.new_empty((h.shape[0],) + (1,) * (h.ndim - 1)).bernoulli_(keep)
        return x + h * mask.div_(keep)


class GoesThroughModules(nn.Module):
    """`modules()` and `train` used on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return F.relu(x)


MODELS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        Block, OnlyFunctionalDropout, Normalised, RootBranches, PartBranches, TwoPartsBranch, Negated, WithAFlag,
        Conditional, StochasticDepth, DropPath, GoesThroughModules,
    )
}  # fmt: skip
MODELS["WithAFlag(False)"] = lambda: WithAFlag(False)

MODEL = pytest.mark.parametrize("name", MODELS)
CAPTURED_IN = pytest.mark.parametrize("captured_in", ["train", "eval"])

WAYS: dict[str, Callable[[Any], Any]] = {
    "as it is": lambda gm: gm,
    "deepcopy": copy.deepcopy,
    "pickle": lambda gm: pickle.loads(pickle.dumps(gm)),
}


def sample() -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(2))


def modes_of(model: nn.Module) -> list[Callable[[nn.Module], Any]]:
    """The whole in train and in eval mode, there and back; then every part alone."""
    steps: list[Callable[[nn.Module], Any]] = [
        lambda m: m.train(),
        lambda m: m.eval(),
        lambda m: m.train(),
    ]
    parts = [path for path, _ in model.named_modules() if path]
    for path in parts:
        steps.append(lambda m, path=path: m.train().get_submodule(path).eval())
        steps.append(lambda m, path=path: m.eval().get_submodule(path).train())
    return steps


@pytest.mark.sampled(6)
@pytest.mark.parametrize("way", WAYS)
@CAPTURED_IN
@MODEL
def test_every_mode_of_every_part_is_the_original_s(name: str, captured_in: str, way: str) -> None:
    model = MODELS[name]()
    model.train(captured_in == "train")
    native = WAYS[way](fg.transform(model, NATIVE))
    with_rule = WAYS[way](fg.transform(model, RECTANGULAR))
    x = sample()
    for step in modes_of(model):
        for m in (model, native, with_rule):
            step(m)
        expected = run(model, x)
        for m in (native, with_rule):
            assert_same_forward(run(m, x), expected)
        assert_same_gradients(run(native, x), expected)
        with edited_by_hand(model, BY_HAND) as reference:
            by_hand = run(reference, x)
        actual = run(with_rule, x)
        for gradient_name, gradient in by_hand.gradients.items():
            torch.testing.assert_close(actual.gradients[gradient_name], gradient)
        assert differs(by_hand, expected)


@MODEL
def test_the_modes_differ_here(name: str) -> None:
    """Without this, the test above proves nothing."""
    if name == "WithAFlag(False)":
        pytest.skip("this one is there to be the same in both modes")
    model = MODELS[name]()
    train, evaluate = (run(model.train(mode), sample()).outputs[0] for mode in (True, False))
    assert not torch.equal(train, evaluate)


@pytest.mark.sampled(4)
@CAPTURED_IN
@MODEL
def test_evaluation_is_deterministic(name: str, captured_in: str) -> None:
    """Case 15: no random number is drawn."""
    if name == "Negated":
        pytest.skip("this one drops in evaluation")
    model = MODELS[name]().train(captured_in == "train")
    gm = fg.transform(model, RECTANGULAR).eval()
    before = torch.get_rng_state()
    assert torch.equal(gm(sample()), gm(sample()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [ComparedByIdentity, ComparedByEquality, AsAKey, AsANumber])
def test_other_uses_of_the_flag_are_captured_or_refused(kind: Callable[[], nn.Module]) -> None:
    model, refusal = kind(), ""
    try:
        gm = fg.transform(model, RECTANGULAR)
    except fg.CaptureError as error:
        refusal = str(error)
    if refusal:
        assert "self.training" in refusal  # the line that cannot be followed
        return
    for training in (True, False):
        assert_same_forward(run(gm.train(training), sample()), run(model.train(training), sample()))


@CAPTURED_IN
def test_a_frozen_part_updates_no_statistics(captured_in: str) -> None:
    model = nn.Sequential(Normalised(), Normalised()).train(captured_in == "train")
    gm = fg.transform(model, RECTANGULAR).train()
    gm.get_submodule("0").eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gm(sample())
    changed = {name for name, b in model.named_buffers() if not torch.equal(b, before[name])}
    assert changed == {
        f"1.norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")
    }


class Spiking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 6), nn.Linear(6, 3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(self.act(self.a(x)), 0.5, self.training))


def test_a_surrogate_has_the_same_gradient_in_evaluation() -> None:
    """Case 16: of the derivative, nothing depends on the mode (the dropout aside, which is switched off here)."""
    model = Spiking()
    rule = fg.rules.fast_sigmoid(slope=5.0)(forward="heaviside")
    gm = fg.transform(model, {"relu": rule})
    step = models.naive(lambda x: (x > 0).to(x.dtype), models.fast_sigmoid(5.0))
    x = sample()
    leaves = list(model.parameters())
    expected = torch.autograd.grad(runs.loss([model.b(step(model.a(x)))]), leaves)
    gm.eval()
    actual = torch.autograd.grad(runs.loss([gm(x)]), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    assert actual[0].abs().max() > 0
    gm.train()
    torch.manual_seed(1)
    trained = torch.autograd.grad(runs.loss([gm(x)]), leaves)
    torch.manual_seed(1)
    dropped = model.b(F.dropout(step(model.a(x)), 0.5))
    for a, e in zip(trained, torch.autograd.grad(runs.loss([dropped]), leaves), strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["RootBranches", "PartBranches", "OnlyFunctionalDropout", "Block"])
def test_compiled_in_one_piece_and_switched(name: str) -> None:
    model = MODELS[name]()
    compiled = torch.compile(
        fg.transform(model, RECTANGULAR), fullgraph=True, backend="aot_eager", dynamic=False
    )
    eager = fg.transform(model, RECTANGULAR)
    x = sample()
    for training in (True, False, True):
        torch.manual_seed(1)
        actual = compiled.train(training)(x)
        torch.manual_seed(1)
        expected = eager.train(training)(x)
        torch.testing.assert_close(actual, expected)
        leaves = list(model.parameters())
        with edited_by_hand(model.train(training), BY_HAND) as reference:
            torch.manual_seed(1)
            by_hand = torch.autograd.grad(runs.loss([reference(x)]), leaves)
        for a, e in zip(torch.autograd.grad(runs.loss([actual]), leaves), by_hand, strict=True):
            torch.testing.assert_close(a, e)


def test_the_report_says_which_sites_are_in_which_mode() -> None:
    plan = fg.report(fg.transform(RootBranches(), RECTANGULAR))
    assert [(d.site.op, d.modes) for d in plan.decisions] == [
        ("relu", ""),
        ("relu", "train"),
        ("silu", "eval"),
    ]
    part = fg.report(fg.transform(PartBranches(), RECTANGULAR))
    assert [(d.site.path, d.site.op, d.modes) for d in part.decisions] == [
        ("backbone", "relu", ""),
        ("backbone", "relu", "train"),
        ("", "relu", ""),
        ("backbone", "silu", "eval"),
    ]


def test_both_kinds_of_branches_are_captured_once_each() -> None:
    def graphs(kind: Callable[[], nn.Module]) -> int:
        return len(fg.transform(kind(), RECTANGULAR).variants)

    assert graphs(Block) == graphs(OnlyFunctionalDropout) == 1
    assert graphs(RootBranches) == graphs(PartBranches) == 2
    assert graphs(TwoPartsBranch) == 4


class Switches(nn.Module):
    """Parts that branch on their flags, each by itself; and one that does so where all of them are in train mode."""

    def __init__(self, parts: int, last: bool) -> None:
        super().__init__()
        self.linear, self.last = nn.Linear(6, 6), last
        self.parts = nn.ModuleList(Switch() for _ in range(parts))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        for part in self.parts:
            x = part(x)
        if self.last and all(part.training for part in self.parts) and self.training:
            x = F.silu(x)
        return x


class Switch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + 0.5) if self.training else torch.tanh(x)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("parts", "last", "variants"),
    [(4, False, MAX_VARIANTS), (4, True, 2), (5, False, 2)],
    ids=["as many as are allowed", "one more", "twice as many"],
)
def test_a_graph_for_every_mode_up_to_a_number_and_beyond_it_for_both_modes_alone(
    parts: int, last: bool, variants: int
) -> None:
    model = Switches(parts, last)
    gm = fg.transform(model, {"activations": None})
    assert len(gm.variants) == variants
    for training in (True, False):
        assert torch.equal(gm.train(training)(sample()), model.train(training)(sample()))
    model.train().parts[1].eval()
    gm.train().get_submodule("parts.1").eval()
    if variants == 2:
        with pytest.raises(fg.CaptureError, match="Put these modules in the same mode"):
            gm(sample())
    else:
        assert torch.equal(gm(sample()), model(sample()))


def test_a_mode_set_while_training_goes_on() -> None:
    """An optimizer, a frozen part, and both modes in turns: the same parameters as the original, edited by hand."""
    model = PartBranches()
    twin = copy.deepcopy(model)
    gm = fg.transform(model, RECTANGULAR)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, twin)]
    with edited_by_hand(twin, BY_HAND) as reference:
        for round_ in range(4):
            for m, optimizer in zip((gm, reference), optimizers, strict=True):
                m.train()
                m.backbone.train(round_ % 2 == 0)
                optimizer.zero_grad()
                m(sample()).square().sum().backward()
                optimizer.step()
                m.eval()
                with torch.no_grad():
                    m(sample())
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
