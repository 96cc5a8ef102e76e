"""The `torch.autograd.Function` that applies a rule: what it saves, and how it computes the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch.dispatch import runs_alone
from .._torch.dynamo import is_compiling
from .._torch.functions import direct_apply
from .._torch.tensors import version
from ..core.contract import BITS, LOSS_SCALE, OF_MASK
from ..core.copies import changed_since_copied
from ..core.packing import pack, unpack
from ..core.rule import Rule
from ..core.unscaled import follows_scale
from ..errors import RuleError
from .kernels import run_compiled
from .observing import Observer

__all__ = [
    "OVERWRITTEN",
    "Call",
    "Composable",
    "apply_function",
    "blame_parameters",
    "blame_shapes",
    "checked",
    "coalesced",
    "explain",
    "explained",
    "follows_another",
    "gradient",
    "parameter_versions",
    "refuse_writes",
    "rule_behind",
    "rule_of",
    "save_inputs",
    "tell",
    "versions",
]


OVERWRITTEN = "overwritten"
"""The `save` option of a graph whose operation writes its output into ``x``."""


class Call(NamedTuple):
    """A rule at a site, with its parameters and options, and who observes the gradient that it gives."""

    rule: Rule
    site: str
    parameters: dict[str, Any]
    save: str
    compile: bool
    observers: tuple[Observer, ...] = ()


class _Decoupled(torch.autograd.Function):
    """Forward: `y`. Backward: the gradient of `x` is computed by a rule."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, call: Call, read: Tensor | None = None) -> Tensor:
        # autograd would reject in-place operations on the result if it were `y` itself or a tracked view of `y`
        output = y.detach()
        save_inputs(ctx, x if read is None else read, output, call)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        found = gradient(ctx, grad) if ctx.needs_input_grad[1] else None
        if ctx.call.observers and found is not None:
            tell(ctx.call, found)
        return grad, found, None, None  # autograd ignores the last None if `read` was not given


apply_function = direct_apply(_Decoupled)
"""`_Decoupled.apply`, for use where no `torch.func` transform is active; see `node.apply`."""


class Composable(torch.autograd.Function):
    """`_Decoupled` for `torch.func` transforms. It is several times slower, and saves ``x`` instead of a mask."""

    generate_vmap_rule = True

    # If no argument requires a gradient, Dynamo recognises a forward without `ctx` by its number of arguments, so the
    # number has to be fixed
    @staticmethod
    def forward(
        y: Tensor,
        x: Tensor,
        read: Tensor | None,
        rule: Rule,
        site: str,
        save: str,
        names: tuple[str, ...],
        values: tuple[Any, ...],
    ) -> Tensor:
        """Return the values of `y`."""
        return y.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the tensors that the rule reads."""
        _, x, read, rule, site, save, names, values = inputs
        parameters = dict(zip(names, values, strict=True))
        save = "x" if save in OF_MASK else save
        save_inputs(
            ctx, x if read is None else read, output, Call(rule, site, parameters, save, False)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of `y` and `x`, and None for the other arguments."""
        (grad,) = grads
        unlearned = (None,) * len(ctx.needs_input_grad[2:])
        return grad, gradient(ctx, grad) if ctx.needs_input_grad[1] else None, *unlearned


def save_inputs(ctx: Any, x: Tensor, output: Tensor, call: Call) -> None:
    """Save what the backward of a rule reads.

    Args:
        ctx: The context of the Function.
        x: The input of the operation.
        output: Its output, as the Function returns it.
        call: The rule at its site.
    """
    rule, parameters, how = call.rule, call.parameters, call.save
    tensors = [n for n, v in parameters.items() if isinstance(v, Tensor)] if parameters else None
    ctx.call, ctx.like = call, (x.shape, x.dtype)
    inputs = rule.declaration.inputs
    saved: tuple[Tensor, ...] = ()
    if inputs:
        if how == "y":
            x = output
        elif how in OF_MASK and "x" in inputs:
            x = _mask(x, call)
            if how == BITS:
                x, ctx.order = pack(x, rule.declaration.bits_of(parameters))
        # The output is saved as `y`: a double backward then differentiates the rule, not the operation
        saved = (x,) if inputs == _X else tuple(x if name == "x" else output for name in inputs)
    if tensors:
        ctx.versions = parameter_versions(call, tensors)
        if LOSS_SCALE in parameters:  # it is read in the backward, and can change until then
            tensors.remove(LOSS_SCALE)
            ctx.versions.pop(LOSS_SCALE, None)
        ctx.tensors = tensors
        saved = (*saved, *map(parameters.__getitem__, tensors))
    if saved:
        ctx.save_for_backward(*saved)


