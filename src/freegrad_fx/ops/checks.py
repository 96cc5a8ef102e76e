"""Checks that a graph runs at each call: the assumptions made during capture still hold."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from .._torch.dynamo import is_compiling, takes_for_constant
from .._torch.tensors import version
from ..context import explicit_rules_act
from ..errors import CaptureError, FreegradWarning, PlanError

__all__ = [
    "require_frozen",
    "require_metadata",
    "require_no_others",
    "require_open",
    "require_result",
    "require_specialised",
    "require_tensor",
    "require_unwritten",
    "warn_if_native",
    "write_count",
]


def require_specialised(value: Any, captured: Any, name: str, remedy: str = "") -> None:
    """Raise `CaptureError` unless an argument has the value for which the graph was captured.

    Args:
        value: The argument of this call.
        captured: The value during the capture; ``...`` represents a value that a graph cannot contain.
        name: The name of the argument.
        remedy: The last sentence of the error message. By default it explains `concrete_args`.
    """
    if has_torch_function((value,)):
        handle_torch_function(require_specialised, (value,), value, captured, name, remedy)
    elif not (value is captured or (type(value) is type(captured) and value == captured)):
        was = "the default of " + name if captured is ... else f"{name}={captured!r}"
        remedy = remedy or (
            f"Transform the model for the value you need, transform(model, rules, concrete_args={{{name!r}: ...}}). "
            f"If the argument is a tensor at each call, use concrete_args={{{name!r}: torch.fx.PH}}."
        )
        raise CaptureError(
            f"the graph was captured for {was} and is called with another value. {remedy}"
        )


def require_no_others(given: dict[str, Any], remedy: str) -> None:
    """Raise `CaptureError` if a call gives keywords without which the graph was captured.

    Args:
        given: The keywords that no argument of the graph has, with their values.
        remedy: The last sentence of the error message.
    """
    if given:
        raise CaptureError(
            f"the graph was captured without {' and '.join(given)}, and is called with it. {remedy}"
        )


def require_open(value: Any, name: str) -> None:
    """Raise `CaptureError` if an argument is None or a bool, for which an ``is`` test in the forward could differ.

    Args:
        value: The argument of this call.
        name: The name of the argument.
    """
    if has_torch_function((value,)):
        handle_torch_function(require_open, (value,), value, name)
    elif value is None or isinstance(value, bool):
        raise CaptureError(
            f"the forward tests its arguments with `is`, and the graph was captured for a value of {name!r} that is "
            f"neither None nor a bool; it is {value} in this call. Transform the model for that value: "
            f"transform(model, rules, concrete_args={{{name!r}: {value}}})."
        )


def require_tensor(value: Any, where: str) -> None:
    """Raise `CaptureError` unless a value is a tensor, as the capture assumed at a type test in the forward.

    Args:
        value: The value.
        where: ``file:line`` of the type test.
    """
    if has_torch_function((value,)):
        handle_torch_function(require_tensor, (value,), value, where)
    elif not isinstance(value, Tensor):
        raise CaptureError(
            f"the forward tests the type of a value at {where}. The graph was captured for a tensor, but the value is "
            f"of type {type(value).__name__} in this call. Transform the model with example_inputs=(...) of that type."
        )


def require_metadata(x: Tensor, name: str, captured: Any) -> None:
    """Raise `CaptureError` if the forward reads the dtype or device of a tensor and it differs from the captured one.

    Args:
        x: The tensor.
        name: ``"dtype"`` or ``"device"``.
        captured: The value during the capture.
    """
    if has_torch_function_unary(x):
        handle_torch_function(require_metadata, (x,), x, name, captured)
        return
    now = x.dtype if name == "dtype" else x.device
    if now != captured and (name == "dtype" or now.type != captured.type):  # type: ignore[union-attr]
        raise CaptureError(
            f"the forward reads the {name} of a tensor, which was {captured} when the model was captured and is {now} "
            f"in this call. Transform the original model again, with example_inputs and inside of the torch.autocast "
            f"block of the call, if there is one; or use freegrad_fx.compile(model, rules), which supports both."
        )


def require_result(y: Any, site: str) -> None:
    """Raise `TypeError` unless the operation at a site returned a tensor.

    Args:
        y: What the operation returned.
        site: The name of the site.
    """
    if has_torch_function((y,)):
        handle_torch_function(require_result, (y,), y, site)
    elif not isinstance(y, Tensor):
        raise TypeError(
            f"the operation at site {site!r} returned {type(y).__name__}, but a rule needs one tensor. If an entry of "
            f"the table selects the module there by its class, give the class None, or give the rule to a module "
            f"inside of it or around it that returns a tensor."
        )


def require_frozen(parameter: Tensor, name: str) -> None:
    """Raise `RuntimeError` if a parameter requires a gradient that was frozen when the plan was made.

    Args:
        parameter: The parameter.
        name: Its dotted name.
    """
    if has_torch_function_unary(parameter):
        handle_torch_function(require_frozen, (parameter,), parameter, name)
    elif parameter.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"the parameter {name!r} was frozen (requires_grad=False) when the model was transformed, and is "
            f"trainable now: its rule would not act. Transform the original model again with the parameter unfrozen; "
            f"the result shares its tensors."
        )


def write_count(x: Tensor) -> int:
    """The number of writes into a tensor before the call of a site; -1 if no rule acts, or if it is not known.

    Args:
        x: The detached input of the site.
    """
    if has_torch_function_unary(x):
        count: int = handle_torch_function(write_count, (x,), x)
        return count
    acts = explicit_rules_act() and torch.is_grad_enabled()
    known = isinstance(x, Tensor) and not is_compiling() and not x.is_inference()
    return version(x) if acts and known else -1


def require_unwritten(x: Tensor, before: int, site: str) -> None:
    """Raise `PlanError` if the call of a class that the table selects has written into its input.

    The rule would then give the result its gradient, and autograd would not see the write.

    Args:
        x: The detached input of the site.
        before: Its `write_count` before the call.
        site: The name of the site.
    """
    if has_torch_function_unary(x):
        handle_torch_function(require_unwritten, (x,), x, before, site)
    elif before >= 0 and version(x) != before:
        raise PlanError(
            f"the call at site {site!r} writes into its input tensor, whose gradient would be lost: the table selects "
            f"the call by its class, and the rule is for the result. Select the ops inside of the class instead. If "
            f"the result is that tensor, as in a layer with inplace=True, set the attribute inplace = True on the "
            f"module: then the rule is for the write."
        )


def warn_if_native(x: Tensor, sites: str) -> None:
    """Warn if a model whose forward is replaced runs in a `native` block, whose gradients then are no baseline.

    Args:
        x: The input of the first site whose forward is replaced.
        sites: The sites whose forward is replaced, as text.
    """
    if has_torch_function_unary(x):
        handle_torch_function(warn_if_native, (x,), x, sites)
    elif not explicit_rules_act() and torch.is_grad_enabled():
        _warn_of_baseline(sites)


# Dynamo calls it while it traces, and leaves it out of the graph
@takes_for_constant
def _warn_of_baseline(sites: str) -> None:
    warnings.warn(
        f"native() switches off the rules, but the forward stays replaced at {sites}, with its own derivative, which "
        f"is 0 for a step. For the gradients of the original model, call the original model: it shares its parameters "
        f"with the transformed one.",
        FreegradWarning,
        stacklevel=3,
    )
