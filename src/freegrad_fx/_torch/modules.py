"""The contents of an `nn.Module`, its hooks, and its call."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import CodeType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from . import tree
from .dynamo import is_compiling
from .releases import lookup, private
from .replacing import replaced

__all__ = [
    "BUFFERS",
    "CHILDREN",
    "COMPILED_CALL",
    "FRESH_BASES",
    "HOOKS_OF_ALL",
    "PARAMETERS",
    "HoldsForRules",
    "after_hooks",
    "after_pre_hooks",
    "around_swapped_parameters",
    "backward_hook",
    "buffers_of",
    "call_code",
    "children_of",
    "compiled_model",
    "derived",
    "has_backward_hooks",
    "has_forward_hooks",
    "has_global_forward_hooks",
    "has_global_hooks",
    "has_hooks",
    "has_hooks_between",
    "has_hooks_on_errors",
    "hooks_of",
    "is_compiled_wrapper",
    "is_replica",
    "make_replica",
    "parameters_of",
    "parameters_of_rules",
    "remove_state_dict_hooks",
    "run_hooks_on_errors",
    "uncompiled_call",
    "watch_backward",
    "with_parameters",
]

PARAMETERS, BUFFERS, CHILDREN = "_parameters", "_buffers", "_modules"
"""The attributes of every module for its own parameters, buffers and submodules."""

COMPILED_CALL = "_compiled_call_impl"
"""The attribute in which `nn.Module.compile` stores the compiled call."""

FRESH_BASES: tuple[type[nn.Module], ...] = tuple(
    private(f"torch.nn.modules.{name}", "telling which memory a module returns")
    for name in (
        "conv._ConvNd",
        "batchnorm._NormBase",
        "pooling._MaxPoolNd",
        "pooling._AvgPoolNd",
        "pooling._LPPoolNd",
    )
)
"""The base classes of modules of torch.nn that return new memory."""

_any_global_hook = private(
    "torch.nn.modules.module._has_any_global_hook", "telling which hooks run"
)
_WHICH_RUN = "running the hooks of a module around its rule"
_pre_hooks_of_all = private("torch.nn.modules.module._global_forward_pre_hooks", _WHICH_RUN)
_hooks_of_all = private("torch.nn.modules.module._global_forward_hooks", _WHICH_RUN)
_with_keywords = private("torch.nn.modules.module._global_forward_hooks_with_kwargs", _WHICH_RUN)
_on_errors = private("torch.nn.modules.module._global_forward_hooks_always_called", _WHICH_RUN)
_backward_pre_hooks_of_all = private(
    "torch.nn.modules.module._global_backward_pre_hooks", _WHICH_RUN
)
_backward_hooks_of_all = private("torch.nn.modules.module._global_backward_hooks", _WHICH_RUN)
_BackwardHook = private("torch.utils.hooks.BackwardHook", _WHICH_RUN)
_LegacyHook = private("torch.nn.modules.module._WrappedHook", _WHICH_RUN)

HOOKS_OF_ALL: tuple[Mapping[int, Any], ...] = (
    _pre_hooks_of_all,
    _hooks_of_all,
    _backward_pre_hooks_of_all,
    _backward_hooks_of_all,
)
"""The tables of the hooks for all modules."""

_reparametrize = private(
    "torch.nn.utils.stateless._reparametrize_module", "calling a module with other parameters"
)


def derived(module: nn.Module | None, name: str) -> bool:
    """Whether an attribute of a module is PyTorch's own list of its parameters, which each call brings up to date."""
    return isinstance(module, nn.RNNBase) and name in ("_flat_weights", "_flat_weight_refs")


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of a module, without those of submodules. The dict is the module's own, not a copy."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module, without those of submodules. The dict is the module's own, not a copy."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The direct submodules of a module. The dict is the module's own, not a copy."""
    return module._modules


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks, which can write into its tensors and replace them."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has backward hooks."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks."""
    return has_forward_hooks(module) or has_backward_hooks(module)


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The tables of the hooks of a module. They are the module's own, not copies."""
    return (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )


