"""Parameters of rules that get a gradient: in every way in they have the gradient of a hand-edited model."""

from __future__ import annotations

import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import freegrad_fx as fg

X = torch.linspace(-2, 2, 15).reshape(5, 3)


def by_alpha(grad: Tensor, x: Tensor, *, alpha: float) -> Tensor:
    return grad * x


@fg.register("test: learns alpha", learns={"alpha": by_alpha})
def scaled(grad: Tensor, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return grad * alpha


@fg.register("test: learns step", learns="step")
def rounded(grad: Tensor, x: Tensor, *, step: float = 1.0) -> Any:
    return {"x": grad, "step": lambda: grad * ((x / step).round() - x / step)}


def quantise(x: Tensor, step: Any) -> Tensor:
    return (x / step).round() * step


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    return nn.Sequential(*layers)


class Learnt(NamedTuple):
    alpha: Tensor
    step: Tensor

    @property
    def table(self) -> fg.RuleTable:
        forward = functools.partial(quantise, step=self.step)
        return fg.RuleTable(
            [
                fg.on("relu").backward(scaled(alpha=self.alpha)),
                fg.on(parameter="*.weight").backward(rounded(step=self.step), forward=forward),
            ]
        )


def learnt() -> Learnt:
    """A parameter, and a tensor that requires a gradient."""
    return Learnt(nn.Parameter(torch.tensor(0.7)), torch.tensor(0.1, requires_grad=True))


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, alpha = ctx.saved_tensors
        return grads[0] * alpha, (grads[0] * x).sum()


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(x, step)
        return quantise(x, step)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, step = ctx.saved_tensors
        return grads[0], (grads[0] * ((x / step).round() - x / step)).sum()


@functools.cache
def expected() -> list[Tensor]:
    """The gradients in a model that is edited by hand."""
    model, (alpha, step) = mlp(), learnt()
    h = X
    for layer in model:
        if isinstance(layer, nn.Linear):
            h = F.linear(h, _Rounded.apply(layer.weight, step), layer.bias)  # type: ignore[no-untyped-call]
        else:
            h = _Scaled.apply(h, alpha)  # type: ignore[no-untyped-call]
    return gradients(h, model, Learnt(alpha, step))


def gradients(out: Tensor, model: nn.Module, of: Learnt) -> list[Tensor]:
    out.square().sum().backward()
    return [tensor.grad for tensor in (*of, *model.parameters())]


def are_expected(found: list[Tensor]) -> bool:
    return all(map(torch.allclose, found, expected()))


def transformed(model: nn.Module, table: fg.RuleTable) -> Tensor:
    return fg.transform(model, table)(X)


def exported(model: nn.Module, table: fg.RuleTable) -> Tensor:
    return fg.transform(model, table, example_inputs=(X,))(X)


def in_a_block(model: nn.Module, table: fg.RuleTable) -> Tensor:
    with fg.use(table, model=model):
        return model(X)


def compiled(model: nn.Module, table: fg.RuleTable) -> Tensor:
    return fg.compile(model, table, backend="aot_eager")(X)


def transformed_and_compiled(model: nn.Module, table: fg.RuleTable) -> Tensor:
    return torch.compile(fg.transform(model, table), backend="aot_eager", fullgraph=True)(X)


def by_inductor(model: nn.Module, table: fg.RuleTable) -> Tensor:
    return torch.compile(model, backend=fg.backend(table))(X)


WAYS = [transformed, exported, in_a_block, compiled, transformed_and_compiled]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", fg.FreegradWarning)
        yield


@pytest.mark.parametrize("way", [*WAYS, pytest.param(by_inductor, marks=pytest.mark.slow)])
def test_every_way_in_gives_the_gradient(way: Callable[..., Tensor]) -> None:
    model, of = mlp(), learnt()
    assert are_expected(gradients(way(model, of.table), model, of))


def test_an_ambient_rule_gives_the_gradient() -> None:
    gm, alpha = fg.transform(mlp()), nn.Parameter(torch.tensor(0.7))
    with fg.use(scaled(alpha=alpha)):
        gm(X).sum().backward()
    other = nn.Parameter(torch.tensor(0.7))
    fg.transform(mlp(), {"relu": scaled(alpha=other)})(X).sum().backward()
    assert alpha.grad is not None
    assert torch.equal(alpha.grad, other.grad)


# --- the transformed model ---


def test_the_model_has_each_parameter_once_and_not_in_its_state() -> None:
    model, of = mlp(), learnt()
    gm = fg.transform(model, of.table)
    named = dict(gm.named_parameters())
    assert {id(t) for t in of} <= {id(p) for p in named.values()}
    assert [n for n in named if not n.startswith("rule_parameter_")] == list(
        dict(model.named_parameters())
    )
    assert len(named) == len([*model.parameters()]) + 2
    assert list(gm.state_dict()) == list(model.state_dict())
    gm.load_state_dict(model.state_dict())
    nested = nn.Sequential(gm)
    assert list(nested.state_dict()) == [f"0.{name}" for name in model.state_dict()]
    nested.load_state_dict(nested.state_dict())


def test_rules_have_a_state_of_their_own() -> None:
    gm = fg.transform(mlp(), (of := learnt()).table)
    saved = {name: tensor.clone() for name, tensor in gm.rule_state_dict().items()}
    assert list(saved) == ["0.weight/test: learns step.step", "1:relu[0]/test: learns alpha.alpha"]
    with torch.no_grad():
        of.alpha.add_(1)
    gm.load_rule_state_dict(saved)
    assert of.alpha.item() == pytest.approx(0.7)
    (name, *_) = saved
    with pytest.raises(fg.RuleError, match=f"'{name}' is missing; 'other' is not in the model"):
        gm.load_rule_state_dict({**{n: saved[n] for n in saved if n != name}, "other": X})
    with pytest.raises(fg.RuleError, match=r"has the shape \[2\], and in the model \[\]"):
        gm.load_rule_state_dict({name: torch.ones(2)}, strict=False)
    gm.load_rule_state_dict({name: torch.tensor(0.25)}, strict=False)
    assert of.step.item() == 0.25


def test_tensors_that_are_not_learnt_and_those_of_forwards_are_in_the_state_of_the_rules() -> None:
    slope, threshold = torch.tensor(2.0), torch.tensor(0.5)
    first = fg.rules.scale(s=slope, forward=functools.partial(quantise, step=threshold))
    chain = fg.compose(first, fg.rules.scale(s=torch.tensor(3.0)))
    gm = fg.transform(mlp(), fg.RuleTable([fg.on("relu", call=0, module="1").backward(chain)]))
    names = ["scale.s", "scale#2.s", "forward.step"]
    assert list(gm.rule_state_dict()) == [f"1:relu[0]/{name}" for name in names]


def test_copies_and_saved_models_have_parameters_of_their_own() -> None:
    model, of = mlp(), learnt()
    gm = fg.transform(model, of.table)
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(gm), torch.load(buffer, weights_only=False)):
        assert list(other.rule_state_dict()) == list(gm.rule_state_dict())
        assert list(other.state_dict()) == list(model.state_dict())
        assert not {id(p) for p in other.parameters()} & {id(p) for p in gm.parameters()}
        other(X).square().sum().backward()
        own = dict(other.named_parameters())
        found = [own[f"rule_parameter_{n}"].grad for n in (0, 1)]
        assert all(map(torch.allclose, found, expected()))
        with torch.no_grad():
            of.alpha.add_(1)  # as an optimizer does
        other(X)


