"""The `forward` of a captured module: it chooses among the generated functions, and checks the arguments."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Collection, Mapping
from typing import Any

import torch

from .._torch import graphs
from ..context import OWN_RULES, in_python, intercepted, left_alone, tables_cannot_be_traced
from ..ops.checks import require_no_others, require_specialised

__all__ = ["dispatcher"]


def dispatcher(
    src: str,
    names: dict[str, Any],
    several: bool,
    guard: bool,
    alone: bool,
    checked: bool,
    specialised: Mapping[str, Any],
    keyword_only: Collection[str],
) -> Any:
    """A `forward` that runs the generated `forward` for the current training flags and hooks, and has its signature.

    Args:
        src: The source of one generated `forward`.
        names: The names that the source refers to; `_version`, the function that chooses the version; and `_at_once`,
            that of `Chooser`.
        several: Whether there are several graphs, so that the training flags decide.
        guard: Restore the grad mode even if the graph raises between two changes of it.
        alone: Let only one thread at a time run it.
        checked: Check that the constant attributes have not changed.
        specialised: Further arguments, each with the only value that it can have; ``**name`` for the keywords that
            the graph was captured without.
        keyword_only: Arguments that have to be given by keyword.
    """
    signature = _signature(src)
    active = "self._active()" if several else "0"
    call = f"return type(self)._forwards[_number][{active}]({_passed_on(signature)})"
    contexts = ["torch.set_grad_enabled(torch.is_grad_enabled())"] * guard
    contexts += ["self._one_thread()"] * alone
    alone_in_blocks = f"with {', '.join(['_left_alone(self)', *contexts])}:\n            {call}"
    if contexts:
        call = f"with {', '.join(contexts)}:\n        {call}"
    remedy = "Include the argument in the example_inputs when transforming the model."
    own: dict[str, Any] = {"torch": torch, "_remedy": remedy}
    own |= {OWN_RULES: True, "_intercepted": intercepted, "_left_alone": left_alone}
    own |= {"_tables_cannot_be_traced": tables_cannot_be_traced, "_in_python": in_python}
    own |= {"_require_specialised": require_specialised, "_require_no_others": require_no_others}
    checks = "    self._require_constants()\n" if checked else ""
    # Arguments that follow an omitted one are keyword-only, because their position differs from the model's forward
    first = next((i for i, a in enumerate(signature.args) if a.arg in keyword_only), None)
    if first is not None:
        signature.kwonlyargs = signature.args[first:]
        signature.kw_defaults = [None] * len(signature.kwonlyargs)
        signature.args = signature.args[:first]
    parameters, again = ast.unparse(signature), _passed_on(signature)
    for number, (name, value) in enumerate(specialised.items()):
        if name.startswith("**"):  # the last
            parameters += f", {name}"
            checks += f"    _require_no_others({name[2:]}, _remedy)\n"
            continue
        own[f"_default_{number}"] = value
        separator = ", *, " if number == 0 and keyword_only and not signature.kwonlyargs else ", "
        parameters += f"{separator}{name}=_default_{number}"
        checks += f"    _require_specialised({name}, _default_{number}, {name!r}, _remedy)\n"
    body = f"def forward({parameters}):\n{checks}"
    if not contexts:
        # nearly every call: nothing traces it, no hook has to run, and no block is around it
        body += f"    _number = _at_once()\n    if _number:\n        {call}\n"
    # Choosing a version can add one to the table
    body += f"    if _tables_cannot_be_traced():\n        return _in_python(type(self).forward, {again})\n"
    body += "    _number = _version()\n"
    # A block around the call does not act on what the model's own table decides
    body += f"    if _intercepted():\n        {alone_in_blocks}\n    {call}\n"
    return graphs.forward_from_source(body, {**names, **own}, {})


def _signature(src: str) -> ast.arguments:
    """The arguments of the function in a source. Its body, which can have thousands of lines, is not parsed."""
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(src).readline):
        if not first and token.type == tokenize.NAME and token.string == "def":
            first = token.start[0]
        elif first and token.type == tokenize.NEWLINE:
            last = token.end[0]
            break
    header = "\n".join(src.split("\n")[first - 1 : last])
    (function,) = ast.parse(f"{header}\n    pass").body
    assert isinstance(function, ast.FunctionDef)
    return function.args


def _passed_on(signature: ast.arguments) -> str:
    """The arguments of a call that passes on what a function with a signature was given."""
    arguments = [a.arg for a in (*signature.posonlyargs, *signature.args)]
    arguments += [f"*{signature.vararg.arg}"] if signature.vararg else []
    arguments += [f"{a.arg}={a.arg}" for a in signature.kwonlyargs]
    arguments += [f"**{signature.kwarg.arg}"] if signature.kwarg else []
    return ", ".join(arguments)
