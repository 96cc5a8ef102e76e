"""The vocabulary of activations: one canonical name each, and every spelling that reaches a graph.

`OPS` is the table, and `recognise` the one question that it answers: which activation, if any, does a node call, on
which of its arguments, and does the call write into that argument? To add an activation, add a line.

A name in a line stands for all that torch calls by it: ``F.relu``, ``torch.relu``, ``torch.special.*``, the builtins
of ``torch._C._nn``, the tensor method, the ATen overloads, and the in-place twin ``relu_`` of each of them.

This file must not know rules, sites, or how a graph was captured, and it never changes a node.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, SupportsIndex, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.overrides import handle_torch_function, has_torch_function_unary

from ._torch.operators import NATIVE, Overload, schema

__all__ = [
    "FORWARDS",
    "GROUPS",
    "OPS",
    "Op",
    "Spelling",
    "binarize",
    "heaviside",
    "recognise",
    "ternarize",
]


@dataclass(frozen=True)
class Op:
    """A line of the vocabulary: an activation, what it is like, and its spellings."""

    name: str
    groups: frozenset[str]  # empty: a site only when a rule names the op itself
    elementwise: bool  # an output entry depends on the input entry at the same place alone
    keeps_shape: bool  # the output has the input's shape
    modules: tuple[type[nn.Module], ...]  # by exact type: to Python, nn.ReLU6 is an nn.Hardtanh
    functions: tuple[Callable[..., Any], ...]  # out of place, unless `inplace=` is given and true
    inplace_functions: tuple[Callable[..., Any], ...]
    methods: tuple[str, ...]  # of torch.Tensor; "relu" stands for "relu_" too
    aten: tuple[Overload[..., Any], ...]  # out of place, in place, and with `out=`
    function: Callable[..., Tensor] | None  # f(x), to replace a forward; None: x is not enough
    # The output is positive exactly where the input is, and natively saved
    keeps_positive: bool = False

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # By name: a copy of a line is the line itself, and ATen overloads do not pickle.
        if OPS.get(self.name) is self:
            return _line, (self.name,)
        return super().__reduce_ex__(protocol)


def _line(name: str) -> Op:
    return OPS[name]


@dataclass(frozen=True)
class Spelling:
    """How one node of a graph spells an op."""

    op: Op
    key: int | str  # where the activated tensor stands: in node.args (int) or node.kwargs (str)
    inplace: bool  # the call writes its result into that tensor
    writes_out: bool  # the call writes its result into an `out=` tensor


def heaviside(x: Tensor, value_at_zero: float = 0.0) -> Tensor:
    """Return 0 where x < 0, `value_at_zero` where x = 0, 1 where x > 0, and NaN where x is NaN.

    Formula: H(x), in the shape and dtype of `x`.

    Its own derivative is zero, as that of `torch.sign` is, so that it can stand in a network whose rules are off.
    (`torch.heaviside` wants a tensor of values, turns NaN into 0, and its backward raises.)
    """
    if has_torch_function_unary(x):
        return handle_torch_function(heaviside, (x,), x, value_at_zero=value_at_zero)
    return torch.ops.freegrad_fx.heaviside(x, value_at_zero)  # type: ignore[no-any-return]


def _heaviside(x: Tensor, value_at_zero: float = 0.0) -> Tensor:
    step = torch.where(x == 0, value_at_zero, (x > 0).to(x.dtype)).to(x.dtype)
    return torch.where(x.isnan(), x, step)


def _heaviside_in_place(x: Tensor, value_at_zero: float = 0.0) -> Tensor:
    """The same in fewer passes over memory, none of them over booleans, for the usual case."""
    usual = x.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if value_at_zero != 0 or not usual or x.requires_grad:  # it stays in the graph then
        return _heaviside(x, value_at_zero)
    # Twice, as the smallest number times the largest is less than 1; added to 0, so that -0 becomes 0
    largest = torch.finfo(x.dtype).max
    return x.new_zeros(()).add(x.detach(), alpha=largest).mul_(largest).clamp_(0, 1)


def binarize(x: Tensor) -> Tensor:
    """Return 1 where x ≥ 0, −1 where x < 0, and NaN where x is NaN.

    Formula: sign(x) with sign(0) = 1, in the shape and dtype of `x`; its own derivative is zero.

    Source: Hubara et al. 2016, arXiv:1602.02830; larq SteSign, Brevitas BinaryQuant. (`torch.sign` maps 0 to 0, so that
    a weight could take three values.)
    """
    if has_torch_function_unary(x):
        return handle_torch_function(binarize, (x,), x)
    return torch.ops.freegrad_fx.binarize(x)  # type: ignore[no-any-return]


def _binarize(x: Tensor) -> Tensor:
    return torch.where(x.isnan(), x, torch.where(x >= 0, 1, -1).to(x.dtype))


def ternarize(x: Tensor, threshold: float | None = None) -> Tensor:
    """Return 1 where x > threshold, −1 where x < −threshold, 0 between, and NaN where x is NaN.

    Formula: ``sign(x)·1[|x| > Δ]``, in the shape and dtype of `x`; its own derivative is zero.

    Args:
        x: Any tensor of floating point numbers.
        threshold: Δ; by default ``0.7·mean|x|`` over the whole tensor.

    Source: Li & Liu 2016, arXiv:1605.04711 (ternary weight networks); larq SteTern, which has ``|x| ≥ Δ``, and 0.05 for
    Δ unless it is told otherwise.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(ternarize, (x,), x, threshold=threshold)
    return torch.ops.freegrad_fx.ternarize(x, threshold)  # type: ignore[no-any-return]