def test_conversions_and_optimizers_reach_the_parameters() -> None:
    gm = fg.transform(mlp(), (of := learnt()).table)
    optimizer = torch.optim.SGD(gm.parameters(), lr=0.01)
    before = [tensor.detach().clone() for tensor in of]
    gm(X).square().sum().backward()
    optimizer.step()
    assert not any(map(torch.equal, before, of))
    gm.double()
    assert [tensor.dtype for tensor in of] == [torch.double] * 2
    gm(X.double()).sum().backward()


def test_functional_calls_and_a_second_transform() -> None:
    model, of = mlp(), learnt()
    gm = fg.transform(model, of.table)
    given = {name: p.detach() for name, p in gm.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(gm, parameters, (X,)).square().sum()

    found = torch.func.grad(loss)(given)
    own = [found[f"rule_parameter_{n}"] for n in (0, 1)]
    assert are_expected([*own, *(found[name] for name in dict(model.named_parameters()))])
    again = fg.transform(gm, fg.RuleTable([fg.on(parameter="*.bias").backward("scale")]))
    assert len(fg.report(again).decisions) == len(fg.report(gm).decisions)
    assert list(again.rule_state_dict()) == list(gm.rule_state_dict())
    assert list(again.state_dict()) == list(model.state_dict())


def test_a_transformed_part_of_a_model_keeps_its_parameters() -> None:
    of = learnt()
    part = fg.transform(mlp(), of.table)
    model = nn.Sequential(part, nn.ReLU())
    outer = nn.Parameter(torch.tensor(2.0))
    gm = fg.transform(
        model, fg.RuleTable([fg.on("relu", module="1").backward(scaled(alpha=outer))])
    )
    gm(X).sum().backward()
    assert all(tensor.grad is not None for tensor in (*of, outer))
    assert len([*gm.parameters()]) == len([*mlp().parameters()]) + 3
    assert list(gm.state_dict()) == list(model.state_dict())
    assert {id(t) for t in (*of, outer)} == {id(t) for t in tensors_of_rules(gm)}
    with (
        pytest.warns(fg.FreegradWarning, match="'params' matched nothing"),
        fg.use({"params": "scale"}, model=model),
    ):
        model(X)


def tensors_of_rules(gm: Any) -> list[Tensor]:
    named = dict(gm.named_parameters())
    ends = {tensor.data_ptr() for tensor in gm.rule_state_dict().values()}
    return [p for p in named.values() if p.data_ptr() in ends]


def test_native_blocks_give_the_gradient_of_the_forward() -> None:
    gm = fg.transform(mlp(), (of := learnt()).table)
    with fg.native(), pytest.warns(fg.FreegradWarning, match="forward"):
        gm(X).sum().backward()
    assert of.alpha.grad is None
    assert of.step.grad is not None


def test_a_parameter_of_the_model_itself_stays_where_it_is() -> None:
    model = mlp()
    model.alpha = nn.Parameter(torch.tensor(0.7))
    gm = fg.transform(model, {"relu": scaled(alpha=model.alpha)})
    assert list(gm.state_dict()) == list(model.state_dict())
    assert gm.rule_state_dict() == {}
    gm(X).sum().backward()
    assert model.alpha.grad is not None


def test_the_wrapper_of_a_compiled_model_has_the_parameters() -> None:
    model, of = mlp(), learnt()
    wrapper = fg.compile(model, of.table, backend="eager")
    assert {id(tensor) for tensor in of} <= {id(p) for p in wrapper.parameters()}
    assert len([*wrapper.parameters()]) == len([*model.parameters()]) + 2
    assert list(wrapper.state_dict()) == [f"_orig_mod.{name}" for name in model.state_dict()]
    for assign in (False, True):
        wrapper.load_state_dict(wrapper.state_dict(), assign=assign)
        assert {id(tensor) for tensor in of} <= {id(p) for p in wrapper.parameters()}
        assert len([*wrapper.parameters()]) == len([*model.parameters()]) + 2


# --- what is refused ---


def test_a_forward_with_the_tensor_as_a_variable_is_refused() -> None:
    step = nn.Parameter(torch.tensor(0.1))
    table = fg.RuleTable(
        [
            fg.on(parameter="*.weight").backward(
                rounded(step=step), forward=lambda w: quantise(w, step)
            )
        ]
    )
    with pytest.raises(fg.PlanError, match=r"a second one, at site 0.weight.*functools.partial"):
        fg.transform(mlp(), table)


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.relu()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class CallsFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Identity.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def test_a_rule_at_a_function_learns_in_a_block_as_in_a_transformed_model() -> None:
    found = []
    for door in ("transform", "use"):
        alpha = nn.Parameter(torch.tensor(0.7))
        table = {Identity: scaled(alpha=alpha)}
        x, model = X.clone().requires_grad_(), CallsFunction()
        if door == "transform":
            y = fg.transform(model, table)(x)
        else:
            with fg.use(table, model=model):
                y = model(x)
        found.append(torch.autograd.grad(y.square().sum(), [x, alpha]))
    assert all(map(torch.equal, *found))


stored = Identity.apply


class CallsStored(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return stored(x)  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("at", ["a stored apply", "a further rule"])
def test_where_a_rule_at_a_function_cannot_learn_is_said(at: str) -> None:
    alpha = nn.Parameter(torch.tensor(0.7))
    model = CallsStored() if at == "a stored apply" else CallsFunction()
    entries = [fg.on(type=Identity).backward(scaled(alpha=alpha))]
    if at == "a further rule":
        entries.append(fg.on(type=Identity, at="output").backward("half"))
    with (
        pytest.raises(fg.RuleError, match=r"transform\(model, rules\)"),
        fg.use(fg.RuleTable(entries)),
    ):
        model(X.clone().requires_grad_())


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.zeros_like(grads[0])


class Neurons(nn.Module):
    """Leaky neurons with a threshold, in a loop over time: no capture takes such a loop over data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        state = total = torch.zeros(x.shape[1], 4, dtype=x.dtype)
        for current in x:
            state = 0.9 * state + self.linear(current)
            spikes = Step.apply(state - 0.2)
            if float(spikes.detach().sum()) >= 0:  # a condition on the data
                state = state - spikes
            total = total + spikes
        return total


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_slope_of_the_surrogate_of_neurons_is_learnt_in_a_block(checkpointed: bool) -> None:
    torch.manual_seed(0)
    model, x = Neurons(), torch.randn(5, 2, 3, dtype=torch.float64)
    slope = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    run: Any = model
    if checkpointed:
        run = functools.partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=False)
    with fg.use({Step: fg.rules.fast_sigmoid(slope=slope)}, model=model):
        y = run(x)
        found = torch.autograd.grad(y.square().sum(), [*model.parameters(), slope])

    # the primitive of the surrogate in the place of the step, with the values of the step
    by_hand = slope.detach().clone().requires_grad_()

    def surrogate(v: Tensor) -> Tensor:
        smooth = v / (1 + by_hand * v.abs())
        return (v > 0).to(v.dtype) + smooth - smooth.detach()

    state = total = torch.zeros(2, 4, dtype=torch.float64)
    for current in x:
        state = 0.9 * state + model.linear(current)
        spikes = surrogate(state - 0.2)
        state = state - spikes
        total = total + spikes
    assert torch.equal(total, y)
    expected = torch.autograd.grad(total.square().sum(), [*model.parameters(), by_hand])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_rule_that_does_not_learn_still_warns() -> None:
    with pytest.warns(fg.FreegradWarning, match="gets none from the rule, which does not define"):
        gm = fg.transform(mlp(), {"relu": fg.rules.scale(s=nn.Parameter(torch.tensor(2.0)))})
    assert len([*gm.parameters()]) == 6


@pytest.mark.parametrize(
    "state", ["rules.pt", {"0.weight/lsq.step": 0.3}, {"0.weight/lsq.step": None}]
)
def test_what_is_no_state_of_rules_is_refused(state: Any) -> None:
    gm = fg.transform(mlp(), learnt().table)
    with pytest.raises(TypeError, match="load_rule_state_dict"):
        gm.load_rule_state_dict(state)
