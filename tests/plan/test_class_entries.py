"""A class as a key selects calls of modules: what no rule can act on there is refused, as early as it can be known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg
from freegrad_fx.errors import PlanError, RuleError


class First(nn.Module):
    """The first output of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)[0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 4),
        lambda: nn.GRU(4, 4),
        lambda: nn.RNN(4, 4),
        lambda: nn.LSTMCell(4, 4),
        lambda: nn.MaxPool1d(1, return_indices=True),
    ],
)
def test_a_class_that_returns_a_tuple_is_refused_when_planned(
    make: Callable[[], nn.Module],
) -> None:
    module = make()
    kind = type(module)
    with pytest.raises(PlanError, match=rf"entry '{kind.__name__}' .* returns a tuple.*module:"):
        fg.transform(First(module), {kind: "straight_through"})
    assert fg.transform(First(module), {kind: None}) is not None


def test_a_cell_that_returns_a_tensor_is_accepted() -> None:
    gm = fg.transform(nn.Sequential(nn.GRUCell(4, 4)), {nn.GRUCell: "straight_through"})
    x = torch.ones(2, 4, requires_grad=True)
    gm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.eq(1).all()


class Two(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x, x * 2


def test_a_class_of_the_user_that_returns_a_tuple_is_refused_in_the_forward() -> None:
    gm = fg.transform(First(Two()), {Two: "straight_through"})
    with pytest.raises(TypeError, match=r"'module:Two\[0\]' returned tuple.* give the class None"):
        gm(torch.ones(3, requires_grad=True))


class Derived(nn.Linear):
    pass


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.sum()


SHAPES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "Linear": (lambda: nn.Linear(4, 3), True),
    "square Linear": (lambda: nn.Linear(4, 4), False),
    "derived": (lambda: Derived(4, 3), True),
    "own forward": (lambda: Own(4, 3), False),
    "Conv1d": (lambda: nn.Conv1d(4, 3, 1), True),
    "strided Conv1d": (lambda: nn.Conv1d(4, 4, 1, stride=2), True),
    "Conv1d of the same shape": (lambda: nn.Conv1d(4, 4, 3, padding=1), False),
    "Embedding": (lambda: nn.Embedding(4, 4), True),
    "Flatten": (nn.Flatten, True),
    "MaxPool1d": (lambda: nn.MaxPool1d(2), True),
    "MaxPool1d of the same shape": (lambda: nn.MaxPool1d(3, stride=1, padding=1), False),
    "LayerNorm": (lambda: nn.LayerNorm(4), False),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_class_that_changes_the_shape_is_refused_when_planned(name: str) -> None:
    make, refused = SHAPES[name]
    module = make()
    model, rules = nn.Sequential(module), {type(module): "clip_norm"}
    if not refused:
        x = torch.randn(4, 4, 4, requires_grad=True)
        fg.transform(model, rules)(x).sum().backward()
        return
    with pytest.raises(
        PlanError, match=r"'clip_norm' .* changes the shape; at site 0:.*parameter="
    ):
        fg.transform(model, rules)


def test_a_rule_that_changes_the_shape_is_accepted() -> None:
    @fg.register("test: widened", keeps_shape=False, overwrite=True)
    def widened(grad: Tensor, x: Tensor) -> Tensor:
        """grad summed, for each entry of x"""
        return grad.sum(-1, keepdim=True).expand_as(x)

    gm = fg.transform(nn.Sequential(nn.Linear(4, 3)), {nn.Linear: widened})
    x = torch.ones(2, 4, requires_grad=True)
    gm(x).sum().backward()
    assert x.grad is not None
    assert x.grad.eq(3).all()


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1)


def test_a_class_of_the_user_that_changes_the_shape_is_refused_in_the_backward() -> None:
    gm = fg.transform(nn.Sequential(Sums()), {Sums: "clip_norm"})
    y = gm(torch.ones(2, 3, requires_grad=True))
    with pytest.raises(RuleError, match=r"'clip_norm' at site '0:Sums\[0\]'.*keeps_shape=False"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("rules", "site"),
    [({"relu": None}, r"0:relu\[0\]"), ({"params": None}, r"1\.(weight|bias)")],
)
@pytest.mark.parametrize("shape", [(3,), (5, 1, 1, 1)])
def test_a_tensor_that_does_not_fit_is_named_in_the_backward(
    rules: dict[str, Any], site: str, shape: tuple[int, ...]
) -> None:
    rule = fg.rules.scale(s=torch.ones(shape))
    gm = fg.transform(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), dict.fromkeys(rules, rule))
    y = gm(torch.ones(2, 4, requires_grad=True))
    with pytest.raises(
        RuleError, match=rf"'scale' at site '{site}'.*'s', a tensor of shape \({shape[0]},"
    ):
        y.sum().backward()


class WritesAndReturnsAnother(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 0.5
        x *= 3
        return y


class WritesIntoAPart(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x[0].relu_()
        return x


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


class CallsDirty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Dirty.apply(x) + 0 * x


class WritesInPlace(nn.Module):
    inplace = True

    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


class ReadsAfterwards(nn.Module):
    """Calls a part, and returns its argument as well."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1.0
        return self.part(x), x


WRITERS = [
    (WritesAndReturnsAnother, WritesAndReturnsAnother),
    (WritesIntoAPart, WritesIntoAPart),
    (CallsDirty, Dirty),
]


@pytest.mark.parametrize(("part", "selected"), WRITERS)
def test_a_class_that_writes_into_its_input_is_refused_unless_no_rule_acts(
    part: type[nn.Module], selected: type[Any]
) -> None:
    model = ReadsAfterwards(part())
    x = torch.tensor([[1.0, -2.0], [-3.0, 4.0]], requires_grad=True)
    gm = fg.transform(model, {selected: "straight_through"})
    with pytest.raises(
        PlanError, match=r"'part:\w+\[0\]' writes into its input.*Select the ops.*inplace"
    ):
        gm(x)
    with fg.native(), torch.no_grad():
        assert all(map(torch.equal, gm(x), model(x)))
    with fg.native():
        outputs = [m(x) for m in (gm, model)]
        ours, own = (torch.autograd.grad(a.sum() + 2 * b.sum(), x)[0] for a, b in outputs)
    assert torch.equal(ours, own)


@pytest.mark.parametrize("part", [WritesAndReturnsAnother, WritesIntoAPart])
def test_a_class_that_writes_into_its_input_is_refused_in_a_block(part: type[nn.Module]) -> None:
    model = ReadsAfterwards(part())
    x = torch.tensor([[1.0, -2.0], [-3.0, 4.0]], requires_grad=True)
    with (
        fg.use({part: "straight_through"}, model=model),
        pytest.raises(PlanError, match=r"writes into its input.*Select the ops"),
    ):
        model(x)
    with fg.use({part: "straight_through"}, model=model), torch.no_grad():
        found = model(x)
    with torch.no_grad():
        assert all(map(torch.equal, found, model(x)))


def test_a_class_that_says_that_it_works_in_place_is_a_site_of_its_write() -> None:
    model = ReadsAfterwards(WritesInPlace())
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    gm = fg.transform(model, {WritesInPlace: fg.rules.scale(s=3.0)})
    outputs = [gm(x)]
    with fg.use({WritesInPlace: fg.rules.scale(s=3.0)}, model=model):
        outputs.append(model(x))
    for y, read in outputs:
        assert y.tolist() == read.tolist() == [1, 0]
        assert torch.autograd.grad(y.sum() + 2 * read.sum(), x)[0].tolist() == [9, 9]
