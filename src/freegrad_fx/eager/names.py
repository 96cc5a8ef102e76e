"""The names of the parameters of a model, also of those that take the place of others while the model runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from ..sites.parameters import named_parameters

__all__ = ["ParameterNames"]

Names = tuple[str, ...]


class ParameterNames:
    """The names of each parameter of a model.

    A parameter can be exchanged at any time: `fully_shard` registers the gathered parameters for the forward, and
    ``load_state_dict(assign=True)`` those that it loads. The new one has the names of the one that it replaces.

    Args:
        model: The model, or None; without a model no parameter has names.

    Attributes:
        tied: The names of each parameter, by each of them.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self._model = model
        self._known: dict[int, tuple[weakref.ref[Tensor], Names]] = {}
        self._others: dict[int, weakref.ref[Tensor]] = {}
        self.tied: dict[str, Names] = {}
        if model is not None:
            self._look(model)
            self.tied = {name: names for _, names in self._known.values() for name in names}

    def __iter__(self) -> Iterator[Names]:
        return iter(dict.fromkeys(self.tied.values()))

    def of(self, parameter: Tensor) -> Names | None:
        """The names of a parameter; None if the model does not hold it."""
        identity = id(parameter)
        held, names = self._known.get(identity, _NOTHING)
        if held() is parameter:
            return names
        if self._model is None or self._others.get(identity, _nothing)() is parameter:
            return None
        self._look(self._model)
        held, names = self._known.get(identity, _NOTHING)
        if held() is parameter:
            return names
        self._others[identity] = weakref.ref(parameter)
        return None

    def new_call(self) -> None:
        """Note that the model is called: it may have registered parameters that it did not hold before."""
        self._others.clear()

    def _look(self, model: nn.Module) -> None:
        """Note the names of the parameters that the model holds now."""
        tensors: dict[int, Tensor] = {}
        found: dict[int, Names] = {}
        for name, parameter in named_parameters(model):
            tensors[id(parameter)] = parameter
            found[id(parameter)] = (*found.get(id(parameter), ()), name)
        # Those that are gone, as the tensors of earlier calls of `functional_call`, are forgotten. The dict is replaced
        # as a whole, because other threads read it
        known = {i: entry for i, entry in [*self._known.items()] if entry[0]() is not None}
        for identity, names in found.items():
            tied = self.tied.get(names[0], names)
            known[identity] = weakref.ref(tensors[identity]), tied
        self._known = known


def _nothing() -> None:
    """Takes the place of a weak reference to a tensor that is gone."""


_NOTHING: tuple[Callable[[], Tensor | None], Names] = _nothing, ()
