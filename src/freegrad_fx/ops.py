"""What a captured and rewritten graph calls: `stop_gradient` in front of an operation, `decoupled` behind it.

    stop = stop_gradient(x)
    y    = relu(stop)                                      # the user's own operation, unchanged
    out  = decoupled(y, x, rule="rectangular", a=-1.0, b=1.0)

A parameter is decoupled in the same way, with no operation in between, and `call_with` calls a module with the result
in its place. `apply_function` stands for a call of a `torch.autograd.Function` of the user's own, `apply_forward` for
one of a function that replaces a forward. All are plain functions that dispatch through ``__torch_function__``: a
symbolic tracer keeps each as one node, which is why a rewritten graph survives pickling, a second trace and
`torch.compile`. What `decoupled` comes to is in `decoupling`. This file knows no rule by name and nothing of graphs.
"""

from __future__ import annotations

import functools
import importlib
import threading
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import (
    handle_torch_function,
    has_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from ._torch import modules
from ._torch.dispatch import is_transformed
from ._torch.dynamo import takes_for_constant
from ._torch.functions import base_apply, overrides_apply
from ._torch.tensors import mark_as_parameter, version
from .context import ambient_rules, explicit_rules_act, surrounded
from .decoupling import decouple
from .errors import CaptureError, RuleError
from .hazards import records_forward_alone, refuse_sharded_parts, warn_if_recorded
from .rules.rule import Rule, get

__all__ = [
    "apply_forward",
    "apply_function",
    "call_with",
    "decoupled",
    "function_key",
    "function_of",
    "kept",
    "require_frozen",
    "require_open",
    "require_specialised",
    "require_tensor",
    "stop_gradient",
]


def stop_gradient(x: Tensor, *, ambient: str = "") -> Tensor:
    """Return the values of `x`, cut from its autograd graph; the memory is shared.

    Formula: forward x, backward 0.

    Where gradients are disabled it is `x` itself: some kernels ask whether a weight requires a gradient even then. A
    program that is being exported may be run with gradients later, and cuts in any case.

    Args:
        x: Any tensor.
        ambient: As for `decoupled`; where no rule acts, `x` itself is returned.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(stop_gradient, (x,), x, **_if_given(ambient=ambient))
    if not (torch.is_grad_enabled() or records_forward_alone()):
        return x
    acts = bool(ambient_rules(ambient)) if ambient else explicit_rules_act()
    # abs() and its like are written for numbers too, and a trace cannot tell
    return x.detach() if acts and isinstance(x, Tensor) else x


def kept(x: Tensor, *, ambient: str) -> Tensor:
    """Return a copy of `x` if a rule acts at an ambient site, whose operation writes into `x`; else `x` itself.

    Args:
        x: Any tensor.
        ambient: As for `decoupled`.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(kept, (x,), x, ambient=ambient)
    return x.clone() if torch.is_grad_enabled() and ambient_rules(ambient) else x


def _if_given(**keywords: Any) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if value}