def remove_state_dict_hooks(module: nn.Module, functions: Collection[Any]) -> None:
    """Remove hooks that run after a state_dict is made or loaded, by their functions."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_post_hooks):
        for number in [number for number, hook in hooks.items() if hook in functions]:
            del hooks[number]


def has_hooks_between(left: Iterable[nn.Module], entered: Iterable[nn.Module]) -> bool:
    """Whether hooks run between two operations.

    Args:
        left: The modules whose calls end there.
        entered: The modules whose calls begin there.
    """
    return any(has_backward_hooks(m) or bool(m._forward_hooks) for m in left) or any(
        has_backward_hooks(m) or bool(m._forward_pre_hooks) for m in entered
    )


def has_global_hooks() -> bool:
    """Whether there are hooks for all modules."""
    return bool(_any_global_hook())


def has_global_forward_hooks() -> bool:
    """Whether there are forward hooks or forward pre-hooks for all modules."""
    return bool(len(_hooks_of_all) or len(_pre_hooks_of_all))


def after_pre_hooks(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Run the forward pre-hooks that a call of a module runs, and return the arguments that its forward gets.

    Raises:
        RuntimeError: A hook with keywords returns neither None nor a pair.
    """
    for number, hook in (*_pre_hooks_of_all.items(), *module._forward_pre_hooks.items()):
        if number in module._forward_pre_hooks_with_kwargs:
            both: Any = hook(module, args, kwargs)
            if both is None:
                continue
            if not (isinstance(both, tuple) and len(both) == 2):
                raise RuntimeError(
                    f"a forward pre-hook of {type(module).__name__} with keywords has to return None or a pair (args, "
                    f"kwargs); it returned {both!r}"
                )
            args, kwargs = both
        else:
            new: Any = hook(module, args)
            if new is not None:
                args = new if isinstance(new, tuple) else (new,)
    return args, kwargs


def after_hooks(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
) -> Any:
    """Run the forward hooks that a call of a module runs, and return the result of the call."""
    # PyTorch does not compile hooks for errors; one that has run already is not run again
    left = {} if is_compiling() else _hooks_on_errors(module)
    try:
        for number, hook in (*_hooks_of_all.items(), *module._forward_hooks.items()):
            left.pop(number, None)
            with_keywords = number in module._forward_hooks_with_kwargs or number in _with_keywords
            given = (args, kwargs) if with_keywords else (args,)
            changed = hook(module, *given, result)
            if changed is not None:
                result = changed
    except Exception:
        _run_on_error(module, args, kwargs, result, left)
        raise
    return result


def backward_hook(module: nn.Module) -> Any:
    """The object that runs the full backward hooks of one call of a module; None if there are none."""
    if not (
        has_backward_hooks(module) or len(_backward_hooks_of_all) or len(_backward_pre_hooks_of_all)
    ):
        return None
    before: Any = module._get_backward_pre_hooks()  # type: ignore[no-untyped-call]
    after, _ = module._get_backward_hooks()  # type: ignore[no-untyped-call]
    return _BackwardHook(module, after, before) if before or after else None


def watch_backward(module: nn.Module, hook: Any, result: Any) -> Any:
    """Let the backward hooks of a module get the gradients of the result of a call.

    Args:
        module: The module.
        hook: The result of `backward_hook` at the beginning of the call.
        result: The result of the call, after the forward hooks.

    Returns:
        The result.
    """
    if hook is not None:
        if not isinstance(result, Tensor | tuple):
            warnings.warn(
                f"the backward hooks of {type(module).__name__} do not run, because its output is neither a tensor "
                f"nor a tuple of tensors but {type(result).__name__}",
                stacklevel=2,
            )
        result = hook.setup_output_hook(result)
    if has_backward_hooks(module) or len(_backward_hooks_of_all):
        _, legacy = module._get_backward_hooks()  # type: ignore[no-untyped-call]
        tensor = next((v for v in tree.leaves(result) if isinstance(v, Tensor)), None)
        if legacy and tensor is not None and tensor.grad_fn is not None:
            for function in legacy:
                tensor.grad_fn.register_hook(_LegacyHook(function, module))
    return result


def has_hooks_on_errors(module: nn.Module) -> bool:
    """Whether a call of a module that fails runs forward hooks: those with ``always_call=True``."""
    return bool(len(module._forward_hooks_always_called) or len(_on_errors))


