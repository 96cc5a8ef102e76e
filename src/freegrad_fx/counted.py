"""`memory`: the bytes that a forward keeps for its backward, by site, beside those of the native backward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from . import ops
from ._torch.modules import compiled_model, is_compiled_wrapper, uncompiled_call
from ._torch.tree import leaves
from .backward.saved import packing_counted
from .batches import restored
from .blocks import native
from .context import intercepting_blocks
from .core.markup import html_view
from .core.rule import Rule
from .eager.running import running_modules
from .plan import report
from .plan.decision import Bytes
from .plan.layout import aligned, as_json, in_bytes, terminal_width
from .vocabulary.activations import OPS
from .vocabulary.arguments import name_of
from .vocabulary.recognition import recognise_call

__all__ = ["MemoryReport", "MemoryRow", "count", "memory"]


@dataclass(frozen=True)
class MemoryRow:
    """What one place of a model keeps for the backward.

    Attributes:
        site: The path of the module and the operation, ``layer1.0:relu``; calls of one operation there are added up.
        rule: The rules that act there, separated by commas; ``""`` if none does.
        native: The bytes that are kept without rules.
        kept: The bytes that are kept with them.
    """

    site: str
    rule: str
    native: int
    kept: int


@dataclass(frozen=True)
class MemoryReport:
    """The bytes that a forward keeps for its backward, native and with rules. ``print`` it for a table.

    Distinct storages are counted, each at the operation that keeps it first, without parameters, buffers and inputs.

    Attributes:
        model: The name of the model's class.
        rows: The places that keep something, in the order of execution.
        notes: What the numbers do not show.
    """

    model: str
    rows: tuple[MemoryRow, ...]
    notes: tuple[str, ...] = ()

    @property
    def native(self) -> int:
        """The bytes that are kept in total without rules."""
        return sum(row.native for row in self.rows)

    @property
    def kept(self) -> int:
        """The bytes that are kept in total with rules."""
        return sum(row.kept for row in self.rows)

    @property
    def ratio(self) -> float:
        """`kept` over `native`; 1 if nothing is kept natively."""
        return self.kept / self.native if self.native else 1.0

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int | None = None) -> str:
        """The report as an aligned table.

        Args:
            width: The maximal length of a line; 0 for no limit. Default: the width of the terminal.
        """
        width = terminal_width() if width is None else width
        parts = [self._head(), aligned(self._cells(), width) if self.rows else "", *self.notes]
        return "\n\n".join(part for part in parts if part)

    def _repr_html_(self) -> str:
        return html_view(self._head(), self._cells(), self.notes)

    def _head(self) -> str:
        return (
            f"{self.model}: {in_bytes(self.kept)} kept for the backward, {in_bytes(self.native)} natively "
            f"(× {self.ratio:.3f})"
        )

    def _cells(self) -> list[list[str]]:
        lines = [["site", "rule", "native", "kept"]]
        lines += [[r.site, r.rule, in_bytes(r.native), in_bytes(r.kept)] for r in self.rows]
        return [*lines, ["total", "", in_bytes(self.native), in_bytes(self.kept)]]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data: dicts, lists, text and numbers of bytes."""
        return {
            "model": self.model,
            "native": self.native,
            "kept": self.kept,
            "ratio": self.ratio,
            "rows": [vars(row) for row in self.rows],
            "notes": list(self.notes),
        }

    def to_json(self, indent: int | None = None) -> str:
        """The report as JSON."""
        return as_json(self.to_dict(), indent)