def _ternarize(x: Tensor, threshold: float | None = None) -> Tensor:
    size = x.detach().abs()
    # in float32 at least: the sum over a large tensor overflows float16
    wide = torch.promote_types(x.dtype, torch.float32)
    limit = 0.7 * size.mean(dtype=wide) if threshold is None else threshold
    return torch.where(x.isnan(), x, torch.where(size > limit, x.detach().sign(), 0).to(x.dtype))


# Operators, so that Dynamo and torch.export keep them whole and they can be recognised in their graphs; composite ones,
# so that autograd, vmap and Inductor see through them.
_library: Any = torch.library.Library("freegrad_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, (_usual, _batched) in {
    "heaviside(Tensor self, float value_at_zero=0.0) -> Tensor": (_heaviside_in_place, _heaviside),
    "binarize(Tensor self) -> Tensor": (_binarize, _binarize),
    "ternarize(Tensor self, float? threshold=None) -> Tensor": (_ternarize, _ternarize),
}.items():
    _library.define(_schema)
    _library.impl(_schema.partition("(")[0], _usual, "CompositeImplicitAutograd")
    _library.impl(_schema.partition("(")[0], _batched, "FuncTorchBatchedDecomposition")

_FUNCTIONS: tuple[Any, ...] = (F, torch, torch.special, NATIVE)
_OPERATORS: tuple[Any, ...] = (torch.ops.aten, torch.ops.freegrad_fx)


def _op(
    name: str,
    *modules: type[nn.Module],
    group: str | None = None,
    also: str = "",
    functions: tuple[Callable[..., Any], ...] = (),
    elementwise: bool = True,
    keeps_shape: bool = True,
    keeps_positive: bool = False,
    needs_more: bool = False,
) -> Op:
    """Make a line from the op's names in torch (`also`: the others) and the functions that no name finds."""
    names = [name, *also.split()]
    twins = [f"{n}_" for n in names]
    functions = (*functions, *_found(names, _FUNCTIONS))
    operators = [p for n in (*names, *twins) for p in _found([n, f"special_{n}"], _OPERATORS)]
    return Op(
        name=name,
        groups=frozenset([group] if group else []),
        elementwise=elementwise,
        keeps_shape=keeps_shape,
        keeps_positive=keeps_positive,
        modules=modules,
        functions=tuple(dict.fromkeys(functions)),
        inplace_functions=tuple(_found(twins, _FUNCTIONS)),
        methods=tuple(n for n in names if hasattr(Tensor, n)),
        aten=tuple(o for packet in operators for o in _tensor_overloads(packet)),
        function=None if needs_more or not functions else functions[0],
    )


