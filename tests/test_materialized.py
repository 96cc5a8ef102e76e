"""`materialize`: plain models with the weights that a replaced forward reads, beside the models that read them."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.vocabulary import binarize

X = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def tripled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 3


class Net(nn.Module):
    """A model with state of all kinds, tied weights, hooks, and a branch on its mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(64, 64, bias=False)
        self.second = nn.Linear(64, 64)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("offset", torch.tensor(0.5), persistent=False)
        self.meta = {"notes": [1, 2]}
        self.captured_images = 3

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().flatten(1)
        x = self.second(self.first(x).relu()) * self.scale + self.offset
        return x if self.training else x * 2 + torch.tensor([1.0])

    def more(self) -> str:
        return f"{type(self).__name__}"


TABLES = {
    "binary": fg.tables.binary_weights(),
    "ternary": fg.tables.ternary_weights(),
    **{
        name: fg.RuleTable([fg.on(parameter=["conv.*", "first.weight"]).backward(rule)])
        for name, rule in {
            "int4": fg.quantizers.int4(),
            "int8": fg.quantizers.int8(per_channel=False),
            "lsq": fg.quantizers.lsq(bits=3),
        }.items()
    },
}


def trained(way: str, table: fg.RuleTable) -> tuple[nn.Module, Any]:
    """A model after two steps, and what has its rules."""
    model = Net()
    if way != "example inputs":  # an export drops hooks
        model.norm.register_forward_hook(tripled)
    examples = (X,) if way == "example inputs" else None
    ruled: Any = fg.transform(model, table, example_inputs=examples) if way != "use" else model
    with fg.use(table, model=model) if way == "use" else torch.enable_grad():
        optimizer = None
        for _ in range(2):
            ruled(X).square().mean().backward()
            learnt = [*ruled.parameters()]
            optimizer = optimizer or torch.optim.SGD(learnt, lr=0.01)
            optimizer.step()
            optimizer.zero_grad()
    return model, ruled


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("way", ["transform", "example inputs", "use"])
def test_the_plain_model_computes_the_same_with_the_weights_that_were_read(
    way: str, name: str
) -> None:
    table = TABLES[name]
    model, ruled = trained(way, table)
    rules = table if way == "use" else None
    before = copy.deepcopy(model.state_dict())
    for training in (True, False):
        ruled.train(training)
        plain = fg.materialize(ruled, rules, example_inputs=X)
        assert type(plain) is Net
        assert plain.training == training
    if way == "use":
        with fg.use(table, model=model), torch.no_grad():
            expected = model(X)
    else:
        expected = ruled(X)
    assert torch.equal(plain(X), expected)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert [*plain.state_dict()] == [*before]
    assert not torch.equal(plain.state_dict()["conv.weight"], before["conv.weight"])
    assert torch.equal(plain.state_dict()["norm.weight"], before["norm.weight"])


def test_the_plain_model_is_a_whole_model_of_its_own() -> None:
    model, gm = trained("example inputs", TABLES["lsq"])
    plain: Any = fg.materialize(gm.eval())
    assert plain.first.weight is plain.second.weight
    assert plain.first.weight is not model.first.weight  # type: ignore[union-attr]
    assert {*plain.__dict__} == {*Net().__dict__}
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in Net().named_modules()]
    assert [*dict(plain.named_parameters())] == [*dict(Net().named_parameters())]
    assert [*dict(plain.named_buffers())] == ["scale", "offset", *_of_norm()]
    assert (plain.meta, plain.captured_images, plain.more()) == ({"notes": [1, 2]}, 3, "Net")
    assert plain.meta is not model.meta
    assert plain.first.weight.requires_grad
    assert plain.first.weight.unique().numel() <= 8  # three bits


