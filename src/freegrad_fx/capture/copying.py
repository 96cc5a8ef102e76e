"""The copy of a model that is captured: its modules are new, its tensors are shared with the model."""

from __future__ import annotations

import copy
import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .._torch.modules import (
    BUFFERS,
    CHILDREN,
    COMPILED_CALL,
    PARAMETERS,
    buffers_of,
    is_compiled_wrapper,
    parameters_of,
)
from ..errors import CaptureError
from ..graph.state import ATTRIBUTES_OF_EVERY_MODULE, collect_tensors, is_python_state
from .rule_parameters import GENERATOR

__all__ = ["check_model", "structural_copy"]


def check_model(model: Any) -> None:
    """Check that a model can be captured at all.

    Raises:
        TypeError: `model` is not an `nn.Module`, is already compiled, or is a TorchScript module.
        CaptureError: A parameter or buffer is not initialised, or the model wraps another one to run it in parallel
            or to average its parameters.
    """
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"transform() takes a model, an instance of nn.Module, got {what}")
    if is_compiled_wrapper(model):
        raise TypeError(
            "the model is already compiled, and rules cannot be added to compiled code. Transform first, then compile: "
            "torch.compile(freegrad_fx.transform(compiled._orig_mod, rules)); or do both with "
            "freegrad_fx.compile(compiled._orig_mod, rules), which accepts any program."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "the model is a TorchScript module, whose code cannot be traced. Transform the original nn.Module."
        )
    if (wrapper := _wraps_its_module(model)) is not None:
        raise CaptureError(
            f"the model is a {wrapper}, which calls its module in another way than a graph does. Transform the module, "
            f"then wrap the result: {wrapper}(freegrad_fx.transform(model.module, rules)); explain() takes "
            f"model.module too."
        )
    if not any(map(is_lazy, _tensors_of(model))):
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise CaptureError(
                f"{name!r} is not initialised yet (a lazy module). Run the model once on an example input, "
                f"then transform it."
            )


def _tensors_of(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of all modules of a model. Their names take most of the time of `named_parameters`."""
    return [
        tensor
        for module in model.modules()
        for tensor in (*parameters_of(module).values(), *buffers_of(module).values())
        if tensor is not None
    ]


def _wraps_its_module(model: nn.Module) -> str | None:
    """The name of a class of PyTorch that only wraps another module, if a model is an instance of one."""
    known = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "AveragedModel")
    for kind in type(model).__mro__:
        if kind.__name__ in known and kind.__module__.partition(".")[0] == "torch":
            return kind.__name__
    return None


def structural_copy(model: nn.Module) -> nn.Module:
    """Copy the modules, hooks and attributes of a model, and share every tensor.

    Raises:
        CaptureError: An attribute cannot be copied.
    """
    shared: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            shared[id(module)] = module
        for name, value in module.__dict__.items():
            if name.startswith(GENERATOR):
                shared[id(value)] = value  # the caller seeds it
            elif name in _TENSORS:
                shared.update((id(t), t) for t in value.values() if isinstance(t, Tensor))
            elif type(value) in _ATOMS or (name in ATTRIBUTES_OF_EVERY_MODULE and not value):
                continue  # nearly all attributes
            elif name != CHILDREN and not (type(value) is tuple and is_python_state(value)):
                collect_tensors(value, shared, set())
    try:
        return _sharing(model, _copied(model, dict(shared)))
    except CaptureError:
        raise
    except Exception as error:
        # Objects that cannot be copied (locks, open files, generators) are shared with the model
        for module in model.modules():
            for value in module.__dict__.values():
                try:
                    copy.deepcopy(value, dict(shared)) if not isinstance(value, dict) else None
                except Exception:
                    shared[id(value)] = value
        try:
            return _sharing(model, _copied(model, dict(shared)))
        except CaptureError:
            raise
        except Exception:
            raise CaptureError(
                f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}. transform() copies the "
                f"modules and shares the tensors. Make sure that copy.deepcopy(model) works."
            ) from error


def _copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """`copy.deepcopy` of a module, several times faster if the class does not customise copying."""
    if id(module) in memo:
        found: nn.Module = memo[id(module)]
        return found
    kind: Any = type(module)
    if not _copies_plainly(kind) or "__deepcopy__" in module.__dict__:
        return copy.deepcopy(module, memo)
    new: nn.Module = object.__new__(type(module))
    memo[id(module)] = new
    state = new.__dict__
    for name, value in module.__dict__.items():
        if name == CHILDREN:
            parts = {n: m if m is None else _copied(m, memo) for n, m in value.items()}
            state[name] = type(value)(parts)
        elif type(value) in _ATOMS or (type(value) is tuple and is_python_state(value)):
            state[name] = value
        elif name in ATTRIBUTES_OF_EVERY_MODULE and not value:
            # Nearly always an empty table of hooks. The handles of other tables may refer to it
            state[name] = memo[id(value)] = type(value)()
        elif name in _TENSORS:
            state[name] = type(value)(value)
        elif name != COMPILED_CALL:
            state[name] = copy.deepcopy(value, memo)
    return new


_TENSORS = (PARAMETERS, BUFFERS)


_ATOMS = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})


@functools.lru_cache(maxsize=4096)
def _copies_plainly(kind: type[Any]) -> bool:
    """Whether a class does not customise how its instances are copied."""
    if kind.__module__.startswith("torch.nn.modules.") and not issubclass(kind, nn.RNNBase):
        return True  # what these customise is for pickles of old releases
    return not hasattr(kind, "__deepcopy__") and all(
        getattr(kind, name, None) is getattr(nn.Module, name, None)
        for name in ("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
    )


def _sharing(model: nn.Module, copied: nn.Module) -> nn.Module:
    """Return the copy of a model.

    Raises:
        CaptureError: The copy does not share a tensor with the model, so training it would not train the model.
    """
    both = _tensors_of(model), _tensors_of(copied)
    if len(both[0]) == len(both[1]) and all(map(operator.is_, *both)):
        return copied
    pairs = zip(
        (*model.named_parameters(), *model.named_buffers()),
        (*copied.parameters(), *copied.buffers()),
        strict=True,
    )
    if own := [name for (name, tensor), other in pairs if tensor is not other]:
        raise CaptureError(
            f"the copy of {type(model).__name__} does not share {own[0]!r} with the model, because a __deepcopy__ "
            f"method copies it. Let the method use the memo that it receives."
        )
    return copied
