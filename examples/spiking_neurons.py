"""Other surrogate gradients for spiking networks written with snnTorch, SpikingJelly and Norse, untouched.

    python examples/spiking_neurons.py [--quick] [--steps N]

Each library has neurons with a spike function of its own: the forward is a step, the backward is the derivative of a
smooth function, the surrogate. One table entry names the class of the spike function, and `freegrad_fx.use` gives it
another surrogate while the network runs. The script compares the gradients with those that the library computes where
it has that surrogate itself, and with those of the network as it was written.

The libraries are optional (pip install snntorch spikingjelly norse); a missing one is skipped. A neuron written by hand
is always there.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import freegrad_fx as fg
from _options import count

console = Console()


@dataclass(frozen=True)
class Comparison:
    """A network, the same network with the other surrogate of its own library, and the table that exchanges it."""

    library: str
    network: nn.Module
    reference: nn.Module
    rules: dict[type, Any]
    what: str


# --- by hand ---


class Step(torch.autograd.Function):
    """1[x > 0], with the arctangent as surrogate (Fang et al. 2021, arXiv:2007.05785)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + (torch.pi * x).square())


class FastStep(Step):
    """1[x > 0], with the fast sigmoid as surrogate (Zenke & Ganguli 2018, doi:10.1162/neco_a_01086)."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / (1 + 25.0 * x.abs()) ** 2


class ByHand(nn.Module):
    """Two layers of leaky integrate-and-fire neurons."""

    def __init__(self, spike: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.spike = nn.Linear(16, 32), nn.Linear(32, 4), spike

    def forward(self, x: Tensor) -> Tensor:
        first = second = torch.zeros(())
        total = torch.zeros(())
        for current in x:
            first = 0.9 * first + self.first(current)
            spikes = self.spike(first - 1)
            first = first - spikes
            second = 0.9 * second + self.second(spikes)
            total = total + second
        return total


def by_hand() -> Comparison:
    network, reference = (seeded(lambda s=s: ByHand(s.apply)) for s in (Step, FastStep))
    rules = {Step: fg.rules.fast_sigmoid(slope=25.0)}
    return Comparison("by hand", network, reference, rules, "arctan → fast sigmoid")


# --- the libraries ---


def with_snntorch() -> Comparison:
    import snntorch
    from snntorch import surrogate, utils

    class Network(nn.Module):
        """Neurons that take and return their state, that keep it, and that learn their decay and their threshold."""

        def __init__(self, spike: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.first, self.second, self.third = (
                nn.Linear(16, 32),
                nn.Linear(32, 32),
                nn.Linear(32, 4),
            )
            self.leaky = snntorch.Leaky(
                beta=0.9, spike_grad=spike, learn_beta=True, learn_threshold=True
            )
            self.recurrent = snntorch.RLeaky(
                beta=0.9, linear_features=32, spike_grad=spike, init_hidden=True
            )
            self.alpha = snntorch.Alpha(
                alpha=0.9, beta=0.8, threshold=0.1, spike_grad=spike, init_hidden=True
            )
            self.synaptic = snntorch.Synaptic(alpha=0.8, beta=0.9, spike_grad=spike)

        def forward(self, x: Tensor) -> Tensor:
            utils.reset(self)
            mem = self.leaky.reset_mem()
            syn, out = self.synaptic.reset_mem()
            total = torch.zeros(())
            for current in x:
                spikes, mem = self.leaky(self.first(current), mem)
                spikes = self.alpha(self.second(self.recurrent(spikes)))
                _, syn, out = self.synaptic(self.third(spikes), syn, out)
                total = total + out
            return total

    network = seeded(lambda: Network(surrogate.atan()))
    reference = seeded(lambda: Network(surrogate.fast_sigmoid(slope=25)))
    rules = {surrogate.ATan: fg.rules.fast_sigmoid(slope=25.0)}
    return Comparison("snnTorch", network, reference, rules, "atan → fast_sigmoid")


def with_spikingjelly(mode: str) -> Comparison:
    """A network whose layers take one time step (mode "s") or all of them (mode "m") in a call."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    class Network(nn.Module):
        def __init__(self, make: Callable[[], nn.Module]) -> None:
            super().__init__()
            self.first, self.second = layer.Linear(16, 32), layer.Linear(32, 4)
            self.lif = layer.LinearRecurrentContainer(
                neuron.LIFNode(surrogate_function=make()), in_features=32, out_features=32
            )
            self.parametric = neuron.ParametricLIFNode(surrogate_function=make())
            functional.set_step_mode(self, mode)

        def layers(self, x: Tensor) -> Tensor:
            return self.parametric(3 * self.second(self.lif(5 * self.first(x))))

        def forward(self, x: Tensor) -> Tensor:
            functional.reset_net(self)
            spikes = (
                self.layers(x) if mode == "m" else torch.stack([self.layers(step) for step in x])
            )
            return spikes.sum(0)

    network = seeded(lambda: Network(lambda: surrogate.Sigmoid(alpha=4.0)))
    reference = seeded(lambda: Network(lambda: surrogate.ATan(alpha=2.0)))
    rules = {spike_function(network): fg.rules.arctan(alpha=2.0)}
    name = "SpikingJelly, one step" if mode == "s" else "SpikingJelly, all steps"
    return Comparison(name, network, reference, rules, "Sigmoid → ATan")


