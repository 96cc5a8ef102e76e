"""Every way in which PyTorch lets a user write every activation, each as a small module.

The list is made from torch itself and from what stands here. It knows nothing of the product's own table, so that a
spelling that is missing there fails a test.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import freegrad_fx.vocabulary

__all__ = ["OUT_SPELLINGS", "SPELLINGS", "Spell", "quick"]


@dataclass(frozen=True)
class Spell:
    """One spelling of one op; for another dtype, ``spell.make().to(dtype)(spell.sample(dtype=dtype))``."""

    id: str
    op: str
    make: Callable[[], nn.Module] = field(repr=False, compare=False)
    inplace: bool = False
    writes_out: bool = False
    any_shape: bool = True  # takes empty, 0-dim and all other inputs; else only the default shape
    random: bool = False  # draws random numbers in training mode
    differentiable: bool = True  # torch.heaviside is not: its native backward raises

    def sample(
        self,
        shape: tuple[int, ...] = (2, 4, 3, 2),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Tensor:
        """Values on both sides of every kink, and some zeros."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3
        return x.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0.0).to(dtype)


# Arguments that are tensors: the module that makes the call holds them.
WEIGHT, VALUES, LOW, HIGH = "self.weight", "self.values", "self.low", "self.high"


class Activate(nn.Module):
    """Calls `function` on its input."""

    def __init__(
        self,
        function: Callable[..., Tensor],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        tensor: str | None = None,  # the keyword that the input is given by
        inplace: bool = False,
        discard: bool = False,  # the result is dropped: what counts is what the call did to its input
        out: bool = False,
    ) -> None:
        super().__init__()
        self.function = function
        self.args, self.kwargs, self.tensor = args, kwargs or {}, tensor
        self.inplace, self.discard, self.out = inplace, discard, out
        self.weight = nn.Parameter(torch.tensor([0.25, -0.5, 0.1, 1.5]))
        self.register_buffer("values", torch.tensor(0.5))
        self.register_buffer("low", torch.tensor(-0.5))
        self.register_buffer("high", torch.tensor(0.75))

    def forward(self, x: Tensor) -> Tensor:
        # what is written in place must be neither a leaf nor the caller's
        y = x * 1 if self.inplace else x
        args = [self.argument(a) for a in self.args]
        kwargs = {name: self.argument(a) for name, a in self.kwargs.items()}
        if self.out:
            kwargs["out"] = torch.empty_like(x)
        if self.tensor is None:
            args.insert(0, y)
        else:
            kwargs[self.tensor] = y
        result = self.function(*args, **kwargs)
        return y if self.discard else result

    def argument(self, value: Any) -> Any:
        held = isinstance(value, str) and value.startswith("self.")
        return getattr(self, value.removeprefix("self.")) if held else value


