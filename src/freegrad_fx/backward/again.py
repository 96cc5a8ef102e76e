"""How the outputs of operations can be computed again in the backward, so that nothing has to keep them.

A rule that is registered with `again` notes for the output of its operation a *recipe*: the operation, and where its
operands come from. These are parameters, tensors that some backward keeps anyway, or outputs that have a recipe. A rule
that would keep an operand can keep the recipe instead. Recipes are noted in eager mode only. A note keeps no operand
alive: an output that outlives its backward would hold what the backward has released.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .._torch.dispatch import function_transforms_active
from .._torch.dynamo import is_compiling
from .._torch.tensors import version
from ..core.declaration import Declaration
from ..errors import RuleError
from ..vocabulary.operands import constants_read, operation_of
from .saved import is_counted

__all__ = ["Operands", "Recipe", "carry", "hold", "note", "recipe_of"]


class Operands(NamedTuple):
    """The operation of a site, with its operands.

    Attributes:
        operation: The canonical name of the operation; ``""`` if it is not known.
        values: The operands by name, the first one first. None for one that the call leaves out.
        constants: The further arguments of the operation, by PyTorch's names.
    """

    operation: str
    values: Mapping[str, Tensor | None]
    constants: Mapping[str, Any]


class Recipe:
    """An operation whose output can be computed again.

    Attributes:
        operation: The canonical name of the operation.
        operands: The operands by name: tensors, or recipes. None for one that the call leaves out.
        constants: The further arguments of the operation, by PyTorch's names.
        length: The number of operations that are computed.
    """

    __slots__ = ("constants", "length", "operands", "operation")

    def __init__(
        self, operation: str, operands: Mapping[str, Any], constants: Mapping[str, Any]
    ) -> None:
        self.operation = operation
        self.operands = operands
        self.constants = constants
        inner = (v.length for v in operands.values() if isinstance(v, Recipe))
        self.length: int = 1 + sum(inner)

    def tensors(self, *, constants: bool = True) -> Iterator[Tensor]:
        """The tensors that it reads, with or without those among the further arguments."""
        for value in (*self.operands.values(), *(self.constants.values() if constants else ())):
            if isinstance(value, Recipe):
                yield from value.tensors(constants=constants)
            elif isinstance(value, Tensor):
                yield value

    def mapped(self, change: Callable[[Any], Any], *, constants: bool = True) -> Recipe:
        """The recipe with other values in the places of those that it reads, in the order of `tensors`."""

        def changed(values: Mapping[str, Any]) -> Mapping[str, Any]:
            return {
                name: value.mapped(change, constants=constants)
                if isinstance(value, Recipe)
                else change(value)
                for name, value in values.items()
            }

        operands = changed(self.operands)
        return Recipe(
            self.operation, operands, changed(self.constants) if constants else self.constants
        )

    def compute(self) -> Tensor:
        """Compute the output again."""
        operation = operation_of(self.operation)
        assert operation is not None
        for value in self.operands.values():
            if isinstance(value, Tensor) and value.numel() and not value.untyped_storage().nbytes():
                raise RuleError(
                    f"an input of a convolution cannot be computed again, because a parameter of {self.operation} has "
                    f"no memory at this time, as with FSDP. Shard both layers together, or leave out recompute=."
                )
        given = {n: v.compute() if isinstance(v, Recipe) else v for n, v in self.operands.items()}
        return operation(given, self.constants)


class _Noted(NamedTuple):
    """What is noted for an output.

    Attributes:
        recipe: Its recipe, usually with weak references to the operands.
        version: The version of the output.
        read: The versions of the operands.
    """

    recipe: Recipe
    version: int
    read: tuple[int, ...]

    def now(self) -> Recipe | None:
        """The recipe; None if an operand is gone, or has been written into."""
        found = self.recipe.mapped(
            lambda v: v() if isinstance(v, TensorWeakRef) else v, constants=False
        )
        operands = [*found.tensors(constants=False)]
        if len(operands) < len(self.read) or [*map(version, operands)] != [*self.read]:
            return None
        return found


def _noted_of(recipe: Recipe, y: Tensor) -> _Noted:
    noted = recipe
    # Where it is counted, the backward has aliases of the operands, and nothing but the note keeps the operands
    if not is_counted():
        noted = recipe.mapped(
            lambda v: TensorWeakRef(v) if isinstance(v, Tensor) else v, constants=False
        )
    return _Noted(noted, version(y), tuple(map(version, recipe.tensors(constants=False))))


_noted: Any = WeakTensorKeyDictionary()
"""For outputs what is noted of them."""

_held: Any = WeakTensorKeyDictionary()
"""The tensors that a backward keeps, with their versions."""

_MOST = 64
"""The length of the longest recipe."""


def note(y: Tensor, operands: Operands | None, declaration: Declaration, held: str = "") -> None:
    """Note how the output of an operation can be computed again, if its operands are there in the backward.

    Args:
        y: The output, as the model gets it.
        operands: The operation, with its operands as they are after the call.
        declaration: The rule of the site.
        held: An operand that the native backward of the call keeps.
    """
    if operands is None or not declaration.again or operands.operation != declaration.again:
        return
    if is_compiling() or not _is_plain(y) or not y.requires_grad or function_transforms_active():
        return
    if held and isinstance(kept := operands.values[held], Tensor):
        hold(kept)
    found = {name: _source(value, y) for name, value in operands.values.items()}
    if any(value is _MISSING for value in found.values()):
        return
    read = constants_read(operands.operation, operands.constants)
    # batch norms write running statistics without counting a version, so that a later write would not be noticed
    constants = {n: v.detach().clone() if isinstance(v, Tensor) else v for n, v in read.items()}
    recipe = Recipe(operands.operation, found, constants)
    if recipe.length <= _MOST:
        _noted[y] = _noted_of(recipe, y)


_MISSING = object()


def _source(value: Tensor | None, y: Tensor) -> Any:
    """Where an operand of an operation comes from in the backward: from itself, from its recipe, or `_MISSING`."""
    if value is None:
        return None
    if not _is_plain(value):
        return _MISSING
    written = value.untyped_storage() is y.untyped_storage()  # by the operation itself
    if not written and (_is_parameter(value) or _held.get(value) == version(value)):
        return value
    found = _valid(value, written)
    return _MISSING if found is None else found


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference()


def _is_parameter(tensor: Tensor) -> bool:
    return (tensor.is_leaf and tensor.requires_grad) or isinstance(tensor, nn.Parameter)


def _valid(tensor: Tensor, written: bool = False) -> Recipe | None:
    noted: _Noted | None = _noted.get(tensor)
    if noted is None or version(tensor) != noted.version + written:
        return None
    return noted.now()


def recipe_of(tensor: Tensor | None, longest: int) -> Recipe | None:
    """The recipe of a tensor; None if there is none, or the tensor or what it is computed from has been written into.

    Args:
        tensor: The tensor.
        longest: The number of operations that may be computed again.
    """
    if tensor is None or longest < 1 or is_compiling() or not _is_plain(tensor):
        return None
    recipe = _valid(tensor)
    return None if recipe is None or recipe.length > longest else recipe


def hold(tensor: Tensor) -> None:
    """Note that a backward keeps a tensor."""
    if not is_compiling() and _is_plain(tensor) and not function_transforms_active():
        _held[tensor] = version(tensor)


def carry(tensor: Tensor, copy: Tensor) -> None:
    """Note that a copy has the recipe of a tensor, whose values it has."""
    if not is_compiling() and _noted and _is_plain(tensor) and _is_plain(copy):
        recipe = _valid(tensor)
        if recipe is not None:
            _noted[copy] = _noted_of(recipe, copy)
