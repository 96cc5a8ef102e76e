"""A rule: a declaration with its parameters bound; compositions of rules; and the rules by their names.

This file knows no rule by name. The built-in rules stand in `rules`, a file per family.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import Tensor

from ..errors import RuleError, unknown
from .contract import MASK, NATIVE, RESERVED, SAVES
from .declaration import Declaration
from .parameter import Parameter
from .text import shown

__all__ = [
    "Composition",
    "Forward",
    "Rule",
    "RuleLike",
    "add",
    "available",
    "compose",
    "get",
    "of_token",
    "with_names_of_now",
]

Forward: TypeAlias = str | Callable[[Tensor], Tensor]
"""What replaces a site's forward, an op's canonical name or a function of one tensor."""


@dataclass(frozen=True, eq=False)
class Rule:
    """A named backward with its parameters bound. Immutable; calling it with keywords rebinds.

    Attributes:
        declaration: What is the same for all rules of its name.
        bound: The parameters' values.
        forward: What replaces the site's forward: the canonical name of an operation, or a function; or None.
        save: What is saved for the backward where the formula reads ``x``: ``"x"``, or ``"mask"``.
        compile: Whether its backward runs as one compiled kernel in eager mode.
        values: `bound` once more, as pairs: inside `torch.func.functional_call`, torch.compile reads no mapping proxy.

    Example:
        >>> import freegrad_fx as fg
        >>> fg.rules.rectangular(a=-1.0, b=1.0)
        rectangular(a=-1.0, b=1.0)
    """

    declaration: Declaration
    bound: Mapping[str, Any] = field(default_factory=dict)
    forward: Forward | None = None
    save: str = SAVES[0]
    compile: bool = False
    values: tuple[tuple[str, Any], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.bound.items()))

    @classmethod
    def of(cls, declaration: Declaration) -> Rule:
        """The rule of a declaration, with the defaults of its parameters."""
        declaration.check(declaration.defaults)
        return cls(declaration, types.MappingProxyType(declaration.defaults))

    # -- of the declaration

    @property
    def name(self) -> str:
        """The name in the registry."""
        return self.declaration.name

    @property
    def function(self) -> Callable[..., Tensor]:
        """The formula, called as ``function(grad, [x], [y], **parameters)``."""
        return self.declaration.function

    @property
    def inputs(self) -> tuple[str, ...]:
        """Which of ``"x"`` and ``"y"`` the formula reads."""
        return self.declaration.inputs

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The declared parameters."""
        return self.declaration.parameters

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that it can serve: ``"operation"``, ``"parameter"``."""
        return self.declaration.kinds

    @property
    def keeps_shape(self) -> bool:
        """Whether the result has the shape of the gradient."""
        return self.declaration.keeps_shape

    @property
    def sparse(self) -> bool:
        """Whether it takes sparse gradients."""
        return self.declaration.sparse

    @property
    def reference(self) -> str:
        """The paper or the peer the formula comes from."""
        return self.declaration.reference

    @property
    def formula(self) -> str:
        """The first line of the docstring of the rule: its mathematics."""
        return self.declaration.formula

    # -- of its own

    @property
    def parts(self) -> tuple[Rule, ...]:
        """The rule alone: a rule is a composition of one."""
        return (self,)

    @property
    def options(self) -> dict[str, Any]:
        """How it runs, as far as that is not the usual way."""
        found: dict[str, Any] = {} if self.save == SAVES[0] else {"save": self.save}
        return {**found, "compile": True} if self.compile else found

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
        compile: bool | None = None,
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
            compile: Let the backward run as one kernel, which `torch.compile` makes of the formula, in eager mode. The
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
            if declared is None and (not self.declaration.takes_more or name in RESERVED):
                raise RuleError(unknown(f"parameter of rule {self.name!r}:", name, self.parameters))
            bound[name] = value if declared is None else declared.check(self.name, value)
        self.declaration.check(bound)
        return replace(
            self,
            bound=types.MappingProxyType(bound),
            forward=self.forward if forward is None else forward,
            save=self.save if save is None else self._checked_save(save),
            compile=self.compile if compile is None else self._checked_compile(compile),
        )

    def _checked_save(self, save: Any) -> str:
        if save not in SAVES:
            raise RuleError(unknown(f"thing to save for rule {self.name!r}:", save, SAVES))
        if save == MASK and self.declaration.mask is None:
            able = ", ".join(n for n, r in _registry.items() if r.declaration.mask is not None)
            raise RuleError(
                f"rule {self.name!r} reads more than a mask, and has none to save. Leave save='mask' out; rules that "
                f"have one, being registered with mask=, are {able}."
            )
        return str(save)

    def _checked_compile(self, compile: Any) -> bool:
        if not isinstance(compile, bool):
            raise TypeError(f"compile of rule {self.name!r} must be True or False, got {compile!r}")
        return compile

    def backward(self, grad: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Compute the gradient that the rule hands on: the formula, and nothing else."""
        given = {"x": x, "y": y}
        for name in self.inputs:
            if given[name] is None:
                raise RuleError(f"rule {self.name!r} needs {name!r}")
        self.require_bound()
        return self.function(grad, **{name: given[name] for name in self.inputs}, **self.bound)

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
        return (self.name, self.function, values, self.forward, self.save, self.compile)

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


def _rebind(name: str, bound: dict[str, Any], forward: Forward | None) -> Rule:
    return get(name)(forward=forward, **with_names_of_now(bound))


def with_names_of_now(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a rule that were saved, under the names that they have now."""
    return {"compile" if name == "fuse" else name: value for name, value in options.items()}


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
_by_token: dict[str, Rule] = {}  # by token; one that was registered anew may still be in use


def add(rule: Rule) -> None:
    """Register a rule under its name."""
    _registry[rule.name] = rule
    if rule.declaration.token:
        _by_token[rule.declaration.token] = rule


def of_token(token: str) -> Rule:
    """The rule whose formula a token stands for, with its defaults."""
    return _by_token[token]


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
