"""What is compared: operators, training steps, memory, and the time it takes to transform and to compile."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import freegrad_fx as fg

Step: TypeAlias = Callable[[], Any]

PEERS = ("freegrad", "snntorch", "spikingjelly", "brevitas", "captum", "zennit")


def peer(name: str) -> Any:
    """A peer library, or None where it is not installed."""
    return importlib.import_module(name) if name not in missing() else None


def missing() -> list[str]:
    """The peers that are not installed."""
    return [name for name in PEERS if importlib.util.find_spec(name) is None]


# --- operators ---


def around(rule: str | fg.Rule, op: Callable[[Tensor], Tensor] = torch.relu) -> nn.Module:
    """One activation under a rule, as `transform` makes it."""

    class Operator(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return op(x)

    return fg.transform(
        Operator(), fg.RuleTable([fg.on(["activations", "quantizers"]).backward(rule)])
    )


def training(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Step:
    """Forward and backward of a function of one tensor."""
    torch.manual_seed(0)
    x, grad = torch.randn(shape, requires_grad=True), torch.randn(shape)

    def step() -> None:
        x.grad = None
        function(x).backward(grad)

    return step


def peers_of(rule: str) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The same gradient by the libraries that have it."""
    freegrad, snntorch = peer("freegrad"), peer("snntorch")
    if freegrad is not None and rule in FREEGRAD:
        layer = freegrad.Activation(forward="ReLU")

        def by_freegrad(x: Tensor) -> Tensor:
            with freegrad.use(rule=rule, scope="activations"):
                return layer(x)  # type: ignore[no-any-return]

        yield "FreeGrad", by_freegrad
    if snntorch is not None and rule in ("fast_sigmoid", "arctan"):
        surrogate = importlib.import_module("snntorch.surrogate")
        yield "snnTorch", surrogate.fast_sigmoid() if rule == "fast_sigmoid" else surrogate.atan()
    if peer("spikingjelly") is not None and rule == "arctan":
        surrogate = importlib.import_module("spikingjelly.activation_based.surrogate")
        yield "SpikingJelly", surrogate.ATan()
    if peer("brevitas") is not None and rule == "straight_through":
        yield "Brevitas", importlib.import_module("brevitas.ops.autograd_ste_ops").RoundSteFn.apply


FREEGRAD = (
    "d(ReLU)", "d(Linear)", "rectangular", "triangular", "scale", "clip_norm", "noise", "centralize", "full_jam",
    "positive_jam", "rectangular_jam",
)  # fmt: skip

ELEMENTWISE = (
    "d(Linear)", "d(ReLU)", "straight_through", "clipped_straight_through", "rectangular", "triangular", "fast_sigmoid",
    "arctan", "scale", "reverse", "clip_value", "noise", "full_jam", "positive_jam", "rectangular_jam", "guided",
)  # fmt: skip


def operators(shape: tuple[int, ...]) -> Iterator[tuple[str, dict[str, Step]]]:
    """Every rule over native relu, with its peers, in eager mode."""
    for rule in ELEMENTWISE:
        op = torch.round if rule == "straight_through" else torch.relu
        ours = training(around(rule, op), shape)
        steps = {"native relu": training(torch.relu, shape), rule: ours}
        for name, function in peers_of(rule):
            steps[f"{name}'s"] = training(function, shape)
        yield rule, steps


def compiled_operators(shape: tuple[int, ...]) -> Iterator[tuple[str, dict[str, Step]]]:
    """Every rule compiled, over eager native relu and compiled native relu."""
    for rule in ELEMENTWISE:
        torch._dynamo.reset()
        yield (
            rule,
            {
                "native relu, eager": training(torch.relu, shape),
                "native relu, compiled": training(torch.compile(torch.relu), shape),
                f"{rule}, compiled": training(torch.compile(around(rule), fullgraph=True), shape),
            },
        )


# --- training steps ---


class SpikingMLP(nn.Module):
    """Leaky integrate-and-fire layers over time; its spikes are relus, which a rule makes fire."""

    def __init__(self, width: int = 256, steps: int = 10) -> None:
        super().__init__()
        self.inputs, self.hidden, self.outputs = (
            nn.Linear(64, width),
            nn.Linear(width, width),
            nn.Linear(width, 10),
        )
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        first = second = torch.zeros(())
        total = torch.zeros(())
        for _ in range(self.steps):
            first = 0.9 * first + self.inputs(x)
            spikes = F.relu(first - 1)
            second = 0.9 * second + self.hidden(spikes)
            total = total + self.outputs(F.relu(second - 1))
        return total


