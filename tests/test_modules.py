"""`fg.Activation` beside torch's own activations, under blocks, under a rule of its own, compiled and transformed."""

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
from freegrad_fx.vocabulary import OPS
from models import naive

ALIASES: dict[str, Callable[[Tensor], Tensor]] = {
    "Linear": lambda x: x * 1,
    "ReLU": F.relu,
    "ReLU6": F.relu6,
    "LeakyReLU": F.leaky_relu,
    "ELU": F.elu,
    "Tanh": torch.tanh,
    "Logistic": torch.sigmoid,
    "SiLU": F.silu,
    "GELU": F.gelu,
    "Softplus": F.softplus,
}
# Those whose second derivative is not zero almost everywhere, and which have one that is not a step
SMOOTH = [
    "ELU",
    "Tanh",
    "Logistic",
    "SiLU",
    "GELU",
    "Softplus",
    "mish",
    "selu",
    "celu",
    "softsign",
    "logsigmoid",
]
CANONICAL = [
    "relu", "relu6", "leaky_relu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
    "hardsigmoid", "hardtanh", "hardshrink", "softshrink", "tanhshrink", "softplus", "softsign", "sigmoid",
    "logsigmoid", "tanh", "heaviside", "jump_relu", "sign", "binarize", "ternarize", "quantize", "round", "floor",
    "ceil", "trunc", "abs", "identity", "dorefa", "sample_one_hot",
]  # fmt: skip
X = torch.tensor([[-3.0, -0.2, 0.0, 0.4], [0.1, 2.5, 7.0, -0.6]])


def gradient(function: Callable[[Tensor], Tensor], x: Tensor = X) -> Tensor:
    x = x.clone().requires_grad_()
    (result,) = torch.autograd.grad(function(x).pow(2).sum(), x)
    return result


def rectangular(grad: Tensor, x: Tensor) -> Tensor:
    return grad * ((x >= -0.5) & (x <= 0.5))


# --- forwards ---


@pytest.mark.parametrize("name", ALIASES)
def test_freegrads_forwards_are_torchs_activations(name: str) -> None:
    act = fg.Activation(name)
    assert torch.equal(act(X), ALIASES[name](X))
    assert torch.equal(gradient(act), gradient(ALIASES[name]))


def test_a_step_is_zero_at_zero_and_has_no_gradient() -> None:
    act = fg.Activation("Heaviside")
    assert act(X).tolist() == [[0, 0, 0, 1], [1, 1, 1, 0]]
    assert not gradient(act).any()
    assert fg.Activation("Heaviside", value_at_zero=0.5)(X)[0, 2] == 0.5


def test_every_canonical_name_of_a_function_of_one_tensor_is_a_forward() -> None:
    assert {op.name for op in OPS.values() if op.function is not None and op.keeps_shape} == {
        *CANONICAL
    }
    for name in CANONICAL:
        torch.manual_seed(0)
        found = fg.Activation(name)(X)
        torch.manual_seed(0)
        function = next(
            getattr(place, name)
            for place in (fg.vocabulary, F, torch, _Others)
            if hasattr(place, name)
        )
        assert torch.equal(found, function(X)), name


class _Others:
    identity = torch.positive


def test_a_forward_takes_the_parameters_that_torch_gives_it() -> None:
    for name, parameters, expected in [
        ("LeakyReLU", {"negative_slope": 0.3}, F.leaky_relu(X, 0.3)),
        ("ELU", {"alpha": 2.0}, F.elu(X, 2.0)),
        ("GELU", {"approximate": "tanh"}, F.gelu(X, approximate="tanh")),
        ("Softplus", {"beta": 2.0, "threshold": 5.0}, F.softplus(X, 2.0, 5.0)),
        ("hardtanh", {"min_val": -0.5, "max_val": 2.0}, F.hardtanh(X, -0.5, 2.0)),
        ("round", {"decimals": 1}, X.round(decimals=1)),
    ]:
        assert torch.equal(fg.Activation(name, **parameters)(X), expected)


