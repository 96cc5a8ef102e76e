"""`register`, the decorator that turns a function into a rule."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from ..errors import RuleError, unknown
from .answers import read_answers, read_learns, several
from .constraint import read_constraints
from .contract import KINDS, NATIVE, SAVES, Formula, Packs, adapted, arguments_of, read_formula
from .declaration import Declaration
from .fingerprint import fingerprint
from .lean import read_lean
from .rule import Rule, add, available
from .text import shown

__all__ = ["register"]


def register(
    name: str,
    *,
    reference: str = "",
    keeps_shape: bool = True,
    requires: str = "",
    kinds: str | tuple[str, ...] = KINDS,
    sparse: bool = False,
    mask: Callable[..., Tensor] | None = None,
    mask_bits: int | str = 1,
    save: str = SAVES[0],
    of_op: Callable[..., Mapping[str, Any]] | None = None,
    of_site: Callable[..., Mapping[str, Any]] | None = None,
    fast: Callable[..., Tensor] | None = None,
    lean: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    pointwise: bool = False,
    examples: Iterable[Mapping[str, Any]] = (),
    meant_for: str | tuple[str, ...] = (),
    peers: str | tuple[str, ...] = (),
    linear: bool = True,
    reducing: bool = False,
    random: bool = False,
    relevance: bool = False,
    joint: bool = False,
    native_if: str = "",
    packs: Packs | None = None,
    again: str = "",
    answers: str | tuple[str, ...] = (),
    learns: str | tuple[str, ...] | Mapping[str, Callable[..., Tensor]] = (),
    overwrite: bool = False,
) -> Callable[[Callable[..., Tensor]], Rule]:
    """Declare a backward rule. The decorated function becomes a `Rule`.

    The signature is the declaration:

    - ``grad`` is the incoming gradient, ``x`` the input of the operation, ``y`` its output. Only what the signature
      names is saved for the backward.
    - Arguments after ``*`` are the parameters of the rule, with their defaults.
    - For an operation with several operands, the names of the operands: ``x``, ``weight`` and ``bias`` of a linear
      layer; ``a`` and ``b`` of a product. The keyword ``f`` is then the native operation: ``f(x=..., weight=...)``
      computes it, and ``f.gradient("x", grad, weight=...)`` computes its gradient.

    The first line of the docstring is the formula. The function returns the gradient for ``x``, with the shape and
    dtype of ``x``; or a dict of gradients by the names of operands and parameters, in which a function without
    arguments is called only if that gradient is needed. It must be a pure function of tensors: it must not change its
    arguments in place, call ``.item()``, or branch on the values of tensors.

    FreeGrad's signature ``fn(ctx, grad_out, tin, **params)`` is accepted too: ``ctx`` is None, ``tin`` is ``x`` (for a
    parameter, its value), and the other arguments are parameters.

    Args:
        name: The name by which tables refer to the rule.
        reference: The paper or library that the formula comes from.
        keeps_shape: False for a rule that turns a gradient of the output's shape into one of another shape.
        requires: Constraints on the parameters, as mathematics: ``"a <= b"``, ``"0 <= p < 1, eps > 0"``.
        kinds: ``"operation"`` or ``"parameter"`` if the rule can serve only one kind of site. Default: both.
        sparse: True for a rule that maps a sparse gradient entry by entry.
        mask: For a rule that reads ``x`` only through a mask: a function of ``x`` and, by keyword, of parameters of
            the rule, that returns booleans. The signature of the rule then has ``mask`` instead of ``x``, and
            ``save="mask"`` can save the mask, one byte for each entry, instead of ``x``, and ``save="bits"`` one bit.
        mask_bits: The bits of an entry of the mask, at most 8. If there is more than one, the mask is a tensor of
            unsigned bytes below 2**mask_bits, not of booleans. The name of a parameter, if that says how many.
        save: What the rule saves unless an entry says something else: ``"x"``, ``"mask"`` or ``"bits"``.
        of_op: For a rule that depends on the operation whose backward it replaces: a function that takes this
            operation, as a function of one tensor, and by keyword all parameters, and returns the values of some of
            them as a dict. It is called when a site gets the rule. It raises `RuleError` if the operation has no such
            values; its text continues "it is not possible, as ...".
        of_site: For a rule that differs from site to site, such as one with a random matrix: a function that takes the
            name of the site, and by keyword all parameters, and returns the values of some of them as a dict.
        fast: The same formula in fewer passes over memory, with the same signature (with ``x``, not ``mask``). It
            replaces the formula in eager mode, if the backward is not itself differentiated and no transform of
            torch.func is active. It can return ``NotImplemented``, and the formula is used instead.
        lean: The same gradients from less than the formula reads: two functions, ``(keep, formula)``. ``keep`` takes
            operands and ``y`` by their names, runs in the forward, and returns a tuple of tensors and of other values,
            such as shapes. The other takes ``grad``, ``kept``, which is this tuple, and operands and ``y`` that are
            saved besides. Both take by keyword the parameters of the rule, and ``f`` if the formula does;
            ``f.needs`` is the operands whose gradient is needed. The formula itself runs only under torch.func.
        pointwise: True for a formula of sums, products, quotients, comparisons, bounds and choices that does the same
            for every entry and every shape. The C++ extension, if it is built, then runs it without Python. A formula
            that reads variables, or uses other operations, runs in Python.
        examples: Values of the parameters that the rule is tested with, besides the defaults, as dicts:
            ``({"a": -1.0, "b": 1.0}, {"a": 0.0})``. They are bound, and so checked, at registration.
        meant_for: The canonical names of the operations that the formula is meant for, such as ``"relu"``. At other
            operations the rule acts too, and the report says what it replaces there. Default: all.
        peers: The libraries that have the rule, each with its name there: ``"snnTorch atan"``.
        linear: False for a rule whose result is not linear in the gradient, such as a clipping.
        reducing: True for a rule that computes an entry of the result from several entries, such as a norm.
        random: True for a rule that draws random numbers.
        relevance: True for a rule of the first layer that returns the relevance of ``x`` itself, as ``lrp_zbox`` does.
            `attribute` does not multiply it by ``x``.
        joint: True for a rule that reads only the gradient, and whose formula does not depend on its shape, such as one
            with a norm over the whole tensor. The option ``over`` can then join the gradients of several parameters.
        native_if: The name of an argument of the operation, for a rule that uses ``f``: a call for which it is true
            keeps its native backward, such as ``"training"`` for a rule of a batch norm in eval mode.
        packs: Two functions, ``(pack, unpack)``, for a rule that leaves every call its native backward, and packs what
            that saves. In eager mode ``pack(tensor)`` is called with each tensor that the call has saved; it returns
            what is kept instead, or ``NotImplemented`` to leave the tensor. ``unpack`` returns a tensor with the same
            bits. The formula is the native gradient, ``f.gradient("x", grad)``.
        again: The canonical name of an operation, for a rule with its native gradient: other rules may compute the
            output of the operation again in the backward, so that it is not kept; ``f.recipe("x", longest)`` in their
            lean form tells how.
        answers: The operands that the rule gives a gradient to. The others keep their native gradient. Default: the
            first operand that the signature names.
        learns: The parameters that the rule gives a gradient to, if they are tensors that require one. Either their
            names, and the function returns a dict that contains their gradients; or a dict of the names and the
            functions that compute the gradients, with the signature of the rule.
        overwrite: True to replace a rule of the same name.

    Returns:
        A decorator that turns the function into a `Rule` and registers it.

    Raises:
        RuleError: The name is taken; the signature, `requires`, `kinds`, `answers` or `learns` cannot be read;
            `native_if` or `packs` is given for a formula without ``f``; `packs` is no pair of functions; `mask`,
            `fast` or `lean` has the wrong signature, or is given for a formula that returns a dict; or the defaults or
            `examples` do not satisfy `requires`.

    Example:
        >>> import freegrad_fx as fg
        >>> @fg.register("halve_negative", overwrite=True)
        ... def halve_negative(grad, x, *, factor: float = 0.5):
        ...     \"\"\"grad where x ≥ 0, factor·grad elsewhere\"\"\"
        ...     return grad * (1 - (1 - factor) * (x < 0).to(grad.dtype))
        >>> halve_negative(factor=0.1)
        halve_negative(factor=0.1)
    """
    _check_name(name)
    served = _read_kinds(name, kinds)

    def declare(written: Callable[..., Tensor]) -> Rule:
        function, takes_more = adapted(written)
        if name in available() and not overwrite:
            raise RuleError(
                f"rule {name!r} is already registered. Choose another name, or pass overwrite=True to replace it."
            )
        formula = read_formula(name, function, mask)
        _check_fast(name, fast, formula)
        _check_mask(name, mask_bits, save, formula)
        _check_joint(name, joint, formula)
        source = formula.gate or formula.function
        learnt = read_learns(name, learns, formula)
        leaner = read_lean(name, lean, formula)
        answered = read_answers(name, answers, formula)
        identity = ",".join((name, *answered, *learnt))
        declaration = Declaration(
            name=name,
            function=formula.function,
            inputs=formula.inputs,
            parameters=types.MappingProxyType(dict(formula.parameters)),
            keeps_shape=keeps_shape,
            reference=reference,
            requires=read_constraints(name, requires, formula.parameters),
            kinds=served,
            sparse=sparse,
            mask=mask,
            mask_parameters=formula.mask_parameters,
            mask_bits=mask_bits,
            save=save,
            of_op=of_op,
            of_site=of_site,
            gate=formula.gate,
            fast=fast,
            lean=leaner,
            pointwise=pointwise,
            examples=tuple(examples),
            token=_token(identity, source, mask, *learnt.values(), *(lean or ())),
            own=_is_own(source, mask, *learnt.values(), *(lean or ())),
            takes_more=takes_more,
            meant_for=several(name, "meant_for", meant_for),
            peers=several(name, "peers", peers),
            linear=linear,
            reducing=reducing,
            random=random,
            relevance=relevance,
            joint=joint,
            answers=answered,
            learns=learnt,
            operation=formula.operation,
            native_if=_read_native_if(name, native_if, formula),
            packs=_read_packs(name, packs, formula),
            again=again,
        )
        _check_forms(declaration)
        rule = Rule.of(declaration)
        _check_examples(rule)
        add(rule)
        return rule

    return declare


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise RuleError(
            f"a rule is registered under a name, a non-empty str, got {name!r}. Write @register('my_rule')."
        )
    if name == NATIVE:
        raise RuleError(
            f"a rule cannot be named {NATIVE!r}, which stands for the native backward in a table file. Choose another "
            f"name."
        )


def _read_kinds(name: str, kinds: str | tuple[str, ...]) -> tuple[str, ...]:
    served = several(name, "kinds", kinds)
    for kind in served or ("",):
        if kind not in KINDS:
            raise RuleError(unknown(f"kind of site for rule {name!r}:", kind, KINDS))
    return served


def _check_fast(name: str, fast: Callable[..., Tensor] | None, formula: Formula) -> None:
    if fast is None:
        return
    expected = arguments_of(name, "formula", formula.function)
    if arguments_of(name, "fast", fast) != expected:
        hint = " It takes x, not the mask." if formula.gate else ""
        raise RuleError(
            f"fast={shown(fast)} of rule {name!r} has the signature {inspect.signature(fast)}; it must have the "
            f"arguments of the formula, {inspect.signature(formula.function)}.{hint}"
        )


def _check_forms(declaration: Declaration) -> None:
    for what, form in (("mask", declaration.mask), ("fast", declaration.fast)):
        if form is not None and declaration.several:
            raise RuleError(
                f"rule {declaration.name!r} is registered with {what}=, which is for a formula that returns the "
                f"gradient of x alone. Leave out {what}=; or let the formula return a tensor, and give the gradients "
                f"of parameters as functions: learns={{name: function}}."
            )


def _read_native_if(name: str, native_if: str, formula: Formula) -> str:
    if native_if and not formula.operation:
        raise RuleError(
            f"rule {name!r} is registered with native_if={native_if!r}, an argument of the operation, but its formula "
            f"does not take `f`, the operation. Add `*, f` to its signature, or leave out native_if=."
        )
    return native_if


def _read_packs(name: str, packs: Packs | None, formula: Formula) -> Packs | None:
    if packs is None:
        return None
    if not (isinstance(packs, tuple) and len(packs) == 2 and all(map(callable, packs))):
        raise RuleError(
            f"packs= of rule {name!r} must be two functions, (pack, unpack), got {packs!r}."
        )
    if not formula.operation:
        raise RuleError(
            f"rule {name!r} is registered with packs=, for calls with their native backward, but its formula does not "
            f"take `f`, the operation. Add `*, f` to its signature, and return f.gradient('x', grad)."
        )
    return packs


def _check_joint(name: str, joint: bool, formula: Formula) -> None:
    if joint and formula.inputs:
        raise RuleError(
            f"rule {name!r} is registered with joint=True, but its formula reads {formula.inputs[0]!r}. Only a rule of "
            f"the gradient alone can act on several gradients together; leave out joint=True."
        )


def _check_mask(name: str, bits: object, save: str, formula: Formula) -> None:
    """Raise `RuleError` if what is declared of a mask cannot be."""
    if save not in SAVES:
        raise RuleError(unknown(f"value of save= for rule {name!r}:", save, SAVES))
    if formula.gate is None and (save != SAVES[0] or bits != 1):
        raise RuleError(
            f"rule {name!r} is registered with save= or mask_bits=, but mask= is not given. Give the function that "
            f"computes the mask, or leave these out."
        )
    if isinstance(bits, str) and bits not in formula.parameters:
        raise RuleError(
            unknown(f"parameter in mask_bits= of rule {name!r}:", bits, formula.parameters)
        )
    if not isinstance(bits, str) and bits not in range(1, 9):
        raise RuleError(
            f"mask_bits={bits!r} of rule {name!r} must be a number from 1 to 8, or the name of a parameter."
        )


def _check_examples(rule: Rule) -> None:
    for example in rule.declaration.examples:
        if not isinstance(example, Mapping):
            raise RuleError(
                f"examples= of rule {rule.name!r} must be a sequence of dicts, one for each set of values, for example "
                f"examples=({{'slope': 5.0}},); got the entry {example!r}."
            )
        rule(**example)


def _token(
    identity: str, formula: Callable[..., Tensor], *others: Callable[..., Tensor] | None
) -> str:
    """Return a text that identifies a formula in every process.

    Caches of compiled code, also on disk, use it as the key. ``""`` for a formula that reads variables, whose values
    can change.
    """
    functions = (formula, *others)
    if _is_own(*functions):
        places = [f"{f.__module__}.{f.__qualname__}" for f in functions if f is not None]
        return f"{identity}@{'+'.join(places)}"
    content = fingerprint(*functions)
    return f"{identity}@{content}" if content else ""


def _is_own(*functions: Callable[..., Tensor] | None) -> bool:
    """Return whether this package defines all of these functions."""
    package = __name__.partition(".")[0]
    return all(
        str(getattr(f, "__module__", "")).partition(".")[0] == package
        and "<locals>" not in f.__qualname__
        for f in functions
        if f is not None
    )
