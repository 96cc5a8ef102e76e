"""Networks of snnTorch, SpikingJelly and Norse, whose surrogates a table exchanges for others.

The reference is the same network with the other surrogate of its own library, which has the formula of the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import freegrad_fx as fg

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

Make = Callable[[], nn.Module]


@dataclass(frozen=True)
class Networks:
    """A network, the same network with the other surrogate of its library, and the table that exchanges it."""

    network: nn.Module
    reference: nn.Module
    rules: dict[type, Any]


class Loop(nn.Module):
    """Calls a network for each time step, and returns what it gives in all of them.

    Args:
        step: Takes the input of a time step, and what the step before left. Returns the output and what it leaves.
        reset: Called before the first step.
    """

    def __init__(
        self,
        network: nn.Module,
        step: Callable[[Any, Tensor, Any], tuple[Tensor, Any]],
        reset: Callable[[Any], object] = lambda network: None,
    ) -> None:
        super().__init__()
        self.network, self.step, self.reset = network, step, reset

    def forward(self, x: Tensor) -> Tensor:
        self.reset(self.network)
        state, out = None, []
        for t in range(x.shape[0]):
            y, state = self.step(self.network, x[t], state)
            out.append(y)
        return torch.stack(out)


class AtOnce(nn.Module):
    """Gives a network all time steps in one call.

    Args:
        reset: Called before.
    """

    def __init__(self, network: nn.Module, reset: Callable[[Any], object]) -> None:
        super().__init__()
        self.network, self.reset = network, reset

    def forward(self, x: Tensor) -> Tensor:
        self.reset(self.network)
        y: Tensor = self.network(x)
        return y


def seeded(make: Make) -> nn.Module:
    torch.manual_seed(0)
    return make()


def stateless(network: nn.Module, x: Tensor, state: None) -> tuple[Tensor, None]:
    return network(x), None


# --- snnTorch ---


def of_snntorch(kind: str, hidden: bool = False, **options: Any) -> Callable[[], Networks]:
    """A layer of neurons between two layers of weights.

    Args:
        kind: The class of the neurons.
        hidden: Whether the neurons keep their state, or take and return it.
        options: Options of the neurons.
    """

    def build() -> Networks:
        library = pytest.importorskip("snntorch", reason="needs the extra `spiking`")
        from snntorch import surrogate, utils

        def make(spike: Any) -> Make:
            def layers() -> nn.Module:
                given = {k: v() if callable(v) else v for k, v in options.items()}
                neuron = getattr(library, kind)(spike_grad=spike, init_hidden=hidden, **given)
                return nn.ModuleList([nn.Linear(6, 5), neuron, nn.Linear(5, 3)])

            return layers

        def step(network: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            first, neuron, last = network
            if hidden:
                return last(neuron(2 * first(x))), None
            spikes, *state = neuron(2 * first(x), *(state or ()))
            return last(spikes), state

        def reset(network: Any) -> None:
            if hidden:
                utils.reset(network)
            else:
                (getattr(network[1], "reset_mem", None) or network[1].reset_hidden)()

        def loop(spike: Any) -> nn.Module:
            return Loop(seeded(make(spike)), step, reset)

        return Networks(
            loop(surrogate.atan()),
            loop(surrogate.fast_sigmoid(slope=25)),
            {surrogate.ATan: fg.rules.fast_sigmoid(slope=25.0)},
        )

    return build


def entries() -> Tensor:
    return torch.rand(5)


SNNTORCH = {
    "Leaky": of_snntorch("Leaky", beta=0.9),
    "Leaky, reset to zero": of_snntorch("Leaky", beta=0.9, reset_mechanism="zero"),
    "Leaky, state kept": of_snntorch("Leaky", hidden=True, beta=0.9),
    "Leaky, learnt": of_snntorch("Leaky", beta=entries, learn_beta=True, learn_threshold=True),
    "Synaptic": of_snntorch("Synaptic", alpha=0.8, beta=0.9),
    "Synaptic, state kept": of_snntorch("Synaptic", hidden=True, alpha=0.8, beta=0.9),
    "Synaptic, learnt": of_snntorch(
        "Synaptic", alpha=0.8, beta=0.9, learn_alpha=True, learn_beta=True, learn_threshold=True
    ),
    "Alpha": of_snntorch("Alpha", alpha=0.9, beta=0.8, threshold=0.1),
    "Alpha, state kept": of_snntorch("Alpha", hidden=True, alpha=0.9, beta=0.8, threshold=0.1),
    "Alpha, learnt": of_snntorch("Alpha", alpha=0.9, beta=0.8, threshold=0.1, learn_threshold=True),
    "RLeaky": of_snntorch("RLeaky", beta=0.9, linear_features=5),
    "RLeaky, state kept": of_snntorch("RLeaky", hidden=True, beta=0.9, linear_features=5),
    "RLeaky, learnt, one to one": of_snntorch(
        "RLeaky", beta=0.9, all_to_all=False, V=entries, learn_beta=True, learn_threshold=True
    ),
    "RSynaptic": of_snntorch("RSynaptic", alpha=0.8, beta=0.9, linear_features=5),
    "SLSTM": of_snntorch("SLSTM", input_size=5, hidden_size=5, threshold=0.05),
}


# --- SpikingJelly ---


def of_spikingjelly(
    kind: str, many: bool, around: str = "", **options: Any
) -> Callable[[], Networks]:
    """Neurons between two layers of weights.

    Args:
        kind: The class of the neurons.
        many: Whether a call takes all time steps, or one.
        around: The class of the recurrent container around the neurons.
        options: Options of the neurons.
    """

    def build() -> Networks:
        pytest.importorskip("spikingjelly.activation_based", reason="needs the extra `spiking`")
        from spikingjelly._ops.surrogate import _SurrogateSpike
        from spikingjelly.activation_based import functional, layer, neuron, surrogate

        mode = "m" if many else "s"

        def make(surrogate: nn.Module) -> Make:
            def layers() -> nn.Module:
                node = getattr(neuron, kind)(surrogate_function=surrogate, **options)
                if around == "LinearRecurrentContainer":
                    node = layer.LinearRecurrentContainer(node, in_features=5, out_features=5)
                elif around:
                    node = layer.ElementWiseRecurrentContainer(node, lambda x, y: x + 0.5 * y)
                parts = layer.Linear(6, 5), Amplified(), node, layer.Linear(5, 3)
                network = nn.Sequential(*parts)
                functional.set_step_mode(network, mode)
                return network

            return layers

        def loop(surrogate: nn.Module) -> nn.Module:
            network = seeded(make(surrogate))
            if not many:
                return Loop(network, stateless, functional.reset_net)
            return AtOnce(network, functional.reset_net)

        return Networks(
            loop(surrogate.Sigmoid(alpha=4.0)),
            loop(surrogate.ATan(alpha=2.0)),
            {_SurrogateSpike: fg.rules.arctan(alpha=2.0)},
        )

    return build


class Amplified(nn.Module):
    """Makes the currents large enough for spikes."""

    def forward(self, x: Tensor) -> Tensor:
        return 5 * x


SPIKINGJELLY = {
    f"{name}, {'many steps' if many else 'one step'}": of_spikingjelly(many=many, **options)
    for name, options in {
        "IFNode": {"kind": "IFNode"},
        "LIFNode": {"kind": "LIFNode"},
        "LIFNode, detached": {"kind": "LIFNode", "detach_reset": True, "v_reset": None},
        "ParametricLIFNode": {"kind": "ParametricLIFNode"},
        "LIFNode in a loop": {"kind": "LIFNode", "around": "LinearRecurrentContainer"},
        "PLIF in a loop": {"kind": "ParametricLIFNode", "around": "ElementWiseRecurrentContainer"},
    }.items()
    for many in (False, True)
}


# --- Norse ---


def of_norse(kind: str, parameters: str, **options: Any) -> Callable[[], Networks]:
    """Cells between two layers of weights, in a loop over the first dimension.

    Args:
        kind: The class of the cells. Recurrent cells are given their sizes.
        parameters: The class of their parameters.
        options: Parameters.
    """

    def build() -> Networks:
        torch_of_norse = pytest.importorskip("norse.torch", reason="needs the extra `spiking`")
        from norse.torch.functional.threshold import Triangle

        def make(method: str) -> Make:
            def layers() -> nn.Module:
                given = {k: torch.as_tensor(v) for k, v in options.items()}
                shared = {"method": method, "alpha": torch.tensor(1.0)}
                if parameters == "LIFRefracParameters":
                    threshold = torch_of_norse.LIFParameters(v_th=given.pop("v_th"), **shared)
                    p = torch_of_norse.LIFRefracParameters(lif=threshold, **given)
                else:
                    p = getattr(torch_of_norse, parameters)(**shared, **given)
                cell = getattr(torch_of_norse, kind)
                cell = cell(5, 5, p=p) if "Recurrent" in kind else cell(p=p)
                return nn.ModuleList([nn.Linear(6, 5), cell, nn.Linear(5, 3)])

            return layers

        def step(network: Any, x: Tensor, state: Any) -> tuple[Tensor, Any]:
            first, cell, last = network
            spikes, state = cell(3 * first(x), state)
            return last(spikes), state

        return Networks(
            Loop(seeded(make("triangle")), step),
            Loop(seeded(make("super")), step),
            {Triangle: fg.rules.fast_sigmoid(slope=1.0)},
        )

    return build


NORSE = {
    "LIFCell": of_norse("LIFCell", "LIFParameters", v_th=0.2),
    "LIFRecurrentCell": of_norse("LIFRecurrentCell", "LIFParameters", v_th=0.2),
    "LIFRefracCell": of_norse("LIFRefracCell", "LIFRefracParameters", v_th=0.2, rho_reset=2.0),
    "LIFRefracRecurrentCell": of_norse(
        "LIFRefracRecurrentCell", "LIFRefracParameters", v_th=0.2, rho_reset=2.0
    ),
    "LSNNCell": of_norse("LSNNCell", "LSNNParameters", v_th=0.2),
    "LSNNRecurrentCell": of_norse("LSNNRecurrentCell", "LSNNParameters", v_th=0.2),
    "LIFAdExCell": of_norse("LIFAdExCell", "LIFAdExParameters", v_th=0.2),
    "LIFExCell": of_norse("LIFExCell", "LIFExParameters", v_th=0.2),
}


# --- the comparison ---


ALL = {
    f"{library}: {name}": build
    for library, cases in (
        ("snnTorch", SNNTORCH),
        ("SpikingJelly", SPIKINGJELLY),
        ("Norse", NORSE),
    )
    for name, build in cases.items()
}


def outputs_and_gradients(network: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    y = network(x)
    parameters = list(network.parameters())
    return y, list(torch.autograd.grad(y.square().sum(), [x, *parameters], allow_unused=True))


@pytest.mark.parametrize("build", ALL.values(), ids=ALL)
@pytest.mark.parametrize("with_model", [False, True], ids=["", "model"])
def test_gradients_are_those_of_the_other_surrogate_of_the_library(
    build: Callable[[], Networks], with_model: bool
) -> None:
    networks = build()
    torch.manual_seed(1)
    x = torch.randn(8, 4, 6).requires_grad_()
    native, unchanged = outputs_and_gradients(networks.network, x)
    expected = outputs_and_gradients(networks.reference, x)[1]
    options = {"model": networks.network} if with_model else {}
    with fg.use(networks.rules, **options) as block:
        y, found = outputs_and_gradients(networks.network, x)
    assert torch.equal(y, native)
    for f, e, n in zip(found, expected, unchanged, strict=True):
        assert (f is None) is (e is None) is (n is None)
        if f is not None and e is not None:
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-6 * float(e.abs().max()))
    assert not torch.allclose(found[0], unchanged[0], rtol=1e-2)
    assert fg.report(block).with_action("rewrite")


# --- surrogates that are modules ---


def with_surrogate(make: Callable[[], nn.Module]) -> nn.Module:
    """A layer of SpikingJelly that calls the module of its surrogate: its recurrent network, and most surrogates."""
    return seeded(lambda: nn.Sequential(nn.Linear(6, 5), Amplified(), make()))


@pytest.mark.parametrize("recurrent", [False, True])
def test_a_surrogate_that_is_called_as_a_module_is_named_by_its_class(recurrent: bool) -> None:
    pytest.importorskip("spikingjelly.activation_based", reason="needs the extra `spiking`")
    from spikingjelly.activation_based import neuron, rnn, surrogate

    def layer(spike: nn.Module) -> nn.Module:
        if recurrent:
            return rnn.SpikingLSTM(5, 4, 1, surrogate_function1=spike)
        return neuron.LIFNode(surrogate_function=spike, step_mode="m")

    kind = surrogate.Sigmoid if recurrent else surrogate.S2NN
    network = with_surrogate(lambda: layer(kind()))
    reference = with_surrogate(lambda: layer(surrogate.ATan(alpha=2.0)))
    torch.manual_seed(1)
    x = torch.randn(8, 4, 6).requires_grad_()

    def gradients(network: nn.Module) -> tuple[Tensor, ...]:
        y = network(x)
        y = y[0] if recurrent else y
        for part in network.modules():
            if isinstance(part, neuron.LIFNode):
                part.reset()
        return torch.autograd.grad(y.square().sum(), [x, *network.parameters()])

    unchanged, expected = gradients(network), gradients(reference)
    with fg.use({kind: fg.rules.arctan(alpha=2.0)}, model=network) as block:
        found = gradients(network)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-6 * float(e.abs().max()))
    assert not torch.allclose(found[0], unchanged[0], rtol=1e-2)
    assert {d.site.op for d in fg.report(block).with_action("rewrite")} == {kind.__name__}


# --- formulas ---


def snntorch_surrogate(name: str, **options: Any) -> Callable[[Tensor], Tensor]:
    library = pytest.importorskip("snntorch.surrogate", reason="needs the extra `spiking`")
    surrogate: Callable[[Tensor], Tensor] = getattr(library, name)(**options)
    return surrogate


def spikingjelly_surrogate(name: str, **options: Any) -> Callable[[Tensor], Tensor]:
    library = pytest.importorskip(
        "spikingjelly.activation_based.surrogate", reason="needs the extra `spiking`"
    )
    surrogate: Callable[[Tensor], Tensor] = getattr(library, name)(**options)
    return surrogate


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize(
    ("surrogate", "name", "options", "rule"),
    [
        (snntorch_surrogate, "fast_sigmoid", {"slope": 7}, fg.rules.fast_sigmoid(slope=7.0)),
        (snntorch_surrogate, "atan", {"alpha": 3.0}, fg.rules.arctan(alpha=3.0)),
        (snntorch_surrogate, "straight_through_estimator", {}, "straight_through"),
        (spikingjelly_surrogate, "ATan", {"alpha": 3.0}, fg.rules.arctan(alpha=3.0)),
        (spikingjelly_surrogate, "SuperSpike", {"alpha": 1.0}, fg.rules.fast_sigmoid(slope=1.0)),
    ],
)
def test_a_rule_has_the_formula_of_a_surrogate(
    surrogate: Callable[..., Callable[[Tensor], Tensor]],
    name: str,
    options: dict[str, Any],
    rule: Any,
) -> None:
    x = torch.linspace(-3, 3, 62).requires_grad_()
    grad = torch.linspace(-1, 2, 62)
    expected = torch.autograd.grad(surrogate(name, **options)(x), x, grad)
    with fg.use({Step: rule}):
        y = Step.apply(x)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad), expected)