_X = ("x",)


def parameter_versions(call: Call, names: list[str]) -> dict[str, int]:
    """The versions of the parameters that are tensors; empty while code is compiled.

    Raises:
        RuleError: The model was copied, and a tensor of the original, which its caller has changed since, or the scale
            of a GradScaler, is no longer the model's.
    """
    if is_compiling():
        return {}
    versions = {}
    for name in names:
        value = call.parameters[name]
        if name == LOSS_SCALE and not follows_scale(value):
            raise RuleError(
                f"rule {call.rule.name!r} at site {call.site!r} has a copy of the scale of its GradScaler, because the "
                f"model was copied or loaded, and the copy does not change with the scaler. Transform the original "
                f"model again: transform(model, unscaled(rules, scaler))."
            )
        if changed_since_copied(value):
            raise RuleError(
                f"the tensor that was given as {name!r} of rule {call.rule.name!r} at site {call.site!r} has changed "
                f"since this model was copied. The copy has a tensor of its own, which has not changed. Set it with "
                f"model.set_rule_parameter({call.site!r}, {name}=...) on the copy, or transform again."
            )
        versions[name] = 0 if value.is_inference() else version(value)
    return versions


def _mask(x: Tensor, call: Call) -> Tensor:
    """The mask of ``x`` that a rule reads. Raises `RuleError` if the rule has no valid mask."""
    declaration, where = call.rule.declaration, f"rule {call.rule.name!r} at site {call.site!r}"
    if declaration.mask is None:
        raise RuleError(
            f"{where} reads x in other ways than through a mask, so there is no mask to save. Leave out save='mask'. "
            f"If the rule has been registered again since, transform the original model again."
        )
    counts = not (declaration.own or is_compiling() or x.is_inference())
    before = version(x) if counts else 0
    mask: Any = declaration.mask_of(x, call.parameters)
    if counts and version(x) != before:
        raise RuleError(
            f"{where} has a mask function that changes x in place. Make it a pure function."
        )
    dtype = torch.bool if declaration.mask_bits == 1 else torch.uint8
    if not isinstance(mask, Tensor) or mask.dtype != dtype or mask.shape != x.shape:
        got = type(mask).__name__
        if isinstance(mask, Tensor):
            got = f"a tensor of {mask.dtype} and shape {tuple(mask.shape)}"
        raise RuleError(
            f"{where} has a mask function that returns {got}; it has to return a tensor of {dtype} of the shape of x, "
            f"{tuple(x.shape)}."
        )
    return mask


def _formula(ctx: Any) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], dict[str, Any]]:
    """The formula of a backward, the saved tensors that it reads, and its parameters."""
    rule, _, parameters, save, *_ = ctx.call
    try:
        inputs: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        blame_parameters(ctx.call, getattr(ctx, "versions", {}), error)
        raise
    declaration = rule.declaration
    count = len(declaration.inputs)
    if len(inputs) > count:
        values = dict(zip(ctx.tensors, inputs[count:], strict=True))
        parameters, inputs = {**parameters, **values}, inputs[:count]
    if save not in OF_MASK:
        return declaration.function, inputs, parameters
    if save == BITS and inputs:
        mask, *others = inputs  # it precedes `y`
        bits = declaration.bits_of(parameters)
        inputs = (unpack(mask, ctx.like[0], ctx.order, bits), *others)
    return declaration.gate, inputs, parameters


def blame_parameters(call: Call, versions: dict[str, int], error: RuntimeError) -> None:
    """Raise `RuleError` if a parameter of the rule has been written into since the forward."""
    for name, before in versions.items():
        if version(call.parameters[name]) != before:
            raise RuleError(
                f"the tensor {name!r} of rule {call.rule.name!r} at site {call.site!r} was changed in place between "
                f"the forward and the backward. Change it after the backward and before the next forward."
            ) from error