def _of_norm() -> list[str]:
    return [f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")]


def test_the_weights_of_xnor_are_the_formula_of_the_paper() -> None:
    model, gm = trained("transform", TABLES["binary"])
    weight = model.conv.weight.detach()  # type: ignore[union-attr]
    expected = torch.where(weight >= 0, 1.0, -1.0) * weight.abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(fg.materialize(gm).conv.weight.detach(), expected)  # type: ignore[union-attr]


def test_it_is_exported_without_a_warning() -> None:
    _, gm = trained("transform", TABLES["binary"])
    plain = fg.materialize(gm.eval())
    exported = torch.export.export(plain, (X,)).module()
    assert torch.equal(exported(X), plain(X))
    assert torch.equal(exported(X), gm(X))


REPLACED = fg.RuleTable([fg.on("relu", module="2").backward("guided")])


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "compile", "part", "again"])
def test_copies_compiled_models_and_parts_are_taken(copied: str) -> None:
    _, gm = trained("transform", TABLES["lsq"])
    gm.eval()
    if copied == "pickle":
        file = io.BytesIO()
        torch.save(gm, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = {
            "deepcopy": copy.deepcopy,
            "compile": lambda gm: torch.compile(gm, backend="eager"),
            "again": lambda gm: fg.transform(
                nn.Sequential(nn.ReLU(), gm), {"relu": "guided"}
            ).eval(),
            "part": lambda gm: nn.Sequential(nn.Identity(), gm).eval(),
        }[copied](gm)
    plain = fg.materialize(other)
    assert torch.equal(plain(X), other(X))
    inner = plain[1] if isinstance(plain, nn.Sequential) else plain
    assert type(inner) is Net


SPIKING = {"relu": fg.rules.arctan(forward="heaviside")}


def partly(rule: str) -> nn.Module:
    """A weight of two parts, of which only one reads it through another forward, or both through different ones."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    ruled = fg.transform(first, fg.tables.binary_weights())
    second.weight = ruled.weight
    table = {
        "": None,
        "native": {"params": fg.rules.scale(s=2.0)},
        "other": fg.tables.ternary_weights(),
    }[rule]
    return nn.Sequential(ruled, second if table is None else fg.transform(second, table))


def graph() -> Any:
    return torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))


def drawn(weight: Tensor) -> Tensor:
    return weight + torch.rand_like(weight)


@pytest.mark.parametrize(
    ("model", "rules", "error", "message"),
    [
        (lambda: fg.transform(nn.Sequential(nn.ReLU()), SPIKING), None, fg.PlanError, "1?0:relu"),
        (lambda: nn.Sequential(nn.ReLU()), SPIKING, fg.PlanError, "the entry 'relu' replaces"),
        (lambda: nn.ReLU(), None, TypeError, "without rules"),
        (lambda: fg.transform(Net(), TABLES["int4"]), SPIKING, TypeError, "has its own"),
        (lambda: 3, None, TypeError, "has to be an nn.Module"),
        (lambda: partly(""), None, fg.PlanError, "'1.weight' is tied"),
        (lambda: partly("native"), None, fg.PlanError, "'1.weight' is tied"),
        (lambda: partly("other"), None, fg.PlanError, "'0.weight' is tied"),
        (
            lambda: fg.transform(graph(), fg.tables.binary_weights()),
            None,
            fg.PlanError,
            r"materialize\(model, rules\)",
        ),
    ],
)
def test_what_no_plain_model_computes_is_refused(
    model: Any, rules: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        fg.materialize(model(), rules)


def test_a_plain_model_that_computes_something_else_is_refused() -> None:
    model = fg.transform(nn.Linear(2, 2), {"params": fg.get("straight_through")(forward=drawn)})
    with pytest.raises(fg.VerificationError, match="Linear does not compute the output"):
        fg.materialize(model, example_inputs=torch.ones(1, 2))


def test_a_graph_is_taken_with_its_rules() -> None:
    traced = graph()
    plain: Any = fg.materialize(traced, fg.tables.binary_weights(), example_inputs=torch.ones(1, 2))
    weight = traced.get_submodule("0").weight
    assert torch.equal(plain.get_submodule("0").weight, binarize(weight, scale=True))
