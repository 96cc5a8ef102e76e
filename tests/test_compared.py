"""`compare`: its measures against NumPy, its gradients against a model that is written by hand."""

from __future__ import annotations

import json
import math
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import freegrad_fx as fg
import models
from freegrad_fx.compared import Statistic


class Net(nn.Module):
    """Has random numbers, buffers, a call in place, and a functional call."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout(p)
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.dropout(self.relu(self.norm(self.first(x))))))


def make(p: float = 0.5) -> Net:
    torch.manual_seed(0)
    return Net(p).double()


def sample(seed: int = 1) -> Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).double()


CLASSES = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def by_hand(relu: Any, seed: int, x: Tensor) -> dict[str, np.ndarray]:
    """The gradients of the parameters and at the input of ReLU and of GELU."""
    model, kept = make(), {}
    torch.manual_seed(seed)
    hidden = model.norm(model.first(x))
    after = model.dropout(relu(hidden))
    kept = {"relu:relu[0]": hidden, "<root>:gelu[0]": after, **dict(model.named_parameters())}
    loss = F.cross_entropy(model.second(F.gelu(after)), CLASSES)
    found = torch.autograd.grad(loss, list(kept.values()))
    return {name: g.flatten().numpy() for name, g in zip(kept, found, strict=True)}


def measured(g: np.ndarray, r: np.ndarray) -> dict[str, float]:
    return {
        "cosine": g @ r / np.linalg.norm(g) / np.linalg.norm(r),
        "norm_ratio": np.linalg.norm(r) / np.linalg.norm(g),
        "sign_agreement": np.mean(np.sign(g) == np.sign(r)),
        "zeroed": np.mean(r[g != 0] == 0),
        "nonfinite": np.mean(~np.isfinite(r)),
    }


def test_the_measures_are_those_of_gradients_by_hand() -> None:
    found = fg.compare(
        make(),
        [{"relu": fg.rules.fast_sigmoid(slope=2.0)}, ("clipped", {"relu": "rectangular"})],
        [sample(1), sample(2)],
        [CLASSES, CLASSES],
        seeds=[3, 5, 7],
    )
    rules = {
        "{'relu': fast_sigmoid(slope=2.0)}": models.fast_sigmoid(2.0),
        "clipped": lambda g, x: g * ((x >= -0.5) & (x <= 0.5)),
    }
    assert found.tables == tuple(rules)
    assert (found.batches, found.seeds, found.notes) == (2, (3, 5, 7), ())
    names = [n for n, _ in make().named_parameters()]
    sites = ["relu:relu[0]", "<root>:gelu[0]"]
    assert [row.name for row in found.rows] == [*names, *sites] * 2
    for row in found.rows:
        if row.name == "first.bias":  # zero but for rounding, before a batch norm
            continue
        ruled = models.naive(F.relu, rules[row.table])
        each = [
            measured(by_hand(F.relu, seed, x)[row.name], by_hand(ruled, seed, x)[row.name])
            for x in (sample(1), sample(2))
            for seed in (3, 5, 7)
        ]
        for measure in each[0]:
            statistic, values = getattr(row, measure), [e[measure] for e in each]
            assert statistic.count == 6
            assert statistic.mean == pytest.approx(np.mean(values), abs=1e-9)
            assert statistic.std == pytest.approx(np.std(values), abs=1e-9)


def test_native_rules_agree_in_everything() -> None:
    found = fg.compare(make(), [{}, {"activations": None}], sample(), CLASSES)
    assert len(found.rows) == 2 * 8
    for row in found.rows:
        assert row.cosine.mean == pytest.approx(1.0)
        assert (row.norm_ratio.mean, row.sign_agreement.mean) == (1.0, 1.0)
        assert (row.zeroed.mean, row.nonfinite.mean) == (0.0, 0.0)


def test_rules_of_parameters_and_operands_are_compared_too() -> None:
    table = fg.RuleTable(
        [
            fg.on(parameter="second.weight").backward("scale", s=-3.0),
            fg.on("gelu", at="output").backward("scale", s=2.0),
        ]
    )
    rows = {row.name: row for row in fg.compare(make(), table, sample(), CLASSES).rows}
    weight = rows["second.weight"]
    assert (weight.cosine.mean, weight.norm_ratio.mean) == (pytest.approx(-1), pytest.approx(3))
    assert weight.sign_agreement.mean == 0.0
    assert rows["<root>:gelu[0]"].norm_ratio.mean == pytest.approx(2.0)
    assert rows["second.bias"].norm_ratio.mean == 1.0


def test_a_transformed_model_is_compared_with_its_native_backward() -> None:
    table = {"relu": fg.rules.fast_sigmoid(slope=2.0)}
    expected = fg.compare(make(), table, sample(), CLASSES)
    found = fg.compare(fg.transform(make(), table), None, sample(), CLASSES)
    assert found.tables == ("its rules",)
    assert "Give the original and its rules" in found.notes[0]
    for a, b in zip(found.rows, expected.rows, strict=False):
        assert (a.name, a.cosine.mean) == (b.name, pytest.approx(b.cosine.mean))
    assert {row.kind for row in found.rows} == {"parameter"}


@pytest.mark.filterwarnings("ignore:full_jam got no site")
def test_a_compiled_model_and_blocks_around_change_nothing() -> None:
    expected = fg.compare(make(), "d(Linear)", sample(), CLASSES).to_dict()
    compiled = torch.compile(make(), backend="eager")
    assert fg.compare(compiled, "d(Linear)", sample(), CLASSES).to_dict() == expected
    with fg.use("full_jam"), torch.no_grad():
        assert fg.compare(make(), "d(Linear)", sample(), CLASSES).to_dict() == expected


def test_nothing_is_left_behind() -> None:
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    fg.compare(model, ["full_jam", "d(Linear)"], sample(), CLASSES, seeds=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training


def test_random_rules_differ_from_seed_to_seed_alone() -> None:
    def found(seeds: Any) -> Statistic:
        rows = fg.compare(make(p=0.0), "full_jam", sample(), CLASSES, seeds=seeds).rows
        return rows[0].cosine

    assert found([1]) == found([1])
    assert found([1]).mean != found([2]).mean
    assert found([1, 2]).std == pytest.approx(abs(found([1]).mean - found([2]).mean) / 2)


def test_losses() -> None:
    model, x, y = (
        nn.Sequential(nn.Linear(4, 3), nn.ReLU()).double(),
        sample(),
        torch.ones(8, 3).double(),
    )
    of_mean = fg.compare(model, "d(Linear)", x, y)
    given = fg.compare(model, "d(Linear)", x, y, lambda output, t: ((output - t) ** 2).mean())
    without = fg.compare(model, "d(Linear)", x, loss=lambda output: ((output - 1) ** 2).mean())
    for other in (given, without):
        for a, b in zip(of_mean.rows, other.rows, strict=True):
            assert a.cosine.mean == pytest.approx(b.cosine.mean)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, a: Tensor, b: Tensor) -> Any:
            return types.SimpleNamespace(loss=F.mse_loss(self.layers(a), b))

    for batch in ((x, y), {"b": y, "a": x}):
        own = fg.compare(Own(), "d(Linear)", batch)
        assert own.rows[0].cosine.mean == pytest.approx(of_mean.rows[0].cosine.mean)


def test_a_gradient_that_overflows_is_counted() -> None:
    model = nn.Linear(2, 2)
    found = fg.compare(
        model, {"params": fg.rules.scale(s=math.inf)}, torch.ones(3, 2), torch.ones(3, 2)
    )
    assert found.rows[0].nonfinite.mean == 1.0
    assert (found.rows[0].cosine.count, str(found.rows[0].cosine)) == (0, "-")
    assert json.loads(found.to_json())["rows"][0]["cosine"]["mean"] is None


def test_the_text_and_the_notebook_view() -> None:
    found = fg.compare(make(), "d(Linear)", sample(), CLASSES, seeds=2)
    text = found.to_text(width=0)
    assert text.startswith("Net: gradients beside the native ones, 1 batch, 2 seeds")
    assert "table      kind       name" in text
    assert "second.bias" in text
    assert "0 ± 0" in text
    assert max(map(len, found.to_text(width=90).splitlines())) <= 90
    assert ">second.weight</td>" in found._repr_html_()
    assert str(found) == found.to_text()


def test_the_picture() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    found = fg.compare(make(), ["d(Linear)", "fast_sigmoid"], sample(), CLASSES, seeds=2)
    axes = found.plot("norm_ratio")
    assert [text.get_text() for text in axes.get_xticklabels()] == [
        name for name, _ in make().named_parameters()
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(found.tables)
    assert axes.get_ylabel() == "norm ratio"
    _, other = pyplot.subplots()
    assert found.plot(kind="site", ax=other) is other
    assert len(other.get_xticklabels()) == 2
    pyplot.close("all")
    with pytest.raises(ValueError, match="cosine"):
        found.plot("cosin")
    with pytest.raises(ValueError, match="parameter"):
        found.plot(kind="weights")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": F.relu}, TypeError, "model has to be an nn.Module"),
        ({"rules": None}, TypeError, "is for a transformed model"),
        ({"rules": ["guided", "guided"]}, ValueError, "two tables have the name 'guided'"),
        ({"rules": [(1, "guided")]}, TypeError, "has to be text"),
        ({"rules": "guide"}, fg.RuleError, "guided"),
        ({"inputs": []}, ValueError, "empty list"),
        ({"inputs": [sample()], "targets": []}, ValueError, "1 batches and 0 targets"),
        ({"seeds": 0}, ValueError, "seeds has to be"),
        ({"targets": None}, ValueError, r"a tensor of shape \(8, 3\).*loss=lambda output: "),
        (
            {"loss": lambda y, t: 1.0},
            ValueError,
            "the loss returned 1.0.*loss=lambda output, targets",
        ),
        ({"targets": "classes"}, ValueError, "loss=lambda output, targets"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"model": make(), "rules": "guided", "inputs": sample(), "targets": CLASSES, **change}
    with pytest.raises(error, match=message):
        fg.compare(**given)


def test_rules_for_a_transformed_model_are_refused() -> None:
    with pytest.raises(TypeError, match="is transformed already"):
        fg.compare(fg.transform(make(), "guided"), "guided", sample(), CLASSES)


def test_what_has_a_gradient_only_under_a_table_is_compared() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x) > 0).float())

    x, y = torch.randn(4, 3), torch.randn(4, 2)
    rows = {r.name: r for r in fg.compare(Steps(), {"comparison": "fast_sigmoid"}, x, y).rows}
    assert rows["a.weight"].cosine.count == 0  # the native gradient is zero
    assert rows["b.weight"].cosine.mean == pytest.approx(1.0)
    last = nn.Sequential(nn.Linear(3, 3), fg.Activation("heaviside"))
    found = fg.compare(last, {"heaviside": "fast_sigmoid"}, x, loss=lambda output: output.sum())
    assert {row.name for row in found.rows} >= {"0.weight", "0.bias"}


def test_a_buffer_that_the_model_assigns_is_restored() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return self.linear(x).relu()

    model = Counts()
    fg.compare(model, "d(Linear)", torch.ones(3, 2), torch.ones(3, 1), seeds=2)
    assert model.count == 0
