"""Models for the tests of parameter rules: every layer that has parameters, and users' code that holds some.

The reference is the model itself, untransformed: a rule on a parameter is a formula on the gradient that it has there.
Nothing here comes from the product.
"""

# No text annotations: torch.export and torch.fx read them.
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import reference

Formula = Callable[[Tensor, Tensor], Tensor]


def entrywise(name: str, **parameters: Any) -> Formula:
    formula = reference.ENTRYWISE[name]
    return lambda grad, x: reference.entrywise(formula, grad, x, **parameters)


def whole(name: str, **parameters: Any) -> Formula:
    formula = reference.WHOLE_TENSOR[name]
    return lambda grad, x: formula(grad, **parameters).to(grad.dtype)


# --- layers ---


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def indices(*shape: int, below: int) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(2))


@dataclass(frozen=True)
class Case:
    """A model, and what it is called with.

    Attributes:
        make: Builds it.
        inputs: The positional arguments.
        export: Whether `torch.export` takes it as it is: it drops hooks, and follows no branch on data.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    export: bool = True

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            # the old weight norm says that it is old, a bidirectional transformer that it is not nested
            warnings.simplefilter("ignore")
            model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                # no zeros and ones: each entry tells a rule from the next one
                if parameter.is_floating_point():
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        return model


class Applied(nn.Module):
    """A layer behind another parameter, so that what it hands back is part of the test."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return self.layer(x * self.gain)


class AppliedToTwo(Applied):
    def forward(self, x: Tensor, other: Tensor) -> Any:
        return self.layer(x * self.gain, other)


