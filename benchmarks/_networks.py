"""Steps of whole networks: of small tensors, in blocks of `use`, and of networks of the libraries for spiking networks.

Each function returns the candidates of a group, as those of `_cases` do.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import freegrad_fx as fg

from . import _cases as cases
from . import _peers as peers
from ._cases import NATIVE, Models, Step

TIME = 10  # time steps of a spiking network

# --- networks of small tensors ---


class Layers(nn.Module):
    """Linear layers with activations."""

    def __init__(self, count: int) -> None:
        super().__init__()
        layers = ([nn.Linear(64, 64), nn.ReLU()] for _ in range(count))
        self.layers = nn.Sequential(*itertools.chain.from_iterable(layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


class _Step(torch.autograd.Function):
    """A spike with a surrogate written by hand: what a spiking network has without this package."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] / (1 + SLOPE * x.abs()).square()


class Spiking(nn.Module):
    """Two layers of leaky neurons over time. Its spikes are relus, which a rule can replace by a step."""

    def __init__(self, spike: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)
        self.spike = nn.ReLU() if spike is None else spike

    def forward(self, x: Tensor) -> Tensor:
        a, b, total = torch.zeros(64, 128), torch.zeros(64, 64), torch.zeros(64, 64)
        for _ in range(TIME):
            a = 0.9 * a + self.first(x)
            fired = self.spike(a - 1)
            a = a - fired
            b = 0.9 * b + self.second(fired)
            last = self.spike(b - 1)
            b, total = b - last, total + last
        return total


LAYERS = "20 layers of 64×64"
SPIKING = f"spiking MLP, {TIME} steps of 64×128"
SMALL = (LAYERS, SPIKING)
SLOPE = 25.0
# By group, then by candidate.
SMALL_RULES = {
    LAYERS: {name: cases.rule_of(name) for name in ("rectangular", "fast_sigmoid")},
    SPIKING: {
        "fast_sigmoid": fg.rules.fast_sigmoid(slope=SLOPE),
        "fast_sigmoid, heaviside": fg.rules.fast_sigmoid(slope=SLOPE, forward="heaviside"),
    },
}


def small_models(group: str) -> Models:
    """A network of small tensors, native, with rules, and with surrogates of the peers."""

    def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        def run() -> nn.Module:
            torch.manual_seed(0)
            return make()

        return run

    native = seeded((lambda: Layers(20)) if group == LAYERS else Spiking)
    models: Models = {NATIVE: native}
    ours = {
        name: lambda rule=rule: fg.transform(native(), {"relu": rule})
        for name, rule in SMALL_RULES[group].items()
    }
    models |= cases.with_extension(ours)  # type: ignore[arg-type]
    if group == SPIKING:
        models[f"{NATIVE} Function, by hand"] = seeded(lambda: Spiking(_Step.apply))
        absent = peers.missing()
        theirs = {
            "snnTorch fast_sigmoid": ("snntorch.surrogate", "fast_sigmoid", {"slope": SLOPE}),
            "SpikingJelly SoftSign": (
                "spikingjelly.activation_based.surrogate", "SoftSign", {"alpha": SLOPE},
            ),
        }  # fmt: skip
        for name, (module, function, options) in theirs.items():
            if peers.peer_of(name) not in absent:
                spike = getattr(importlib.import_module(module), function)(**options)
                models[name] = seeded(lambda spike=spike: Spiking(spike))  # type: ignore[misc]
    return models


def small_steps(group: str) -> dict[str, Step]:
    """Forward and backward of a network of small tensors."""
    models = small_models(group)
    return {n: cases.operator_step(cases.made(n, make), (64, 64)) for n, make in models.items()}


# --- blocks ---

BLOCK_MODELS = {"MLP 8×256": (512, 256), "resnet18": (2, 3, 64, 64)}
BLOCKS = (*(f"{name}, small" for name in BLOCK_MODELS), "MLP 8×256, small, no site")


def in_a_block(step: Step, table: fg.RuleTable) -> Step:
    """A step in a block of its own."""

    def run() -> None:
        with fg.use(table):
            step()

    return run


def block_steps(group: str, quick: bool) -> dict[str, Step]:
    """A training step natively, of a transformed model, and in a block of `use`; or in a block that has no site."""
    name, _, _ = group.partition(",")
    shape = cases.MODELS[name].quick_shape if quick else BLOCK_MODELS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = cases.MODELS[name].make(quick)
    native = cases.training_step(model, x)
    op = "gelu" if group.endswith("no site") else "relu"
    table = fg.RuleTable([fg.on(op, optional=True).backward("rectangular")])
    found: cases.Makers[Step] = {"rectangular, use": lambda: in_a_block(native, table)}
    if op == "relu":
        transformed = {"rectangular": lambda: cases.training_step(fg.transform(model, table), x)}
        found = transformed | found
    steps = {n: cases.made(n, make) for n, make in cases.with_extension(found).items()}
    return {NATIVE: native, **steps}


