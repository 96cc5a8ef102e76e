"""The measured cases: operators, training steps, attributions, transforms and memory; native, ours and of the peers.

A case is a dict of candidates by name, native PyTorch first. `compare` and the pytest-benchmark suites share the cases.
Names: a candidate of this package has the name of its rule, one of a peer begins with the name of the peer (see
`_peers`), and options follow a comma. Candidates are made and timed without the C++ extension, unless their last option
is "extension".
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, fx, nn

import freegrad_fx as fg
from freegrad_fx.extension import library

from . import _peers as peers
from ._measure import saved_bytes

Step: TypeAlias = Callable[[], Any]
Made = TypeVar("Made")
Makers: TypeAlias = dict[str, Callable[[], Made]]
Models: TypeAlias = Makers[nn.Module]
Shape: TypeAlias = tuple[int, ...]

NATIVE = "native"
NATIVE_RELU = "native relu"
EXTENSION = ", extension"


# The built-in rules for operations of one input.
_BUILT_IN = [
    rule
    for rule in vars(fg.rules).values()
    if isinstance(rule, fg.Rule) and not rule.declaration.needs_operation
]
RULES = (*(rule.name for rule in _BUILT_IN if "operation" in rule.kinds),)

# The rules that are measured: those of the other libraries, those that cost least, and one of each other kind.
MEASURED = (
    "d(Linear)", "straight_through", "scale", "reverse", "clip_value", "clip_norm", "centralize", "noise",
    "full_jam", "positive_jam", "rectangular_jam", "d(ReLU)", "guided", "rectangular", "clipped_straight_through",
    "triangular", "fast_sigmoid", "arctan", "gaussian", "few_bit", "exact_relu",
)  # fmt: skip
ELEMENTWISE = (*(name for name in MEASURED if not fg.get(name).declaration.reducing),)

# A slope that SpikingJelly's SoftSign also supports.
PARAMETERS: dict[str, dict[str, Any]] = {"fast_sigmoid": {"slope": 2.0}}

# Rules that read x, and save less than x.
LESS_THAN_X = ("few_bit", "exact_relu")

# Rules that read x only through a mask, and can save the mask instead of x.
MASKED = (
    *(n for n in MEASURED if fg.get(n).declaration.mask is not None and n not in LESS_THAN_X),
)

FORWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "heaviside": fg.vocabulary.heaviside,
    "binarize": fg.vocabulary.binarize,
    "round": torch.round,
    "ceil": torch.ceil,
    "floor": torch.floor,
    "sign": torch.sign,
}

# In addition to relu, a rule is measured on the forwards of its peers.
OTHER_FORWARDS = {
    "straight_through": ("heaviside", "round", "ceil", "floor", "sign"),
    "clipped_straight_through": ("binarize",),
    "rectangular": ("heaviside",),
    "triangular": ("heaviside",),
    "fast_sigmoid": ("heaviside",),
    "arctan": ("heaviside",),
}


def rule_of(name: str, **options: Any) -> fg.Rule:
    """A rule, with the parameters for the measurement."""
    return fg.get(name)(**PARAMETERS.get(name, {}), **options)


# --- the C++ extension ---


def choose(candidate: str) -> None:
    """Use the C++ extension from now on if the name of a candidate says so; otherwise do not."""
    library.switch(on=candidate.endswith(EXTENSION))


def made(candidate: str, make: Callable[[], Made]) -> Made:
    """Make a candidate. The generated code of a model keeps what is in use when it is transformed."""
    choose(candidate)
    return make()


def with_extension(makers: Makers[Made]) -> Makers[Made]:
    """Candidates of this package, and the same with the C++ extension if it is built."""
    names = ("", EXTENSION) if fg.extension.status().active else ("",)
    return {f"{name}{end}": make for name, make in makers.items() for end in names}


# --- operators ---


class Activation(nn.Module):
    """One activation as a module: used natively, and transformed."""

    def __init__(self, forward: str = "relu") -> None:
        super().__init__()
        self.function = FORWARDS[forward]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def under(rule: fg.Rule, forward: str = "relu") -> nn.Module:
    """The activation, transformed with a rule."""
    table = fg.RuleTable([fg.on(["activations", "quantizers"]).backward(rule)])
    return fg.transform(Activation(forward), table, strict=True)


class _Window(torch.autograd.Function):
    """`rectangular` without checks: neither whether x is NaN, nor whether a block is active."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return None, torch.ops.aten.hardtanh_backward.default(grads[0], x, -0.5, 0.5)


