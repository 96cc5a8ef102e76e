"""What a backward rule is: its declaration by signature, its parameters, composition, the registry.

This file knows no rule by name and nothing of graphs. The built-in rules stand in the files beside it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import RuleError, unknown
from .constraint import Constraint, read_constraints
from .fingerprint import fingerprint
from .freegrad import adapted

__all__ = ["Composition", "Forward", "Rule", "RuleLike", "available", "compose", "get", "register"]

Forward: TypeAlias = str | Callable[[Tensor], Tensor]
"""What replaces a site's forward, an op's canonical name or a function of one tensor."""

INPUTS = ("x", "y")
MASK = "mask"  # what a formula names that reads x through a mask alone
SAVES = ("x", MASK)
KINDS = ("activation", "parameter")
NATIVE = "native"  # what a file writes for no rule, so that no rule can have this name
OPTIONS = ("save", "fuse")  # how a rule runs, beside its parameters
RESERVED = ("grad", *INPUTS, MASK, "rule", "site", "forward", "ambient", *OPTIONS)

_VOCABULARY = (
    "A rule is declared by its signature: `grad` first, then any of `x` (the operation's input; or `mask`, what the "
    "function given as mask= makes of it) and `y` (its output), then, after `*`, its parameters with their defaults: "
    "def rule(grad, x, *, slope: float = 25.0). Or as FreeGrad's rules are: def rule(ctx, grad_out, tin, slope=25.0)."
)


@dataclass(frozen=True)
class Parameter:
    """One keyword-only parameter of a rule: its annotation and its default."""

    name: str
    annotation: Any
    default: Any = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        """Whether the rule has no value for it until the caller gives one."""
        return self.default is inspect.Parameter.empty

    def check(self, rule: str, value: Any) -> Any:
        """Return `value` as the annotation wants it, an int for a float; a tensor can stand for any number.

        Raises:
            TypeError: It has another type.
            RuleError: It is NaN, or too large for a float.
        """
        accepted = self.types
        if isinstance(value, float) and math.isnan(value):
            raise RuleError(f"parameter {self.name!r} of rule {rule!r} is NaN, which is no number")
        if accepted is None:
            return value
        if isinstance(value, tuple) and tuple in accepted:
            element = Parameter(self.name, _element_type(self.annotation))
            return tuple(element.check(rule, item) for item in value)
        if type(value) in accepted:
            return value
        # Python takes a bool for an int, and would so hide a mistake
        if not isinstance(value, bool):
            # numpy's scalars and ints where a float is wanted: what is stored is a plain Python number
            if int in accepted and isinstance(value, numbers.Integral):
                return int(value)
            if float in accepted and isinstance(value, numbers.Real):
                return self.check(rule, self._as_float(rule, value))
            if isinstance(value, accepted):
                return value
            if isinstance(value, Tensor) and {int, float} & {*accepted}:
                return value
        wanted = " or ".join(t.__name__ for t in accepted)
        raise TypeError(
            f"parameter {self.name!r} of rule {rule!r} must be {wanted}, got {value!r} of type {type(value).__name__}"
        )

    def _as_float(self, rule: str, value: numbers.Real) -> float:
        try:
            return float(value)
        except OverflowError:
            raise RuleError(
                f"parameter {self.name!r} of rule {rule!r} is too large for a float"
            ) from None

    @property
    def types(self) -> tuple[type, ...] | None:
        """The types of its values; None where anything is taken."""
        return _accepted_types(self.annotation)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _element_type(annotation: Any) -> Any:
    """What ``tuple[int, ...]`` says of its elements; anything where it says nothing."""
    given = [typing.get_args(p) for p in _alternatives(annotation) if typing.get_origin(p) is tuple]
    return next((args[0] for args in given if args[1:] == (...,)), Any)


def _accepted_types(annotation: Any) -> tuple[type, ...] | None:
    """The types an annotation names; None where it is not made of plain types, and anything is taken."""
    parts = tuple(typing.get_origin(part) or part for part in _alternatives(annotation))
    plain = all(isinstance(part, type) and part not in (Any, object) for part in parts)
    return parts if plain else None


@dataclass(frozen=True, eq=False)
class Rule:
    """A named backward with its parameters bound. Immutable; calling it with keywords rebinds.

    Attributes:
        name: The name in the registry.
        function: The formula, called as ``function(grad, [x], [y], **parameters)``.
        inputs: Which of ``"x"`` and ``"y"`` the formula reads. Nothing else is saved for the backward.
        parameters: The declared parameters.
        bound: The parameters' values.
        forward: What replaces the site's forward: the canonical name of an operation, or a function; or None.
        keeps_shape: Whether the result has the shape of ``grad``.
        reference: The paper or the peer the formula comes from.
        requires: What has to hold of the parameters' values.
        sites: The kinds of sites that it can serve: ``"activation"``, ``"parameter"``.
        sparse: Whether it maps a sparse gradient entry by entry, so that it can serve an embedding with
            ``sparse=True``.
        mask: What the formula reads of ``x``, where that is a mask alone: a function of ``x`` and parameters.
        mask_reads: The parameters that the mask depends on.
        gate: The formula, called as ``gate(grad, mask, [y], **parameters)``, where it reads a mask.
        fused: The formula in fewer passes over memory, for eager mode; see `register`.
        save: What is saved for the backward where the formula reads ``x``: ``"x"``, or ``"mask"``.
        fuse: Whether its backward runs as one compiled kernel in eager mode.
        token: A text that stands for the formula, another one for another formula; ``""`` where no text can.
        own: Whether it is one of this package, whose formulas are tested to change no argument.
        takes_more: Whether it takes parameters that it does not declare, as FreeGrad's rules may.
        values: `bound` once more, as pairs: inside `torch.func.functional_call`, torch.compile reads no mapping proxy.

    Example:
        >>> import freegrad_fx as fg
        >>> fg.rules.rectangular(a=-1.0, b=1.0)
        rectangular(a=-1.0, b=1.0)
    """

    name: str
    function: Callable[..., Tensor]
    inputs: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    bound: Mapping[str, Any] = field(default_factory=dict)
    forward: Forward | None = None
    keeps_shape: bool = True
    reference: str = ""
    requires: tuple[Constraint, ...] = ()
    sites: tuple[str, ...] = KINDS
    sparse: bool = False
    mask: Callable[..., Tensor] | None = None
    mask_reads: tuple[str, ...] = ()
    gate: Callable[..., Tensor] | None = None
    fused: Callable[..., Tensor] | None = None
    save: str = "x"
    fuse: bool = False
    token: str = ""
    own: bool = False
    takes_more: bool = False
    values: tuple[tuple[str, Any], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.bound.items()))

    @property
    def formula(self) -> str:
        """The first line of the docstring of the rule: its mathematics."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def defaults(self) -> dict[str, Any]:
        """The parameters that have a default, with it."""
        return {p.name: p.default for p in self.parameters.values() if not p.required}

    @property
    def parts(self) -> tuple[Rule, ...]:
        """The rule alone: a rule is a composition of one."""
        return (self,)

    @property
    def options(self) -> dict[str, Any]:
        """How it runs, as far as that is not the usual way."""
        found: dict[str, Any] = {} if self.save == SAVES[0] else {"save": self.save}
        return {**found, "fuse": True} if self.fuse else found

    @property
    def given(self) -> dict[str, Any]:
        """What was bound by keyword: the parameters and the options."""
        return {**self.bound, **self.options}

    def __call__(
        self,
        /,
        *args: Any,
        forward: Forward | None = None,
        save: str | None = None,
        fuse: bool | None = None,
        **values: Any,
    ) -> Rule:
        """Return the rule with other values for some of its parameters.

        Args:
            *args: Refused: parameters are bound by keyword.
            forward: The canonical name of an operation that is to replace the forward of the sites this rule
                is given to, for instance ``"heaviside"`` for a surrogate gradient, or a function of a tensor. This
                changes the forward.
            save: ``"mask"``: save where the gradient passes, 1 byte for each entry, instead of the operation's input;
                for rules whose formula reads a mask alone. ``"x"`` is the usual way. It changes no gradient.
            fuse: Let the backward run as one kernel, which `torch.compile` makes of the formula, in eager mode. The
                first backward waits for the compiler. The result is rounded once, where the formula rounds at each
                step. What has been compiled for many dtypes and layouts runs as the formula in further ones.
            **values: Parameters of the rule. A tensor can stand for a number, and is not compared with others.

        Raises:
            RuleError: The rule has no parameter of that name, the values are not what the rule requires, or there is no
                mask that it could save.
            TypeError: A value has the wrong type, or is positional.
        """
        if args:
            raise TypeError(
                f"rule {self.name!r} takes its parameters by keyword: {self.name}({', '.join(self.parameters)}). "
                f"To compute its gradient call rule.backward(grad, x=..., y=...)."
            )
        bound = dict(self.bound)
        for name, value in values.items():
            declared = self.parameters.get(name)
            if declared is None and (not self.takes_more or name in RESERVED):
                raise RuleError(unknown(f"parameter of rule {self.name!r}:", name, self.parameters))
            bound[name] = value if declared is None else declared.check(self.name, value)
        self._require(bound)
        return replace(
            self,
            bound=types.MappingProxyType(bound),
            forward=self.forward if forward is None else forward,
            save=self.save if save is None else self._checked_save(save),
            fuse=self.fuse if fuse is None else self._checked_fuse(fuse),
        )

    def _checked_save(self, save: Any) -> str:
        if save not in SAVES:
            raise RuleError(unknown(f"thing to save for rule {self.name!r}:", save, SAVES))
        if save == MASK and self.mask is None:
            able = ", ".join(name for name, rule in _registry.items() if rule.mask is not None)
            raise RuleError(
                f"rule {self.name!r} reads more than a mask, and has none to save. Leave save='mask' out; rules that "
                f"have one, being registered with mask=, are {able}."
            )
        return str(save)

    def _checked_fuse(self, fuse: Any) -> bool:
        if not isinstance(fuse, bool):
            raise TypeError(f"fuse of rule {self.name!r} must be True or False, got {fuse!r}")
        return fuse

    def backward(self, grad: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Compute the gradient that the rule hands on: the formula, and nothing else."""
        given = {"x": x, "y": y}
        for name in self.inputs:
            if given[name] is None:
                raise RuleError(f"rule {self.name!r} needs {name!r}")
        self.require_bound()
        return self.function(grad, **{name: given[name] for name in self.inputs}, **self.bound)

    def mask_of(self, x: Tensor, parameters: Mapping[str, Any]) -> Tensor:
        """The mask that the formula reads of ``x``, for these parameters."""
        assert self.mask is not None
        return self.mask(x, **{name: parameters[name] for name in self.mask_reads})

    def _require(self, bound: Mapping[str, Any]) -> None:
        for constraint in self.requires:
            if not constraint.holds(bound):
                got = ", ".join(f"{name}={bound[name]!r}" for name in constraint.names)
                raise RuleError(f"rule {self.name!r} requires {constraint.text}, got {got}")

    def require_bound(self) -> None:
        """Raise `RuleError` if a parameter has neither a default nor a value."""
        missing = [name for name in self.parameters if name not in self.bound]
        if missing:
            values = ", ".join(f"{name}=..." for name in missing)
            raise RuleError(
                f"rule {self.name!r} has no value for {', '.join(missing)}. Bind it: {self.name}({values})."
            )

    def _key(self) -> tuple[Any, ...]:
        # a tensor is compared by identity: it is a place whose value may change, and its own == is no truth value
        values = tuple(
            (name, id(value) if isinstance(value, Tensor) else value, isinstance(value, Tensor))
            for name, value in sorted(self.bound.items())
        )
        return (self.name, self.function, values, self.forward, self.save, self.fuse)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((self.name, self.function, tuple(sorted(self.bound)), self.forward))

    def __repr__(self) -> str:
        values = [f"{name}={shown(value)}" for name, value in self.given.items()]
        if self.forward is not None:
            values.append(f"forward={shown(self.forward)}")
        head = self.name if self.name.isidentifier() else f"get({self.name!r})"
        return f"{head}({', '.join(values)})" if values else head

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebind, (self.name, self.given, self.forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rule:
        # a tensor is a buffer of the model that is being copied
        tensors: Any = {name: v for name, v in self.bound.items() if isinstance(v, Tensor)}
        return self(**copy.deepcopy(tensors, memo)) if tensors else self


def shown(value: Any) -> str:
    """A parameter's value, or a forward, on one line."""
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, torch.nn.Parameter) and not value.is_meta
        return f"tensor({value.item()})" if plain and not value.dim() else f"tensor{[*value.shape]}"
    if isinstance(value, functools.partial):
        given = [*map(shown, value.args), *(f"{k}={shown(v)}" for k, v in value.keywords.items())]
        return f"partial({', '.join([shown(value.func), *given])})"
    return getattr(value, "__qualname__", None) or repr(value)