# --- networks of the libraries for spiking networks ---


def _snntorch(surrogate: str, **options: Any) -> nn.Module:
    snntorch = importlib.import_module("snntorch")
    spike = getattr(importlib.import_module("snntorch.surrogate"), surrogate)(**options)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 128), nn.Linear(128, 64)
            self.neurons = nn.ModuleList(
                snntorch.Leaky(beta=0.9, spike_grad=spike) for _ in range(2)
            )

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.neurons
            a, b = first.reset_mem(), second.reset_mem()
            total = torch.zeros(())
            for _ in range(TIME):
                fired, a = first(self.first(x), a)
                fired, b = second(self.second(fired), b)
                total = total + fired
            return total

    return Network()


def _spikingjelly(surrogate: str, **options: Any) -> nn.Module:
    library = "spikingjelly.activation_based"
    parts = ("functional", "layer", "neuron", "surrogate")
    functional, layer, neuron, found = (importlib.import_module(f"{library}.{p}") for p in parts)
    spike = getattr(found, surrogate)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                layer.Linear(64, 128), neuron.LIFNode(surrogate_function=spike(**options)),
                layer.Linear(128, 64), neuron.LIFNode(surrogate_function=spike(**options)),
            )  # fmt: skip
            functional.set_step_mode(self, "m")

        def forward(self, x: Tensor) -> Tensor:
            functional.reset_net(self)
            return self.layers(x.expand(TIME, *x.shape)).sum(0)  # type: ignore[no-any-return]

    return Network()


# By library: the function that makes a network, and its surrogates with the rules that equal them. The first surrogate
# is the one that the rules replace.
LIBRARIES: dict[str, tuple[Callable[..., nn.Module], dict[tuple[str, str, float], fg.Rule]]] = {
    "snnTorch": (
        _snntorch,
        {
            ("atan", "alpha", 2.0): fg.rules.arctan(alpha=2.0),
            ("fast_sigmoid", "slope", 2.0): fg.rules.fast_sigmoid(slope=2.0),
        },
    ),
    "SpikingJelly": (
        _spikingjelly,
        {
            ("ATan", "alpha", 2.0): fg.rules.arctan(alpha=2.0),
            ("SoftSign", "alpha", 2.0): fg.rules.fast_sigmoid(slope=2.0),
        },
    ),
}


def spike_function(network: nn.Module) -> type:
    """The `autograd.Function` whose node is in the graph of a network: the spike function of its neurons."""
    pending, seen = [network(torch.ones(1, 64)).grad_fn], set()
    while pending:
        node = pending.pop()
        function = getattr(type(node), "_forward_cls", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
        seen.add(node)
        pending += [n for n, _ in node.next_functions if n is not None and n not in seen]
    raise LookupError("the network applies no autograd.Function")


def library_networks(library: str) -> dict[str, tuple[nn.Module, fg.RuleTable | None]]:
    """The network of a library with its own surrogates, and the first of them with a table for each rule."""
    make, surrogates = LIBRARIES[library]

    def network(surrogate: str, parameter: str, value: float) -> nn.Module:
        torch.manual_seed(0)
        return make(surrogate, **{parameter: value})

    found: dict[str, tuple[nn.Module, fg.RuleTable | None]] = {
        f"{library} {given[0]}": (network(*given), None) for given in surrogates
    }
    replaced = next(iter(found.values()))[0]
    spike = spike_function(replaced)
    ours = {
        f"{rule.name}, use": lambda rule=rule: (replaced, fg.RuleTable.of({spike: rule}))
        for rule in surrogates.values()
    }
    return found | {n: cases.made(n, m) for n, m in cases.with_extension(ours).items()}  # type: ignore[arg-type]


def library_steps(library: str) -> tuple[dict[str, Step], dict[str, str]]:
    """Forward and backward of the networks of a library, and what differs in their gradients.

    A network with a table is compared with the network that has the same surrogate of the library.
    """
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)).mul_(4).requires_grad_()
    networks = library_networks(library)
    steps: dict[str, Step] = {}
    gradients: dict[str, Tensor] = {}
    for name, (network, table) in networks.items():

        def step(network: nn.Module = network) -> None:
            network(x).square().mean().backward()

        steps[name] = step if table is None else in_a_block(step, table)
        x.grad = None
        cases.made(name, steps[name])
        assert x.grad is not None
        gradients[name] = x.grad.clone()
    notes: dict[str, str] = {}
    surrogates = LIBRARIES[library][1].items()
    for (surrogate, _, _), rule in surrogates:
        theirs = gradients[f"{library} {surrogate}"]
        same = {n: g for n, g in gradients.items() if n.startswith(f"{rule.name},")}
        notes |= cases.differences({**same, f"{library} {surrogate}": theirs})
    return steps, notes