class _Through(torch.autograd.Function):
    """The same for `d(Linear)`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0]


class Bare(nn.Module):
    """The minimal decoupled relu in Python."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(torch.relu(x.detach()), x)  # type: ignore[no-any-return]


BARE = {"rectangular": _Window, "d(Linear)": _Through}


def operator_makers(rule: str) -> Models:
    """A rule on relu and on other forwards, with native relu and the peers that have the rule; made when called."""
    ours: Models = {rule: lambda: under(rule_of(rule))}
    for forward in OTHER_FORWARDS.get(rule, ()):
        ours[f"{rule} on {forward}"] = lambda forward=forward: under(rule_of(rule), forward)  # type: ignore[misc]
    if rule in MASKED:
        ours[f"{rule}, save=mask"] = lambda: under(rule_of(rule, save="mask"))
    bare: Models = {f"{NATIVE} Function, bare": lambda: Bare(BARE[rule])} if rule in BARE else {}
    return {NATIVE_RELU: Activation, **with_extension(ours), **bare, **peers.operators(rule)}


def operator(rule: str) -> dict[str, nn.Module]:
    """The same, made."""
    return {name: made(name, make) for name, make in operator_makers(rule).items()}


def input_and_gradient(shape: Shape) -> tuple[Tensor, Tensor]:
    """The same numbers for every candidate."""
    numbers = torch.Generator().manual_seed(0)
    x, grad = torch.randn(shape, generator=numbers), torch.randn(shape, generator=numbers)
    return x.requires_grad_(), grad


def operator_step(module: nn.Module, shape: Shape) -> Step:
    """Forward and backward of a module of one tensor."""
    x, grad = input_and_gradient(shape)

    def step() -> None:
        x.grad = None
        module(x).backward(grad)

    return step


def gradient(module: nn.Module, shape: Shape = (64, 64)) -> Tensor:
    """The gradient of the input of a module. Random rules draw the same numbers in each call."""
    x, grad = input_and_gradient(shape)
    torch.manual_seed(1)
    (found,) = torch.autograd.grad(module(x), x, grad)
    return found