def _rebind(name: str, bound: dict[str, Any], forward: Forward | None) -> Rule:
    return get(name)(forward=forward, **bound)


@dataclass(frozen=True)
class Composition:
    """Rules applied to the gradient one after the other, the first to the incoming one. Made by `compose`."""

    parts: tuple[Rule, ...]

    @property
    def forward(self) -> Forward | None:
        """The replacement forward that one of the parts names, or None."""
        return next((rule.forward for rule in self.parts if rule.forward is not None), None)

    def __call__(self, *args: Any, **values: Any) -> Composition:
        """Refused: the parts have parameters, the composition has none."""
        raise TypeError(
            "a composition has no parameters of its own. Bind its parts: "
            "compose(get('clip_norm')(max_norm=1.0), get('noise')(sigma=0.01))."
        )

    def __repr__(self) -> str:
        return f"compose({', '.join(map(repr, self.parts))})"


RuleLike: TypeAlias = str | Rule | Composition

_registry: dict[str, Rule] = {}
_formulas: dict[str, Rule] = {}  # by token; one that was registered anew may still be in use


def register(
    name: str,
    *,
    reference: str = "",
    keeps_shape: bool = True,
    requires: str = "",
    sites: str | tuple[str, ...] = KINDS,
    sparse: bool = False,
    mask: Callable[..., Tensor] | None = None,
    fused: Callable[..., Tensor] | None = None,
    overwrite: bool = False,
) -> Callable[[Callable[..., Tensor]], Rule]:
    """Declare a backward rule. The decorated function becomes a `Rule`.

    The signature is the declaration. ``grad`` is the gradient that comes in, ``x`` the operation's input, ``y`` its
    output; only what the signature names is saved for the backward. Everything after ``*`` is a parameter. A rule is
    a pure function of tensors: no in-place change of its arguments, no ``.item()``, no Python branch on data. It
    returns the gradient for ``x``, of the shape and dtype of ``x``.

    FreeGrad's signature ``fn(ctx, grad_out, tin, **params)`` is taken too: ``ctx`` is None, ``tin`` is ``x``, for a
    parameter its value, and what follows are parameters.

    Args:
        name: The name by which tables refer to the rule.
        reference: The paper or library that the formula comes from.
        keeps_shape: False for a rule that turns a gradient of the output's shape into one of another shape.
        requires: What has to hold of the parameters, as mathematics: ``"a <= b"``, ``"0 <= p < 1, eps > 0"``.
        sites: ``"activation"`` or ``"parameter"`` for a rule that can serve one kind of sites alone.
        sparse: True for a rule that maps a sparse gradient entry by entry.
        mask: For a rule that asks of ``x`` only where the gradient passes: a function of ``x`` and, by keyword, of
            parameters of the rule, that returns booleans. The signature of the rule then has ``mask`` in the place of
            ``x``, and ``save="mask"`` can store it in 1 byte for each entry.
        fused: The same formula in fewer passes over memory, of the same signature (with ``x`` for ``mask``). It runs
            in the place of the rule in eager mode, where nothing is differentiated twice and no transform of torch.func
            is active, and may return ``NotImplemented`` for arguments that it is not for. The formula itself is always
            right; this makes it fast.
        overwrite: Replace a rule of that name instead of refusing.

    Raises:
        RuleError: The name is taken, the signature is not in the vocabulary, `requires` or `sites` cannot be read, or
            the defaults are not what the rule requires, or `mask` or `fused` has another signature.

    Example:
        >>> import freegrad_fx as fg
        >>> @fg.register("halve_negative", overwrite=True)
        ... def halve_negative(grad, x, *, factor: float = 0.5):
        ...     \"\"\"grad where x ≥ 0, factor·grad elsewhere\"\"\"
        ...     return grad * (1 - (1 - factor) * (x < 0).to(grad.dtype))
        >>> halve_negative(factor=0.1)
        halve_negative(factor=0.1)
    """
    if not isinstance(name, str) or not name:
        raise RuleError(f"a rule is registered under a name, got {name!r}: @register('my_rule')")
    if name == NATIVE:
        raise RuleError(f"{NATIVE!r} stands for no rule in a table's file. Choose another name.")
    kinds = (sites,) if isinstance(sites, str) else tuple(sites)
    for kind in kinds or ("",):
        if kind not in KINDS:
            raise RuleError(unknown(f"kind of site for rule {name!r}:", kind, KINDS))

    def declare(function: Callable[..., Tensor]) -> Rule:
        function, takes_more = adapted(function)
        if name in _registry and not overwrite:
            raise RuleError(
                f"a rule {name!r} is already registered. Choose another name, or say overwrite=True."
            )
        inputs, parameters = _read_signature(name, function)
        gate = function if MASK in inputs else None
        if (gate is None) is not (mask is None):
            raise RuleError(
                f"rule {name!r} names `mask` in its signature and is registered without mask=, or the other way round: "
                f"@register({name!r}, mask=function_of_x) goes with def rule(grad, mask)."
            )
        mask_reads: tuple[str, ...] = ()
        if gate is not None and mask is not None:
            mask_reads = _mask_reads(name, mask, parameters)
            function = _gated(gate, mask, mask_reads)
            inputs = tuple("x" if given == MASK else given for given in inputs)
        if fused is not None and _names(name, "fused", fused) != _names(name, "formula", function):
            raise RuleError(
                f"fused={shown(fused)}{inspect.signature(fused)} has not the arguments of rule {name!r}, "
                f"{inspect.signature(function)}"
                + ": it is given x, not its mask."
                * (mask is not None)
            )
        rule = Rule(
            name=name,
            function=function,
            inputs=inputs,
            parameters=types.MappingProxyType(parameters),
            bound=types.MappingProxyType(
                {p.name: p.default for p in parameters.values() if not p.required}
            ),
            keeps_shape=keeps_shape,
            reference=reference,
            requires=read_constraints(name, requires, parameters),
            sites=kinds,
            sparse=sparse,
            mask=mask,
            mask_reads=mask_reads,
            gate=gate,
            fused=fused,
            token=_token(name, gate or function, mask),
            own=_is_own(gate or function, mask),
            takes_more=takes_more,
        )
        rule._require(rule.bound)
        _registry[name] = rule
        if rule.token:
            _formulas[rule.token] = rule
        return rule

    return declare