def test_what_is_no_forward_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="Did you mean 'ReLU'"):
        fg.Activation("rellu")
    for name in ("glu", "softmax", "prelu"):  # another shape; more than a tensor
        with pytest.raises(ValueError, match="unknown forward"):
            fg.Activation(name)
    with pytest.raises(TypeError, match=r"'ReLU'.*alpha"):
        fg.Activation("ReLU", alpha=1.0)
    with pytest.raises(TypeError, match="approximate"):
        fg.Activation("GELU", approximate="roughly")
    with pytest.raises(fg.RuleError, match="params requires a rule"):
        fg.Activation("ReLU", params={"s": 2.0})
    with pytest.raises(fg.RuleError, match=r"only transform\(\) supports"):
        fg.Activation("ReLU", rule=fg.rules.arctan(forward="heaviside"))
    with pytest.raises(fg.RuleError, match="Did you mean 'scale'"):
        fg.Activation("ReLU", rule="scala")


# --- derivatives ---


@pytest.mark.parametrize("name", SMOOTH)
def test_the_native_second_derivative_is_right(name: str) -> None:
    act = fg.Activation(name)
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(act, x)
    assert torch.autograd.gradgradcheck(act, x)


def test_the_second_derivative_under_a_rule_is_that_of_the_rule() -> None:
    act = fg.Activation("Tanh", rule="triangular", params={"width": 2.0})
    x = torch.tensor([-0.5, 0.7, 3.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(act(x).sum(), x, create_graph=True)
    assert first.tolist() == pytest.approx([0.75, 0.65, 0.0])
    (second,) = torch.autograd.grad(first.sum(), x)
    assert second.tolist() == [0.5, -0.5, 0.0]


@pytest.mark.parametrize("name", [*ALIASES, "Heaviside"])
def test_a_rule_takes_the_place_of_the_derivative(name: str) -> None:
    plain = ALIASES.get(name, fg.vocabulary.heaviside)
    expected = gradient(naive(plain, rectangular))
    act = fg.Activation(name)
    with fg.use("rectangular"):
        assert torch.equal(gradient(act), expected)
    with fg.use("rectangular", scope="params"):
        assert torch.equal(gradient(act), gradient(plain))
    own = fg.Activation(name, rule="rectangular")
    with fg.use("scale", {"s": 7.0}):
        assert torch.equal(gradient(own), expected)  # its own rule goes before
    with fg.native():
        assert torch.equal(gradient(own), gradient(plain))


def test_a_composition_acts_in_its_order() -> None:
    act = fg.Activation(
        "ReLU",
        rule=fg.compose(fg.rules.clip_value(max_value=1.0), fg.rules.scale(s=3.0), "rectangular"),
    )
    expected = gradient(naive(F.relu, lambda g, x: rectangular(3 * g.clamp(-1, 1), x)))
    assert torch.equal(gradient(act), expected)


@pytest.mark.parametrize("name", ["Linear", "identity"])
@pytest.mark.parametrize(
    "block", [fg.native, lambda: fg.use("scale", {"s": 3.0})], ids=["native", "rule"]
)
def test_writing_into_the_result_does_not_reach_the_input(name: str, block: Any) -> None:
    act = fg.Activation(name)
    x = X.clone().requires_grad_()
    h = x * 2
    with block():
        y = act(h)
    y.mul_(5)
    assert torch.equal(h, x * 2)
    (found,) = torch.autograd.grad((y + h).sum(), x)
    slope = 5 if block is fg.native else 15
    assert torch.equal(found, torch.full_like(X, 2.0 * (slope + 1)))


# --- compiled, copied, transformed ---


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])],
)
def test_it_compiles_into_one_graph_and_follows_blocks(backend: str) -> None:
    layers = nn.Sequential(
        fg.Activation("SiLU"), fg.Activation("Linear"), fg.Activation("Tanh", rule="rectangular")
    )
    compiled = torch.compile(layers, fullgraph=True, backend=backend)
    torch.testing.assert_close(gradient(compiled), gradient(layers))
    for block in (fg.use("scale", {"s": 3.0}), fg.use("triangular"), fg.native()):
        with block:
            torch.testing.assert_close(gradient(compiled), gradient(layers))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_the_same_layer(how: Callable[[nn.Module], nn.Module]) -> None:
    act = fg.Activation(
        "LeakyReLU", negative_slope=0.3, rule=fg.compose("rectangular", fg.rules.scale(s=2.0))
    )
    again = how(act)
    assert repr(again) == repr(act)
    assert (
        repr(act)
        == "Activation('LeakyReLU', negative_slope=0.3, rule=rectangular(a=-0.5, b=0.5) then scale(s=2.0))"
    )
    assert torch.equal(gradient(again), gradient(act))
    assert torch.equal(again(X), F.leaky_relu(X, 0.3))


