"""A rule (a declaration with bound parameters), compositions of rules, and the registry of rules by name.

Does not know any rule by name. The built-in rules are in `rules`, one file for each family.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import RuleError, unknown
from .contract import NATIVE, OF_MASK, OPERATION, OVER, RESERVED, SAVES
from .declaration import Declaration
from .info import RuleInfo, described, info_of
from .parameter import Parameter
from .text import shown
from .unscaled import UNSCALED, with_scale, without_scale

__all__ = [
    "Composition",
    "Forward",
    "Rule",
    "RuleLike",
    "add",
    "available",
    "compose",
    "get",
    "learnt_by",
    "of_token",
    "with_names_of_now",
]

Forward: TypeAlias = str | Callable[[Tensor], Tensor]
"""The replacement forward of a site, either the canonical name of an op or a function of one tensor."""


@dataclass(frozen=True, eq=False)
class Rule:
    """A named backward with bound parameters. Immutable; a call with keywords returns a rule with other values.

    Attributes:
        declaration: Everything that does not depend on the values of the parameters.
        bound: The values of the parameters, by name.
        forward: The replacement forward of the site: the canonical name of an operation, or a function; or None.
        save: What is saved for the backward if the formula reads ``x``: ``"x"``, ``"mask"`` or ``"bits"``.
        compile: Whether the backward runs as one compiled kernel in eager mode.
        over: What the rule acts on: each ``"parameter"``; together, those of a ``"module"`` or ``"all"`` of an entry.
        values: `bound` as pairs. torch.compile cannot read a mapping proxy inside `torch.func.functional_call`.

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
    over: str = OVER[0]
    values: tuple[tuple[str, Any], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", tuple(self.bound.items()))

    @classmethod
    def of(cls, declaration: Declaration) -> Rule:
        """Return the rule of a declaration, with the defaults of its parameters."""
        declaration.check(declaration.defaults)
        bound = types.MappingProxyType(declaration.defaults)
        return cls(declaration, bound, save=declaration.save)

    # -- read from the declaration

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
        """The declared parameters, by name."""
        return self.declaration.parameters

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of sites that the rule can serve: ``"operation"``, ``"parameter"``."""
        return self.declaration.kinds

    @property
    def learnt(self) -> dict[str, Tensor]:
        """The parameters that get a gradient from the rule, by name: tensors that require one."""
        names = self.declaration.learns
        return {
            n: v for n, v in self.values if n in names and isinstance(v, Tensor) and v.requires_grad
        }

    @property
    def keeps_shape(self) -> bool:
        """Whether the result has the shape of the gradient."""
        return self.declaration.keeps_shape

    @property
    def sparse(self) -> bool:
        """Whether the rule accepts sparse gradients."""
        return self.declaration.sparse

    @property
    def reference(self) -> str:
        """The paper or the library that the formula comes from."""
        return self.declaration.reference

    @property
    def formula(self) -> str:
        """The first line of the docstring of the rule, which is its formula."""
        return self.declaration.formula

    @property
    def info(self) -> RuleInfo:
        """A description: family, formula, parameters with ranges, what is saved, properties, source, peers."""
        return info_of(self.declaration, self.bound, self.save)

    # -- of the rule itself

    @property
    def parts(self) -> tuple[Rule, ...]:
        """The rule itself, as a composition with one part."""
        return (self,)

    @property
    def options(self) -> dict[str, Any]:
        """The options `save`, `compile` and `over`, without those that have the default value."""
        found: dict[str, Any] = {} if self.save == self.declaration.save else {"save": self.save}
        found.update({"compile": True} if self.compile else {})
        return found if self.over == OVER[0] else {**found, "over": self.over}

    @property
    def given(self) -> dict[str, Any]:
        """The bound parameters and the options, as keywords."""
        return {**self.bound, **self.options}

    def __call__(
        self,
        /,
        *args: Any,
        forward: Forward | None = None,
        save: str | None = None,
        compile: bool | None = None,
        over: str | None = None,
        **values: Any,
    ) -> Rule:
        """Return the rule with other values for some of its parameters.

        Args:
            *args: Not accepted: parameters are bound by keyword.
            forward: The replacement forward of the sites that get this rule: the canonical name of an operation, for
                example ``"heaviside"`` for a surrogate gradient; one with parameters, such as
                ``fg.forward("heaviside", value_at_zero=1.0)``; or a function of one tensor. This changes the output of
                the model.
            save: ``"mask"`` to save the mask, 1 byte for each entry, instead of ``x``, or ``"bits"`` to save it as 1
                bit for each entry; only for rules that read ``x`` only through a mask. Default: ``"x"``. The gradient
                is the same.
            compile: True to run the backward as one kernel in eager mode. `torch.compile` generates it from the
                formula. The first backward waits for the compiler. The result is rounded once, whereas the formula
                rounds at each step. The number of dtypes and layouts that are compiled is limited; the formula is used
                for further ones.
            over: For parameters, and rules of a norm over the whole gradient: ``"module"`` to join the gradients of all
                parameters of a module that an entry selects, or ``"all"`` to join all that it selects. Default:
                ``"parameter"``, each by itself.
            **values: Values of parameters. A tensor is accepted in place of a number; it is not checked against
                the constraints of the rule, and rules compare it by identity.

        Returns:
            A new rule. Parameters and options that are not given keep their values.

        Raises:
            RuleError: The rule has no parameter of that name, the values do not satisfy its constraints, or `save` is
                ``"mask"`` or ``"bits"`` and the rule has no mask, or `over` joins gradients and the rule cannot.
            TypeError: A value has the wrong type, or an argument is positional.

        Example:
            >>> import freegrad_fx as fg
            >>> fg.rules.clip_norm(max_norm=0.5)
            clip_norm(max_norm=0.5, eps=1e-12)
        """
        if args:
            keywords = ", ".join(f"{name}=..." for name in self.parameters)
            raise TypeError(
                f"rule {self.name!r} accepts its parameters only by keyword: {self.name}({keywords}). "
                f"To compute its gradient, call rule.backward(grad, x=..., y=...)."
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
            over=self.over if over is None else self._checked_over(over),
        )

    def _checked_save(self, save: Any) -> str:
        if save not in SAVES:
            raise RuleError(unknown(f"value of save= for rule {self.name!r}:", save, SAVES))
        if save in OF_MASK and self.declaration.mask is None:
            able = ", ".join(n for n, r in _registry.items() if r.declaration.mask is not None)
            raise RuleError(
                f"rule {self.name!r} is not registered with mask=, so there is no mask to save. Omit save={save!r}, or "
                f"use a rule that has a mask: {able}."
            )
        return str(save)

    def _checked_compile(self, compile: Any) -> bool:
        if not isinstance(compile, bool):
            raise TypeError(f"compile of rule {self.name!r} must be True or False, got {compile!r}")
        return compile

    def _checked_over(self, over: Any) -> str:
        if over not in OVER:
            raise RuleError(unknown(f"value of over= for rule {self.name!r}:", over, OVER))
        if over != OVER[0] and not self.declaration.joint:
            able = ", ".join(n for n, r in _registry.items() if r.declaration.joint)
            raise RuleError(
                f"rule {self.name!r} is not registered with joint=True, so it cannot act on several gradients "
                f"together. Omit over=, or use a rule that can: {able}."
            )
        return str(over)

    def backward(
        self,
        grad: Tensor,
        x: Tensor | None = None,
        y: Tensor | None = None,
        **operands: Any,
    ) -> Tensor:
        """Compute the formula.

        Args:
            grad: The incoming gradient, that of the output.
            x: The input of the operation. Required if the formula reads it.
            y: The output of the operation. Required if the formula reads it.
            **operands: Further operands of the operation, by name, and ``f``, if the formula reads them.

        Returns:
            The gradient for ``x``; or what else the formula returns, a dict of gradients by name.

        Raises:
            RuleError: An input that the formula reads is missing, or a parameter is not bound.

        Example:
            >>> import torch, freegrad_fx as fg
            >>> x = torch.tensor([-2.0, 0.25, 3.0])
            >>> fg.rules.rectangular(a=-1.0, b=1.0).backward(torch.ones(3), x=x)
            tensor([0., 1., 0.])
        """
        given = {"x": x, "y": y, **operands}
        names = (*self.inputs, OPERATION) if self.declaration.operation else self.inputs
        for name in names:
            if given.get(name) is None:
                needed = ", ".join(f"{name}=..." for name in names)
                raise RuleError(
                    f"rule {self.name!r} reads {name!r}, which is missing. Call rule.backward(grad, {needed})."
                )
        self.require_bound()
        return self.function(grad, **{name: given[name] for name in names}, **self.bound)

    def at_operation(self, function: Callable[[Tensor], Tensor]) -> Rule:
        """The rule with the values that it has at an operation.

        Args:
            function: The operation, as a function of its input alone.

        Raises:
            RuleError: The rule is not possible at this operation.
        """
        of_op = self.declaration.of_op
        return self if of_op is None else self(**of_op(function, **self.bound))

    def at_site(self, name: str) -> Rule:
        """The rule with the values that it has at a site.

        Args:
            name: The name of the site.
        """
        of_site = self.declaration.of_site
        return self if of_site is None else self(**of_site(name, **self.bound))

    def require_bound(self) -> None:
        """Raise `RuleError` if a parameter has neither a default nor a value."""
        missing = [name for name in self.parameters if name not in self.bound]
        if missing:
            values = ", ".join(f"{name}=..." for name in missing)
            raise RuleError(
                f"rule {self.name!r} has no value for {', '.join(missing)}. Bind it: {self.name}({values})."
            )

    def _key(self) -> tuple[Any, ...]:
        # a tensor is compared by identity: its value can change, and == of tensors does not return a bool
        values = tuple(
            (name, id(value) if isinstance(value, Tensor) else value, isinstance(value, Tensor))
            for name, value in sorted(self.bound.items())
        )
        return (self.name, self.function, values, self.forward, self.save, self.compile, self.over)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rule) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((self.name, self.function, tuple(sorted(self.bound)), self.forward))

    def __repr__(self) -> str:
        return self._called(self.name if self.name.isidentifier() else f"get({self.name!r})")

    def __str__(self) -> str:
        """The rule for readers: by its name, also one that is no name in Python."""
        return self._called(self.name)

    def _called(self, head: str) -> str:
        defaults = self.declaration.defaults
        given = {
            n: v for n, v in self.given.items() if v is not None or defaults.get(n, 0) is not None
        }
        values = [f"{name}={shown(value)}" for name, value in given.items()]
        if self.forward is not None:
            values.append(f"forward={shown(self.forward)}")
        return f"{head}({', '.join(values)})" if values else head

    def _repr_html_(self) -> str:
        return described(self.info, str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebind, (self.name, self.given, self.forward)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rule:
        # a tensor can be a buffer of the model that is being copied, and a copied model draws its own numbers
        own: Any = {n: v for n, v in self.bound.items() if isinstance(v, Tensor | torch.Generator)}
        return self(**copy.deepcopy(own, memo)) if own else self


def _rebind(name: str, bound: dict[str, Any], forward: Forward | None) -> Rule:
    return get(name)(forward=forward, **with_names_of_now(name, bound))


def with_names_of_now(rule: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the options of a rule that an older version of the package saved, but not its parameters."""
    if "fuse" in options and rule in available():
        declared = get(rule).declaration
        if declared.takes_more or "fuse" in declared.parameters:
            return dict(options)
    return {"compile" if name == "fuse" else name: value for name, value in options.items()}


@dataclass(frozen=True)
class Composition:
    """Rules that are applied to the gradient in order. `compose` returns one.

    Attributes:
        parts: The rules. The first receives the incoming gradient.
    """

    parts: tuple[Rule, ...]

    @property
    def forward(self) -> Forward | None:
        """The replacement forward of the parts that have one, or None."""
        return next((rule.forward for rule in self.parts if rule.forward is not None), None)

    def __call__(self, *args: Any, **values: Any) -> Composition:
        """Raise `TypeError`: only the parts of a composition have parameters."""
        raise TypeError(
            "a composition has no parameters of its own. Bind the parameters of its parts, for example "
            "compose(get('clip_norm')(max_norm=1.0), get('noise')(sigma=0.01))."
        )

    def __repr__(self) -> str:
        return f"compose({', '.join(map(repr, self.parts))})"

    def __str__(self) -> str:
        return f"compose({', '.join(map(str, self.parts))})"


def learnt_by(rules: Iterable[Rule]) -> tuple[Tensor, ...]:
    """The tensors to which some rules give a gradient, each once."""
    return tuple({id(t): t for rule in rules for t in rule.learnt.values()}.values())


RuleLike: TypeAlias = str | Rule | Composition

_registry: dict[str, Rule] = {}
# Also holds rules that were overwritten, as a graph can still use them
_by_token: dict[str, Rule] = {}


def add(rule: Rule) -> None:
    """Register a rule under its name."""
    _registry[rule.name] = rule
    _registry.pop(UNSCALED + rule.name, None)
    if rule.declaration.token:
        _by_token[rule.declaration.token] = rule


def of_token(token: str) -> Rule:
    """Return the rule whose formula a token identifies, with its defaults."""
    if token not in _by_token and (inner := without_scale(token)):
        _add_with_scale(_by_token[inner])
    return _by_token[token]


def _add_with_scale(rule: Rule) -> None:
    """Register the rule with the parameter for the scale of the gradients, which has no value yet."""
    add(Rule(with_scale(rule.declaration), rule.bound, save=rule.save))


def get(rule: RuleLike) -> Rule:
    """Return the registered rule of a name. A `Rule` is returned unchanged.

    Args:
        rule: The name of a rule, or a `Rule`.

    Raises:
        RuleError: No rule of that name is registered.
    """
    if isinstance(rule, Rule):
        return rule
    try:
        return _registry[rule]  # type: ignore[index]
    except (KeyError, TypeError):
        if inner := without_scale(str(rule)):
            _add_with_scale(get(inner))
            return _registry[str(rule)]
        remedy = (
            "To use a rule of your own, first import the module that registers it. A ready table is called: "
            "freegrad_fx.tables.save_memory()."
        )
        if str(rule).casefold() in ("none", "null", NATIVE):
            raise RuleError(
                f"{rule!r} is not a rule. To keep the native backward, use None in a table, {NATIVE!r} in its file, "
                f"or a native() block."
            ) from None
        raise RuleError(
            unknown("rule", rule, available(), remedy, everything="freegrad_fx.list_rules()")
        ) from None


def available() -> list[str]:
    """Return the names of all registered rules, in the order of registration."""
    return [name for name in _registry if not without_scale(name)]


def compose(*rules: RuleLike) -> Composition:
    """Chain rules: ``compose(r1, r2)`` applies ``r1`` to the incoming gradient, and ``r2`` to the result.

    Formula: compose(r1, r2)(grad) = r2(r1(grad)). Both read the same ``x``.

    Args:
        *rules: Names of rules, rules, or compositions, whose parts are inserted. Each part has its own parameters.

    Raises:
        RuleError: No rule is given, a rule is unknown, or two parts have different replacement forwards.

    Example:
        >>> import freegrad_fx as fg
        >>> fg.compose("guided", fg.rules.scale(s=0.5))
        compose(guided, scale(s=0.5))
    """
    parts = tuple(part for rule in rules for part in _parts(rule))
    if not parts:
        raise RuleError("compose() needs at least one rule")
    if len({rule.forward for rule in parts} - {None}) > 1:
        raise RuleError(
            f"the parts of a composition have different forwards: {', '.join(map(repr, parts))}. Give forward= to one "
            f"of them, or the same to all."
        )
    return Composition(parts)


def _parts(rule: RuleLike) -> Iterator[Rule]:
    if isinstance(rule, Composition):
        yield from rule.parts
    else:
        yield get(rule)