def memory(model: nn.Module, /, *inputs: Any, **keywords: Any) -> MemoryReport:
    """Count the bytes that a forward keeps for its backward, with the rules that are in force and without.

    The model runs twice in its present mode, on the same random numbers, with gradients enabled; no backward runs. Its
    buffers and PyTorch's random state are restored. Tensors of the input do not require a gradient unless they do so
    already, as in training.

    Args:
        model: A transformed model; a compiled one; or a plain one, in a `use` block if rules are to act. Of compiled
            code only the total is known.
        *inputs: Positional arguments of the model.
        **keywords: Keyword arguments.

    Returns:
        The bytes, by site and in total.

    Raises:
        TypeError: `model` is no module.

    Example:
        >>> import torch, freegrad_fx as fg
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
        >>> gm = fg.transform(model, {"gelu": fg.rules.few_bit(bits=2)})
        >>> found = fg.memory(gm, torch.randn(16, 4))
        >>> found.native, found.kept
        (1024, 544)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"memory counts what the forward of an nn.Module keeps, got {type(model).__name__}. Wrap a function in a "
            f"module."
        )
    with_rules, without, compiled = _both(model, inputs, keywords)
    kept, native_sizes = _by_operation(with_rules.sizes), _by_operation(without.sizes)
    rules: dict[str, dict[str, None]] = {}
    for site, names in with_rules.rules.items():
        rules.setdefault(_operation(site), {}).update(names)
    rows = (
        MemoryRow(
            site, ", ".join(rules.get(site, ())), native_sizes.get(site, 0), kept.get(site, 0)
        )
        for site in dict.fromkeys((*native_sizes, *kept))
    )
    notes = ("Of compiled code only the total is known.",) if compiled else ()
    return MemoryReport(type(compiled_model(model) or model).__name__, tuple(rows), notes)


def count(
    model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[dict[str, Bytes], Bytes]:
    """What a transformed model keeps: at each site that has run with rules, and in total.

    Args:
        model: The model.
        inputs: Positional arguments.
        keywords: Keyword arguments.
    """
    with_rules, without, _ = _both(model, inputs, keywords)
    kept, native_sizes = with_rules.sizes, without.sizes
    sites = {site: Bytes(native_sizes.get(site, 0), kept.get(site, 0)) for site in with_rules.rules}
    return sites, Bytes(sum(native_sizes.values()), sum(kept.values()))


def _both(
    model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[_Counter, _Counter, bool]:
    """Count with rules and without; and whether parts of the model are compiled."""
    inner = compiled_model(model) or model
    compiled = any(is_compiled_wrapper(m) or uncompiled_call(m) is not m for m in model.modules())

    def counted(block: AbstractContextManager[Any]) -> _Counter:
        with restored(model, 0), torch.enable_grad(), block:
            if compiled:  # the compiler itself must not be counted
                model(*inputs, **keywords)
        with restored(model, 0), torch.enable_grad(), block:
            return _counted(inner, lambda: model(*inputs, **keywords), inputs, keywords, compiled)

    return counted(nullcontext()), counted(native()), compiled


def _operation(site: str) -> str:
    """The path and the operation of a site, without the number of the call."""
    return site.partition("[")[0]


def _by_operation(sizes: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for site, size in sizes.items():
        found[_operation(site)] = found.get(_operation(site), 0) + size
    return found


class _Kept:
    """What autograd holds in the place of a saved tensor, so that it is known how long it is held."""

    __slots__ = ("__weakref__", "instead", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.instead: list[Tensor] | None = None  # what a rule would keep in its place


class _Counter(TorchFunctionMode):
    """Tells at which operation of a model tensors are saved.

    Attributes:
        sizes: The bytes by site; by operation, for one without rules.
        rules: The names of the rules by site.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes: dict[str, int] = {}
        self.rules: dict[str, dict[str, None]] = {}
        self._paths: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self._saved: list[tuple[weakref.ref[_Kept], list[str]]] = []
        self._now = [""]
        self._unpacked: _Kept | None = None
        self._made: dict[int, tuple[weakref.ref[Tensor], list[str]]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        before, self._now = self._now, [self._site(func, args, kwargs)]
        try:
            result = func(*args, **kwargs)
        finally:
            now, self._now = self._now, before
        if isinstance(result, Tensor):
            self._made[id(result)] = weakref.ref(result), now
        return result

    def _site(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> str:
        """The site of a call. That of an operation in a graph becomes known by the call after it."""
        if func is ops.decoupled:
            site = str(kwargs.get("site", ""))
            rule = kwargs.get("rule", "")
            if rule:
                name = rule.name if isinstance(rule, Rule) else rule
                self.rules.setdefault(site, {})[name] = None
            made, label = self._made.get(id(args[0]), (None, None))
            if made is not None and label is not None and made() is args[0]:
                label[0] = site
            return site
        spelling = recognise_call(func, args, kwargs, OPS)
        op = name_of(func).strip("_") if spelling is None else spelling.op.name
        return f"{self._path() or '<root>'}:{op}"

    def _path(self) -> str:
        for running in running_modules(3) or ():
            if (path := self._paths.get(running.module)) is not None:
                return path
        return ""

    def pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        label = self._now if self._now[0] else [self._path() or "<root>"]
        self._saved.append((weakref.ref(kept), label))
        return kept

    def unpack(self, kept: _Kept) -> Tensor:
        self._unpacked = kept
        return kept.tensor

    def packed(self, value: Any) -> None:
        """Count a value instead of the tensor that was unpacked last."""
        assert self._unpacked is not None
        self._unpacked.instead = [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]

    def count(self, tensors: list[Tensor]) -> None:
        """Count what is still held, without the storages of some tensors."""
        # by identity: without memory, as on the device "meta", all addresses are 0
        known = {id(s): s for s in (tensor.untyped_storage() for tensor in tensors)}
        for held, label in self._saved:
            kept = held()
            if kept is None:
                continue
            for tensor in [kept.tensor] if kept.instead is None else kept.instead:
                storage = tensor.untyped_storage()
                if id(storage) not in known:
                    known[id(storage)] = storage
                    self.sizes[label[0]] = self.sizes.get(label[0], 0) + storage.nbytes()


def _counted(
    model: nn.Module, run: Callable[[], Any], inputs: Any, keywords: Any, compiled: bool
) -> _Counter:
    """Run a forward, and count what it keeps."""
    counter = _Counter(model)
    given = [leaf for leaf in leaves((inputs, keywords)) if isinstance(leaf, Tensor)]
    hooks = torch.autograd.graph.saved_tensors_hooks(counter.pack, counter.unpack)
    with (
        hooks,
        packing_counted(counter.unpack, counter.packed),
        nullcontext() if compiled else counter,
    ):
        output = run()
    for block in intercepting_blocks():
        for decision in report(block).decisions:
            for rule in decision.rules:
                counter.rules.setdefault(decision.site.name, {})[rule.name] = None
    counter.count([*given, *model.parameters(), *model.buffers()])
    del output  # not earlier: it holds what was saved
    return counter
