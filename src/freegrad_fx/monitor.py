"""`GradientMonitor`: what the gradients of a model are while it is trained, for each parameter and each site."""

from __future__ import annotations

import importlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from ._torch.dynamo import backend_of, is_compiling
from ._torch.modules import COMPILED_CALL, compiled_model
from ._torch.replacing import replaced
from .backward.observing import observed_by
from .batches import restored
from .blocks import native
from .capture.captured import CapturedModule
from .compared import Statistic
from .context import surrounded
from .core.markup import html_view
from .plan.layout import aligned, terminal_width

__all__ = ["GradientMonitor"]

MEASURES = ("norm", "zeroed", "nonfinite", "cosine")


class GradientMonitor:
    """Records the gradients of a model while it is trained: of each parameter, and at each site with a rule.

    Formula: for a gradient r with n entries, ``norm`` is ‖r‖, ``zeroed`` the share of the entries with r = 0,
    ``nonfinite`` the number of entries that are not finite; ``cosine`` is ⟨g, r⟩/(‖g‖·‖r‖), where g is the native
    gradient.

    It is a context manager. In it, call `step` after each backward, while the gradients are there; or give the
    optimizer, whose step then does it. No gradient changes. On exit, also by an error, all hooks are removed.

    A site is recorded with the gradient that its rules give the input of the operation; those of several backwards of a
    step are measured as one, until the optimizer sets the gradients to zero. Sites are not observed in compiled code,
    where `torch.func` computes the gradient, and in replicas of `nn.DataParallel`: there, only parameters are recorded.

    Args:
        model: The model: transformed, compiled, or plain, for example in blocks of `use`; or one that contains
            transformed models. Sites are recorded while the model is called, or a transformed model in it.
        optimizer: The optimizer, at whose steps is recorded; None to call `step`. A `GradScaler` leaves out steps, of
            which there is then no record.
        every: The number of steps from one record to the next.
        cosine_every: The number of records from one with cosines to the next, for those that have a `closure`.
        file: Where to append the records as JSON lines. A value that is not finite is written as null.
        tensorboard: A ``SummaryWriter`` of TensorBoard, or the folder for one.

    Attributes:
        records (list[dict[str, Any]]): The records, as dicts: ``step``, ``kind`` (``"parameter"`` or ``"site"``),
            ``name``, and the measures; ``cosine`` is None where it was not computed.

    Raises:
        TypeError: `model` is not a module, or `optimizer` is not an optimizer.
        ValueError: `every` or `cosine_every` is not a whole number from 1.
        ImportError: `tensorboard` is a folder, and TensorBoard is not installed.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> gm = fg.transform(model, {"relu": "straight_through"})
        >>> optimizer = torch.optim.SGD(gm.parameters(), lr=0.1)
        >>> with fg.GradientMonitor(gm, optimizer) as monitor:
        ...     gm(torch.randn(16, 4)).square().mean().backward()
        ...     optimizer.step()
        >>> [(record["kind"], record["name"]) for record in monitor.records][-2:]
        [('parameter', '2.bias'), ('site', '1:relu[0]')]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        every: int = 1,
        cosine_every: int = 1,
        file: str | os.PathLike[str] | None = None,
        tensorboard: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model has to be an nn.Module, got {type(model).__name__}")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer has to be a torch.optim.Optimizer, got {optimizer!r}")
        for name, number in (("every", every), ("cosine_every", cosine_every)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} has to be a whole number from 1, got {number!r}")
        inner = compiled_model(model)
        compiled = inner is not None or backend_of(model) is not None
        self._model = model if inner is None else inner
        self._compiled = compiled or self._model.__dict__.get(COMPILED_CALL) is not None
        self._optimizer, self._every, self._cosine_every = optimizer, every, cosine_every
        self._file, self._tensorboard = file, tensorboard
        if isinstance(tensorboard, str | os.PathLike):
            _writer_class()
        self.records: list[dict[str, Any]] = []
        self._steps = self._recorded = 0
        self._open = False
        self._sites: dict[str, list[tuple[int, Tensor]]] = {}
        self._random: list[tuple[torch.device, Tensor]] | None = None
        self._entered = _Entered()

    # --- the context ---

    def __enter__(self) -> Self:
        if self._open:
            raise RuntimeError("this GradientMonitor is entered already; make one for each model")
        with ExitStack() as stack:
            if not self._compiled:
                for path, module in self._observed():
                    for handle in self._hooked(f"{path}." if path else "", module):
                        stack.callback(handle.remove)
            if self._optimizer is not None:
                hook = self._optimizer.register_step_pre_hook(lambda *_: self.step())
                stack.callback(hook.remove)
                # After a step that a GradScaler has left out, the gradients are not those of the next step
                stack.enter_context(replaced(self._optimizer, "zero_grad", self._forgetting))
            self._lines = None
            if self._file is not None:
                self._lines = stack.enter_context(Path(self._file).open("a", encoding="utf-8"))
            self._writer = self._tensorboard
            if isinstance(self._tensorboard, str | os.PathLike):
                self._writer = _writer_class()(os.fspath(self._tensorboard))
                stack.callback(self._writer.close)
            self._undo = stack.pop_all()
        self._open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._forget()
        while self._entered.contexts:  # an interrupt can leave a call without its hook
            self._entered.contexts.pop().__exit__(None, None, None)
        self._undo.close()

    def _forgetting(self, zero_grad: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            zero_grad(*args, **kwargs)
            self._forget()

        return run

    def _forget(self) -> None:
        """Forget what the sites gave, and the random numbers of the step."""
        self._sites.clear()
        self._random = None

    def _observed(self) -> list[tuple[str, nn.Module]]:
        """The model, and the transformed models in it."""
        return [
            (path, module)
            for path, module in self._model.named_modules()
            if module is self._model or isinstance(module, CapturedModule)
        ]

    def _hooked(self, prefix: str, module: nn.Module) -> Iterable[Any]:
        """Let the sites be observed while a module is called."""

        def note(site: str, grad: Tensor) -> None:
            if self._open:
                self._sites.setdefault(prefix + site, []).append(_measured(grad))

        def begin(*_: Any) -> None:
            if is_compiling():
                return
            observed: AbstractContextManager[Any] = ExitStack()
            if self._records():
                if self._random is None:
                    self._random = _random_state(self._model)
                observed = surrounded(lambda: observed_by(self, note))
            observed.__enter__()
            self._entered.contexts.append(observed)

        def end(*_: Any) -> None:
            if not is_compiling() and self._entered.contexts:
                self._entered.contexts.pop().__exit__(None, None, None)

        yield module.register_forward_pre_hook(begin, prepend=True)
        yield module.register_forward_hook(end, always_call=True)

    def _records(self) -> bool:
        return self._open and self._steps % self._every == 0

    # --- a step ---

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """Record the gradients that the parameters have now, and what the sites gave since the last step.

        Args:
            closure: A function that returns the loss of this step, without a backward, for the cosines of the
                parameters with the native gradient. It is called with all rules off and with the random numbers of
                this step; buffers and random states are restored. None to record no cosines.

        Raises:
            RuntimeError: The monitor is not entered.
        """
        if not self._open:
            raise RuntimeError("a GradientMonitor records only in its block: with monitor: ...")
        if self._records():
            self._record(closure)
        self._forget()
        self._steps += 1

    def _record(self, closure: Callable[[], Tensor] | None) -> None:
        named = {n: p for n, p in self._model.named_parameters() if p.grad is not None}
        found: list[tuple[str, str, list[tuple[int, Tensor]]]] = [
            ("parameter", name, [_measured(parameter.grad)])  # type: ignore[arg-type]
            for name, parameter in named.items()
        ]
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        # the rules of a parameter give it a part of what it has now
        found += [("site", n, parts) for n, parts in self._sites.items() if n not in parameters]
        cosines: dict[str, float] = {}
        if closure is not None and self._recorded % self._cosine_every == 0:
            cosines = self._cosines(named, closure)
        self._recorded += 1
        first = len(self.records)
        for (kind, name, _), measures in zip(found, _values([f[2] for f in found]), strict=True):
            record = {"step": self._steps, "kind": kind, "name": name, **measures}
            self.records.append({**record, "cosine": cosines.get(name)})
        for record in self.records[first:]:
            self._write(record)
        if self._lines is not None:
            self._lines.flush()

    def _cosines(
        self, named: dict[str, nn.Parameter], closure: Callable[[], Tensor]
    ) -> dict[str, float]:
        """The cosines of the gradients of parameters with the native ones."""
        kept, self._open = (self._sites, self._random), False  # nothing of the closure is recorded
        try:
            with torch.enable_grad(), restored(self._model, 0), native():
                for device, state in kept[1] or ():
                    _set_random_state(device, state)
                gradients = torch.autograd.grad(closure(), [*named.values()], allow_unused=True)
        finally:
            self._open = True
            self._sites, self._random = kept
        products = []
        for parameter, gradient in zip(named.values(), gradients, strict=True):
            r = _flat(parameter.grad)  # type: ignore[arg-type]
            g = torch.zeros_like(r) if gradient is None else _flat(gradient)
            products.append((r @ g / (r.norm() * g.norm())).double().cpu())
        values = torch.stack(products).tolist() if products else []
        return dict(zip(named, values, strict=True))

    def _write(self, record: dict[str, Any]) -> None:
        if self._lines is not None:
            finite = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in record.items()
            }
            self._lines.write(json.dumps(finite, ensure_ascii=False) + "\n")
        if self._writer is not None:
            for measure in MEASURES:
                if record[measure] is not None:
                    tag = f"{record['kind']}/{record['name']}/{measure}"
                    self._writer.add_scalar(tag, record[measure], record["step"])

    # --- views ---

    def columns(self) -> dict[str, list[Any]]:
        """Return the records as columns, by the name of the column, for example for ``pandas.DataFrame``."""
        names = ("step", "kind", "name", *MEASURES)
        return {name: [record[name] for record in self.records] for name in names}

    def __str__(self) -> str:
        cells = self._cells()
        return (
            f"{self._head()}\n\n{aligned(cells, terminal_width())}" if cells[1:] else self._head()
        )

    def _repr_html_(self) -> str:
        return html_view(self._head(), self._cells())

    def _head(self) -> str:
        name, count = type(self._model).__name__, self._recorded
        sites = "; of compiled code, only parameters" * self._compiled
        hint = (
            "" if self._steps else ". Give the monitor the optimizer, or call step() in each step"
        )
        return f"{name}: gradients of {count} step{'s' * (count != 1)}{sites}{hint}"

    def _cells(self) -> list[list[str]]:
        """The mean and the spread of each measure over the records."""
        rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for record in self.records:
            rows.setdefault((record["kind"], record["name"]), []).append(record)
        lines = [["kind", "name", *MEASURES]]
        for (kind, name), records in rows.items():
            columns = ([r[m] for r in records if r[m] is not None] for m in MEASURES)
            lines.append([kind, name, *(str(Statistic.of(column)) for column in columns)])
        return lines


class _Entered(threading.local):
    """The contexts of the calls that are running in a thread, the innermost last."""

    def __init__(self) -> None:
        self.contexts: list[AbstractContextManager[Any]] = []


def _flat(grad: Tensor) -> Tensor:
    """The entries of a gradient, in at least single precision."""
    grad = grad.detach().to_dense()
    grad = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.flatten().to(wide)


def _measured(grad: Tensor) -> tuple[int, Tensor]:
    """The number of entries of a gradient; its norm, and the numbers of zeros and of entries that are not finite."""
    with torch.no_grad():
        flat = _flat(grad)
        counts = (flat == 0).sum(), (~flat.isfinite()).sum()
        return flat.numel(), torch.stack([flat.norm().double(), *(n.double() for n in counts)])


def _values(measured: list[list[tuple[int, Tensor]]]) -> list[dict[str, float]]:
    """The measures of gradients that were measured in parts. It waits once for the device."""
    parts = [part for parts in measured for part in parts]
    numbers = iter(torch.stack([m.cpu() for _, m in parts]).tolist() if parts else [])
    found = []
    for own in measured:
        rows = [next(numbers) for _ in own]
        size = sum(entries for entries, _ in own)
        zeros = sum(row[1] for row in rows)
        found.append(
            {
                "norm": math.hypot(*(row[0] for row in rows)),
                "zeroed": zeros / size if size else math.nan,
                "nonfinite": int(sum(row[2] for row in rows)),
            }
        )
    return found


def _random_state(model: nn.Module) -> list[tuple[torch.device, Tensor]]:
    """The states of the random numbers of the CPU and of the devices of a model."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    found = [(torch.device("cpu"), torch.get_rng_state())]
    return found + [(device, torch.cuda.get_rng_state(device)) for device in devices]


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


def _writer_class() -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        raise ImportError(
            "tensorboard= needs TensorBoard. Install it with `pip install tensorboard`; or give file= for JSON lines."
        ) from None
