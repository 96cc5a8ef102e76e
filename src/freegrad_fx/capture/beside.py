"""What rules learn, among the parameters of a model that is not transformed: beside its own, not in its state_dict."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .._torch.modules import parameters_of, remove_state_dict_hooks
from .._torch.tensors import mark_as_parameter
from ..core.contract import RULE_PARAMETER

__all__ = ["hold_beside", "release"]


def hold_beside(wrapper: nn.Module, tensors: Iterable[Tensor]) -> None:
    """Let a model, or the wrapper of a compiled one, have tensors among its parameters, but not in its state_dict."""
    names: dict[str, Tensor] = {}
    free = (
        name
        for number in itertools.count()
        if not hasattr(wrapper, name := f"{RULE_PARAMETER}{number}")
    )
    for tensor in (t for t in tensors if t.is_leaf):
        if all(tensor is not own for own in wrapper.parameters()):
            mark_as_parameter(tensor)
            names[next(free)] = tensor
    parameters_of(wrapper).update(names)  # type: ignore[arg-type]
    if names:
        wrapper.register_state_dict_post_hook(_leave_out)  # type: ignore[no-untyped-call]
        wrapper.register_load_state_dict_post_hook(_leave_in_place)  # type: ignore[no-untyped-call]


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in parameters_of(module):
        if name.startswith(RULE_PARAMETER):
            state.pop(prefix + name, None)


def _leave_in_place(module: nn.Module, incompatible: Any) -> None:
    """Let nothing be missed in a state_dict; in it, `assign=True` would exchange what the rules learn."""
    missing: list[str] = incompatible.missing_keys
    own = {name for name in parameters_of(module) if name.startswith(RULE_PARAMETER)}
    missing[:] = [key for key in missing if key.rpartition(".")[2] not in own]


def release(model: nn.Module) -> None:
    """Undo what `hold_beside` did to the modules of a model."""
    for module in model.modules():
        own = parameters_of(module)
        for name in [name for name in own if name.startswith(RULE_PARAMETER)]:
            del own[name]
        remove_state_dict_hooks(module, (_leave_out, _leave_in_place))
