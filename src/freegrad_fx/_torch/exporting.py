"""`torch.export`, which is imported when it is needed, because it imports sympy."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from .releases import lookup, uses_private_names
from .replacing import replaced

if TYPE_CHECKING:
    from torch.export import ExportedProgram

__all__ = [
    "alias",
    "alias_operation",
    "assert_metadata",
    "asserted_metadata",
    "constants_lifted_by",
    "dynamic_where_possible",
    "export",
    "fake_tensor",
    "guard_names",
    "guards_written_by",
    "is_conversion",
    "is_fake",
    "is_symbolic",
    "metadata_assertion",
    "missing_attributes_read_by",
    "moved_to",
    "quiet",
    "traced_in_full",
]

_EXPORT = "capture by torch.export"


def export(root: Any, args: Any, kwargs: Any, dynamic_shapes: Any) -> ExportedProgram:
    """`torch.export.export` without Dynamo.

    The forward gets the modules themselves. For a model with a module under several names, PyTorch would give it an
    object for each name, so that `children()` lists one module several times, and `is` and dicts take it for several.
    """
    import torch.export

    tracer = lookup("torch.fx.experimental.proxy_tensor._ModuleStackTracer", _EXPORT)
    with replaced(tracer, "__init__", _with_the_modules_themselves):
        return torch.export.export(root, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)


def _with_the_modules_themselves(init: Callable[..., None]) -> Callable[..., None]:
    def start(tracer: Any, *args: Any, **kwargs: Any) -> None:
        init(tracer, *args, **kwargs)
        tracer.enable_attr_proxy = False

    return start


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what export prints and logs in this thread, such as whole graphs, unless logs of PyTorch were requested."""
    if "TORCH_LOGS" in os.environ:
        yield
        return
    mine = threading.get_ident()
    trace = lookup("torch.export._trace", _EXPORT)
    vars(trace).setdefault("print", print)
    handlers = {
        handler
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and name.partition(".")[0] == "torch"
        for handler in logger.handlers
    }

    def drop(_: logging.LogRecord) -> bool:
        return threading.get_ident() != mine

    for handler in handlers:
        handler.addFilter(drop)
    try:
        with replaced(trace, "print", lambda _: lambda *args, **kwargs: None):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(drop)


def dynamic_where_possible() -> Any:
    """The size of a dimension that is dynamic where the model allows it."""
    from torch.export import Dim

    return Dim.AUTO


def constants_lifted_by(
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> AbstractContextManager[None]:
    """Replace the pass of export that makes unregistered tensors constants.

    Args:
        make: Returns the replacement, given the pass. Both take the graph module as the first argument.
    """
    module = lookup("torch._export.passes.lift_constants_pass", _EXPORT)
    return replaced(module, "lift_constants_pass", make)


def guards_written_by(
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> AbstractContextManager[None]:
    """Replace the function with which export generates the code of guards.

    Args:
        make: Returns the replacement, given the function. Both take the guards, as Python expressions, and the paths of
            the inputs that occur in them.
    """
    module = lookup("torch.export._unlift", _EXPORT)
    return replaced(module, "_convert_guards_code_to_fn", make)


def guard_names() -> dict[str, Any]:
    """The names that the expressions of guards refer to."""
    names = lookup(
        "torch.fx.experimental.symbolic_shapes.SYMPY_INTERP", "checking an exported model's inputs"
    )
    return dict(names)


def is_fake(value: Any) -> bool:
    """Whether a value is a fake tensor, with which export runs a model."""
    return isinstance(value, fake_tensor())


def is_symbolic(value: Any) -> bool:
    """Whether a value is a fake tensor, its functional wrapper, or a symbolic number of an export."""
    functional = lookup("torch._subclasses.functional_tensor.FunctionalTensor", _EXPORT)
    return is_fake(value) or isinstance(
        value, (functional, torch.SymInt, torch.SymFloat, torch.SymBool)
    )


def fake_tensor() -> Any:
    """The class of the tensors with which export calls a forward."""
    return lookup("torch._subclasses.fake_tensor.FakeTensor", _EXPORT)


def metadata_assertion() -> Any:
    """The operation with which export asserts the dtype, device and layout of a tensor."""
    return torch.ops.aten._assert_tensor_metadata.default


def assert_metadata(tensor: Any, **expected: Any) -> None:
    """Record an assertion of the dtype or device of a tensor while a model is exported."""
    metadata_assertion()(tensor, **expected)


def asserted_metadata(node: Any) -> tuple[Any, dict[str, Any]]:
    """The tensor in an assertion of `metadata_assertion`, and what is asserted of it."""
    names = [argument.name for argument in metadata_assertion()._schema.arguments]
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return given.pop(names[0]), {name: v for name, v in given.items() if v is not None}


def alias_operation() -> Any:
    """The operation that returns another tensor with the same memory."""
    return torch.ops.aten.alias.default


def alias(tensor: Any) -> Any:
    """Another tensor with the same memory."""
    return alias_operation()(tensor)


def is_conversion(node: Any) -> bool:
    """Whether a node converts a tensor to a dtype or a device, or returns it as it is."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet in (torch.ops.aten.to, torch.ops.aten.type_as)


def moved_to(tensor: Any, device: torch.device) -> Any:
    """`tensor.to(device)`, recorded without the dtype of the tensor."""
    return torch.ops.aten.to.dtype_layout(tensor, device=device)


def missing_attributes_read_by(
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> AbstractContextManager[None]:
    """Replace `nn.Module.__getattr__` while a model is exported.

    Args:
        make: Returns the replacement, given the method. Both take a module and the name of an attribute that is not in
            the module's ``__dict__``: a parameter, buffer or submodule, or one that does not exist.
    """
    # The tracer of export replaces the method too, and calls what it stored when it was imported
    module = lookup("torch.fx._symbolic_trace", _EXPORT)
    return replaced(module, "_orig_module_getattr", make)


@uses_private_names("compiling an exported model")
def traced_in_full(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make Dynamo trace into a function that it would skip."""
    import torch._dynamo

    traced: Callable[..., Any] = torch._dynamo.dont_skip_tracing(function)
    return traced
