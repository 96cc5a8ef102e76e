"""Dynamo, AOTAutograd and Inductor. Each is imported when it is needed."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType, FunctionType
from typing import Any, TypeVar

import torch
from torch import fx, nn

from ..errors import TorchVersionError
from .releases import lookup, private, release, unsupported, uses_private_names

__all__ = [
    "add_guard",
    "backend_of",
    "compile_wrapper_of",
    "compiled_function",
    "compiler",
    "gives_up_recompiling",
    "is_compile_error",
    "is_compiling",
    "is_compiling_backward",
    "is_traced_by_dynamo",
    "is_tracing",
    "leave_to_python",
    "looked_into",
    "name_sources",
    "run_in_python",
    "skip",
    "takes_for_constant",
    "traces_code_with",
    "tracing_context",
    "wrap_compiled_function",
]

Called = TypeVar("Called", bound=Callable[..., Any])

_COMPILED = "following what torch.compile compiles"

_frames = private("torch._C._dynamo.eval_frame", _COMPILED)


# --- how Dynamo treats a function ---


def takes_for_constant(function: Called) -> Called:
    """Decorate a function that Dynamo calls while it traces, and whose result becomes a constant.

    `torch.compiler.assume_constant_result` does the same, but imports the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _run_in_python(code: CodeType) -> None:
    """Let Dynamo compile no frame of a code, and no frame that it calls."""
    skip = _frames._FrameAction.SKIP
    _frames.set_code_exec_strategy(code, _frames._FrameExecStrategy(skip, skip))


def run_in_python(code: CodeType) -> None:
    """Let Dynamo compile no frame of a code, and no frame that it calls. Code that Dynamo traces can still call it."""
    with contextlib.suppress(AttributeError, TorchVersionError):
        _run_in_python(code)


def leave_to_python(function: Called) -> Called:
    """Decorate a function that Dynamo must not compile, including every function that it calls.

    `torch.compiler.disable` does the same, but imports the whole compiler. This decorator marks the function and its
    code.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    try:
        _run_in_python(function.__code__)
    except (AttributeError, TorchVersionError) as error:
        text = str(unsupported(_COMPILED, error))

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise TorchVersionError(text)

        return refuse  # type: ignore[return-value]
    return function


@uses_private_names(_COMPILED)
def traces_code_with(name: str) -> bool:
    """Whether Dynamo is tracing a function, or a function called by it, whose globals contain a name."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase

    # Each function that is traced into has a translator, whose `run` is on the stack
    run = InstructionTranslatorBase.run.__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is run and name in frame.f_locals["self"].f_globals:
            return True
        frame = frame.f_back
    return False


@uses_private_names(_COMPILED)
def skip(code: CodeType) -> None:
    """Make Dynamo skip every frame of a code object."""
    from torch._dynamo import eval_frame

    eval_frame.skip_code(code)