def gradient(ctx: Any, grad: Tensor) -> Tensor:
    """Compute the gradient of `x`."""
    call: Call = ctx.call
    result: Any
    function, inputs, parameters = _formula(ctx)
    # The compiler detects in-place writes itself, and does not support sparse gradients
    if is_compiling():
        inputs = tuple(_after(tensor, grad) for tensor in inputs)
        if torch.compiler.is_dynamo_compiling():  # Dynamo traces the formula itself
            return checked(function(grad, *inputs, **parameters), grad, ctx.like, call)
        try:
            result = function(grad, *inputs, **parameters)
        except Exception as error:
            explain(error, call)
            raise
        return checked(result, grad, ctx.like, call)
    if grad.layout is not torch.strided:
        grad = coalesced(grad, call)
    declaration = call.rule.declaration
    before = 0 if declaration.own else versions(grad, inputs)
    result = NotImplemented
    if call.compile:
        if runs_alone(grad):
            result = run_compiled(call.rule, call.site, function, grad, *inputs, **parameters)
    elif (
        declaration.fast is not None
        and call.save not in OF_MASK
        and parameters is call.parameters  # no tensors among them
        and runs_alone(grad)
    ):
        result = declaration.fast(grad, *inputs, **parameters)
    if result is NotImplemented:
        try:
            result = function(grad, *inputs, **parameters)
        except RuntimeError as error:
            blame_shapes(call, grad, error)
            raise
    if not declaration.own and before != versions(grad, inputs):
        refuse_writes(call)
    return checked(result, grad, ctx.like, call)


def follows_another(x: Tensor, site: str) -> bool:
    """Whether a tensor is what another rule of the composition at a site returned."""
    node: Any = x.grad_fn
    call = getattr(node, "call", None) or getattr(node, "layout", None)
    return getattr(call, "site", None) == site


def tell(call: Call, gradient: Tensor) -> None:
    """Show the gradient that a rule gives to those who observe it."""
    for observer in call.observers:
        observer(call.site, gradient.detach())


def blame_shapes(call: Call, grad: Tensor, error: RuntimeError) -> None:
    """Raise `RuleError` for an error in a formula if the shape of a parameter can be its cause."""
    # What ran out of memory is caught by its class, to try again with a smaller batch
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return
    if blamed := _shaped(call):
        raise RuleError(
            f"rule {call.rule.name!r} at site {call.site!r} failed for a gradient of shape {tuple(grad.shape)}: "
            f"{error}. {blamed}"
        ) from error


def refuse_writes(call: Call) -> None:
    """Raise `RuleError` for a formula that has changed its arguments."""
    raise RuleError(
        f"rule {call.rule.name!r} at site {call.site!r} changes its arguments in place, but other gradients are "
        f"computed from them. Make it a pure function, for example with grad * 2 instead of grad.mul_(2)."
    )


_EXPLANATION = "_freegrad_fx_explanation"


def explain(error: Exception, call: Call) -> None:
    """Let the text of an error name the formula that a compiler failed to trace. Compilers need its class."""
    reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0]
    text = (
        f"rule {call.rule.name!r} at site {call.site!r} failed while its backward was compiled "
        f"({reason}). A compiled formula cannot use the values of tensors, as `if`, float(), .item() and .numpy() do. "
        f"Write it with operations on tensors, such as torch.where; or run the model without torch.compile: "
        f"transform() and use() run the formula in eager mode."
    )
    setattr(error, _EXPLANATION, text)
    error.args = (text,)


def explained(error: BaseException | None) -> str:
    """What an error, or its cause, says about a formula that a compiler failed to trace; ``""`` for other errors."""
    while error is not None:
        if text := getattr(error, _EXPLANATION, ""):
            return str(text)
        error = error.__cause__
    return ""


def rule_of(node: Any) -> tuple[Rule, str] | None:
    """The rule that a node of an autograd graph applies to one operand, and its site; None for other nodes."""
    call = getattr(node, "call", None)
    return (call.rule, call.site) if isinstance(call, Call) else None


def rule_behind(node: Any) -> tuple[Rule, str, Callable[[Tensor], Tensor]] | None:
    """The rule that a node of an autograd graph applies, its site, and the rule as a function of only the gradient.

    None for other nodes, and if the input of the site does not require a gradient.
    """
    call = getattr(node, "call", None)
    if not isinstance(call, Call) or not node.needs_input_grad[1]:
        return None
    function, inputs, parameters = _formula(node)
    saved = [tensor.detach() for tensor in inputs]
    parameters = {n: v.detach() if isinstance(v, Tensor) else v for n, v in parameters.items()}
    return call.rule, call.site, lambda grad: function(grad, *saved, **parameters)


