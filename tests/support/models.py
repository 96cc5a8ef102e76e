"""Models for the tests, and the naive reference: the same model, edited by hand.

Nothing here knows the product. A reference is written as a user would write it without the product: activations out
of place, each an `autograd.Function` with a plain `forward(ctx, ...)` and `backward(ctx, ...)`.
"""

# Annotations stay objects here: a plain GraphModule whose placeholders are annotated with text cannot be pickled.
import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Backward = Callable[[Tensor, Tensor], Tensor]
Activation = Callable[[Tensor], Tensor]


# --- naive rules ---


class Naive(torch.autograd.Function):
    """`function` in the forward, `backward(grad, x)` in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Activation, backward: Backward) -> Tensor:
        ctx.save_for_backward(x)
        ctx.naive_backward = backward
        return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.naive_backward(grad, x), None, None


def naive(function: Activation, backward: Backward) -> Activation:
    return lambda x: Naive.apply(x, function, backward)


def rectangular(a: float, b: float) -> Backward:
    return lambda grad, x: torch.where((x < a) | (x > b), torch.zeros_like(grad), grad)


def scale(s: float) -> Backward:
    return lambda grad, x: grad * s


def fast_sigmoid(slope: float) -> Backward:
    return lambda grad, x: grad / (1 + slope * x.abs()).pow(2)


# --- models edited by hand ---

# Bound here, so that a patched torch.nn.functional does not reach the modules too.
MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: F.relu,
    nn.GELU: F.gelu,
    nn.SiLU: F.silu,
    nn.Sigmoid: torch.sigmoid,
    nn.Hardswish: F.hardswish,
    nn.Hardsigmoid: F.hardsigmoid,
}
FUNCTIONS: dict[str, Activation] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


class Edited(nn.Module):
    """Stands where an activation module stood."""

    def __init__(self, function: Activation, backward: Backward) -> None:
        super().__init__()
        self.call = naive(function, backward)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@contextlib.contextmanager
def edited_by_hand(model: nn.Module, backward: Backward) -> Iterator[nn.Module]:
    """The model with every activation exchanged for a naive one; its parameters and buffers are the model's."""
    tensors = (*model.parameters(), *model.buffers())
    edited = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for parent in list(edited.modules()):
        for name, child in parent.named_children():
            if type(child) in MODULES:
                setattr(parent, name, Edited(MODULES[type(child)], backward))

    def by_hand(function: Activation) -> Callable[..., Tensor]:
        def call(x: Tensor, inplace: bool = False) -> Tensor:
            return naive(function, backward)(
                x
            )  # torchvision uses the result, never the input again

        return call

    patches = {name: by_hand(function) for name, function in FUNCTIONS.items()}
    with mock.patch.multiple(F, **patches):
        yield edited


# --- torchvision ---


@dataclass(frozen=True)
class Vision:
    """A classifier of torchvision with random weights, and the smallest inputs that it takes."""

    name: str
    size: int = 32
    train_size: int = 32
    options: tuple[tuple[str, Any], ...] = ()

    def make(self) -> nn.Module:
        import torchvision

        model = getattr(torchvision.models, self.name)(**dict(self.options))
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():  # the head of a vision transformer
                nn.init.normal_(parameter, std=0.1)
        return model

    def sample(self, training: bool) -> Tensor:
        size = self.train_size if training else self.size
        return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


QUICK = (("init_weights", False),)  # the initialisation of these two takes a minute

# As vit_b_16, whose 86 million parameters take long, with two of its twelve layers
VIT = (
    ("image_size", 32),
    ("patch_size", 16),
    ("num_layers", 2),
    ("num_heads", 3),
    ("hidden_dim", 48),
    ("mlp_dim", 96),
)

VISION = [
    Vision("resnet18"),
    Vision("vgg16_bn"),
    Vision("densenet121"),
    Vision("mobilenet_v3_small"),
    Vision("efficientnet_b0"),
    Vision("VisionTransformer", options=VIT),
    Vision("swin_t"),
    # its auxiliary classifier, in training, takes nothing smaller than 299
    Vision("inception_v3", size=75, train_size=299, options=QUICK),
    Vision("googlenet", options=QUICK),
]


# --- hand-written models, each with its reference ---


class Spellings(nn.Module):
    """One ReLU in every common spelling, one of them used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.act = nn.ReLU()
        self.inplace = nn.ReLU(inplace=True)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(7))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inplace(self.norm(self.conv(x)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        a, b, c, d, e, f, g = self.layers
        x = torch.relu(a(x))
        x = b(x).relu()
        x = self.act(c(x))
        x = self.act(d(x)) + x
        x = self.act(e(x))
        x = f(x)
        F.relu_(x)
        x = g(x)
        x.relu_()
        return self.head(x)


class SpellingsByHand(Spellings):
    """`Spellings`, out of place, with the activation it is given."""

    def __init__(self, relu: Activation) -> None:
        super().__init__()
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        relu = self.relu
        x = relu(self.norm(self.conv(x)))
        x = F.max_pool2d(relu(self.conv2(x)), 2).flatten(1)
        a, b, c, d, e, f, g = self.layers
        x = relu(b(relu(a(x))))
        x = relu(c(x))
        x = relu(d(x)) + x
        x = relu(e(x))
        x = relu(f(x))
        x = relu(g(x))
        return self.head(x)


class Smooth(nn.Module):
    """No statistics and no random numbers; relu out of place, in place, discarded and on a view; a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act, self.tanh = nn.ReLU(inplace=True), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        F.relu_(x)
        y = self.b(x)
        y[:, :5].relu_()
        y = self.act(y + 0.5 * x) + F.relu(x - 0.2)
        return self.c(self.tanh(y)).tanh()


class SmoothByHand(Smooth):
    def __init__(self, relu: Activation, tanh: Activation) -> None:
        super().__init__()
        self.relu, self.tanh_ = relu, tanh

    def forward(self, x: Tensor) -> Tensor:
        relu, tanh = self.relu, self.tanh_
        x = relu(self.a(x))
        y = self.b(x)
        y = torch.cat([relu(y[:, :5]), y[:, 5:]], 1)
        y = relu(y + 0.5 * x) + relu(x - 0.2)
        return tanh(self.c(tanh(y)))


class Branching(nn.Module):
    """Another computation in training than in evaluation: two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.a(x))
        if self.training:
            y = torch.relu(self.b(x))
            x = x + y
        else:
            x = (torch.tanh(self.b(x)) * 2).relu_()
        return torch.tanh(self.c(x))


class BranchingByHand(Branching):
    def __init__(self, relu: Activation, tanh: Activation) -> None:
        super().__init__()
        self.relu, self.tanh = relu, tanh

    def forward(self, x: Tensor) -> Tensor:
        relu, tanh = self.relu, self.tanh
        x = relu(self.a(x))
        x = x + relu(self.b(x)) if self.training else relu(tanh(self.b(x)) * 2)
        return tanh(self.c(x))
