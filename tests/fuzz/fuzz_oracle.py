"""What a model computes under a rule table, by interception: the oracle of the fuzzer.

The oracle runs the *original* model while torch hands it every function that Python code calls. It keeps its own paths
of modules and its own counts of calls, matches tables by itself, and has the rules as naive formulas, written from the
definitions in `docs/rules.md` and the papers named there. It imports nothing of the product.
"""

from __future__ import annotations

import contextlib
import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fuzz_tables import Bound, Entry, Table

# --- the rules: (grad, x, y, parameters) -> the gradient of x ---

FORMULAS: dict[str, Callable[..., Tensor]] = {
    "scale": lambda g, x, y, s: g * s,
    "reverse": lambda g, x, y, alpha: -(g * alpha),
    "straight_through": lambda g, x, y: g,
    "d(Linear)": lambda g, x, y: g,
    "d(ReLU)": lambda g, x, y: g * (x > 0),
    "rectangular": lambda g, x, y, a, b: g * ((a <= x) & (x <= b)),
    "triangular": lambda g, x, y, width: g * torch.relu(1 - x.abs() / width),
    "clip_value": lambda g, x, y, max_value: torch.clamp(g, -max_value, max_value),
    "clip_norm": lambda g, x, y, max_norm, eps: _clip_norm(g, max_norm, eps),
    "clipped_straight_through": lambda g, x, y, bound: g * ((-bound <= x) & (x <= bound)),
    "fast_sigmoid": lambda g, x, y, slope: g / (1 + slope * x.abs()) ** 2,
    "arctan": lambda g, x, y, alpha: g * (alpha / 2) / (1 + (math.pi / 2 * alpha * x) ** 2),
    "guided": lambda g, x, y: torch.clamp(g, min=0) * (x > 0),
    "noise": lambda g, x, y, sigma: g + sigma * torch.randn_like(g),
    "centralize": lambda g, x, y, dim: g - g.mean(dim, keepdim=True),
    "fuzz_x": lambda g, x, y, k: g * (x * x * k + 1),
    "fuzz_xy": lambda g, x, y, k: g * (x * k + y),
}  # fmt: skip


def _clip_norm(g: Tensor, max_norm: float, eps: float) -> Tensor:
    wide = g if g.dtype == torch.float64 else g.float()
    norm = (wide * wide).sum().sqrt()
    return g * torch.clamp(max_norm / torch.clamp(norm, min=eps), max=1).to(g.dtype)


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "heaviside": lambda x: (torch.sign(x) + torch.sign(x).abs()) / 2,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sign": torch.sign,
    "sigmoid": torch.sigmoid,
}


def apply_rules(rules: Sequence[Bound], grad: Tensor, x: Tensor, y: Tensor | None) -> Tensor:
    for name, parameters in rules:
        grad = FORMULAS[name](grad, x, y, **dict(parameters))
    return grad