def decoupled(
    y: Tensor,
    x: Tensor,
    *,
    rule: str | Rule = "",
    ambient: str = "",
    site: str = "",
    save: str = "",
    fuse: bool = False,
    **parameters: Any,
) -> Tensor:
    """Return the values of `y`; in the backward, `x` receives what the rule makes of the gradient.

    Formula: forward y; backward ∂x = rule(∂out, x, y), ∂y = ∂out.

    `y` keeps its own gradient, so that the weight of a PReLU between `stop_gradient(x)` and `y` learns natively.

    Args:
        y: The output of the operation, computed from ``stop_gradient(x)``. Any shape.
        x: The input of the operation, of the shape that the rule's result has.
        rule: The name of a registered rule, or a `Rule`.
        ambient: Instead of a rule: ``"activations"`` or ``"params"``, for the one that a `use` block of this scope
            gives while this runs; outside of such a block `y` itself is returned.
        site: The name of the place in the model, for error messages.
        save: What is saved where the rule reads ``x``: ``"x"``; ``"mask"``, its mask alone; ``"y"``, the output, where
            that has the same mask. By default what the rule says.
        fuse: Let the backward run as one compiled kernel in eager mode.
        **parameters: The rule's parameters, all of them; what is missing is taken from the rule.

    Raises:
        RuleError: The rule is unknown, or, in the backward, returned what is no gradient for `x`.
        TypeError: The operation returned something else than a tensor.
        RuntimeError: It is compiled inside a transform of `torch.func`, where the compiler would drop the rule.
    """
    if has_torch_function_variadic(y, x):
        given = _if_given(ambient=ambient) if ambient else {"rule": rule}
        given = {**given, **_if_given(save=save, fuse=fuse)}
        return handle_torch_function(decoupled, (y, x), y, x, **given, site=site, **parameters)
    if not isinstance(y, Tensor):
        if not isinstance(x, Tensor):
            return y
        raise TypeError(
            f"the operation at site {site!r} returned {type(y).__name__}; a rule needs one that returns a tensor"
        )
    # Only the grad mode may be asked here: `requires_grad` is not to be trusted under functorch and Dynamo.
    acts = bool(ambient_rules(ambient)) if ambient else explicit_rules_act()
    if not acts or warn_if_recorded() or not torch.is_grad_enabled():
        return y
    if not ambient:
        found = get(rule)
        if len(parameters) < len(found.parameters):
            parameters = {**dict(found.values), **parameters}
        return decouple(y, x, found, site, parameters, save or found.save, fuse or found.fuse)
    first, *others = ambient_rules(ambient)
    # An identity for every rule but the first, the last rule nearest to x
    for other in reversed(others):
        x = _decoupled_by(other, x.detach(), x, site)
    return _decoupled_by(first, y, x, site)


def _decoupled_by(rule: Rule, y: Tensor, x: Tensor, site: str) -> Tensor:
    return decouple(y, x, rule, site, dict(rule.values), rule.save, rule.fuse)


def call_with(
    module: nn.Module, parameters: Mapping[str, Tensor], /, *args: Any, **kwargs: Any
) -> Any:
    """Call a module with other tensors in the place of some of its parameters; the module keeps its own.

    Formula: ``module(*args, **kwargs)``, where the parameter of each name in `parameters` has the value given.

    Args:
        module: The module.
        parameters: Tensors by the names of the module's parameters, which may be those of its submodules.
        *args: What the module is called with.
        **kwargs: What the module is called with.
    """
    given = (*parameters.values(), *args, *kwargs.values())
    # Tensors of a subclass, and modes, are the business of what the module itself calls
    traced = [v for v in given if not isinstance(v, Tensor) and hasattr(v, "__torch_function__")]
    if traced:
        return handle_torch_function(call_with, traced, module, parameters, *args, **kwargs)
    if _are_own(parameters, module):  # no rule acts
        return module(*args, **kwargs)
    refuse_sharded_parts(module, parameters)
    if torch.compiler.is_compiling():
        return torch.func.functional_call(module, dict(parameters), args, kwargs, tie_weights=False)
    before = {name: (_version(value), _memory(value)) for name, value in parameters.items()}
    if _can_be_viewed(module, parameters):
        result = _call_view(module, parameters, args, kwargs)
    else:  # the module itself is changed for the time of the call
        with surrounded(lambda: _swapped(module, parameters)):
            result = module(*args, **kwargs)
    for name, value in parameters.items():
        version_before, memory = before[name]
        if (_version(value), _memory(value)) == (version_before, memory):
            continue
        own: Any = reduce(getattr, name.split("."), module)
        if memory != _memory(own):
            raise RuntimeError(
                f"the forward of {type(module).__name__} writes into its parameter {name!r}, which is read through "
                f"another forward here: the write is lost. Leave the parameter its own forward."
            )
        if memory != _memory(value):  # weight.data = ..., as projections of weights are written
            own.data = value.data
    return result


_swapping = threading.RLock()