def _mask_reads(
    name: str, mask: Callable[..., Tensor], parameters: Mapping[str, Parameter]
) -> tuple[str, ...]:
    """The parameters of a rule that a mask depends on. Raises `RuleError` if it asks for anything else."""
    x, *others = _names(name, "mask", mask) or [("", None)]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wrong = [
        n for n, kind in others if kind is not inspect.Parameter.KEYWORD_ONLY or n not in parameters
    ]
    if x[1] not in positional or wrong:
        raise RuleError(
            f"mask={shown(mask)} of rule {name!r} asks for {wrong[0] if wrong else 'nothing'!r}; it takes x and, by "
            f"keyword, parameters of the rule: {', '.join(parameters) or 'there are none'}."
        )
    return tuple(n for n, _ in others)


def _gated(
    gate: Callable[..., Tensor], mask: Callable[..., Tensor], mask_reads: tuple[str, ...]
) -> Callable[..., Tensor]:
    """The function of ``x`` that a function of a mask of ``x`` is."""

    @functools.wraps(gate)
    def function(grad: Tensor, x: Tensor, *others: Tensor, **values: Any) -> Tensor:
        return gate(grad, mask(x, **{key: values[key] for key in mask_reads}), *others, **values)

    signature = inspect.signature(gate)
    named = [p.replace(name="x") if p.name == MASK else p for p in signature.parameters.values()]
    function.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return function


