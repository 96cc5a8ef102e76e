"""`attribute`: value times gradient, with the backward of a table, against the same few lines written by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import freegrad_fx as fg
import models


class Small(nn.Module):
    """A network with a functional call, a call in place, and a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 * 6 * 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        x = self.relu(self.second(x))
        return self.head(F.gelu(x).flatten(1))


def make() -> Small:
    torch.manual_seed(0)
    return Small().double().eval()


def sample(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1)).double()


def guided_by_hand(model: Small, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient × value of the input and of the first convolution, with guided backpropagation at the ReLUs."""
    guided = models.naive(F.relu, lambda g, x: g.clamp(min=0) * (x > 0))
    x = x.clone().requires_grad_()
    first = model.conv(x)
    hidden = guided(model.second(guided(first)))
    logits = model.head(F.gelu(hidden).flatten(1))
    score = logits.gather(1, index[:, None]).sum()
    of_x, of_first = torch.autograd.grad(score, [x, first])
    return (of_x * x).detach(), (of_first * first).detach()


INDEX = torch.tensor([1, 0, 4, 2])


@pytest.mark.parametrize("batch_size", [None, 1, 3, 4, 9])
@pytest.mark.parametrize("transformed", [False, True])
def test_the_input_and_an_activation(transformed: bool, batch_size: int | None) -> None:
    model: Any = make()
    expected = guided_by_hand(model, sample(), INDEX)
    rules: Any = {"relu": "guided"}
    if transformed:
        model, rules = fg.transform(model, rules), None
    for at, wanted in zip((None, "conv"), expected, strict=True):
        found = fg.attribute(model, rules, sample(), INDEX, at=at, batch_size=batch_size)
        torch.testing.assert_close(found, wanted)
    both = fg.attribute(model, rules, sample(), INDEX, at=["conv", "relu"], batch_size=batch_size)
    torch.testing.assert_close(both["conv"], expected[1])
    assert [r.shape for r in both["relu"]] == [(4, 4, 6, 6)] * 2


@pytest.mark.parametrize(
    ("target", "index"),
    [
        (2, [2, 2, 2, 2]),
        (-1, [4, 4, 4, 4]),
        (INDEX, [1, 0, 4, 2]),
        (INDEX.int(), [1, 0, 4, 2]),
        (lambda y: y[:, 3], [3, 3, 3, 3]),
        (lambda y: y[:, 3].sum(), [3, 3, 3, 3]),
    ],
)
def test_targets(target: Any, index: list[int]) -> None:
    expected, _ = guided_by_hand(make(), sample(), torch.tensor(index))
    torch.testing.assert_close(fg.attribute(make(), {"relu": "guided"}, sample(), target), expected)


def test_without_a_target_the_class_with_the_largest_output_is_explained() -> None:
    index = make()(sample()).argmax(1)
    assert len(index.unique()) > 1
    expected, _ = guided_by_hand(make(), sample(), index)
    torch.testing.assert_close(fg.attribute(make(), {"relu": "guided"}, sample()), expected)


def test_the_gradient_alone() -> None:
    relevance = fg.attribute(make(), "guided", sample(), 1)
    gradient = fg.attribute(make(), "guided", sample(), 1, multiply=False)
    torch.testing.assert_close(gradient * sample(), relevance)


def test_native_relevance_of_a_network_without_biases_sums_to_the_output() -> None:
    model = make()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    rules = {"gelu": "identity_rule"}  # g·y/x
    relevance = fg.attribute(model, rules, sample(), INDEX)
    expected = model(sample()).gather(1, INDEX[:, None])[:, 0]
    torch.testing.assert_close(relevance.sum((1, 2, 3)), expected)


def test_nothing_is_left_behind() -> None:
    model, x = make(), sample()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():  # as an evaluation is written
        fg.attribute(model, "guided", x, 0, at="conv")
    assert torch.equal(x, sample())
    assert not x.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_writes_into_its_input() -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2).relu_()

    x = torch.tensor([[1.0, -2.0, 3.0]])
    assert fg.attribute(Writes(), "d(Linear)", x, 1).tolist() == [[0.0, -4.0, 0.0]]
    assert x.tolist() == [[1.0, -2.0, 3.0]]


class Several(nn.Module):
    def forward(self, a: Tensor, mask: Any, b: Tensor, scale: float = 1.0) -> Any:
        return type("Output", (), {"logits": (a * mask + b * b) * scale})


def test_several_arguments() -> None:
    a, mask, b = torch.randn(3, 2), torch.tensor([[1, 0]] * 3), torch.randn(3, 2)
    ones = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    expected = (a * mask * ones, None, 2 * b * b * ones)
    for size in (None, 2):
        found = fg.attribute(Several(), None, (a, mask, b), 0, batch_size=size)
        assert found[1] is None
        torch.testing.assert_close(found[0], expected[0])
        torch.testing.assert_close(found[2], expected[2])
        named = {"a": a, "mask": mask, "b": b, "scale": 3.0}
        named = fg.attribute(Several(), None, named, 0, batch_size=size)
        assert list(named) == ["a", "mask", "b", "scale"]
        assert named["scale"] is named["mask"] is None
        torch.testing.assert_close(named["b"], 3 * expected[2])


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens).cumsum(1)
        return self.head(F.relu(hidden))


def test_the_embedding_of_a_language_model() -> None:
    model, tokens = Words(), torch.tensor([[1, 5, 2], [0, 3, 3]])
    found = fg.attribute(model, None, tokens, 2, at="embed")
    value = model.embed.weight.detach()[tokens].requires_grad_()
    score = model.head(F.relu(value.cumsum(1)))[:, -1, 2].sum()
    (gradient,) = torch.autograd.grad(score, value)
    torch.testing.assert_close(found, (gradient * value).detach())
    with pytest.raises(ValueError, match=r"such as the embedding: at='embed'"):
        fg.attribute(model, None, tokens, 2)


def test_what_the_score_does_not_depend_on_has_no_relevance() -> None:
    found = fg.attribute(
        Several(), None, (torch.ones(1, 2), 0.0, torch.ones(1, 2)), lambda y: y.logits * 0
    )
    assert found[0].tolist() == [[0.0, 0.0]]


def test_no_samples() -> None:
    for size in (None, 2):
        found = fg.attribute(make(), "guided", sample(0), 1, batch_size=size)
        assert found.shape == (0, 3, 6, 6)


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    fg.attribute(make(), "guided", sample(), 1, batch_size=2, progress=True)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": F.relu}, TypeError, "model has to be an nn.Module, got function"),
        ({"model": "transformed"}, TypeError, "is transformed already"),
        ({"inputs": [sample()]}, TypeError, "inputs has to be a tensor, a tuple"),
        ({"inputs": ()}, ValueError, "no tensor with a batch dimension"),
        ({"inputs": sample().long()}, ValueError, "no input is a tensor of floating-point"),
        ({"target": 5}, ValueError, "has only 5 classes"),
        ({"target": torch.tensor([0, 1])}, ValueError, "one for each of the samples"),
        ({"target": 1.5}, TypeError, "target has to be the index"),
        ({"target": lambda y: 1.0}, TypeError, "target returned float"),
        ({"at": "con"}, ValueError, "conv"),
        ({"at": []}, TypeError, "at has to be the path"),
        ({"at": "unused"}, ValueError, "'unused' was not called"),
        ({"at": "pair"}, ValueError, "the output of 'pair' is tuple"),
        ({"batch_size": 0}, ValueError, "batch_size has to be a whole number"),
        ({"rules": "no_such_rule"}, fg.RuleError, "no_such_rule"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Model(Small):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.pair = nn.Linear(1, 1), Pair()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.pair(x)[0])

    given = {
        "model": Model().double(),
        "rules": "guided",
        "inputs": sample(),
        "target": 1,
        **change,
    }
    if given["model"] == "transformed":
        given["model"] = fg.transform(make(), "guided")
    with pytest.raises(error, match=message):
        fg.attribute(**given)


def test_an_output_without_classes_needs_a_function() -> None:
    with pytest.raises(
        ValueError, match=r"a tensor of shape \(4,\), of which no class can be taken"
    ):
        fg.attribute(nn.Flatten(0), None, torch.randn(4), 0)


def test_arguments_of_different_sizes_are_not_split() -> None:
    arguments = (torch.randn(4, 2), 1.0, torch.randn(1, 2))
    assert fg.attribute(Several(), None, arguments, 0)[0].shape == (4, 2)
    with pytest.raises(ValueError, match=r"have the sizes 1, 4\. Leave out"):
        fg.attribute(Several(), None, arguments, 0, batch_size=2)


# --- rules that return relevance ---


class Branches(nn.Module):
    """A first layer between others, which can have a path beside it."""

    def __init__(self, beside: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.first = nn.Identity(), nn.Linear(3, 3)
        self.second, self.beside = nn.Linear(3, 2), beside

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        y = self.first(self.before(x)).relu()
        return self.second(y + x if self.beside else y) + other


BOX = fg.RuleTable([fg.on("linear", first=True).backward("lrp_zbox", low=-3.0, high=3.0)])
BATCH = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
BOTH = {"x": BATCH, "other": torch.tensor([[2.0, 3.0], [4.0, 5.0]]).double()}


@pytest.mark.parametrize("transformed", [False, True])
def test_what_a_rule_returns_as_relevance_is_not_multiplied(transformed: bool) -> None:
    plain: Any = Branches().double()
    model, rules = (fg.transform(plain, BOX), None) if transformed else (plain, BOX)
    x = BATCH.clone().requires_grad_()
    with fg.use(BOX, model=plain):
        y = plain(x, BOTH["other"])
    (relevance,) = torch.autograd.grad(y[:, 0].sum(), x)
    found = fg.attribute(model, rules, BOTH, 0)
    assert torch.equal(found["x"], relevance)
    assert found["other"].tolist() == [[2.0, 0.0], [4.0, 0.0]]
    assert torch.equal(fg.attribute(model, rules, BOTH, 0, multiply=False)["x"], relevance)
    assert torch.equal(fg.attribute(model, rules, BOTH, 0, multiply=True)["x"], relevance * BATCH)
    at = fg.attribute(model, rules, BOTH, 0, at=["before", "first"])
    assert torch.equal(at["before"], relevance)
    hidden = plain.first(BATCH).relu()
    torch.testing.assert_close(at["first"], (hidden * plain.second.weight[0]).detach())


def test_relevance_beside_gradients_is_refused() -> None:
    model = Branches(beside=True).double()
    with pytest.raises(
        ValueError, match=r"sum of relevance, which rule 'lrp_zbox' returns at site"
    ):
        fg.attribute(model, BOX, BOTH, 0)
    assert fg.attribute(model, BOX, BOTH, 0, multiply=False)["x"].shape == BATCH.shape
    with pytest.raises(ValueError, match=r"goes through rule 'lrp_flat'.* by on\(\.\.\., first"):
        fg.attribute(Branches().double(), {"linear": "lrp_flat"}, BOTH, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_model_that_returns_relevance_needs_an_answer() -> None:
    gm = torch.compile(fg.transform(Branches().double(), BOX), backend="aot_eager")
    with pytest.raises(ValueError, match="Give multiply=False if it does"):
        fg.attribute(gm, None, BOTH, 0)


# --- outputs that share memory ---


class Passes(nn.Module):
    """A module that returns its input, and a write into the one or the other."""

    def __init__(self, written: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.probe, self.written = nn.Linear(3, 3), nn.Dropout(), written

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        y = self.probe(x)
        if self.written:
            {"given": x, "returned": y}[self.written].mul_(2)
        return 3 * x + y


def test_a_module_that_returns_its_input_has_the_gradient_of_its_output() -> None:
    model = Passes("").double().eval()
    found = fg.attribute(model, None, BATCH, 0, at="probe")
    assert torch.equal(found, (model.layer(BATCH) * torch.tensor([1.0, 0.0, 0.0])).detach())


@pytest.mark.parametrize("written", ["given", "returned"])
def test_a_write_through_the_output_of_a_module_is_not_lost(written: str) -> None:
    model = Passes(written).double().eval()
    with pytest.raises(ValueError, match="Name the module that computes the tensor"):
        fg.attribute(model, None, BATCH, 0, at="probe")
    # this one has an output of its own
    found = fg.attribute(model, None, BATCH, 0, at="layer")
    assert torch.equal(found, (model.layer(BATCH) * torch.tensor([8.0, 0.0, 0.0])).detach())
