"""`call_with`: calls a module with other tensors in place of some of its parameters."""

from __future__ import annotations

import enum
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import handle_torch_function

from .._torch import modules
from .._torch.dispatch import is_transformed
from .._torch.dynamo import is_compiling
from .._torch.tensors import mark_as_parameter, version
from ..backward.hazards import refuse_sharded_parts
from ..context import surrounded

__all__ = ["call_with", "recording", "with_parameters"]

T = TypeVar("T")


def call_with(
    module: nn.Module, parameters: Mapping[str, Tensor], /, *args: Any, **kwargs: Any
) -> Any:
    """Call a module with other tensors in place of some of its parameters. The module is not changed.

    Equivalent to ``torch.func.functional_call(module, parameters, args, kwargs, tie_weights=False)``, and faster where
    possible.

    Args:
        module: The module to call.
        parameters: Replacement tensors, keyed by the dotted name of the parameter in `module`.
        *args: Positional arguments of the call.
        **kwargs: Keyword arguments of the call.

    Returns:
        The output of the module.

    Raises:
        RuntimeError: The forward writes into a parameter that is read through a replaced forward; or a submodule with
            replaced parameters is sharded with `fully_shard`.
    """
    traced = recording(parameters, *args, *kwargs.values())
    if traced:
        return handle_torch_function(call_with, traced, module, parameters, *args, **kwargs)
    if _are_own(parameters, module):  # no rule acts
        return module(*args, **kwargs)
    refuse_sharded_parts(module, parameters)
    if is_compiling():
        return torch.func.functional_call(module, dict(parameters), args, kwargs, tie_weights=False)
    before = _states(parameters)
    if _can_be_viewed(module, parameters):
        result = _call_view(module, parameters, args, kwargs)
    else:  # the parameters of the module itself are swapped during the call
        with surrounded(lambda: _swapped(module, parameters)):
            result = module(*args, **kwargs)
    _follow_writes(module, parameters, before)
    return result


def recording(parameters: Mapping[str, Tensor], *values: Any) -> list[Any]:
    """The values that record the call, such as proxies. Tensor subclasses dispatch inside of the call."""
    given = (*parameters.values(), *values)
    return [v for v in given if not isinstance(v, Tensor) and hasattr(v, "__torch_function__")]


def with_parameters(
    module: nn.Module, parameters: Mapping[str, Tensor], function: Callable[[], T]
) -> T:
    """Run a part of the call of a module while other tensors take the place of some of its parameters.

    Raises:
        RuntimeError: As for `call_with`.
    """
    if not parameters or _are_own(parameters, module):
        return function()
    refuse_sharded_parts(module, parameters)
    if is_compiling():
        with modules.with_parameters(module, parameters):
            return function()
    before = _states(parameters)
    with surrounded(lambda: _swapped(module, parameters)):
        result = function()
    _follow_writes(module, parameters, before)
    return result