class Decoupled(torch.autograd.Function):
    """Hands out `y`. The gradient of `x` is the rules', that of `y` its own, for the operation's other arguments."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, rules: Sequence[Bound]) -> Tensor:
        ctx.rules = rules
        result = y.clone()
        ctx.save_for_backward(x, y)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y = ctx.saved_tensors
        return grad, apply_rules(ctx.rules, grad, x, y), None


# --- the operations ---

_ACTIVATIONS = """
relu relu6 leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish hardsigmoid hardtanh hardshrink softshrink
tanhshrink threshold softplus softsign sigmoid logsigmoid tanh
"""
GROUPS = {
    "activations": frozenset(_ACTIVATIONS.split()),
    "softmax": frozenset({"softmax", "log_softmax", "softmin"}),
    "quantizers": frozenset({"sign", "round", "floor", "ceil", "trunc"}),
}
OTHERS = frozenset({"clamp", "clamp_min", "clamp_max", "abs"})
SYNONYMS = {"special_expit": "sigmoid", "log_sigmoid": "logsigmoid", "clip": "clamp", "__abs__": "abs",
            "_threshold": "threshold"}  # fmt: skip
KNOWN = frozenset().union(OTHERS, *GROUPS.values())
# Where `inplace` is among the positional arguments of the functions that have it
INPLACE = {"relu": 1, "relu6": 1, "silu": 1, "selu": 1, "hardswish": 1, "mish": 1, "hardsigmoid": 1, "elu": 2,
           "celu": 2, "leaky_relu": 2, "hardtanh": 3, "threshold": 3}  # fmt: skip
MODULE_OPS = {nn.ReLU: "relu", nn.GELU: "gelu", nn.Tanh: "tanh"}


def name_of(function: Any) -> str:
    """The name of the activation that a function computes; ``""`` for any other function."""
    name = getattr(function, "__name__", "")
    name = name if name.startswith("__") else name.removesuffix("_")
    name = SYNONYMS.get(name, name)
    return name if name in KNOWN else ""


def works_in_place(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    name = function.__name__
    if name.endswith("_") and not name.endswith("__"):
        return True
    position = INPLACE.get(name)
    given = position is not None and len(args) > position and args[position]
    return bool(kwargs.get("inplace", given))


# --- which entry decides ---


class Matching:
    """The first entry of a table that selects a site, by its path, operation, class and index of the call."""

    def __init__(self, table: Table, model: nn.Module, classes: Mapping[str, type]) -> None:
        self.classes = classes
        self.entries = list(table.entries)
        if table.block is not None:
            rules, scope = table.block
            self.entries.append(
                Entry(rules, op=({"activations": "activations"}.get(scope, scope),))
            )
        self.types = {path: type(m) for path, m in model.named_modules(remove_duplicate=False)}
        kept = [self._type(e) for e in self.entries if e.type and not e.op and not e.parameter]
        self.kept_whole = tuple(t for t in kept if t not in MODULE_OPS)

    def _type(self, entry: Entry) -> type:
        assert entry.type is not None
        return (
            getattr(nn, entry.type[3:])
            if entry.type.startswith("nn.")
            else self.classes[entry.type]
        )

    def operation(self, op: str, path: str, call: int) -> Entry | None:
        for entry in self.entries:
            if entry.parameter is None and self._selects(entry, op, path) and _at(entry.call, call):
                return entry
        return None

    def _selects(self, entry: Entry, op: str, path: str) -> bool:
        if entry.type is not None and not issubclass(self.types[path], self._type(entry)):
            return False
        if entry.module is not None and not fnmatch.fnmatchcase(path, entry.module):
            return False
        if not entry.op:
            return entry.type is not None or op in GROUPS["activations"]
        names = frozenset().union(*(GROUPS.get(o, {o}) for o in entry.op))
        return op in names or ("all" in entry.op and op in GROUPS["activations"])

    def module_call(self, path: str, call: int) -> Entry | None:
        """For a call of a module whose class is the whole selector of an entry."""
        for entry in self.entries:
            if entry.type is None or entry.op or entry.parameter:
                continue
            matches = issubclass(self.types[path], self._type(entry)) and _at(entry.call, call)
            if matches and (entry.module is None or fnmatch.fnmatchcase(path, entry.module)):
                return entry
        return None

    def parameter(self, names: Sequence[str]) -> Entry | None:
        for entry in self.entries:
            wanted = entry.parameter is not None or {"params", "all"} & set(entry.op)
            owners = [name.rpartition(".")[0] for name in names]
            if not wanted:
                continue
            if entry.parameter and not any(fnmatch.fnmatchcase(n, entry.parameter) for n in names):
                continue
            if entry.module is not None and not any(
                fnmatch.fnmatchcase(o, entry.module) for o in owners
            ):
                continue
            if entry.type and not any(issubclass(self.types[o], self._type(entry)) for o in owners):
                continue
            return entry
        return None


def _at(wanted: Any, call: int) -> bool:
    if isinstance(wanted, tuple):
        start, stop = wanted
        return (start or 0) <= call and (stop is None or call < stop)
    return wanted is None or wanted == call


# --- the model under the table ---


class Oracle(TorchFunctionMode):
    """A model under a table. The forwards of its modules are wrapped: give it a model of its own.

    Args:
        model: The model.
        table: The table.
        namespace: The variables of the program.
        whole: The paths of modules whose operations keep their backward.

    Attributes:
        acted: How many times an operation got rules, in the last call.
    """

    def __init__(
        self, model: nn.Module, table: Table, namespace: dict[str, Any], whole: Sequence[str] = ()
    ) -> None:
        super().__init__()
        classes = {k: v for k, v in namespace.items() if isinstance(v, type)}
        self.model, self.namespace, self.whole = model, namespace, frozenset(whole)
        self.matching = Matching(table, model, classes)
        self.stack: list[str] = []
        self.inside = 0
        self.calls: Counter[tuple[str, str]] = Counter()
        self.acted = 0
        names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        self.of_parameter = {
            n[0]: self.matching.parameter(n)
            for n in names.values()
            if model.get_parameter(n[0]).requires_grad
            or (self.matching.parameter(n) or Entry(None)).forward
        }
        for path, module in model.named_modules():
            module.forward = self._wrapped(module.forward, path, module)  # type: ignore[method-assign]

    def _wrapped(
        self, forward: Callable[..., Any], path: str, module: nn.Module
    ) -> Callable[..., Any]:
        kept = path in self.whole or isinstance(module, self.matching.kept_whole)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            entry = None
            if not self.inside and isinstance(module, self.matching.kept_whole):
                key = path, type(module).__name__
                entry = self.matching.module_call(path, self.calls[key])
                self.calls[key] += 1
            self.stack.append(path)
            self.inside += kept
            try:
                if entry is None or entry.rules is None:
                    return forward(*args, **kwargs)
                x, *others = args
                with self._off():
                    x, given = x.clone(), x.detach().requires_grad_(x.requires_grad)
                y = forward(given.detach(), *others, **kwargs)
                with self._off():
                    self.acted += 1
                    return Decoupled.apply(y, x, entry.rules)
            finally:
                self.stack.pop()
                self.inside -= kept

        return wrapper

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any], twice: bool = False) -> Any:
        """Call the model, with plain calls in place of checkpoints.

        Args:
            args: The arguments.
            kwargs: The keyword arguments.
            twice: Whether the result is differentiated twice. The rules of parameters are then in the graph, and
                `of_parameters` is not to be used.
        """
        self.calls.clear()
        self.acted = 0
        replaced: dict[str, Tensor] = {}
        for name, entry in self.of_parameter.items():
            if entry is not None and (entry.forward or (twice and entry.rules)):
                own = self.model.get_parameter(name)
                value = STEPS[entry.forward or "identity"]
                if entry.rules is None:
                    replaced[name] = value(own)
                else:
                    replaced[name] = Decoupled.apply(value(own.detach()), own, entry.rules)
        with self.no_checkpoints(), self:
            if replaced:
                return torch.func.functional_call(self.model, replaced, tuple(args), dict(kwargs))
            return self.model(*args, **kwargs)

    def of_parameters(self, gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The gradients that parameters get, from those that all of their uses add up to."""
        found = dict(gradients)
        for name, entry in self.of_parameter.items():
            gradient = found.get(name)
            if entry is not None and entry.rules and not entry.forward and gradient is not None:
                found[name] = apply_rules(
                    entry.rules, gradient, self.model.get_parameter(name), None
                )
        return found

    @contextlib.contextmanager
    def no_checkpoints(self) -> Iterator[None]:
        """Plain calls in place of checkpoints, and no rules inside of the program's autograd Functions."""
        functions = [v for v in self.namespace.values()
                     if isinstance(v, type) and issubclass(v, torch.autograd.Function)]  # fmt: skip
        forwards = [f.__dict__["forward"] for f in functions]
        own = self.namespace["checkpoint"]
        self.namespace["checkpoint"] = lambda f, *args, use_reentrant: f(*args)
        for function in functions:
            function.forward = staticmethod(self._natively(function.forward))
        try:
            yield
        finally:
            self.namespace["checkpoint"] = own
            for function, forward in zip(functions, forwards, strict=True):
                function.forward = forward

    def _natively(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any) -> Any:
            with self._off():
                return function(*args)

        return inner

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        op = name_of(func)
        if op == "hardtanh" and (kwargs.get("min_val"), kwargs.get("max_val")) == (0.0, 6.0):
            op = "relu6"  # what an nn.ReLU6 calls
        if self.inside or not op or not self.stack:
            return func(*args, **kwargs)
        path = self.stack[-1]
        entry = self.matching.operation(op, path, self.calls[path, op])
        self.calls[path, op] += 1
        if entry is None or (entry.rules is None and not entry.forward):
            return func(*args, **kwargs)
        (x, *others) = args or (kwargs.pop("input"),)
        if not x.is_floating_point():
            return func(x, *others, **kwargs)
        self.acted += 1
        # a copy: the program may write into x later, and the rule reads what x was
        copy = x.clone()
        given = copy.detach().clone() if entry.rules is not None else copy
        y = STEPS[entry.forward](given) if entry.forward else func(given, *others, **kwargs)
        out = y if entry.rules is None else Decoupled.apply(y, copy, entry.rules)
        return x.copy_(out) if works_in_place(func, args, kwargs) else out