def _shaped(call: Call) -> str:
    """The parameters of a rule that are tensors with dimensions, as a sentence for errors; ``""`` if there are none."""
    shapes = [
        f"{name!r}, a tensor of shape {tuple(value.shape)}"
        for name, value in call.parameters.items()
        if isinstance(value, Tensor) and value.dim()
    ]
    return f"Its parameter has to fit the gradient: {', '.join(shapes)}." if shapes else ""


def _after(tensor: Tensor, grad: Tensor) -> Tensor:
    """Return a saved tensor with an artificial dependence on the gradient; a boolean mask is returned unchanged.

    The compiler then computes masks in the backward. Otherwise it computes them in the forward and saves them as
    booleans. Inductor's CPU code writes booleans one at a time, which takes ten times as long as everything else.
    """
    if (
        grad.device.type != "cpu"
        or tensor.shape != grad.shape
        or not tensor.dtype.is_floating_point
    ):
        return tensor
    return torch.where(grad == grad, tensor, tensor)


def versions(grad: Tensor, inputs: tuple[Tensor, ...]) -> int:
    """The sum of the version counters of the tensors."""
    count = 0 if grad.is_inference() else version(grad)
    for tensor in inputs:
        count += 0 if tensor.is_inference() else version(tensor)
    return count


def coalesced(grad: Tensor, call: Call) -> Tensor:
    """Coalesce a sparse gradient. Raises `RuleError` if the rule does not support sparse gradients."""
    if not call.rule.sparse or grad.layout != torch.sparse_coo:
        raise RuleError(
            f"rule {call.rule.name!r} does not support the gradient at site {call.site!r}, which has the layout "
            f"{grad.layout}. Make it dense, for example with nn.Embedding(..., sparse=False); or register the rule "
            f"with sparse=True if it is elementwise and maps zero to zero."
        )
    return grad.coalesce()


def checked(
    result: Any, grad: Tensor, like: tuple[torch.Size, torch.dtype], call: Call, name: str = "x"
) -> Tensor:
    """Return a rule's result in the dtype of a value. Raises `RuleError` if it is not a valid gradient for the value.

    Args:
        result: The result.
        grad: The gradient that the rule got.
        like: The shape and the dtype of the value.
        call: The rule and its site.
        name: The name of the value.
    """
    shape, dtype = like
    if type(result) is Tensor and result.dtype is dtype and result.shape == shape:
        return result
    rule, site = call.rule, call.site
    value = "an input" if name == "x" else repr(name)
    where = f" at site {site!r}" if site else ""
    if not isinstance(result, Tensor):
        raise RuleError(
            f"rule {rule.name!r}{where} returned {type(result).__name__}, not a tensor. "
            f"A rule has to return the gradient for {name}; for a zero gradient, torch.zeros_like(grad)."
        )
    if result.shape != shape:
        remedy = _shaped(call)
        if name == "x" and grad.shape == result.shape:
            remedy = (
                "The operation changes the shape, which the rule does not support: give it None, or a rule registered "
                "with keeps_shape=False. To give the rule to the parameters of a module, use on(parameter=...)."
            )
        raise RuleError(
            f"rule {rule.name!r}{where} returned a gradient of shape {tuple(result.shape)} "
            f"for {value} of shape {tuple(shape)}; grad has shape {tuple(grad.shape)}. {remedy}".rstrip()
        )
    if result.dtype == dtype:
        return result
    # Under autocast the dtypes of input and output can differ, and the rule can compute in either
    computed = torch.promote_types(grad.dtype, dtype)
    for (
        given
    ) in call.parameters.values():  # a gradient of one number takes the dtype of such a parameter
        if isinstance(given, Tensor) and given.is_floating_point():
            computed = torch.promote_types(computed, given.dtype)
    if result.dtype not in (grad.dtype, torch.promote_types(grad.dtype, dtype), computed):
        raise RuleError(
            f"rule {rule.name!r}{where} returned a gradient of dtype {result.dtype} for {value} of dtype "
            f"{dtype}; grad has dtype {grad.dtype}. Keep the dtype: result.to(grad.dtype)."
        )
    found: Tensor = result.real if result.is_complex() and not dtype.is_complex else result
    return found.to(dtype)