class LastOf(nn.Module):
    """The output sequence of a recurrent network, and its last states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        output, state = self.layer(x)
        return output, state


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class CrossAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=5, vdim=6, **options)

    def forward(self, x: Tensor, key: Tensor, value: Tensor) -> Any:
        return self.attention(x, key, value)


def layers() -> list[Case]:
    def case(name: str, make: Callable[[], nn.Module], *inputs: Any, **options: Any) -> Case:
        applied = Applied if len(inputs) == 1 else AppliedToTwo
        around = applied if inputs[0].is_floating_point() else nn.Sequential
        return Case(name, lambda: around(make()), inputs, **options)

    x = floats(4, 6)
    norms: list[Case] = []
    for n, shape in ((1, (4, 6, 5)), (2, (4, 6, 5, 5)), (3, (4, 6, 3, 3, 3))):
        batch = getattr(nn, f"BatchNorm{n}d")
        instance = getattr(nn, f"InstanceNorm{n}d")
        norms += [
            case(f"BatchNorm{n}d", functools.partial(batch, 6), floats(*shape)),
            case(
                f"BatchNorm{n}d-momentum-none",
                functools.partial(batch, 6, momentum=None),
                floats(*shape),
                export=False,
            ),
            case(
                f"BatchNorm{n}d-without-statistics",
                functools.partial(batch, 6, track_running_stats=False),
                floats(*shape),
            ),
            case(f"InstanceNorm{n}d", functools.partial(instance, 6, affine=True), floats(*shape)),
            case(
                f"InstanceNorm{n}d-statistics",
                functools.partial(instance, 6, affine=True, track_running_stats=True),
                floats(*shape),
            ),
        ]
    convolutions: list[Case] = []
    for n, size in ((1, 6), (2, 5), (3, 4)):
        shape = (2, 4, *[size] * n)
        convolution = getattr(nn, f"Conv{n}d")
        transposed = getattr(nn, f"ConvTranspose{n}d")
        convolutions += [
            case(
                f"Conv{n}d",
                functools.partial(convolution, 4, 6, 3, padding=1, groups=2),
                floats(*shape),
            ),
            case(
                f"Conv{n}d-circular",
                functools.partial(convolution, 4, 3, 3, padding=1, padding_mode="circular"),
                floats(*shape),
            ),
            case(
                f"ConvTranspose{n}d",
                functools.partial(transposed, 4, 6, 3, stride=2, output_padding=1),
                floats(*shape),
            ),
        ]
    return [
        case("Linear", lambda: nn.Linear(6, 3), x),
        case("Linear-without-bias", lambda: nn.Linear(6, 3, bias=False), x),
        case("Bilinear", lambda: nn.Bilinear(6, 5, 3), x, floats(4, 5)),
        case("PReLU", lambda: nn.PReLU(), x),
        case("PReLU-of-channels", lambda: nn.PReLU(6), x),
        *convolutions,
        *norms,
        case("SyncBatchNorm", lambda: nn.SyncBatchNorm(6), floats(4, 6, 5), export=False),
        case("LayerNorm", lambda: nn.LayerNorm(6), x),
        case("LayerNorm-without-bias", lambda: nn.LayerNorm(6, bias=False), x),
        case("GroupNorm", lambda: nn.GroupNorm(3, 6), floats(4, 6, 5)),
        case("RMSNorm", lambda: nn.RMSNorm(6), x),
        case("Embedding", lambda: nn.Embedding(7, 4, padding_idx=2), indices(3, 5, below=7)),
        case(
            "Embedding-scaled-by-frequency",
            lambda: nn.Embedding(7, 4, scale_grad_by_freq=True),
            indices(3, 5, below=7),
        ),
        *(
            case(
                f"EmbeddingBag-{mode}",
                functools.partial(nn.EmbeddingBag, 7, 4, mode=mode),
                indices(3, 5, below=7),
            )
            for mode in ("sum", "mean", "max")
        ),
    ]


def recurrent() -> list[Case]:
    x = floats(3, 5, 4)
    found = []
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        variants: dict[str, dict[str, Any]] = {
            "": {},
            "-bidirectional": {"bidirectional": True},
            "-two-layers-dropout": {"num_layers": 2, "dropout": 0.3},
            "-without-bias": {"bias": False, "batch_first": True},
        }
        if kind is nn.RNN:
            variants["-relu"] = {"nonlinearity": "relu"}
        if kind is nn.LSTM:
            variants["-proj"] = {"proj_size": 2, "num_layers": 2, "bidirectional": True}
        found += [
            Case(
                kind.__name__ + name,
                lambda kind=kind, options=options: LastOf(kind(4, 6, **options)),
                (x,),
            )
            for name, options in variants.items()
        ]
    found += [
        Case(
            kind.__name__,
            lambda kind=kind: Applied(kind(4, 6)),
            (x[0],),
        )
        for kind in (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
    ]
    return found


def attention() -> list[Case]:
    x = floats(3, 5, 8)
    return [
        Case("MultiheadAttention-packed", SelfAttention, (x,)),
        Case("MultiheadAttention-dropout", lambda: SelfAttention(dropout=0.4), (x,)),
        Case(
            "MultiheadAttention-bias_k",
            lambda: SelfAttention(add_bias_kv=True, add_zero_attn=True),
            (x,),
        ),
        Case("MultiheadAttention-without-bias", lambda: SelfAttention(bias=False), (x,)),
        Case("MultiheadAttention-separate", CrossAttention, (x, floats(3, 7, 5), floats(3, 7, 6))),
        Case(
            "TransformerEncoderLayer",
            lambda: Applied(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)),
            (x,),
        ),
        Case(
            "TransformerEncoderLayer-norm-first",
            lambda: Applied(nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", norm_first=True)),
            (x,),
        ),
        Case(
            "TransformerDecoderLayer",
            lambda: AppliedToTwo(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)),
            (x, floats(3, 4, 8)),
        ),
        Case(
            "TransformerEncoder",
            lambda: Applied(
                nn.TransformerEncoder(
                    nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, nn.LayerNorm(8)
                )
            ),
            (x,),
        ),
        Case(
            "Transformer",
            lambda: AppliedToTwo(nn.Transformer(8, 2, 1, 1, 16, batch_first=True)),
            (x, floats(3, 4, 8)),
        ),
    ]


# --- parameters in the user's own code ---


class Bare(nn.Module):
    """Parameters of the model's own, one used twice, one in a property, one in a method, one through F."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.shift = nn.Parameter(torch.zeros(6))
        self.weight = nn.Parameter(torch.eye(6))
        self.temperature = nn.Parameter(torch.tensor(0.5))

    @property
    def positive(self) -> Tensor:
        return self.scale.exp()

    def cool(self, x: Tensor) -> Tensor:
        return x / (1 + self.temperature**2)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.shift
        return self.cool(F.linear(torch.tanh(x), self.weight)) * self.positive + self.weight[0]