@pytest.mark.parametrize("examples", [None, (X,)], ids=["traced", "exported"])
def test_in_a_transformed_model_it_is_a_site(examples: Any) -> None:
    model = nn.Sequential(fg.Activation("ReLU"), fg.Activation("Linear"), fg.Activation("Tanh"))
    gm = fg.transform(model, {"relu": "rectangular"}, ambient=True, example_inputs=examples)
    relu = naive(F.relu, rectangular)
    assert torch.equal(gradient(gm), gradient(lambda x: torch.tanh(relu(x))))
    three = naive(torch.tanh, lambda g, x: 3 * g)
    if examples is None:
        with fg.use("scale", {"s": 3.0}):  # "Linear" follows too, which is no activation elsewhere
            assert torch.equal(gradient(gm), 3 * gradient(lambda x: three(relu(x))))
    else:
        with fg.use("scale", {"s": 3.0}):
            assert torch.equal(gradient(gm), gradient(lambda x: three(relu(x))))


def test_an_export_does_not_cease_to_be_ambient_unnoticed() -> None:
    for part in (fg.Activation("ReLU"), fg.transform(nn.Sequential(nn.Linear(4, 4)))):
        with pytest.raises(fg.CaptureError, match="ambient=True"):
            fg.transform(nn.Sequential(part, nn.Tanh()), {"tanh": "scale"}, example_inputs=(X,))


def test_in_a_transformed_model_its_own_rule_stays() -> None:
    model = nn.Sequential(fg.Activation("ReLU", rule="rectangular"))
    with pytest.warns(fg.FreegradWarning, match="already decoupled, with the rule 'rectangular'"):
        gm = fg.transform(model, {"relu": "scale"})
    assert torch.equal(gradient(gm), gradient(model))
    assert torch.equal(gradient(fg.transform(model)), gradient(model))


def test_what_the_rule_of_a_layer_learns_is_a_parameter_of_the_layer() -> None:
    x, alpha = torch.randn(5, 3), nn.Parameter(torch.tensor(2.0))
    model = nn.Sequential(fg.Activation("heaviside", rule=fg.rules.arctan(alpha=alpha)))
    x.requires_grad_()

    def gradient(module: nn.Module) -> Tensor:
        module.zero_grad()
        module(x).sum().backward()
        (parameter,) = module.parameters()
        assert parameter.grad is not None
        return parameter.grad

    expected = gradient(model)
    assert list(model.state_dict()) == ["0.alpha"]
    for other in (fg.transform(model, {"heaviside": None}), copy.deepcopy(model)):
        assert list(other.state_dict()) == ["0.alpha"]
        assert torch.equal(gradient(other), expected)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).sum()

    given = {"0.alpha": alpha.detach()}
    assert torch.allclose(torch.func.grad(loss)(given)["0.alpha"], expected)
