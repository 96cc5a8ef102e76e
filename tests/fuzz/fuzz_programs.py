"""Programs as data: classes of modules whose forward is a tree of statements, rendered as source text.

Every statement reads and writes the same few variables, which have one shape and are defined before the first
statement. So a program stays a program when any statement is left out, which is how failures shrink. Nothing here knows
the product.
"""

from __future__ import annotations

import itertools
import linecache
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

WIDTH = 4
VARIABLES = ("a", "b", "c")

HEADER = """\
import functools
import operator
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 0.5 * (x.abs() < 1)


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.5


def helper(t, slope=0.1):
    return F.leaky_relu(t, slope) * 1.25


def helper_inplace(t):
    t.relu_()


def after(module, args, output):
    return output * 1.5 + args[0].mean() * 0.25


def watch(module, args, output):
    return None


def before(module, args):
    return (args[0] * 0.75 + 0.1,)


def double(grad):
    return grad * 2


TABLE = {"relu": F.relu, "tanh": torch.tanh}
"""


@dataclass(frozen=True)
class Block:
    """A compound statement: ``if``, ``for``, ``with``. An empty body is rendered as ``pass``."""

    header: str
    body: tuple[Statement, ...]
    other: tuple[Statement, ...] | None = None


Statement = str | Block


@dataclass(frozen=True)
class Class:
    """A module class.

    Attributes:
        name: Its name.
        init: The lines of ``__init__``.
        body: The statements of ``forward``.
        returns: What ``forward`` returns.
        signature: The parameters of ``forward``, the first of which is ``x``.
    """

    name: str
    init: tuple[str, ...]
    body: tuple[Statement, ...]
    returns: str = "a"
    signature: str = "x"


@dataclass(frozen=True)
class Program:
    """Some classes, of which the last is the model, and how it is called.

    Attributes:
        classes: The classes; each uses only those before it.
        dtype: The name of the dtype of parameters and inputs.
        inputs: How the tensor arguments after ``x`` are passed: ``{"z": "positional"}`` or ``"keyword"``.
        features: What the generator has put in, for statistics.
    """

    classes: tuple[Class, ...]
    dtype: str = "float64"
    inputs: tuple[tuple[str, str], ...] = ()
    features: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def source(self) -> str:
        return HEADER + "".join("\n\n" + "\n".join(_class(c)) + "\n" for c in self.classes)

    @property
    def size(self) -> int:
        return sum(len(c.init) + sum(1 for _ in walk(c.body)) for c in self.classes)


def _class(c: Class) -> Iterator[str]:
    yield f"class {c.name}(nn.Module):"
    yield "    def __init__(self):"
    yield "        super().__init__()"
    yield from (f"        {line}" for line in c.init)
    yield ""
    yield f"    def forward(self, {c.signature}):"
    yield "        a = x * 1.0"
    yield "        b = x + 0.5"
    yield "        c = x * 0.5"
    yield from _indented(c.body, "        ")
    yield f"        return {c.returns}"
    yield ""
    yield "    def method(self, t):"
    yield "        return F.leaky_relu(t, 0.2) * 1.5"


def _indented(body: tuple[Statement, ...], by: str) -> Iterator[str]:
    for statement in body:
        if isinstance(statement, str):
            yield from (by + line for line in statement.split("\n"))
            continue
        yield f"{by}{statement.header}:"
        yield from _indented(statement.body or ("pass",), by + "    ")
        if statement.other is not None:
            yield f"{by}else:"
            yield from _indented(statement.other or ("pass",), by + "    ")


def walk(body: tuple[Statement, ...]) -> Iterator[Statement]:
    for statement in body:
        yield statement
        if isinstance(statement, Block):
            yield from walk(statement.body)
            yield from walk(statement.other or ())


# --- smaller ones ---


def smaller_bodies(body: tuple[Statement, ...]) -> Iterator[tuple[Statement, ...]]:
    """The body with something left out: halves first, then each statement, then each compound replaced by its body."""
    if len(body) > 3:
        half = len(body) // 2
        yield body[half:]
        yield body[:half]
    for index, statement in enumerate(body):
        yield body[:index] + body[index + 1 :]
        if not isinstance(statement, Block):
            continue
        yield body[:index] + statement.body + body[index + 1 :]
        if statement.other is not None:
            yield body[:index] + statement.other + body[index + 1 :]
        for inside in smaller_bodies(statement.body):
            yield (*body[:index], replace(statement, body=inside), *body[index + 1 :])
        for inside in smaller_bodies(statement.other or ()):
            yield (*body[:index], replace(statement, other=inside), *body[index + 1 :])


def smaller(program: Program) -> Iterator[Program]:
    """Programs with one thing less each. Some do not run: what asks for them has to try."""
    classes = program.classes
    for index, one in enumerate(classes):

        def put(*instead: Class, at: int = index) -> Program:
            return replace(program, classes=classes[:at] + instead + classes[at + 1 :])

        if one is not classes[-1]:
            yield put()
        for body in smaller_bodies(one.body):
            yield put(replace(one, body=body))
        for line in range(len(one.init)):
            yield put(replace(one, init=one.init[:line] + one.init[line + 1 :]))
        for returns in ("a", "b", "c"):
            if len(one.returns) > 1:
                yield put(replace(one, returns=returns))
    if program.inputs:
        last = replace(classes[-1], signature="x")
        yield replace(program, classes=(*classes[:-1], last), inputs=())
    if program.dtype != "float64":
        yield replace(program, dtype="float64")


# --- running them ---

_numbers = itertools.count()


def load(program: Program) -> types.ModuleType:
    """Execute the source as a module that can be imported, so that its classes pickle and its lines can be read."""
    module = types.ModuleType(f"fuzz_case_{next(_numbers)}")
    file = f"<{module.__name__}>"
    source = program.source
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    sys.modules[module.__name__] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def unload(module: types.ModuleType) -> None:
    sys.modules.pop(module.__name__, None)
    linecache.cache.pop(f"<{module.__name__}>", None)


def make(program: Program, module: types.ModuleType) -> nn.Module:
    """The model, with the same numbers at each call."""
    torch.default_generator.manual_seed(0)
    model: nn.Module = getattr(module, program.classes[-1].name)()
    return model.to(getattr(torch, program.dtype))


def sample(
    program: Program, seed: int, grad: bool = True, rows: int = 3
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Inputs for one call."""
    generator = torch.Generator().manual_seed(seed)

    def tensor() -> Tensor:
        drawn = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
        return drawn.to(getattr(torch, program.dtype)).requires_grad_(grad)

    args, kwargs = [tensor()], {}
    for name, how in program.inputs:
        if how == "positional":
            args.append(tensor())
        elif how == "keyword":
            kwargs[name] = tensor()
    return args, kwargs