@uses_private_names(_COMPILED)
def looked_into(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of a module of PyTorch, so that Dynamo captures it. Return other functions unchanged.

    Dynamo traces into the frames of PyTorch's modules only if they are called from a frame that it captures.
    `torch.compile` adds such a frame around a module; `nn.Module.compile` does not.
    """
    from torch._dynamo import external_utils, trace_rules

    module = getattr(function, "__self__", None)
    if isinstance(module, nn.Module) and trace_rules.check(module.forward):
        wrapped: Callable[..., Any] = external_utils.wrap_inline(function)
        return wrapped
    return function


# --- the compilation that is running ---

_tracing_context = private("torch._guards.TracingContext", "telling whether a compiler traces")
_compile_context = private("torch._guards.CompileContext", "telling whether a compiler traces")


def tracing_context() -> Any:
    """The tracing context of the compiler that traces in this thread; None if no compiler traces."""
    return _tracing_context.try_get()


def is_tracing() -> bool:
    """Whether a compiler traces, and runs code on fake tensors."""
    return tracing_context() is not None


@takes_for_constant
def _is_compiling() -> bool:
    return torch.compiler.is_compiling() or is_tracing()


if release() < (2, 13):
    # If Dynamo compiled it by itself, as it does with functions behind a graph break, it would always return True
    run_in_python(_is_compiling.__code__)

# Before torch 2.13, the public function returns False while AOTAutograd traces
is_compiling = torch.compiler.is_compiling if release() >= (2, 13) else _is_compiling
"""Whether `torch.compile` or `torch.export` traces the calling code."""

is_traced_by_dynamo = torch.compiler.is_dynamo_compiling
"""Whether Dynamo traces the calling code. Python that runs while a program is exported is not traced by it."""


def is_compiling_backward() -> bool:
    """Whether a backward is being compiled, as by compiled autograd."""
    compilation = _compile_context.current_compile_id()
    return compilation is not None and compilation.compiled_autograd_id is not None


@uses_private_names(_COMPILED)
def add_guard(holds: Callable[[Any], bool], words: str) -> None:
    """Add a guard to the graph that Dynamo is compiling: it compiles again if a condition is false.

    Args:
        holds: The condition.
        words: The description of the condition in Dynamo's logs.
    """
    from torch._dynamo.source import GlobalStateSource

    def create(builder: Any, guard: Any) -> None:
        builder.guard_manager.root.add_lambda_guard(holds, [words], guard.user_stack)

    context = tracing_context()
    if context is not None:
        context.guards_context.dynamo_guards.add(GlobalStateSource().make_guard(create))


def name_sources(gm: fx.GraphModule) -> None:
    """Set the sources of tensors that were added to a graph. AOTAutograd looks up the source of every tensor."""
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is None:
        return
    constant = lookup("torch._dynamo.source.ConstantSource", _COMPILED)
    for name, _ in (*gm.named_parameters(), *gm.named_buffers()):
        sources.setdefault(name, constant(f"freegrad_fx_{name}"))


# --- compilers ---


def compiler(inner: Any, mode: Any, options: Any, dynamic: Any) -> Callable[..., Any]:
    """The function that compiles graphs, for arguments of `torch.compile`."""
    if inner == "inductor":
        mode = "default" if mode is None and options is None else mode
        wrapper = lookup("torch._TorchCompileInductorWrapper", _COMPILED)
        return wrapper(mode, options, dynamic)  # type: ignore[no-any-return]
    return lookup("torch._TorchCompileWrapper", _COMPILED)(inner, mode, options, dynamic)  # type: ignore[no-any-return]


def compile_wrapper_of(frame: FrameType) -> Any:
    """The wrapper that `torch.compile` made of a backend, if a frame is one of its methods; else None."""
    asking = frame.f_locals.get("self")
    return asking if isinstance(asking, lookup("torch._TorchCompileWrapper", _COMPILED)) else None


def backend_of(compiled: Any) -> Any:
    """The backend with which something is compiled; None if it is not compiled, or PyTorch does not tell.

    Args:
        compiled: A result of `torch.compile`, or a module that `nn.Module.compile` has compiled.
    """
    held = getattr(compiled, "__dict__", {})
    context, call = held.get("dynamo_ctx"), held.get("_compiled_call_impl") or compiled
    if context is None and isinstance(call, FunctionType) and "self" in call.__code__.co_freevars:
        place = call.__code__.co_freevars.index("self")
        context = (call.__closure__ or ())[place].cell_contents
    backend: Any = getattr(context, "callback", None)
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return getattr(backend, "compiler_fn", backend)


def is_compile_error(error: Exception) -> bool:
    """Whether an error was raised by Dynamo or Inductor."""
    dynamo = lookup("torch._dynamo.exc.TorchDynamoException", "compiling a rule")
    inductor = lookup("torch._inductor.exc.InductorError", "compiling a rule")
    return isinstance(error, (dynamo, inductor))


def gives_up_recompiling(error: Exception) -> bool:
    """Whether an error says that the recompilation limit of Dynamo is reached."""
    return isinstance(
        error, lookup("torch._dynamo.exc.FailOnRecompileLimitHit", "compiling a rule")
    )


# --- calls of compiled functions ---

_EVAL_FRAME = os.path.join("torch", "_dynamo", "eval_frame.py")


def compiled_function(frames: Iterator[FrameType]) -> FrameType | None:
    """The first of some frames that calls a result of `torch.compile`; None if there is none."""
    for frame in frames:
        code = frame.f_code
        if code.co_name == "compile_wrapper" and code.co_filename.endswith(_EVAL_FRAME):
            return frame
    return None


def wrap_compiled_function(
    frame: FrameType, wrapper: Callable[[Callable[..., Any]], Any], mark: str
) -> None:
    """Call a compiled function through a wrapper, in the current call and in all later calls.

    The context that a backend can enter around a call cannot enter a dispatch mode: PyTorch enters it before it saves
    the dispatch state of the thread, and exits it before it restores this state. The wrapper is called in between.

    Args:
        frame: The frame of the call.
        wrapper: Returns the wrapper, given the function that is compiled.
        mark: An attribute of the wrapper. A function that has this attribute is not wrapped again.

    Raises:
        TorchVersionError: PyTorch does not call compiled functions as the tested releases do.
    """
    names = frame.f_code.co_freevars
    function = frame.f_locals.get("fn")
    if hasattr(function, mark):
        return
    for compiled in gc.get_referrers(frame.f_code) if "fn" in names else ():
        if isinstance(compiled, FunctionType):
            cell = (compiled.__closure__ or ())[names.index("fn")]
            if function is not None and cell.cell_contents is function:
                cell.cell_contents = wrapper(function)
                return
    raise unsupported(_COMPILED, f"no cell `fn` of {frame.f_code.co_qualname} was found")