class LSTMClassifier(nn.Module):
    """An LSTM and a head with an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])  # type: ignore[no-any-return]


def mlp() -> nn.Module:
    """Eight layers of 256."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.ReLU())]
    return nn.Sequential(*layers)


def models(quick: bool) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]]:
    """Models to train: how to make one, the shape of its input, and which op the rules are for."""
    torchvision = importlib.import_module("_torchvision").torchvision
    few = 2 if quick else 8

    def vit() -> nn.Module:
        return torchvision.models.VisionTransformer(  # type: ignore[no-any-return]
            image_size=64, patch_size=8, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=512
        )

    return {
        "MLP 8×256": (mlp, (256 if quick else 4096, 256), "relu"),
        "resnet18": (torchvision.models.resnet18, (few, 3, 96, 96), "relu"),
        "vgg11_bn": (torchvision.models.vgg11_bn, (few, 3, 64, 64), "relu"),
        "ViT, 4 layers of 128": (vit, (few, 3, 64, 64), "gelu"),
        "LSTM classifier": (LSTMClassifier, (16, 50, 32), "relu"),
        "spiking MLP, 10 steps": (SpikingMLP, (128, 64), "relu"),
    }


RULES = ("rectangular", "d(Linear)", "straight_through", "triangular", "fast_sigmoid", "arctan")


def training_step(model: nn.Module, shape: tuple[int, ...], compiled: bool = False) -> Step:
    """Forward, backward and an SGD step."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    function = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad()
        function(x).square().mean().backward()
        optimizer.step()

    return step


def steps(quick: bool, compiled: bool) -> Iterator[tuple[str, dict[str, Step]]]:
    """A training step under each rule over the same step of the untransformed model."""
    for name, (make, shape, op) in models(quick).items():
        if compiled and name == "LSTM classifier":
            continue  # Dynamo leaves nn.LSTM to Python
        torch._dynamo.reset()
        torch.manual_seed(0)
        found = {"native": training_step(make(), shape, compiled)}
        for rule in RULES:
            torch.manual_seed(0)
            model = fg.transform(make(), {op: rule})
            found[rule] = training_step(model, shape, compiled)
        yield name, found


# --- the time that transform takes ---


def transforms() -> Iterator[tuple[str, dict[str, Step]]]:
    """`transform` over a bare symbolic trace."""
    torchvision = importlib.import_module("_torchvision").torchvision
    for name in ("resnet18", "resnet152", "vit_l_16", "densenet121"):
        with torch.device("meta"):
            model = torchvision.models.get_model(name, weights=None)
        yield name, _transforming(model)
    for length in (1000, 4000):
        yield f"a chain of {length}", _transforming(nn.Sequential(*chain(length)))


def chain(length: int) -> list[nn.Module]:
    """That many activations."""
    return [nn.ReLU() for _ in range(length)]


def _transforming(model: nn.Module) -> dict[str, Step]:
    return {
        "symbolic_trace": lambda: fx.symbolic_trace(model),
        "transform": lambda: fg.transform(model, "rectangular"),
    }


# --- memory ---


def saved_bytes(function: Callable[[Tensor], Tensor], size: int = 4096) -> float:
    """The bytes per element that a function saves for its backward."""
    x = torch.randn(size, requires_grad=True)
    # a tensor that is there anyway, such as the input, costs nothing
    seen = {x.untyped_storage().data_ptr()}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(x * 1)
        del y
    return total / size


def memory() -> Iterator[tuple[str, float]]:
    """The bytes per element that each rule saves, and native relu."""
    yield "native relu", saved_bytes(torch.relu)
    for rule in ELEMENTWISE:
        yield rule, saved_bytes(around(rule))


# --- the time that compiling takes ---


def compile_seconds(model: nn.Module, shape: tuple[int, ...]) -> float:
    """How long the first training step of a compiled model takes, less the second."""
    torch._dynamo.reset()
    step = training_step(model, shape, compiled=True)
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return taken[0] - taken[1]
