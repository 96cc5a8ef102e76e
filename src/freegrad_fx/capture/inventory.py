"""What a tracer looks up in a model before it traces it: the names of its tensors, and how its code is written."""

from __future__ import annotations

import dis
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from types import CodeType, FunctionType
from typing import Any

from torch import Tensor, nn

from .._torch import tree
from .._torch.modules import buffers_of, parameters_of
from .._torch.parametrized import plain_class
from ..graph.state import ATTRIBUTES_OF_EVERY_MODULE, is_python_state
from ..vocabulary.inside import computes_activations

__all__ = [
    "compared_by_identity",
    "compares_identity",
    "held_tensors",
    "kept_whole",
    "tensor_names",
]


@functools.lru_cache(maxsize=4096)
def compares_identity(kind: type[nn.Module]) -> bool:
    """Whether the code of a module class contains `is` or `is not`, such as `x is None`.

    Python does not ask a proxy for the result of such a test, so a trace always takes the same branch.
    """
    if kind.__module__.startswith("torch.nn."):
        return False
    codes = [
        f.__code__
        for c in kind.__mro__
        for f in vars(c).values()
        if isinstance(f, FunctionType)
        and not c.__module__.startswith("torch.")
        and f.__name__ != "__init__"
    ]
    return any(
        i.opname == "IS_OP" or i.opname.endswith("_NONE")
        for code in codes
        for i in dis.get_instructions(code)
    )


@functools.lru_cache(maxsize=4096)
def compared_by_identity(code: CodeType) -> frozenset[Any]:
    """The constants to the right of `is` in a function and the functions in it; ``...`` stands for other values."""
    found = {
        before.argval if before.opname == "LOAD_CONST" else ...
        for before, after in itertools.pairwise(dis.get_instructions(code))
        if after.opname == "IS_OP"
    }
    return frozenset(found).union(
        *(compared_by_identity(c) for c in code.co_consts if isinstance(c, CodeType))
    )


def tensor_names(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """The dotted names of the parameters, buffers and tensor attributes of modules, by the identity of the tensor.

    Args:
        modules: The modules of a model, by their paths. A tensor with several names has the first.
    """
    tables: dict[Callable[[nn.Module], dict[str, Any]], dict[int, str]] = {
        _own_attributes: {}, buffers_of: {}, parameters_of: {}
    }  # fmt: skip
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        for table, names in tables.items():
            for name, value in table(module).items():
                if isinstance(value, Tensor):
                    names.setdefault(id(value), prefix + name)
    return {key: name for names in tables.values() for key, name in names.items()}


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    attributes = module.__dict__.items()
    return {name: value for name, value in attributes if name not in ATTRIBUTES_OF_EVERY_MODULE}


def held_tensors(modules: Iterable[nn.Module]) -> set[int]:
    """The identities of the tensors in lists, tuples and dicts that are attributes of modules."""
    attributes = [
        value
        for module in modules
        for value in _own_attributes(module).values()
        if isinstance(value, list | tuple | dict)
        and not is_python_state(value)  # such as the strides of a convolution
    ]
    leaves = tree.leaves(attributes)
    return {id(leaf) for leaf in leaves if isinstance(leaf, Tensor)}


def kept_whole(module: nn.Module) -> bool:
    """Whether the call of a module of PyTorch is one node. Other modules are traced into.

    The layers of torch.ao, for quantisation, are traced into if they compute activations, such as ``LinearReLU``.
    """
    # A parametrized module has a class of torch.nn.utils
    kind = plain_class(module)
    if kind is nn.Sequential or not kind.__module__.startswith(("torch.nn", "torch.ao.nn")):
        return False
    traced = kind.__module__.startswith("torch.ao.nn.") and ".quantized." not in kind.__module__
    return not (traced and computes_activations(module))