@contextmanager
def _swapped(module: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module have other tensors for some of its parameters; one thread at a time."""
    _let_be_parameters(parameters.values())
    # What functional_call is made of
    with _swapping, modules.with_parameters(module, parameters):
        yield


def _version(tensor: Tensor) -> int:
    return 0 if is_transformed(tensor) or tensor.is_inference() else version(tensor)


def _memory(tensor: Tensor) -> int:
    """Where the values of a tensor are; 0 where it has none of its own."""
    own = type(tensor) in (Tensor, nn.Parameter) and not is_transformed(tensor)
    return tensor.data_ptr() if own else 0


def _are_own(parameters: Mapping[str, Tensor], module: Any) -> bool:
    """Whether tensors are the parameters that a module has under their names anyway."""
    named = (
        (reduce(getattr, name.split("."), module), value) for name, value in parameters.items()
    )
    return all(own is value for own, value in named)


def _can_be_viewed(module: nn.Module, names: Collection[str]) -> bool:
    """Whether nothing but its own code runs in a module, so that a view of it does what the module does.

    A hook would see the view instead of the module, a method that is kept as an attribute would see the module instead
    of the view, and PyTorch caches parametrized weights by the identity of their module.
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


def _knows_no_module(attribute: Any) -> bool:
    if isinstance(attribute, dict):
        attribute = attribute.values()
    if isinstance(attribute, Collection) and not isinstance(attribute, str | bytes | Tensor):
        # A long one is not looked through at every call
        return len(attribute) <= 100 and all(map(_knows_no_module, attribute))
    if isinstance(attribute, types.FunctionType):
        return attribute.__closure__ is None
    return not isinstance(attribute, types.MethodType | functools.partial | nn.Module)


def _call_view(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Call a view of a module: the same class and attributes, with other tensors for some parameters."""
    written: list[_Written] = []
    view = _view(module, parameters, written, of_torch=True)
    try:
        return view(*args, **kwargs)
    finally:
        for own, seen, before in written:  # what the forward assigned
            for name in before.keys() - seen.keys():
                own.pop(name, None)
            for name, value in seen.items():
                if name not in before or value is not before[name]:
                    own[name] = value


# A dict of a module, that of its view, and what this one was before the call
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
    if not of_torch:  # in which no code but the library's runs
        _let_be_parameters(own.values())
        pairs: list[tuple[Any, dict[str, Any]]] = [
            (module.__dict__, view.__dict__),
            (modules.parameters_of(module), values),
            (modules.children_of(module), children),
        ]
        written.extend((original, seen, dict(seen)) for original, seen in pairs)
    return view


def _let_be_parameters(tensors: Iterable[Tensor]) -> None:
    """Let tensors be parameters for code that asks for an `nn.Parameter`."""
    for tensor in tensors:
        mark_as_parameter(tensor)


def _by_part(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What belongs to each submodule, of values by dotted names."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, dot, rest = name.partition(".")
        if dot:
            parts.setdefault(part, {})[rest] = value
    return parts


_functions: dict[str, Callable[..., Any]] = {}


def function_key(function: Callable[..., Any]) -> str:
    """The text by which a graph names a class or function of the user's: ``module:qualified name``.

    One that cannot be imported (it was made inside a function, or is an object that can be called) is known in this
    process alone; a second one of the same name gets a number.
    """
    bound = isinstance(getattr(function, "__func__", None), types.FunctionType)
    named = hasattr(function, "__qualname__") and not bound
    kind = function if named else type(function)
    base = f"{kind.__module__}:{kind.__qualname__}{'' if named else '()'}"
    key, number = base, 1
    while _functions.setdefault(key, function) is not function:
        number += 1
        key = f"{base}#{number}"
    return key


def apply_function(function: str, *args: Any, **kwargs: Any) -> Any:
    """Call ``apply`` of the `torch.autograd.Function` that `function` names (see `function_key`).

    Raises:
        RuntimeError: The class is not known in this process and cannot be imported.
    """
    if has_torch_function(args):
        return handle_torch_function(apply_function, args, function, *args, **kwargs)
    if _wraps_apply(function):
        return base_apply(function_of(function))(*args, **kwargs)
    return function_of(function).apply(*args, **kwargs)


@takes_for_constant
def _wraps_apply(function: str) -> bool:
    """Whether a Function has code of its own around `apply`: a trace has gone through that already."""
    return overrides_apply(function_of(function))


def apply_forward(x: Tensor, function: str, /, *before: Any, **parameters: Any) -> Tensor:
    """Call the function of the user's that `function` names (see `function_key`), in the place of a site's own forward.

    Args:
        x: The tensor.
        function: The name of the function.
        *before: What it is given in front of `x`.
        **parameters: What it is given by keyword.

    Raises:
        RuntimeError: It is not known in this process and cannot be imported.
        TypeError: It returned something else than a tensor of the shape of `x`.
        RuleError: It changed `x` in place.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(apply_forward, (x,), x, function, *before, **parameters)
    counts = not torch.compiler.is_compiling() and not x.is_inference()
    before_call = version(x) if counts else 0
    result = function_of(function)(*before, x, **parameters)
    if counts and version(x) != before_call:
        raise RuleError(
            f"the forward {function!r} changes its argument in place, which is the model's own tensor. Make it a pure "
            f"function: x.sign(), not x.sign_()."
        )
    if not isinstance(result, Tensor) or result.shape != x.shape:
        got = (
            f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        )
        raise TypeError(
            f"the forward {function!r} has to return a tensor of the shape of its input, {tuple(x.shape)}; it "
            f"returned {got}"
        )
    return result


def function_of(key: str) -> Any:
    """The class or function of a key.

    Raises:
        RuntimeError: The class is not known in this process and cannot be imported.
    """
    if key not in _functions:
        _functions[key] = _import_function(key)
    return _functions[key]


def _import_function(key: str) -> Any:
    module, _, qualname = key.partition(":")
    try:
        return reduce(getattr, qualname.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"the model calls {key!r}, which cannot be imported here ({error}). "
            f"Define it at the top level of a module, so that a saved model finds it."
        ) from error


def require_specialised(value: Any, captured: Any, name: str, remedy: str = "") -> None:
    """Raise `CaptureError` unless an argument has the value that the graph was captured for.

    Args:
        value: The argument of this call.
        captured: The value at the time of the capture; ``...`` stands for one that no graph can hold.
        name: The argument's name.
        remedy: What the caller can do, where it is not what symbolic tracing needs.
    """
    if has_torch_function((value,)):
        handle_torch_function(require_specialised, (value,), value, captured, name, remedy)
    elif not (value is captured or (type(value) is type(captured) and value == captured)):
        was = "the default of " + name if captured is ... else f"{name}={captured!r}"
        remedy = remedy or (
            f"Transform the model for the value you need: transform(model, rules, concrete_args={{{name!r}: ...}}); "
            f"for an argument that is a tensor at each call, concrete_args={{{name!r}: torch.fx.PH}}."
        )
        raise CaptureError(
            f"the graph was captured for {was} and is called with another value. {remedy}"
        )


def require_open(value: Any, name: str) -> None:
    """Raise `CaptureError` if an open argument is None or a bool, which a forward may have asked for with ``is``.

    Args:
        value: The argument of this call.
        name: The argument's name.
    """
    if has_torch_function((value,)):
        handle_torch_function(require_open, (value,), value, name)
    elif value is None or isinstance(value, bool):
        raise CaptureError(
            f"the forward asks with `is` what an argument is, and the graph was captured for a value of {name!r} "
            f"that is neither None nor a bool; it is {value} now. Transform the model for that: "
            f"transform(model, rules, concrete_args={{{name!r}: {value}}})."
        )


def require_tensor(value: Any, where: str) -> None:
    """Raise `CaptureError` unless a value is a tensor, which the capture took it for when the forward asked.

    Args:
        value: The value.
        where: ``file:line`` of the question.
    """
    if has_torch_function((value,)):
        handle_torch_function(require_tensor, (value,), value, where)
    elif not isinstance(value, Tensor):
        raise CaptureError(
            f"the forward asks at {where} for the type of a value; the graph was captured for a tensor, and it is "
            f"{type(value).__name__} now. Transform the model with example_inputs=(...) of that kind."
        )


def require_frozen(parameter: Tensor, name: str) -> None:
    """Raise `RuntimeError` if a parameter learns that was frozen when its rule was planned.

    Args:
        parameter: The parameter.
        name: Its dotted name.
    """
    if has_torch_function_unary(parameter):
        handle_torch_function(require_frozen, (parameter,), parameter, name)
    elif parameter.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"the parameter {name!r} was frozen (requires_grad=False) when the model was transformed, and learns now: "
            f"its rule would not act. Transform the original model again, with the parameter unfrozen; the tensors "
            f"stay the same."
        )