def with_norse() -> Comparison:
    from norse.torch import (
        LIFCell,
        LIFParameters,
        LIFRecurrentCell,
        LIFRefracCell,
        LIFRefracParameters,
        LSNNCell,
        LSNNParameters,
    )
    from norse.torch.functional.threshold import Triangle

    class Network(nn.Module):
        def __init__(self, method: str) -> None:
            super().__init__()
            given = {"method": method, "alpha": torch.tensor(0.3), "v_th": torch.tensor(0.05)}
            lif = LIFParameters(**given)
            self.cells = nn.ModuleList(
                [
                    LIFCell(lif),
                    LIFRecurrentCell(32, 32, lif),
                    LIFRefracCell(LIFRefracParameters(lif, torch.tensor(2.0))),
                    LSNNCell(LSNNParameters(**given)),
                ]
            )
            self.weights = nn.ModuleList([nn.Linear(n, 32) for n in (16, 32, 32, 32)])
            self.last = nn.Linear(32, 4)

        def forward(self, x: Tensor) -> Tensor:
            states: list[Any] = [None] * len(self.cells)
            total = torch.zeros(())
            for step in range(x.shape[0]):
                spikes = x[step]
                for i, (weights, cell) in enumerate(zip(self.weights, self.cells, strict=True)):
                    spikes, states[i] = cell(weights(spikes), states[i])
                total = total + self.last(spikes)
            return total

    network, reference = (seeded(lambda m=m: Network(m)) for m in ("triangle", "super"))
    rules = {Triangle: fg.rules.fast_sigmoid(slope=1.0)}
    return Comparison("Norse", network, reference, rules, "triangle → SuperSpike")


def spike_function(network: nn.Module) -> type:
    """The `autograd.Function` whose node is in the graph of a network: the spike function of its neurons."""
    pending, seen = [network(torch.ones(3, 1, 16)).grad_fn], set()
    while pending:
        node = pending.pop()
        function = getattr(type(node), "_forward_cls", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
        seen.add(node)
        pending += [n for n, _ in node.next_functions if n is not None and n not in seen]
    raise LookupError("the network applies no autograd.Function")


# --- the comparison ---


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def gradients(network: nn.Module, x: Tensor) -> list[Tensor]:
    loss = network(x).square().sum()
    return list(torch.autograd.grad(loss, list(network.parameters())))


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference relative to the largest entry."""
    return max(float((p - q).abs().max() / q.abs().max()) for p, q in zip(a, b, strict=True))


def comparisons() -> Iterator[Comparison]:
    one_step, all_steps = partial(with_spikingjelly, "s"), partial(with_spikingjelly, "m")
    for make in (by_hand, with_snntorch, one_step, all_steps, with_norse):
        try:
            yield make()
        except ImportError as error:
            console.print(f"skipped a network: {error.name} is not installed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=count, default=50, help="time steps (default 50)")
    parser.add_argument("--quick", action="store_true", help="few time steps")
    options = parser.parse_args()
    steps = 10 if options.quick else options.steps
    x = 2 * torch.randn(steps, 8, 16, generator=torch.Generator().manual_seed(1))

    table = Table(
        "library", "surrogate", "sites", "from the library's own", "from the network as it was"
    )
    for each in comparisons():
        native, own = gradients(each.network, x), gradients(each.reference, x)
        with fg.use(each.rules) as block:
            found = gradients(each.network, x)
        sites = len(fg.report(block).with_action("rewrite"))
        same, changed = difference(found, own), difference(found, native)
        table.add_row(each.library, each.what, str(sites), f"{same:.1e}", f"{changed:.1e}")
        if not (same < 1e-3 and changed > 1e-2):
            raise SystemExit(f"{each.library}: the surrogate was not exchanged")
    console.print("Relative differences of the gradients under the exchanged surrogate:")
    console.print(table)


if __name__ == "__main__":
    main()