def _token(name: str, formula: Callable[..., Tensor], mask: Callable[..., Tensor] | None) -> str:
    """A text that stands for a formula: another one has another text, in every process.

    Caches of compiled code go by it, those on disk too. ``""`` for one that reads variables, whose values may change.
    """
    if _is_own(formula, mask):
        places = [f"{f.__module__}.{f.__qualname__}" for f in (formula, mask) if f is not None]
        return f"{name}@{'+'.join(places)}"
    content = fingerprint(formula, mask)
    return f"{name}@{content}" if content else ""


def _is_own(*functions: Callable[..., Tensor] | None) -> bool:
    """Whether functions stand in this package."""
    package = __name__.partition(".")[0]
    return all(
        str(getattr(f, "__module__", "")).partition(".")[0] == package
        and "<locals>" not in f.__qualname__
        for f in functions
        if f is not None
    )


def of_token(token: str) -> Rule:
    """The rule whose formula a token stands for, with its defaults."""
    return _formulas[token]


def _names(name: str, what: str, function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """The arguments of a function; raise `RuleError` where they cannot be read."""
    try:
        return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        raise RuleError(
            f"{what}={function!r} of rule {name!r} is no function whose arguments can be read. Write one in "
            f"Python, which may call it."
        ) from None


def _read_signature(
    name: str, function: Callable[..., Tensor]
) -> tuple[tuple[str, ...], dict[str, Parameter]]:
    """Read what a rule needs from its signature; anything outside the vocabulary is refused."""
    if not callable(function):
        raise RuleError(f"rule {name!r} must be a function, got {function!r}. {_VOCABULARY}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin, whose signature Python cannot read
        raise RuleError(
            f"rule {name!r} is {function!r}, which has no signature to read. {_VOCABULARY}"
        ) from None
    try:
        hints = typing.get_type_hints(function)
    except (
        NameError,
        TypeError,
    ):  # names that only the author's scope knows: the defaults tell the types
        hints = {}
    inputs: list[str] = []
    parameters: dict[str, Parameter] = {}
    for position, (argument, spec) in enumerate(signature.parameters.items()):
        if spec.kind is spec.KEYWORD_ONLY:
            if argument in RESERVED:
                raise RuleError(
                    f"rule {name!r} calls a parameter {argument!r}, which is reserved. {_VOCABULARY}"
                )
            given = () if spec.default is spec.empty else (type(spec.default),)
            annotation = hints.get(argument, given[0] if given else Any)
            parameters[argument] = Parameter(argument, annotation, spec.default)
        elif spec.kind is spec.POSITIONAL_OR_KEYWORD and spec.default is spec.empty:
            if position == 0 and argument != "grad":
                raise RuleError(
                    f"the first argument of rule {name!r} is {argument!r}. {_VOCABULARY}"
                )
            if position > 0 and argument not in (*INPUTS, MASK):
                raise RuleError(f"rule {name!r} asks for {argument!r}. {_VOCABULARY}")
            if position > 0:
                inputs.append(argument)
        else:
            raise RuleError(f"rule {name!r} has the argument `{spec}`. {_VOCABULARY}")
    if {"x", MASK}.issubset(inputs) or inputs[:2] == ["y", MASK]:
        raise RuleError(
            f"in rule {name!r}, `mask` stands in the place of `x`, first. {_VOCABULARY}"
        )
    if "grad" not in signature.parameters:
        raise RuleError(f"rule {name!r} takes no `grad`. {_VOCABULARY}")
    return tuple(inputs), parameters


def get(rule: RuleLike) -> Rule:
    """Return the rule of a name; a `Rule` is returned as it is.

    Raises:
        RuleError: No rule of that name is registered.
    """
    if isinstance(rule, Rule):
        return rule
    try:
        return _registry[rule]  # type: ignore[index]
    except (KeyError, TypeError):
        remedy = "A rule of your own is known once the module that registers it has been imported."
        if str(rule).casefold() in ("none", "null", NATIVE):
            raise RuleError(
                f"{rule!r} is no rule. What keeps the native backward is None in a table, {NATIVE!r} in a file, and a "
                f"native() block."
            ) from None
        raise RuleError(unknown("rule", rule, _registry, remedy)) from None


def available() -> list[str]:
    """The names of all registered rules."""
    return list(_registry)


def compose(*rules: RuleLike) -> Composition:
    """Chain rules: ``compose(r1, r2)`` hands the gradient to ``r1`` first, and what it returns to ``r2``.

    Every part keeps its own parameters. Compositions nest.

    Raises:
        RuleError: No rule is given, one is unknown, or two parts name different forwards.
    """
    parts = tuple(part for rule in rules for part in _parts(rule))
    if not parts:
        raise RuleError("compose() needs at least one rule")
    if len({rule.forward for rule in parts} - {None}) > 1:
        raise RuleError(f"the parts of a composition name different forwards: {list(parts)}")
    return Composition(parts)


def _parts(rule: RuleLike) -> Iterator[Rule]:
    if isinstance(rule, Composition):
        yield from rule.parts
    else:
        yield get(rule)
