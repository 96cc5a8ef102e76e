"""The structure of the source: private names of PyTorch only in `_torch`, no import from a higher floor, no circles."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

import freegrad_fx

ROOT = Path(freegrad_fx.__file__).parent
PACKAGE = ROOT.name

# The lowest floor first. A module imports only from its own line and from the lines above it.
FLOORS = """
errors _moved
_torch
core
rules blocks context vocabulary extension
backward
ops
functional plot modules graph testing quantizers
sites
capture table
plan tables scaling
rewrite schedules rule_values
eager
batches relevance compared drawing counted monitor dynamo
verification
materialized pipeline expected
compat integrations
cli
__main__
"""
FLOOR = {name: number for number, line in enumerate(FLOORS.split("\n")) for name in line.split()}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}
OUTSIDE = {name: file for name, file in FILES.items() if name.partition(".")[0] != "_torch"}


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), str(file))


# --- private names ---


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def own_names() -> frozenset[str]:
    """The names of methods and attributes that classes of the package define, outside of `_torch`."""
    found: set[str] = set()
    for file in OUTSIDE.values():
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ClassDef):
                for line in node.body:
                    if isinstance(line, ast.FunctionDef):
                        found.add(line.name)
                    targets = line.targets if isinstance(line, ast.Assign) else []
                    targets = [line.target] if isinstance(line, ast.AnnAssign) else targets
                    found |= {target.id for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                of_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                found.update([node.attr] if of_itself else [])
    return frozenset(found)


# Private attributes of PyTorch's objects, which code can also access by text: getattr, __dict__, vars
HELD = {
    name
    for thing in (
        nn.Module(),
        fx.GraphModule(nn.Module(), fx.Graph()),
        fx.Graph(),
        fx.Graph().placeholder("x"),
    )
    for name in [*getattr(thing, "__dict__", {}), *getattr(type(thing), "__slots__", ())]
    if is_private(name)
} | {"_in_spec", "_out_spec", "_orig_mod", "_compiled_call_impl", "_is_replica", "_is_param"}


def private_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The private names of PyTorch that a file uses, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            known = node.attr in own_names() or ast.unparse(node) == "sys._getframe"
            if is_private(node.attr) and not known:
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if name.startswith("torch") and any(map(is_private, name.split("."))):
                    yield node.lineno, name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch.") and any(map(is_private, alias.name.split("."))):
                    yield node.lineno, alias.name
        elif isinstance(node, ast.Constant) and node.value in HELD:
            yield node.lineno, repr(node.value)


# Private methods that PyTorch calls, and that classes of the package can define
HOOKS = {"_replicate_for_data_parallel", "_repr_html_"}
BASES = (nn.Module, fx.GraphModule, fx.Tracer, fx.Proxy, torch.autograd.Function, TorchFunctionMode)
INHERITED = {name for base in BASES for name in dir(base) if is_private(name)} - HOOKS


def test_no_private_method_of_pytorch_is_overridden_elsewhere() -> None:
    methods = [
        (name, line.name)
        for name, file in OUTSIDE.items()
        for node in ast.walk(tree_of(file))
        if isinstance(node, ast.ClassDef) and node.bases
        for line in node.body
        if isinstance(line, ast.FunctionDef)
    ]
    assert [(name, method) for name, method in methods if method in INHERITED] == []


def test_private_names_of_pytorch_are_used_only_in_the_folder_torch() -> None:
    used = {name: list(private_names(tree_of(file))) for name, file in OUTSIDE.items()}
    assert {name: private for name, private in used.items() if private} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch._C._get_tracing_state()",
        "from torch._dynamo import config",
        "from torch.utils import _pytree as pytree",
        "import torch._dynamo.eval_frame",
        "def f():\n    from torch.fx.node import _get_qualified_name",
        "def f(node):\n    return node._erased",
        "def f(tensor):\n    return tensor._version",
        "def f(module):\n    return getattr(module, '_modules')",
        "def f(module):\n    return module.__dict__['_parameters']",
    ],
)
def test_a_private_name_is_found(code: str) -> None:
    assert list(private_names(ast.parse(code)))


def test_is_compiling_of_pytorch_is_called_only_in_the_folder_torch() -> None:
    """`torch.compiler.is_compiling` answers no, in torch 2.12, while AOTAutograd traces."""
    others = {name: file for name, file in OUTSIDE.items() if name != "_torch"}
    call = "torch.compiler.is_compiling("
    assert [name for name, file in others.items() if call in file.read_text("utf-8")] == []


# --- replacements ---


def bound_to_torch(tree: ast.Module) -> set[str]:
    """The names in a file that refer to modules and classes of PyTorch, or to Python's builtins."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                (a.asname or a.name).partition(".")[0]
                for a in node.names
                if a.name.partition(".")[0] in ("torch", "builtins")
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found |= set() if node.level else {a.asname or a.name for a in node.names}
    return found


def root_of(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def replacements(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The places where a file assigns to an attribute of PyTorch or of Python's builtins."""
    known = bound_to_torch(tree)
    for node in ast.walk(tree):
        target: ast.expr | None = None
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            target = node
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            target = node.args[0]
        if target is not None and root_of(target) in known:
            yield node.lineno, ast.unparse(node)


def test_nothing_of_pytorch_is_replaced_in_another_way() -> None:
    others = {name: file for name, file in FILES.items() if name != "_torch.replacing"}
    replaced = {name: list(replacements(tree_of(file))) for name, file in others.items()}
    assert {name: found for name, found in replaced.items() if found} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.rand = None",
        "from torch import nn\nnn.Module.training = property()",
        "from torch import nn\ndel nn.Module.training",
        "import builtins\nbuiltins.isinstance = None",
        "import torch\nsetattr(torch, 'rand', None)",
    ],
)
def test_a_replacement_is_found(code: str) -> None:
    assert list(replacements(ast.parse(code)))


# --- floors and circles ---


def imported(name: str, file: Path) -> set[str]:
    """The modules of the package that a module imports, also inside functions and only for types."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".") if package else []
            parts = parts[: len(parts) - node.level + 1]
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}" if base else alias.name
                found.add(full if full in FILES else base)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            absolute = [n for n in names if n.partition(".")[0] == PACKAGE]
            assert not absolute or name.startswith("compat."), f"{file}:{node.lineno}"
    return found - {name}


IMPORTS = {name: imported(name, file) for name, file in FILES.items()}


def floor_of(name: str) -> int:
    return FLOOR.get(name.partition(".")[0], len(FLOORS)) if name else len(FLOORS)


def test_every_part_has_a_floor() -> None:
    assert {name.partition(".")[0] for name in FILES if name} == FLOOR.keys()


def test_nothing_is_imported_from_a_higher_floor() -> None:
    imports = [(name, other) for name in FILES for other in IMPORTS[name]]
    assert [pair for pair in imports if floor_of(pair[1]) > floor_of(pair[0])] == []


def test_there_are_no_circular_imports() -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for other in IMPORTS[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


def test_every_module_has_a_docstring() -> None:
    assert [name for name, file in FILES.items() if not ast.get_docstring(tree_of(file))] == []


def test_the_names_in_these_tests_exist() -> None:
    assert {"_parameters", "_modules", "_code"} <= HELD
    assert isinstance(builtins.isinstance, type(len))
    assert torch.__version__