def _found(names: list[str], places: tuple[Any, ...]) -> list[Any]:
    return list(dict.fromkeys(getattr(p, n) for n in names for p in places if hasattr(p, n)))


def _tensor_overloads(packet: Any) -> Iterator[Overload[..., Any]]:
    """The overloads from a tensor to a tensor; TorchScript's have numbers in and out."""
    for overload in (getattr(packet, name) for name in packet.overloads()):
        found = schema(overload)
        ends = [found.arguments[0], *found.returns]
        if [str(end.type) for end in ends] == ["Tensor", "Tensor"]:
            yield overload


_A, _S, _Q = "activations", "softmax", "quantizers"

# Names that begin with an underscore are those that ATen's decompositions write.
_TABLE = (
    _op("relu", nn.ReLU, group=_A, keeps_positive=True),
    _op("relu6", nn.ReLU6, group=_A),
    _op("leaky_relu", nn.LeakyReLU, group=_A),
    _op("prelu", nn.PReLU, group=_A, also="_prelu_kernel", needs_more=True),
    _op("rrelu", nn.RReLU, group=_A, also="rrelu_with_noise"),
    _op("elu", nn.ELU, group=_A),
    _op("selu", nn.SELU, group=_A),
    _op("celu", nn.CELU, group=_A),
    _op("gelu", nn.GELU, group=_A),
    _op("silu", nn.SiLU, group=_A),
    _op("mish", nn.Mish, group=_A),
    _op("hardswish", nn.Hardswish, group=_A),
    _op("hardsigmoid", nn.Hardsigmoid, group=_A),
    _op("hardtanh", nn.Hardtanh, group=_A),
    _op("hardshrink", nn.Hardshrink, group=_A),
    _op("softshrink", nn.Softshrink, group=_A),
    _op("tanhshrink", nn.Tanhshrink, group=_A),
    _op("threshold", nn.Threshold, group=_A, needs_more=True),
    _op("softplus", nn.Softplus, group=_A),
    _op("softsign", nn.Softsign, group=_A),
    _op("sigmoid", nn.Sigmoid, group=_A, also="expit"),
    _op("logsigmoid", nn.LogSigmoid, group=_A, also="log_sigmoid"),
    _op("tanh", nn.Tanh, group=_A),
    _op("heaviside", group=_A, functions=(heaviside,)),
    _op(
        "softmax", nn.Softmax, nn.Softmax2d, group=_S, also="_softmax _safe_softmax",
        elementwise=False, needs_more=True,
    ),
    _op(
        "log_softmax", nn.LogSoftmax, group=_S, also="_log_softmax",
        elementwise=False, needs_more=True,
    ),
    _op("softmin", nn.Softmin, group=_S, elementwise=False, needs_more=True),
    _op("sign", group=_Q, also="sgn"),
    _op("binarize", group=_Q, functions=(binarize,)),
    _op("ternarize", group=_Q, functions=(ternarize,), elementwise=False),
    _op("round", group=_Q),
    _op("floor", group=_Q),
    _op("ceil", group=_Q),
    _op("trunc", group=_Q, also="fix"),
    # No group: models use these for other things than to activate.
    _op("glu", nn.GLU, elementwise=False, keeps_shape=False),
    _op("clamp", also="clip", needs_more=True),
    _op("clamp_min", needs_more=True),
    _op("clamp_max", needs_more=True),
    _op("abs", also="absolute", functions=(torch.abs, operator.abs)),
    _op("identity", nn.Identity, also="positive"),
)  # fmt: skip