@dataclass(frozen=True)
class Called:
    """What torch calls an op, and the arguments that such a call may give."""

    names: str
    positional: dict[str, Any] = field(default_factory=dict)  # in order, and not the defaults
    keyword: dict[str, Any] = field(default_factory=dict)  # keyword-only
    required: bool = False  # without them the call is an error
    any_shape: bool = True

    def ways(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The other arguments left out, given by position, given by keyword."""
        if not self.required:
            yield (), {}
        if self.positional:
            yield tuple(self.positional.values()), self.keyword
        if self.positional or self.keyword:
            yield (), {**self.positional, **self.keyword}


CALLED: dict[str, list[Called]] = {
    "relu": [Called("relu")],
    "relu6": [Called("relu6")],
    "leaky_relu": [Called("leaky_relu", {"negative_slope": 0.2})],
    "prelu": [Called("prelu", {"weight": WEIGHT}, required=True, any_shape=False)],
    "rrelu": [Called("rrelu", {"lower": 0.1, "upper": 0.4})],
    "elu": [Called("elu", {"alpha": 0.5})],
    "selu": [Called("selu")],
    "celu": [Called("celu", {"alpha": 2.0})],
    "gelu": [Called("gelu", keyword={"approximate": "tanh"})],
    "silu": [Called("silu")],
    "mish": [Called("mish")],
    "hardswish": [Called("hardswish")],
    "hardsigmoid": [Called("hardsigmoid")],
    "hardtanh": [Called("hardtanh", {"min_val": -0.5, "max_val": 2.0})],
    "hardshrink": [Called("hardshrink", {"lambd": 1.0})],
    "softshrink": [Called("softshrink", {"lambd": 1.0})],
    "tanhshrink": [Called("tanhshrink")],
    "threshold": [Called("threshold", {"threshold": 0.5, "value": -1.0}, required=True)],
    "softplus": [Called("softplus", {"beta": 2.0, "threshold": 3.0})],
    "softsign": [Called("softsign")],
    "sigmoid": [Called("sigmoid expit")],
    "logsigmoid": [Called("logsigmoid log_sigmoid")],
    "tanh": [Called("tanh")],
    "softmax": [Called("softmax", {"dim": 1}, required=True, any_shape=False)],
    "log_softmax": [Called("log_softmax", {"dim": 1}, required=True, any_shape=False)],
    "softmin": [Called("softmin", {"dim": 1}, required=True, any_shape=False)],
    "glu": [Called("glu", {"dim": 1}, required=True, any_shape=False)],
    "sign": [Called("sign sgn")],
    "heaviside": [Called("heaviside", {"values": VALUES}, required=True)],
    "round": [Called("round", keyword={"decimals": 1})],
    "floor": [Called("floor")],
    "ceil": [Called("ceil")],
    "trunc": [Called("trunc fix")],
    "clamp": [
        Called("clamp clip", {"min": -0.5, "max": 0.75}, required=True),
        Called("clamp clip", {"min": LOW, "max": HIGH}, required=True),
        Called("clamp clip", {"min": 0.0}, required=True),
        Called("clamp clip", keyword={"max": 2}, required=True),
    ],
    "clamp_min": [
        Called("clamp_min", {"min": -0.5}, required=True),
        Called("clamp_min", {"min": LOW}, required=True),
    ],
    "clamp_max": [
        Called("clamp_max", {"max": 0.75}, required=True),
        Called("clamp_max", {"max": HIGH}, required=True),
    ],
    "abs": [Called("abs absolute")],
    "identity": [Called("positive")],
}

MODULES: list[tuple[str, type[nn.Module], list[dict[str, Any]]]] = [
    ("relu", nn.ReLU, [{}]),
    ("relu6", nn.ReLU6, [{}]),
    ("leaky_relu", nn.LeakyReLU, [{}, {"negative_slope": 0.2}]),
    ("prelu", nn.PReLU, [{}, {"num_parameters": 4, "init": -0.5}]),
    ("rrelu", nn.RReLU, [{}, {"lower": 0.1, "upper": 0.4}]),
    ("elu", nn.ELU, [{}, {"alpha": 0.5}]),
    ("selu", nn.SELU, [{}]),
    ("celu", nn.CELU, [{}, {"alpha": 2.0}]),
    ("gelu", nn.GELU, [{}, {"approximate": "tanh"}]),
    ("silu", nn.SiLU, [{}]),
    ("mish", nn.Mish, [{}]),
    ("hardswish", nn.Hardswish, [{}]),
    ("hardsigmoid", nn.Hardsigmoid, [{}]),
    ("hardtanh", nn.Hardtanh, [{}, {"min_val": -0.5, "max_val": 2.0}]),
    ("hardshrink", nn.Hardshrink, [{}, {"lambd": 1.0}]),
    ("softshrink", nn.Softshrink, [{}, {"lambd": 1.0}]),
    ("tanhshrink", nn.Tanhshrink, [{}]),
    ("threshold", nn.Threshold, [{"threshold": 0.5, "value": -1.0}]),
    ("softplus", nn.Softplus, [{}, {"beta": 2.0, "threshold": 3.0}]),
    ("softsign", nn.Softsign, [{}]),
    ("sigmoid", nn.Sigmoid, [{}]),
    ("logsigmoid", nn.LogSigmoid, [{}]),
    ("tanh", nn.Tanh, [{}]),
    ("softmax", nn.Softmax, [{"dim": 1}, {"dim": -1}]),
    ("softmax", nn.Softmax2d, [{}]),
    ("log_softmax", nn.LogSoftmax, [{"dim": 1}]),
    ("softmin", nn.Softmin, [{"dim": 1}]),
    ("glu", nn.GLU, [{"dim": 1}]),
    ("identity", nn.Identity, [{}]),
]

NAMESPACES: dict[str, Any] = {
    "F": F,
    "torch": torch,
    "torch.special": torch.special,
    "torch._C._nn": torch._C._nn,
}


def _spells(
    op: str, label: str, function: Callable[..., Tensor], any_shape: bool = True, **how: Any
) -> Iterator[Spell]:
    """The call; where it is in place, also the call whose result is dropped."""
    shown = [str(a) for a in how.get("args", ())]
    shown += [f"{name}={a}" for name, a in how.get("kwargs", {}).items()]
    shown += [f"{how['tensor']}=x"] if "tensor" in how else ["out=out"] if "out" in how else []
    inplace = how.get("inplace", False)
    for discard in (False, True) if inplace and "tensor" not in how else (False,):
        yield Spell(
            f"{op}: {label}({', '.join(shown)}){'; return x' if discard else ''}",
            op,
            lambda discard=discard: Activate(function, discard=discard, **how),
            inplace=inplace,
            writes_out="out" in how,
            any_shape=any_shape,
            random="training" in how.get("kwargs", {}),
            differentiable=op != "heaviside" or function is freegrad_fx.vocabulary.heaviside,
        )


def _callables() -> Iterator[tuple[str, Called, str, Callable[..., Tensor], bool]]:
    """All that a name finds in torch: functions, tensor methods, and the in-place twin of each."""
    for op, call in ((op, call) for op, calls in CALLED.items() for call in calls):
        for name in call.names.split():
            for written, inplace in ((name, False), (f"{name}_", True)):
                found = {getattr(n, written, None): place for place, n in NAMESPACES.items()}
                for function, place in found.items():  # F.gelu is torch._C._nn.gelu: once
                    if function is not None:
                        yield op, call, f"{place}.{written}", function, inplace
                if hasattr(Tensor, written):
                    yield op, call, f"x.{written}", _method(written), inplace


def _method(name: str) -> Callable[..., Tensor]:
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


def _calls() -> Iterator[Spell]:
    for op, call, label, function, inplace in _callables():
        start = op, label, function, call.any_shape
        for args, kwargs in call.ways():
            yield from _spells(*start, args=args, kwargs=kwargs, inplace=inplace)
        if label.startswith("x."):
            continue
        yield from _spells(*start, kwargs=kwargs, inplace=inplace, tensor="input")
        if not inspect.isfunction(function) or "inplace" not in str(inspect.signature(function)):
            continue
        after_input = list(inspect.signature(function).parameters.values())[1:]
        for flag in (True, False):
            how = {"inplace": flag}
            for args, kwargs in call.ways():
                yield from _spells(*start, args=args, kwargs=kwargs | how, **how)
            yield from _spells(*start, kwargs=kwargs | how, tensor="input", **how)
            by_position = {p.name: p.default for p in after_input} | call.positional | how
            yield from _spells(*start, args=tuple(by_position.values()), **how)


def _modules() -> Iterator[Spell]:
    for op, kind, choices in MODULES:
        any_shape = kind not in (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU)
        flags = [{}, {"inplace": True}] if "inplace" in inspect.signature(kind).parameters else [{}]
        for given in (choice | flag for choice in choices for flag in flags):
            shown = ", ".join(f"{name}={value}" for name, value in given.items())
            inplace = "inplace" in given
            for tensor in (None, "input"):
                for discard in (False, True) if inplace and not tensor else (False,):
                    how = {"tensor": tensor, "inplace": inplace, "discard": discard}
                    yield Spell(
                        f"{op}: nn.{kind.__name__}({shown})({'input=' if tensor else ''}x)"
                        f"{'; return x' if discard else ''}",
                        op,
                        lambda kind=kind, given=given, how=how: Activate(kind(**given), **how),
                        inplace=inplace,
                        any_shape=any_shape and "num_parameters" not in given,
                        random=kind is nn.RReLU,
                    )


class Squared(nn.Module):
    """Keeps the slope of a PReLU positive."""

    def forward(self, x: Tensor) -> Tensor:
        return x**2


def _parametrized_prelu() -> nn.Module:
    module = nn.PReLU()
    parametrize.register_parametrization(module, "weight", Squared())
    return Activate(module)


def _oddities() -> Iterator[Spell]:
    aten = torch.ops.aten
    yield Spell("prelu: parametrized nn.PReLU", "prelu", _parametrized_prelu)
    for function in (abs, operator.abs, _method("__abs__")):
        yield from _spells("abs", f"{function.__module__}.{function.__name__}", function)
    for args in ((0.0, 6.0), (0, 6)):
        # so Dynamo and torch.export write nn.ReLU6
        yield from _spells("relu6", "F.hardtanh", F.hardtanh, args=args)
        yield from _spells("relu6", "F.hardtanh_", F.hardtanh_, args=args, inplace=True)
    limits = {"min_val": 0.0, "max_val": 6.0}
    yield from _spells("relu6", "F.hardtanh", F.hardtanh, kwargs=limits)
    yield from _spells("relu6", "F.hardtanh", F.hardtanh, kwargs=limits, tensor="input")
    yield from _spells("hardtanh", "F.hardtanh", F.hardtanh, args=(0.0, 5.0))
    yield from _spells("relu", "aten.relu", aten.relu)
    yield from _spells("relu", "aten.relu.default", aten.relu.default)
    yield from _spells("relu", "aten.relu.default", aten.relu.default, tensor="self")
    yield from _spells("relu", "aten.relu_", aten.relu_, inplace=True)
    yield from _spells("relu", "aten.relu_.default", aten.relu_.default, inplace=True)
    for name in ("x", "a", "x1"):  # NumPy's names: functions of torch.* take them for `input`
        yield from _spells("relu", "torch.relu", torch.relu, tensor=name)
        yield from _spells("sigmoid", "torch.sigmoid_", torch.sigmoid_, tensor=name, inplace=True)
        yield from _spells("gelu", "F.gelu", F.gelu, tensor=name)
    yield from _spells("clamp", "aten.clamp.Tensor", aten.clamp.Tensor, args=(LOW, HIGH))
    yield from _spells("softmax", "aten.softmax.int", aten.softmax.int, False, args=(1,))
    yield from _spells("softmax", "F.softmax", F.softmax, False, args=(1, 3, None))
    yield from _spells("softmax", "x.softmax", _method("softmax"), False, args=(-1,))
    yield from _spells("rrelu", "F.rrelu", F.rrelu, kwargs={"training": True})
    yield from _spells(
        "rrelu", "torch.rrelu_", torch.rrelu_, kwargs={"training": True}, inplace=True
    )
    heaviside = freegrad_fx.vocabulary.heaviside
    for args, kwargs in (((), {}), ((0.5,), {}), ((), {"value_at_zero": 1.0})):
        yield from _spells("heaviside", "heaviside", heaviside, args=args, kwargs=kwargs)
    yield from _spells("heaviside", "heaviside", heaviside, tensor="x")
    binarize, jump_relu = freegrad_fx.vocabulary.binarize, freegrad_fx.vocabulary.jump_relu
    for args, kwargs in (((), {}), ((-1.0,), {}), ((), {"scale": True})):
        yield from _spells("binarize", "binarize", binarize, args=args, kwargs=kwargs)
    for args, kwargs in (((), {}), ((0.5,), {}), ((), {"threshold": 1.0})):
        yield from _spells("jump_relu", "jump_relu", jump_relu, args=args, kwargs=kwargs)
    quantize = freegrad_fx.vocabulary.quantize
    affine = {"bits": 3, "low": -1.0, "symmetric": False, "per_channel": True}
    for args, kwargs in (((), {}), ((4, -1.0, 2.0), {}), ((), affine)):
        yield from _spells("quantize", "quantize", quantize, args=args, kwargs=kwargs)
    ternarize = freegrad_fx.vocabulary.ternarize
    for args, kwargs in (((), {}), ((0.5,), {}), ((), {"threshold": 1.0})):
        yield from _spells("ternarize", "ternarize", ternarize, args=args, kwargs=kwargs)
    sampled = freegrad_fx.vocabulary.sample_one_hot
    yield from _spells("sample_one_hot", "sample_one_hot", sampled)
    yield from _spells("sample_one_hot", "sample_one_hot", sampled, False, kwargs={"dim": 1})
    dorefa = freegrad_fx.vocabulary.dorefa
    for args, kwargs in (((), {}), ((), {"bits": 2})):
        yield from _spells("dorefa", "dorefa", dorefa, args=args, kwargs=kwargs)


def _with_out() -> Iterator[Spell]:
    """Autograd refuses these where their input requires a gradient."""
    for function in (
        torch.sigmoid,
        torch.tanh,
        torch.sign,
        torch.floor,
        torch.abs,
        torch.special.expit,
    ):
        op = {"special_expit": "sigmoid"}.get(function.__name__, function.__name__)
        yield from _spells(op, f"torch.{function.__name__}", function, out=True)
    yield from _spells("clamp", "torch.clamp", torch.clamp, kwargs={"min": -0.5}, out=True)
    yield from _spells("leaky_relu", "torch._C._nn.leaky_relu", torch._C._nn.leaky_relu, out=True)


SPELLINGS: list[Spell] = [*_modules(), *_calls(), *_oddities()]

OUT_SPELLINGS: list[Spell] = list(_with_out())


def quick(spells: Iterable[Spell]) -> list[Any]:
    """Parameters: one spelling of each op and callable. The others, with further arguments, are slow tests."""
    seen: set[str] = set()
    found = []
    for spell in spells:
        called = spell.id.partition("(")[0]
        found.append(
            pytest.param(spell, id=spell.id, marks=pytest.mark.slow if called in seen else ())
        )
        seen.add(called)
    return found
