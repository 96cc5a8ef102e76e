"""The checks of an exported graph on the inputs of each call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import has_torch_function

from .._torch import exporting, tree
from ..errors import CaptureError

__all__ = ["Guards", "ranks", "recorded_guards"]


class Guards(nn.Module):
    """Raises `CaptureError` if the inputs of a call do not satisfy the assumptions of the export.

    Args:
        checks: Python expressions of ``args``, the flat inputs, each with its description.
    """

    def __init__(self, checks: tuple[tuple[str, str], ...]) -> None:
        super().__init__()
        self.checks = checks
        self._compile()

    def _compile(self) -> None:
        raising, recording = ["def check(*args):"], ["def record(*args):"]
        for number, (expression, _) in enumerate(self.checks):
            raising.append(f"    if not ({expression}): fail({number})")
            if not expression.startswith("isinstance"):
                recording.append(f"    torch._assert({expression}, messages[{number}])")
        messages = [
            f"the model was captured for inputs with {words}, and is called with others. Give transform() "
            f"dynamic_shapes=... for the dimensions that change, or example inputs with the sizes of the calls. If "
            f"the forward loops over such a dimension, use freegrad_fx.compile(model, rules). An example with a batch "
            f"of 1 makes the batch size constant; use at least 2."
            for _, words in self.checks
        ]

        def fail(number: int) -> None:
            raise CaptureError(messages[number])

        names: dict[str, Any] = {**exporting.guard_names(), "torch": torch, "inf": float("inf")}
        names.update(messages=messages, fail=fail)
        exec("\n".join([*raising, "    return", *recording, "    return"]), names)
        for function in ("check", "record"):
            self.__dict__[f"_{function}"] = exporting.traced_in_full(names[function])

    def forward(self, *args: Any) -> None:
        """Check the flat inputs of a call."""
        self.__dict__["_record" if has_torch_function(args) else "_check"](*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Guards, (self.checks,)

    def __deepcopy__(self, memo: dict[int, Any]) -> Guards:
        return Guards(self.checks)


def ranks(graph: fx.Graph) -> Iterator[tuple[str, str]]:
    """Checks of the number of dimensions and of None, for which export writes no guards."""
    for index, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            yield f"isinstance(args[{index}], torch.Tensor)", f"a tensor {node.name}"
            yield f"args[{index}].dim() == {value.dim()}", f"{node.name}.dim() == {value.dim()}"
        elif value is None:
            yield f"args[{index}] is None", f"{node.name} = None"


@contextlib.contextmanager
def recorded_guards() -> Iterator[list[tuple[str, str]]]:
    """Collect the guards that `ExportedProgram.module` writes, as expressions that can be pickled."""
    found: list[tuple[str, str]] = []

    def recording(write: Callable[..., Any]) -> Callable[..., Any]:
        def record(guards: list[str], paths: list[Any]) -> Any:
            for guard in guards:
                expression, words = guard, guard
                for index, path in enumerate(paths):
                    name = "L" + tree.key_text(path)
                    expression = expression.replace(name, f"args[{index}]")
                    words = words.replace(name, path[0].key + tree.key_text(path[1:]))
                found.append((expression, words.replace("\n", " ")))
            return write(guards, paths)

        return record

    with exporting.guards_written_by(recording):
        yield found