# What an op is called where it is a case of another one. Dynamo and torch.export know nn.ReLU6 as a hardtanh only.
_CASES = {"hardtanh": ("relu6", {"min_val": 0.0, "max_val": 6.0})}

OPS: Mapping[str, Op] = MappingProxyType({op.name: op for op in _TABLE})

FORWARDS = tuple(op.name for op in _TABLE if op.function is not None and op.keeps_shape)
"""The ops that can replace a forward: those of one tensor, which keep its shape."""

GROUPS: Mapping[str, frozenset[str]] = MappingProxyType(
    {g: frozenset(op.name for op in _TABLE if g in op.groups) for g in (_A, _S, _Q)}
)


@dataclass(frozen=True)
class _Entry:
    """What a node's target says by itself."""

    op: Op
    inplace: bool
    inplace_position: int | None = None  # of the `inplace` argument


_Target: TypeAlias = tuple[str, Any]  # as in a node: op, target


def _entries(op: Op) -> Iterator[tuple[_Target, _Entry]]:
    out_of_place, in_place = _Entry(op, inplace=False), _Entry(op, inplace=True)
    for module in op.modules:
        yield ("call_module", module), out_of_place
    for function in op.functions:
        parameters = inspect.signature(function).parameters if inspect.isfunction(function) else {}
        position = list(parameters).index("inplace") if "inplace" in parameters else None
        yield ("call_function", function), _Entry(op, False, position)
    for function in op.inplace_functions:
        yield ("call_function", function), in_place
    for method in op.methods:
        yield ("call_method", method), out_of_place
        if hasattr(Tensor, f"{method}_"):
            yield ("call_method", f"{method}_"), in_place
    packets = {overload.overloadpacket: overload for overload in op.aten}
    for target, overload in [*zip(op.aten, op.aten, strict=True), *packets.items()]:
        alias = schema(overload).arguments[0].alias_info
        writes = alias is not None and alias.is_write
        yield ("call_function", target), in_place if writes else out_of_place


def _index(table: tuple[Op, ...]) -> dict[_Target, _Entry]:
    index: dict[_Target, _Entry] = {}
    for target, entry in (pair for op in table for pair in _entries(op)):
        first = index.setdefault(target, entry)
        if first is not entry:
            raise ValueError(f"{target[1]} spells both {first.op.name!r} and {entry.op.name!r}")
    return index


_SPELLINGS = _index(_TABLE)

# The last three are NumPy's names, which torch.* takes too.
_TENSOR_KEYWORDS = ("input", "self", "x", "a", "x1")


def recognise(node: fx.Node, module: nn.Module | None, first: int = 0) -> Spelling | None:
    """Return how `node` spells an activation, or None.

    Args:
        node: The node.
        module: The module that it calls, if it calls one.
        first: At which position the arguments of what it calls begin.
    """
    called = ("call_module", type_before_parametrizations(module)) if module is not None else None
    entry = _SPELLINGS.get(called or (node.op, node.target))
    key: int | str | None = first
    if len(node.args) <= first:
        key = next((k for k in _TENSOR_KEYWORDS if k in node.kwargs), None)
    if entry is None or key is None or not isinstance(_argument(node, key, key), fx.Node):
        return None
    # A flag that the graph computes is a node here, and so taken for true: it may be.
    flag = _argument(node, entry.inplace_position, "inplace") or getattr(module, "inplace", False)
    return Spelling(
        op=_narrowed(entry.op, node),
        key=key,
        inplace=entry.inplace or bool(flag),
        writes_out=node.kwargs.get("out") is not None,
    )


def _narrowed(op: Op, node: fx.Node) -> Op:
    case, given = _CASES.get(op.name, (op.name, {}))
    arguments = [_argument(node, i, name) for i, name in enumerate(given, start=1)]
    return OPS[case] if arguments == list(given.values()) else op


def _argument(node: fx.Node, position: int | str | None, name: int | str) -> Any:
    if isinstance(position, int) and position < len(node.args):
        return node.args[position]
    return node.kwargs.get(str(name))