def gradients(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The gradient of each candidate."""
    return {name: made(name, lambda m=m: gradient(m)) for name, m in modules.items()}  # type: ignore[misc]


def differences(gradients: dict[str, Tensor]) -> dict[str, str]:
    """The candidates whose gradient differs from our first candidate's, and by how much; native ones are left out."""
    ours = next(g for name, g in gradients.items() if is_ours(name))
    return {
        name: f"another gradient: up to {(other - ours).abs().max():.2g} apart"
        for name, other in gradients.items()
        if not name.startswith(NATIVE) and not torch.allclose(other, ours, rtol=1e-5, atol=1e-6)
    }


def is_ours(candidate: str) -> bool:
    """Whether a candidate is neither native PyTorch nor a peer's."""
    return not candidate.startswith(NATIVE) and peers.peer_of(candidate) is None


def compiled(module: nn.Module, fullgraph: bool = False) -> nn.Module:
    """A compiled module. Call `torch._dynamo.reset` before a group of them."""
    # The graphs of all rules belong to one forward, and are counted as its recompilations.
    torch._dynamo.config.recompile_limit = 64
    result: nn.Module = torch.compile(module, fullgraph=fullgraph)  # type: ignore[assignment]
    return result


def compiled_operator(rule: str) -> dict[str, nn.Module]:
    """A compiled rule, with native relu in eager mode and compiled."""
    return {
        NATIVE_RELU: Activation(),
        f"{NATIVE_RELU}, compiled": compiled(Activation(), fullgraph=True),
        rule: compiled(under(rule_of(rule)), fullgraph=True),
    }


FUSED = ("arctan", "fast_sigmoid", "triangular", "rectangular")


def fused_operator(rule: str) -> dict[str, nn.Module]:
    """A rule in eager mode, without and with `compile=True`."""
    return {
        NATIVE_RELU: Activation(),
        rule: under(rule_of(rule)),
        f"{rule}, fuse": under(rule_of(rule, compile=True)),
    }


# --- training steps ---


class SpikingMLP(nn.Module):
    """Leaky integrate-and-fire layers over time. Its spikes are relus, which a rule can replace by a step."""

    def __init__(self, width: int = 256, steps: int = 10) -> None:
        super().__init__()
        self.inputs, self.hidden = nn.Linear(64, width), nn.Linear(width, width)
        self.outputs, self.spike = nn.Linear(width, 10), nn.ReLU()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        first = second = total = torch.zeros(())
        for _ in range(self.steps):
            first = 0.9 * first + self.inputs(x)
            second = 0.9 * second + self.hidden(self.spike(first - 1))
            total = total + self.outputs(self.spike(second - 1))
        return total


class LSTMClassifier(nn.Module):
    """An LSTM, whose activations are not sites, and a head with one activation that is a site."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 64, batch_first=True)
        self.head = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


def torchvision_models() -> Any:
    """torchvision.models, also with a CPU build of torch."""
    return importlib.import_module("_torchvision").torchvision.models


def mlp(quick: bool) -> nn.Module:
    layers = range(2 if quick else 8)
    return nn.Sequential(*(layer for _ in layers for layer in (nn.Linear(256, 256), nn.ReLU())))


def resnet18(quick: bool) -> nn.Module:
    return torchvision_models().resnet18()  # type: ignore[no-any-return]


def vgg11_bn(quick: bool) -> nn.Module:
    models = torchvision_models()
    if not quick:
        return models.vgg11_bn()  # type: ignore[no-any-return]
    # without its classifier, because drawing its 120 million weights takes a second
    features = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def vit(quick: bool) -> nn.Module:
    return torchvision_models().VisionTransformer(  # type: ignore[no-any-return]
        image_size=32 if quick else 64,
        patch_size=8,
        num_layers=1 if quick else 4,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=512,
    )


@dataclass(frozen=True)
class Model:
    """A model to train.

    Attributes:
        make: The function that creates the model; its argument is whether to create a small one.
        shape: The shape of its input.
        quick_shape: The shape of its input in a quick run.
        op: The op that gets the rules.
    """

    make: Callable[[bool], nn.Module]
    shape: Shape
    quick_shape: Shape
    op: str = "relu"

    def input(self, quick: bool) -> Tensor:
        """The same numbers at every call."""
        shape = self.quick_shape if quick else self.shape
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))


SPIKING_STEPS = "spiking MLP, 10 steps"
MODELS = {
    "MLP 8×256": Model(mlp, (4096, 256), (64, 256)),
    "resnet18": Model(resnet18, (8, 3, 96, 96), (2, 3, 32, 32)),
    "vgg11_bn": Model(vgg11_bn, (8, 3, 64, 64), (2, 3, 32, 32)),
    "ViT, 4 layers of 128": Model(vit, (8, 3, 64, 64), (2, 3, 32, 32), op="gelu"),
    "LSTM classifier": Model(lambda quick: LSTMClassifier(), (16, 50, 32), (2, 5, 32)),
    SPIKING_STEPS: Model(
        lambda quick: SpikingMLP(32, 2) if quick else SpikingMLP(), (128, 64), (4, 64)
    ),
}

# By candidate: the rule, and its options.
STEP_RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "rectangular": ("rectangular", {}),
    "rectangular, save=mask": ("rectangular", {"save": "mask"}),
    "d(Linear)": ("d(Linear)", {}),
    "straight_through": ("straight_through", {}),
    "triangular": ("triangular", {}),
    "fast_sigmoid": ("fast_sigmoid", {}),
    "arctan": ("arctan", {}),
}
# Fewer rules, because compilation is slow.
COMPILED_RULES = ("rectangular", "d(Linear)", "straight_through", "arctan")


def step_models(name: str, quick: bool) -> Models:
    """A model, native and with each rule. They share the parameters, so that a large model is in memory once."""
    model = MODELS[name]
    torch.manual_seed(0)
    native = model.make(quick)

    def ruled(rule: str, **options: Any) -> Callable[[], nn.Module]:
        return lambda: fg.transform(native, {model.op: rule_of(rule, **options)})

    ours = {candidate: ruled(rule, **options) for candidate, (rule, options) in STEP_RULES.items()}
    if name.startswith("spiking"):
        ours["arctan, heaviside"] = ruled("arctan", forward="heaviside")
    return {NATIVE: lambda: native, **with_extension(ours)}


def peers_step_models(name: str, quick: bool) -> Models:
    """The same model, with the activations of the peers that can replace its own."""
    torch.manual_seed(0)
    native = MODELS[name].make(quick)
    absent, models = peers.missing(), Models()
    if name in ("MLP 8×256", "resnet18") and "FreeGrad" not in absent:
        wrapped = importlib.import_module("_freegrad").wrapped
        models["FreeGrad rectangular"] = lambda: wrapped(native, rule_of("rectangular"))
    if name.startswith("spiking"):
        for candidate, make in peers.operators("arctan").items():
            models[candidate] = lambda make=make: with_spike(native, make())  # type: ignore[misc]
    return models


def with_spike(model: nn.Module, spike: nn.Module) -> nn.Module:
    """A copy of a spiking model with another spike module."""
    model = copy.deepcopy(model)
    model.spike = spike
    return model


def training_step(model: nn.Module, x: Tensor) -> Step:
    """Forward, backward and a step of SGD. The learning rate is zero, so that every step does the same work."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


SGD_ALONE = "native, SGD alone"
NATIVE_AGAIN = "native, once more"  # shows the difference between two equal candidates


def steps(name: str, quick: bool) -> dict[str, Step]:
    """A training step in eager mode, and the part of SGD in it."""
    models = step_models(name, quick) | peers_step_models(name, quick)
    x = MODELS[name].input(quick)
    found = {
        candidate: training_step(made(candidate, make), x) for candidate, make in models.items()
    }
    sgd = torch.optim.SGD(models[NATIVE]().parameters(), lr=0.0)
    native = found.pop(NATIVE)
    return {NATIVE: native, NATIVE_AGAIN: native, SGD_ALONE: sgd.step, **found}


def compiled_steps(name: str, quick: bool) -> dict[str, Step]:
    """A compiled training step."""
    torch._dynamo.reset()
    models, x = step_models(name, quick), MODELS[name].input(quick)
    rules = COMPILED_RULES[:1] if quick else COMPILED_RULES
    native = training_step(compiled(models[NATIVE]()), x)
    found = {rule: training_step(compiled(models[rule]()), x) for rule in rules}
    return {NATIVE: native, NATIVE_AGAIN: native, **found}


# --- attributions ---


class ConvNet(nn.Sequential):
    """A small network to explain."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def of_the_score(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient of the first class's score with respect to the input."""
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    return found


def attributions(quick: bool) -> dict[str, Callable[[], Tensor]]:
    """Guided backpropagation of one network. The peers add hooks to a model; hooks that can stay are added once."""
    torch.manual_seed(0)
    model = ConvNet().eval()
    x = torch.randn(1 if quick else 8, 3, 16 if quick else 64, 16 if quick else 64)
    guided = fg.transform(model, {"relu": "guided"}, strict=True)
    found: dict[str, Callable[[], Tensor]] = {
        "native gradient": lambda: of_the_score(model, x),
        "guided": lambda: of_the_score(guided, x),
    }
    absent = peers.missing()
    if "Captum" not in absent:
        explained = importlib.import_module("captum.attr").GuidedBackprop(copy.deepcopy(model))
        found["Captum GuidedBackprop"] = lambda: explained.attribute(
            x.detach().requires_grad_(), target=0
        )
    if "zennit" not in absent:
        torchvision_models()  # zennit imports torchvision
        hooked = copy.deepcopy(model)
        importlib.import_module("zennit.composites").GuidedBackprop().register(hooked)
        found["zennit GuidedBackprop"] = lambda: of_the_score(hooked, x)
    return found


# --- the time that transform takes ---

TRANSFORMED = ("resnet18", "resnet152", "vit_l_16", "densenet121")


def transform(name: str) -> dict[str, Step]:
    """`transform`, which captures both modes of a model, and a plain symbolic trace."""
    with torch.device("meta"):
        model = torchvision_models().get_model(name, weights=None)
    return {
        f"{NATIVE} symbolic_trace": lambda: fx.symbolic_trace(model),
        "transform": lambda: fg.transform(model, "rectangular"),
    }


CHAIN = "a chain of activations"


def transform_chain(quick: bool) -> dict[str, Step]:
    """A chain of activations, and one that is four times as long."""
    short = 100 if quick else 1000
    models = {f"transform, {n}": nn.Sequential(*(nn.ReLU() for _ in range(n))) for n in (short, 4 * short)}  # fmt: skip
    return {name: lambda m=m: fg.transform(m, "rectangular") for name, m in models.items()}  # type: ignore[misc]


# --- memory ---


def rule_of_output() -> fg.Rule:
    """A rule that reads only y; there is no built-in rule of this kind."""

    @fg.register("a rule of y", overwrite=True)
    def of_y(grad: Tensor, y: Tensor) -> Tensor:
        """grad·1[y > 0]"""
        return grad * (y > 0)

    return of_y


def operator_bytes(module: nn.Module, size: int = 4096) -> float:
    """The saved bytes per element of an activation and the next operation, which saves its input, as most layers do."""
    x = torch.ones(size, requires_grad=True)
    return saved_bytes(lambda: module(x * 1).square(), [x]) / size


def operator_memory() -> Iterator[tuple[str, float]]:
    """The bytes per element that are saved for the backward, by candidate, native relu first."""
    yield NATIVE_RELU, operator_bytes(Activation())
    yield "a rule of y", operator_bytes(under(rule_of_output()))
    for rule in MEASURED:
        for candidate, make in operator_makers(rule).items():
            if peers.peer_of(candidate):
                yield f"{candidate}, {rule}", operator_bytes(make())
            elif candidate in (rule, f"{rule}, save=mask"):
                yield candidate, operator_bytes(made(candidate, make))


MEMORY_MODELS = ("MLP 8×256", "resnet18")


def step_memory(name: str, quick: bool) -> Iterator[tuple[str, float]]:
    """The same for a whole training step: bytes per element of the outputs of the activations."""
    x, models = MODELS[name].input(quick), step_models(name, quick)
    elements = activated_elements(models[NATIVE](), x)
    for candidate, make in (models | peers_step_models(name, quick)).items():
        if candidate.endswith(EXTENSION):
            continue  # it keeps the same
        model = made(candidate, make)
        known = [x, *model.parameters(), *model.buffers()]

        def loss(model: nn.Module = model) -> Tensor:
            return model(x).square().mean()  # type: ignore[no-any-return]

        yield candidate, saved_bytes(loss, known) / elements


def activated_elements(model: nn.Module, x: Tensor) -> int:
    """The number of elements that the ReLU modules of a model return in one forward."""
    counted: list[int] = []
    handles = [
        module.register_forward_hook(lambda m, args, result: counted.append(result.numel()))
        for module in model.modules()
        if isinstance(module, nn.ReLU)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return sum(counted)