class Lists(nn.Module):
    """Parameters in a ParameterList and in a ParameterDict, by index, in a loop, by key."""

    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ParameterList([torch.randn(6), torch.randn(6), torch.randn(6)])
        self.dict = nn.ParameterDict({"gain": torch.ones(6), "bias": torch.zeros(6)})

    def forward(self, x: Tensor) -> Tensor:
        for entry in self.list:
            x = torch.tanh(x * entry)
        return x * self.dict["gain"] + self.dict["bias"] + self.list[1]


class Tied(nn.Module):
    """One matrix looks up the words and scores them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(self.embed(words))))


class Shared(nn.Module):
    """One module under two names, and called twice under the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.second(x))
        return self.last(self.second(x))


class Loop(nn.Module):
    """A cell that is called at every step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(3, 6)
        for step in range(4):
            state = self.cell(x[step], state)
        return self.head(state)


class Symmetric(nn.Module):
    """A parametrization of the user's own, with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor(0.3))

    def forward(self, w: Tensor) -> Tensor:
        return w + self.mix * w.transpose(0, 1)


def parametrized(how: Callable[..., Any], **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        how(model[0], **options)
        return model

    return make


class DataDependent(nn.Module):
    """Branches on its data, and so is kept whole; it has parameters, and a submodule with some."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e6:
            return x
        return self.inner(x) * self.gain


class KeptWhole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.whole, self.b = nn.Linear(6, 6), DataDependent(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.whole(self.a(x))))


class Classifier(nn.Module):
    """Words to classes, by an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(10, 3)

    def forward(self, words: Tensor) -> Tensor:
        output, _ = self.lstm(self.embed(words))
        return self.head(output[:, -1])


class Encoder(nn.Module):
    """Words to classes, by a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.position = nn.Parameter(torch.zeros(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(words) + self.position).mean(1))


def users_code() -> list[Case]:
    x = floats(4, 6)
    words = indices(4, 5, below=9)
    return [
        Case("bare", Bare, (x,)),
        Case("lists", Lists, (x,)),
        Case("tied", Tied, (words,)),
        Case("shared", Shared, (x,)),
        Case("loop", lambda: Loop(nn.GRUCell(6, 6)), (floats(4, 3, 6),)),
        Case("kept-whole", KeptWhole, (x,), export=False),
        Case("weight_norm", parametrized(parametrizations.weight_norm), (x,)),
        Case("spectral_norm", parametrized(parametrizations.spectral_norm), (x,)),
        Case("orthogonal", parametrized(parametrizations.orthogonal), (x,)),
        Case(
            "custom-parametrization",
            parametrized(lambda m: parametrize.register_parametrization(m, "weight", Symmetric())),
            (x,),
        ),
        Case(
            "chained-parametrizations",
            parametrized(
                lambda m: (
                    parametrizations.weight_norm(m),
                    parametrize.register_parametrization(m, "weight", Symmetric()),
                )
            ),
            (x,),
        ),
        Case("old-weight_norm", parametrized(nn.utils.weight_norm), (x,), export=False),
        Case("old-spectral_norm", parametrized(nn.utils.spectral_norm), (x,), export=False),
        Case("lstm-classifier", Classifier, (words,)),
        Case("transformer-classifier", Encoder, (words,)),
    ]


CASES = {case.name: case for case in (*layers(), *recurrent(), *attention(), *users_code())}