def _states(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {name: (_version(value), _memory(value)) for name, value in parameters.items()}


def _follow_writes(
    module: nn.Module, parameters: Mapping[str, Tensor], before: Mapping[str, tuple[int, int]]
) -> None:
    """Let the module keep what a call has written into replacements of its parameters.

    Raises:
        RuntimeError: The forward wrote into a parameter that is read through a replaced forward.
    """
    for name, value in parameters.items():
        version_before, memory = before[name]
        if (_version(value), _memory(value)) == (version_before, memory):
            continue
        own: Any = reduce(getattr, name.split("."), module)
        if memory != _memory(own):
            raise RuntimeError(
                f"the forward of {type(module).__name__} writes into its parameter {name!r}. A rule with forward= "
                f"replaces that parameter by a computed tensor, so the write would be lost. Use a rule without "
                f"forward= for this parameter."
            )
        if memory != _memory(value):  # weight.data = ..., a common way to project weights
            own.data = value.data


_swapping = threading.RLock()


@contextmanager
def _swapped(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Swap some parameters of a module for other tensors; only one thread at a time does so."""
    _let_be_parameters(parameters.values())
    # As torch.func.functional_call does
    with _swapping, modules.with_parameters(module, parameters):
        yield


def _version(tensor: Tensor) -> int:
    return 0 if is_transformed(tensor) or tensor.is_inference() else version(tensor)


def _memory(tensor: Tensor) -> int:
    """The address of a tensor's data; 0 for subclasses and tensors inside of function transforms."""
    own = type(tensor) in (Tensor, nn.Parameter) and not is_transformed(tensor)
    return tensor.data_ptr() if own else 0


def _are_own(parameters: Mapping[str, Tensor], module: Any) -> bool:
    """Whether all given tensors already are the module's parameters of these names."""
    named = (
        (reduce(getattr, name.split("."), module), value) for name, value in parameters.items()
    )
    return all(own is value for own, value in named)


def _can_be_viewed(module: nn.Module, names: Collection[str]) -> bool:
    """Whether a shallow copy of a module, a "view", behaves exactly like the module when it is called.

    Hooks would receive the view instead of the module; PyTorch caches parametrized weights by the identity of the
    module; a ScriptModule is no Python object; and what an attribute refers to may use the module instead of the view.
    """
    if (
        modules.has_hooks(module)
        or modules.has_global_hooks()
        or isinstance(module, torch.jit.ScriptModule)
        or is_parametrized(module)
        or not (_of_torch(module) or _knows_no_module(_own_attributes(module)))
    ):
        return False
    parts = _by_part(dict.fromkeys(names))
    return all(_can_be_viewed(getattr(module, part), inside) for part, inside in parts.items())


def _of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.modules.")


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if k not in _OF_EVERY_MODULE}


_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


# Values that refer to no module. Any other object may hold one, and would use it instead of its view.
_PLAIN = (
    types.NoneType, bool, int, float, complex, str, bytes, Tensor,
    torch.dtype, torch.device, torch.layout, torch.memory_format,
    torch.Generator, enum.Enum, type, types.ModuleType,
)  # fmt: skip
_MAPPINGS = (dict, OrderedDict)
_COLLECTIONS = (list, tuple, set, frozenset, torch.Size)


def _knows_no_module(attribute: Any, depth: int = 5) -> bool:
    """Whether a value, and what it holds, is known to refer to no module. The depth of the search is limited."""
    if isinstance(attribute, _PLAIN):
        return True
    inside: Collection[Any]
    if isinstance(attribute, types.BuiltinFunctionType):
        inside = (attribute.__self__,)  # a bound method of a list, for example
    elif isinstance(attribute, types.FunctionType):
        if attribute.__closure__ is not None or attribute.__dict__:
            return False
        inside = (attribute.__defaults__, attribute.__kwdefaults__)
    elif type(attribute) in _MAPPINGS:
        inside = (*attribute.keys(), *attribute.values())
    elif type(attribute) in _COLLECTIONS:
        inside = attribute
    else:
        return False
    # Long collections are not searched at every call
    return depth > 0 and len(inside) <= 100 and all(_knows_no_module(v, depth - 1) for v in inside)


def _call_view(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a view of a module, a shallow copy with other tensors for some parameters.

    Attributes that the forward assigns on the view are assigned to the module afterwards.
    """
    written: list[_Written] = []
    view = _view(module, parameters, written, of_torch=True)
    try:
        return view(*args, **kwargs)
    finally:
        for own, seen, before in written:  # attributes that the forward assigned or deleted
            for name in before.keys() - seen.keys():
                own.pop(name, None)
            for name, value in seen.items():
                if name not in before or value is not before[name]:
                    own[name] = value


# A dict of a module, the corresponding dict of its view, and a copy of the latter from before the call
_Written: TypeAlias = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def _view(
    module: nn.Module, parameters: Mapping[str, Tensor], written: list[_Written], of_torch: bool
) -> nn.Module:
    view: nn.Module = object.__new__(type(module))
    of_torch = of_torch and _of_torch(module)
    own = {name: value for name, value in parameters.items() if "." not in name}
    parts = {
        name: _view(getattr(module, name), inside, written, of_torch)
        for name, inside in _by_part(parameters).items()
    }
    values = {**modules.parameters_of(module), **own}
    children = {**modules.children_of(module), **parts}
    view.__dict__ = {**module.__dict__, modules.PARAMETERS: values, modules.CHILDREN: children}
    if not of_torch:  # only PyTorch's own code runs in modules of torch.nn
        _let_be_parameters(own.values())
        pairs: list[tuple[Any, dict[str, Any]]] = [
            (module.__dict__, view.__dict__),
            (modules.parameters_of(module), values),
            (modules.children_of(module), children),
        ]
        written.extend((original, seen, dict(seen)) for original, seen in pairs)
    return view


def _let_be_parameters(tensors: Iterable[Tensor]) -> None:
    """Make ``isinstance(tensor, nn.Parameter)`` true for tensors."""
    for tensor in tensors:
        mark_as_parameter(tensor)


def _by_part(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Group values with dotted names by the submodule that the names begin with."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, dot, rest = name.partition(".")
        if dot:
            parts.setdefault(part, {})[rest] = value
    return parts