def run_hooks_on_errors(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run the forward hooks with ``always_call=True`` of a module whose call has failed."""
    _run_on_error(module, args, kwargs, None, _hooks_on_errors(module))


def _hooks_on_errors(module: nn.Module) -> dict[int, Any]:
    both = (*_hooks_of_all.items(), *module._forward_hooks.items())
    always = (*_on_errors, *module._forward_hooks_always_called)
    return {number: hook for number, hook in both if number in always}


def _run_on_error(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    hooks: Mapping[int, Any],
) -> None:
    for number, hook in hooks.items():
        # PyTorch gives the keywords to the hooks of the module itself only
        given = (args, kwargs) if number in module._forward_hooks_with_kwargs else (args,)
        try:
            changed = hook(module, *given, result)
        except Exception as error:
            warnings.warn(
                f"a forward hook of {type(module).__name__} with always_call=True failed after the forward had "
                f"failed: {error}",
                stacklevel=2,
            )
        else:
            result = result if changed is None else changed


def with_parameters(
    module: nn.Module, parameters: Mapping[str, Tensor]
) -> AbstractContextManager[Any]:
    """Replace parameters of a module while a block runs. Other names of a tied parameter are not replaced."""
    found: AbstractContextManager[Any] = _reparametrize(module, dict(parameters), tie_weights=False)
    return found


@contextmanager
def around_swapped_parameters(
    around: Callable[[nn.Module, Mapping[tuple[int, str], Tensor]], AbstractContextManager[None]],
    call: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any],
) -> Iterator[None]:
    """A context in which `torch.func.functional_call` runs modules in contexts.

    Args:
        around: Makes the context while the tensors are swapped in, also in other threads. Takes the module, and the
            tensors that were the parameters before, by the identity of the module that holds them and the name.
        call: Calls the function behind `functional_call`, with its arguments.
    """

    def swapping(swap: Callable[..., AbstractContextManager[Any]]) -> Callable[..., Any]:
        @contextmanager
        def swapped(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[None]:
            before: dict[tuple[int, str], Tensor] = {
                (id(holder), name): tensor
                for holder in module.modules()
                for name, tensor in parameters_of(holder).items()
                if tensor is not None
            }
            with swap(module, *args, **kwargs), around(module, before):
                yield

        return lambda *args, **kwargs: (swap if is_compiling() else swapped)(*args, **kwargs)

    def calling(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: call(function, args, kwargs)

    stateless = lookup("torch.nn.utils.stateless", _SWAPPING)
    for name in ("_reparametrize_module", "_functional_call"):
        lookup(f"torch.nn.utils.stateless.{name}", _SWAPPING)
    with (
        replaced(stateless, "_reparametrize_module", swapping, asks_for_thread=True),
        replaced(stateless, "_functional_call", calling, asks_for_thread=True),
    ):
        yield


_SWAPPING = "following torch.func.functional_call"


def call_code() -> CodeType:
    """The code object that runs when a module is called."""
    code: CodeType = lookup("torch.nn.Module._call_impl", "following compiled modules").__code__
    return code


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether a module is the result of `torch.compile` for another module."""
    # Without Dynamo there are no compiled modules, and importing it takes seconds
    if "torch._dynamo" not in sys.modules:
        return False
    kind = lookup("torch._dynamo.eval_frame.OptimizedModule", "telling compiled models")
    return isinstance(module, kind)


def compiled_model(wrapper: nn.Module) -> nn.Module | None:
    """The model inside of a result of `torch.compile`; None for other modules."""
    return children_of(wrapper).get("_orig_mod")


def uncompiled_call(module: nn.Module) -> Any:
    """The call of a module, without what `nn.Module.compile` made of it."""
    return module if module._compiled_call_impl is None else module._call_impl


def make_replica(module: nn.Module) -> None:
    """Make a copy of a module a replica, as `nn.DataParallel` does: its parameters are replaced by plain tensors."""
    module.__dict__.update({PARAMETERS: {}, "_is_replica": True})


def is_replica(module: nn.Module) -> bool:
    """Whether a module is a copy that `nn.DataParallel` has made for a device."""
    return bool(module.__dict__.get("_is_replica", False))


class HoldsForRules(nn.Module):
    """A module that holds tensors which are not part of the model: parameters and buffers.

    These buffers are converted in place, as PyTorch does with parameters; it replaces other buffers. One that is a
    number keeps its precision, as numbers in Python do. These parameters are not in the state_dict.

    Attributes:
        _freegrad_fx_buffers: How the names of these buffers begin.
        _freegrad_fx_parameters: The names of these parameters.
    """

    _freegrad_fx_buffers: ClassVar[str]
    _freegrad_fx_parameters: tuple[str, ...] = ()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._freegrad_fx_parameters:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *lists: Any,
    ) -> None:
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *lists)
        own = {prefix + name for name in self._freegrad_fx_parameters}
        missing_keys += [name for name in missing if name not in own]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = buffers_of(self)
        before = {n: b for n, b in before.items() if n.startswith(self._freegrad_fx_buffers)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            converted = buffers_of(self)[name]
            if converted is tensor or tensor is None or converted is None:
                continue
            if not (converted.is_meta or tensor.is_meta or tensor.is_inference()):
                dtype = converted.dtype
                if tensor.is_floating_point() and not tensor.dim():
                    dtype = torch.promote_types(tensor.dtype, dtype)
                # not the converted value: to_empty() returns memory that is not initialised
                tensor.data = tensor.detach().to(converted.device, dtype)
                buffers_of(self)[name] = tensor
        return self


def parameters_of_rules(root: nn.Module) -> set[int]:
    """The ids of the parameters that belong to the rules of a module or of its submodules."""
    return {
        id(module._parameters[name])
        for module in root.modules()
        if isinstance(module, HoldsForRules)
        for name in module._freegrad_fx_parameters
    }
